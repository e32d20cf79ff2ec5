"""One value from the command line to the manifest and back."""

import inspect
import json
import sys
from dataclasses import asdict, replace

import pytest
import tiny_transformers

import samplers
from diffpo import cli
from diffpo.common.errors import DiffpoError
from diffpo.evaluation import evaluate, generate, manifest, table
from diffpo.evaluation.generation import COMPARED, RECORDED, Generation

# every option with a value that is not its default, and the words that give it on the command line
OPTIONS = {
    "model": "a/model",
    "model_config": "sdxl",
    "lora": "runs/one",
    "lora_weight": 0.25,
    "negative_lora": "runs/bad",
    "negative_lora_weight": 0.75,
    "user_pairs": "pairs.parquet",
    "user_features": "shapes",
    "seed": 7,
    "images_per_prompt": 3,
    "steps": 11,
    "solver": "unipc",
    "guidance": 2.5,
    "negative_prompt": "grey",
    "height": 64,
    "width": 48,
    "dtype": "bfloat16",
    "batch_size": 5,
    "device": "cpu",
}
STEERED = {"steer": "following:1"}  # in place of user_pairs
BASE_FIRST = {"negative_lora": None, "negative_lora_weight": None, "base_calls": 2}
PLANNED = {name: value for name, value in OPTIONS.items() if name not in ("solver", "steps")} | {
    "plan": "x.safetensors"
}
HASHES = {"model_hash": "m", "lora_hash": "l", "negative_lora_hash": "n", "user_hash": "u"}


def called(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["diffpo", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        PLANNED,
        {"model": "a/model", "lora": "runs/one", "base_calls": 2},
        {"model": "a/model", "lora": "runs/one"},
    ],
    ids=["all", "a plan", "base calls", "defaults"],
)
@pytest.mark.parametrize("verb", ["generate", "eval"])
def test_every_option_of_the_command_line_is_the_values(monkeypatch, verb, options):
    given = []
    monkeypatch.setattr(generate, "run", lambda *values: given.append(values) or [])
    monkeypatch.setattr(evaluate, "run", lambda *values: given.append(values))
    monkeypatch.setattr(table, "show", lambda _: None)
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    assert called(monkeypatch, verb, *words, "--prompts", "p.txt", "--out", "out", "--n", 4) == 0
    ((*values, n),) = [values[:4] for values in given]
    expected = Generation(**options)
    pictures = values[0] if verb == "generate" else values[1]
    assert n == 4 and pictures == (expected.arms() if verb == "generate" else expected)


def test_the_verbs_have_the_values_own_defaults():
    for verb in (cli.generate, cli.evaluate):
        for name, option in inspect.signature(verb).parameters.items():
            if name in {**OPTIONS, **PLANNED, "any_model": False} and name != "model":
                assert option.default == getattr(Generation, name), name
        assert {*OPTIONS, *PLANNED, "any_model"} <= inspect.signature(verb).parameters.keys()


@pytest.mark.parametrize(
    "options",
    [OPTIONS, {**PLANNED, "steps": 5, "plan_hash": "p"}, {**OPTIONS, **BASE_FIRST}],
    ids=["a solver", "a plan", "base calls"],
)
def test_a_row_is_made_from_the_value_and_read_back_as_it(options):
    full = Generation(**options, **HASHES)
    row = json.loads(json.dumps({"seed": full.seed, **full.recorded()}))
    found = Generation.of(row)
    assert {key: value for key, value in asdict(found).items() if key in RECORDED} == full.recorded()
    assert found.seeds == range(7, 8) and full.seeds == range(7, 10)
    # a family is code and any_model a permission: both are named anew each time
    others = {"plan_hash", "family", "any_model", "paths", *STEERED, *BASE_FIRST}
    assert {*OPTIONS, *PLANNED, *HASHES} | others == {*asdict(full)}


def test_the_base_arm_is_the_same_without_the_lora():
    full = Generation(**OPTIONS, **HASHES)
    arms = full.arms()
    assert arms["tuned"] == full and list(arms) == ["base", "tuned"]
    differing = {key for key in asdict(full) if asdict(arms["base"])[key] != asdict(full)[key]}
    of_loras = {f"{name}{end}" for name in ("lora", "negative_lora") for end in ("", "_hash", "_weight")}
    assert differing == of_loras | {"user_pairs", "user_features", "user_hash"}
    alone = replace(full, lora=None, lora_weight=None, user_pairs=None, user_features=None)
    assert list(alone.arms()) == ["base", "tuned"], "a negative LoRA changes pictures by itself"
    assert list(replace(alone, negative_lora=None, negative_lora_weight=None).arms()) == ["base"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"images_per_prompt": 0}, "images_per_prompt"),
        ({"height": 20}, "height"),
        ({"width": 4}, "width"),
        ({"guidance": float("inf")}, "guidance"),
        ({"seed": 2**63 - 1}, "seed"),
        ({"lora": None}, "--lora"),
        ({"base_calls": 2}, "--base-calls.*--negative-lora"),
        ({**BASE_FIRST, "base_calls": 11}, "--base-calls 11.*11"),
        ({**BASE_FIRST, "base_calls": -1}, "--base-calls -1"),
        ({"negative_lora": None}, "--negative-lora"),
        (STEERED, "--user-pairs and --steer"),
        ({"guidance": 1.0}, "--negative-lora.*--guidance"),
        ({"plan": "x.safetensors"}, "--plan.*--solver"),
        ({"model": None}, "--model"),
    ],
)
def test_a_value_out_of_range_is_named(change, named):
    with pytest.raises(DiffpoError, match=named):
        Generation(**{**OPTIONS, **change})


def manifest_of(folder, generation, **change):
    """A manifest with one picture of prompt "a cat", which is not there, as `diffpo generate` writes it."""
    row = {"arm": "base", "index": 0, "seed": 0, "prompt": "a cat", **generation.recorded(), "versions": {}}
    row |= {"model_hash": "m", "file": "images/base/00000_0.png", "sha256": "0" * 64, **change}
    manifest.save(folder / "manifest.jsonl", manifest.line(row))
    return folder


def test_a_folder_of_an_earlier_default_solver_is_continued_only_by_its_name(tmp_path):
    """Before, the default was dpmpp. A command without --solver makes other pictures now, and says how to go on."""
    before = Generation("a/model", solver="dpmpp", model_hash="m")
    folder = manifest_of(tmp_path, before)
    done = manifest.read_manifest(folder)
    manifest.check_same_run(folder, done, before.arms(), ["a cat"])
    with pytest.raises(DiffpoError, match=r"manifest\.jsonl .*solver='dpmpp'.*--solver dpmpp"):
        manifest.check_same_run(folder, done, replace(before, solver=None).arms(), ["a cat"])
    folder = manifest_of(tmp_path, replace(before, solver=None))
    with pytest.raises(DiffpoError, match=r"solver=None.*'dpmpp'"):
        manifest.check_same_run(folder, manifest.read_manifest(folder), before.arms(), ["a cat"])


@pytest.mark.parametrize("key", COMPARED)
def test_pictures_of_other_settings_are_never_mixed(tmp_path, key):
    options = {**PLANNED, "steps": 5, "plan_hash": "p"} if key == "plan_hash" else OPTIONS
    options = {**OPTIONS, **BASE_FIRST} if key == "base_calls" else options
    made = Generation(**options, **HASHES)
    folder = manifest_of(tmp_path, made, arm="tuned", seed=7, file="images/tuned/00000_7.png")
    done = manifest.read_manifest(folder)
    manifest.check_same_run(folder, done, made.arms(), ["a cat"])
    other = {"height": 72, "width": 72, "steps": 12, "guidance": 3.0, "base_calls": 3}.get(key, "other")
    other = 0.5 if key.endswith("lora_weight") else other
    with pytest.raises(DiffpoError, match=f"{key}="):
        manifest.check_same_run(folder, done, replace(made, **{key: other}).arms(), ["a cat"])
    with pytest.raises(DiffpoError, match="prompt='a cat'"):
        manifest.check_same_run(folder, done, made.arms(), ["a dog"])


def test_a_row_with_impossible_settings_is_no_row(tmp_path):
    folder = manifest_of(tmp_path, Generation("a/model"), steps=0)
    with open(folder / "manifest.jsonl", "ab") as file:
        file.write(manifest.line({}))
    with pytest.raises(DiffpoError, match=r"manifest\.jsonl:1 .*steps"):
        manifest.read_manifest(folder)


@pytest.mark.parametrize(("calls", "guidance"), [(6, 3.0), (25, 1.0)])
def test_without_a_name_the_solver_is_the_default_rules(tiny_sdxl, calls, guidance):
    """The plan of the pipeline is the rule's at the guidance of these pictures, not at a scheduler's own default."""
    pipe = generate.load(Generation(tiny_sdxl, steps=calls, guidance=guidance, device="cpu"))
    pipe.scheduler.set_timesteps(calls)
    schedule = pipe.scheduler.schedule
    expected = samplers.build_plan(schedule, None, calls, guidance=guidance, images=True, end="zero")
    assert pipe.scheduler.plan.t == pytest.approx(expected.t)
    assert pipe.scheduler.plan.name == expected.name
    named = generate.load(Generation(tiny_sdxl, steps=calls, guidance=guidance, solver="dpmpp", device="cpu"))
    named.scheduler.set_timesteps(calls)
    assert named.scheduler.plan.name != expected.name


def test_a_scale_that_is_an_input_is_no_guidance_to_the_rule(tmp_path):
    """FLUX gets the scale as an input and is called once, so its solver is that of guidance 1."""
    pipe = generate.load(
        Generation(tiny_transformers.make_flux(tmp_path / "flux"), steps=6, guidance=5.0, device="cpu")
    )
    assert pipe.scheduler.config.guidance == 1.0
