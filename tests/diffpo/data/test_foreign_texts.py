"""Texts of data from others: any encoding, script, length and spelling of truth values."""

import codecs
import json

import numpy as np
import pytest
from foreign_rows import fault, row, siblings
from test_formats import load, seen
from test_shards import orpo_members, write_tar
from tiny import pick_a_pic_rows, write_parquet

from diffpo.commands.picture import draw
from diffpo.common import images
from diffpo.common.errors import DiffpoError
from diffpo.config import Data
from diffpo.data.groups import scan

# ---- encodings of text


def saved_as(text, how):
    if how == "crlf":
        return text.replace("\n", "\r\n").encode()
    return codecs.BOM_UTF16_BE + text.encode("utf-16-be") if how == "utf-16-be" else text.encode(how)


HOW = ["utf-8-sig", "utf-16", "utf-16-be", "crlf"]
METADATA = {
    "metadata.jsonl": "".join(
        json.dumps(row("0.png", "1.png", each), ensure_ascii=False) + "\n" for each in ("é", "b")
    ),
    "metadata.json": json.dumps([row("0.png", "1.png", each) for each in ("é", "b")], indent=1),
    "metadata.csv": "prompt,chosen,rejected\né,0.png,1.png\nb,0.png,1.png\n",
    "metadata.tsv": "prompt\tchosen\trejected\né\t0.png\t1.png\nb\t0.png\t1.png\n",
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", METADATA)
def test_metadata_in_every_encoding(folder, name, how):
    (folder / name).write_bytes(saved_as(METADATA[name], how))
    for source in (folder, folder / name):
        assert seen(load(source)) == [("é", 1, (0, 1)), ("b", 1, (0, 1))]


@pytest.mark.parametrize("how", HOW)
def test_captions_and_texts_of_shards_in_every_encoding(tmp_path, how):
    folder = siblings(tmp_path / "ds")
    (folder / "chosen" / "0.txt").write_bytes(saved_as("café\n", how))
    assert load(folder).captions == ["café", "cat 1"]
    about = saved_as(json.dumps({"label_0": 0, "caption": "café"}), how)
    pair = orpo_members(0, 1)[:2]
    assert seen(load(write_tar(tmp_path / "a.tar", [*pair, ("0000.json", about)]))) == [("café", 1, (1, 0))]
    texts = [("0000.caption.txt", saved_as("café\n", how)), ("0000.label_0.txt", saved_as("0\n", how))]
    assert seen(load(write_tar(tmp_path / "b.tar", [*pair, *texts]))) == [("café", 1, (1, 0))]


def test_a_caption_of_another_encoding_is_a_bad_row(tmp_path):
    folder = siblings(tmp_path / "ds")
    for content in ("caf\xe9".encode("latin-1"), "a cat".encode("utf-16-le"), b"\xff\xfea"):
        (folder / "chosen" / "0.txt").write_bytes(content)
        assert "chosen/0.txt" in fault(folder)


def test_json_of_other_shapes(folder):
    rows = [row("0.png"), row("2.png", "3.png")]
    expected = [("x", 1, (0, 1)), ("x", 1, (2, 3))]
    for text in (
        "\n".join(map(json.dumps, rows)),  # JSON lines in a .json file
        json.dumps({name: [each[name] for each in rows] for name in rows[0]}),  # columns
    ):
        (folder / "train.json").write_text(text)
        assert seen(load(folder / "train.json")) == expected
    for text, words in {
        "[1, 2]": r"train\.json, item 1: ",
        '"x"': r"train\.json: .*'x'",
        "[": r"train\.json.* line 1 column 2",
        "[" * 9000: r"train\.json",
    }.items():
        (folder / "train.json").write_text(text)
        with pytest.raises(DiffpoError, match=f"{folder}.*{words}"):
            load(folder / "train.json")


# ---- truth values


TRUE = [True, 1, 1.0, "true", "True", " TRUE\n", "yes", "1", "1.0", "y", "on"]
FALSE = [False, 0, 0.0, "false", "False", "no", "0", "0.0", "off", None, "", "null", "NaN"]
NEITHER = ["maybe", 2, 0.5, -1, [True], "01", "tru"]


def labelled(value, form, folder):
    """A row whose has_label is ``value``, after one that is labelled."""
    rows = pick_a_pic_rows(2)
    for number, each in enumerate(rows):
        for name in ("jpg_0", "jpg_1"):
            (folder / f"{number}-{name}.png").write_bytes(each[name])
    if form == "tar":
        members = []
        for number, has_label in enumerate(("true", value)):
            text = b"" if has_label is None else str(has_label).encode()
            members += [*orpo_members(number, 1), (f"{number:04d}.has_label.txt", text)]
        return write_tar(folder / "a.tar", members)
    if form == "parquet":
        values = [None if value is None else type(value)(1), value]
        values = ["true", value] if isinstance(value, str) else values
        return write_parquet(
            folder / "a.parquet", [each | {"has_label": v} for each, v in zip(rows, values, strict=True)]
        )
    names = ["caption", "jpg_0", "jpg_1", "label_0", "has_label"]
    cells = [[f"cat {n}", f"{n}-jpg_0.png", f"{n}-jpg_1.png", 1.0, v] for n, v in enumerate((True, value))]
    if form == "csv":
        lines = [",".join('"' + ("" if cell is None else str(cell)) + '"' for cell in line) for line in [names, *cells]]
        (folder / "a.csv").write_text("\n".join(lines))
        return folder / "a.csv"
    (folder / "a.jsonl").write_text("\n".join(json.dumps(dict(zip(names, line, strict=True))) for line in cells))
    return folder / "a.jsonl"


@pytest.mark.parametrize("form", ["jsonl", "csv", "tar", "parquet"])
def test_has_label_in_every_spelling(tmp_path, form):
    for number, value in enumerate([*TRUE, *FALSE, *NEITHER]):
        if form == "parquet" and (isinstance(value, list) or value is None):
            continue
        (tmp_path / str(number)).mkdir()
        groups = scan(Data(resolution=16), str(labelled(value, form, tmp_path / str(number))), "train")
        outcome = (len(groups), groups.unlabelled, [problem.reason for _, problem in groups.bad])
        expected = (2, 0, []) if value in TRUE else (1, 1, []) if value in FALSE else (1, 0, ["not a truth value"])
        assert outcome == expected, value


def test_likes_in_every_spelling(folder):
    def one(value):
        (folder / "metadata.jsonl").write_text(json.dumps({"prompt": "x", "image": "0.png", "liked": value}))
        groups = scan(Data(resolution=16, ties="soft"), str(folder), "train", "single")
        return groups.groups[0].preference if groups.groups else str(groups.bad[0][1])

    assert [one(value) for value in TRUE] == [1] * len(TRUE)
    nothing = [value for value in FALSE if value in (None, "", "null", "NaN")]
    assert [one(value) for value in FALSE if value not in nothing] == [0] * (len(FALSE) - len(nothing))
    assert one("0.25") == 0.25 and one(0.5) == 0.5
    for value in (*nothing, "maybe", [1]):
        assert one(value).startswith("no like")
    assert one(2).endswith(": 2 (0.png)")


def test_captions_of_any_length_and_script_are_drawn(tmp_path):
    long = "no-break" * 100_000
    rows = [{**pick_a_pic_rows(1)[0], "caption": text} for text in (long, "a\x1b[31m\u202eb\0c", "\U0001f600" * 9)]
    source = str(write_parquet(tmp_path / "a.parquet", rows))
    data = Data(resolution=16)
    groups = scan(data, source, "train")
    assert len(groups) == 3
    draw(groups, data, tmp_path / "a.png")
    assert np.asarray(images.decode((tmp_path / "a.png").read_bytes())).min() < 100


def test_a_lone_surrogate_in_a_caption_is_a_bad_row(folder):
    (folder / "metadata.jsonl").write_text('{"prompt": "a\\ud800", "chosen": "0.png", "rejected": "1.png"}')
    assert "surrogate" in fault(folder)
