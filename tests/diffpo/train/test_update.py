"""What one update guards against, counts and remembers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import metrics_of

from diffpo.common.errors import DiffpoError
from diffpo.train import update
from diffpo.train.loop import train
from diffpo.train.metrics import Meter, summarize
from diffpo.weights import lora_file

SAMPLED = (
    "objective.name=spo",
    "data.train=null",
    "data.prompts=shapes:train:4",
    "objective.rollout.prompts=1",
    "objective.rollout.steps=3",
    "objective.rollout.pool=2",
    "objective.rollout.start=0",
    "objective.rollout.step_scorer=shapes.total",
)


def test_rounds_without_a_valid_pair_are_counted_and_twenty_of_them_stop_the_run(tiny_sdxl, make_config):
    config = make_config(tiny_sdxl, *SAMPLED, "objective.rollout.threshold=0.99", "train.steps=30")
    with pytest.raises(DiffpoError, match=r"step 20\b.*objective\.rollout\.threshold"):
        train(config)
    rows = metrics_of(config.output)
    assert len(rows) == 19 and all(row["rollout/empty"] == 1 and "loss" not in row for row in rows)
    assert all(row["calls/backward"] == 0 for row in rows) and rows[-1]["calls/forward"] > 0
    # 4 checkpoints are due on the way: the state is that of the start, and an empty round changes nothing
    weights, _ = lora_file.read_lora(config.output / "checkpoint-000018")
    assert all(not value.any() for name, value in weights.items() if "lora_B" in name)


def test_errors_that_explode_stop_the_run_at_the_last_good_checkpoint(tiny_sd, make_config, monkeypatch):
    score, calls = update.score, []

    def exploding(*given):
        calls.append(1)
        outcome = score(*given)
        return replace(outcome, error=20 * outcome.error) if len(calls) in (2, 4, 5, 6) else outcome

    monkeypatch.setattr(update, "score", exploding)
    config = make_config(tiny_sd, "train.steps=30", "train.checkpoint_every=1")
    with pytest.raises(DiffpoError, match=r"at step 6\b.*checkpoint-000005"):
        train(config)
    assert len(metrics_of(config.output)) == 5 and (config.output / "checkpoint-000005").is_dir()


def test_a_link_of_scores_without_scores_is_refused(tiny_sd, make_config):
    with pytest.raises(DiffpoError, match=r"capo.*score_0"):
        train(make_config(tiny_sd, "objective.link=capo"))


def test_exploded_is_the_ratio_of_mean_errors():
    table = torch.zeros(2, 10)
    table[:, 8] = torch.tensor([0.1, 0.3])  # reference errors
    table[:, 3] = torch.tensor([0.5, 1.1])  # what the policy's are above them
    assert update.exploded(table) == pytest.approx((0.8 + 0.2) / 0.2)
    assert update.exploded(torch.zeros(2, 10)) == 0  # without a reference


def test_the_baseline_of_single_images_is_the_mean_reward_of_the_update_before(tiny_sdxl, make_config):
    """KTO's z0: 0 in the first update; the loss of the second shows it."""
    options = ("objective.name=diffusion_kto", "objective.beta=500", "train.steps=2", "train.lr=0.05")
    config = make_config(tiny_sdxl, *options, "train.checkpoint_every=1", "train.optimizer=torch.optim.SGD")
    train(config)
    first, second = metrics_of(config.output)
    assert first["loss"] == pytest.approx(0.5)
    from diffpo.train.checkpoint import read_state

    kept = read_state(config.output / "checkpoint-000002")["update"]["baseline"]
    assert kept == pytest.approx((second["rewards/chosen"] + second["rewards/rejected"]) / 2, rel=1e-4)
    assert read_state(config.output / "checkpoint-000001")["update"]["baseline"] == 0


def test_the_meter_counts_rows_forward_and_backward_and_can_pause():
    network = torch.nn.Linear(2, 1)
    meter = Meter(network, SimpleNamespace(num_processes=1))
    with torch.no_grad():
        network(torch.zeros(3, 2))
    network(torch.zeros(5, 2))
    with meter.paused():
        network(torch.zeros(7, 2))
    assert meter.totals() == {"calls/forward": 8.0, "calls/backward": 5.0}
    meter.load([100, 10])
    network(torch.zeros(1, 2))
    assert meter.state() == [101, 11]


def test_calls_of_an_update_are_those_of_policy_and_reference(tiny_sdxl, make_config):
    train(make_config(tiny_sdxl, "train.steps=2", "train.batch_size=4"))
    last = metrics_of(make_config(tiny_sdxl).output)[-1]
    assert (last["calls/forward"], last["calls/backward"]) == (2 * 2 * 8, 2 * 8)
    free = make_config(tiny_sdxl, "objective.name=simpo", "train.steps=1", "train.batch_size=4")
    import shutil

    shutil.rmtree(free.output)
    train(free)
    assert metrics_of(free.output)[-1]["calls/forward"] == 8


def test_metrics_of_single_images_by_hand():
    # loss, rewards, deltas, t, mean reward, preference, reference error, single
    table = torch.tensor(
        [
            [0.4, 1.0, 1.0, -0.1, -0.1, 0, 1.0, 1, 1, 1],
            [0.6, -0.5, -0.5, 0.2, 0.2, 9, -0.5, 0, 1, 1],
            [0.5, 0.3, 0.3, 0.1, 0.1, 9, 0.3, 0, 1, 1],
        ]
    )
    assert summarize(table, 1000) == pytest.approx(
        {
            "loss": 0.5,
            "rewards/chosen": 1.0,
            "rewards/rejected": -0.1,
            "rewards/margins": 1.1,
            "rewards/accuracies": 2 / 3,
            "error/chosen_delta": -0.1,
            "error/rejected_delta": 0.15,
        },
        abs=1e-6,
    )
