import pytest
import torch
from torch.distributions import Normal

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Lora, Model, RolloutSettings
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning
from diffpo.problems.transitions import StepGroup, regression, sampler_steps
from diffpo.weights import lora
from samplers import VPDiscrete, convert

SCHEDULE = VPDiscrete.scaled_linear()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("step", ["ddim", "renoise"])
def test_the_weighted_error_is_the_log_likelihood_ratio_of_the_step(prediction, step):
    """Against DDIM written out from its paper (eq. 12, 16), or re-noising, and torch's Normal."""
    settings = RolloutSettings(steps=10, eta=0.7, step=step)
    cumulative = torch.tensor(SCHEDULE.alpha((torch.arange(1000).double() + 1) / 1000)) ** 2
    steps = sampler_steps(settings, SCHEDULE, prediction)
    assert [each.t for each in steps] == list(range(999, 0, -100))
    for k, each in enumerate(steps[:-1]):
        x, x_next, policy, reference = (random(2, 4, 8, 8, seed=10 * k + i) for i in range(4))
        now, then = cumulative[each.t], cumulative[steps[k + 1].t]
        std = 0.7 * ((1 - then) / (1 - now) * (1 - now / then)).sqrt() if step == "ddim" else (1 - then).sqrt()

        def likelihood(out, x=x, x_next=x_next, now=now, then=then, std=std):
            eps = convert(x, out, prediction, "epsilon", now.sqrt(), (1 - now).sqrt())
            x_0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
            mean = then.sqrt() * x_0 + ((1 - then - std**2).clamp(min=0).sqrt() * eps if step == "ddim" else 0)
            return Normal(mean, std).log_prob(x_next).mean((1, 2, 3))

        target = each.transition.target(x, x_next)
        error, reference_error = ((out - target).square().mean((1, 2, 3)) for out in (policy, reference))
        ratio = each.transition.weight * (reference_error - error)
        torch.testing.assert_close(ratio, likelihood(policy) - likelihood(reference), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("step", ["ddim", "renoise"])
def test_the_last_step_has_no_noise_and_gives_the_image_estimate(step):
    last = sampler_steps(RolloutSettings(steps=5, step=step), SCHEDULE, "v_prediction")[-1]
    x, out = random(1, 4, 8, 8), random(1, 4, 8, 8, seed=1)
    assert last.transition.std == 0
    x_0 = convert(x, out, "v_prediction", "sample", last.alpha, last.sigma)
    torch.testing.assert_close(last.transition.mean(x, out), x_0)


def test_more_steps_than_labels_are_refused_by_name():
    with pytest.raises(DiffpoError, match=r"objective\.rollout\.steps=1001"):
        sampler_steps(RolloutSettings(steps=1001), SCHEDULE, "epsilon")


def test_guidance_extrapolates_from_the_empty_prompt(tiny_sd):
    family = models.load(Model(path=str(tiny_sd)))
    unet, t = family.load_network(), torch.tensor([300, 300])
    x = random(2, 4, 8, 8).float()
    prompted, empty = ({"prompt_embeds": random(2, 16, 16, seed=i).float()} for i in (1, 2))
    policy = Policy(family, unet)
    with torch.no_grad():
        plain = family.predict(unet, x, t, prompted)
        assert torch.equal(policy.output(x, t, Conditioning(prompted)), plain)
        expected = 5 * plain - 4 * family.predict(unet, x, t, empty)
        torch.testing.assert_close(
            policy.output(x, t, Conditioning(prompted, empty, 5.0)), expected, rtol=1e-4, atol=1e-5
        )


def conditioning(prompts):
    rows = torch.tensor(prompts, dtype=torch.float32)
    cond = {"prompt_embeds": rows.view(-1, 1, 1).expand(-1, 16, 16)}
    return Conditioning(cond, {"prompt_embeds": torch.zeros(len(rows), 16, 16)}, 5.0)


def test_a_regression_is_laid_out_by_member_and_starts_at_no_reward(tiny_sd_v):
    from diffpo.config import ObjectiveSettings, ReferenceSettings
    from diffpo.objective import reference
    from diffpo.objective.reward import Objective, score

    family = models.load(Model(path=str(tiny_sd_v)))
    unet = family.load_network()
    lora.add_lora(unet, Lora(rank=2), family.lora_targets)
    steps = sampler_steps(RolloutSettings(steps=4), family.schedule(), family.prediction)
    states = random(2, 5, 4, 8, 8).float()

    def target(k, member):
        return steps[k].transition.target(states[member, k], states[member, k + 1])

    items = [
        StepGroup(7, steps[k], (states[0, k], states[1, k]), (target(k, 0), target(k, 1)), (2.0, 1.0)) for k in (0, 2)
    ]
    found = regression(items, conditioning, "cpu")
    assert found.t.tolist() == [999, 499, 999, 499] and found.judgement.members == 2
    assert torch.equal(found.x_t, states[[0, 0, 1, 1], [0, 2, 0, 2]])
    assert found.conditioning.cond["prompt_embeds"][:, 0, 0].tolist() == [7.0] * 4
    assert found.conditioning.guidance == 5.0
    assert found.judgement.scores.tolist() == [[2.0, 2.0], [1.0, 1.0]]
    # the target is what would have led there without noise
    again = steps[2].transition.mean(found.x_t[3], found.target[3])
    torch.testing.assert_close(again, states[1, 3])

    settings = ObjectiveSettings(name="d3po", rollout={"scorers": ["shapes.total"]})
    policy = Policy(family, unet)
    made = reference.make(ReferenceSettings(), policy)
    outcome = score(policy, Objective(settings, made, torch.ones_like), found)
    assert torch.equal(outcome.reward, torch.zeros(4)) and outcome.reward.requires_grad
