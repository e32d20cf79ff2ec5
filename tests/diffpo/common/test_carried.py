"""Recipes and models that come with diffpo are found from any folder, and give way to the user's own."""

from pathlib import Path

import pytest
import yaml

from diffpo import models
from diffpo.common import carried
from diffpo.config import load_config

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_path_that_exists_here_comes_first(tmp_path):
    name = "assets/tiny-sdxl"
    assert carried.found(name) == str(ROOT / name) and carried.found(Path(name)) == ROOT / name
    Path(name).mkdir(parents=True)
    assert carried.found(name) == name


@pytest.mark.parametrize(
    "name", ["assets", "assets/none", "assets/../README.md", "scripts/make_reference.py", "own/a", ""]
)
def test_other_paths_stay_as_they_are(name):
    assert carried.found(name) == name


@pytest.mark.parametrize("recipe", ["quickstart", "quickstart_dit", "pso_shapes"])
def test_a_recipe_and_all_that_it_names_are_found(recipe):
    config = load_config(Path(f"configs/{recipe}.yaml"), ["data.validation=null"])
    assert Path(config.model.path).is_dir() and models.pipeline_class(config.model)
    for path in (config.data.train, config.lora.start):
        assert path is None or (Path(path).is_absolute() and Path(path).exists())


def test_a_recipe_here_comes_first():
    recipe = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text("utf-8"))
    recipe["train"]["steps"] = 7
    Path("configs").mkdir()
    Path("configs/quickstart.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert load_config(Path("configs/quickstart.yaml"), []).train.steps == 7


def test_the_command_line_takes_embedded_models_by_name():
    assert models.named("assets/tiny-dit").path == str(ROOT / "assets/tiny-dit")
    assert models.named("stabilityai/sdxl").path == "stabilityai/sdxl"
