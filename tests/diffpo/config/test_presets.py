"""Presets from outside the package: a YAML file, or a `Preset` in a module."""

import sys

import pytest
from pydantic import ValidationError

from diffpo import methods
from diffpo.common.errors import DiffpoError
from diffpo.config import ObjectiveSettings, stored_identity
from diffpo.weights.header import known

MODULE = """
from diffpo.methods import Preset
MINE = Preset(settings={"beta": 70, "link": "exo", "link_options": {"epsilon": 0.2}, "reference": {"policy": "ema"}})
MISSPELT = Preset(settings={"beta": 70, "referense": {"policy": "ema"}})
number = 3
def link(chosen, rejected): return rejected - chosen
open(__file__ + ".imported", "a").write("x")
"""
GOOD = "title: Mine\nsettings:\n  beta: 7e1\n  link: exo\n  link_options: {epsilon: 0.2}\n  reference: {policy: ema}\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "presets_from_outside.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("presets_from_outside", None)


def write(folder, text, name="mine.yaml"):
    (folder / name).write_text(text)
    return name


def settings(name, **more):
    return ObjectiveSettings.model_validate({"name": name, **more})


def test_a_file_and_a_module_give_the_same_settings_and_the_users_own_come_first(here):
    from_file, from_module = settings(write(here, GOOD)), settings("presets_from_outside:MINE")
    assert from_file.model_dump(exclude={"name"}) == from_module.model_dump(exclude={"name"})
    assert (from_file.beta, from_file.link_options, from_file.reference.policy) == (70, {"epsilon": 0.2}, "ema")
    own = settings("mine.yaml", beta=5, link="ipo", reference={"every": 3})
    assert (own.beta, own.link_options, own.reference.policy, own.reference.every) == (5, {}, "ema", 3)
    assert settings(str(here / "mine.yaml")).beta == 70


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["No such file"]),
        ("a: [", ["YAML"]),
        ("title: x\n", ["settings"]),
        ("settings: 3\n", ["settings"]),
        ("settings: {beta: 1}\ntitel: x\n", ["'titel'", "did you mean title"]),
        ("settings: {beta: 1}\npaper: [x]\n", ["paper", "text"]),
        ("settings: {beta: 1, lnk: ipo}\n", ["settings", "lnk", "did you mean link"]),
        ("settings: {beta: 1, reference: {polcy: ema}}\n", ["did you mean reference.policy"]),
        ("settings: {beta: many}\n", ["beta", "'many'"]),
        ("settings: {beta: 1, name: mine.yaml}\n", ["name"]),
    ],
)
def test_a_bad_file_is_named_with_its_key_and_with_the_config(here, make_config, tiny_sd, text, words):
    if text is not None:
        write(here, text)
    with pytest.raises(DiffpoError) as error:
        make_config(tiny_sd, "objective.name=mine.yaml")
    assert all(word in str(error.value) for word in ["recipe.yaml", "mine.yaml", *words]), error.value


@pytest.mark.parametrize(
    "name", ["~no_such_user/x.yaml", "a\0b.yaml", "\ud800.yaml", "x" * 300 + ".yaml", "..yaml", "."]
)
def test_odd_names_are_refused(name):
    with pytest.raises(ValidationError):
        settings(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("presets_from_outside:MIN", "did you mean MINE"),
        ("presets_from_outside:number", "is not a diffpo.methods.Preset"),
        ("presets_from_outside:MISSPELT", "did you mean reference"),
        ("no_such_module:MINE", "No module named 'no_such_module'"),
    ],
)
def test_a_bad_attribute_is_named_with_the_config(here, make_config, tiny_sd, name, words):
    with pytest.raises(DiffpoError) as error:
        make_config(tiny_sd, f"objective.name={name}")
    assert all(word in str(error.value) for word in ("recipe.yaml", name, words)), error.value


def test_settings_that_a_run_wrote_down_import_nothing(here, make_config, tiny_sd):
    mark = here / "presets_from_outside.py.imported"
    more = ("objective.name=presets_from_outside:MINE", "objective.link=presets_from_outside:link")
    config = make_config(tiny_sd, *more)
    written = config.model_dump(mode="json")
    assert mark.exists()
    mark.unlink()
    del sys.modules["presets_from_outside"]
    assert stored_identity(written) == config.identity()
    assert not mark.exists()


def test_the_label_of_a_method_is_safe_to_show_and_survives_the_header():
    for name, label in {
        "d3po": "d3po",
        "/home/me/secret place/my method.yaml": "my-method.yaml",
        "package.module:MINE": "package.module:MINE",
        "x](http://evil):B": "other",
        "a\n# b.yaml": "a---b.yaml",
    }.items():
        assert methods.label(name) == label, name
        assert known({"objective": label}) == ({"objective": label} if label != "other" else {})
    for other in ("dpoo", "os.system('x')", "<b>:x", "a:b:c", "x" * 300 + ".yaml"):
        assert known({"objective": other}) == {}
