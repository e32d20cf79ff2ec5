"""Image files: their suffixes, which files may be opened, and the only decoder from bytes to RGB."""

from __future__ import annotations

import errno
import functools
import importlib
import io
import os
import re
import stat
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image, ImageColor, ImageOps

from .text import plain

BACKGROUND = "white"  # behind transparent pixels, unless a setting says otherwise
ENCODED = 2**29  # bytes of an image file, at most
PIXELS = 2**27  # of an image, at most: 11,585 x 11,585
LARGE = 2**24  # pixels; larger images are decoded one at a time, to save memory

# never opened: EPS is run by another program, the others are tables or need a special viewer
NEVER = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
# Pillow reads these with a plug-in package
EXTRA = {
    "HEIF": ("pillow-heif", "pillow_heif", (".heic", ".heif", ".hif")),
    "JXL": ("pillow-jxl-plugin", "pillow_jxl", (".jxl",)),
}
# formats of most pictures, with where their files begin with what
STARTS = (("PNG", 0, b"\x89PNG\r\n\x1a\n"), ("JPEG", 0, b"\xff\xd8\xff"), ("WEBP", 8, b"WEBP"))
LAYERED = {"MPO", "PSD"}  # their frames are previews and layers; the first is the image
LFS = b"version https://git-lfs"  # the start of a git LFS pointer, which a clone has in place of a large file
URL = re.compile(r"[a-z][a-z0-9+.-]+:(//|[a-z]+/[a-z0-9.+-]+[;,])", re.IGNORECASE)  # also data:image/png;base64,

Image.init()
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `PIXELS` is the limit
_one_at_a_time = threading.Lock()


class BadRow(Exception):
    """Why a row cannot be used. ``reason``: a short text, equal for equal faults so that they can be counted;
    ``detail``: the value or the cause; ``about``: the file or column."""

    def __init__(self, reason: str, detail: object = "", about: str = "") -> None:
        self.reason, self.detail, self.about = reason, plain(detail, 300), plain(about, 200)
        super().__init__(": ".join(part for part in (reason, self.about, self.detail) if part))

    def of(self, name: str) -> BadRow:
        """The same fault, about ``name`` unless it already names a file or column."""
        return BadRow(self.reason, self.detail, self.about or name)


class ShardMember(NamedTuple):
    """An image in a shard (tar file). Only `data.files.shards` makes these; no value in a user's table becomes one."""

    shard: Path
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.shard.name}: {self.name}"


@functools.lru_cache
def formats() -> tuple[str, ...]:
    """The formats that the installed Pillow and its plug-ins can open, by Pillow's names."""
    for _, module, _ in EXTRA.values():
        with suppress(ImportError):
            plugin = importlib.import_module(module)
            getattr(plugin, "register_heif_opener", lambda: None)()
    return tuple(name for name in Image.OPEN if name not in NEVER)


@functools.lru_cache
def suffixes() -> frozenset[str]:
    """The suffixes of image files, in lower case and with the dot."""
    readable = {*formats(), "MPO"}  # Pillow opens MPO as JPEG
    found = {suffix for suffix, name in Image.registered_extensions().items() if name in readable}
    return frozenset(found.union(*(names for _, _, names in EXTRA.values())))


def _format_first(encoded: bytes) -> tuple[str, ...]:
    """`formats`, with the format that the first bytes say before all others. Pillow tries them in turn, which takes
    longer than decoding a small picture."""
    name = next((name for name, at, start in STARTS if encoded.startswith(start, at)), None)
    return _first_of(name)


@functools.lru_cache
def _first_of(name: str | None) -> tuple[str, ...]:
    known = formats()
    return (name, *(each for each in known if each != name)) if name in known else known


def is_picture(name: str) -> bool:
    """Whether a file name has the suffix of an image."""
    return PurePosixPath(name).suffix.lower() in suffixes()


def named(names: Sequence[str], limit: int = 3) -> str:
    """The first ``limit`` names, and the number of others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(plain(name, 120) for name in names[:limit]) + more


def passed_over(names: Sequence[str]) -> str:
    """Files that were not read: their number and the first names."""
    return f"{len(names)} file{'s' * (len(names) != 1)}: {named(names)}"


# ---- files


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file. OSError if it cannot be read or is not a regular file (reading from a pipe or device
    may never end); ValueError if it has more than ``limit`` bytes."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"it has {size:,} bytes, more than the limit of {limit:,}")
        return file.read(size)


def open_file(path: Path) -> io.BufferedReader:
    """A regular file, opened for reading. OSError as for `read_file`."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file")
    return open(handle, "rb")


def inside(path: Path, roots: Iterable[Path]) -> bool:
    """Whether the file or folder, with all links resolved, is in one of ``roots`` (resolved folders)."""
    real = path.resolve()
    return any(real.is_relative_to(root) for root in roots)


def locate(name: str, roots: Sequence[Path]) -> Path:
    """The file that a row names, in one of ``roots`` (resolved folders). Backslashes, as Windows writes them, separate
    folders too. BadRow if the file does not exist or is outside the roots, or if the name is a URL."""
    if URL.match(name):
        raise BadRow("a URL, not a file", "images are read from files; download them first")
    problem = BadRow("unreadable image", os.strerror(errno.ENOENT))
    for spelt in dict.fromkeys((name, name.replace("\\", "/"))):
        for root in roots:
            try:
                path = (root / spelt).resolve(strict=True)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValueError, RuntimeError) as error:  # too long, NUL in the name, circular links
                problem = BadRow("unreadable image", getattr(error, "strerror", None) or error)
                continue
            if any(path.is_relative_to(each) for each in roots):
                return path
            problem = BadRow("outside the data's folder", "allow other folders with data.roots=[FOLDER]")
    raise problem


def content(value: Any, roots: Sequence[Path]) -> bytes:
    """The encoded bytes of an image cell, which may be bytes, `datasets`' {bytes, path}, the name of a file in one of
    ``roots``, or a `ShardMember`. BadRow if there are none."""
    try:
        if isinstance(value, ShardMember):
            if value.size > ENCODED:
                raise ValueError(f"it has {value.size:,} bytes, more than the limit of {ENCODED:,}")
            with open_file(value.shard) as file:
                file.seek(value.offset)
                return file.read(value.size)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value:
            found = read_file(locate(value, roots), ENCODED)
            if not found:
                raise BadRow("unreadable image", "the file is empty")
            return found
    except OSError as error:
        raise BadRow("unreadable image", error.strerror or error) from None
    except (ValueError, MemoryError) as error:
        raise BadRow("unreadable image", str(error) or "not enough memory") from None
    if not isinstance(value, bytes) or not value:
        raise BadRow("missing image")
    if len(value) > ENCODED:
        raise BadRow("unreadable image", f"it has {len(value):,} bytes, more than the limit of {ENCODED:,}")
    return value


# ---- decoding


def decode(encoded: bytes, background: str = BACKGROUND) -> Image.Image:
    """The image as RGB with 8 bits, upright. BadRow if the bytes are not a complete image.

    Transparent pixels are blended with ``background``. 16 bits are scaled to 8, and other numbers as `_levels` says. Of
    several frames the first is used. Two entries of the image's ``info`` record the conversion: "notes" is a list of
    "transparent", "animated" and "scaled"; "altered" is a text that becomes part of the image's hash, because the
    pixels then depend on more than the bytes.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=_format_first(encoded)) as image:
            if image.width * image.height > PIXELS:
                raise BadRow("unreadable image", f"{image.width}x{image.height} is more than {PIXELS:,} pixels")
            with _one_at_a_time if image.width * image.height > LARGE else nullcontext():
                return _first(image, background)
    except BadRow:
        raise
    except Exception as error:  # with damaged bytes, Pillow's decoders raise almost anything, e.g. struct.error
        text = str(error) if "BytesIO" not in str(error) else _unknown(encoded)
        raise BadRow("unreadable image", text or type(error).__name__) from None


def remarks(notes: Counter[str], background: str = BACKGROUND) -> list[str]:
    """Lines of text on the conversions of images, from the notes of `decode`."""
    done = {
        "transparent": f"with transparent pixels, shown on {background}",
        "animated": "with several frames, of which the first is used",
        "scaled": "with numbers of another range, scaled to 8 bits",
    }
    return [f"images      {notes[note]} {text}" for note, text in done.items() if notes[note]]


def rgb(image: Image.Image, background: str = BACKGROUND) -> Image.Image:
    """An image of any mode, already decoded, converted to RGB as by `decode`."""
    return _rgb(image, background, 16, [])


def _first(image: Image.Image, background: str) -> Image.Image:
    notes: list[str] = []
    with suppress(Exception):  # looking for a second frame fails if that is damaged
        if getattr(image, "is_animated", False) and image.format not in LAYERED:
            notes.append("animated")
    bits, clear = _bits(image), image.info.get("transparency")
    tiles = getattr(image, "tile", None)  # of a file: how its pixels are encoded
    if isinstance(clear, tuple) and tiles and "16" in str(tiles[0][3]):  # Pillow drops the lower 8 bits
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    # this decodes all pixels, and so raises for a truncated file
    return _rgb(ImageOps.exif_transpose(image), background, bits, notes)


def _rgb(image: Image.Image, background: str, bits: int, notes: list[str]) -> Image.Image:
    image, altered = _levels(image, bits)
    notes = [*notes, *["scaled"] * bool(altered)]
    if image.mode in ("La", "RGBa"):  # multiplied by their alpha
        image = image.convert(image.mode.upper())
    layered = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    if layered or (image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA"):
        layer = image.convert("RGBA")
        if layer.getchannel("A").getextrema() != (255, 255):
            colour = ImageColor.getrgb(background)[:3]
            image = Image.alpha_composite(Image.new("RGBA", layer.size, colour), layer)
            notes.append("transparent")
            altered += " on #{:02x}{:02x}{:02x}".format(*colour)
        elif image.mode == "P":
            image = layer  # Pillow warns otherwise
    shown = image.convert("RGB")
    shown.info = {"notes": notes, "altered": altered.strip()}
    return shown


def _bits(image: Image.Image) -> int:
    """Of a grey value, where a TIFF says that it has more than 8 and fewer than 16."""
    tags = getattr(image, "tag_v2", None) or {}
    bits = tags.get(258, (16,))[0]
    return bits if 8 < bits < 16 else 16


def _levels(image: Image.Image, bits: int) -> tuple[Image.Image, str]:
    """A grey image of more than 8 bits, or of numbers, as one of 8 bits; and "scaled" unless 16 bits became 8.

    Integers of 0..65535 count as 16 bits. Floats are scaled from the smallest of the ranges 0..1, 0..255 and 0..65535
    that contains them. All other images are scaled from their minimum to their maximum.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image, ""
    import numpy as np  # here, because serve_scorer.py must work without it

    values = np.asarray(image.convert("F" if image.mode == "F" else "I"))
    low, high = values.min(), values.max()
    if not np.isfinite(low) or not np.isfinite(high):
        raise BadRow("unreadable image", "it has values that are not finite")
    if image.mode != "F" and bits == 16 and low >= 0 and high <= 65535:
        grey, altered = image.convert("I").point(lambda value: value / 256).convert("L"), ""
        clear = image.info.get("transparency")
        if isinstance(clear, int):
            grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
        grey.info.pop("transparency", None)
        return grey, altered
    ranges = (1, 255, 65535) if image.mode == "F" else (2**bits - 1,)
    top = next((top for top in ranges if low >= 0 and high <= top), None)
    base, width = (0, top) if top else (low, max(float(high) - float(low), 1e-30))
    scaled = (values.astype(np.float64) - base) * (255 / width)
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8)), "scaled"


def _unknown(encoded: bytes) -> str:
    """A text on bytes that Pillow does not recognise."""
    kind = ""
    if encoded[4:8] == b"ftyp" and encoded[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
        kind = "HEIF"
    elif encoded.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")):
        kind = "JXL"
    elif encoded.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "EPS and PostScript are not supported: save it as PNG"
    elif encoded.startswith(LFS):
        return "a git LFS pointer, not the file: run `git lfs pull`"
    if kind and kind not in formats():
        package = EXTRA[kind][0]
        return f"{'HEIC' if kind == 'HEIF' else 'JPEG XL'} needs the package {package}: pip install {package}"
    return "not an image"
