"""The direction of imports: a room imports only rooms below it, and no files import each other in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# from the top down
ROOMS = ["cli", "commands", "train", "export", "labelling", "evaluation", "rollout", "scorers", "annotate", "objective"]
ROOMS += ["problems", "weights", "models", "data", "config", "links", "methods", "shapes", "common"]


def modules(package: str) -> dict[str, Path]:
    """The files of a package by their dotted names; a folder's name stands for its __init__.py."""
    paths = (ROOT / package).rglob("*.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = modules("diffpo") | modules("samplers")


def imported(name: str) -> set[str]:
    """The modules of ours that a module imports anywhere in it, also within functions and for types alone."""
    path, found = MODULES[name], set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            found |= {inner if (inner := f"{source}.{alias.name}") in MODULES else source for alias in node.names}
    return (found & MODULES.keys()) - {name}


def test_no_files_import_each_other_in_a_circle():
    tuple(TopologicalSorter({name: imported(name) for name in MODULES}).static_order())  # CycleError names them


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_below_it(room):
    names = [name for name in MODULES if name.split(".")[:2] == ["diffpo", room]]
    above = {f"diffpo.{other}" for other in ROOMS[: ROOMS.index(room)]}
    upward = [(name, each) for name in names for each in imported(name) if ".".join(each.split(".")[:2]) in above]
    assert names and not upward


def test_every_folder_is_a_room_and_samplers_stands_alone():
    assert {name.split(".")[1] for name in MODULES if name.startswith("diffpo.")} == set(ROOMS)
    assert not {each for name in MODULES if name.startswith("samplers") for each in imported(name) if "diffpo" in each}


@pytest.mark.parametrize("above", ["samplers.calibrate", "samplers.comfyui"])
def test_nothing_in_samplers_imports_what_is_above_it(above):
    below = [name for name in MODULES if name.startswith("samplers") and not name.startswith(above)]
    assert not [(name, each) for name in below for each in imported(name) if each.startswith(above)]


def test_tests_mirror_the_rooms():
    folders = {path.name for path in (ROOT / "tests" / "diffpo").iterdir() if path.is_dir() and path.name[0] != "_"}
    assert folders <= set(ROOMS)
