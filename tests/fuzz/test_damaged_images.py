"""Images with changed bytes: decoded in full, or a bad row, whatever exception the decoder raises."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import damaged
from PIL import Image
from tiny import picture

from diffpo.common.images import BadRow, decode

PICTURES = [
    picture(0, (8, 8)),
    picture(1, (8, 8)).convert("P"),
    picture(2, (8, 8)).convert("L"),
    picture(3).convert("RGBA"),
]


def encoded():
    for image in PICTURES:
        for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "ICO", "TGA", "PPM"):
            buffer = io.BytesIO()
            try:
                exif = Image.Exif()
                exif[0x0112] = 6
                image.save(buffer, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}))
            except OSError:  # the format does not support the mode
                continue
            yield buffer.getvalue()


@pytest.mark.filterwarnings("ignore")  # of Pillow
@settings(max_examples=250)
@given(content=st.sampled_from(list(encoded())).flatmap(damaged))
def test_images_with_changed_bytes(content):
    try:
        image = decode(content)
    except BadRow as problem:
        assert problem.reason == "unreadable image"
    else:
        assert image.mode == "RGB" and image.tobytes()
