"""What `--arm` names, and how the pictures of several arms are matched."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffpo.common.errors import DiffpoError
from diffpo.evaluation import evaluate, items, manifest
from diffpo.evaluation.arms import read_arms
from diffpo.evaluation.generation import Generation
from diffpo.evaluation.scoring import Scoring
from samplers import VPDiscrete, build_plan

COMMON = {"model": "a/model", "steps": 20, "guidance": 5.0, "solver": "unipc"}


@pytest.fixture
def places(tmp_path):
    """One of each thing that an arm can be."""
    run = tmp_path / "run"
    run.mkdir()
    save_file({"unet.a.lora_A.weight": torch.zeros(1, 1)}, run / "pytorch_lora_weights.safetensors")
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(1, 1)}, tmp_path / "kohya.safetensors")
    save_file({"model.diffusion_model.a": torch.zeros(1)}, tmp_path / "merged.safetensors")
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    build_plan(VPDiscrete.scaled_linear(), "ddim", 3).save(tmp_path / "plan.safetensors")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "0.png")
    return tmp_path


@pytest.mark.parametrize(
    ("what", "own"),
    [
        ("base", {}),
        ("{}/run", {"lora": "{}/run"}),
        ("{}/run@0.5", {"lora": "{}/run", "lora_weight": 0.5}),
        ("{}/kohya.safetensors@.25", {"lora": "{}/kohya.safetensors", "lora_weight": 0.25}),
        ("{}/merged.safetensors", {"model": "{}/merged.safetensors"}),
        ("{}/pipe", {"model": "{}/pipe"}),
        ("owner/name", {"model": "owner/name"}),
        ("{}/plan.safetensors", {"plan": "{}/plan.safetensors", "steps": None, "solver": None}),
        (
            "lora={}/run@0.5, steps=8,guidance=2,solver=ddim,negative-prompt=grey",
            {"lora": "{}/run", "lora_weight": 0.5, "steps": 8, "guidance": 2.0, "solver": "ddim"}
            | {"negative_prompt": "grey"},
        ),
    ],
)
def test_what_an_arm_is_is_found(places, what, own):
    own = {key: value.format(places) if isinstance(value, str) else value for key, value in own.items()}
    found = read_arms(["base", f"x={what.format(places)}"], COMMON)
    assert found == {"base": Generation(**COMMON), "x": Generation(**{**COMMON, **own})}


@pytest.mark.parametrize("what", ["{}/pictures", "images={}/pictures"])
def test_pictures_need_no_model(places, what):
    assert read_arms([f"x={what.format(places)}"], {"model": ""}) == {"x": places / "pictures"}


@pytest.mark.parametrize(
    ("specs", "named"),
    [
        (["runs/mine"], "runs/mine has no name"),
        (["a b=base"], "'a b' cannot be the name"),
        (["../x=base"], "cannot be the name"),
        (["base", "base=base"], "two arms of the name 'base'"),
        (["x=stps=3"], "'stps'.*steps"),
        (["x=steps=three"], "steps must be a whole number, not 'three'"),
        (["x=lora=runs/a,fast"], "'fast' is not key=value"),
        (["x=nowhere.safetensors"], r"x: there is no file or folder nowhere\.safetensors"),
        (["x={}/empty"], "x: .*empty is no arm"),
        (["x=images={}/pictures,steps=3"], "a folder of pictures has no steps"),
        (["x=lora={}/run,lora_weight=nan"], "strength nan"),
        (["x=lora_weight=0.5"], "strength 0.5"),
    ],
)
def test_what_is_no_arm_is_said(places, specs, named):
    (places / "empty").mkdir()
    with pytest.raises(DiffpoError, match=named):
        read_arms([spec.format(places) for spec in specs], COMMON)


# ---- matching


def found(*rows):
    return [items.Found(index, seed, prompt, Path(f"{prompt}{index}_{seed}")) for index, seed, prompt in rows]


def test_arms_are_matched_by_text_and_seed():
    """The second arm counts its prompts otherwise, has "a" twice as the first, and lacks "b" with seed 1."""
    one = found((0, 0, "a"), (1, 0, "b"), (1, 1, "b"), (2, 0, "a"), (3, 0, "only one"))
    other = found((5, 0, "a"), (2, 0, "a"), (0, 0, "b"), (7, 0, "only other"))
    joined = items.joined({"one": one, "other": other}, None, None, gaps := [])
    pairs = [(item.index, item.seed, str(item.pictures["one"]), str(item.pictures["other"])) for item in joined]
    assert pairs == [(0, 0, "a0_0", "a2_0"), (1, 0, "b1_0", "b0_0"), (2, 0, "a2_0", "a5_0")]
    assert "one lacks 1 of 6" in gaps[0] and "other lacks 2 of 6" in gaps[1] and len(gaps) == 2


def test_an_arm_may_lack_what_two_others_have():
    arms = {"x": found((0, 0, "a"), (1, 0, "b")), "y": found((0, 0, "a"), (1, 0, "b")), "z": found((4, 0, "b"))}
    assert [sorted(item.pictures) for item in items.joined(arms, None, None, [])] == [["x", "y"], ["x", "y", "z"]]
    assert [item.index for item in items.joined(arms, ["b", "a"], 1, [])] == [0]


def test_an_arm_with_nothing_in_common_is_left_out_and_refused_if_there_is_no_other():
    apart = {"x": found((0, 0, "a")), "y": found((0, 3, "b"))}
    with pytest.raises(DiffpoError, match=r"x and y have no prompt and seed in common.*'b' with seed 3"):
        items.joined(apart, None, None, [])
    joined = items.joined(apart | {"z": found((5, 0, "a"))}, None, None, gaps := [])
    assert [[*item.pictures] for item in joined] == [["x", "z"]]
    assert len(gaps) == 1 and "x and y have no prompt and seed in common" in gaps[0]


def test_texts_may_lie_beside_the_pictures(tmp_path):
    for name, text in (("red", "a red  dot\n"), ("blue", "a blue dot"), ("red2", "a red dot")):
        Image.new("RGB", (8, 8), name.strip("2")).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(text)
    read = {(each.prompt, each.seed): each.path.name for each in items.of_folder(tmp_path, None, [])}
    expected = {("a red dot", 0): "red.png", ("a red dot", 1): "red2.png", ("a blue dot", 0): "blue.png"}
    assert read == expected


# ---- three arms, from beginning to end


def grey(folder, arm, levels, seed=0):
    (folder / arm).mkdir(parents=True)
    for index, level in enumerate(levels):
        Image.new("RGB", (8, 8), (int(level),) * 3).save(folder / arm / f"{index}_{seed}.png")


def test_three_arms_are_compared_with_the_first(tmp_path):
    rng = np.random.default_rng(0)
    levels = rng.integers(20, 100, 40)
    grey(tmp_path, "dark", levels)
    grey(tmp_path, "light", levels + 50)
    grey(tmp_path, "mixed", levels + np.where(np.arange(40) < 10, 9, -9))
    arms = {name: tmp_path / name for name in ("dark", "light", "mixed")}
    texts = [f"prompt {k}" for k in range(40)]
    result = evaluate.run(tmp_path / "out", arms, texts, scoring=Scoring(("on_policy:Brightness",)))
    (score,) = {row.scorer for row in result.rows}
    light, mixed = result.row(score, "light"), result.row(score, "mixed")
    assert light.win_rate.value == 1 and mixed.win_rate.value == pytest.approx(0.25)
    assert light.difference.value / mixed.difference.value == pytest.approx(50 / -4.5)
    assert len(result.by_prompt) == 2 and result.by_prompt["mixed"][0]["prompt_id"] < 10


def test_arms_may_differ_in_everything(tmp_path, tiny_sdxl):
    """Settings are recorded by arm, an arm is added to a finished folder, and a changed arm is refused."""
    arms = read_arms(["base", "fast=steps=2", "small=height=16,width=16"], {"model": str(tiny_sdxl), "steps": 3})
    scoring = Scoring(("on_policy:Brightness",))
    evaluate.run(tmp_path / "out", dict(list(arms.items())[:2]), ["a", "b"], scoring=scoring)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("images/*/*.png")}
    evaluate.run(tmp_path / "out", arms, ["a", "b"], scoring=scoring)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    rows = {(row["arm"], row["steps"], row["height"]) for row in manifest.read_manifest(tmp_path / "out")}
    assert rows == {("base", 3, None), ("fast", 2, None), ("small", 3, 16)}
    with pytest.raises(DiffpoError, match=r"steps=2 \(fast"):
        evaluate.run(
            tmp_path / "out",
            read_arms(["base", "fast=steps=1"], {"model": str(tiny_sdxl), "steps": 3}),
            ["a", "b"],
            scoring=scoring,
        )


def test_scoring_goes_on_after_an_interruption(tmp_path, monkeypatch):
    """Killed at the 20th picture, it scores each of the 32 once."""
    from on_policy import Brightness

    grey(tmp_path, "one", range(0, 160, 10))
    grey(tmp_path, "two", range(1, 161, 10))
    arms, texts = {name: tmp_path / name for name in ("one", "two")}, [f"p{k}" for k in range(16)]
    seen: list[str] = []

    class Counting(Brightness):
        def score(self, images, prompts):
            if len(seen) == 16 and not seen_twice:
                raise KeyboardInterrupt
            seen.extend(prompts)
            return super().score(images, prompts)

    seen_twice = False
    monkeypatch.setattr("diffpo.evaluation.scoring.scorers.load", lambda *_: Counting())
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(tmp_path / "out", arms, texts)
    seen_twice = True
    evaluate.run(tmp_path / "out", arms, texts)
    assert sorted(seen) == sorted(texts * 2) and not (tmp_path / "out" / ".scores").exists()


def test_one_arm_is_no_comparison(tmp_path):
    grey(tmp_path / "images", "only", [1, 2])
    with pytest.raises(DiffpoError, match="only one arm, only"):
        evaluate.run(tmp_path / "out", tmp_path, ["a", "b"])


def test_a_process_scores_its_share_and_reads_the_others(tmp_path, monkeypatch):
    """Of three processes the last has only two pictures of seven to score itself; then it has the numbers of all."""
    from on_policy import Brightness

    from diffpo.common.processes import Processes
    from diffpo.evaluation import scoring

    grey(tmp_path, "one", range(0, 70, 10))
    grey(tmp_path, "two", range(1, 71, 10))
    found = {name: items.of_folder(tmp_path / name, list("abcdefg"), []) for name in ("one", "two")}
    joined = items.joined(found, None, None, [])
    whole = scoring.score_items(joined, ["one", "two"], Scoring(("on_policy:Brightness",))).values
    seen: list[str] = []

    class Counting(Brightness):
        def score(self, images, prompts):
            seen.extend(prompts)
            return super().score(images, prompts)

    monkeypatch.setattr(scoring.scorers, "load", lambda *_: Counting())
    monkeypatch.setattr(Processes, "wait", lambda self: None)
    for rank, own in ((0, "abcdefg" * 2), (1, ""), (2, "")):  # the first does not wait here, so it goes on to the rest
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        seen.clear()
        found = scoring.score_items(joined, ["one", "two"], Scoring(("on_policy:Brightness",)), tmp_path / "out")
        assert sorted(seen) == sorted(own)
        for name, by_arm in whole.items():
            for arm, values in by_arm.items():
                np.testing.assert_array_equal(found.values[name][arm], values)
    assert [list(Processes(rank, 3).share(range(7))) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]


def test_the_library_gives_what_the_command_gives(tmp_path, tiny_sdxl):
    """Flat rows for pandas, from arms by name, for a model with options of its own."""
    import pandas

    from diffpo.evaluation.library import evaluate as compare

    grey(tmp_path, "there", [10, 200])
    arms = {"there": tmp_path / "there", "made": "steps=2"}
    options = {"scorers": ("on_policy:Brightness",), "model": str(tiny_sdxl), "guidance": 1.0}
    found = compare(arms, ["a", "b"], out=tmp_path / "out", **options)
    frame = pandas.DataFrame(found.table())
    row = found.rows[0]
    assert frame.loc[0, ["arm", "against", "mean_against"]].tolist() == ["made", "there", row.base]
    assert (frame.win_rate_low <= frame.win_rate).all() and frame.n.tolist() == [2] * len(frame)
