"""Links of single images, liked or not: reward or errors of one image -> its loss.

All tensors are (n,) but ``baseline``, a scalar without gradient: the mean reward of the previous update over all
processes. ``liked`` is the probability in 0..1 that the image is liked. Pairs serve as two images each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .numerics import log_sigmoid
from .ranges import FromZero, Positive

if TYPE_CHECKING:
    from torch import Tensor


def kto(
    reward: Tensor,
    liked: Tensor,
    baseline: Tensor,
    *,
    desirable_weight: FromZero = 1.0,
    undesirable_weight: FromZero = 1.0,
) -> Tensor:
    """weight (1 - sigma(r - z)) if liked, weight (1 - sigma(z - r)) if not, z = max(baseline, 0); in (0, weight).

    KTO (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8), Diffusion-KTO (Li et al. 2024, arXiv 2404.04465; its beta has
    no 1/2, so it is half of that here). z stands for KL(policy || reference), hence never negative. It is the mean
    reward of the previous update, so it lags by one update. The codes take the mean of the current batch
    (Diffusion-KTO) or of mismatched captions in it (KTO); then a loss depends on how an update is cut into batches.
    With z = 0 the two images of a pair give `apo_zero`. liked = 1/2: constant with equal weights.
    """
    gain = reward - baseline.clamp(min=0)
    return liked * desirable_weight * (-gain).sigmoid() + (1 - liked) * undesirable_weight * gain.sigmoid()


def bco(reward: Tensor, liked: Tensor, baseline: Tensor) -> Tensor:
    """-log sigma(r - delta) if liked, -log sigma(delta - r) if not, delta = baseline; in (0, inf).

    A classifier of liked images whose logit is the reward (BCO, Jung et al. 2024, arXiv 2404.04656), without the
    paper's density-ratio weights. liked = 1/2: pulls r to delta.
    """
    gain = reward - baseline
    return -liked * log_sigmoid(gain) - (1 - liked) * log_sigmoid(-gain)


def ddo(reward: Tensor, liked: Tensor, *, alpha: Positive = 1.0) -> Tensor:
    """-log sigma(r) of images of the data (liked = 1), -alpha log sigma(-r) of samples of the reference (0); (0, inf).

    DDO (Zheng et al. 2025, arXiv 2503.01103): the likelihood ratio to the reference is the discriminator of a GAN. The
    mean over as many images of either kind is half the paper's sum. liked = 1/2: pulls r to -log alpha.
    """
    return -liked * log_sigmoid(reward) - alpha * (1 - liked) * log_sigmoid(-reward)


def nft(error: Tensor, reference_error: Tensor, drift: Tensor, liked: Tensor, *, mix: Positive = 1.0) -> Tensor:
    """[liked ||v+ - y||^2 + (1 - liked) ||v- - y||^2]/mix, v+- = v_old +- mix (v - v_old); in [0, inf).

    DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117), mix is its beta: a liked image is regressed by the policy, a
    disliked one by the policy's mirror image in the reference. The gradient is that of mix ||v - v'||^2 with
    v' = v_old + ((2 liked - 1)/mix) (y - v_old). ``drift`` is mean (v - v_old)^2, and
    2 mean((v_old - y)(v - v_old)) = error - reference error - drift. The code's normalisation by the size of the
    residual and its KL term are left out. liked = 1/2: pulls the policy to the reference.
    """
    cross = error - reference_error - drift
    return reference_error / mix + (2 * liked - 1) * cross + mix * drift


def sft(error: Tensor, liked: Tensor) -> Tensor:
    """liked error, in [0, inf): fine-tuning on the liked images, the baseline of all others."""
    return liked * error
