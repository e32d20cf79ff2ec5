"""Where regression problems come from. A source turns a batch of pairs into one `Regression`; forward.py, ..."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Regression:
    """``2n`` regression problems (x_t, t) -> target: the chosen images of n pairs, then the rejected ones.

    Shapes: x_t and target (2n, C, h, w) float32; t (2n,) integer; cond a dict of tensors with 2n rows; preference (n,),
    the probability that the chosen one is really better.
    """

    x_t: Tensor
    t: Tensor
    target: Tensor
    cond: dict[str, Tensor]
    preference: Tensor
