"""Two processes must do what one does: started afresh, and from a checkpoint of one. Real `accelerate launch`, gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import on_policy
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import metrics_of, pick_a_pic_rows, picture, png, write_parquet
from tiny_transformers import make_pixart
from typer.testing import CliRunner

import diffpo
from diffpo import cli
from diffpo.common import lock
from diffpo.config import load_config
from diffpo.evaluation import manifest
from diffpo.train import checkpoint
from diffpo.train.loop import train

ROOT = Path(__file__).parents[2]
CLOCK = {"time", "pairs_per_second"}
SIZES = [(32, 16), (16, 40), (16, 16), (32, 16), (24, 16), (16, 16)]
SGD = ("train.optimizer=torch.optim.SGD", "train.lr=0.3")


def launch(commands: dict[str, list[list[str]]], **environment: str) -> str:
    """Run diffpo's ``commands``, one after another, in two processes; what they said. See launched.py."""
    script, config = Path(__file__).with_name("launched.py"), ROOT / "configs" / "accelerate" / "fsdp2.yaml"
    # this is `accelerate launch` without the imports of accelerate's other commands; port 0: any free one
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, "--main_process_port", "0", str(script), json.dumps(commands)],
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


def mixed_sizes(path: Path) -> Path:
    """Pairs of pictures of several sizes, written to ``path``."""
    rows = pick_a_pic_rows(len(SIZES))
    for i, (row, size) in enumerate(zip(rows, SIZES, strict=True)):
        row |= {f"jpg_{j}": png(picture(2 * i + j, size)) for j in (0, 1)}
    return write_parquet(path, rows)


def files(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def launched(tiny_sdxl, pairs_parquet, tmp_path_factory):
    """What two processes do in one start, since a start takes longer than all that they do."""
    return Launched(tmp_path_factory.mktemp("launched"), tiny_sdxl, pairs_parquet)


class Launched:
    """The commands of all tests of two processes, and the same runs by one process."""

    fresh = (*SGD, "train.steps=3")
    auto = (*SGD, "train.steps=2", "objective.beta=auto")
    resumed = (*SGD, "train.optimizer_args.momentum=0.9")
    fp8 = (*SGD, "train.steps=2", "model.base_weights=fp8")
    mixed = ("data.buckets=true", *SGD, "train.steps=3", "data.caption_dropout=0.3")
    spo = (*on_policy.options("spo"), *SGD, "train.steps=3")
    grpo = (*on_policy.options("flow_grpo"), *SGD, "train.steps=3")
    reward = (*SGD, "objective.name=draft", "objective.direct.calls=null", "objective.rollout.steps=3", "train.steps=2")
    reward += ("objective.rollout.scorers=[on_policy:Redness]", "data.train=null", "train.lr=30")
    stopped = (*SGD, "log.samples.every=2", "log.samples.steps=2", "log.samples.scorers=[on_policy:Redness]")
    stopped += ("train.stop_when.train_scorer=redness", "train.stop_when.patience=1")
    # checkpoint_keep: all of them can be looked at
    sharded = (*SGD, "train.optimizer_args.momentum=0.9", "train.eval_every=1")
    sharded += ("train.checkpoint_every=1", "train.checkpoint_keep=4")
    cut_up = ("train.batch_size=2", "train.accumulation=2", "train.gradient_checkpointing=true")
    kinds: ClassVar = {kind: (*SGD, f"lora.kind={kind}", "train.steps=2") for kind in ("dora", "lokr")}

    def __init__(self, folder: Path, model: Path, pairs: Path):
        self.folder, self.model, self.pairs = folder, model, pairs
        self.pixart, self.sizes = make_pixart(folder / "pixart"), mixed_sizes(folder / "mixed.parquet")
        (folder / "prompts.txt").write_text("red cat\nblue dog\na bird\n")
        self.reward = (*self.reward, f"data.prompts={folder / 'prompts.txt'}")
        self.stopped = (*self.stopped, f"log.samples.prompts={folder / 'prompts.txt'}")
        self.transformer = f"model.path={self.pixart}"
        self.sharded = (*self.sharded, self.transformer, f"data.validation={pairs}")
        # by one process; the two go on from it
        train(self.config(*self.resumed, "train.batch_size=8", "train.steps=2", self.output("resumed")))
        train(self.config(*self.sharded, "train.batch_size=8", "train.steps=1", self.output("mixed")))
        further = (*self.resumed, "train.steps=4", self.output("resumed"))
        data = [f"data.train={self.sizes}", f"data.validation={self.sizes}", f"data.cache={folder / 'two sizes'}"]
        whole = [
            # an empty cache: the two processes fill it together
            [*self.fresh, f"data.validation={pairs}", f"data.cache={folder / 'cache of two'}", self.output("two")],
            [*further, "train.batch_size=8"],
            further,
            [self.output("mine")],
            [self.transformer, *self.fp8, self.output("small")],
            [*self.mixed, *data, "train.batch_size=2", self.output("sizes of two")],
            [*self.spo, self.output("spo of two")],
            [*self.grpo, self.output("grpo of two")],
            [*self.reward, self.output("reward of two")],
            [*self.stopped, self.output("stopped of two")],
            [*self.auto, f"data.validation={pairs}", self.output("auto of two")],
        ]
        sharded = [
            [*self.sharded, *self.cut_up, "train.steps=3", self.output("mixed")],
            ["objective.reference.policy=ema", "train.steps=1", self.output("unet")],
            *(
                [self.transformer, *own, *self.cut_up, self.output(f"{kind} of two")]
                for kind, own in self.kinds.items()
            ),
        ]
        recipe = str(folder / "recipe.yaml")
        with lock.held(folder / "mine"):
            self.said = launch(
                {
                    "whole": [
                        self.scoring(folder / "scores of two"),
                        self.evaluating(folder / "arms of two"),
                        self.labelling(folder / "labels of two"),
                        *(["train", recipe, *options] for options in whole),
                    ],
                    "sharded": [["train", recipe, *options] for options in sharded],
                },
                HF_DATASETS_CACHE=str(folder / "hf"),
            )

    def output(self, name: str) -> str:
        return f"output={self.folder / name}"

    def scoring(self, out: Path) -> list[str]:
        return ["score", str(self.pairs), "--out", str(out), "--scorers", "own_scorers:Mean", "--batch-size", "2"]

    def evaluating(self, out: Path) -> list[str]:
        command = ["eval", "--model", str(self.model), "--prompts", str(self.folder / "prompts.txt"), "--steps", "2"]
        command += ["--arm", "base", "--arm", "plain=guidance=1", "--scorers", "on_policy:Redness"]
        return [*command, "--batch-size", "1", "--out", str(out)]

    def labelling(self, out: Path) -> list[str]:
        command = ["label", "--model", str(self.model), "--prompts", str(self.folder / "prompts.txt"), "--steps", "2"]
        command += ["--images-per-prompt", "3", "--pairs", "all", "--scorers", "on_policy:Redness", "--filter", "0.3"]
        return [*command, "--batch-size", "1", "--out", str(out)]

    def run_alone(self, arguments: list[str]) -> None:
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, result.output

    def config(self, *options: str):
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(
            f"model: {{path: {self.model}}}\n"
            f"data: {{train: {self.pairs}, resolution: 16, cache: '{self.folder / 'cache'}'}}\n"
            "lora: {rank: 4}\n"
            "objective: {name: diffusion_dpo, beta: 500}\n"
            "train: {steps: 4, batch_size: 4, lr: 1e-2, checkpoint_every: 2}\n"
        )
        return load_config(recipe, options)

    def alone(self, name: str, *options: str) -> tuple[dict, list[dict]]:
        """The same by one process."""
        train(self.config(*options, self.output(name)))
        return finished(self.folder / name)


def test_two_processes_of_four_equal_one_of_eight(launched):
    """Same losses, LoRA and held-out numbers. (SGD, because Adam divides rounding by rounding where gradients are near
    0.)"""
    manifest = json.loads((launched.folder / "two" / "checkpoint-000003" / "checkpoint.json").read_text())
    assert manifest["pairs_per_update"] == 8  # there really were two
    one = launched.alone("one", *launched.fresh, f"data.validation={launched.pairs}", "train.batch_size=8")
    same(one, finished(launched.folder / "two"))
    same(
        launched.alone("whole", f"model.path={launched.pixart}", *launched.fp8, "train.batch_size=8"),
        finished(launched.folder / "small"),
    )


def test_two_processes_choose_the_same_beta(launched):
    one = launched.alone("auto of one", *launched.auto, f"data.validation={launched.pairs}", "train.batch_size=8")
    same(one, finished(launched.folder / "auto of two"))
    ours, theirs = (
        json.loads((launched.folder / name / "beta.json").read_text()) for name in ("auto of one", "auto of two")
    )
    assert ours["chosen"] == theirs["chosen"] and ours["pairs"] == theirs["pairs"] == 10
    for mine, other in zip(ours["trials"], theirs["trials"], strict=True):
        assert mine == pytest.approx(other, rel=5e-3, abs=1e-8)


def test_two_processes_sample_the_same_pictures_and_stop_at_the_same_step(launched):
    """Three prompts for two processes: their shares differ."""
    one, two = (launched.folder / f"stopped of {name}" for name in ("one", "two"))
    same(launched.alone(one.name, *launched.stopped, "train.batch_size=8"), finished(two))
    assert len(metrics_of(two)) == 2 and "train.stop_when" in launched.said
    names = [sorted(path.name for path in (each / "samples").iterdir()) for each in (one, two)]
    assert names[0] == names[1] and len(names[0]) == 6
    pictures = [np.asarray(Image.open(each / "samples" / names[0][-1]), int) for each in (one, two)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_two_processes_go_on_from_a_checkpoint_of_one(launched):
    """If the update stays as large. With momentum, which has to survive."""
    straight = launched.alone("straight", *launched.resumed, "train.batch_size=8", "train.steps=4")
    same(straight, finished(launched.folder / "resumed"))
    where, said = launched.folder, launched.said
    for rank in (0, 1):
        assert f"[process {rank}] error: cannot resume {where / 'resumed'}" in said
        assert f"[process {rank}] error: {where / 'mine'} is in use by another run (process {os.getpid()})" in said
    assert "(8 there, 16 now)" in said


def test_two_processes_fill_the_caches_of_several_sizes_as_one_does(launched):
    data = (f"data.train={launched.sizes}", f"data.validation={launched.sizes}")
    cache = launched.folder / "one of sizes"
    one = launched.alone("sizes of one", *launched.mixed, *data, f"data.cache={cache}", "train.batch_size=4")
    kept = files(cache)
    assert files(launched.folder / "two sizes") == kept  # to the byte, and nothing beside them
    assert [name.split("-")[0] for name in kept] == ["encoders"] + ["latents"] * 3 + ["text"]  # one for each size
    same(one, finished(launched.folder / "sizes of two"))


@pytest.mark.parametrize("name", ["spo", "grpo"])
def test_two_processes_share_out_sampling_and_judging(launched, name):
    """The round that results is the same, and so are ratios to the policy that sampled it."""
    manifest = json.loads((launched.folder / f"{name} of two" / "checkpoint-000003" / "checkpoint.json").read_text())
    assert manifest["pairs_per_update"] == 8
    one = launched.alone(f"{name} of one", *getattr(launched, name), "train.batch_size=8")
    on_policy.same(one, finished(launched.folder / f"{name} of two"))


def test_two_processes_share_out_the_images_of_reward_fine_tuning(launched):
    one = launched.alone("reward of one", *launched.reward, "train.batch_size=8")
    same(one, finished(launched.folder / "reward of two"))


def test_sharded_and_whole_runs_continue_each_other(launched):
    """FSDP2 on two processes goes on from a checkpoint of one, and one goes on from theirs: as a straight run."""
    assert "UNet2DConditionModel, objective.reference.policy=ema" in launched.said
    mixed, straight = (
        launched.alone(name, *launched.sharded, "train.batch_size=8", "train.steps=4")
        for name in ("mixed", "never sharded")
    )
    same(straight, mixed)
    for step in (2, 3, 4):  # momentum, gathered and put back
        ours, theirs = (
            checkpoint.read_state(launched.folder / run / f"checkpoint-00000{step}")["optimizer"]["state"]
            for run in ("mixed", "never sharded")
        )
        for index, values in theirs.items():
            torch.testing.assert_close(ours[index]["momentum_buffer"], values["momentum_buffer"], rtol=1e-3, atol=1e-6)
    for kind, own in launched.kinds.items():
        one, _ = launched.alone(kind, launched.transformer, *own, "train.batch_size=8")
        two, _ = finished(launched.folder / f"{kind} of two")
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


def test_two_processes_share_out_the_pictures_to_score(launched):
    found = diffpo.score(launched.pairs, launched.folder / "scores of one", scorers=("own_scorers:Mean",))
    two = pq.read_table(launched.folder / "scores of two" / "scores.parquet")
    assert two.equals(found.table()) and len(two) == found.pictures > 4
    assert f"all {found.pictures} pictures" in launched.said


def test_two_processes_share_out_the_pictures_of_an_evaluation(launched):
    """The manifest has every picture once, and pictures, scores and verdict are those of one process."""
    launched.run_alone(launched.evaluating(launched.folder / "arms of one"))
    one, two = (launched.folder / f"arms of {count}" for count in ("one", "two"))
    tables = [pq.read_table(each / "scores.parquet") for each in (one, two)]
    assert tables[0].equals(tables[1]) and len(tables[0]) == 6
    rows = [sorted(manifest.read_manifest(each), key=lambda row: row["file"]) for each in (one, two)]
    assert rows[0] == rows[1] and not list(two.glob("manifest-*")) and not (two / ".scores").exists()
    assert (one / "summary.json").read_text() == (two / "summary.json").read_text()


def test_two_processes_share_out_pictures_scores_and_the_filter_of_labels(launched):
    launched.run_alone(launched.labelling(launched.folder / "labels of one"))
    one, two = (pq.read_table(launched.folder / f"labels of {name}" / "labels.parquet") for name in ("one", "two"))
    assert len(one) == 6 and one.column_names == two.column_names  # of nine pairs a third is left out
    for name in one.column_names:
        if name == "displacement":  # in batches of other pairs
            np.testing.assert_allclose(one[name], two[name], rtol=1e-4)
        else:
            assert one[name].equals(two[name]), name
    assert len(list((launched.folder / "labels of two/.displacement").glob("*-1.jsonl"))) == 1  # there really were two
