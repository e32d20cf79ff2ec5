import itertools

import pytest
import torch

from samplers import Guidance, SolverScheduler, convert, dynamic_threshold, forward, guide
from samplers.prediction import PREDICTIONS, conversion


@pytest.mark.parametrize(("alpha", "sigma"), [(0.8, 0.6), (1.0, 5.0), (0.3, 0.7)])
def test_every_conversion(alpha, sigma):
    """Each output written down from its definition, from one x_0 and eps."""
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    x = alpha * x0 + sigma * eps
    truth = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": alpha * eps - sigma * x0,
        "flow": eps - x0,
        "score": -eps / sigma,
    }
    assert set(truth) == set(PREDICTIONS)
    for source, target in itertools.product(truth, truth):
        torch.testing.assert_close(convert(x, truth[source], source, target, alpha, sigma), truth[target])


def test_undetermined_conversions():
    with pytest.raises(ValueError, match=r"epsilon.*sample.*alpha = 0"):
        conversion("epsilon", "sample", 0.0, 1.0)
    assert conversion("v_prediction", "sample", 0.0, 1.0) == (0.0, -1.0)
    with pytest.raises(ValueError, match="did you mean 'epsilon'"):
        conversion("eps", "sample", 0.6, 0.8)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.8, 0.6), (0.6, 0.8)])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_forward_process(kind, alpha, sigma):
    """Targets by the table's (p, q); x_0 back from the target; per sample levels of shape (batch, 1, 1)."""
    x_0, eps = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    if kind == "flow":
        alpha = 1 - sigma
    x_t = forward.add_noise(x_0, eps, alpha, sigma)
    torch.testing.assert_close(x_t, x_0 * alpha + eps * sigma)
    p, q = PREDICTIONS[kind](alpha, sigma)
    target = forward.training_target(kind, x_0, eps, alpha, sigma)
    torch.testing.assert_close(target, p * x_0 + q * eps)
    torch.testing.assert_close(forward.predicted_x_0(kind, target, x_t, alpha, sigma), x_0)
    levels = torch.full((3, 1, 1), alpha, dtype=torch.float64), torch.full((3, 1, 1), sigma, dtype=torch.float64)
    torch.testing.assert_close(forward.training_target(kind, x_0, eps, *levels), target)
    torch.testing.assert_close(forward.predicted_x_0(kind, target, x_t, *levels), x_0)


def test_forward_process_of_an_unknown_kind():
    x = torch.zeros(1, 2)
    for use in (forward.training_target, forward.predicted_x_0):
        with pytest.raises(ValueError, match="did you mean 'v_prediction'"):
            use("v_predicton", x, x, 0.6, 0.8)


def test_in_float32_the_forward_process_is_the_plain_expression():
    """Training compares numbers to the last bit."""
    x_0, eps, out = torch.randn(3, 2, 4, 8, 8)
    alpha, sigma = torch.rand(2, 1, 1, 1), torch.rand(2, 1, 1, 1)
    assert torch.equal(forward.add_noise(x_0, eps, alpha, sigma), alpha * x_0 + sigma * eps)
    assert torch.equal(forward.training_target("v_prediction", x_0, eps, alpha, sigma), alpha * eps - sigma * x_0)
    for kind, x in {
        "epsilon": (eps - sigma * out) / alpha,
        "v_prediction": alpha * eps - sigma * out,
        "flow": eps - sigma * out,
    }.items():
        assert torch.equal(forward.predicted_x_0(kind, out, eps, alpha, sigma), x)
    assert torch.equal(guide(x_0, eps, 7.5), eps + 7.5 * (x_0 - eps))
    scheduler, t = SolverScheduler(), torch.tensor([3, 700])
    times = (t.numpy() + 1) / 1000
    levels = scheduler.schedule.alpha(times), scheduler.schedule.sigma(times)
    alpha, sigma = (torch.from_numpy(level).float().view(2, 1, 1, 1) for level in levels)
    assert torch.equal(scheduler.add_noise(x_0, eps, t), forward.add_noise(x_0, eps, alpha, sigma))


def test_guidance():
    cond, uncond = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    calls = []

    def model(x, t):
        calls.append(1)
        return uncond

    label = torch.tensor(0.0)
    guided = Guidance(7.5, model)(cond, cond, label, 1.0)
    torch.testing.assert_close(guided, uncond + 7.5 * (cond - uncond))
    rescaled = Guidance(7.5, model, rescale=1.0)(cond, cond, label, 1.0)
    torch.testing.assert_close(rescaled.std((1, 2)), cond.std((1, 2)))
    half = Guidance(7.5, model, rescale=0.5)(cond, cond, label, 1.0)
    torch.testing.assert_close(half, 0.5 * guided + 0.5 * rescaled)
    assert len(calls) == 3
    limited = Guidance(7.5, model, interval=(0.3, 5.0))
    assert limited(cond, cond, label, 6.0) is cond and Guidance(1.0, model)(cond, cond, label, 1.0) is cond
    assert len(calls) == 3, "the unconditional model is not called where it has no say"


def test_dynamic_threshold():
    x0 = torch.linspace(-4, 4, 201, dtype=torch.float64).view(1, 201)
    out = dynamic_threshold(x0, ratio=0.5)  # the median of |x_0| is 2
    torch.testing.assert_close(out, x0.clamp(-2, 2) / 2)
    torch.testing.assert_close(dynamic_threshold(x0 / 8), x0 / 8)  # s = 1 is the least
    torch.testing.assert_close(dynamic_threshold(x0, ratio=0.5, ceiling=1.5), x0.clamp(-1.5, 1.5) / 1.5)
