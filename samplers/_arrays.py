"""Arrays with JSON in the header as one safetensors file. Reading runs no code, and refuses whatever is not such a file
before it takes time or memory."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass

import numpy as np

from ._files import write_whole
from ._needs import needs

MOST_CHARACTERS = 10_000  # of the JSON


@dataclass(frozen=True)
class Layout:
    """A kind of file: what messages call it, the key of its JSON, the number format of each array, its largest size."""

    what: str
    key: str
    kinds: dict[str, str]
    most_bytes: int


def write(path, layout: Layout, arrays: dict[str, np.ndarray], text: str) -> None:
    """Write the file; one that is there is replaced once the new one is complete.

    Raises:
        ValueError: it would be too large to be read again.
        ImportError: the package safetensors is not installed.
    """
    save = needs("safetensors.numpy", f"writing a {layout.what}").save
    content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {layout.key: text})
    if len(content) > layout.most_bytes:
        raise ValueError(f"this {layout.what} takes {len(content)} bytes; at most {layout.most_bytes} can be saved")
    write_whole(path, content)


def read(path, layout: Layout) -> tuple[dict, dict[str, np.ndarray]]:
    """The JSON and the arrays.

    Raises:
        ValueError: the file is missing, truncated or something else. The message does not name it.
        ImportError: the package safetensors is not installed.
    """
    safetensors = needs("safetensors", f"reading a {layout.what}")
    try:
        require_file(path, layout.most_bytes)
        with safetensors.safe_open(os.fspath(path), framework="numpy") as f:
            about = parsed((f.metadata() or {}).get(layout.key), layout)
            kinds = {name: f.get_slice(name).get_dtype() for name in f.keys()}
            for name in sorted(set(kinds) ^ set(layout.kinds)):
                has = "no" if name in kinds else "an"
                raise ValueError(f"a {layout.what} has {has} array {name[:100]!r}")
            for name, kind in layout.kinds.items():
                if kinds[name] != kind:
                    raise ValueError(f"{name} is {kinds[name]}, but in a {layout.what} it is {kind}")
            return about, {name: f.get_tensor(name) for name in layout.kinds}
    except OSError as error:
        raise ValueError(error.strerror or f"not a {layout.what}") from None
    except safetensors.SafetensorError:
        raise ValueError(f"not a {layout.what} (no safetensors file, or cut short)") from None


def require_file(path, most_bytes: int) -> None:
    """Raises ValueError for what is not a regular file, or is too large; OSError if there is nothing."""
    status = os.stat(path)  # before it is opened: a pipe would wait for its writer
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    if status.st_size > most_bytes:
        raise ValueError(f"a file of {status.st_size} bytes, but at most {most_bytes} are read")


def parsed(text: str | None, layout: Layout) -> dict:
    """The JSON of a header, with a whole number as its version.

    Raises:
        ValueError: it is missing, too long, or something else.
    """
    if text is None:
        raise ValueError(f"not a {layout.what} (no {layout.key!r} in its header)")
    try:
        about = json.loads(text) if len(text) < MOST_CHARACTERS else None
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or type(about.get("version")) is not int:
        raise ValueError(f"not a {layout.what} (its header has no version)")
    return about
