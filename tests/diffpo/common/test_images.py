"""From bytes to RGB: transparency, depths, colour models, frames, and files that are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from tiny import picture, png, write_parquet

from diffpo.common import images
from diffpo.common.errors import DiffpoError
from diffpo.common.images import BadRow, decode, is_picture, read_file, rgb, suffixes
from diffpo.config import Data
from diffpo.data.groups import load_groups
from diffpo.evaluation.manifest import open_image


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_of(mode, values, palette=None):
    image = Image.new(mode, (len(values), 1))
    if palette:
        image.putpalette(palette)
    image.putdata(values)
    return image


def pixels(content, background="white"):
    return [tuple(each) for each in np.asarray(decode(content, background))[0].tolist()]


def over(colour, alpha, background):
    """Porter and Duff's over, on an opaque background."""
    return tuple(round((c * alpha + b * (255 - alpha)) / 255) for c, b in zip(colour, background, strict=True))


COLOURS = [(255, 0, 0), (0, 200, 0), (0, 0, 90), (9, 8, 7)]
ALPHAS = [255, 128, 0, 37]


@pytest.mark.parametrize(
    ("name", "ground"), [("white", (255, 255, 255)), ("#204060", (32, 64, 96)), ("black", (0, 0, 0))]
)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "TGA"])
def test_transparent_pixels_are_blended_with_the_background(name, ground, kind):
    layered = image_of("RGBA", [(*c, a) for c, a in zip(COLOURS, ALPHAS, strict=True)])
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found = pixels(encoded(layered, kind, **options), name)
    for mine, colour, alpha in zip(found, COLOURS, ALPHAS, strict=True):
        assert np.abs(np.subtract(mine, over(colour, alpha, ground))).max() <= 1
    assert found[0] == COLOURS[0] and found[2] == ground
    assert rgb(layered, name).tobytes() == decode(encoded(layered), name).tobytes()


def test_transparency_of_every_mode():
    white = (255, 255, 255)
    palette = [each for colour in COLOURS for each in colour]
    indexed = image_of("P", [0, 1, 2, 3], palette)
    assert pixels(encoded(indexed)) == COLOURS
    assert pixels(encoded(indexed, transparency=1)) == [COLOURS[0], white, *COLOURS[2:]]
    assert pixels(encoded(indexed, "GIF", transparency=1)) == [COLOURS[0], white, *COLOURS[2:]]
    several = pixels(encoded(indexed, transparency=bytes([255, 0, 0, 255])))
    assert several == [COLOURS[0], white, white, COLOURS[3]]
    assert pixels(encoded(image_of("RGB", COLOURS), transparency=COLOURS[1])) == [COLOURS[0], white, *COLOURS[2:]]
    assert pixels(encoded(image_of("L", [0, 50, 99]), transparency=50)) == [(0,) * 3, white, (99,) * 3]
    assert pixels(encoded(image_of("LA", [(0, 255), (50, 0), (99, 255)]))) == [(0,) * 3, white, (99,) * 3]
    indexed.putpalette([*COLOURS[0], 255, *COLOURS[1], 0, *COLOURS[2], 255, *COLOURS[3], 0], "RGBA")
    for image in (indexed, indexed.convert("PA"), indexed.convert("RGBA").convert("RGBa")):
        assert [tuple(each) for each in np.asarray(rgb(image))[0].tolist()] == [COLOURS[0], white, COLOURS[2], white]
    deep = Image.fromarray(np.array([[0, 512, 65535]], dtype=np.uint16))
    assert pixels(encoded(deep, transparency=512), "red") == [(0,) * 3, (255, 0, 0), white]


def png_of(rows, colour_type, width, extra=b""):
    """A colour PNG of 16 bits, which Pillow cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), 16, colour_type, 0, 0, 0))
    body = zlib.compress(b"".join(b"\0" + np.array(row, dtype=">u2").tobytes() for row in rows))
    clear = chunk(b"tRNS", extra) if extra else b""
    return b"\x89PNG\r\n\x1a\n" + head + clear + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_sixteen_bits_of_colour_are_scaled():
    values = [0, 256, 512, 32768, 40000, 65535]
    assert pixels(png_of([values], 2, 2)) == [(0, 1, 2), (128, 156, 255)]
    assert pixels(png_of([[*values[3:], 65535, 0, 0, 0, 0]], 6, 2)) == [(128, 156, 255), (255, 255, 255)]
    clear = np.array(values[:3], dtype=">u2").tobytes()
    assert pixels(png_of([values], 2, 2, clear), "red") == [(255, 0, 0), (128, 156, 255)]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([0, 256, 32768, 65535], np.uint16, [0, 1, 128, 255]),
        ([0, 256, 32768, 65535], np.int32, [0, 1, 128, 255]),
        ([0, 70000, 140000], np.int32, [0, 128, 255]),
        ([-10, 0, 10], np.int32, [0, 128, 255]),
        ([0, 0.5, 1], np.float32, [0, 128, 255]),
        ([0, 0.25, 0.5], np.float32, [0, 64, 128]),
        ([0, 100, 255], np.float32, [0, 100, 255]),
        ([0, 32767.5, 65535], np.float32, [0, 128, 255]),
        ([-1, 0, 1], np.float32, [0, 128, 255]),
        ([1e6, 3e6], np.float32, [0, 255]),
        ([7e9, 7e9], np.float32, [0, 0]),
    ],
)
def test_grey_of_more_than_eight_bits_is_scaled_by_its_values(values, kind, expected):
    content = encoded(Image.fromarray(np.array([values], dtype=kind)), "TIFF")
    assert pixels(content) == [(value,) * 3 for value in expected]


def test_twelve_bits_and_values_that_are_not_finite():
    packed = bytes([0x00, 0x08, 0x00, 0xFF, 0xF1, 0x00])  # 0, 2048, 4095, 256 in 12 bits each
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1, 279: 6}.items():
        tags[tag] = value
    buffer = io.BytesIO(b"II*\0" + struct.pack("<I", 8))
    buffer.seek(8)
    tags.save(buffer)
    buffer.write(packed)
    assert [each[0] for each in pixels(buffer.getvalue())] == [0, 128, 255, 16]
    with pytest.raises(BadRow, match="not finite"):
        decode(encoded(Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)), "TIFF"))


def test_colour_models_and_orientation():
    red = Image.new("CMYK", (4, 1), (0, 255, 255, 0))
    assert pixels(encoded(red, "TIFF")) == [(255, 0, 0)] * 4
    assert pixels(encoded(Image.new("1", (2, 1), 1), "TIFF")) == [(255, 255, 255)] * 2
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(encoded(picture(0, (24, 16)), exif=exif))
    assert turned.tobytes() == picture(0, (24, 16)).transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames_is_used_and_counted(tmp_path, kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixels(moving)[0] == (255, 0, 0)
    rows = [{"prompt": "x", "chosen": moving, "rejected": png(picture(0))}]
    groups = load_groups(Data(resolution=16), str(write_parquet(tmp_path / "a.parquet", rows)), "train")
    assert groups.notes == {"animated": 1} and len(groups.remarks()) == 1


def test_suffixes_are_those_that_pillow_opens():
    for name in ("a.jfif", "a.TIF", "a.avif", "a.JPE", "a.jp2", "a.bmp", "a.heic", "a.HEIF", "a.jxl", "a.mpo", "a.psd"):
        assert is_picture(name), name
    for name in ("a.txt", "a.json", "a.eps", "a.ps", "a.h5", "a.mpg", "a.svg", "a", "png", ".png"):
        assert not is_picture(name), name
    Image.init()
    known = Image.registered_extensions()
    assert all(known[suffix] in (*Image.OPEN, "MPO") for suffix in suffixes() & set(known))


def heic():
    return b"\0\0\0\x18ftypheic" + bytes(40)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (heic(), "pip install pillow-heif"),
        (b"\xff\x0a" + bytes(20), "pip install pillow-jxl-plugin"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "pip install pillow-jxl-plugin"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS"),
        (b"<html>404</html>", "not an image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    ],
)
def test_bytes_that_cannot_be_decoded_are_refused_with_the_cause(content, words):
    if "pip" in words and {"HEIF", "JXL"} & set(images.formats()):
        pytest.skip("the package is installed")
    with pytest.raises(BadRow, match=words):
        decode(content)


def test_postscript_is_not_run_under_another_name(monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **options: pytest.fail("a program was started"))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(BadRow):
        decode(script)


def test_bombs_and_endless_files_are_refused(tmp_path, monkeypatch):
    with pytest.raises(BadRow, match="pixels"):
        decode(png_of([[0] * 10], 0, 2**31 - 1))
    monkeypatch.setattr(images, "PIXELS", 255)
    with pytest.raises(BadRow, match=r"16x16 .*255 pixels"):
        decode(png(picture(0)))
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=f"{2**40:,} bytes"):
        read_file(tmp_path / "sparse.png", images.ENCODED)


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(images, "LARGE", 255)
    held = []
    turn = images.ImageOps.exif_transpose
    monkeypatch.setattr(
        images.ImageOps, "exif_transpose", lambda i: held.append(images._one_at_a_time.locked()) or turn(i)
    )
    assert decode(png(picture(0))).tobytes() == picture(0).tobytes() and held == [True]


def rows_with(image):
    return [{"prompt": "x", "chosen": png(image), "rejected": png(picture(1))}]


def test_only_hashes_of_transparent_images_depend_on_the_background(tmp_path):
    layered = picture(0).copy()
    layered.putalpha(100)
    opaque = picture(0).convert("RGBA")
    hashes = {}
    for name, image in {"layered": layered, "opaque": opaque, "plain": picture(0)}.items():
        source = str(write_parquet(tmp_path / f"{name}.parquet", rows_with(image)))
        for background in ("white", "#ffffff", "black"):
            groups = load_groups(Data(resolution=16, background=background), source, "train")
            hashes[name, background] = groups.data_hash, groups.groups[0].hashes[0]
    assert hashes["layered", "white"] == hashes["layered", "#ffffff"] != hashes["layered", "black"]
    for name in ("opaque", "plain"):
        assert len({hashes[name, background] for background in ("white", "#ffffff", "black")}) == 1


def test_training_evaluation_and_scorers_decode_alike(tmp_path):
    layered = picture(0).copy()
    layered.putalpha(Image.linear_gradient("L").resize((16, 16)))
    source = str(write_parquet(tmp_path / "a.parquet", rows_with(layered)))
    groups = load_groups(Data(resolution=16), source, "train")
    (tmp_path / "a.png").write_bytes(png(layered))
    expected = groups.images(0)[0].tobytes()
    assert open_image(tmp_path / "a.png").tobytes() == rgb(layered).tobytes() == expected
    assert groups.notes == {"transparent": 1} and "data.background" in groups.remarks()[0]


def test_a_background_must_be_an_opaque_colour():
    for wrong in ("whitish", "#12", "rgba(1,2,3,0)", ""):
        with pytest.raises(ValueError, match="background"):
            Data(resolution=16, background=wrong)


def test_pairs_of_identical_images_are_dropped(tmp_path):
    rows = [
        {"prompt": "a", "chosen": png(picture(0)), "rejected": png(picture(1))},
        {"prompt": "b", "chosen": png(picture(2)), "rejected": png(picture(2))},
        {"prompt": "c", "chosen": png(picture(3)), "rejected": png(picture(3))},
    ]
    source = str(write_parquet(tmp_path / "a.parquet", rows))
    groups = load_groups(Data(resolution=16), source, "train")
    assert (groups.captions, groups.identical) == (["a"], 2)
    with pytest.raises(DiffpoError, match=r"b\.parquet: .* 2 of identical images"):
        load_groups(Data(resolution=16), str(write_parquet(tmp_path / "b.parquet", rows[1:])), "train")
    listed = [{"prompt": "a", "images": [png(picture(i)) for i in (0, 1, 0)], "scores": [3.0, 2.0, 1.0]}]
    groups = load_groups(Data(resolution=16), str(write_parquet(tmp_path / "c.parquet", listed)), "train")
    assert [group.images for group in groups.groups] == [(0, 1), (1, 2)] and groups.identical == 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_usual_formats_are_opened_at_the_first_trial(monkeypatch, kind):
    """Pillow tries the formats in turn, some of them by reading; all others would fail here."""
    content = encoded(picture(3), kind, quality=90)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    def fail(*_):
        raise AssertionError("another format was tried")

    for name in images.formats():
        if name != kind:
            monkeypatch.setitem(Image.OPEN, name, (fail, None))
    assert np.array_equal(np.asarray(decode(content)), expected)
    with pytest.raises(BadRow):
        decode(content[:-40])  # cut off, it is not taken for whole
