"""Data from others: rows open no files outside their folders, and any file name works."""

import json
import os

import pytest
from foreign_rows import OUTSIDE, fault, row, siblings, write_rows
from test_formats import load, save, seen
from test_shards import orpo_members, write_tar
from tiny import metrics_of, pick_a_pic_rows, picture, png, write_folder, write_parquet

from diffpo.common import images
from diffpo.common.errors import DiffpoError

# ---- which files are opened


def test_names_outside_the_folder_are_bad_rows_unless_data_roots_allows_them(folder, private):
    (folder / "link.png").symlink_to(private)
    (folder / "up").symlink_to(private.parent)
    for name in (str(private), "../private/mine.png", "link.png", "up/mine.png", "..\\private\\mine.png"):
        write_rows(folder, row(name))
        assert fault(folder).startswith(OUTSIDE) and "data.roots=[FOLDER]" in fault(folder)
        assert seen(load(folder, roots=[str(private.parent)])) == [("x", 1, (9, 1))]
    write_rows(folder, row("mine.png"))
    assert seen(load(folder, roots=[str(private.parent)])) == [("x", 1, (9, 1))]
    with pytest.raises(DiffpoError, match=r"data\.roots: nowhere"):
        load(folder, roots=["nowhere"])


def test_absolute_names_and_links_within_the_folder_are_read(folder):
    (folder / "link.png").symlink_to("2.png")
    write_rows(folder, row(str(folder / "0.png"), "link.png"))
    assert seen(load(folder)) == [("x", 1, (0, 2))]


def test_devices_pipes_and_folders_are_not_read(folder, tmp_path):
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png"):
        write_rows(folder, row(name))
        assert fault(folder).startswith(f"unreadable image: {name}: ")
    (folder / "zero.png").symlink_to("/dev/zero")
    for name in ("/dev/zero", "zero.png", "/proc/self/environ"):
        write_rows(folder, row(name))
        assert fault(folder).startswith(OUTSIDE)
    write_rows(folder, row("/dev/zero"))
    assert fault(folder, roots=["/dev"]).startswith("unreadable image: /dev/zero: ")
    with pytest.raises(DiffpoError, match="/dev/zero"):
        load("/dev/zero")


@pytest.mark.parametrize("name", ["http://x.org/a.png", "HTTPS://x/a", "s3://b/a.png", "data:image/png;base64,AAAA"])
def test_urls_are_refused(folder, name):
    assert fault(write_rows(folder, row(name))).startswith(f"a URL, not a file: {name}")
    with pytest.raises(DiffpoError, match=r"https://example\.org/pairs\.parquet"):
        load("https://example.org/pairs.parquet")


def test_backslashes_separate_folders(folder):
    save(folder / "chosen" / "b.png", 0)
    assert seen(load(write_rows(folder, row("chosen\\b.png", ".\\1.png")))) == [("x", 1, (0, 1))]


PLACES = [
    lambda path: {"path": path, "offset": 0, "size": 2**40},
    lambda path: {"path": path, "offset": 0, "size": os.path.getsize(path)},
    lambda path: {"bytes": None, "path": path},
    lambda path: {"bytes": b"", "path": path},
]


@pytest.mark.parametrize("place", PLACES)
def test_a_parquet_file_cannot_name_a_file_outside(tmp_path, private, place):
    (tmp_path / "ds").mkdir()
    rows = [{"prompt": "x", "chosen": place(str(private)), "rejected": place(str(private))}]
    assert fault(write_parquet(tmp_path / "ds" / "a.parquet", rows)).startswith(OUTSIDE)


def test_a_position_in_a_json_file_of_a_shard_is_only_a_value(tmp_path, private):
    size = private.stat().st_size
    about = {
        "prompt": "x",
        "chosen": {"path": str(private), "offset": 0, "size": size},
        "rejected": "../private/mine.png",
    }
    (tmp_path / "ds").mkdir()
    source = write_tar(tmp_path / "ds" / "a.tar", [("1.json", json.dumps(about).encode())])
    assert fault(source).startswith(OUTSIDE)
    own = json.dumps([{}, {"chosen": [0, 0, size, "x"]}]).encode()  # the form of the index of shards
    source = write_tar(tmp_path / "ds" / "b.tar", [("1.chosen.json", own), ("1.rejected.json", own), ("1.txt", b"x")])
    assert fault(source) == "missing image: chosen"


def test_rows_of_the_hub_cannot_name_files_in_the_working_directory(folder, monkeypatch):
    import datasets

    monkeypatch.chdir(folder)
    found = datasets.Dataset.from_list([row("0.png")])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: found)
    assert fault("someone/pairs") == "unreadable image: 0.png: No such file or directory"
    assert seen(load("someone/pairs", roots=[str(folder)])) == [("x", 1, (0, 1))]


def test_the_hubs_own_links_are_followed(tmp_path):
    repository = tmp_path / "datasets--someone--pairs"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "0a1b" / "data").mkdir(parents=True)
    write_parquet(repository / "blobs" / "77", pick_a_pic_rows(2))
    link = repository / "snapshots" / "0a1b" / "data" / "train-00000-of-00001.parquet"
    link.symlink_to("../../../blobs/77")
    assert len(load(repository / "snapshots" / "0a1b")) == 2
    link.unlink()
    write_parquet(tmp_path / "elsewhere.parquet", pick_a_pic_rows(2))
    link.symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(DiffpoError, match=r"train-00000-of-00001\.parquet .*data\.roots"):
        load(repository / "snapshots" / "0a1b")


def test_links_and_pipes_between_siblings(tmp_path, private):
    folder = siblings(tmp_path / "ds")
    (folder / "chosen" / "0.png").unlink()
    (folder / "chosen" / "0.png").symlink_to(private)
    assert fault(folder).startswith(f"{OUTSIDE}: chosen/0.png")
    (folder / "chosen" / "0.png").unlink()
    save(folder / "chosen" / "0.png", 0)
    for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
        (folder / "chosen" / "0.txt").unlink()
        make(folder / "chosen" / "0.txt")
        assert "chosen/0.txt" in fault(folder)
    os.rename(folder / "rejected", tmp_path / "rejected")
    (folder / "rejected").symlink_to(tmp_path / "rejected")
    with pytest.raises(DiffpoError, match=r": rejected .*data\.roots"):
        load(folder)
    (folder / "metadata.jsonl").symlink_to(private)
    with pytest.raises(DiffpoError, match=r"metadata\.jsonl .*data\.roots"):
        load(folder)


def test_other_files_beside_the_pairs_are_counted_and_named(tmp_path):
    folder = siblings(tmp_path / "ds")
    (folder / "chosen" / "notes.md").write_text("x")
    (folder / "chosen" / "9.txt").write_text("a caption without a picture")
    (folder / "rejected" / "0.txt").write_text("cat 0")
    (folder / "rejected" / "more").symlink_to(tmp_path)
    (folder / "rejected" / ".hidden.png").write_bytes(b"x")
    groups = load(folder)
    (remark,) = groups.remarks()
    assert len(groups) == 2 and "5 files: chosen/notes.md, chosen/9.txt, rejected/.hidden.png and 2 more" in remark


def test_images_of_every_suffix_are_pairs(tmp_path):
    folder = siblings(tmp_path / "ds", ["a", "b", "c", "d"])
    for number, suffix in enumerate(("jfif", "TIF", "JPE", "heic")):
        image = (folder / "rejected" / f"{number}.png").rename(folder / "rejected" / f"{number}.{suffix}")
        if suffix != "heic":
            picture(2 * number + 1).save(image, {"TIF": "TIFF"}.get(suffix, "JPEG"))
    (folder / "rejected" / "3.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    groups = load(folder, bad_rows="skip")
    assert groups.captions == ["a", "b", "c"] and [row for row, _ in groups.bad] == [3]
    if "HEIF" not in images.formats():
        assert all(each in groups.describe_bad() for each in ("rejected/3.heic", "pip install pillow-heif"))


# ---- file names


@pytest.mark.parametrize(
    "name", ["data[1]", "a*b", "what?", "it's", 'q"q', "a b", "ünï cødé", "{x}", "a::b", "n" * 250]
)
def test_any_file_name_works(tmp_path, name):
    expected = load(write_parquet(tmp_path / "plain.parquet", pick_a_pic_rows(3))).data_hash
    folder = tmp_path / name
    folder.mkdir()
    write_parquet(folder / "v[2].parquet", pick_a_pic_rows(3))
    assert load(folder).data_hash == load(folder / "v[2].parquet").data_hash == expected
    (folder / "v[2].parquet").unlink()
    for seed in range(4):
        save(folder / f"{name[:240]}{seed}.png", seed)
    write_rows(folder, row(f"{name[:240]}0.png", f"{name[:240]}1.png"))
    assert seen(load(folder)) == [("x", 1, (0, 1))]
    streamed = load(
        write_parquet(tmp_path / f"{name[:240]}.parquet", pick_a_pic_rows(3)), cache=str(folder), streaming=True
    )
    assert streamed.data_hash == expected


def test_names_that_are_not_text_are_shown_safely(tmp_path):
    folder = siblings(tmp_path / "ds")
    (folder / "chosen" / os.fsdecode(b"\xff\x1b[31m.md")).write_text("x")
    (remark,) = load(folder).remarks()
    assert remark.endswith("1 file: chosen/[31m.md")


# ---- changed content


def test_rows_of_the_same_size_and_time_are_read_again(folder):
    path = write_rows(folder, row("0.png"), row("2.png", "3.png")) / "metadata.jsonl"
    before = path.stat()
    assert seen(load(folder)) == [("x", 1, (0, 1)), ("x", 1, (2, 3))]
    write_rows(folder, row("2.png"), row("0.png", "3.png"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert seen(load(folder)) == [("x", 1, (2, 1)), ("x", 1, (0, 3))]


def test_a_run_goes_on_with_data_that_were_moved_and_not_with_others(tiny_sd, make_config, tmp_path):
    from diffpo.train.loop import train

    write_folder(tmp_path / "here", 3)
    options = ("train.steps=2", f"data.validation={tmp_path / 'here'}")
    train(make_config(tiny_sd, *options, data=tmp_path / "here"))
    there = (tmp_path / "here").rename(tmp_path / "there")
    options = ("train.steps=3", f"data.validation={there}")
    train(make_config(tiny_sd, *options, data=there))
    assert [each["step"] for each in metrics_of(tmp_path / "run")] == [1, 2, 3]
    save(there / "images" / "1-chosen.png", 30)
    with pytest.raises(DiffpoError, match=r"data\.train.*output=FOLDER"):
        train(make_config(tiny_sd, "train.steps=4", data=there))


def test_faults_name_the_file(folder):
    for change, words in {
        ("prompt", ""): ": prompt (0.png)",
        ("prompt", 7): ": 7 (0.png)",
        ("chosen", "2x.png"): "unreadable image: 2x.png: No such file or directory",
    }.items():
        assert fault(write_rows(folder, row("0.png") | dict([change]))).endswith(words)
    save(folder / "wide.png", 4)
    picture(4, (24, 16)).save(folder / "wide.png")
    problem = fault(write_rows(folder, row("0.png", "wide.png")))
    assert all(words in problem for words in ("0.png and wide.png", "16x16 and 24x16", "data.buckets=true"))
    (folder / "2.png").write_bytes(b"")
    assert "2.png" in fault(write_rows(folder, row("2.png")))
    shard = write_tar(folder / "s.tar", [*orpo_members(0, 1)[1:], ("0000.jpg_0.png", png(picture(0))[:60])])
    assert "unreadable image: s.tar: 0000.jpg_0.png: " in fault(shard)


def test_one_pair_and_a_batch_larger_than_the_data(tiny_sd, make_config, tmp_path):
    from diffpo.train.loop import train

    source = write_folder(tmp_path / "one", 1)
    config = make_config(tiny_sd, f"data.validation={source}", "train.steps=2", "train.batch_size=3", data=source)
    assert train(config).exists()


def test_empty_folders(tmp_path):
    (tmp_path / "chosen").mkdir()
    with pytest.raises(DiffpoError, match=str(tmp_path / "chosen")):
        load(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n\n")
    with pytest.raises(DiffpoError, match=r"metadata\.jsonl"):
        load(tmp_path)
