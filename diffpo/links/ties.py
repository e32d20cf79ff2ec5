"""Links with three outcomes of a comparison: chosen wins, tie, chosen loses. Chen et al. 2024, arXiv 2409.17431.

A label p in 0..1 is read as P(win) + P(tie)/2 with as much tie as that allows: 1 is a win, 0 a loss, 1/2 a tie, 3/4
half a win and half a tie. Rewards and p are (n,), and u = chosen - rejected. Set `data.ties: soft` to keep tied pairs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from .numerics import log_sigmoid
from .ranges import Positive, Range

if TYPE_CHECKING:
    from torch import Tensor


def _likelihood(preference: Tensor, win: Tensor, tie: Tensor, loss: Tensor) -> Tensor:
    """Minus the expected log-probability of the outcome."""
    lean = 2 * preference - 1
    return -(lean.relu() * win + (1 - lean.abs()) * tie + (-lean).relu() * loss)


def rao_kupper(
    chosen: Tensor,
    rejected: Tensor,
    preference: Tensor,
    *,
    threshold: Annotated[float, Range(0, 100)] = 1.0986122886681098,
) -> Tensor:
    """-log of P(win) = sigma(u - a), P(loss) = sigma(-u - a) or P(tie) = (e^2a - 1) P(win) P(loss); in (0, inf).

    A difference below the ``threshold`` a > 0 tends to be called a tie (Rao and Kupper 1967): e^a is the paper's nu;
    the default, nu = 3, makes half of all even matches ties. Tie: pulls u to 0.
    """
    u = chosen - rejected
    win, loss = log_sigmoid(u - threshold), log_sigmoid(-u - threshold)
    return _likelihood(preference, win, math.log(math.expm1(2 * threshold)) + win + loss, loss)


def davidson(chosen: Tensor, rejected: Tensor, preference: Tensor, *, nu: Positive = 1.0) -> Tensor:
    """-log of P(win) = e^(u/2)/Z, P(loss) = e^(-u/2)/Z or P(tie) = 2 nu/Z; in (0, inf).

    Davidson 1970: a tie is as likely as the geometric mean of win and loss, times 2 nu; at nu = 1 half of all even
    matches are ties. Tie: pulls u to 0.
    """
    half = (chosen - rejected) / 2
    tie = half.new_full(half.shape, math.log(2 * nu))
    log_z = half.logaddexp(-half).logaddexp(tie)
    return _likelihood(preference, half - log_z, tie - log_z, -half - log_z)
