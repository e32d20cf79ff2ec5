"""Links of ranked lists: rewards (k, n) of n lists of k images each, best first -> one loss per list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common.errors import DiffpoError
from .numerics import log_sigmoid
from .ranges import FromZero, Positive

if TYPE_CHECKING:
    from torch import Tensor


def plackett_luce(rewards: Tensor) -> Tensor:
    """-sum_i log softmax(r_i, ..., r_k)_i, the likelihood of the ranking; in [0, inf).

    The best image is drawn by softmax of the rewards, then the best of the rest, and so on (Rafailov et al. 2023, arXiv
    2305.18290, appendix A.3). k = 2 is `sigmoid`. Images of equal score count in the order in which they come.
    """
    terms = (rewards[i:].logsumexp(0) - rewards[i] for i in range(len(rewards) - 1))
    return sum(terms, start=rewards.new_zeros(()))


def rankdpo(rewards: Tensor, scores: Tensor, *, temperature: FromZero = 0.0, spread: FromZero = 0.0) -> Tensor:
    """-sum over pairs with psi_i > psi_j of |G_i - G_j| |1/D_i - 1/D_j| log sigma(r_i - r_j); in [0, inf).

    RankDPO (Karthik et al. 2024, arXiv 2410.18013, eq. 5-7): G = 2^psi - 1 is the gain of an image of win rate psi. D =
    log(1 + rank) is the discount, without gradient, at its rank by the policy's own rewards.

    psi are the ``scores`` (k, n), which must be win rates in 0..1 as in the paper. For scores in another unit,
    ``temperature`` makes win rates of them: psi_i is the mean of sigma((score_i - score_j)/temperature) over the
    list's other images, for small ones the share that image i beats. ``spread`` scales each list's psi linearly to
    0..spread instead, so that near-ties weigh as much as clear differences. 0: neither.

    Equal rewards, as at the first step, are ranked in the list's order. Pairs of equal score have no weight, and a list
    of equal scores loss 0. k = 2 with spread 1 is `sigmoid` times 1/log 2 - 1/log 3 = 0.5325.

    Raises DiffpoError for psi outside 0..1 without ``spread``.
    """
    psi = scores
    if temperature:
        wins = ((psi[:, None] - psi) / temperature).sigmoid().sum(1) - 0.5  # without the image itself
        psi = wins / (len(psi) - 1)
    if spread:
        low, high = psi.amin(0), psi.amax(0)
        psi = spread * (psi - low) / (high - low).where(high > low, 1.0)
    elif ((psi < 0) | (psi > 1)).any():
        raise DiffpoError(
            f"link rankdpo takes win rates in 0..1 as scores, and these are {psi.min():g} to {psi.max():g}: set "
            f"link_options.temperature to a typical difference of the scores, or spread=1"
        )
    gain = psi.exp2() - 1
    order = rewards.detach().argsort(dim=0, descending=True, stable=True)
    rank = order.argsort(dim=0) + 1
    discount = 1 / rank.to(rewards.dtype).log1p()
    weight = (gain[:, None] - gain).relu() * (discount[:, None] - discount).abs()  # (k, k, n)
    return -(weight * log_sigmoid(rewards[:, None] - rewards)).sum((0, 1))


def dgpo(rewards: Tensor, advantages: Tensor) -> Tensor:
    """-log sigma(mean_i A_i r_i), in (0, inf): the good images of a group, as one, against the bad ones.

    DGPO (Luo et al. 2025, arXiv 2510.08425): a group's reward is the sum of its images' rewards with the weights |A|,
    which have equal sums on both sides where the mean of A is 0. The released code takes the gradient's form,
    sigma(-mean A r) A_i err_i, with the factor as a constant. k = 2 and A = 1, -1 is `sigmoid` of u/2.
    """
    return -log_sigmoid((advantages * rewards).mean(0))


def crd(log_ratios: Tensor, advantages: Tensor, *, scale: Positive = 0.1) -> Tensor:
    """mean_i ((q_i - mean q) - scale (A_i - mean A))^2 with the log-ratios q to the behaviour policy; in [0, inf).

    CRD (Zhu et al. 2026, arXiv 2603.14128), with uniform weights and the squared loss: within a prompt's images the
    log-ratio becomes the reward up to a constant, as in KL-regularised policies, so the unknown normaliser drops out.
    ``scale`` 0.1 is the released code's reward in 0..1 of advantages cut at 5.
    """
    centred = log_ratios - log_ratios.mean(0)
    return (centred - scale * (advantages - advantages.mean(0))).square().mean(0)
