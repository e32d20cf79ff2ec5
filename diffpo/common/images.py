"""Pictures in files: which suffixes they have, which files may be opened, and the one way from bytes to RGB."""

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

BACKGROUND = "white"  # behind transparent pixels, wherever no setting says otherwise
ENCODED = 2**29  # bytes of a picture's file
PIXELS = 2**27  # of a picture, 11,585 x 11,585
LARGE = 2**24  # pixels above which pictures are decoded one at a time, for the sake of memory

# not even tried: EPS is a program for another program, the others are tables or need a viewer of their own
NEVER = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
# Pillow reads these with a package that registers itself
EXTRA = {
    "HEIF": ("pillow-heif", "pillow_heif", (".heic", ".heif", ".hif")),
    "JXL": ("pillow-jxl-plugin", "pillow_jxl", (".jxl",)),
}
LAYERED = {"MPO", "PSD"}  # what seems to be frames are previews and layers; the first is the picture
LFS = b"version https://git-lfs"  # what a clone holds in the place of a large file
URL = re.compile(r"[a-z][a-z0-9+.-]+:(//|[a-z]+/[a-z0-9.+-]+[;,])", re.IGNORECASE)  # also data:image/png;base64,

Image.init()
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `PIXELS` is the limit
_one_at_a_time = threading.Lock()


class BadRow(Exception):
    """Why one row cannot be used: a short reason, the same words for the same fault so that faults can be counted, and
    what it is about: a file, a value."""

    def __init__(self, reason: str, detail: object = "", about: str = "") -> None:
        self.reason, self.detail, self.about = reason, plain(detail, 300), plain(about, 200)
        super().__init__(": ".join(part for part in (reason, self.about, self.detail) if part))

    def of(self, name: str) -> BadRow:
        """The same with the picture or file that it is about."""
        return BadRow(self.reason, self.detail, self.about or name)


class ShardMember(NamedTuple):
    """A picture within a shard. Only `files.shards` makes these: a cell of a foreign table never becomes one."""

    shard: Path
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.shard.name}: {self.name}"


@functools.lru_cache
def formats() -> tuple[str, ...]:
    """What the installed Pillow and its plug-ins can open, by Pillow's names."""
    for _, module, _ in EXTRA.values():
        with suppress(ImportError):
            plugin = importlib.import_module(module)
            getattr(plugin, "register_heif_opener", lambda: None)()
    return tuple(name for name in Image.OPEN if name not in NEVER)


@functools.lru_cache
def suffixes() -> frozenset[str]:
    """Of picture files, in small letters and with the dot."""
    readable = {*formats(), "MPO"}  # which Pillow opens as JPEG
    found = {suffix for suffix, name in Image.registered_extensions().items() if name in readable}
    return frozenset(found.union(*(names for _, _, names in EXTRA.values())))


def is_picture(name: str) -> bool:
    """By the suffix of a file's name."""
    return PurePosixPath(name).suffix.lower() in suffixes()


def named(names: Sequence[str], limit: int = 3) -> str:
    """The first ``limit`` of them, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(plain(name, 120) for name in names[:limit]) + more


def passed_over(names: Sequence[str]) -> str:
    return f"{len(names)} file{'s' * (len(names) != 1)}: {named(names)}"


# ---- files


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file. OSError if it cannot be read or is something else (a pipe or a device would keep its
    reader waiting); ValueError if it has more than ``limit`` bytes."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"it has {size:,} bytes, more than the {limit:,} that are read")
        return file.read(size)


def open_file(path: Path) -> io.BufferedReader:
    """A regular file, opened for reading; OSError as `read_file`."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file")
    return open(handle, "rb")


def inside(path: Path, roots: Iterable[Path]) -> bool:
    """Whether the file or folder, where all links lead, lies in one of ``roots`` (resolved folders)."""
    real = path.resolve()
    return any(real.is_relative_to(root) for root in roots)


def locate(name: str, roots: Sequence[Path]) -> Path:
    """The file that a row names, in one of ``roots`` (resolved folders). A backslash separates folders too, as Windows
    writes them. BadRow: it is not there, it lies outside, or it is a URL."""
    if URL.match(name):
        raise BadRow("a URL, not a file", "pictures are read from files; fetch them first")
    problem = BadRow("unreadable image", os.strerror(errno.ENOENT))
    for spelt in dict.fromkeys((name, name.replace("\\", "/"))):
        for root in roots:
            try:
                path = (root / spelt).resolve(strict=True)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, links in a circle
                problem = BadRow("unreadable image", getattr(error, "strerror", None) or error)
                continue
            if any(path.is_relative_to(each) for each in roots):
                return path
            problem = BadRow("outside the data's folder", "data.roots=[FOLDER] lets rows name files in other folders")
    raise problem


def content(value: Any, roots: Sequence[Path]) -> bytes:
    """The encoded bytes of an image cell: bytes, `datasets`' {bytes, path}, the name of a file in one of ``roots``, or
    a `ShardMember`. BadRow if there are none."""
    try:
        if isinstance(value, ShardMember):
            if value.size > ENCODED:
                raise ValueError(f"it has {value.size:,} bytes, more than the {ENCODED:,} that are read")
            with open_file(value.shard) as file:
                file.seek(value.offset)
                return file.read(value.size)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value:
            found = read_file(locate(value, roots), ENCODED)
            if not found:
                raise BadRow("unreadable image", "it is empty")
            return found
    except OSError as error:
        raise BadRow("unreadable image", error.strerror or error) from None
    except (ValueError, MemoryError) as error:
        raise BadRow("unreadable image", str(error) or "there is not the memory for it") from None
    if not isinstance(value, bytes) or not value:
        raise BadRow("missing image")
    if len(value) > ENCODED:
        raise BadRow("unreadable image", f"it has {len(value):,} bytes, more than the {ENCODED:,} that are read")
    return value


# ---- decoding


def decode(encoded: bytes, background: str = BACKGROUND) -> Image.Image:
    """RGB, upright, 8 bits; BadRow if the bytes are no whole picture.

    Transparency is laid over ``background``. 16 bits are scaled to 8, and numbers as `_levels` says. Of several frames
    the first is taken. The picture's ``info`` says what was done: "notes", a list of "transparent", "animated" and
    "scaled", and "altered", a text that goes into the picture's hash where pixels depend on more than the bytes.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=formats()) as image:
            if image.width * image.height > PIXELS:
                raise BadRow("unreadable image", f"{image.width}x{image.height} are more than {PIXELS:,} pixels")
            with _one_at_a_time if image.width * image.height > LARGE else nullcontext():
                return _first(image, background)
    except BadRow:
        raise
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead to: struct.error, KeyError, ...
        text = str(error) if "BytesIO" not in str(error) else _unknown(encoded)
        raise BadRow("unreadable image", text or type(error).__name__) from None


def remarks(notes: Counter[str], background: str = BACKGROUND) -> list[str]:
    """What was done to pictures, by the notes that `decode` made, a line each."""
    done = {
        "transparent": f"have transparency, shown on {background}",
        "animated": "have several frames, of which the first is taken",
        "scaled": "hold numbers of another range, which are scaled to 8 bits",
    }
    return [f"pictures    {notes[note]} {text}" for note, text in done.items() if notes[note]]


def rgb(image: Image.Image, background: str = BACKGROUND) -> Image.Image:
    """A picture of any mode in the colours of `decode`, for pictures that are decoded already."""
    return _rgb(image, background, 16, [])


def _first(image: Image.Image, background: str) -> Image.Image:
    notes = []
    with suppress(Exception):  # it looks for a second frame, which may be damaged
        if getattr(image, "is_animated", False) and image.format not in LAYERED:
            notes.append("animated")
    bits, clear = _bits(image), image.info.get("transparency")
    if isinstance(clear, tuple) and image.tile and "16" in str(image.tile[0][3]):  # Pillow drops the lower 8 bits
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    # decodes in full, so a truncated file shows here
    return _rgb(ImageOps.exif_transpose(image), background, bits, notes)


def _rgb(image: Image.Image, background: str, bits: int, notes: list[str]) -> Image.Image:
    image, altered = _levels(image, bits)
    notes = [*notes, *["scaled"] * bool(altered)]
    if image.mode in ("La", "RGBa"):  # multiplied by their alpha
        image = image.convert(image.mode.upper())
    layered = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    if layered or (image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA"):
        layer = image.convert("RGBA")
        if layer.getextrema()[3][0] < 255:
            colour = ImageColor.getrgb(background)[:3]
            image = Image.alpha_composite(Image.new("RGBA", layer.size, colour), layer)
            notes.append("transparent")
            altered += " on #{:02x}{:02x}{:02x}".format(*colour)
        elif image.mode == "P":
            image = layer  # as Pillow asks for with a warning
    shown = image.convert("RGB")
    shown.info = {"notes": notes, "altered": altered.strip()}
    return shown


def _bits(image: Image.Image) -> int:
    """Of a grey value, where a TIFF says that it has more than 8 and fewer than 16."""
    tags = getattr(image, "tag_v2", None) or {}
    bits = tags.get(258, (16,))[0]
    return bits if 8 < bits < 16 else 16


def _levels(image: Image.Image, bits: int) -> tuple[Image.Image, str]:
    """Grey of more than 8 bits or of numbers as 8 bits, and "scaled" where that is not 16 bits to 8.

    Integers of 0..65535 are 16 bits. Floats of 0..1, 0..255 or 0..65535 are taken for that range, the smallest that
    holds them all. Anything else goes from its least to its greatest value.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image, ""
    import numpy as np  # serve_scorer.py does without, unless it comes to this

    values = np.asarray(image.convert("F" if image.mode == "F" else "I"))
    low, high = values.min(), values.max()
    if not np.isfinite(low) or not np.isfinite(high):
        raise BadRow("unreadable image", "it holds values that are no numbers")
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
    """What bytes are that Pillow does not know."""
    kind = ""
    if encoded[4:8] == b"ftyp" and encoded[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"):
        kind = "HEIF"
    elif encoded.startswith((b"\xff\x0a", b"\x00\x00\x00\x0cJXL ")):
        kind = "JXL"
    elif encoded.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "EPS and PostScript are not read: save it as PNG"
    elif encoded.startswith(LFS):
        return "a pointer of git LFS, not the file: `git lfs pull` fetches it"
    if kind and kind not in formats():
        package = EXTRA[kind][0]
        return f"{'HEIC' if kind == 'HEIF' else 'JPEG XL'} needs the package {package}: pip install {package}"
    return "not an image"
