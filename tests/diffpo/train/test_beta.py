"""`objective.beta: auto`: its criterion against closed forms, its choice where the best beta is known, and its run."""

import json
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


def world(moves):
    """30 pictures that the base draws alike, with votes by Bradley-Terry on their scores, and a policy for each beta:
    its log-ratios to the base are (size, share of noise) of ``moves``. Margins (betas, pairs) and labels of all pairs,
    and the exact share of votes of each policy's pictures against the base's."""
    draw = torch.Generator().manual_seed(1)
    score, noise = torch.randn(2, 30, generator=draw, dtype=torch.float64)
    wins = torch.sigmoid(score[:, None] - score[None])
    pairs = [(i, j) for i in range(30) for j in range(30) if i != j and wins[i, j] >= 0.5]
    better, worse = torch.tensor(pairs).T
    margins, shares = [], []
    for beta, (size, astray) in zip(TRIED, moves, strict=True):
        ratio = size * ((1 - astray) * score + astray * noise)
        margins.append(beta * (ratio[better] - ratio[worse]))
        shares.append((ratio.softmax(0) @ wins.mean(1)).item())
    return torch.stack(margins), wins[better, worse], shares


def test_the_gain_is_the_first_order_change_of_the_votes():
    margins, labels, shares = world([(1e-3, 0.0), (1e-3, 0.5), (2e-3, 1.0), (5e-4, 0.2)])
    for trial, share in zip(module.judged(TRIED, margins, labels), shares, strict=True):
        # the mean of (2 p - 1)(l_i - l_j) is 4 cov(l, votes) over all ordered pairs, those of a picture with itself too
        assert trial.gain * 29 / 30 == pytest.approx(4 * (share - 0.5), rel=0.01)


@pytest.mark.parametrize("best", range(4))
def test_the_beta_whose_pictures_win_most_is_chosen(best):
    moves = [(0.1, 0.8), (0.05, 0.3), (0.02, 0.0), (0.1, 0.9)]
    moves[best] = (0.2, 0.1)
    margins, labels, shares = world(moves)
    assert max(range(4), key=shares.__getitem__) == best
    trials = module.judged(TRIED, margins, labels)
    assert module.chosen(trials).beta == TRIED[best]
    gains = (2 * labels - 1) * margins[0] / 100
    assert trials[0].error == pytest.approx(gains.std().item() / len(gains) ** 0.5)
    assert trials[0].accuracy == (margins[0] > 0).double().mean().item()


def test_what_was_learnt_wrongly_leaves_the_beta_that_moved_least():
    margins = torch.stack(
        [-beta * torch.linspace(0, 2, 20, dtype=torch.float64) / (k + 1) for k, beta in enumerate(TRIED)]
    )
    assert module.chosen(module.judged(TRIED, margins, ones(20))).beta == 12500
    assert module.chosen(module.judged(TRIED, 0 * margins, ones(20))).beta == 12500


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
        after(held_out, None, None)

    assert module.resolved(config, fit).objective.beta == 500
    assert seen == [(beta, f"{beta:g}", 2) for beta in TRIED]
    record = json.loads((config.output / "beta.json").read_text())
    assert record["chosen"] == 500 and record["pairs"] == 14 and record["updates"] == 2
    assert [trial["beta"] for trial in record["trials"]] == list(TRIED)
    assert record["trials"][1] == {"beta": 500, "gain": pytest.approx(1 / 500), "error": 0, "accuracy": 1}
    assert record["trials"][0] == {"beta": 100, "gain": 0, "error": 0, "accuracy": 0.5}
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
