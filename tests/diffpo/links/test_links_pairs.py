"""Links of pairs against their formulas in plain Python numbers, and the identities that the papers claim."""

import math
from math import exp, expm1, log

import pytest
import torch

from diffpo import links


def sigma(x: float) -> float:
    return 1 / (1 + exp(-x))


def s(error: float) -> float:  # MaPO's
    return 0.5 * error / expm1(0.5 * error)


def odds(error: float) -> float:
    p = exp(-error)
    return p / (1 - p)


def bernoulli_kl(a: float, b: float) -> float:
    return a * log(a / b) + (1 - a) * log((1 - a) / (1 - b))


# of rewards (c, r) and the score gap g, for a label that is right
OF_REWARDS = {
    ("sigmoid", ()): lambda c, r, g: -log(sigma(c - r)),
    ("sigmoid", (("smoothing", 0.1),)): lambda c, r, g: -0.9 * log(sigma(c - r)) - 0.1 * log(1 - sigma(c - r)),
    ("sigmoid", (("margin", 0.7),)): lambda c, r, g: -log(sigma(c - r - 0.7)),
    ("robust", ()): lambda c, r, g: (-0.9 * log(sigma(c - r)) + 0.1 * log(sigma(r - c))) / 0.8,
    ("robust", (("flip", 0.25),)): lambda c, r, g: (-0.75 * log(sigma(c - r)) + 0.25 * log(sigma(r - c))) / 0.5,
    ("ipo", ()): lambda c, r, g: (c - r - 0.5) ** 2,
    ("hinge", ()): lambda c, r, g: max(0, 1 - c + r),
    ("squared_sigmoid", ()): lambda c, r, g: (1 - sigma(c - r)) ** 2,
    ("nca", ()): lambda c, r, g: -log(sigma(c)) - log(sigma(-c)) / 2 - log(sigma(-r)) / 2,
    ("apo_zero", ()): lambda c, r, g: 1 - sigma(c) + sigma(r),
    ("apo_down", ()): lambda c, r, g: sigma(c) + 1 - sigma(c - r),
    ("sppo", ()): lambda c, r, g: (c - 0.5) ** 2 + (r + 0.5) ** 2,
    ("dpop", (("weight", 2.0),)): lambda c, r, g: -log(sigma(c - r - 2 * max(0, -c))),
    ("margin", (("scale", 0.5),)): lambda c, r, g: -log(sigma(c - r - 0.5 * g)),
    ("capo", (("scale", 2.0),)): lambda c, r, g: (c - r - 2 * g) ** 2,
    ("smpo", (("temperature", 0.3),)): lambda c, r, g: -log(sigma(10 * (2 * sigma(g / 0.3) - 1) * (c - r))),
    ("exo", ()): lambda c, r, g: bernoulli_kl(sigma(c - r), 0.99),
    ("rao_kupper", ()): lambda c, r, g: -log(exp(c) / (exp(c) + 3 * exp(r))),
    ("davidson", (("nu", 0.4),)): lambda c, r, g: -log(exp(c) / (exp(c) + exp(r) + 2 * 0.4 * exp((c + r) / 2))),
}
OF_ERRORS = {
    ("mapo", ()): lambda w, r: w - 0.1 * log(sigma(1000 * (s(w) - s(r)))),
    ("mapo", (("scale", 10.0), ("weight", 2.0))): lambda w, r: w - 2 * log(sigma(10 * (s(w) - s(r)))),
    ("orpo", ()): lambda w, r: w - 0.1 * log(sigma(log(odds(w)) - log(odds(r)))),
    ("asft", (("weight", 0.4),)): lambda w, r: w + 0.4 * (-log(sigma(log(odds(w)))) - log(sigma(-log(odds(r))))),
}
REWARDS = [(0.0, 0.0, 0.4), (1.5, -0.5, 0.1), (-3.0, 2.0, 1.3), (8.0, 7.5, -0.6)]


def tensors(**numbers: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([value], dtype=torch.float64) for name, value in numbers.items()}


@pytest.mark.parametrize(("chosen", "rejected", "gap"), REWARDS)
@pytest.mark.parametrize("case", OF_REWARDS, ids=str)
def test_links_of_rewards(case, chosen, rejected, gap):
    name, given = case
    quantities = tensors(chosen=chosen, rejected=rejected, gap=gap, preference=1.0)
    expected = OF_REWARDS[case](chosen, rejected, gap)
    assert links.losses(name, dict(given), quantities).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("chosen", "rejected"), [(0.2, 0.2), (0.1, 0.104), (0.3, 0.297), (1e-4, 2e-3), (3.0, 2.995)])
@pytest.mark.parametrize("case", OF_ERRORS, ids=str)
def test_links_of_errors(case, chosen, rejected):
    name, given = case
    quantities = tensors(chosen_error=chosen, rejected_error=rejected, preference=1.0)
    expected = OF_ERRORS[case](chosen, rejected)
    assert links.losses(name, dict(given), quantities).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["mapo", "orpo", "asft"])
def test_a_smaller_error_of_the_chosen_image_and_a_larger_one_of_the_rejected_are_better(name):
    chosen, rejected = torch.tensor([0.2, 0.3], dtype=torch.float64).requires_grad_()
    gradient = torch.autograd.grad(links.get(name)(chosen, rejected), (chosen, rejected))
    assert gradient[0] > 0 > gradient[1]


@pytest.mark.parametrize("p", [1.0, 0.75, 0.5])
@pytest.mark.parametrize(("chosen", "rejected", "_gap"), REWARDS)
def test_soft_labels_of_the_links_that_take_them(chosen, rejected, _gap, p):
    u = chosen - rejected
    quantities = tensors(chosen=chosen, rejected=rejected, preference=p)
    cross_entropy = -p * log(sigma(u)) - (1 - p) * log(1 - sigma(u))
    assert links.losses("sigmoid", {}, quantities).item() == pytest.approx(cross_entropy, rel=1e-12)
    shifted = -p * log(sigma(u - 0.7)) - (1 - p) * log(sigma(-u - 0.7))  # either winner wins by the margin
    assert links.losses("sigmoid", {"margin": 0.7}, quantities).item() == pytest.approx(shifted, rel=1e-12)
    target = p * 0.9 + (1 - p) * 0.1
    expected = bernoulli_kl(sigma(u), target)
    assert links.losses("exo", {"epsilon": 0.1}, quantities).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_sigmoid_link_gradient_is_sigma_minus_p():
    rewards = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    preference = torch.tensor([1, 0.9, 0.5, 0.7, 1], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(links.get("sigmoid")(*rewards, preference).sum(), rewards)
    expected = torch.sigmoid(rewards[0] - rewards[1]) - preference  # d/du of the cross-entropy
    torch.testing.assert_close(gradient, torch.stack([expected, -expected]))


@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_exo_is_dmpo_and_the_kl_of_two_bernoullis(alpha):
    from torch.distributions import Bernoulli, kl_divergence

    u = torch.linspace(-6, 6, 25, dtype=torch.float64)
    quantities = {"chosen": u, "rejected": 0 * u, "preference": 0 * u + 1}
    dmpo = kl_divergence(Bernoulli(logits=u), Bernoulli(torch.tensor(1 - alpha, dtype=torch.float64)))
    torch.testing.assert_close(links.losses("exo", {"epsilon": alpha}, quantities), dmpo)
    # as EXO writes it: the policy's own softmax over the pair against the smoothed label's
    pair = torch.stack([u, 0 * u]).log_softmax(0)
    label = torch.tensor([1 - alpha, alpha], dtype=torch.float64)[:, None]
    exo = (pair.exp() * (pair - label.log())).sum(0)
    torch.testing.assert_close(exo, dmpo)


@pytest.mark.parametrize(("name", "p", "best"), [("ipo", 1.0, 0.5), ("ipo", 0.7, 0.2), ("exo", 1.0, log(99))])
def test_where_the_loss_is_least(name, p, best):
    u = torch.linspace(best - 1, best + 1, 2001, dtype=torch.float64)
    loss = links.losses(name, {}, {"chosen": u, "rejected": 0 * u, "preference": 0 * u + p})
    assert u[loss.argmin()].item() == pytest.approx(best, abs=1e-9)


def test_robust_is_unbiased_under_flipped_labels():
    given = tensors(chosen=0.8, rejected=-0.5, preference=1.0)
    noisy = given | tensors(preference=0.7)  # what 30 % flipped labels are on average
    torch.testing.assert_close(links.losses("robust", {"flip": 0.3}, noisy), links.losses("sigmoid", {}, given))


@pytest.mark.parametrize("u", [-3.0, 0.0, 0.4, 7.0])
@pytest.mark.parametrize(
    ("name", "option", "even"),
    [("rao_kupper", {"threshold": 0.5}, math.tanh(0.25)), ("davidson", {"nu": 0.3}, 0.6 / 2.6)],
)
def test_tie_models_are_likelihoods(name, option, even, u):
    win, tie, loss = (
        exp(-links.losses(name, option, tensors(chosen=u, rejected=0, preference=p)).item()) for p in (1, 0.5, 0)
    )
    assert win + tie + loss == pytest.approx(1, abs=1e-12)
    assert win / loss == pytest.approx(exp(u)) or name == "rao_kupper"  # Davidson keeps Bradley-Terry's odds
    if u == 0:
        assert tie == pytest.approx(even)
    half = links.losses(name, option, tensors(chosen=u, rejected=0, preference=0.75)).item()
    assert half == pytest.approx(-(log(win) + log(tie)) / 2)


def test_default_tie_models_call_half_of_all_even_matches_ties():
    for name in ("rao_kupper", "davidson"):
        assert links.losses(name, {}, tensors(chosen=1, rejected=1, preference=0.5)).item() == pytest.approx(log(2))
