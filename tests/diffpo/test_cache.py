import pytest
import torch

from diffpo.data import cache as module
from diffpo.data.cache import Cache
from diffpo.errors import DiffpoError


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 4)


def compute(rows):
    return {"mean": torch.tensor([[row, row + 0.5] for row in rows]), "id": torch.tensor(list(rows))}


def test_rows_come_back_in_the_order_asked_for(tmp_path):
    cache = Cache(tmp_path, "latents", "k" * 32, 10)
    cache.build(compute, batch=3)
    rows = [9, 0, 4, 3, 4]
    assert cache.read(rows)["id"].tolist() == rows
    assert cache.read(rows)["mean"].tolist() == [[row, row + 0.5] for row in rows]


def test_processes_share_the_work_and_nothing_is_computed_twice(tmp_path):
    done = []

    def counted(rows):
        done.extend(rows)
        return compute(rows)

    for process in (0, 1):  # the second looks when the first has finished: its share must not shift
        Cache(tmp_path, "text", "k" * 32, 18).build(counted, 2, process, processes=2)
    assert sorted(done) == list(range(18))
    again = Cache(tmp_path, "text", "k" * 32, 18)
    again.build(counted, 2)
    assert len(done) == 18 and again.missing() == []


def test_a_missing_shard_is_computed_again(tmp_path):
    cache = Cache(tmp_path, "text", "k" * 32, 10)
    cache.build(compute, 4)
    cache.path(1).unlink()
    again = Cache(tmp_path, "text", "k" * 32, 10)
    assert again.missing() == [1]
    again.build(compute, 4)
    assert again.read([5])["id"].item() == 5


def test_truncated_and_stale_shards_are_refused(tmp_path):
    cache = Cache(tmp_path, "text", "k" * 32, 8)
    cache.build(compute, 4)
    whole = cache.path(1).read_bytes()
    cache.path(1).write_bytes(whole[:-8])
    with pytest.raises(DiffpoError, match=r"00001.safetensors cannot be read .*truncated or damaged"):
        Cache(tmp_path, "text", "k" * 32, 8).build(compute, 4)
    cache.path(1).write_bytes(cache.path(0).read_bytes())  # another shard's content
    with pytest.raises(DiffpoError, match="stale"):
        Cache(tmp_path, "text", "k" * 32, 8).missing()
    cache.path(1).write_bytes(whole)
    with pytest.raises(DiffpoError, match="stale"):  # same folder name, other key
        Cache(tmp_path, "text", "k" * 16 + "x" * 16, 8).missing()
    with pytest.raises(DiffpoError, match="stale"):  # other number of rows
        Cache(tmp_path, "text", "k" * 32, 7).missing()


def test_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    from pathlib import Path

    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    cache = Cache(tmp_path, "text", "k" * 32, 8)
    with pytest.raises(DiffpoError, match="No space left on device"):
        cache.build(compute, 4)
    assert not list(cache.folder.iterdir())
