"""Errors of policy and reference -> implicit rewards: the one place that touches the reference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .states import Regression

Reference = Callable[[torch.nn.Module], AbstractContextManager[torch.nn.Module]]


@dataclass(frozen=True)
class Score:
    """Per regression problem, (2n,) float32, chosen before rejected: errors, and r = (beta/2)(err_ref - err_policy)."""

    error: Tensor
    reference_error: Tensor
    reward: Tensor

    @property
    def chosen(self) -> Tensor:
        return self.reward.chunk(2)[0]

    @property
    def rejected(self) -> Tensor:
        return self.reward.chunk(2)[1]


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over C, h, w of the squared difference, in float32: half precision here would drown the reward in
    rounding."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def implicit_reward(error: Tensor, reference_error: Tensor, beta: float) -> Tensor:
    """r = (beta/2)(err_ref - err_policy); beta as in Diffusion-DPO's code, errors are means over the dimensions."""
    return (beta / 2) * (reference_error - error)


def score(
    family: Any,
    policy: torch.nn.Module,
    unet: torch.nn.Module,
    reference: Reference,
    regression: Regression,
    beta: float,
) -> Score:
    """One forward pass of each; ``policy`` is ``unet`` or its DDP wrapper. Call under the run's autocast."""
    x_t, t, target, cond = regression.x_t, regression.t, regression.target, regression.cond
    with reference(unet) as base:
        reference_error = squared_error(family.predict(base, x_t, t, cond), target)
    error = squared_error(family.predict(policy, x_t, t, cond), target)
    return Score(error, reference_error, implicit_reward(error, reference_error, beta))
