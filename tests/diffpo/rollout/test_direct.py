"""Reward fine-tuning: its gradients against plain autograd, its draws, its refusals, and that the reward rises."""

import pytest
import torch
from on_policy import PROMPTS, shake
from pydantic import ValidationError
from tiny import metrics_of

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.common.rng import generator, normal
from diffpo.config import Lora, Model, ObjectiveSettings
from diffpo.data.order import order
from diffpo.problems.policy import Policy
from diffpo.problems.transitions import sampler_steps
from diffpo.rollout.direct import Direct
from diffpo.rollout.prompts import PromptConditions
from diffpo.train.loop import train
from diffpo.weights import lora, lora_file

SEED = 5
RED = {"scorers": ["on_policy:Redness"]}


@pytest.fixture
def direct(tiny_sd, make_config):
    """direct(name, **direct): a Direct, its policy and the policy's parameters."""
    family = models.load(Model(path=str(tiny_sd)))
    family.load_encoders()
    conditions = PromptConditions(PROMPTS, make_config(tiny_sd).data, family)
    family.free_encoders(keep_vae=True)

    def make(name="draft", steps=4, eta=1.0, **choices):
        network = family.load_network()
        parameters = lora.add_lora(network, Lora(rank=4), family.lora_targets)
        shake(parameters, 0)
        rollout = {"steps": steps, "eta": eta, "guidance": 2.0, **RED}
        settings = ObjectiveSettings(name=name, rollout=rollout, direct=choices)
        policy = Policy(family, network)
        return Direct(settings, conditions, policy, SEED), policy, parameters

    return make


def slopes(direct, policy, parameters, positions):
    losses, scores = direct.losses(policy, positions)
    return losses.detach(), scores, torch.autograd.grad(losses.sum(), parameters)


def plain(direct, policy, parameters, positions, last, stop=None):
    """The same by the sampler's own steps, with all activations kept. stop: judge the x_0 predicted at that call."""
    family, rollout = policy.family, direct.settings.rollout
    steps = sampler_steps(rollout, family.schedule(), family.prediction)
    rows = [order(SEED, len(PROMPTS), position) for position in positions]
    given = direct.conditions(rows, rollout.guidance)
    draws = [generator(SEED, "reward noise", position) for position in positions]
    x = normal(draws, (4, 8, 8))
    for k, step in enumerate(steps):
        with torch.set_grad_enabled(k >= len(steps) - last if stop is None else k == stop):
            t = torch.full((len(x),), step.t)
            out = policy.output(x, t, given)
            if k == stop:
                x = family.to_x_0(out, x, t)
                break
            x = step.transition.sample(x, out, normal(draws, (4, 8, 8)) if step.transition.std else None)
    scores = (family.decoded(x) / 2 + 0.5).clamp(0, 1)[:, 0].mean((1, 2))
    return -scores.detach(), scores.detach(), torch.autograd.grad(-scores.sum(), parameters)


def same(found, expected, tolerance=1e-4):
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    size = max(each.abs().max() for each in expected[2])
    assert all((a - b).abs().max() <= tolerance * size for a, b in zip(found[2], expected[2], strict=True))


@pytest.mark.parametrize("last", [1, 2, 4])
def test_gradients_are_those_of_plain_autograd(direct, last):
    made = direct(calls=last)
    same(slopes(*made, range(3)), plain(*made, range(3), last))


def test_alignprop_draws_one_number_of_calls_for_an_update(direct):
    made = direct("alignprop", truncation="random")
    drawn = []
    for step in range(6):
        made[0].begin(step)
        drawn.append(made[0]._drawn())
    assert set(drawn) <= {1, 2, 3, 4} and len(set(drawn)) > 1
    same(slopes(*made, range(2)), plain(*made, range(2), drawn[-1]))


def test_refl_judges_the_prediction_of_one_late_step(direct):
    made = direct("refl", calls=2)
    made[0].begin(3)
    losses, scores, grads = slopes(*made, range(2))
    stop = 4 - made[0]._drawn()
    weight = made[0].settings.link_weight
    same((losses / weight, scores, [g / weight for g in grads]), plain(*made, range(2), 0, stop=stop))


def test_copies_are_judged_at_the_last_level(direct):
    """DRaFT-LV: the mean over the copies. With many of them it nears a smooth reward's own value at the image."""
    one, many = direct(calls=1, eta=0.0), direct(calls=1, eta=0.0, copies=3)
    losses, _, grads = slopes(*many, range(2))
    assert all(g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)
    assert torch.allclose(losses, slopes(*one, range(2))[0], atol=0.05)  # sigma at the last call is small


def test_an_image_does_not_depend_on_the_others_of_its_batch(direct):
    made = direct(calls=2)
    together = slopes(*made, range(4))
    parts = [slopes(*made, part) for part in (range(2), range(2, 4))]
    joined = (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
    same(together, (*joined, [sum(each) for each in zip(*(p[2] for p in parts), strict=True)]))


def test_a_ceiling_stops_the_gradient(direct):
    *_, grads = slopes(*direct(calls=1, ceiling=0.0), range(2))
    assert all((each == 0).all() for each in grads)


COMMON = (
    "objective.name=draft",
    "objective.rollout.steps=3",
    "objective.rollout.guidance=1",
    "objective.rollout.scorers=[on_policy:Redness]",
    "data.train=null",
    "train.batch_size=4",
)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return f"data.prompts={path}"


def test_training_raises_the_reward(tiny_sd, make_config, prompts):
    more = ("objective.direct.calls=null", "objective.rollout.steps=2", "train.steps=8", "train.lr=0.1")
    config = make_config(tiny_sd, *COMMON, prompts, *more)
    train(config)
    rows = metrics_of(config.output)
    scores = [row["rollout/score"] for row in rows]
    assert sum(scores[-2:]) / 2 > sum(scores[:2]) / 2 + 0.012, scores
    assert rows[0]["calls/backward"] == 4 * 2 and rows[0]["calls/forward"] == 4 * 2 * 2  # each call is repeated once


def test_a_resumed_run_and_other_batches_change_nothing(tiny_sd, make_config, prompts, tmp_path):
    def weights(name, *more):
        config = make_config(tiny_sd, *COMMON, prompts, "objective.rollout.eta=1", f"output={tmp_path / name}", *more)
        train(config)
        return lora_file.read_lora(config.output)[0]

    straight = weights("straight", "train.steps=2")
    weights("resumed", "train.steps=1")
    cut = ("train.batch_size=2", "train.accumulation=2")
    for found in (weights("resumed", "train.steps=2"), weights("cut", "train.steps=2", *cut)):
        assert all(torch.allclose(found[name], straight[name], atol=1e-5) for name in straight)


def test_refl_with_the_pretraining_loss(tiny_sd, make_config, prompts, pairs_parquet):
    more = (f"data.train={pairs_parquet}", "objective.name=refl", "objective.sft=1", "train.steps=1")
    config = make_config(tiny_sd, *COMMON, prompts, "objective.direct.calls=2", *more)
    train(config)
    (row,) = metrics_of(config.output)
    error = row["loss"] + 1e-3 * row["rollout/score"]
    assert 0.5 < error < 2.0  # of an untrained network that should return noise


def test_a_scorer_without_gradient_is_refused(tiny_sd, make_config, prompts):
    config = make_config(tiny_sd, *COMMON[:3], *COMMON[4:], prompts, "objective.rollout.scorers=[shapes.total]")
    with pytest.raises(DiffpoError, match=r"shapes\.total has no gradient.*pickscore"):
        train(config)


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"link": "ipo"}, "source reward has none: leave link out"),
        ({"reference": {"policy": "adapter_off"}}, "set reference.policy=none"),
        ({"rollout": {"scorers": ["pickscore", "clip"]}}, "follows one score"),
        ({"rollout": {"scorers": []}}, "follows one score"),
        ({"direct": {"calls": 51}}, "more than rollout.steps=50"),
        ({"direct": {"copies": 2, "calls": 2}}, "set direct.calls=1"),
        ({"winner_safeguard": 0.5}, "leave them out"),
    ],
)
def test_compositions_without_sense_are_refused(choice, reason):
    with pytest.raises(ValidationError, match=reason):
        ObjectiveSettings.model_validate({"name": "draft", "rollout": RED, **choice})
