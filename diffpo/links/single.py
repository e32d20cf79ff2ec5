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


def nft(
    error: Tensor, behaviour_error: Tensor, behaviour_drift: Tensor, liked: Tensor, *, mix: Positive = 1.0
) -> Tensor:
    """[liked ||v+ - y||^2 + (1 - liked) ||v- - y||^2]/mix, v+- = v_old +- mix (v - v_old); in [0, inf).

    DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117), mix is its beta: a liked image is regressed by the policy, a
    disliked one by the policy's mirror image in the behaviour policy. The gradient is that of mix ||v - v'||^2 with
    v' = v_old + ((2 liked - 1)/mix) (y - v_old). ``behaviour_drift`` is mean (v - v_old)^2, and
    2 mean((v_old - y)(v - v_old)) = error - behaviour_error - drift. liked = 1/2: pulls the policy to v_old.
    """
    cross = error - behaviour_error - behaviour_drift
    return behaviour_error / mix + (2 * liked - 1) * cross + mix * behaviour_drift


def nft_adaptive(
    prediction: Tensor,
    behaviour_prediction: Tensor,
    target: Tensor,
    liked: Tensor,
    x_0_scale: Tensor,
    *,
    mix: Positive = 1.0,
) -> Tensor:
    """`nft` with each branch as an error of x_0 over its mean absolute value, which is a constant; in [0, inf).

    DiffusionNFT's self-normalised weights (arXiv 2509.16117, "adaptive loss weighting"), as in its code:
    ||x_0+- - x_0||^2 / mean |x_0+- - x_0|, the latter at least 1e-5. So all noise levels have gradients of one size.
    """
    change = mix * (prediction - behaviour_prediction)

    def branch(mirrored: Tensor) -> Tensor:
        error = x_0_scale * (mirrored - target)
        return error.square().mean(0) / error.detach().abs().mean(0).clamp(min=1e-5)

    toward, away = branch(behaviour_prediction + change), branch(behaviour_prediction - change)
    return (liked * toward + (1 - liked) * away) / mix


def sft(error: Tensor, liked: Tensor) -> Tensor:
    """liked error, in [0, inf): fine-tuning on the liked images, the baseline of all others."""
    return liked * error
