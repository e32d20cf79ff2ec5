"""What a network returns, as a table of linear maps; guidance; dynamic thresholding.

Every prediction is `output = p x_0 + q eps`; with `x = alpha x_0 + sigma eps` this is a 2x2 system, so any kind
follows from any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ._names import unknown

PREDICTIONS = {  # kind -> (p, q) at (alpha, sigma)
    "epsilon": lambda alpha, sigma: (0.0, 1.0),
    "sample": lambda alpha, sigma: (1.0, 0.0),
    "v_prediction": lambda alpha, sigma: (-sigma, alpha),  # Salimans & Ho 2022, arXiv 2202.00512, sec. 4
    "flow": lambda alpha, sigma: (-1.0, 1.0),  # velocity eps - x_0 of rectified flow, arXiv 2403.03206
    "score": lambda alpha, sigma: (0.0, -1.0 / sigma),  # Song et al. 2021, arXiv 2011.13456
}


def conversion(source: str, target: str, alpha: float, sigma: float) -> tuple[float, float]:
    """The pair (a, b) with `target = a x + b source` at one noise level.

    Raises:
        ValueError: unknown kind, or one from which the target cannot be computed there (epsilon at alpha = 0, x_0 at
            sigma = 0).
    """
    for kind in (source, target):
        if kind not in PREDICTIONS:
            raise unknown("prediction", kind, PREDICTIONS)
    if source == target:
        return 0.0, 1.0
    p, q = PREDICTIONS[source](alpha, sigma)
    p_to, q_to = PREDICTIONS[target](alpha, sigma)
    det = alpha * q - sigma * p
    if det == 0.0:
        raise ValueError(
            f"a network that predicts {source!r} does not determine {target!r} at alpha = {alpha:g}, sigma = {sigma:g}"
        )
    return (p_to * q - q_to * p) / det, (q_to * alpha - p_to * sigma) / det


BLIND = "the first call is at alpha = {1:.2g}, where the output of a network that predicts {0!r} is almost its input"


def blind(kind: str, alpha: float) -> bool:
    """Whether a network's prediction is (almost) its own input at this alpha, so that x_0 = (x - sigma eps) / alpha
    magnifies its errors more than a thousand times: epsilon at zero terminal SNR (arXiv 2305.08891, sec. 3.2)."""
    return kind in ("epsilon", "score") and bool(alpha < 1e-3)


def fitting(x: torch.Tensor, value: torch.Tensor, what: str) -> torch.Tensor:
    """`value` in x's dtype.

    Raises:
        TypeError, ValueError: it is no floating-point tensor of x's shape and device. The message begins with `what`.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{what} type {type(value).__name__}, not a tensor")
    if value.shape != x.shape:
        raise ValueError(f"{what} shape {tuple(value.shape)} for input {tuple(x.shape)}")
    if value.device != x.device:
        raise ValueError(f"{what} device {value.device}, but the state is on {x.device}")
    if not value.is_floating_point():
        raise TypeError(f"{what} dtype {value.dtype}, not a floating-point one")
    return value.to(x.dtype)


def convert(
    x: torch.Tensor, output: torch.Tensor, source: str, target: str, alpha: float, sigma: float
) -> torch.Tensor:
    """The network output `output` at state x, as another kind of prediction. Shapes: all the same."""
    a, b = conversion(source, target, alpha, sigma)
    return a * x + b * output


def guide(cond: torch.Tensor, uncond: torch.Tensor, scale: float, rescale: float = 0.0) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): `uncond + scale (cond - uncond)`.

    Args:
        cond, uncond: the network's outputs with and without the condition, (batch, ...).
        scale: 1 gives `cond`, up to rounding.
        rescale: 0 to 1; pulls the standard deviation per sample back to that of `cond` (arXiv 2305.08891, eq. 15-16).
    """
    guided = uncond + scale * (cond - uncond)
    if rescale:
        dims = tuple(range(1, cond.ndim))
        matched = guided * (cond.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
        guided = torch.lerp(guided, matched, rescale)
    return guided


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance in `sample` and `Plan.run`; the formula is `guide`'s.

    Args:
        scale: with 1 the result is the conditional output, and the unconditional model is not called.
        uncond: the unconditional model, called as `uncond(x, t)`. A guided pair counts as one model call.
        rescale: see `guide`.
        interval: guide only at noise levels sigma / alpha in [lo, hi] (arXiv 2404.07724); outside, `uncond` is not
            called.
    """

    scale: float
    uncond: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, float("inf"))

    def __call__(self, cond: torch.Tensor, x: torch.Tensor, label: torch.Tensor, noise_level: float) -> torch.Tensor:
        lo, hi = self.interval
        if self.scale == 1.0 or not lo <= noise_level <= hi:
            return cond
        uncond = fitting(cond, self.uncond(x, label), "the unconditional model returned")
        return guide(cond, uncond, self.scale, self.rescale)


def dynamic_threshold(
    x0: torch.Tensor, ratio: float = 0.995, floor: float = 1.0, ceiling: float = float("inf")
) -> torch.Tensor:
    """Dynamic thresholding of x_0 (Imagen, arXiv 2205.11487, sec. 2.3): clamp to the sample's `ratio` quantile s of
    |x_0|, divide by s.

    s is kept in [floor, ceiling]. Meant for pixels in [-1, 1]; not for latents. Shape: (batch, ...).
    """
    s = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(floor, ceiling)
    s = s.view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-s, s) / s
