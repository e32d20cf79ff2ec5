import math

import pytest
import torch

from diffpo import links
from diffpo.reward import implicit_reward, squared_error


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("p", [1.0, 0.75, 0.5])
@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, 0.0), (1.5, -0.5), (-3.0, 2.0), (8.0, 7.5)])
def test_sigmoid_link_against_its_closed_form(chosen, rejected, p):
    u = chosen - rejected
    expected = -p * math.log(sigma(u)) - (1 - p) * math.log(1 - sigma(u))
    values = [torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, p)]
    assert links.sigmoid(*values).item() == pytest.approx(expected, rel=1e-12)


def test_sigmoid_link_gradient_is_p_minus_sigma_and_agrees_with_finite_differences():
    rewards = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    preference = torch.tensor([1, 0.9, 0.5, 0.7, 1], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c, r: links.sigmoid(c, r, preference), tuple(rewards.unbind()))
    (gradient,) = torch.autograd.grad(links.sigmoid(*rewards.unbind(), preference).sum(), rewards)
    expected = torch.sigmoid(rewards[0] - rewards[1]) - preference  # d/du of the cross-entropy
    torch.testing.assert_close(gradient, torch.stack([expected, -expected]))


def test_a_tie_does_not_pull_where_the_policy_is_indifferent():
    zero = torch.zeros(1, requires_grad=True)
    links.sigmoid(zero, torch.zeros(1), torch.tensor([0.5])).backward()
    assert zero.grad.item() == 0


def test_large_margins_stay_finite():
    u = torch.tensor([1e4, -1e4])
    assert links.sigmoid(u, torch.zeros(2), torch.ones(2)).tolist() == [0, 1e4]


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
