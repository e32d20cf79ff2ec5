"""Shards: read back, shared out, built by several processes and runs at once, killed and resumed, torn and stale."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from diffpo.common.errors import DiffpoError
from diffpo.common.worker import Worker
from diffpo.data import cache as module
from diffpo.data.cache import Cache


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD", 4)


def compute(rows):
    return {"mean": torch.tensor([[row, row + 0.5] for row in rows]), "id": torch.tensor(list(rows))}


def test_rows_are_read_in_the_given_order(tmp_path):
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

    for process in (0, 1):  # the second starts when the first has finished: its share must not change
        Cache(tmp_path, "text", "k" * 32, 18).build(counted, 2, Worker(index=process, count=2))
    assert sorted(done) == list(range(18))
    again = Cache(tmp_path, "text", "k" * 32, 18)
    again.build(counted, 2)
    assert len(done) == 18 and not again.missing()


def test_rows_are_loaded_while_those_before_are_computed(tmp_path):
    """The second portion is being loaded when the first one is computed, and one that fails is raised."""
    loaded, ahead = [threading.Event() for _ in range(5)], []

    def load(rows):
        loaded[rows[0] // 2].set()
        return [10 * row for row in rows]

    def after(tens):
        row = tens[0] // 20
        ahead.append(row == 4 or loaded[row + 1].wait(30))
        return compute([ten // 10 for ten in tens])

    cache = Cache(tmp_path, "text", "k" * 32, 9)
    cache.build(after, 2, load=load)
    assert ahead == [True] * 5
    assert cache.read(range(9))["id"].tolist() == list(range(9))

    def broken(rows):
        if rows[0] == 4:
            raise DiffpoError("row 4 cannot be read")
        return rows

    again = Cache(tmp_path / "other", "text", "k" * 32, 9)
    with pytest.raises(DiffpoError, match="row 4"):
        again.build(compute, 2, load=broken)
    assert again.missing() == {1: [4, 5, 6, 7], 2: [8]}  # what was whole before is kept


def test_a_missing_shard_is_computed_again(tmp_path):
    cache = Cache(tmp_path, "text", "k" * 32, 10)
    cache.build(compute, 4)
    cache.path(1).unlink()
    again = Cache(tmp_path, "text", "k" * 32, 10)
    assert again.missing() == {1: [4, 5, 6, 7]}
    again.build(compute, 4)
    assert again.read([5])["id"].item() == 5


def test_only_the_rows_that_are_asked_for_are_computed_and_others_can_follow(tmp_path):
    done = []

    def counted(rows):
        done.extend(rows)
        return compute(rows)

    straight = Cache(tmp_path / "straight", "latents", "k" * 32, 10)
    straight.build(compute, 3)
    for asked, new in (([9, 1, 6, 1], [1, 6, 9]), ([6, 0, 3], [0, 3]), ([9], []), (None, [2, 4, 5, 7, 8])):
        done.clear()
        cache = Cache(tmp_path, "latents", "k" * 32, 10)
        cache.build(counted, 3, rows=asked)
        assert list(dict.fromkeys(done)) == new and not cache.missing(asked)
        assert len(done) == -(-len(new) // 3) * 3  # batches of one size
        seen = list(range(10)) if asked is None else asked
        assert cache.read(seen)["mean"].tolist() == [[row, row + 0.5] for row in seen]
    assert not cache.missing() and shards(tmp_path / cache.folder.name) == shards(straight.folder)


def test_runs_that_need_other_rows_of_a_shard_keep_each_others(tmp_path):
    other = Cache(tmp_path, "latents", "k" * 32, 4)

    def meanwhile(rows):
        other.build(compute, 4, rows=[0, 3])
        return compute(rows)

    cache = Cache(tmp_path, "latents", "k" * 32, 4)
    cache.build(meanwhile, 4, rows=[1, 3])
    again = Cache(tmp_path, "latents", "k" * 32, 4)
    assert again.missing() == {0: [2]} and again.read([3, 0, 1])["id"].tolist() == [3, 0, 1]


def test_truncated_and_stale_shards_are_refused(tmp_path):
    cache = Cache(tmp_path, "text", "k" * 32, 8)
    cache.build(compute, 4)
    whole = cache.path(1).read_bytes()
    cache.path(1).write_bytes(whole[:-8])
    with pytest.raises(DiffpoError, match=r"00001\.safetensors"):
        Cache(tmp_path, "text", "k" * 32, 8).build(compute, 4)
    cache.path(1).write_bytes(cache.path(0).read_bytes())  # another shard's content
    with pytest.raises(DiffpoError, match="00001"):
        Cache(tmp_path, "text", "k" * 32, 8).missing()
    cache.path(1).write_bytes(whole)
    with pytest.raises(DiffpoError, match="00000"):  # same folder name, other key
        Cache(tmp_path, "text", "k" * 16 + "x" * 16, 8).missing()
    with pytest.raises(DiffpoError, match="00001"):  # other number of rows
        Cache(tmp_path, "text", "k" * 32, 7).missing()


def test_deleted_shards_are_named_and_computed_again(tmp_path):
    cache = Cache(tmp_path, "text", "k" * 32, 10)
    cache.build(compute, 4)
    cache.read([0])
    shutil.rmtree(cache.folder)
    assert cache.read([1])["id"].item() == 1  # an open shard stays readable
    with pytest.raises(DiffpoError, match=r"00001\.safetensors .*Run the same command again"):
        cache.read([4])
    again = Cache(tmp_path, "text", "k" * 32, 10)
    again.build(compute, 4)
    assert again.read([4])["id"].item() == 4


def test_a_folder_that_is_deleted_while_a_shard_is_written(tmp_path, monkeypatch):
    cache = Cache(tmp_path, "text", "k" * 32, 4)
    fsync = os.fsync

    def deleted(handle):
        fsync(handle)
        shutil.rmtree(cache.folder)

    monkeypatch.setattr(os, "fsync", deleted)
    with pytest.raises(DiffpoError, match=r"00000\.safetensors"):
        cache.build(compute, 4)
    monkeypatch.undo()
    cache.build(compute, 4)
    assert cache.read([3])["id"].item() == 3


def test_an_interruption_leaves_no_half_shard(tmp_path, monkeypatch):
    def pressed(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", pressed)
    cache = Cache(tmp_path, "text", "k" * 32, 8)
    with pytest.raises(KeyboardInterrupt):
        cache.build(compute, 4)
    assert not list(cache.folder.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiffpoError, match=r"file/text-.*Not a directory.*data\.cache=FOLDER"):
        Cache(tmp_path / "file", "text", "k" * 32, 8).build(compute, 4)
    with pytest.raises(DiffpoError, match=r"File name too long.*data\.cache=FOLDER"):
        Cache(tmp_path / ("x" * 300), "text", "k" * 32, 8).build(compute, 4)


def test_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache = Cache(tmp_path, "text", "k" * 32, 8)
    with pytest.raises(DiffpoError, match=r"text-.*the disk is full.*data.cache=FOLDER"):
        cache.build(compute, 4)
    assert not list(cache.folder.iterdir())


# Fills caches of 30 rows in shards of 4, slowly, in four processes at once, each with (folder, process, processes, the
# shard that is written and not yet renamed when the process is killed). One of torch is enough for all of them.
BUILDERS = """
import os, signal, sys, time
from pathlib import Path
import torch
from diffpo.common.worker import Worker
from diffpo.data import cache as module
module.SHARD, replace = 4, os.replace

def compute(rows):
    time.sleep(0.02)
    return {"mean": torch.tensor([[row, row + 0.5] for row in rows]), "id": torch.tensor(list(rows))}

def build(folder, process, processes, dies):
    def ambush(part, path):
        if Path(path).name == f"{dies:05d}.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(part, path)
    os.replace = ambush
    cache = module.Cache(Path(sys.argv[1]) / folder, "text", "k" * 32, 30)
    cache.build(compute, 3, Worker(index=process, count=processes))
    os._exit(0)

started = []
for job in (("shared", 0, 2, -1), ("shared", 1, 2, -1), ("shared", 0, 1, -1), ("killed", 0, 1, 5)):
    started.append(os.fork() or build(*job))
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in started))
"""


@pytest.fixture(scope="module")
def builders(tmp_path_factory):
    """The folder in which they built."""
    root = tmp_path_factory.mktemp("builders")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BUILDERS, str(root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "0", "0", str(-signal.SIGKILL)], done.stderr
    return root


def shards(root):
    return {path.name: path.read_bytes() for path in (root / f"text-{'k' * 16}").glob("*.safetensors")}


@pytest.fixture
def straight(tmp_path):
    Cache(tmp_path, "text", "k" * 32, 30).build(compute, 3)
    return shards(tmp_path)


def test_two_processes_and_another_run_at_once_leave_the_very_files_of_one(builders, straight):
    assert shards(builders / "shared") == straight and len(straight) == 8
    cache = Cache(builders / "shared", "text", "k" * 32, 30)
    assert len(list(cache.folder.iterdir())) == 8  # and nothing beside them
    assert not cache.missing() and cache.read(range(30))["id"].tolist() == list(range(30))


def test_a_killed_build_goes_on_and_what_it_left_is_cleaned_away(builders, straight):
    root = builders / "killed"
    cache = Cache(root, "text", "k" * 32, 30)
    (left,) = (path for path in cache.folder.iterdir() if path.name.startswith("."))
    assert list(cache.missing()) == [5, 6, 7]
    done = []

    def counted(rows):
        done.extend(rows)
        return compute(rows)

    cache.build(counted, 3)
    assert shards(root) == straight and list(dict.fromkeys(done)) == list(range(20, 30))
    assert left.exists()  # it might be what another run is writing
    os.utime(left, (time.time() - 2 * module.ABANDONED,) * 2)
    Cache(root, "text", "k" * 32, 30).build(counted, 3)
    assert not left.exists() and shards(root) == straight and set(done) == set(range(20, 30))


def test_many_small_caches_are_shared_out_too(tmp_path):
    """As those of buckets, of one shard each: not all of them are the first process's."""
    built = {0: 0, 1: 0}
    for number in range(20):
        for process in built:
            cache = Cache(tmp_path, "latents", module.content_key("bucket", number), 3)
            before = cache.missing()
            cache.build(compute, 3, Worker(index=process, count=2))
            built[process] += len(before) - len(cache.missing())
    assert built[0] + built[1] == 20 and min(built.values()) >= 4
