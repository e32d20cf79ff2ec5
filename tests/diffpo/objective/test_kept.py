"""Reference errors of draws that come again, against a run that computes them each time."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import metrics_of

from diffpo.common.errors import DiffpoError
from diffpo.objective.kept import KeptErrors
from diffpo.train.loop import train

# 10 pairs of 2 draws: all are known from update 5 on
OPTIONS = ("objective.forward.draws=2", "train.steps=7", "train.batch_size=5", "train.checkpoint_every=3")
SGD = ("train.optimizer=torch.optim.SGD", "train.lr=0.3", "data.caption_dropout=0.3")


def test_kept_errors_are_those_that_would_be_computed_and_survive_a_resume(
    tiny_sdxl, make_config, tmp_path, monkeypatch
):
    def run(name, *more):
        config = make_config(tiny_sdxl, *OPTIONS, *SGD, f"output={tmp_path / name}", *more)
        return load_file(train(config)), metrics_of(config.output)

    kept, rows = run("kept")
    passes = [row["calls/forward"] for row in rows]
    each = [after - before for before, after in zip([0, *passes], passes, strict=False)]
    assert each == [20, 20, 20, 20, 10, 10, 10]  # policy and reference of 5 pairs, then the policy alone
    run("resumed", "train.steps=4")
    again, _ = run("resumed")
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    monkeypatch.setattr(KeptErrors, "get", lambda *_: None)
    computed, others = run("computed")
    assert others[-1]["calls/forward"] == 7 * 20
    for row, other in zip(rows, others, strict=True):
        for key in ("loss", "rewards/margins", "error/chosen_delta", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-6)
    moved = max(value.abs().max().item() for name, value in kept.items() if "lora_B" in name)
    assert max((kept[name] - computed[name]).abs().max().item() for name in kept) < 1e-4 * moved


def test_all_processes_know_what_each_of_them_computed_and_the_first_value_stays():
    here, there = KeptErrors(5, 2), torch.tensor([[3.0, 4.0]])
    device = torch.device("cpu")

    def gather(mine):
        return torch.cat([mine, torch.tensor([4]) if mine.dtype == torch.int64 else there])

    here.note([0, 2], torch.tensor([1.0, 2.0, 5.0, 6.0]))  # the first images of both, then the second ones
    assert here.get([0], device) is None  # not before the end of the update
    here.after_update(SimpleNamespace(gather=gather))
    assert here.get([4, 0, 2], device).tolist() == [3, 1, 2, 4, 5, 6] and here.get([0, 1], device) is None
    here.note([0], torch.tensor([7.0, 7.0]))
    here.after_update(SimpleNamespace(gather=lambda mine: mine))
    assert here.get([0], device).tolist() == [1, 5]
    other = KeptErrors(5, 2)
    other.load(here.state())
    assert torch.equal(other.errors.nan_to_num(-1), here.errors.nan_to_num(-1))
    with pytest.raises(DiffpoError, match=r"objective\.forward\.draws"):
        KeptErrors(4, 2).load(here.state())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("objective.kl=0.1", "kl needs the reference's predictions"),
        ("objective.reference.policy=ema", r"reference\.policy=ema moves"),
        ("objective.source=inversion", "of source forward"),
    ],
)
def test_what_needs_more_than_kept_errors_is_refused(tiny_sdxl, make_config, setting, words):
    with pytest.raises(DiffpoError, match=words):
        make_config(tiny_sdxl, "objective.forward.draws=2", setting)
