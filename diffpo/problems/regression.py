"""Where regression problems come from. A source turns a batch into one `Regression`: forward.py, inversion.py, ..."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Regression:
    """``N = members * n`` regression problems (x_t, t) -> target in n groups of equal size.

    Rows are laid out by member: the first members of all groups, then the second ones, ... Members of a pair are chosen
    before rejected; those of a list are best first; a group of one is a single image, liked or not.

    Shapes: x_t and target (N, C, h, w) float32; t (N,) integer; cond a dict of tensors with N rows; preference (n,),
    the probability that the chosen one is really better (of a single image: that it is liked); scores (members, n) by
    whatever judged the images, or None; weight (N,), each problem's own factor k in r = (beta/2) k (err_ref -
    err_policy), or None for 1. ``unconditional``: cond of the empty prompt where the policy itself uses classifier-free
    ``guidance``.
    """

    x_t: Tensor
    t: Tensor
    target: Tensor
    cond: dict[str, Tensor]
    preference: Tensor
    members: int = 2
    scores: Tensor | None = None
    weight: Tensor | None = None
    guidance: float = 1.0
    unconditional: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        rows, groups = len(self.x_t), len(self.preference)
        if rows != self.members * groups or len(self.t) != rows or self.x_t.shape != self.target.shape:
            raise ValueError(f"{rows} problems are not {groups} groups of {self.members}")
