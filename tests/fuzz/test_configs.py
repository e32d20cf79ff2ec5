"""Faulty configs: each is read, or refused with a message that names the file, the key or the override."""

import copy
import math
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from junk import ANYTHING, AWKWARD, damaged, mutated, values

from diffpo.commands import check
from diffpo.common.errors import DiffpoError
from diffpo.config import Config, ScorerConfig, load_config
from diffpo.config.reader import all_keys
from diffpo.train.build import make_optimizer
from diffpo.train.claim import check_folder

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = {path.name: path.read_text() for path in sorted(CONFIGS.glob("*.yaml")) if "\nmodel:" in path.read_text()}
TREES = {name: yaml.safe_load(text) for name, text in RECIPES.items()}
KINDS = {name: ScorerConfig if "scorer" in tree else Config for name, tree in TREES.items()}
QUICKSTART = CONFIGS / "quickstart.yaml"
KEYS = all_keys(Config)
ODD = [*AWKWARD, [], {}, [None], ["\0"], ["x" * 300], {"a": math.nan}, {"a": {1: 2}}, 10**400, b"x", {"a"}]

names = st.sampled_from(sorted(RECIPES))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("configs") / "recipe.yaml"


def environment(config) -> list[str]:
    """The problems that `check.environment` finds without a model."""
    problems = []
    with warnings.catch_warnings(action="ignore"):  # from torch, about unusual optimisers
        for test in (check_folder, lambda each: make_optimizer(each.train, [torch.nn.Parameter(torch.zeros(2, 2))])):
            try:
                test(config)
            except DiffpoError as error:
                problems.append(str(error))
    return problems


def try_config(path: Path, overrides=(), kind=Config) -> bool:
    """Whether the config was valid. A valid config must be the same after it is written and read again, and must pass
    the parts of the dry run that need no model and data."""
    try:
        config = load_config(path, overrides, kind)
    except DiffpoError as error:
        message = str(error)
        assert str(path) in message or any(repr(each)[:200] in message for each in overrides), message
        assert len(message) < 20_000
        return False
    if kind is Config:
        path.with_name("again.yaml").write_text(config.to_yaml(), encoding="utf-8")
        again = load_config(path.with_name("again.yaml"))
        assert again == config and again.identity() == config.identity()
        problems = []
        if config.objective.on_policy:
            check.prompts(config, lambda text: None, problems)
        problems += environment(config)
        assert all(isinstance(each, str) and each for each in problems)
    return True


@settings(max_examples=350)
@given(name=names, data=st.data())
def test_recipes_with_keys_dropped_misspelt_and_of_the_wrong_kind(path, name, data):
    tree = data.draw(mutated(TREES[name]))
    path.write_text(yaml.dump(tree, allow_unicode=data.draw(st.booleans())), encoding="utf-8", errors="replace")
    try_config(path, kind=KINDS[name])


@settings(max_examples=250)
@given(
    name=st.sampled_from(["quickstart.yaml", "spo_shapes.yaml"]), key=st.sampled_from(KEYS), value=st.sampled_from(ODD)
)
def test_every_key_with_values_of_every_kind(path, name, key, value):
    tree = copy.deepcopy(TREES[name])
    *sections, last = key.split(".")
    section = tree
    for each in sections:
        section = section.setdefault(each, {})
    section[last] = value
    path.write_text(yaml.dump(tree), encoding="utf-8")
    try_config(path)


@settings(max_examples=150)
@given(name=names, data=st.data())
def test_recipes_with_changed_bytes(path, name, data):
    path.write_bytes(data.draw(damaged(RECIPES[name].encode())))
    try_config(path, kind=KINDS[name])


@settings(max_examples=80)
@given(name=names, data=st.data())
def test_recipes_with_moved_or_repeated_lines(path, name, data):
    lines = [line for line in RECIPES[name].splitlines(True) if line.strip() and not line.startswith("#")]
    number = data.draw(st.integers(0, len(lines) - 1))
    line = lines[number] if data.draw(st.booleans()) else lines.pop(number)
    lines.insert(data.draw(st.integers(0, len(lines))), data.draw(st.sampled_from(["", "  ", "\t"])) + line)
    path.write_text("".join(lines))
    try_config(path, kind=KINDS[name])


@settings(max_examples=80)
@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    form=st.sampled_from(["[{}]", "{{<<: [{}]}}", "{{k: [{}]}}", "[[{}]]"]),
    leaf=st.sampled_from(["{x: 1}", "lol", "[1, 2]", "'" + "y" * 300 + "'"]),
    place=st.sampled_from(
        ["train: {{optimizer_args: {}}}\n", "model: {{path: {}}}\n", "data: {}\n", "lora: {{targets: {}}}\n"]
    ),
    kind=st.sampled_from([Config, ScorerConfig]),
)
def test_aliases_of_aliases(path, widths, form, leaf, place, kind):
    """A single line may stand for more values than fit in memory."""
    levels = [f"a0: &a0 {leaf}"]
    for number, width in enumerate(widths):
        levels.append(f"a{number + 1}: &a{number + 1} " + form.format(", ".join([f"*a{number}"] * width)))
    path.write_text(place.format("{" + ", ".join(levels) + "}"))
    assert not try_config(path, kind=kind)
    path.write_text("\n".join(levels))
    assert not try_config(path, kind=kind)


TOKENS = [
    *(
        "model",
        "path",
        "train",
        "objective:\n  ",
        "a",
        ": ",
        ":",
        "- ",
        "\n",
        "\n  ",
        "{",
        "}",
        "[",
        "]",
        ",",
        "&a ",
        "*a",
        "? ",
    ),
    *(
        "<<: ",
        "!!",
        "!!int ",
        "!!float ",
        "!!timestamp ",
        "!!binary ",
        "!!set ",
        "!!python/object/apply:os.getcwd []",
        "|",
        ">",
    ),
    *(
        "'",
        '"',
        "%YAML 1.1\n",
        "---\n",
        "...",
        "#",
        ".nan",
        "-.inf",
        "0x",
        "0b",
        "1:60",
        "2024-13-41",
        "[[" * 600,
        "9" * 5000,
    ),
    *("0x" + "f" * 5000, "\x07", "\ufeff", "\\ud800", "\t"),
]


@settings(max_examples=100)
@given(text=st.lists(st.sampled_from(TOKENS) | st.text(ANYTHING, max_size=2), max_size=12).map("".join))
def test_random_yaml(path, text):
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try_config(path)


# overrides as they may come from a shell, mostly with a key that exists
overrides = st.builds(
    "{}{}{}".format,
    st.sampled_from(KEYS) | st.sampled_from(AWKWARD).map(str) | st.text(ANYTHING, max_size=4),
    st.sampled_from(["=", "=", "=", "=", "", "==", ".x=", " = "]),
    values.map(lambda value: str(value)) | st.sampled_from(TOKENS) | st.text(ANYTHING, max_size=5),
)


@settings(max_examples=150)
@given(given=st.lists(overrides, min_size=1, max_size=3))
def test_random_overrides(given):
    try_config_of_quickstart(given)


def try_config_of_quickstart(given):
    """The recipe is in the repository, so nothing is written beside it."""
    try:
        config = load_config(QUICKSTART, given)
    except DiffpoError as error:
        assert str(QUICKSTART) in str(error) or any(repr(each)[:200] in str(error) for each in given), error
    else:
        environment(config)
