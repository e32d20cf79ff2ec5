import itertools

import pytest
import torch

from samplers import Guidance, convert, dynamic_threshold
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
    with pytest.raises(ValueError, match="'epsilon' does not determine 'sample' at alpha = 0"):
        conversion("epsilon", "sample", 0.0, 1.0)
    assert conversion("v_prediction", "sample", 0.0, 1.0) == (0.0, -1.0)
    with pytest.raises(ValueError, match="did you mean 'epsilon'"):
        conversion("eps", "sample", 0.6, 0.8)


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
