"""Copies of rows, of parquet files and of streams: they have only the needed columns, continue after an interruption,
and belong to the content that they were made from."""

import os
from concurrent.futures import ThreadPoolExecutor

import datasets
import pytest
from tiny import pick_a_pic_rows, write_folder, write_parquet

from diffpo.common.errors import DiffpoError
from diffpo.config import Data
from diffpo.data import stream, tables
from diffpo.data.groups import load_groups


@pytest.fixture
def load(tmp_path, monkeypatch):
    for module in (stream, tables):
        monkeypatch.setattr(module, "ROWS", 4)
    monkeypatch.setattr(tables, "AT_ONCE", 3)
    open_stream = datasets.load_dataset

    def hub(name, split, streaming=False):
        files = sorted(str(path) for path in (tmp_path / "shards").glob("*.parquet"))
        return open_stream("parquet", data_files=files, split="train", streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", hub)

    def load(source, **options):
        data = Data(train=str(source), resolution=16, cache=str(tmp_path / "cache"), **options)
        return load_groups(data, str(source), "train")

    return load


@pytest.fixture
def source(tmp_path):
    """Eleven rows in two files, with an unused column."""
    rows = [{**row, "ballast": "x" * 100} for row in pick_a_pic_rows(11)]
    (tmp_path / "shards").mkdir()
    write_parquet(tmp_path / "shards" / "0.parquet", rows[:6])
    write_parquet(tmp_path / "shards" / "1.parquet", rows[6:])
    return tmp_path / "shards"


@pytest.fixture(params=["parquet", "hub"])
def streamed(request, source):
    return source if request.param == "parquet" else "someone/pairs"


def files(tmp_path):
    return sorted(path.name for path in tmp_path.glob("cache/rows-*/*.arrow"))


def test_a_stream_gives_the_same_groups_as_its_files(source, streamed, load, tmp_path):
    plain, groups = load(source), load(streamed, streaming=True)
    assert groups.data_hash == plain.data_hash and len(groups) == 11
    assert [groups.images(i)[0].tobytes() for i in (0, 10)] == [plain.images(i)[0].tobytes() for i in (0, 10)]
    copies = list(tmp_path.glob("cache/rows-*/*.arrow"))
    assert copies and not any(b"ballast" in copy.read_bytes() for copy in copies)
    assert sum(datasets.Dataset.from_file(str(copy)).num_rows for copy in copies) == 11


def test_a_limit_stops_the_copy_and_a_larger_one_continues_it(source, streamed, load, tmp_path):
    assert load(streamed, streaming=True, limit=3).data_hash == load(source, limit=3).data_hash
    assert files(tmp_path) == ["00000.arrow"]
    first = next(tmp_path.glob("cache/rows-*/00000.arrow"))
    before = first.stat().st_mtime_ns
    assert load(streamed, streaming=True, limit=10).data_hash == load(source, limit=10).data_hash
    assert len(load(streamed, streaming=True)) == 11
    assert first.stat().st_mtime_ns == before, "what is copied is not copied again"


@pytest.mark.parametrize("fatal", [0, 1, 2])
def test_an_interrupted_copy_is_continued(source, streamed, load, monkeypatch, fatal):
    module, name = (stream, "_write") if streamed == "someone/pairs" else (tables.os, "replace")
    write, calls = getattr(module, name), []

    def broken(*args):
        if "arrow" in str(args[-1 if module is tables.os else 0]):
            calls.append(args)
            if len(calls) == fatal + 1:
                raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(module, name, broken)
    with pytest.raises(KeyboardInterrupt):
        load(streamed, streaming=True)
    expected = 4 if streamed == "someone/pairs" else 5  # 3 files, or 2 of each parquet file; one of them tried twice
    assert load(streamed, streaming=True).data_hash == load(source, limit=11, streaming=True).data_hash
    assert len(calls) == expected


def test_changed_content_is_copied_anew(source, load):
    """A file with other rows under the same name, of the same size, with the same time of modification."""
    path, rows = source / "1.parquet", pick_a_pic_rows(3)
    write_parquet(path, rows)
    before = path.stat()
    assert [group.captions[0] for group in load(source).groups[6:]] == ["cat 0", "cat 1", "cat 2"]
    write_parquet(path, [{**row, "caption": row["caption"].replace("cat", "dog")} for row in rows])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert [group.captions[0] for group in load(source).groups[6:]] == ["dog 0", "dog 1", "dog 2"]


def test_the_hash_of_a_large_file_is_remembered_until_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LARGE", 0)
    path, folder, hashed, begun = tmp_path / "a.parquet", tmp_path / "cache", [], tables.time.time_ns()
    path.write_bytes(b"one")
    digest = tables.file_digest
    monkeypatch.setattr(tables, "file_digest", lambda *args: hashed.append(path.read_bytes()) or digest(*args))
    first = tables.content_hash(path, folder)
    assert tables.content_hash(path, folder) == first and len(hashed) == 2, "written within the last seconds"
    monkeypatch.setattr(tables.time, "time_ns", lambda: begun + 60 * 10**9)
    assert {tables.content_hash(path, folder) for _ in range(3)} == {first} and len(hashed) == 3
    before = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert tables.content_hash(path, folder) != first and hashed[3:] == [b"two"]
    for known in folder.iterdir():
        known.write_text("{broken")
    assert tables.content_hash(path, folder) != first and len(hashed) == 5


def test_a_copy_that_is_damaged_is_named(source, load, tmp_path):
    load(source, streaming=True)
    for copy in tmp_path.glob("cache/rows-*/00000.arrow"):
        copy.write_bytes(copy.read_bytes()[:300])
    with pytest.raises(DiffpoError, match=r"00000\.arrow.*delete its folder"):
        load(source, streaming=True)


def test_some_sources_cannot_be_streamed(load, tmp_path):
    with pytest.raises(DiffpoError, match=r"data\.streaming .*mine"):
        load(write_folder(tmp_path / "mine", 1), streaming=True)


def test_a_full_disk_is_named(streamed, load, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffpo.common.files.os.replace", full)
    with pytest.raises(DiffpoError, match=r"(?s)copy of the rows .*the disk is full.*data.cache=FOLDER"):
        load(streamed, streaming=True)


def test_runs_that_start_together_make_one_copy(source, load, monkeypatch):
    replace, made = tables.os.replace, []

    def counted(old, new):
        made.append(new)
        replace(old, new)

    monkeypatch.setattr(tables.os, "replace", counted)
    with ThreadPoolExecutor(4) as pool:
        hashes = list(pool.map(lambda _: load(source, streaming=True).data_hash, range(4)))
    assert len(set(hashes)) == 1 and len(made) == len(set(made)) == 4
