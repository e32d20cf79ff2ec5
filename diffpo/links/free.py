"""Links of pairs that use the policy's own errors and no reference: set `reference.policy: none` with them.

Errors are (n,) >= 0 and act as -log p, of the chosen image l_w and of the rejected one l_r. Each link has the chosen
image's own error in it, so a tied pair (p = 1/2) is fine-tuned on both its images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .numerics import bernoulli_ratio, log_complement, log_odds, log_sigmoid
from .ranges import FromZero, Positive

if TYPE_CHECKING:
    from torch import Tensor


def mapo(
    chosen_error: Tensor,
    rejected_error: Tensor,
    *,
    kappa: Positive = 0.5,
    scale: Positive = 1000.0,
    weight: FromZero = 0.1,
) -> Tensor:
    """l_w - weight log sigma(scale (s(l_w) - s(l_r))), s(l) = kappa l/(e^(kappa l) - 1); in (0, inf).

    MaPO (Hong et al. 2024, arXiv 2406.06424; scale, the number of timesteps, and weight as in its code). As s' is about
    -kappa/2 for errors below 1, this is reference-free DPO with beta of about kappa scale, plus fine-tuning.
    """
    u = scale * (bernoulli_ratio(kappa * chosen_error) - bernoulli_ratio(kappa * rejected_error))
    return chosen_error - weight * log_sigmoid(u)


def orpo(chosen_error: Tensor, rejected_error: Tensor, *, weight: FromZero = 0.1) -> Tensor:
    """l_w - weight log sigma(log odds(l_w) - log odds(l_r)), odds of p = e^-l; in (0, inf).

    ORPO (Hong et al. 2024, arXiv 2403.07691, eq. 6-7). The odds fall as the error rises; diffusers' script has the sign
    reversed and no log(1 - p). Errors of 0 are where the odds are singular.
    """
    return chosen_error - weight * log_sigmoid(log_odds(chosen_error) - log_odds(rejected_error))


def asft(chosen_error: Tensor, rejected_error: Tensor, *, weight: FromZero = 1.0) -> Tensor:
    """l_w + weight (-log sigma(log odds(l_w)) - log sigma(-log odds(l_r))), in (0, inf).

    ASFT (Wang et al. 2024, arXiv 2409.10571). As sigma(log odds) is p itself, that is
    (1 + weight) l_w - weight log(1 - e^-l_r).
    """
    return (1 + weight) * chosen_error - weight * log_complement(rejected_error)
