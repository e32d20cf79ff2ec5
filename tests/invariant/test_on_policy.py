"""On-policy runs that must coincide: resumed and straight, one batch of 8 and 8 of one."""

import os
import signal

import numpy as np
import pytest
import torch
from on_policy import CLOCK, METHODS, options, same
from safetensors.torch import load_file
from tiny import metrics_of

from diffpo.common.errors import DiffpoError
from diffpo.scorers.shapes import ShapesScorer
from diffpo.train import metrics as track
from diffpo.train.loop import train
from diffpo.train.run import Interrupted


def run(config):
    return load_file(train(config)), metrics_of(config.output)


@pytest.mark.parametrize("name", METHODS)
def test_interrupted_within_a_round_and_resumed_equals_straight_bit_for_bit(
    tiny_sdxl, make_config, tmp_path, monkeypatch, name
):
    steps = options(name, "train.steps=4", "train.batch_size=2")
    straight = run(make_config(tiny_sdxl, *steps, f"output={tmp_path / 'straight'}"))
    first, last = (
        each.get("rewards/margins", each.get("error/rejected_delta", each.get("error/chosen_delta")))
        for each in (straight[1][0], straight[1][-1])
    )
    assert first == 0 and last != 0
    log = track.Tracker.log

    def interrupt(self, step, metrics):
        log(self, step, metrics)
        if step == 3:  # the round of updates 3 and 4 is half used
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(track.Tracker, "log", interrupt)
    config = make_config(tiny_sdxl, *steps)
    with pytest.raises(Interrupted):
        train(config)
    monkeypatch.undo()
    resumed = run(config)
    for ours, theirs in zip(resumed[1], straight[1], strict=True):
        assert {k: v for k, v in ours.items() if k not in CLOCK} == {k: v for k, v in theirs.items() if k not in CLOCK}
    assert all(torch.equal(resumed[0][name], value) for name, value in straight[0].items())


def test_a_judge_that_fails_costs_nothing(tiny_sdxl, make_config, tmp_path, monkeypatch):
    """It gives no number in the second round: the first one's updates are saved, and the run goes on from there."""
    steps = options("d3po", "train.steps=4", "train.batch_size=2", "train.checkpoint_every=100")
    score, judged, allowed = ShapesScorer.score, [], []

    def counted(self, images, prompts):
        judged.extend(images)
        found = score(self, images, prompts)
        return found if not allowed or len(judged) <= allowed[0] else {name: v * np.nan for name, v in found.items()}

    monkeypatch.setattr(ShapesScorer, "score", counted)
    straight = run(make_config(tiny_sdxl, *steps, f"output={tmp_path / 'straight'}"))
    allowed.append(len(judged) // 2)  # the first of two rounds
    judged.clear()
    config = make_config(tiny_sdxl, *steps)
    with pytest.raises(DiffpoError, match=r"(?s)shapes.total.*step 2 is saved in .*the same command resumes there"):
        train(config)
    monkeypatch.undo()
    resumed = run(config)
    assert all(torch.equal(resumed[0][name], value) for name, value in straight[0].items())


@pytest.mark.parametrize("name", METHODS)
def test_one_batch_of_eight_equals_eight_accumulated(tiny_sdxl, make_config, tmp_path, name):
    common = options(name, "train.optimizer=torch.optim.SGD", "train.lr=0.3", "train.steps=3")
    one = run(make_config(tiny_sdxl, *common, "train.batch_size=8", f"output={tmp_path / 'one'}"))
    eight = run(make_config(tiny_sdxl, *common, "train.batch_size=1", "train.accumulation=8"))
    same(one, eight)
