"""Reading text files in common encodings, and making text safe to show."""

from __future__ import annotations

import codecs
import re
import unicodedata
from html import escape
from pathlib import Path

LIMIT = 2**28  # bytes of a text file

# UTF-32 first, because its byte order mark begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)


def decoded(content: bytes) -> str:
    """The text of UTF-8 bytes, or of UTF-16 and UTF-32 with a byte order mark, with line feeds as line ends.
    ValueError for other bytes."""
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    text = content.decode(encoding)
    if "\0" in text:  # valid UTF-8 by chance
        raise ValueError("it contains the character NUL: it is not text, or UTF-16 without a byte order mark")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: str | Path, limit: int = LIMIT) -> str:
    """The text of a file, by `decoded`. OSError if it cannot be read, ValueError if it is not text or has more than
    ``limit`` bytes."""
    with open(path, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit} bytes, too many for a text file")
    return decoded(content)


def text_beside(picture: Path) -> Path:
    """The file with the text of a picture: NAME.txt beside NAME.png, or NAME.TXT."""
    text = picture.with_suffix(".txt")
    upper = picture.with_suffix(".TXT")
    return upper if not text.exists() and upper.exists() else text


def markdown(text: object, limit: int = 200) -> str:
    """``text``, made `plain`, for Markdown text or table cells: its own markup and HTML are escaped."""
    return re.sub(r"([\\`*_~|\[\]])", r"\\\1", escape(plain(text, limit), quote=False))


def plain(text: object, limit: int = 1000) -> str:
    """``text`` as one line of at most ``limit`` characters, safe for terminals, reports and images. Control and format
    characters and lone surrogates are removed: they could move the cursor, reverse the line, or fail to encode. The two
    joiners stay, because emoji and several scripts need them."""
    text = str(text)
    if len(text) > limit:
        text = text[: max(0, limit - 3)] + "..."
    shown = (" " if c in "\n\r\t" or unicodedata.category(c) in ("Zl", "Zp") else c for c in text)
    return "".join(c for c in shown if c in "\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def whole(text: str) -> str:
    """``text`` with lone surrogates, which tokenizers refuse, replaced by U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)
