"""Links of policy gradients: likelihood ratio to the behaviour policy and signed advantage of one image -> its loss.

All tensors are (n,). ``log_ratio`` is log p_policy - log p_behaviour of a step of the sampler, or what stands for it
with noised images. It is 0 while the policy is the behaviour policy; there all these losses have REINFORCE's gradient,
-advantage grad log p_policy, or a positive multiple of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from .ranges import Positive, Range

if TYPE_CHECKING:
    from torch import Tensor

Clip = Annotated[float, Range(0, 1)]


def score_function(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """-A log rho, any number: the likelihood-ratio estimator of the policy gradient (REINFORCE).

    DDPO_SF (Black et al. 2023, arXiv 2305.13301, eq. 5). Unbiased only for samples of the policy itself.
    """
    return -advantage * log_ratio


def importance(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """-A rho, any number: the estimator for samples of an earlier policy, by importance sampling, without clipping.

    DDPO_IS before its trust region (Black et al. 2023, arXiv 2305.13301, eq. 6), for each step by itself.
    """
    return -advantage * log_ratio.exp()


def clipped_ratio(log_ratio: Tensor, advantage: Tensor, *, clip: Clip = 0.2) -> Tensor:
    """-min(A rho, A clip(rho, 1 - clip, 1 + clip)), any number.

    PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7), as in DDPO_IS, Flow-GRPO, DanceGRPO and AWM. The gradient ends
    where rho has moved by ``clip`` in the direction of the advantage; the other way there is no bound.
    """
    ratio = log_ratio.exp()
    return -(advantage * ratio).minimum(advantage * ratio.clamp(1 - clip, 1 + clip))


def normalised_ratio(
    log_ratio: Tensor,
    behaviour_kl: Tensor,
    step_weight: Tensor,
    step_std: Tensor,
    advantage: Tensor,
    *,
    clip: Clip = 0.2,
) -> Tensor:
    """`clipped_ratio` of rho~ = exp(std (log rho + KL)), over b; any number.

    GRPO-Guard (Wang et al. 2025, arXiv 2510.22319, eq. 8). log rho = -KL - (b/std) mean(z d) where x' = mean + std z
    was drawn, d is the change of the network's output and b its factor in the mean. So log rho is -KL on average and
    its spread depends on the step. log rho~ = -b mean(z d) has mean 0, and over b all steps have gradients of one size.
    The authors' code divides by the step's dt instead, which is b over 1 + amount^2/2 with flow_sde's scaled law.
    """
    gain = step_std * (2 * step_weight).sqrt()  # b, as weight = b^2 / (2 std^2)
    return clipped_ratio((log_ratio + behaviour_kl) * step_std, advantage, clip=clip) / gain


def trust_region(log_ratio: Tensor, behaviour_kl: Tensor, advantage: Tensor, *, limit: Positive = 1e-6) -> Tensor:
    """-A rho, but constant where KL > limit and rho has moved in the direction of the advantage.

    The divergence proximal constraint of Flow-DPPO (Ping et al. 2026, arXiv 2606.11025): the exact KL divergence of the
    step, and not the ratio of one draw, decides whether a sample still counts.
    """
    loss = -advantage * log_ratio.exp()
    outside = (behaviour_kl > limit) & (advantage * log_ratio > 0)
    return loss.detach().where(outside, loss)
