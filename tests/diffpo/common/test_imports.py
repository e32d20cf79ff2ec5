"""Objects named `module:attribute`: what is found, and what the one error says."""

import subprocess
import sys
from pathlib import Path

import pytest

from diffpo.common.errors import DiffpoError
from diffpo.common.imports import load_attribute

MODULE = """
def near_miss(): pass
class Near: pass
number = 3
def __getattr__(name):
    if name == "lazy": return len
    if name == "broken": raise OSError("no disk")
    raise AttributeError(name)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a module, which is not on sys.path."""
    (tmp_path / "outside_module.py").write_text(MODULE)
    (tmp_path / "raises_on_import.py").write_text("1 / 0")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('a file here hides a module of Python')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    for name in ("outside_module", "raises_on_import", "colorsys"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def load(spec, fits=callable):
    return load_attribute(spec, "some.key", "a function", fits)


def test_a_module_in_the_working_directory_is_found_and_hides_none_of_pythons(here):
    assert load("outside_module:near_miss").__name__ == "near_miss"
    assert load("outside_module.near_miss") is load("outside_module:near_miss")
    assert load("outside_module:lazy") is len
    assert load("colorsys:rgb_to_hsv")(0, 0, 0) == (0, 0, 0)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("no_such_module:f", ["ModuleNotFoundError", "no_such_module"]),
        ("raises_on_import:f", ["ZeroDivisionError"]),
        ("outside_module:near_mis", ["outside_module.py", "near_miss"]),
        ("outside_module:broken", ["no disk"]),
        ("outside_module:number", ["a function"]),
        *((spec, ["package.module:attribute"]) for spec in ("f", ":f", "m:", "a b:f", "../m:f", "m:f.g", "m..n:f", "")),
    ],
)
def test_an_unusable_name_is_one_error_that_names_key_and_name(here, spec, words):
    with pytest.raises(DiffpoError) as error:
        load(spec)
    assert all(word in str(error.value) for word in ["some.key", repr(spec), *words]), error.value


def test_the_nearest_name_is_of_the_kind_that_is_sought(here):
    with pytest.raises(DiffpoError, match=r"did you mean Near\?"):
        load("outside_module:near", lambda value: isinstance(value, type))


def test_the_installed_command_finds_modules_of_the_working_directory(here):
    """Its first entry of sys.path is the folder of the command, not the working directory."""
    code = "from diffpo.common import imports; print(imports.load_attribute('outside_module:Near', 'k', '', callable))"
    (here / "bin").mkdir()
    (here / "bin" / "command.py").write_text(code)
    command = [sys.executable, str(Path("bin") / "command.py")]
    assert "outside_module.Near" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
