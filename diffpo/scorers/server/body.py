"""The body of a POST /score: images, prompts and sources, read without making more of it than the limits allow."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from io import BytesIO

from PIL import Image

from ...common.images import rgb
from .protocol import Refused

TEXT = 2**16  # bytes that a prompt may have in JSON
SPACE = re.compile(rb"[ \t\r\n]*")


def parse(body: bytes, max_images: int) -> tuple[list[str], list[str], list[list[str]]]:
    """Images (PNG in base64), prompts, and the sources of each image, at most ``max_images`` of each. Raises Refused.

    Only strings are ever made, and no more than are allowed: what json.loads makes of 60 MB
    of "{}" takes 2 GB."""
    form = 'the body is not JSON, or not as expected {"images": [PNG in base64, ...], "prompts": [text, ...]}'
    found: dict[str, list[str]] = {}
    at = 0

    def take(mark: bytes) -> bool:
        nonlocal at
        at = _past_space(body, at)
        there = body[at : at + 1] == mark
        at += there
        return there

    def string() -> str:
        nonlocal at
        if not take(b'"'):
            raise Refused(400, form)
        start, escaped = at - 1, True
        while escaped:
            end = body.find(b'"', at)
            if end < 0:
                raise Refused(400, form)
            part, at = body[at:end], end + 1
            escaped = (len(part) - len(part.rstrip(b"\\"))) % 2 == 1
            if escaped and at - start > TEXT:  # base64 has no quotes
                raise Refused(413, f"a prompt has more than {TEXT} bytes")
        return json.loads(body[start:at].decode())

    def strings(key: str) -> Iterable[str]:
        if not take(b"["):
            raise Refused(400, form)
        count = 0
        while not take(b"]"):
            if count and not take(b","):
                raise Refused(400, form)
            count += 1
            if count > max_images:
                raise Refused(413, f"at least {count} {key} are more than --max-images {max_images}")
            yield string()

    try:
        for mark in (b"{", b","):
            if not take(mark):
                raise Refused(400, form)
            key = string()
            if key not in ("images", "prompts") or key in found or not take(b":"):
                raise Refused(400, form)
            found[key] = list(strings(key))
        if take(b","):
            if string() != "sources" or not take(b":"):
                raise Refused(400, form)
            found["sources"] = list(strings("sources"))
        if not take(b"}") or _past_space(body, at) != len(body):
            raise Refused(400, form)
    except ValueError:  # no UTF-8, or no string of JSON
        raise Refused(400, form) from None
    images, prompts = found["images"], found["prompts"]
    if not images or len(images) != len(prompts):
        raise Refused(400, f"{len(images)} images and {len(prompts)} prompts: send one prompt with each image")
    for k, prompt in enumerate(prompts):
        if len(prompt) > TEXT:
            raise Refused(413, f"prompt {k} has more than {TEXT} characters")
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise Refused(400, f"prompt {k} holds half a character (a lone surrogate)")
    # of each image, the PNGs between commas, which base64 has not; none is the empty text
    given = found.get("sources", [""] * len(images))
    if len(given) != len(images):
        raise Refused(400, f"{len(images)} images and {len(given)} sources: send one text of PNGs for each image")
    if (count := sum(each.count(",") + bool(each) for each in given)) > max_images:
        raise Refused(413, f"{count} sources are more than --max-images {max_images}")
    return images, prompts, [each.split(",") if each else [] for each in given]


def decode(what: str, picture: str, max_pixels: int) -> Image.Image:
    """A picture as RGB, on white; ``what`` names it, e.g. "image 0". Only Pillow's PNG reader sees what a client sent,
    and only if it has no more than ``max_pixels``. Raises Refused."""
    try:
        data = base64.b64decode(picture, validate=True)
    except ValueError:
        raise Refused(400, f"{what} is not base64") from None
    size = "far too many"
    try:
        with Image.open(BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height <= max_pixels:
                return rgb(image)
            size = f"{image.width}x{image.height}"
    except Image.DecompressionBombError:
        pass
    except Exception:  # Pillow raises a dozen types for damaged files
        raise Refused(400, f"{what} is not a readable PNG") from None
    raise Refused(413, f"{what} has {size} pixels, more than --max-pixels {max_pixels}")


def _past_space(body: bytes, at: int) -> int:
    """Where the white space at ``at`` ends."""
    found = SPACE.match(body, at)
    assert found is not None  # noqa: S101 (the pattern also matches no characters)
    return found.end()
