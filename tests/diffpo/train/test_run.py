"""The shell of a run: what it resumes, what it refuses, how it stops."""

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import metrics_of

from diffpo.common.errors import DiffpoError
from diffpo.config import load_config
from diffpo.train import checkpoint
from diffpo.train.loop import train
from diffpo.train.run import Interrupted, Run
from diffpo.train.update import Diverged

ROOT = Path(__file__).parents[3]
EARLIER = Path(__file__).with_name("earlier_run")  # two updates of `diffpo train` as of commit c22727f


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """earlier("a.b=c", ...): the config of a copy of that run."""
    monkeypatch.chdir(ROOT)  # its config names model and data from here
    output = tmp_path / "earlier"
    shutil.copytree(EARLIER, output, ignore=shutil.ignore_patterns("after-*"))
    return lambda *more: load_config(EARLIER / "config.yaml", [f"output={output}", f"data.cache={tmp_path}", *more])


def test_a_run_that_an_earlier_version_saved_is_resumed(earlier, tmp_path):
    """After four updates the LoRA is that version's own; to rounding, as machines differ."""
    resumed = load_file(train(earlier("train.steps=4")))
    assert [row["step"] for row in metrics_of(tmp_path / "earlier")] == [1, 2, 3, 4]
    before = load_file(EARLIER / "checkpoint-000002" / "pytorch_lora_weights.safetensors")
    moved = 0.0
    for name, value in load_file(EARLIER / "after-4.safetensors").items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-3, atol=1e-5)
        moved = max(moved, (value - before[name]).abs().max().item())
    assert moved > 1e-3


def test_other_settings_or_data_than_an_earlier_version_saved_are_refused(earlier):
    with pytest.raises(DiffpoError, match=r"checkpoint-000002.*train\.lr: 0\.05 there, 0\.5 here"):
        train(earlier("train.lr=0.5"))
    with pytest.raises(DiffpoError, match=r"data\.limit: 6 there, 8 here"):
        train(earlier("data.limit=8"))


# ---- the shell alone, around something that is quickly trained


class Counter:
    """A learner whose state is the sum of the updates' numbers."""

    def __init__(self):
        self.total = 0

    def writer(self, step):
        return lambda folder: (folder / "total.txt").write_text(str(self.total))

    def state(self):
        return {"total": self.total}

    def load(self, folder, state):
        self.total = state["total"]
        assert (folder / "total.txt").read_text() == str(self.total)


@pytest.fixture
def make_run(tiny_sd, make_config):
    origin = {"base": {"hash": "h"}, "data_hash": "d", "pairs_per_update": 4}

    def make(*overrides):
        config = make_config(tiny_sd, "train.checkpoint_every=2", *overrides)
        accelerator = SimpleNamespace(is_main_process=True, num_processes=1, print=print, wait_for_everyone=None)
        run, learner = Run(config, accelerator), Counter()
        run.resume(learner, {**origin, "settings": config.model_dump(mode="json")})
        return run, learner

    return make


def work(run, learner, at=None, action=None):
    with run.working("Change something"):
        for step in run.steps():
            if step == at:
                action()
            learner.total += step
            run.log({"loss": float(step)}, "")


def saved(run):
    return sorted(int(folder.name.removeprefix("checkpoint-")) for folder in checkpoint.folders(run.output))


def test_it_saves_when_it_is_due_and_at_the_end_and_goes_on_from_there(make_run):
    run, learner = make_run("train.steps=5")
    work(run, learner)
    assert saved(run) == [4, 5] and learner.total == 10 and run.step == 5
    assert [row["step"] for row in metrics_of(run.output)] == [1, 2, 3, 4, 5]
    longer, learner = make_run("train.steps=7")
    assert longer.step == 5 and learner.total == 10
    work(longer, learner)
    assert learner.total == 21 and [row["loss"] for row in metrics_of(run.output)] == list(map(float, range(7)))
    again, learner = make_run("train.steps=7")  # nothing is left to do
    work(again, learner)
    assert again.step == 7 and learner.total == 21
    with pytest.raises(DiffpoError, match=r"already at step 7, beyond train\.steps=6"):
        make_run("train.steps=6")


def test_a_signal_waits_for_the_end_of_the_step_and_is_taken_back(make_run):
    handler = signal.getsignal(signal.SIGTERM)
    run, learner = make_run("train.steps=5")
    with pytest.raises(Interrupted) as raised:
        work(run, learner, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert raised.value.exit_code == 130 and saved(run) == [2, 3] and learner.total == 3
    assert signal.getsignal(signal.SIGTERM) is handler
    resumed, learner = make_run("train.steps=5")
    work(resumed, learner)
    assert learner.total == 10


def test_a_signal_in_the_last_step_changes_nothing(make_run):
    run, learner = make_run("train.steps=3")
    work(run, learner, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert saved(run) == [2, 3]


@pytest.mark.parametrize(
    ("step", "spoilt", "kept"), [(3, False, [2, 3]), (3, True, [2]), (1, True, []), (0, False, [])]
)
def test_what_is_saved_of_a_run_that_diverges(make_run, step, spoilt, kept):
    run, learner = make_run("train.steps=5")

    def diverge():
        raise Diverged(f"the loss is not finite at step {step + 1}", spoilt)

    with pytest.raises(DiffpoError) as raised:
        work(run, learner, step, diverge)
    assert saved(run) == kept and f"at step {step + 1}" in str(raised.value)
    assert ("Change something" in str(raised.value)) == (step > 0)  # at step 0 the base model is at fault
    assert not kept or f"checkpoint-{kept[-1]:06d}" in str(raised.value)


def test_an_error_of_the_disk_names_the_newest_checkpoint(make_run):
    run, learner = make_run("train.steps=5")

    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(DiffpoError, match=rf"{run.output}: the disk is full.* checkpoint-000002"):
        work(run, learner, 3, full)
