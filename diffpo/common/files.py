"""Writing files and folders: all of it or nothing, and one message if the disk is full or cannot be written.

Everything is written under a hidden name beside its own, .NAME.part, flushed to the disk and then renamed. After a
crash or a power cut there is the old content or the new. What stays under a hidden name is never read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from .errors import DiffpoError

FULL = (errno.ENOSPC, errno.EDQUOT)


def beside(path: Path, ending: str = "part") -> Path:
    """The hidden name beside ``path`` under which it is prepared: .NAME.ENDING, with a hash if the name is too long."""
    name = f".{path.name}.{ending}"
    if len(os.fsencode(name)) > 255:
        name = f".{blake2b(os.fsencode(path.name), digest_size=16).hexdigest()}.{ending}"
    return path.with_name(name)


def write_atomic(path: Path, content: bytes, shared: bool = False) -> None:
    """Write a file, as `whole_file` does."""
    with whole_file(path, shared) as file:
        file.write(content)


@contextlib.contextmanager
def whole_file(path: Path, shared: bool = False) -> Iterator[BinaryIO]:
    """An open file that becomes ``path`` at the end. After an exception ``path`` is as it was before.

    ``shared``: another run may be writing the same file now; the last one to end replaces the other's. Folders above it
    are made.
    """
    part = beside(path, f"{secrets.token_hex(8)}.part" if shared else "part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


@contextlib.contextmanager
def whole_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes ``path`` at the end. After an exception it is gone.

    ``replace``: a folder of that name is deleted just before the renaming. Without it there may only be an empty one.
    """
    part = beside(path)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        mode = part.stat().st_mode & 0o666
        for each in (*part.rglob("*"), part):
            if each.is_file():
                each.chmod(mode)  # safetensors writes for the user alone
            _sync(each)
        if replace:
            shutil.rmtree(path, ignore_errors=True)
        elif os.name == "nt" and path.is_dir():
            path.rmdir()  # Windows replaces no folder, not even an empty one
        os.replace(part, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sync(path: Path) -> None:
    """What was written to a file or folder is on the disk afterwards."""
    windows = os.name == "nt"  # which opens no folder, and writes out only what is open for writing
    if windows and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def system_error(error: Exception) -> OSError | None:
    """The system's error, if ``error`` is one or wraps one. Writers of other libraries keep only its words: safetensors
    and tokenizers with its number, torch and tensorboard without."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, DiffpoError):  # which is said already
        return None
    if code := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(code[1]), os.strerror(int(code[1])))
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if "No space left" in str(error) else None


def reason(error: OSError) -> str:
    """What the system said, in words."""
    return "the disk is full" if error.errno in FULL else error.strerror or str(error)


def cannot_write(what: object, error: OSError, setting: str = "", kept: str = "") -> DiffpoError:
    """The error to raise when ``what`` could not be written. ``setting`` chooses another folder; ``kept`` is a sentence
    on what is left of the work so far."""
    mend = "Make room" if error.errno in FULL else "Correct that"
    where = f" with {setting}" if setting else ""
    return DiffpoError(
        f"cannot write {what}: {reason(error)}. {kept}{' ' if kept else ''}{mend} or choose another folder{where}, and "
        f"run the same command again"
    )


@contextlib.contextmanager
def writing(what: object, setting: str = "", kept: str = "What is finished is kept.") -> Iterator[None]:
    """Within it an error of the system becomes that of `cannot_write`."""
    try:
        yield
    except Exception as error:
        if (found := system_error(error)) is None:
            raise
        raise cannot_write(what, found, setting, kept) from error
