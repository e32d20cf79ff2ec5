"""Two processes must do what one does: started afresh, and from a checkpoint of one. Real `accelerate launch`, gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import metrics_of
from tiny_transformers import make_pixart

from diffpo.common import lock
from diffpo.train import checkpoint
from diffpo.train.loop import train

CLOCK = {"time", "pairs_per_second"}
SGD = ("train.optimizer=torch.optim.SGD", "train.lr=0.3")


def launch(commands: list[list[str]], *flags: str, **environment: str) -> str:
    """Run diffpo's ``commands``, one after another, in two processes; what they said."""
    script = Path(__file__).with_name("launched.py")
    # port 0: any free one
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, "--main_process_port", "0", *flags, str(script), json.dumps(commands)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def finished(output: Path) -> tuple[dict, list[dict]]:
    return load_file(output / "pytorch_lora_weights.safetensors"), metrics_of(output)


def same(one, other) -> None:
    """To float tolerance, in all that is logged but the clock, and in the weights."""
    for ours, theirs in zip(one[1], other[1], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - CLOCK:
            assert ours[key] == pytest.approx(theirs[key], rel=5e-3, abs=2e-4), key
    for name, value in one[0].items():
        torch.testing.assert_close(value, other[0][name], rtol=1e-3, atol=1e-6)
    assert sum(value.abs().sum() for name, value in one[0].items() if "lora_B" in name) > 1e-3


def test_two_processes_of_four_equal_one_of_eight(tiny_sdxl, make_config, tmp_path, pairs_parquet):
    """Same losses, LoRA and held-out numbers; and a checkpoint of one process goes on with two, if the update stays as
    large. (SGD, because Adam divides rounding by rounding where gradients are near 0; with momentum, which has to
    survive.)"""
    fresh = [*SGD, "train.steps=3", f"data.validation={pairs_parquet}"]
    resumed = [*SGD, "train.optimizer_args.momentum=0.9"]
    pixart, fp8 = make_pixart(tmp_path / "pixart"), [*SGD, "train.steps=2", "model.base_weights=fp8"]
    names = ("one", "two", "straight", "resumed", "whole", "small", "mine", "rewarded", "rewarded_two")
    where = {name: tmp_path / name for name in names}
    (tmp_path / "prompts.txt").write_text("red cat\nblue dog\na bird\n")
    reward = [*SGD, "objective.name=draft", "objective.direct.calls=null", "objective.rollout.steps=3", "train.steps=2"]
    reward += ["objective.rollout.scorers=[on_policy:Redness]", f"data.prompts={tmp_path / 'prompts.txt'}"]
    reward += ["data.train=null", "train.lr=30"]
    config = make_config(tiny_sdxl, *resumed, "train.batch_size=8", "train.steps=2", f"output={where['resumed']}")
    train(config)  # by one process; the two go on from it
    recipe, cache = str(tmp_path / "recipe.yaml"), tmp_path / "cache"  # empty: the two processes fill it together
    further = ["train", recipe, *resumed, "train.steps=4", f"output={where['resumed']}"]
    commands = [
        ["train", recipe, *fresh, f"data.cache={cache}", f"output={where['two']}"],
        [*further, "train.batch_size=8"],
        further,
        ["train", recipe, f"output={where['mine']}"],
        ["train", recipe, f"model.path={pixart}", *fp8, f"output={where['small']}"],
        ["train", recipe, *reward, f"output={where['rewarded_two']}"],
    ]
    with lock.held(where["mine"]):
        said = launch(
            commands,
            "--multi_gpu",  # with ACCELERATE_USE_CPU, because --cpu starts several processes only under MPI
            HF_DATASETS_CACHE=str(tmp_path / "hf"),
        )
    manifest = json.loads((where["two"] / "checkpoint-000003" / "checkpoint.json").read_text())
    assert manifest["pairs_per_update"] == 8  # there really were two
    for rank in (0, 1):
        assert f"[process {rank}] error: cannot resume {where['resumed']}" in said
        assert f"[process {rank}] error: {where['mine']} is in use by another run (process {os.getpid()})" in said
    assert "batch_size x accumulation x processes is not the product" in said and "(8 there, 16 now)" in said

    train(make_config(tiny_sdxl, *fresh, "train.batch_size=8", f"output={where['one']}"))
    same(finished(where["one"]), finished(where["two"]))
    train(make_config(tiny_sdxl, *resumed, "train.batch_size=8", "train.steps=4", f"output={where['straight']}"))
    same(finished(where["straight"]), finished(where["resumed"]))
    train(make_config(pixart, *fp8, "train.batch_size=8", f"output={where['whole']}"))
    same(finished(where["whole"]), finished(where["small"]))
    train(make_config(tiny_sdxl, *reward, "train.batch_size=8", f"output={where['rewarded']}"))
    same(finished(where["rewarded"]), finished(where["rewarded_two"]))


def test_sharded_and_whole_runs_continue_each_other(tiny_sdxl, make_config, tmp_path, pairs_parquet):
    """FSDP2 on two processes goes on from a checkpoint of one, and one goes on from theirs: as a straight run."""
    model = make_pixart(tmp_path / "pixart")
    common = [*SGD, "train.optimizer_args.momentum=0.9", f"data.validation={pairs_parquet}", "train.eval_every=1"]
    mixed, straight = f"output={tmp_path / 'mixed'}", f"output={tmp_path / 'straight'}"
    # keep=4: all of them can be looked at
    common += ["train.checkpoint_every=1", "train.checkpoint_keep=4"]
    train(make_config(model, *common, "train.batch_size=8", "train.steps=1", mixed))
    cut_up = ["train.batch_size=2", "train.accumulation=2", "train.gradient_checkpointing=true"]
    recipe = str(tmp_path / "recipe.yaml")
    kinds = {kind: [f"lora.kind={kind}", "train.steps=2"] for kind in ("dora", "lokr")}
    said = launch(
        [
            ["train", recipe, *common, *cut_up, "train.steps=3", mixed],
            ["train", recipe, f"model.path={tiny_sdxl}", "objective.reference.policy=ema", "train.steps=1"],
            *(["train", recipe, *SGD, *cut_up, *own, f"output={tmp_path / kind}-two"] for kind, own in kinds.items()),
        ],
        "--config_file",
        str(Path(__file__).parents[2] / "configs" / "accelerate" / "fsdp2.yaml"),
        HF_DATASETS_CACHE=str(tmp_path / "hf"),
    )
    assert "FSDP2 does not go with a UNet2DConditionModel, objective.reference.policy=ema;" in said
    train(make_config(model, *common, "train.batch_size=8", "train.steps=4", mixed))
    train(make_config(model, *common, "train.batch_size=8", "train.steps=4", straight))
    same(finished(tmp_path / "straight"), finished(tmp_path / "mixed"))
    for step in (2, 3, 4):  # momentum, gathered and put back
        ours, theirs = (
            checkpoint.read_state(tmp_path / run / f"checkpoint-00000{step}")["optimizer"]["state"]
            for run in ("mixed", "straight")
        )
        for index, values in theirs.items():
            torch.testing.assert_close(ours[index]["momentum_buffer"], values["momentum_buffer"], rtol=1e-3, atol=1e-6)
    for kind, own in kinds.items():
        train(make_config(model, *SGD, *own, "train.batch_size=8", f"output={tmp_path / kind}"))
        two, one = (finished(tmp_path / name)[0] for name in (f"{kind}-two", kind))
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
