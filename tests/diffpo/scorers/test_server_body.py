"""The body of a request: it is read strictly, within bounds of memory, and images are read as RGB."""

import base64
import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from http_scorers import PROMPTS, png
from PIL import Image

from diffpo.scorers.server.body import decode, parse
from diffpo.scorers.server.protocol import Limits, Refused
from diffpo.scorers.server.scoring import ScoringQueue

SIZE = 2**22


@pytest.mark.parametrize(
    "body",
    [
        b'{"images": [' + b"{}," * (SIZE // 3) + b"{}]}",
        b"[" + b"{}," * (SIZE // 3) + b"{}]",
        b"[" * SIZE,
        b'{"a":' * (SIZE // 5),
        b'{"images": [' + b'"",' * (SIZE // 3) + b'""]}',
        b'{"images": [' + b"1," * (SIZE // 2),
        b'{"prompts": ["' + b'\\"' * (SIZE // 2) + b'"]}',
        b'{"prompts": ["' + b"\\" * SIZE + b'"]}',
        b'{"prompts": ["' + "😀".encode() * (SIZE // 4) + b'"]}',
        b'{"prompts": ["' + b"\\ud83d\\ude00" * (SIZE // 12) + b'"], "images": ["A"]}',
        b"{" + b" " * SIZE,
    ],
    ids="objects list deep-list deep-object empty numbers quotes backslashes wide escapes space".split(),
)
def test_what_a_body_becomes_is_not_larger_than_a_few_of_it(body):
    tracemalloc.start()
    try:
        with pytest.raises(Refused):
            parse(body, 32)
        assert tracemalloc.get_traced_memory()[1] < 8 * SIZE  # json.loads: 20 to 60 times
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("prompt", [*PROMPTS, "\\", '\\"', "😀", "/", "\x00\x7f"])
@pytest.mark.parametrize("ascii", [True, False])
def test_prompts_are_those_that_were_sent(prompt, ascii):
    body = json.dumps({"prompts": [prompt, "b"], "images": ["A/+=", ""]}, ensure_ascii=ascii, indent=1)
    assert parse(body.encode(), 32) == (["A/+=", ""], [prompt, "b"], [[], []])
    assert parse(body.replace("/", "\\/").encode(), 32) == (["A/+=", ""], [prompt, "b"], [[], []])


@pytest.mark.parametrize(("sent", "status"), [("AAAA", 400), (None, 413)])
def test_a_source_is_read_as_strictly_as_an_image(sent, status):
    sent = sent or png(Image.new("RGB", (11, 10)))
    with pytest.raises(Refused, match="source 1 of image 3") as refused:
        ScoringQueue(None, Limits(max_pixels=100)).instruction(3, "x", [png(Image.new("RGB", (10, 10))), sent])
    assert refused.value.status == status


def test_sources_are_lists_between_commas():
    body = {"images": ["a", "b", "c"], "prompts": ["", "", ""], "sources": ["", "d,e", "f"]}
    assert parse(json.dumps(body).encode(), 3)[2] == [[], ["d", "e"], ["f"]]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ('{"images": ["a"], "prompts": ["b"]} {}', 400),
        ('{"images": ["a"], "prompts": ["b"], "more": 1}', 400),
        ('{"images": ["a"], "images": ["b"]}', 400),
        ('{"images": ["a",], "prompts": ["b"]}', 400),
        ('{"images": ["a"], "prompts": ["b"], "sources": []}', 400),
        ('{"images": ["a"], "prompts": ["b"], "sources": [["c"]]}', 400),
        ('{"sources": ["c"], "images": ["a"], "prompts": ["b"]}', 400),
        ('{"images": ["a"], "prompts": ["b"], "sources": ["' + "c," * 32 + 'c"]}', 413),
        ('{"images": ["a" "b"], "prompts": ["b"]}', 400),
        ('{"images": ["a"] "prompts": ["b"]}', 400),
        ('{"images": ["a"], "prompts": ["\\x"]}', 400),
        ('{"images": ["a"], "prompts": ["line\nbreak"]}', 400),
        ('{"images": ["a"], "prompts": ["\\ud800"]}', 400),
        ('{"images": ["a"], "prompts": ["' + "b" * 70_000 + '"]}', 413),
    ],
)
def test_the_form_of_a_body_is_strict(body, status):
    with pytest.raises(Refused) as refused:
        parse(body.encode(), 32)
    assert refused.value.status == status


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunks(*chunks):
    plain = base64.b64decode(png(Image.new("RGB", (4, 4), (10, 20, 30))))
    return base64.b64encode(plain[:33] + b"".join(chunks) + plain[33:]).decode()  # behind IHDR


BOMB = zlib.compress(bytes(2**24), 9)


def test_texts_and_profiles_in_a_png_are_not_kept():
    texts = [chunk(b"zTXt", b"k%d\0\0" % k + zlib.compress(bytes(2**19), 9)) for k in range(8)]
    image = decode("image 0", with_chunks(*texts), 2**23)
    assert image.getpixel((0, 0)) == (10, 20, 30) and image.info.keys() <= {"notes", "altered"}
    for bomb in (
        chunk(b"zTXt", b"k\0\0" + BOMB),
        chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB),
        chunk(b"iCCP", b"k\0\0" + BOMB),
        chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 1))) * 70,
    ):
        tracemalloc.start()
        try:
            decode("image 0", with_chunks(bomb), 2**23)
        except Refused as refused:
            assert refused.sentence == "image 0 is not a readable PNG"
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 2**27


def test_16_bits_are_scaled():
    values = (np.arange(16, dtype=np.uint16) * 4369).reshape(4, 4)
    found = decode("image 0", png(Image.fromarray(values)), 2**23)
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found)[..., 1], np.arange(0, 256, 17).reshape(4, 4))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_seen_on_white(mode):
    image = Image.new("RGBA", (2, 1), (100, 100, 100, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image = image.convert(mode)
    found = decode("image 0", png(image), 2**23)
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(100, 100, 100), (255, 255, 255)]
