"""Scores to advantages, and the groups that policies are trained on: steps, filters, best-of-n, windows, pi_old."""

import numpy as np
import pytest
import torch
from on_policy import shake

from diffpo.config import AdvantageSettings, BehaviourSettings, Lora, Model, ObjectiveSettings
from diffpo.objective.reference import Behaviour
from diffpo.problems.policy import Policy
from diffpo.problems.transitions import sampler_steps
from diffpo.rollout import groups
from diffpo.scorers.judge import advantages
from diffpo.weights import lora, trained
from samplers import VPDiscrete

A, B = np.array([0.2, 0.9, 0.1, 0.4]), np.array([2.0, 2.6, 1.8, 2.0])
STEPS = {"steps": 4, "eta": 1.0}


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("mean", ["prompt", "round"])
@pytest.mark.parametrize("spread", ["prompt", "round", "none"])
def test_advantages_are_standardised_within_a_prompt_or_a_round(mean, spread):
    settings = AdvantageSettings(mean=mean, spread=spread, limit=1.2)
    found = advantages([column(*A), column(*B)], settings)
    both = np.concatenate([A, B])
    for own, ours in zip((A, B), found, strict=True):
        centre = own.mean() if mean == "prompt" else both.mean()
        unit = {"prompt": own.std(), "round": both.std(), "none": 1.0}[spread]
        np.testing.assert_allclose(ours, np.clip((own - centre) / unit, -1.2, 1.2))


def test_several_scores_are_standardised_before_they_are_averaged():
    two = torch.tensor(np.stack([A, 1000 * B], 1))
    (found,) = advantages([two], AdvantageSettings())
    np.testing.assert_allclose(found, ((A - A.mean()) / A.std() + (B - B.mean()) / B.std()) / 2)
    (equal,) = advantages([column(0.1, 0.1, 0.1)], AdvantageSettings(spread="none"))
    assert equal.tolist() == [0.0] * 3


def record(scores, prompt=2):
    """Images whose states and targets tell image and step."""
    scores = column(*scores)
    states = torch.arange(len(scores) * 5).float().view(len(scores), 5, 1, 1, 1)
    return groups.Sampled(0, prompt, states, scores, targets=-states[:, :4])


def settings(name="ddpo", **rollout):
    given = {"scorers": ["a"], "samples": 4, **STEPS, **rollout}
    return ObjectiveSettings.model_validate({"name": name, "rollout": given})


def harvest(records, chosen):
    steps = sampler_steps(chosen.rollout, VPDiscrete.scaled_linear(), "epsilon")
    return groups.harvest(records, chosen, steps, ["a"])


def test_every_noisy_step_of_every_image_has_its_images_advantage():
    found, metrics = harvest([record(A)], settings())
    assert len(found) == 4 * 3 == metrics["rollout/groups"]
    expected = (A - A.mean()) / A.std()
    for item in found:
        image, step = divmod(int(item.x[0].item()), 5)
        assert item.target[0].item() == -item.x[0].item() and item.at.t == (999, 749, 499, 249)[step]
        assert item.advantages[0] == pytest.approx(expected[image]) and item.preference == (expected[image] > 0)
    fewer, _ = harvest([record(A)], settings(transitions=2))
    assert {item.at.t for item in fewer} == {999, 749}


def test_best_of_n_keeps_both_ends_and_filters_leave_out_prompts_that_teach_little():
    found, _ = harvest([record(A)], settings(keep=3))
    assert {int(item.x[0].item()) // 5 for item in found} == {1, 3, 2}  # the two best and the worst
    whole = (A - A.mean()) / A.std()
    assert {round(item.advantages[0], 6) for item in found} == {round(whole[i], 6) for i in (1, 3, 2)}
    close = record([0.50, 0.51, 0.50, 0.51])
    found, metrics = harvest([record(A), close], settings(min_spread=0.02))
    assert len(found) == 12 and metrics["rollout/ties"] == 0.5
    assert harvest([record([0.1, 0.1, 0.1])], settings())[0] == []
    lists, _ = harvest([record(A)], settings("dgpo", keep=2))
    assert [item.advantages for item in lists] == [pytest.approx((whole[1], whole[2]))]
    pairs, _ = harvest([record(A)], settings("d3po", keep=2))
    assert {tuple(int(x.item()) // 5 for x in item.x) for item in pairs} == {(1, 2)} and len(pairs) == 3  # noisy steps


def test_a_window_moves_on_after_its_rounds_and_only_its_steps_are_trained_on(feed):
    made = feed("mix_grpo", step="ddim", eta=1.0, samples=2, steps=6, window=2, window_rounds=2)
    seen = []
    for number in range(10):
        made._fill(number)
        seen.append(sorted({item.at.t for item in made.items}, reverse=True))
    times = [step.t for step in made.rounds.walker.steps]
    first = [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]
    assert seen == [times[k : k + 2] for k in first]


def test_the_states_of_a_multistep_sampler_lead_to_their_targets(feed):
    """With guidance and history: the next input is the mean at the target, and z is standard normal."""
    made = feed("flow_grpo", step="dpmpp", step_options={"eta": 1.0, "order": 2}, samples=2, steps=5, same_noise=False)
    made.begin(0)
    residuals = []
    for item in made.items:
        given, t = made.rounds.conditions([item.prompt], 2.0), torch.tensor([item.at.t])
        with torch.no_grad():
            plain, without = (
                made.rounds.family.predict(made.network, item.x[0][None], t, each)
                for each in (given.cond, given.uncond)
            )
        out = without + 2.0 * (plain - without)
        step = item.at.transition
        residuals.append(step.outputs[0] * (item.target[0] - out[0]) / step.std)
    z = torch.stack(residuals)
    assert len(made.items) == 3 * 2 * 4 and abs(z.mean()) < 0.1 and abs(z.std() - 1) < 0.1


@pytest.fixture
def policy(tiny_sd):
    from diffpo import models

    family = models.load(Model(path=str(tiny_sd)))
    unet = family.load_network()
    shake(lora.add_lora(unet, Lora(rank=2), family.lora_targets), 0)
    return Policy(family, unet)


def weights(policy, name):
    return {key: value.detach().clone() for key, value in trained.of(policy.network).parameters(name).items()}


def test_pi_old_is_the_policy_at_the_start_of_the_round(policy):
    behaviour = Behaviour(BehaviourSettings(policy="sync"), policy, 3)
    start, seen = weights(policy, lora.ADAPTER), []
    for step in range(1, 5):
        shake(trained.of(policy.network).parameters(lora.ADAPTER).values(), step)
        behaviour.after_update(step)
        seen.append(behaviour.same)
        if step == 2:
            kept = weights(policy, lora.BEHAVIOUR)
            assert all(torch.equal(kept[name], value) for name, value in start.items())
        if step == 3:
            moved = weights(policy, lora.ADAPTER)
    assert seen == [False, False, True, False]
    kept, state = weights(policy, lora.BEHAVIOUR), behaviour.state()
    assert all(torch.equal(kept[name], value) for name, value in moved.items())
    behaviour.after_update(6)
    behaviour.load(state)
    assert not behaviour.same and all(torch.equal(weights(policy, lora.BEHAVIOUR)[n], v) for n, v in moved.items())


def test_rounds_of_one_update_need_no_copy(policy):
    behaviour = Behaviour(BehaviourSettings(policy="sync"), policy, 1)
    behaviour.after_update(1)
    assert behaviour.same and behaviour.state() == {} and lora.BEHAVIOUR not in policy.network.peft_config


def test_the_decay_of_pi_old_ramps_up_as_diffusion_nft_does(policy):
    """decay_n = min(0.5, 0.2 n), n the rounds before: 0, 0.2, 0.4, 0.5."""
    behaviour = Behaviour(BehaviourSettings(policy="ema", decay=0.5, ramp=0.2), policy, 2)
    name = next(iter(weights(policy, lora.ADAPTER)))
    expected = weights(policy, lora.ADAPTER)[name]
    for step in range(1, 9):
        shake(trained.of(policy.network).parameters(lora.ADAPTER).values(), step)
        behaviour.after_update(step)
        if step % 2 == 0:
            decay = min(0.5, 0.2 * (step // 2 - 1))
            expected = decay * expected + (1 - decay) * weights(policy, lora.ADAPTER)[name]
            assert behaviour.same == (decay == 0)
        torch.testing.assert_close(weights(policy, lora.BEHAVIOUR)[name], expected)


def test_pi_old_stands_beside_a_reference_of_its_own(policy):
    """Three models on one network: policy, reference, behaviour policy; and the base under them."""
    from diffpo.config import ReferenceSettings
    from diffpo.objective import reference

    moving = reference.make(ReferenceSettings(policy="ema", decay=0.5), policy)
    behaviour = Behaviour(BehaviourSettings(policy="sync"), policy, 2)
    shake(trained.of(policy.network).parameters(lora.ADAPTER).values(), 7)
    moving.after_update(1)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    cond = {"prompt_embeds": torch.randn(1, 16, 16)}

    def output(model):
        with torch.no_grad():
            return model.family.predict(model.network, x, t, cond)

    found = [output(policy)]
    for context in (moving.on(), behaviour.on(), policy.switched(None)):
        with context as model:
            found.append(output(model))
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert torch.equal(found[0], output(policy))
