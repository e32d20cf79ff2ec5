"""Where pictures and prompts are found in sources that were not made for this program."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffpo.common.images import BadRow
from diffpo.scorers.pictures import Where, find


def encoded(level, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (level,) * 3).save(buffer, kind)
    return buffer.getvalue()


def read(source, **where):
    """Brightness and prompt by key, or why a picture cannot be read."""
    found, numbers = find(str(source), Where(**where)), {}
    for item in found.items(0, 1):
        try:
            image, prompt = found.read(item)
            numbers[item.key.partition(":")[2] or item.key] = image.getpixel((0, 0))[0], prompt
        except BadRow as problem:
            numbers[item.key.partition(":")[2] or item.key] = str(problem)
    return numbers


def table(tmp_path, columns):
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    return tmp_path / "t.parquet"


@pytest.mark.parametrize(
    "cells",
    [
        [{"bytes": encoded(10), "path": "a.png"}, {"bytes": encoded(20), "path": None}],
        [encoded(10), encoded(20)],
    ],
    ids=["struct", "bytes"],
)
def test_columns_of_encoded_pictures_are_found_by_their_type(tmp_path, cells):
    path = table(tmp_path, {"number": [1, 2], "Photo of it": cells, "Text": ["a, b", ""]})
    assert read(path) == {"0:Photo of it": (10, "a, b"), "1:Photo of it": (20, None)}


def test_usual_names_are_found_in_any_case_and_before_types(tmp_path):
    path = table(tmp_path, {"Image": [encoded(10)], "thumbnail": [encoded(20)], "CAPTION": ["x"]})
    assert read(path) == {"0:Image": (10, "x")}
    assert read(path, images=("thumbnail",)) == {"0:thumbnail": (20, "x")}


def test_a_list_of_one_picture_is_that_picture(tmp_path):
    found = read(table(tmp_path, {"images": [[encoded(10)], [encoded(1), encoded(2)], []], "prompt": ["a", "b", "c"]}))
    assert found["0:images"] == (10, "a")
    reason = "not one picture but a list in one cell"
    assert [found[f"{row}:images"] for row in (1, 2)] == [f"{reason}: 2 pictures", f"{reason}: 0 pictures"]


def test_files_outside_the_folder_are_not_read_and_the_advice_fits(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(10))
    (tmp_path / "b.png").write_bytes(encoded(20))
    found = read(table(tmp_path / "in", {"image": ["a.png", "../b.png", "none.png", None], "prompt": list("abcd")}))
    assert found["0:image"] == (10, "a") and found["2:image"].startswith("unreadable image")
    assert found["1:image"] == "outside the data's folder: ../b.png: put table and pictures into one folder"
    assert found["3:image"] == "missing image"


def test_samples_of_a_shard_may_keep_their_texts_differently(tmp_path):
    members = {
        "0.png": encoded(10),
        "0.txt": b"text\n",
        "1.JPG": encoded(20, "JPEG"),
        "1.json": json.dumps({"caption": "of json", "width": 6}).encode(),
        "2.png": encoded(30),
        "2.json": json.dumps({"prompt": "prompt", "caption": "not this"}).encode(),
        "3.png": b"no picture",
        "3.txt": b"three",
        "4.png": encoded(40),
    }
    with tarfile.open(tmp_path / "s.tar", "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    found = read(tmp_path / "s.tar")
    assert found == {
        "0.png": (10, "text"),
        "1.JPG": (20, "of json"),
        "2.png": (30, "prompt"),
        "3.png": "unreadable image: not an image",
        "4.png": (40, None),
    }


def test_texts_beside_pictures_may_be_in_capitals(tmp_path):
    (tmp_path / "A.PNG").write_bytes(encoded(10))
    (tmp_path / "A.TXT").write_text("loud")
    assert read(tmp_path) == {"A.PNG": (10, "loud")}
