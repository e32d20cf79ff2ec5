"""One run at a time in a folder: refused at once, free after any death, and never in a run's own way."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

from diffpo.common import lock
from diffpo.common.errors import DiffpoError
from diffpo.train import claim

HOLDER = """
import sys, time
from pathlib import Path
from diffpo.common import lock

with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def in_use(folder, file=None, text="4711 elsewhere\n"):
    """As if another process ran in ``folder``: the system tells open files apart, not processes."""
    path = file or folder / lock.NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    with open(path) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    path.unlink(missing_ok=True)


def test_the_second_run_is_refused_at_once_and_a_dead_one_is_in_nobodys_way(tmp_path):
    folder = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        refused = pytest.raises(DiffpoError, match=rf"{folder} is in use by another run \(process {child.pid}\)")
        with refused, lock.held(folder):
            pass
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    assert (folder / lock.NAME).exists()  # nobody was there to remove it
    with lock.held(folder):
        assert (folder / lock.NAME).read_text().startswith(f"{os.getpid()} ")


def test_verbs_nest_in_a_thread_but_two_threads_are_two_runs(tmp_path):
    said = []

    def run():
        try:
            with lock.held(tmp_path / "run"):
                said.append("in")
        except DiffpoError as error:
            said.append(str(error))

    with lock.held(tmp_path / "run"), lock.held(tmp_path / "x" / ".." / "run"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(said) == 1 and f"process {os.getpid()}" in said[0]
    run()
    assert said[1] == "in"


def test_what_the_lock_leaves(tmp_path):
    with lock.held(tmp_path / "new" / "run"):
        pass
    assert not (tmp_path / "new" / "run").exists()  # nothing was written
    with lock.held(tmp_path / "run"):
        (tmp_path / "run" / "result").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["result"]
    (tmp_path / "empty").mkdir()
    with lock.held(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").exists()


@pytest.mark.parametrize("text", ["", "4711 elsewhere\n", "\x00\xff" * 40, "x" * 200])
def test_a_lock_file_that_nobody_holds_stops_nothing_and_is_no_content(tmp_path, text):
    (tmp_path / lock.NAME).write_text(text)
    claim.check_unused(tmp_path)
    with lock.held(tmp_path):
        pass


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"another run\. Wait"),
        ("4711 far-away.example\n", r"process 4711 on far-away\.example"),
        ("\x1b[2J", r"another run\. Wait"),
    ],
)
def test_who_holds_it_is_said_if_that_is_known(tmp_path, text, words):
    refused = pytest.raises(DiffpoError, match=words)
    with in_use(tmp_path, text=text), refused, lock.held(tmp_path):
        pass


def test_what_is_no_lock_file_is_left_alone(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for name, make in {
        "link": lambda path: path.symlink_to(tmp_path / "precious"),
        "folder": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
        "notes": lambda path: path.write_text("x" * 1000),
    }.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name / lock.NAME)
        with pytest.raises(DiffpoError, match=f"{name}"), lock.held(tmp_path / name):
            pass
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "notes" / lock.NAME).stat().st_size == 1000


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_a_file_system_has_no_locks_that_is_said(tmp_path, monkeypatch, capsys, code):
    def without(handle, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", without)
    with lock.held(tmp_path / "run"), lock.held(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert f"{tmp_path / 'run'} cannot be locked ({os.strerror(code)})" in capsys.readouterr().out


def test_where_the_system_has_no_locks_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.held(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert "cannot be locked (this system has none)" in capsys.readouterr().out


def test_a_lock_whose_file_was_removed_meanwhile_is_taken_again(tmp_path, monkeypatch):
    """The run before removes its lock between our opening it and our locking it."""
    original, calls = fcntl.flock, []

    def late(handle, how):
        original(handle, how)
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / lock.NAME).unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with lock.held(tmp_path):
        monkeypatch.undo()
        assert len(calls) == 2
        with open(tmp_path / lock.NAME) as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch, code):
    def refused(path, *rest):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(lock.os, "open", refused)
    words = "the disk is full" if code == errno.ENOSPC else os.strerror(code)
    with pytest.raises(DiffpoError, match=f"cannot write into {tmp_path}: {words}"), lock.held(tmp_path):
        pass


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(DiffpoError, match=r"file.*: Not a directory"), lock.held(place):
            pass
    assert (tmp_path / "file").read_text() == "mine"


def test_every_verb_that_writes_refuses_a_folder_in_use(tiny_sd, make_config, make_scorer_config, tmp_path, trained):
    from diffpo.commands import quickstart
    from diffpo.commands.collect import collect
    from diffpo.evaluation import evaluate, generate
    from diffpo.evaluation.generation import Generation
    from diffpo.export import export
    from diffpo.train.loop import train
    from diffpo.train.step_scorer import train_scorer

    lora, _ = trained("sd")
    out = tmp_path / "out"
    sampling = ("objective.name=d3po", "objective.beta=0.2", "data.prompts=shapes:train:2")
    pictures, prompt = Generation(tiny_sd, lora=lora), "a red circle on a white background"
    for verb in (
        lambda: train(make_config(tiny_sd, f"output={out}")),
        lambda: train_scorer(make_scorer_config(tiny_sd, f"output={out}")),
        lambda: generate.run(pictures.arms(), [prompt], out),
        lambda: evaluate.run(out, pictures, [prompt]),
        lambda: collect(make_config(tiny_sd, *sampling, f"objective.rollout.labels={out}/labels.jsonl"), None),
        lambda: quickstart.run(out),
    ):
        with in_use(out), pytest.raises(DiffpoError, match=rf"{out} is in use by another run \(process 4711"):
            verb()
        assert list(out.iterdir()) == []
    out.rmdir()
    target = in_use(out, tmp_path / ".out.lock")
    with target, pytest.raises(DiffpoError, match=rf"{out} is in use by another run \(process 4711"):
        export.run(export.Export(lora, "diffusers", str(tiny_sd), out))
    assert not out.exists()
