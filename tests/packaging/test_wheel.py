"""The wheel: it holds what the recipes need, and works in an empty folder without the clone."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import get_args

import pytest
import yaml

from diffpo.config import Log

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel's files, unpacked as pip does; scripts and metadata aside."""
    builders = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (path,) = builders.WheelBuilder(str(ROOT)).build(directory=str(folder))
    assert Path(path).stat().st_size < 60e6  # the largest file that PyPI takes has 100 MB
    site = folder / "site"
    zipfile.ZipFile(path).extractall(site)
    return site


def test_it_holds_both_packages_their_types_and_pages(wheel):
    modules = {path.relative_to(ROOT) for name in ("diffpo", "samplers") for path in (ROOT / name).rglob("*.py")}
    assert not [path for path in modules if not (wheel / path).is_file()]
    for name in ("diffpo/py.typed", "samplers/py.typed", "diffpo/annotate/page/page.html"):
        assert (wheel / name).is_file()
    assert not (wheel / "samplers/pyproject.toml").exists() and not (wheel / "tests").exists()
    about = next(wheel.glob("diffpo-*.dist-info/METADATA")).read_text("utf-8")
    versions = re.findall(r"^Classifier: Programming Language :: Python :: (3\.\d+)$", about, re.MULTILINE)
    assert versions == ["3.11", "3.12", "3.13", "3.14"]


def test_it_holds_what_its_recipes_name(wheel):
    def paths(value):
        if isinstance(value, dict | list):
            for each in value.values() if isinstance(value, dict) else value:
                yield from paths(each)
        elif isinstance(value, str) and value.startswith("assets/"):
            yield value

    recipes = sorted((wheel / "diffpo/carried/configs").glob("*.yaml"))
    assert len(recipes) == len(list(ROOT.glob("configs/*.yaml")))
    named = {path for recipe in recipes for path in paths(yaml.safe_load(recipe.read_text("utf-8")))}
    assert len(named) > 4 and not [path for path in named if not (wheel / "diffpo/carried" / path).exists()]


def test_it_checks_the_quickstart_in_an_empty_folder(wheel, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(wheel), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "diffpo.cli", "check", "configs/quickstart.yaml", "data.cache=cache"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for part in ("tiny-sdxl", "train.parquet"):  # found within the wheel, not in the clone
        assert str(wheel / "diffpo" / "carried" / "assets") in done.stdout.replace("\n", "") and part in done.stdout


def test_the_image_copies_what_is_there():
    """The Dockerfile is not built here: its sources, extras and entry point at least exist."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for word in line.split()]
    assert {"pyproject.toml", "diffpo", "samplers", "configs", "assets"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    extras = re.search(r"/src\[(.+?)\]", text)[1].split(",")
    assert set(extras) <= set(project["optional-dependencies"]) and 'ENTRYPOINT ["diffpo"]' in text


def test_every_tracker_has_an_extra_of_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (names,) = get_args(Log.model_fields["trackers"].annotation)
    assert set(get_args(names)) <= set(project["optional-dependencies"])
