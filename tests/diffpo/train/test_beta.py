"""`objective.beta: auto`: its criterion against closed forms, its choice where the best beta is known, and its run."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.optimize import minimize_scalar
from tiny import metrics_of, pick_a_pic_rows, write_parquet

from diffpo.common.errors import DiffpoError
from diffpo.train import beta as module
from diffpo.train import update
from diffpo.train.loop import train

TRIED = (100.0, 500.0, 2500.0, 12500.0)  # for diffusion_dpo, whose preset has 5000


def ones(n):
    return torch.ones(n, dtype=torch.float64)


def test_the_loss_of_margins_of_one_size_is_the_entropy_of_the_accuracy():
    """m = 1 for 3 of 4 pairs and -1 for the fourth: the best c is log 3, where sigma is 3/4."""
    margins = torch.tensor([1.0, 1, 1, -1] * 5, dtype=torch.float64)
    losses = module.pair_losses(0.01 * margins, ones(20))
    assert losses[0].item() == pytest.approx(-math.log(3 / 4)) and losses[3].item() == pytest.approx(-math.log(1 / 4))
    assert module.pair_losses(-margins, ones(20)) == pytest.approx([math.log(2)] * 20)  # they say nothing at c >= 0
    assert module.pair_losses(0 * margins, ones(20)) == pytest.approx([math.log(2)] * 20)
    # labels that say 3/4 of pairs with equal margins are met exactly, at c = log 3 again
    losses = module.pair_losses(ones(4), 0.75 * ones(4))
    assert losses == pytest.approx([-0.75 * math.log(0.75) - 0.25 * math.log(0.25)] * 4)


def test_the_loss_is_that_of_a_logistic_regression_without_intercept():
    rng = np.random.default_rng(0)
    margins, p = rng.normal(0.3, 1, 60), rng.choice([0.6, 1.0], 60)

    def loss(c):
        return np.mean(p * np.logaddexp(0, -c * margins) + (1 - p) * np.logaddexp(0, c * margins))

    found = module.pair_losses(torch.tensor(40 * margins), torch.tensor(p)).mean().item()
    assert found == pytest.approx(minimize_scalar(loss, bounds=(0, 20), method="bounded").fun, abs=1e-8)


def test_a_beta_that_knows_more_is_chosen_and_among_equal_ones_the_largest():
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(200, generator=draw, dtype=torch.float64)
    signal, none = noise + 1.0, noise
    for place in range(4):
        margins = torch.stack([signal if k == place else none for k in range(4)])
        trials = module.judged(TRIED, margins, ones(200))
        best = module.chosen(trials)
        assert (best.beta, best.behind, best.error) == (TRIED[place], 0, 0)
        other = trials[place - 1]
        difference = module.pair_losses(none, ones(200)) - module.pair_losses(signal, ones(200))
        assert other.behind == pytest.approx(difference.mean().item())
        assert other.error == pytest.approx(difference.std().item() / 200**0.5)
        assert other.accuracy == (noise > 0).double().mean().item()
    equal = torch.stack([signal * scale for scale in (1e-3, 1.0, 30.0, 1e3)])
    assert module.chosen(module.judged(TRIED, equal, ones(200))).beta == 12500


@pytest.fixture
def auto(make_config, tiny_sd, tmp_path):
    held_out = write_parquet(tmp_path / "held_out.parquet", pick_a_pic_rows(14))

    def make(*overrides):
        own = ("objective.beta=auto", f"data.validation={held_out}", "train.steps=2", *overrides)
        return make_config(tiny_sd, *own)

    return make


def test_the_choice_where_the_best_beta_is_known(auto, capsys):
    """A stand-in for training whose margins are right for most pairs at beta 500, and noise elsewhere."""
    config, seen = auto(), []

    def fit(trial, after):
        seen.append((trial.objective.beta, trial.output.name, trial.train.steps))
        own = 1.0 if trial.objective.beta == 500 else 0.0
        margins = torch.tensor([own + (-1) ** k for k in range(14)], dtype=torch.float64) + 0.5 * own
        held_out = SimpleNamespace(margins=lambda *_: margins, preferences=ones(14))
        trial.output.mkdir(parents=True)
        for name in ("config.yaml", "metrics.jsonl"):
            (trial.output / name).write_text("")
        after(SimpleNamespace(policy=None, update=SimpleNamespace(objective=None)), SimpleNamespace(held_out=held_out))

    assert module.resolved(config, fit).objective.beta == 500
    assert seen == [(beta, f"{beta:g}", 2) for beta in TRIED]
    record = json.loads((config.output / "beta.json").read_text())
    assert record["chosen"] == 500 and record["pairs"] == 14 and record["updates"] == 2
    assert [trial["beta"] for trial in record["trials"]] == list(TRIED)
    assert record["trials"][0]["loss"] == pytest.approx(math.log(2)) and record["trials"][0]["accuracy"] == 0.5
    assert "500 (chosen)" in capsys.readouterr().out
    assert module.resolved(config, fit).objective.beta == 500 and len(seen) == 4  # from the record
    with pytest.raises(DiffpoError, match=r"beta\.json.*output=FOLDER"):
        module.resolved(auto("train.lr=1e-3"), fit)


def test_a_run_with_auto_is_the_run_with_the_chosen_number(auto, tmp_path, monkeypatch):
    """Also after an interruption within the second trial; only that one is trained on."""
    config, updates, call = auto(), [], update.Updater.__call__

    def stops(self, step, *rest):
        updates.append((self.objective.settings.beta, step))
        if len(updates) == 4:
            raise KeyboardInterrupt
        return call(self, step, *rest)

    monkeypatch.setattr(update.Updater, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    train(config)
    expected = [(beta, step) for beta in TRIED for step in range(2)]
    assert updates == [*expected[:4], *expected[2:]]  # the second trial had no checkpoint yet; the last run needs none
    monkeypatch.undo()
    beta = json.loads((config.output / "beta.json").read_text())["chosen"]
    assert f"beta: {beta}" in (config.output / "config.yaml").read_text()
    assert f"(beta {beta:g})" in (config.output / "README.md").read_text()
    alone = train(auto(f"objective.beta={beta}", f"output={tmp_path / 'alone'}"))
    ours, theirs = load_file(train(config)), load_file(alone)  # once more: nothing is left to do
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [row["loss"] for row in metrics_of(config.output)] == [row["loss"] for row in metrics_of(tmp_path / "alone")]


def test_what_auto_cannot_choose_is_refused(auto, tmp_path):
    few = write_parquet(tmp_path / "few.parquet", pick_a_pic_rows(5))
    with pytest.raises(DiffpoError, match=r"few\.parquet has 5.*data\.validation"):
        train(auto(f"data.validation={few}"))
    for overrides, words in {
        ("data.validation=null",): r"data\.validation",
        ("objective.name=mapo",): r"beta=auto: mapo",
        ("objective.name=d3po", "data.prompts=x.txt"): "source trajectory",
        ("objective.beta=automatic",): r"objective\.beta.*'automatic'",
    }.items():
        with pytest.raises(DiffpoError, match=words):
            auto(*overrides)
