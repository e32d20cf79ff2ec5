"""What is known about the images of a group: how they compare, and how good each one is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor


class Judged(Protocol):
    """A group with its judgement: of the data, or of images that the policy sampled."""

    @property
    def preference(self) -> float: ...

    @property
    def scores(self) -> Sequence[float] | None: ...


@dataclass(frozen=True)
class Judgement:
    """The judgement of n groups of ``members`` images: 1 for single images, 2 for pairs, more for lists.

    ``preference`` (n,) is the probability that the first image is better; for single images, that it is liked.
    ``scores`` (members, n) are the numbers of whatever judged the images, or None. ``advantages`` (members, n), signed,
    say how much better than usual each image is; None if nothing asks for them. Rows that belong to the images are
    laid out by member: the first (chosen, best) images of all groups, then the second ones, and so on.
    """

    preference: Tensor
    members: int = 2
    scores: Tensor | None = None
    advantages: Tensor | None = None

    @classmethod
    def of(
        cls,
        groups: Sequence[Judged],
        members: int,
        device: torch.device | str,
        advantages: Sequence[Sequence[float] | None] = (None,),
    ) -> Self:
        """That of ``groups``, with ``advantages`` of each; without scores or advantages if a group has none."""

        def table(rows: Sequence[Sequence[float] | None]) -> Tensor | None:
            return None if None in rows else torch.tensor(rows, dtype=torch.float32, device=device).T

        preference = torch.tensor([group.preference for group in groups], dtype=torch.float32, device=device)
        return cls(preference, members, table([group.scores for group in groups]), table(advantages))

    @property
    def rows(self) -> int:
        """The number of images, members * n."""
        return self.members * len(self.preference)

    def by_member(self, values: Tensor) -> Tensor:
        """(members * n, ...) -> (members, n, ...)"""
        return values.unflatten(0, (self.members, -1))

    def as_singles(self) -> Judgement:
        """Pairs as single images: the chosen one is liked with the pair's probability p, the rejected one with 1 - p.

        Raises ValueError for lists.
        """
        if self.members == 1:
            return self
        if self.members != 2:
            raise ValueError("only pairs can be read as liked and disliked images")
        scores = None if self.scores is None else self.scores.reshape(1, -1)
        advantages = None if self.advantages is None else self.advantages.reshape(1, -1)
        return Judgement(torch.cat([self.preference, 1 - self.preference]), 1, scores, advantages)
