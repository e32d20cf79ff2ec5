"""`objective.beta: auto`: its criterion against closed forms, its choice where the best beta is known, and its run."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import metrics_of, pick_a_pic_rows, write_parquet

from diffpo.common.errors import DiffpoError
from diffpo.train import beta as module
from diffpo.train import update
from diffpo.train.loop import train

TRIED = (100.0, 500.0, 2500.0, 12500.0)  # for diffusion_dpo, whose preset has 5000


def ones(n):
    return torch.ones(n, dtype=torch.float64)


def test_the_loss_is_the_negative_log_likelihood_of_the_labels():
    """Margins of log 3 mean a probability of 3/4: right for 3 of 4 pairs they have the least loss, the entropy."""
    signs = torch.tensor([1.0, 1, 1, -1] * 5, dtype=torch.float64)
    scales = (0.0, 0.5 * math.log(3), math.log(3), 2 * math.log(3))
    trials = module.judged(TRIED, torch.stack([scale * signs for scale in scales]), ones(20))
    assert module.chosen(trials) is trials[2] and (trials[2].behind, trials[2].error) == (0, 0)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert [trials[0].loss, trials[2].loss] == pytest.approx([math.log(2), entropy])
    assert [trial.accuracy for trial in trials] == [0.5, 0.75, 0.75, 0.75]
    # of one pair: log 2 + log sigma(+-log 3)
    behind = math.log(2) + signs.numpy() * 0.5 * math.log(3) + math.log(3) / 2 - math.log(4)
    assert trials[0].behind == pytest.approx(behind.mean()) and trials[0].error == pytest.approx(
        behind.std(ddof=1) / 20**0.5
    )
    # the same with labels that say 3/4, where all margins are alike
    soft = module.judged(TRIED, torch.stack([scale * ones(4) for scale in scales]), 0.75 * ones(4))
    assert module.chosen(soft) is soft[2] and soft[2].loss == pytest.approx(entropy)


def test_a_beta_that_learns_more_is_chosen_wherever_it_stands():
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(200, generator=draw, dtype=torch.float64)
    for place in range(4):
        margins = torch.stack([noise + (k == place) for k in range(4)])
        assert module.chosen(module.judged(TRIED, margins, ones(200))).beta == TRIED[place]


@pytest.fixture
def auto(make_config, tiny_sd, tmp_path):
    held_out = write_parquet(tmp_path / "held_out.parquet", pick_a_pic_rows(14))

    def make(*overrides):
        own = ("objective.beta=auto", f"data.validation={held_out}", "train.steps=2", *overrides)
        return make_config(tiny_sd, *own)

    return make


def test_the_choice_where_the_best_beta_is_known(auto, capsys):
    """A stand-in for training whose margins are right for all pairs at beta 500, and 0 elsewhere."""
    config, seen = auto(), []

    def fit(trial, after):
        seen.append((trial.objective.beta, trial.output.name, trial.train.steps))
        margins = ones(14) if trial.objective.beta == 500 else 0 * ones(14)
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
