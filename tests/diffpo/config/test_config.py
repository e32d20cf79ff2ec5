from pathlib import Path

import pytest
import yaml

from diffpo.common.errors import DiffpoError
from diffpo.config import Config, ScorerConfig, load_config

CONFIGS = Path(__file__).parents[3] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_its_header_says_what_it_needs(recipe):
    load_config(recipe, kind=ScorerConfig if "scorer" in yaml.safe_load(recipe.read_text()) else Config)
    header = "".join(line for line in recipe.read_text().splitlines(True) if line.startswith("#"))
    assert all(word in header for word in ("command", "data", "hardware"))


def test_resolved_config_is_a_config_with_the_same_values(tmp_path):
    config = load_config(QUICKSTART, ["train.lr=3e-6", "lora.targets=[to_q]", "data.columns.caption=text"])
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config


def test_overrides_replace_values_and_text_numbers_become_numbers():
    settings = yaml.safe_load(QUICKSTART.read_text())
    assert isinstance(settings["train"]["lr"], str)  # plain YAML reads 5e-4 as text
    assert load_config(QUICKSTART, ["train.precision=no"]).train.precision == "no"  # YAML reads false
    config = load_config(QUICKSTART, ["objective.beta=2e3", "train.steps=7", "data.validation=null", "lora.alpha=16"])
    assert (config.train.lr, config.objective.beta, config.train.steps) == (5e-4, 2000.0, 7)
    assert (
        config.data.validation is None
        and config.lora.scale_alpha == 16
        and load_config(QUICKSTART).lora.scale_alpha == 8
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rat=1", ["train.learning_rat", "known keys", "lr"]),
        ("train.acumulation=2", ["train.acumulation", "did you mean train.accumulation"]),
        ("beta=3", ["did you mean objective.beta"]),
        ("train.lr=fast", ["train.lr", "number", "'fast'"]),
        ("train.lr=.inf", ["train.lr", "finite"]),
        ("train.steps=2.5", ["train.steps", "integer"]),
        ("train.steps=true", ["train.steps", "not true or false"]),
        ("lora.targets=to_q", ["lora.targets", "list"]),
        ("train.steps=0", ["train.steps", "greater than 0"]),
        ("train.warmup=999", ["train.warmup", "train.steps"]),
        ("train.precision=fp8", ["train.precision", "bf16"]),
        ("data.resolution=33", ["data.resolution", "multiple of 8"]),
        ("objective.name=diffusion_dpp", ["objective", "did you mean diffusion_dpo"]),
        ("train.lr", ["section.key=value"]),
        ("model.path.x=1", ["model.path.x"]),
        ("model=null", ["model"]),
    ],
)
def test_a_bad_setting_is_one_message_that_names_the_key(override, words):
    with pytest.raises(DiffpoError) as error:
        load_config(QUICKSTART, [override])
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("text", ["a: [", "just words", ""])
def test_a_file_that_is_no_config(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(DiffpoError, match=r"x\.yaml"):
        load_config(tmp_path / "x.yaml")
    with pytest.raises(DiffpoError, match="nowhere"):
        load_config(tmp_path / "nowhere.yaml")


def test_numbers_written_as_text_in_optimizer_args():
    config = load_config(
        QUICKSTART, ["train.optimizer_args={eps: 1e-8, betas: [9e-1, 0.99], name: e5, nested: {x: 1.5E3}}"]
    )
    assert config.train.optimizer_args == {"eps": 1e-8, "betas": [0.9, 0.99], "name": "e5", "nested": {"x": 1500.0}}


def test_a_key_written_twice_is_an_error(tmp_path):
    (tmp_path / "twice.yaml").write_text(QUICKSTART.read_text() + "train: {steps: 3}\n")
    with pytest.raises(DiffpoError, match=r"twice\.yaml is not valid YAML: .*'train'"):
        load_config(tmp_path / "twice.yaml")


def test_a_key_of_another_section_is_found_before_a_misspelling_here():
    for override, hint in {"lr=3": "train.lr", "train.rank=3": "lora.rank", "data.beta=1": "objective.beta"}.items():
        with pytest.raises(DiffpoError, match=rf"did you mean {hint}\?"):
            load_config(QUICKSTART, [override])


def test_values_that_would_fail_later_or_be_ignored():
    for override in ("lora.targets=[]", "train.seed=9223372036854775808"):
        with pytest.raises(DiffpoError, match=override.partition("=")[0]):
            load_config(QUICKSTART, [override])
    collected = ["objective.name=d3po", "objective.rollout.labels=labels.jsonl", "data.columns.source=before"]
    with pytest.raises(DiffpoError, match=r"data\.columns\.source .*objective\.rollout\.labels"):
        load_config(QUICKSTART, collected)
    load_config(QUICKSTART, collected[:2])
    assert load_config(QUICKSTART, ["output=~/runs/x"]).output == Path.home() / "runs" / "x"


LAUGHS = "a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(8)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}\n" for i in range(8))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "aliases"),
        (MERGES, "aliases"),
        (QUICKSTART.read_text() + f"train.x: {{{LAUGHS.replace(chr(10), ', ')}}}", "aliases"),
        (QUICKSTART.read_text() + "x: &x " + "y" * 5000 + f"\nlora.targets: [{', '.join(['*x'] * 100)}]", "aliases"),
        ("a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}]\n" for i in range(99)), "nested"),
        ("[" * 5000, "nested"),
        ("a: &a {b: *a}", "alias"),
        ("a: &a {<<: *a}", "alias"),
        ("train: {steps: " + "1" * 10000 + "}", "line 1"),
        ("model: x\n--- \nmodel: y", "single document"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: *b", "undefined alias"),
        ("x: " + "y" * 200_000, "too many"),
        ("\1\2", "special characters"),
        ("\0\1", "NUL"),
    ],
)
@pytest.mark.parametrize("kind", [Config, ScorerConfig])
def test_a_config_that_would_not_end_is_refused_in_a_short_message(tmp_path, kind, text, words):
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(DiffpoError, match=rf"odd\.yaml.*{words}") as error:
        load_config(tmp_path / "odd.yaml", kind=kind)
    assert len(str(error.value)) < 1000


def test_a_message_names_some_faults_and_counts_the_rest(tmp_path):
    (tmp_path / "odd.yaml").write_text(QUICKSTART.read_text() + "".join(f"k{i}{'x' * 500}: 1\n" for i in range(100)))
    with pytest.raises(DiffpoError, match=r"unknown key k0x+\.\.\.:(?s:.*)and 80 more") as error:
        load_config(tmp_path / "odd.yaml")
    assert len(str(error.value)) < 5000
    for override in ("train.steps=" + "1" * 9000, "train.lr=" + "y" * 9000, "x" * 9000 + "=1", "a." * 9000 + "b=1"):
        with pytest.raises(DiffpoError) as error:
            load_config(QUICKSTART, [override])
        assert len(str(error.value)) < 1000


def test_aliases_and_merge_keys_within_reason(tmp_path):
    """What was merged may be merged again, and an override changes one of two values that are aliases."""
    (tmp_path / "z.yaml").write_text(
        QUICKSTART.read_text().replace(
            "  lr: 5e-4", "  lr: 5e-4\n  optimizer_args: {a: &a {x: 1}, b: &b {<<: *a, y: 2}, c: {<<: *b, y: 3}, d: *a}"
        )
    )
    config = load_config(tmp_path / "z.yaml", ["train.optimizer_args.a.x=7"])
    assert config.train.optimizer_args == {"a": {"x": 7}, "b": {"x": 1, "y": 2}, "c": {"x": 1, "y": 3}, "d": {"x": 1}}


def test_digits_without_an_exponent_are_read_at_once():
    digits = "1" * 100_000
    config = load_config(QUICKSTART, [f'train.optimizer_args={{x: "{digits}"}}'])
    assert config.train.optimizer_args == {"x": digits}
    with pytest.raises(DiffpoError, match=r"train.optimizer_args: expected a number below"):
        load_config(QUICKSTART, ["train.optimizer_args.x=" + "1" * 4000])


def test_without_a_home_folder_the_key_is_named(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what Python has where nobody knows the user
    with pytest.raises(DiffpoError, match=r"data.cache: the home folder is not known: set HOME"):
        load_config(QUICKSTART)
    assert load_config(QUICKSTART, ["data.cache=here"]).data.cache == "here"


def test_people_s_own_text_files(tmp_path):
    for name, content in {
        "bom": b"\xef\xbb\xbf" + QUICKSTART.read_bytes(),
        "utf16": QUICKSTART.read_text().encode("utf-16"),
        "crlf": QUICKSTART.read_bytes().replace(b"\n", b"\r\n"),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert load_config(tmp_path / name) == load_config(QUICKSTART)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(DiffpoError, match="binary: 'utf-8' codec"):
        load_config(tmp_path / "binary")
    with pytest.raises(DiffpoError, match="/dev/zero: it has more than"):
        load_config("/dev/zero")
