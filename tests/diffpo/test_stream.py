"""Streamed rows: a copy that can be interrupted and extended, and the same groups as without it."""

import datasets
import pytest
from tiny import pick_a_pic_rows, write_folder, write_parquet

from diffpo.config import Data
from diffpo.data import stream
from diffpo.data.groups import load_groups
from diffpo.errors import DiffpoError


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "ROWS", 4)

    def load(source, **options):
        data = Data(train=str(source), resolution=16, cache=str(tmp_path / "cache"), **options)
        return load_groups(data, str(source), "train")

    return load


@pytest.fixture
def source(tmp_path):
    """Eleven rows in two files, with a column that nobody asks for."""
    rows = [{**row, "ballast": "x" * 100} for row in pick_a_pic_rows(11)]
    (tmp_path / "shards").mkdir()
    write_parquet(tmp_path / "shards" / "0.parquet", rows[:6])
    write_parquet(tmp_path / "shards" / "1.parquet", rows[6:])
    return tmp_path / "shards"


def files(tmp_path):
    return sorted(path.name for path in tmp_path.glob("cache/rows-*/*"))


def test_a_stream_gives_the_same_groups_as_its_files(source, load, tmp_path):
    plain, streamed = load(source), load(source, streaming=True)
    assert streamed.data_hash == plain.data_hash and len(streamed) == 11
    assert [streamed.images(i)[0].tobytes() for i in (0, 10)] == [plain.images(i)[0].tobytes() for i in (0, 10)]
    assert files(tmp_path) == ["00000.arrow", "00001.arrow", "00002.arrow", "about.json"]
    copy = next(tmp_path.glob("cache/rows-*/00000.arrow"))
    assert b"ballast" not in copy.read_bytes() and datasets.Dataset.from_file(str(copy)).num_rows == 4


def test_a_limit_reads_no_further_and_a_larger_one_goes_on(source, load, tmp_path, monkeypatch):
    assert load(source, streaming=True, limit=3).data_hash == load(source, limit=3).data_hash
    assert files(tmp_path) == ["00000.arrow", "about.json"]
    first = next(tmp_path.glob("cache/rows-*/00000.arrow")).stat().st_mtime_ns
    write, written = stream._write, []
    monkeypatch.setattr(stream, "_write", lambda path, rows: (written.append(path.name), write(path, rows)))
    assert load(source, streaming=True, limit=10).data_hash == load(source, limit=10).data_hash
    assert written == ["00001.arrow", "00002.arrow"]
    assert next(tmp_path.glob("cache/rows-*/00000.arrow")).stat().st_mtime_ns == first
    assert len(load(source, streaming=True)) == 11 and len(written) == 2  # all is there already


@pytest.mark.parametrize("fatal", [0, 1, 2])
def test_an_interrupted_copy_goes_on(source, load, tmp_path, monkeypatch, fatal):
    write, calls = stream._write, []

    def broken(path, rows):
        calls.append(path)
        if len(calls) == fatal + 1:
            raise KeyboardInterrupt
        write(path, rows)

    monkeypatch.setattr(stream, "_write", broken)
    with pytest.raises(KeyboardInterrupt):
        load(source, streaming=True)
    assert load(source, streaming=True).data_hash == load(source).data_hash
    assert len(calls) == 4  # three files, one of them tried twice


def test_another_source_has_another_copy_and_some_cannot_be_streamed(source, load, tmp_path):
    load(source, streaming=True)
    write_parquet(source / "1.parquet", pick_a_pic_rows(2))
    assert len(load(source, streaming=True)) == 8
    with pytest.raises(DiffpoError, match=r"data.streaming is for parquet and hub ids; .*mine is read in place"):
        load(write_folder(tmp_path / "mine", 1), streaming=True)


def test_a_full_disk_is_named(source, load, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffpo.checkpoint.os.replace", full)
    with pytest.raises(
        DiffpoError, match=r"cannot write the copy of the rows .*rows-.*No space left.*data.cache=FOLDER"
    ):
        load(source, streaming=True)
