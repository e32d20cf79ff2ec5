"""Webdataset shards: read without unpacking, and the same from the hub."""

import io
import json
import pickle
import tarfile

import datasets
import pytest
from test_formats import load, seen
from tiny import picture, png

from diffpo.common.errors import DiffpoError
from diffpo.data.files import column


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, value in members:
            info = tarfile.TarInfo(name)
            info.size = len(value)
            archive.addfile(info, io.BytesIO(value))
    return path


def orpo_members(i, label_0):
    return [
        (f"{i:04d}.jpg_0.png", png(picture(2 * i))),
        (f"{i:04d}.jpg_1.png", png(picture(2 * i + 1))),
        (f"{i:04d}.label_0.txt", str(label_0).encode()),
        (f"{i:04d}.caption.txt", f"cat {i}\n".encode()),
    ]


def test_shards_of_pairs_in_pick_a_pic_fields(tmp_path):
    write_tar(tmp_path / "0.tar", [*orpo_members(0, 1.0), *orpo_members(1, 0)])
    write_tar(tmp_path / "1.tar", [*orpo_members(2, 1), *orpo_members(3, 0.5)])
    expected = [("cat 0", 1, (0, 1)), ("cat 1", 1, (3, 2)), ("cat 2", 1, (4, 5))]
    groups = load(tmp_path)
    assert seen(groups) == expected and groups.ties == 1
    assert seen(load(tmp_path / "0.tar")) == expected[:2]
    # columns of the same shards, read by `datasets`, get the same names
    assert {column(name) for name in ("jpg_0.jpg", "label_0.txt", "json.a", "txt", "png", "cls", "__key__")} == {
        *("jpg_0", "label_0", "a", "caption", "image", "label", "__key__")
    }


def test_shards_of_the_hub_are_read_like_local_ones(tmp_path, monkeypatch):
    pair, text, about = orpo_members(0, 0)[:3], ("0000.txt", b"a cat"), json.dumps({"caption": "spare", "score_0": 1})
    write_tar(tmp_path / "0.tar", [*pair, text, ("0000.json", about.encode())])
    found = datasets.load_dataset("webdataset", data_files=str(tmp_path / "0.tar"), split="train")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: found)
    assert seen(load("someone/shards")) == seen(load(tmp_path)) == [("a cat", 1, (1, 0))]


def test_shards_with_json_and_with_likes(tmp_path):
    about = json.dumps({"prompt": "a", "score_0": 1, "score_1": 2.5}).encode()
    pair = [("x/1.chosen.png", png(picture(0))), ("x/1.rejected.png", png(picture(1))), ("x/1.json", about)]
    groups = load(write_tar(tmp_path / "pairs.tar", pair))
    assert seen(groups) == [("a", 1, (0, 1))] and groups.groups[0].scores == (1, 2.5)
    likes = [("1.png", png(picture(0))), ("1.txt", b"a"), ("1.cls", b"0"), ("2.png", png(picture(1)))]
    single = load(write_tar(tmp_path / "likes.tar", [*likes, ("2.txt", b"b"), ("2.cls", b"1")]), "single")
    assert seen(single) == [("a", 0, (0,)), ("b", 1, (1,))]


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was loaded')",))


def test_shards_are_never_unpacked_nor_unpickled(tmp_path):
    (tmp_path / "in").mkdir()
    evil = pickle.dumps(Bomb())
    members = [*orpo_members(0, 1), *[(f"0000.{suffix}", evil) for suffix in ("pyd", "pickle", "pth", "npy")]]
    path = write_tar(tmp_path / "in" / "0.tar", [*members, ("../../evil.png", evil), ("/evil.txt", b"x")])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("0001.jpg_0.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    groups = load(path, bad_rows="skip")
    assert seen(groups) == [("cat 0", 1, (0, 1))]
    assert sorted(tmp_path.rglob("*")) == before


def test_shards_that_cannot_be_read(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", orpo_members(0, 1)).read_bytes()
    (tmp_path / "torn.tar").write_bytes(whole[:700])
    write_tar(tmp_path / "gzip.tar", orpo_members(0, 1), "w:gz")
    write_tar(tmp_path / "twice.tar", [*orpo_members(0, 1), ("0000.jpg_0.jpg", b"x")])
    write_tar(tmp_path / "json.tar", [("1.json", b"{broken")])
    write_tar(tmp_path / "none.tar", [("README", b"x")])
    for name, words in {
        "torn": "0000.jpg_0.png",
        "gzip": "",
        "twice": "0000.jpg_0.jpg .*'jpg_0'",
        "json": "1.json",
        "none": "",
    }.items():
        with pytest.raises(DiffpoError, match=f"{name}.tar.*{words}"):
            load(tmp_path / f"{name}.tar")


def test_a_text_that_cannot_be_read_costs_only_its_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("diffpo.data.files.TEXT_LIMIT", 2**16)
    broken = [("0003.json", b"{broken"), ("0005.note.txt", b"\xff\xd9x"), ("0007.note.txt", b"x" * 2**17)]
    members = [orpo_members(i, i % 2) for i in range(9)]
    for name, content in broken:
        members[int(name[:4])].append((name, content))
    write_tar(tmp_path / "0.tar", [member for sample in members for member in sample])
    groups = load(tmp_path / "0.tar", bad_rows="skip")
    assert [caption for caption, *_ in seen(groups)] == [f"cat {i}" for i in (0, 1, 2, 4, 6, 8)]
    assert [(index, problem.about) for index, problem in groups.bad] == [(int(name[:4]), name) for name, _ in broken]
