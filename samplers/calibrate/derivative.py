"""Directional derivatives of a network in its input: forward-mode, or central differences where that does not work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

# Central differences, offset -> weight. In float32, and below, rounding limits them: two points, with a step of the
# cube root of its precision. In float64 four points.
STENCILS = {
    False: {-0.005: -100.0, 0.005: 100.0},
    True: {-2e-3: 1e3 / 12, -1e-3: -8e3 / 12, 1e-3: 8e3 / 12, 2e-3: -1e3 / 12},
}


class Derivative:
    """A function's value and its derivative in one direction.

    Forward-mode until it fails for the first time: no rule for a layer, a model in inference mode, a model that cuts
    the graph. From then on central differences.
    """

    def __init__(self) -> None:
        self.forward = True

    def __call__(
        self, f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, v: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """f(x) and d f(x + h v) / dh. scale: the length over which f changes."""
        if self.forward:
            try:
                return _forward(f, x, v)
            except torch.OutOfMemoryError:
                raise
            except (NotImplementedError, RuntimeError):
                self.forward = False
        value, slope = f(x), torch.zeros_like(x)
        for offset, weight in STENCILS[x.dtype == torch.float64].items():
            slope = slope + weight / scale * f(x + offset * scale * v)
        return value, slope


def _forward(f: Callable, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # other kernels of attention have no forward mode
        value, slope = forward_ad.unpack_dual(f(forward_ad.make_dual(x, v.contiguous())))
    if slope is None:
        raise NotImplementedError("the output does not depend on x in forward mode")
    return value, slope
