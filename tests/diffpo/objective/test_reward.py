"""Rewards from errors, and what the terms of an objective do to them."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch

from diffpo.config import ObjectiveSettings
from diffpo.data.judgement import Judgement
from diffpo.objective.reference import Reference
from diffpo.objective.reward import Objective, group_losses, implicit_reward, safeguard_winner, score, squared_error
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning, Regression
from samplers.prediction import guide


class Family:
    """A network that is one number, scale: prediction = scale * x_t + shift(cond)."""

    guided = staticmethod(guide)

    def predict(self, network, x_t, t, cond):
        return network(x_t) + cond["shift"].view(-1, 1, 1, 1)


class Network(torch.nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x):
        return self.scale * x


class Fixed(Reference):
    """Another network as the reference."""

    @contextlib.contextmanager
    def on(self):
        with torch.no_grad():
            yield self.policy


def policy(scale: float) -> Policy:
    return Policy(Family(), Network(scale))


def objective(reference=None, omega=None, **given) -> Objective:
    settings = ObjectiveSettings.model_validate({"name": "diffusion_dpo", "beta": 4.0, **given})
    return Objective(settings, reference or Fixed(policy(1.0)), omega or (lambda t: torch.ones(len(t))))


def problem(members: int = 2, groups: int = 3, seed: int = 0, **given) -> Regression:
    draw = torch.Generator().manual_seed(seed)
    rows = members * groups
    x_t, target = (torch.randn(rows, 2, 3, 3, generator=draw) for _ in range(2))
    conditioning = {"cond": {"shift": torch.randn(rows, generator=draw)}, **given.pop("conditioning", {})}
    return Regression(
        x_t=x_t,
        t=torch.arange(groups).repeat(members),
        target=target,
        conditioning=Conditioning(**conditioning),
        judgement=Judgement(torch.ones(groups), members, given.pop("scores", None)),
        **given,
    )


def errors(regression: Regression, scale: float) -> list[float]:
    """By hand: mean of (scale x + shift - target)^2."""
    result = []
    for x, shift, y in zip(regression.x_t, regression.conditioning.cond["shift"], regression.target, strict=True):
        residual = (scale * x + shift - y).flatten().tolist()
        result.append(sum(v * v for v in residual) / len(residual))
    return result


def test_reward_is_half_beta_k_omega_times_the_gain_in_error():
    regression = problem(weight=torch.tensor([1.0, 2, 3, 4, 5, 6]))
    omega = {0: 1.0, 1: 0.5, 2: 0.25}
    network = policy(0.5)
    chosen = objective(omega=lambda t: torch.tensor([omega[int(each)] for each in t]))
    outcome = score(network, chosen, regression)
    ours, theirs = errors(regression, 0.5), errors(regression, 1.0)
    expected = [
        2.0 * k * omega[i % 3] * (b - a) for i, (a, b, k) in enumerate(zip(ours, theirs, range(1, 7), strict=True))
    ]
    assert outcome.reward.tolist() == pytest.approx(expected, rel=1e-5)
    assert outcome.margin.tolist() == pytest.approx([expected[i] - expected[3 + i] for i in range(3)], rel=1e-4)
    drift = [(0.5 * x).square().mean().item() for x in regression.x_t]
    assert outcome.drift.tolist() == pytest.approx(drift, rel=1e-5)


def test_without_a_reference_the_reward_is_minus_half_beta_times_the_error():
    regression, network = problem(), policy(0.5)
    free = objective(Reference(network, free=True))
    outcome = score(network, free, regression)
    assert outcome.reward.tolist() == pytest.approx([-2.0 * e for e in errors(regression, 0.5)], rel=1e-5)
    assert not outcome.reference_error.any() and not outcome.drift.any()


def test_swapping_chosen_and_rejected_negates_u():
    regression, network = problem(), policy(0.7)
    order = [3, 4, 5, 0, 1, 2]
    swapped = replace(
        regression,
        x_t=regression.x_t[order],
        target=regression.target[order],
        conditioning=Conditioning({"shift": regression.conditioning.cond["shift"][order]}),
    )
    u = score(network, objective(), regression).margin
    assert torch.equal(score(network, objective(), swapped).margin, -u) and u.abs().min() > 0


def test_mean_and_sum_of_squares_are_one_objective_with_betas_that_differ_by_the_dimension():
    prediction, base, target = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    mean = implicit_reward(squared_error(prediction, target), squared_error(base, target), beta=500.0)
    summed = [(x - y).square().sum() for x, y in zip(prediction, target, strict=True)]
    base_summed = [(x - y).square().sum() for x, y in zip(base, target, strict=True)]
    expected = [(500.0 / 50) / 2 * (b - a).item() for a, b in zip(summed, base_summed, strict=True)]
    assert mean.tolist() == pytest.approx(expected, rel=1e-4)


def test_clip_bounds_the_likelihood_ratio_and_stops_its_gradient():
    error = torch.tensor([0.5, 0.5, 0.5], requires_grad=True)
    reference = torch.tensor([0.55, 0.9, 0.1])
    reward = implicit_reward(error, reference, beta=0.2, weight=torch.ones(3), clip=0.1)
    assert reward.tolist() == pytest.approx([0.1 * 0.05, 0.1 * math.log(1.1), 0.1 * math.log(0.9)], rel=1e-5)
    (gradient,) = torch.autograd.grad(reward.sum(), error)
    assert gradient.tolist() == pytest.approx([-0.1, 0, 0])


def test_guidance_is_part_of_the_policy():
    regression = problem(conditioning={"uncond": {"shift": torch.full((6,), 0.25)}, "guidance": 3.0})
    network = policy(0.5)
    outcome = score(network, objective(), regression)
    guided = 0.25 + 3.0 * (regression.conditioning.cond["shift"] - 0.25)
    plain = replace(regression, conditioning=Conditioning({"shift": guided}))
    expected = score(network, objective(), plain).reward
    torch.testing.assert_close(outcome.reward, expected, rtol=1e-4, atol=1e-4)


def test_the_safeguard_keeps_a_step_from_raising_the_winners_error():
    """The winner's error is quadratic in the prediction, so a small step along the safeguarded gradient shows it."""
    draw = torch.Generator().manual_seed(3)
    target = torch.randn(8, 1, 4, 4, generator=draw, dtype=torch.float64)
    shared = torch.randn(4, 1, 4, 4, generator=draw, dtype=torch.float64)
    prediction = (target + torch.cat([0.3 * shared, 2 * shared])).requires_grad_()
    plain = (prediction - target).square().flatten(1).mean(1)
    (of_winner,) = torch.autograd.grad(plain[:4].sum(), prediction, retain_graph=True)
    of_winner = of_winner[:4]

    def fall(errors):
        """-d err_winner / d rate along the step, one prediction shifted for both images, as if they shared weights."""
        winner, loser = errors.chunk(2)
        (gradient,) = torch.autograd.grad((winner - loser).sum(), prediction, retain_graph=True)
        return (of_winner * (gradient[:4] + gradient[4:])).flatten(1).sum(1)

    assert (fall(plain) < 0).all()  # unguarded, the winner's error rises
    for mu in (0.2, 0.9):
        guarded = safeguard_winner(plain, prediction, target, mu)
        assert torch.equal(guarded, plain)  # values stay
        bound = mu * of_winner.square().flatten(1).sum(1)
        torch.testing.assert_close(fall(guarded), bound, rtol=1e-5, atol=0)  # met exactly where lambda < 1


def test_the_sft_term_is_the_better_images_error():
    regression, network = problem(), policy(0.5)
    with_term = objective(sft=0.3, link_weight=2.0)
    outcome = score(network, with_term, regression)
    zero = torch.tensor(0.0)
    link = [math.log1p(math.exp(-u)) for u in outcome.margin.tolist()]
    expected = [2.0 * l + 0.3 * e for l, e in zip(link, errors(regression, 0.5)[:3], strict=True)]
    assert group_losses(outcome, with_term.settings, zero).tolist() == pytest.approx(expected, rel=1e-5)


def test_pairs_serve_links_of_single_images():
    regression, network = problem(), policy(0.5)
    kto = objective(link="kto")
    outcome = score(network, kto, regression)
    losses = group_losses(outcome, kto.settings, torch.tensor(0.0))
    expected = [
        0.5 * (1 / (1 + math.exp(w)) + 1 / (1 + math.exp(-l)))
        for w, l in zip(outcome.reward[:3].tolist(), outcome.reward[3:].tolist(), strict=True)
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)
    apart = replace(regression, judgement=Judgement(torch.tensor([1.0, 1, 1, 0, 0, 0]), 1))
    alone = score(network, kto, apart)
    assert group_losses(alone, kto.settings, torch.tensor(0.0)).mean().item() == pytest.approx(losses.mean().item())


def test_lists_are_scored_row_by_row():
    regression, network = problem(members=3, groups=2, scores=torch.tensor([[3.0, 9], [2, 5], [1, 1]])), policy(0.5)
    ranked = objective(link="plackett_luce")
    outcome = score(network, ranked, regression)
    reward = [2.0 * (b - a) for a, b in zip(errors(regression, 0.5), errors(regression, 1.0), strict=True)]
    for i, loss in enumerate(group_losses(outcome, ranked.settings, torch.tensor(0.0)).tolist()):
        r = reward[i::2]
        expected = sum(math.log(sum(math.exp(x) for x in r[k:])) - r[k] for k in range(2))
        assert loss == pytest.approx(expected, rel=1e-4)


def test_a_regression_whose_rows_make_no_groups_is_an_error():
    with pytest.raises(ValueError, match="6 problems are not 2 groups of 2"):
        replace(problem(), judgement=Judgement(torch.ones(2)))


def test_scores_give_the_gap():
    regression, network = problem(scores=torch.tensor([[0.9, 0.5, 0.4], [0.1, 0.6, 0.4]])), policy(0.5)
    outcome = score(network, objective(), regression)
    assert outcome.quantities(torch.tensor(0.0))["gap"].tolist() == pytest.approx([0.8, -0.1, 0.0])


def test_a_mask_of_zeros_and_ones_is_the_reward_of_the_picture_cut_out():
    inside = torch.zeros(6, 1, 3, 3)
    inside[..., :2, 1:] = 1
    whole = problem()
    cut = replace(whole, x_t=whole.x_t[..., :2, 1:], target=whole.target[..., :2, 1:])
    masked = replace(whole, mask=inside / inside.mean((2, 3), keepdim=True))
    found, expected = (score(policy(0.7), objective(), each) for each in (masked, cut))
    for name in ("error", "reference_error", "drift", "reward"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert not torch.allclose(found.reward, score(policy(0.7), objective(), whole).reward)


def test_nothing_is_learnt_from_what_the_mask_leaves_out():
    prediction, target = torch.randn(2, 6, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(6, 1, 3, 3)
    mask[..., 2] = 0
    (slope,) = torch.autograd.grad(squared_error(prediction.requires_grad_(), target, mask).sum(), prediction)
    assert (slope[..., 2] == 0).all() and (slope[..., :2] != 0).all()
