"""The forward process on tensors, `x_t = alpha x_0 + sigma eps`: noising, training targets, and x_0 from an output.

`alpha` and `sigma` are floats or tensors that broadcast over the samples, e.g. (batch, 1, 1, 1). The result has the
dtype that torch gives the products; nothing is converted on the way.
"""

from __future__ import annotations

import torch

from ._names import unknown
from .prediction import PREDICTIONS

Level = float | torch.Tensor


def add_noise(x_0: torch.Tensor, eps: torch.Tensor, alpha: Level, sigma: Level) -> torch.Tensor:
    """x_t, for clean data x_0 and standard normal noise eps of one shape."""
    return alpha * x_0 + sigma * eps


def training_target(prediction: str, x_0: torch.Tensor, eps: torch.Tensor, alpha: Level, sigma: Level) -> torch.Tensor:
    """What a network with this prediction type should return at `add_noise(x_0, eps, alpha, sigma)`.

    Args:
        prediction: a name in `PREDICTIONS`; its definition is `p x_0 + q eps` with the (p, q) there.

    Raises:
        ValueError: unknown prediction type.
    """
    if prediction == "epsilon":
        return eps
    if prediction == "sample":
        return x_0
    if prediction == "flow":
        return eps - x_0
    if prediction == "v_prediction":
        return alpha * eps - sigma * x_0
    if prediction == "score":
        return -eps / sigma
    raise unknown("prediction", prediction, PREDICTIONS)


def predicted_x_0(prediction: str, output: torch.Tensor, x_t: torch.Tensor, alpha: Level, sigma: Level) -> torch.Tensor:
    """The x_0 that a network's `output` at x_t stands for: the inverse of `training_target`, all of one shape.

    For networks in the process that they are trained in: `v_prediction` with alpha^2 + sigma^2 = 1, `flow` with
    alpha + sigma = 1. `samplers.convert` does it at any pair of levels, and between any two prediction types.

    Raises:
        ValueError: unknown prediction type.
    """
    if prediction == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction == "sample":
        return output
    if prediction == "flow":
        return x_t - sigma * output
    if prediction == "v_prediction":
        return alpha * x_t - sigma * output
    if prediction == "score":
        return (x_t + sigma**2 * output) / alpha
    raise unknown("prediction", prediction, PREDICTIONS)
