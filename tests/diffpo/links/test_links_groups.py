"""Links of single images, of lists and of predictions, and divergences, against formulas written out here."""

from math import exp, log

import pytest
import torch

from diffpo import links
from diffpo.common.errors import DiffpoError
from diffpo.links import divergences


def sigma(x: float) -> float:
    return 1 / (1 + exp(-x))


def tensors(**numbers: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([value], dtype=torch.float64) for name, value in numbers.items()}


OF_A_REWARD = {  # liked or not, the baseline being z
    ("kto", ()): lambda x, liked, z: 1 - sigma(x - max(z, 0)) if liked else 1 - sigma(max(z, 0) - x),
    ("kto", (("undesirable_weight", 3.0),)): lambda x, liked, z: (
        1 - sigma(x - max(z, 0)) if liked else 3 * (1 - sigma(max(z, 0) - x))
    ),
    ("bco", ()): lambda x, liked, z: -log(sigma(x - z)) if liked else -log(sigma(z - x)),
    ("ddo", (("alpha", 5.0),)): lambda x, liked, z: -log(sigma(x)) if liked else -5 * log(1 - sigma(x)),
}


@pytest.mark.parametrize("liked", [1.0, 0.0, 0.3])
@pytest.mark.parametrize(("reward", "baseline"), [(0.0, 0.0), (1.2, 0.5), (-2.0, -0.7)])
@pytest.mark.parametrize("case", OF_A_REWARD, ids=str)
def test_links_of_single_rewards(case, reward, baseline, liked):
    name, given = case
    formula = OF_A_REWARD[case]
    expected = liked * formula(reward, True, baseline) + (1 - liked) * formula(reward, False, baseline)
    quantities = tensors(reward=reward, liked=liked) | {"baseline": torch.tensor(baseline, dtype=torch.float64)}
    assert links.losses(name, dict(given), quantities).item() == pytest.approx(expected, rel=1e-12)


def test_kto_without_a_baseline_on_the_images_of_a_pair_is_apo_zero():
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one, zero = torch.ones_like(chosen), torch.tensor(0.0)
    singles = links.get("kto")(chosen, one, zero) + links.get("kto")(rejected, 0 * one, zero)
    torch.testing.assert_close(singles, links.get("apo_zero")(chosen, rejected))


@pytest.mark.parametrize(("name", "at"), [("kto", 0.6), ("bco", 0.6), ("ddo", 0.0)])
def test_an_image_neither_liked_nor_disliked_does_not_pull_at_the_baseline(name, at):
    reward = torch.tensor([at], dtype=torch.float64).requires_grad_()
    quantities = {"reward": reward, "liked": torch.tensor([0.5]), "baseline": torch.tensor(0.6, dtype=torch.float64)}
    (gradient,) = torch.autograd.grad(links.losses(name, {}, quantities).sum(), reward)
    assert gradient.abs().item() < 1e-8


def vectors() -> tuple[torch.Tensor, ...]:
    """Predictions of policy (with gradient) and reference, and the target: (6, 8) each, and 6 numbers in 0..1."""
    draw = torch.Generator().manual_seed(2)
    policy, reference, target = torch.randn(3, 6, 8, dtype=torch.float64, generator=draw)
    return policy.requires_grad_(), reference, target, torch.rand(6, dtype=torch.float64, generator=draw)


@pytest.mark.parametrize("mix", [1.0, 0.1])
def test_nft_is_its_two_branches_and_its_gradient_a_regression(mix):
    policy, old, target, liked = vectors()
    error, reference_error, drift = (
        (a - b).square().mean(1) for a, b in ((policy, target), (old, target), (policy, old))
    )
    loss = links.get("nft")(error, reference_error, drift, liked, mix=mix)
    plus, minus = mix * policy + (1 - mix) * old, (1 + mix) * old - mix * policy
    branches = [(each - target).square().mean(1) for each in (plus, minus)]
    torch.testing.assert_close(loss, (liked * branches[0] + (1 - liked) * branches[1]) / mix)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    improved = old + ((2 * liked - 1) / mix)[:, None] * (target - old)
    torch.testing.assert_close(gradient, mix * 2 * (policy - improved).detach() / 8)


def test_dspo_on_real_vectors_and_its_factor_takes_no_gradient():
    policy, reference, target, u = vectors()
    error, reference_error, drift = (
        (a - b).square().mean(1) for a, b in ((policy, target), (reference, target), (policy, reference))
    )
    u = u + 0 * error.detach()
    reward = u + 100 * (reference_error - error)  # a gradient through sigma(u) would show
    loss = links.get("dspo")(reward, reward.detach() - u, error, reference_error, drift, weight=0.6)
    factor = 0.6 * (1 - torch.sigmoid(u))[:, None]
    expected = ((policy - target) - factor * (policy - reference)).square().mean(1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), policy) for each in (loss, expected)))


def test_sft_is_the_error_of_liked_images():
    loss = links.losses("sft", {}, tensors(error=0.3, liked=0.25))
    assert loss.item() == pytest.approx(0.075)


def test_plackett_luce_is_a_sequence_of_choices():
    rewards = torch.tensor([[0.3], [1.4], [-0.6], [0.1]], dtype=torch.float64)
    probability, values = 1.0, rewards[:, 0].tolist()
    for i in range(4):
        probability *= exp(values[i]) / sum(map(exp, values[i:]))
    assert links.losses("plackett_luce", {}, {"rewards": rewards}).item() == pytest.approx(-log(probability), rel=1e-12)


def test_lists_of_two_are_pairs():
    rewards = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    pairs = links.get("sigmoid")(*rewards, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(links.get("plackett_luce")(rewards), pairs)
    scores = torch.tensor([[7.0], [4.0]], dtype=torch.float64).expand(2, 5)
    torch.testing.assert_close(links.get("rankdpo")(rewards, scores, spread=1), pairs * (1 / log(2) - 1 / log(3)))


RANKED = [9.0, 5.0, 5.0, 1.0]  # two images of equal score
PSI = {
    (): [0.9, 0.5, 0.5, 0.1],  # of the scores / 10: win rates as they are
    (("spread", 1.0),): [1.0, 0.5, 0.5, 0.0],
    (("spread", 0.3),): [0.3, 0.15, 0.15, 0.0],
    (("temperature", 2.0),): [
        sum(sigma((a - b) / 2) for j, b in enumerate(RANKED) if i != j) / 3 for i, a in enumerate(RANKED)
    ],
}


@pytest.mark.parametrize("given", PSI, ids=str)
def test_rankdpo_against_its_sum(given):
    rewards, scores = [-0.6, 0.3, 1.4, 0.1], [score / (1 if given else 10) for score in RANKED]
    psi = PSI[given]
    rank = [4, 2, 1, 3]
    expected = 0.0
    for i in range(4):
        for j in range(4):
            if psi[i] > psi[j]:
                weight = abs(2 ** psi[i] - 2 ** psi[j]) * abs(1 / log(1 + rank[i]) - 1 / log(1 + rank[j]))
                expected -= weight * log(sigma(rewards[i] - rewards[j]))
    rows = {"rewards": rewards, "scores": scores}
    columns = {name: torch.tensor(each, dtype=torch.float64)[:, None] for name, each in rows.items()}
    assert links.losses("rankdpo", dict(given), columns).item() == pytest.approx(expected, rel=1e-12)


def test_rankdpo_gives_near_ties_little_weight_and_other_units_a_way_out():
    rewards = torch.zeros(2, 1, dtype=torch.float64)

    def loss(gap, **given):
        return links.get("rankdpo")(rewards, torch.tensor([[0.5 + gap], [0.5]], dtype=torch.float64), **given).item()

    assert loss(0.01) / loss(0.4) == pytest.approx((2**0.51 - 2**0.5) / (2**0.9 - 2**0.5))
    assert loss(0.01, spread=1) == pytest.approx(loss(0.4, spread=1))
    with pytest.raises(DiffpoError, match=r"22\.9 to 23\.4.*temperature"):
        links.get("rankdpo")(rewards, torch.tensor([[23.4], [22.9]]))


def test_rankdpos_win_rates_of_a_sharp_temperature_are_the_share_that_an_image_beats():
    rewards = torch.tensor([[0.2], [-0.4], [0.9]], dtype=torch.float64)
    scores = torch.tensor([[23.4], [22.9], [21.0]], dtype=torch.float64)
    shares = torch.tensor([[1.0], [0.5], [0.0]], dtype=torch.float64)
    link = links.get("rankdpo")
    torch.testing.assert_close(link(rewards, scores, temperature=1e-3), link(rewards, shares))


def test_rankdpo_of_a_tied_list_is_nothing_and_of_an_untrained_policy_ranks_as_the_data():
    equal = torch.ones(3, 1)
    assert links.get("rankdpo")(torch.randn(3, 1), equal).item() == 0
    loss = links.get("rankdpo")(0 * equal, torch.tensor([[1.0], [0.5], [0.0]]))
    discount = [1 / log(1 + rank) for rank in (1, 2, 3)]
    gain = [1, 2**0.5 - 1, 0]
    weight = sum((gain[i] - gain[j]) * (discount[i] - discount[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert loss.item() == pytest.approx(weight * log(2), rel=1e-6)


# f of the divergence by the ratio, whose derivative at e^r, less that at 1, is the transform
GENERATORS = {
    "reverse_kl": lambda x: x * x.log(),
    "forward_kl": lambda x: -x.log(),
    "js": lambda x: x * x.log() - (x + 1) * ((x + 1) / 2).log(),
    "alpha": lambda x: (x**0.7 - 0.7 * x - 0.3) / (0.3 * -0.7),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_divergences_are_the_derivatives_of_their_generators(name):
    reward = torch.linspace(-4, 4, 9, dtype=torch.float64)
    ratio = reward.exp().requires_grad_()
    (slope,) = torch.autograd.grad(GENERATORS[name](ratio).sum(), ratio)
    torch.testing.assert_close(divergences.transform(name, reward, 0.3), slope - slope[4])


@pytest.mark.parametrize("name", GENERATORS)
def test_divergences_rise_and_stay_finite(name):
    reward = torch.tensor([-1e4, -100, -35, -1, 0, 1, 10]).requires_grad_()
    value = divergences.transform(name, reward, 0.3)
    (slope,) = torch.autograd.grad(value.sum(), reward)
    assert value.isfinite().all() and (value.diff() > 0).all()
    assert slope.isfinite().all() and (slope > 0).all()
    assert torch.autograd.gradcheck(
        lambda each: divergences.transform(name, each, 0.3), reward.detach()[1:].double().requires_grad_()
    )
