"""NCP-DPO's error: a squared distance between features of the network's own encoder instead of latents."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from samplers.prediction import PREDICTIONS

from ..problems.regression import Regression

if TYPE_CHECKING:
    from ..models.family import Family


class Perceptual:
    """||phi(x^_{t'}, t') - phi(x_{t'}, t')||^2, a mean over phi's elements (Gambashidze et al. 2024, arXiv 2406.17636).

    t' = max(t - 1, 0), one step less noisy. x_{t'} = alpha' x_0 + sigma' eps, and x^_{t'} is where the prediction leads
    instead: x_{t'} + c (x^_0 - x_0), with c the weight of x_0 in the mean of DDPM's step from t to t' (Ho et al. 2020,
    eq. 7). phi is the base UNet up to the end of its last down block, with the image's own conditions; of a
    transformer, for which there is no paper, the first half of its blocks. With ``middle`` it is the UNet up to the end
    of its middle block.

    These are the defaults of the released code and of its SDXL launcher; its SD1.5 launchers add the middle block.
    Its beta 2500, without the factor 1/2, is 5000 here. It draws noise for the step, the same in both states. Here
    x_{t'} is DDIM's, which has the same distribution given x_0, and nothing is drawn. At t = 0 the error is 0, as
    there.

    The two states differ by about 1e-3, which half precision does not resolve: in bfloat16 the error is mostly
    rounding. So phi is a second copy of the base's encoder, in float32 (SD1.5: 1.0 GB, SDXL: 3.3 GB), without TF32's
    rounding.
    """

    def __init__(self, family: Family, network: torch.nn.Module, middle: bool = False) -> None:
        """``network``: the policy's bare module; the encoder takes its device and its gradient checkpointing."""
        self.family = copy.copy(family)
        self.family.dtype = torch.float32  # of what the family loads and computes
        self.encoder = self.family.load_network()
        self.family.cut(self.encoder, middle)
        self.encoder.to(network.device)
        if network.is_gradient_checkpointing:
            self.encoder.enable_gradient_checkpointing()
        self._seen: tuple[Regression, Tensor] | None = None  # the last one, and the features at its targets

    def __call__(self, prediction: Tensor, regression: Regression) -> Tensor:
        """(N,) errors of ``prediction`` (N, C, h, w), the network's output for ``regression``; with a gradient by
        it."""
        t, target, cond = regression.t, regression.target, regression.conditioning.cond
        before = (t - 1).clamp(min=0)
        alpha, sigma = self.family.alpha_sigma(t)
        alpha_to, sigma_to = self.family.alpha_sigma(before)
        # the output is p x_0 + q eps, and x_t = alpha x_0 + sigma eps
        p, q = PREDICTIONS[self.family.prediction](alpha, sigma)
        determinant = alpha * q - sigma * p
        x_0 = (q * regression.x_t - sigma * target) / determinant
        eps = (alpha * target - p * regression.x_t) / determinant
        x = alpha_to * x_0 + sigma_to * eps
        weight = alpha_to * (1 - (alpha / alpha_to) ** 2) / sigma**2
        moved = weight * sigma / determinant * (target - prediction.to(target.dtype))  # c (x^_0 - x_0)
        if self._seen is None or self._seen[0] is not regression:
            with torch.no_grad():
                self._seen = regression, self._features(x, before, cond)
        return (self._features(x + moved, before, cond) - self._seen[1]).square().flatten(1).mean(1)

    def _features(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        # the base model takes no user
        dtype = self.family.dtype
        cond = {name: value.to(dtype) if value.is_floating_point() else value for name, value in cond.items()}
        cond.pop("user", None)
        cudnn = torch.backends.cudnn  # its `flags` would reset those that are not named
        exact = cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False)
        with torch.autocast(x.device.type, enabled=False), exact:
            return self.family.features(self.encoder, x, t, cond)
