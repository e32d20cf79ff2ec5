"""Links of pairs: rewards of the chosen and the rejected image -> one loss per pair.

All tensors are (n,), and u = chosen - rejected. A link without ``preference`` is the loss of a pair whose label is
right; `links.losses` takes its expectation under the label, p f(chosen, rejected) + (1 - p) f(rejected, chosen).
"Tie" says what p = 1/2 makes of that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from .numerics import log_sigmoid
from .ranges import BelowHalf, FromZero, Positive, Range

if TYPE_CHECKING:
    from torch import Tensor


def _smooth(preference: Tensor, flipped: float) -> Tensor:
    """P(chosen is better) when a share ``flipped`` of the labels is wrong."""
    return preference + flipped * (1 - 2 * preference)


def sigmoid(
    chosen: Tensor, rejected: Tensor, preference: Tensor, *, smoothing: BelowHalf = 0.0, margin: FromZero = 0.0
) -> Tensor:
    """-p log sigma(u - margin) - (1 - p) log sigma(-u - margin), the label's Bradley-Terry likelihood; in [0, inf).

    p = 1 is DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7; Wallace et al. 2023, arXiv 2311.12908, eq. 14). A share
    ``smoothing`` of wrong labels is cDPO (Mitchell 2023, "A note on DPO with noisy preferences"); ``margin``, without a
    reference, is SimPO's gamma (Meng et al. 2024, arXiv 2405.14734, eq. 6). Tie: pulls u to 0.
    """
    u, p = chosen - rejected, _smooth(preference, smoothing)
    return -p * log_sigmoid(u - margin) - (1 - p) * log_sigmoid(-u - margin)


def robust(chosen: Tensor, rejected: Tensor, *, flip: BelowHalf = 0.1) -> Tensor:
    """[-(1 - flip) log sigma(u) + flip log sigma(-u)]/(1 - 2 flip); unbounded below.

    rDPO (Chowdhury et al. 2024, arXiv 2403.00409). If a share ``flip`` < 1/2 of the labels is wrong, it is an unbiased
    estimate of DPO's loss on clean labels. cDPO's smoothing is not, but has less noise. Tie: pulls u to 0.
    """
    u = chosen - rejected
    return (flip * log_sigmoid(-u) - (1 - flip) * log_sigmoid(u)) / (1 - 2 * flip)


def ipo(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(u - 1/2)^2, in [0, inf), least at u = 1/2.

    Azar et al. 2023, arXiv 2310.12036, eq. 17, times tau^2: with u = tau h the published (h - 1/(2 tau))^2 is this over
    tau^2, whose target of the raw errors would be out of scale. Tie: pulls u to 0, a label p pulls it to p - 1/2.
    """
    return (chosen - rejected - 0.5).square()


def hinge(chosen: Tensor, rejected: Tensor) -> Tensor:
    """max(0, 1 - u), in [0, inf).

    SLiC-HF (Zhao et al. 2023, arXiv 2305.10425) on rewards, as in RSO (Liu et al. 2023, arXiv 2309.06657).
    Tie: indifferent while abs(u) < 1, pulls back from beyond.
    """
    return (1 - (chosen - rejected)).relu()


def squared_sigmoid(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(1 - sigma(u))^2, in (0, 1): bounded, so pairs that are far off are given up.

    What the released SDXL code of DSPO trains as long as the policy stays near the reference; the paper's loss is
    `dspo`. Tie: pulls u to 0, but hardly from far away.
    """
    return (rejected - chosen).sigmoid().square()


def exo(
    chosen: Tensor, rejected: Tensor, preference: Tensor, *, epsilon: Annotated[float, Range(0, 0.5)] = 0.01
) -> Tensor:
    """KL(Bernoulli(sigma(u)) || Bernoulli(q)), q = p (1 - epsilon) + (1 - p) epsilon; in [0, -log epsilon).

    The *reverse* KL of sigmoid's cross-entropy: EXO (Ji et al. 2024, arXiv 2402.00856) of pairs, which is also DMPO
    (Li et al. 2025, arXiv 2507.07510) with its alpha = epsilon. Least at sigma(u) = q. Tie: pulls u to 0.
    """
    u, q = chosen - rejected, _smooth(preference, epsilon)
    win = u.sigmoid() * (log_sigmoid(u) - q.log())
    return win + (-u).sigmoid() * (log_sigmoid(-u) - (1 - q).log())


def nca(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigma(r_w) - 1/2 log sigma(-r_w) - 1/2 log sigma(-r_l), in (0, inf).

    Chen et al. 2024, arXiv 2402.05369, for pairs. Takes each reward by itself, so the chosen one's rises (to log 2 at
    most) and does not just fall less. Tie: pulls both rewards to 0.
    """
    return -log_sigmoid(chosen) - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2


def apo_zero(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 - sigma(r_w) + sigma(r_l), in (0, 2): the chosen one's reward up, the other's down.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, for data better than the model. KTO without a baseline. Tie: constant.
    """
    return (-chosen).sigmoid() + rejected.sigmoid()


def apo_down(chosen: Tensor, rejected: Tensor) -> Tensor:
    """sigma(r_w) + 1 - sigma(u), in (0, 2): both rewards down, the rejected one's more.

    D'Oosterlinck et al. 2024, arXiv 2408.06266, for data worse than the model. Tie: pushes both down.
    """
    return chosen.sigmoid() + (rejected - chosen).sigmoid()


def sppo(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_w - 1/2)^2 + (r_l + 1/2)^2, in [0, inf).

    SPPO with hard labels (Wu et al. 2024, arXiv 2405.00675), times beta^2 as `ipo` is. Tie: pulls both rewards to 0.
    """
    return (chosen - 0.5).square() + (rejected + 0.5).square()


def dpop(chosen: Tensor, rejected: Tensor, *, weight: FromZero = 5.0) -> Tensor:
    """-log sigma(u - weight max(0, -r_w)), in (0, inf).

    DPO-Positive (Pal et al. 2024, arXiv 2402.13228, eq. 3), weight is its lambda. It penalises a margin that comes from
    making both images worse, the chosen one less. Tie: pulls u to 0 and both rewards up to 0.
    """
    return -log_sigmoid(chosen - rejected - weight * (-chosen).relu())


def conditional(chosen: Tensor, rejected: Tensor, reference_margin: Tensor) -> Tensor:
    """-log sigma(u + min(0, m)), m the reference's margin; in (0, inf).

    Hybrid-DPO (HyPO, Yuan et al. 2026, arXiv 2602.11902): u = (policy's margin) - m, and a reference that prefers the
    rejected image, m < 0, counts as neutral. So such pairs keep their gradient until the policy itself prefers the
    chosen image. Tie: pulls u to -m/2.
    """
    return -log_sigmoid(chosen - rejected + reference_margin.clamp(max=0))


def margin(chosen: Tensor, rejected: Tensor, gap: Tensor, *, scale: Positive = 1.0) -> Tensor:
    """-log sigma(u - scale gap), in (0, inf); ``gap`` is the score of the chosen image minus the rejected one's.

    DPO with an offset (ODPO, Amini et al. 2024, arXiv 2402.10571); its offset is any increasing function of the
    scores, here the identity. Tie: pulls u to scale gap, to 0 with equal scores.
    """
    return -log_sigmoid(chosen - rejected - scale * gap)


def modpo(
    chosen: Tensor, rejected: Tensor, gap: Tensor, *, weight: Annotated[float, Range(0, 1)] = 0.5, scale: Positive = 1.0
) -> Tensor:
    """-log sigma((u - (1 - weight) scale gap) / weight), in (0, inf).

    MODPO (Zhou et al. 2023, arXiv 2310.03708, eq. 10): the labels are of one objective, whose weight is ``weight``, and
    ``gap`` is the difference of another reward, with the rest of the weight. Its optimum is the policy of the weighted
    sum of both rewards. weight 1 would be `sigmoid`. Tie: pulls u to (1 - weight) scale gap.
    """
    return -log_sigmoid((chosen - rejected - (1 - weight) * scale * gap) / weight)


def capo(chosen: Tensor, rejected: Tensor, gap: Tensor, *, scale: Positive = 1.0) -> Tensor:
    """(u - scale gap)^2, in [0, inf).

    CaPO (Lee et al. 2025, arXiv 2502.02588): the implicit rewards regress onto calibrated scores, which are expected
    win rates in 0..1. The label plays no part: only the sign of the gap matters.
    """
    return (chosen - rejected - scale * gap).square()


def smpo(
    chosen: Tensor, rejected: Tensor, gap: Tensor, *, temperature: Positive = 1.0, scale: Positive = 10.0
) -> Tensor:
    """-log sigma(scale (2q - 1) u) with q = sigma(gap/temperature), in (0, inf).

    SmPO (Lu et al. 2025, arXiv 2506.02698, eq. 9, scale is its gamma): pairs of nearly equal score weigh little and
    pull u nowhere, while `sigmoid` with a soft label would pull it to logit q. The released code has scale 10 and
    min-max-normalised PickScores, temperature 0.16658, and takes the first pair's q for the whole batch. The label
    plays no part. Equal scores: constant.
    """
    return -log_sigmoid(scale * (gap / (2 * temperature)).tanh() * (chosen - rejected))


def dspo(
    chosen: Tensor,
    rejected: Tensor,
    chosen_error: Tensor,
    chosen_reference_error: Tensor,
    chosen_drift: Tensor,
    *,
    weight: Annotated[float, Range(0, 1, closed=True)] = 0.001,
) -> Tensor:
    """mean ((pred - y) - c (pred - ref))^2 of the chosen image, c = weight (1 - sigma(u)); in [0, inf).

    DSPO (Zhu et al., ICLR 2025): the score of the preferred images, the data's plus the gradient of log sigma(u), is
    matched as in pre-training. c belongs to the target and is a constant here; weight is the paper's beta, 0.001 to
    0.05, and must stay below 1: with c > 1 the gradient turns against the chosen image. Of the errors: with
    a = pred - y, d = pred - ref, mean(a d) = (error + drift - reference error)/2.

    The released SD1.5 code lets sigma(u) take gradients and at weight 0.001 is fine-tuning on the chosen images to
    0.05 %; the SDXL code trains `squared_sigmoid`. Tie: fine-tunes on both images.
    """
    c = weight * (rejected - chosen).sigmoid().detach()
    return chosen_error - c * (chosen_error + chosen_drift - chosen_reference_error) + c.square() * chosen_drift
