"""Files and folders that are written whole or not at all."""

import errno
import os

import pytest

from diffpo.common import files
from diffpo.common.errors import DiffpoError


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path, shared):
    path = tmp_path / "new" / "file"
    files.write_atomic(path, b"old", shared)
    with files.whole_file(path, shared) as file:
        file.write(b"ne")
        assert path.read_bytes() == b"old"
        file.write(b"w")
    assert path.read_bytes() == b"new" and names(path.parent) == ["file"]
    for failure in (OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()):
        with pytest.raises(type(failure)), files.whole_file(path, shared) as file:
            file.write(b"half")
            raise failure
        assert path.read_bytes() == b"new" and names(path.parent) == ["file"]


def test_a_folder_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "folder"
    for text in ("old", "new"):
        with files.whole_folder(path, replace=True) as part:
            (part / "inner").mkdir()
            (part / "inner" / text).write_text(text)
            (part / "inner" / text).chmod(0o600)  # as safetensors leaves it
    assert names(path) == ["inner", "new"]
    assert (path / "inner" / "new").stat().st_mode & 0o777 == path.stat().st_mode & 0o666
    with pytest.raises(KeyboardInterrupt), files.whole_folder(path, replace=True) as part:
        (part / "half").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == ["folder", "inner", "new"]
    with pytest.raises(OSError), files.whole_folder(path):  # without replace what is there stays
        pass
    assert names(tmp_path) == ["folder", "inner", "new"]
    (tmp_path / "empty").mkdir()
    with files.whole_folder(tmp_path / "empty") as part:
        (part / "file").touch()
    assert names(tmp_path / "empty") == ["file"]


def test_everything_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    """Of files their contents; of a folder all that is in it, and afterwards its new name."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        files.os, "fsync", lambda handle: (done.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr(files.os, "replace", lambda old, new: (done.append("renamed"), replace(old, new)))
    files.write_atomic(tmp_path / "file", b"content")
    assert [os.path.basename(each) for each in done] == [".file.part", "renamed"]
    done.clear()
    with files.whole_folder(tmp_path / "folder") as part:
        (part / "inner").mkdir()
        (part / "inner" / "a").touch()
    before, after = done[: done.index("renamed")], done[done.index("renamed") + 1 :]
    assert {os.path.relpath(each, part) for each in before} == {".", "inner", "inner/a"}
    assert after == [str(tmp_path)]


def test_two_runs_may_write_the_same_file_at_once(tmp_path, monkeypatch):
    fsync, calls = files.os.fsync, []

    def meanwhile(handle):
        fsync(handle)
        calls.append(handle)
        if len(calls) == 1:
            files.write_atomic(tmp_path / "rows", b"x" * 100, shared=True)
            assert (tmp_path / "rows").read_bytes() == b"x" * 100

    monkeypatch.setattr(files.os, "fsync", meanwhile)
    files.write_atomic(tmp_path / "rows", b"x" * 100, shared=True)
    assert (tmp_path / "rows").read_bytes() == b"x" * 100 and names(tmp_path) == ["rows"]


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127, "short"])
def test_names_of_any_length_have_a_hidden_one_beside_them(tmp_path, name):
    files.write_atomic(tmp_path / name, b"content")
    assert (tmp_path / name).read_bytes() == b"content"
    assert len({files.beside(tmp_path / each) for each in (name, name[:-1], name[1:] + "x")}) == 3


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (RuntimeError("PytorchStreamWriter: No space left on device"), "the disk is full"),
        (ValueError("Error while serializing: I/O error: File too large (os error 27)"), "File too large"),
    ],
)
def test_the_systems_errors_are_said_with_the_path_and_the_setting(error, words):
    with pytest.raises(DiffpoError) as raised, files.writing("/some/file", "data.cache=FOLDER"):
        raise error
    for part in ("/some/file", words, "data.cache=FOLDER"):
        assert part in str(raised.value)
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [ValueError("no"), DiffpoError("No space left, which is said already")])
def test_other_errors_pass_through(error):
    with pytest.raises(type(error)) as raised, files.writing("/some/file"):
        raise error
    assert raised.value is error
