"""What every link must do: passing by name, labels, gradients, large rewards. Formulas: the files beside."""

import math
import subprocess
import sys

import pytest
import torch

from diffpo import links
from diffpo.common.errors import DiffpoError
from diffpo.links.numerics import bernoulli_ratio
from diffpo.objective.reward import implicit_reward, squared_error

PAIR_LINKS = [name for name in links.names() if links.kind(name) == "pair"]
REWARD_LINKS = [name for name in PAIR_LINKS if "chosen" in links.needs(name)]
GIVEN = (
    "preference",
    "gap",
    "liked",
    "scores",
    "baseline",
    "advantage",
    "advantages",
    "x_0_scale",
)  # what a link sees without gradient


def quantities(n: int = 7, seed: int = 0, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Random values of everything that a link may take; errors belong to real vectors, so drift is consistent."""
    draw = torch.Generator().manual_seed(seed)
    given = {"baseline": torch.tensor(0.3, dtype=dtype), "scores": torch.rand(4, n, generator=draw, dtype=dtype)}
    for name in ("chosen", "rejected", "reward", "gap"):
        given[name] = torch.randn(n, generator=draw, dtype=dtype)
    given["rewards"] = torch.randn(4, n, generator=draw, dtype=dtype)
    for name in ("preference", "liked"):
        given[name] = torch.rand(n, generator=draw, dtype=dtype)
    for prefix in ("", "chosen_", "rejected_"):
        policy, reference, target = torch.randn(3, n, 5, generator=draw, dtype=dtype)
        given[prefix + "error"] = (policy - target).square().mean(1)
        given[prefix + "reference_error"] = (reference - target).square().mean(1)
        given[prefix + "drift"] = (policy - reference).square().mean(1)
    advantages = torch.randn(5, n, generator=draw, dtype=dtype)
    given |= {"advantage": advantages[0], "advantages": advantages[1:], "reference_margin": advantages[0] / 2}
    given |= {"log_ratios": torch.randn(4, n, generator=draw, dtype=dtype)}
    given |= {"log_ratio": torch.randn(n, generator=draw, dtype=dtype) / 4}
    for name in ("step_weight", "step_std", "x_0_scale"):
        given[name] = 0.5 + torch.rand(n, generator=draw, dtype=dtype)
    # predictions of 5 dimensions, groups last
    policy, old, target = torch.randn(3, 5, n, generator=draw, dtype=dtype)
    given |= {"prediction": policy, "behaviour_prediction": old, "target": target}
    given |= {"behaviour_error": (old - target).square().mean(0), "behaviour_drift": (policy - old).square().mean(0)}
    return given | {"behaviour_kl": given["step_weight"] * given["behaviour_drift"]}


def swapped(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Chosen and rejected change roles, and the label says so."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    result = {}
    for name, value in given.items():
        first, *rest = name.split("_", 1)
        result["_".join([other.get(first, first), *rest])] = value
    mirrored = {name: -given[name] for name in ("gap", "reference_margin")}
    return result | mirrored | {"preference": 1 - given["preference"]}


def test_links_are_described_without_torch():
    code = (
        "import sys; from diffpo import links\n"
        "[(links.kind(n), links.needs(n), links.check(n, links.options(n))) for n in links.names()]\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_known_about_links_by_name():
    assert links.needs("margin") == ("chosen", "rejected", "gap")
    assert [links.kind(name) for name in ("orpo", "kto", "rankdpo")] == ["pair", "single", "list"]
    assert links.options("sigmoid") == {"smoothing": 0.0, "margin": 0.0}
    assert {each for group in links.QUANTITIES.values() for each in group} == quantities().keys()
    for name in links.names():
        assert set(links.needs(name)) <= set(links.QUANTITIES[links.kind(name)])
        links.check(name, links.options(name))  # every default is in range


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sigmoit", {}, "unknown link 'sigmoit': did you mean sigmoid"),
        ("robust", {"flipp": 0.1}, "no option 'flipp': did you mean flip"),
        ("ipo", {"tau": 0.1}, "link ipo has no option 'tau'"),
        ("capo", {"scale": float("nan")}, "scale of the link capo"),
        ("robust", {"flip": 0.5}, "flip of the link robust must be from 0 and below 0.5, not 0.5"),
        ("exo", {"epsilon": 0.0}, "epsilon of the link exo must be above 0"),
        ("dspo", {"weight": 1.0}, "below 1, not 1"),
        ("capo", {"scale": -1.0}, "above 0, not -1"),
    ],
)
def test_unknown_links_and_options_are_named_with_the_nearest(name, given, message):
    with pytest.raises(DiffpoError, match=message):
        links.losses(name, given, quantities())
    with pytest.raises(DiffpoError, match=message):
        links.check(name, given)  # all that is known before anything is loaded


def test_missing_quantities_are_named():
    given = quantities() | {"gap": None}
    with pytest.raises(DiffpoError, match="link margin needs gap"):
        links.losses("margin", {}, given)
    del given["rejected_drift"]  # needed when the label may be wrong
    with pytest.raises(DiffpoError, match="link dspo needs rejected_drift"):
        links.losses("dspo", {}, given)


@pytest.mark.parametrize("name", [name for name in links.names() if name not in ("nft_adaptive", "trust_region")])
def test_gradients_agree_with_finite_differences(name):
    given = quantities(n=4)
    constant = (*GIVEN, "chosen", "rejected") if name == "dspo" else GIVEN  # of dspo's factor: see its own test
    free = [each for each in given if each not in constant]
    values = tuple(given[each].clone().requires_grad_() for each in free)
    used = set(links.needs(name)) | {each.replace("chosen", "rejected") for each in links.needs(name)}
    values = tuple(value if each in used else value.detach() for each, value in zip(free, values, strict=True))
    assert torch.autograd.gradcheck(
        lambda *inputs: links.losses(name, {}, given | dict(zip(free, inputs, strict=True))), values
    )


@pytest.mark.parametrize("name", links.names())
def test_one_loss_per_group_and_each_depends_on_its_own_group_only(name):
    given = quantities()
    part = {each: value if value.ndim == 0 else value[..., 2:5] for each, value in given.items()}
    whole = links.losses(name, {}, given)
    assert whole.shape == (7,)
    torch.testing.assert_close(whole[2:5], links.losses(name, {}, part))


@pytest.mark.parametrize("name", PAIR_LINKS)
def test_swapping_the_images_and_the_label_changes_nothing(name):
    given = quantities()
    torch.testing.assert_close(links.losses(name, {}, given), links.losses(name, {}, swapped(given)))


@pytest.mark.parametrize("name", sorted(set(PAIR_LINKS) - {"rao_kupper", "davidson", "exo"}))
def test_a_soft_label_is_the_expectation_over_hard_ones(name):
    given = quantities()
    one = torch.ones_like(given["preference"])
    right = links.losses(name, {}, given | {"preference": one})
    wrong = links.losses(name, {}, given | {"preference": 0 * one})
    p = given["preference"]
    torch.testing.assert_close(links.losses(name, {}, given), p * right + (1 - p) * wrong)


def tie_gradient(name: str) -> torch.Tensor:
    given = {each: torch.zeros_like(value) for each, value in quantities().items()}
    given |= {
        "preference": given["gap"] + 0.5,
        "chosen_error": given["gap"] + 0.2,
        "rejected_error": given["gap"] + 0.2,
    }
    sought = [each for each in ("chosen", "rejected", "chosen_error", "rejected_error") if each in links.needs(name)]
    inputs = [given[each].requires_grad_() for each in sought]
    gradients = torch.autograd.grad(links.losses(name, {}, given).sum(), inputs, allow_unused=True)
    return torch.stack([torch.zeros(7).double() if each is None else each for each in gradients])


@pytest.mark.parametrize("name", sorted(set(REWARD_LINKS) - {"apo_down", "dspo"}))
def test_a_tie_does_not_pull_where_the_policy_is_indifferent(name):
    assert tie_gradient(name).abs().max() < 1e-12


def test_links_that_move_tied_images():
    # apo_down distrusts both images: r = 0 costs sigma(0) each, whose slope is 1/4, halved by the label
    torch.testing.assert_close(tie_gradient("apo_down"), torch.full((2, 7), 1 / 8).double())
    # those of errors fine-tune on both images, half on each: dl_w/dl_w = 1, and the margin's pull cancels
    for name in ("mapo", "orpo"):
        torch.testing.assert_close(tie_gradient(name), torch.full((2, 7), 0.5).double())
    assert (tie_gradient("dspo")[-1] > 0.4).all()


@pytest.mark.parametrize("name", links.names())
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_rewards_and_errors_stay_finite_in_float32(name, size):
    given = quantities(dtype=torch.float32)
    for each in ("chosen", "rejected", "reward"):
        given[each] = given[each].sign() * size
    given["rewards"] = given["rewards"].sign() * size
    for prefix in ("chosen_", "rejected_", ""):
        given[prefix + "error"] = torch.tensor([0, 1e-12, 1e-3, 1, 90, 1e3, 1e4]).roll(int(size > 0))
    inputs = {each: value.requires_grad_() for each, value in given.items() if each not in GIVEN}
    loss = links.losses(name, {}, given)
    assert loss.isfinite().all()
    gradients = torch.autograd.grad(loss.sum(), list(inputs.values()), allow_unused=True)
    assert all(each is None or each.isfinite().all() for each in gradients)


def test_certain_pairs_cost_what_the_logit_says():
    u, preference = torch.tensor([1e4, -1e4]), torch.ones(2)
    given = {"chosen": u, "rejected": torch.zeros(2), "preference": preference}
    assert links.losses("sigmoid", {}, given).tolist() == [0, 1e4]
    assert links.losses("hinge", {}, given).tolist() == [0, 10001]


def test_the_ratio_of_mapo_is_smooth_across_its_two_forms():
    x = torch.tensor([0, 1e-9, 0.01, 0.1 - 1e-9, 0.1 + 1e-9, 0.5, 20, 800], dtype=torch.float64).requires_grad_()
    value = bernoulli_ratio(x)
    expected = [1.0, *(each / math.expm1(each) for each in x.tolist()[1:-1]), 0.0]
    assert value.tolist() == pytest.approx(expected, rel=1e-13, abs=1e-300)
    (slope,) = torch.autograd.grad(value.sum(), x)
    assert slope[:2].tolist() == pytest.approx([-0.5, -0.5], abs=1e-9)
    assert slope[3].item() == pytest.approx(slope[4].item(), rel=1e-7)


def test_swapping_the_images_negates_the_logit_and_beta_has_its_one_meaning():
    error, reference = torch.tensor([0.2, 0.5]), torch.tensor([0.3, 0.1])
    chosen, rejected = implicit_reward(error, reference, beta=2000.0)
    assert (chosen.item(), rejected.item()) == (pytest.approx(1000 * 0.1), pytest.approx(1000 * -0.4))
    swapped = implicit_reward(error.flip(0), reference.flip(0), beta=2000.0)
    assert (swapped[0] - swapped[1]).item() == -(chosen - rejected).item()


def test_error_is_a_float32_mean_over_the_dimensions_of_each_sample():
    prediction = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    error = squared_error(prediction, torch.zeros(3, 4, 2, 2))
    assert error.dtype == torch.float32
    expected = [sum(x * x for x in sample.flatten().tolist()) / 16 for sample in prediction]
    assert error.tolist() == pytest.approx(expected, rel=1e-6)
