"""What a network is trained to solve: regression problems (x_t, t) -> target, in groups that were judged."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..data.judgement import Judgement


@dataclass(frozen=True)
class Conditioning:
    """What the network is conditioned on, N rows. ``cond`` is what `Family.predict` takes. With ``uncond``, those of
    the empty prompt, the policy includes classifier-free ``guidance`` of that scale."""

    cond: dict[str, Tensor]
    uncond: dict[str, Tensor] | None = None
    guidance: float = 1.0

    def repeat_interleave(self, times: int) -> Conditioning:
        """Each row ``times`` times, one after the other."""

        def repeated(given: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.repeat_interleave(times, 0) for name, value in given.items()}

        return Conditioning(repeated(self.cond), self.uncond and repeated(self.uncond), self.guidance)


@dataclass(frozen=True)
class Regression:
    """N regression problems (x_t, t) -> target. They are the images of ``judgement``, laid out as it says.

    Shapes: x_t and target (N, C, h, w) float32; t (N,) integer; weight (N,), each problem's own factor k in
    r = (beta/2) k (err_ref - err_policy), or None for 1; mask (N, 1, h, w) the weights of the squared errors, with mean
    1, or None for 1 everywhere; std (N,), of steps of a sampler, or None. ``numbers``: of the groups' draws, n of them
    that come again, or None.
    """

    x_t: Tensor
    t: Tensor
    target: Tensor
    conditioning: Conditioning
    judgement: Judgement
    weight: Tensor | None = None
    mask: Tensor | None = None
    std: Tensor | None = None
    numbers: list[int] | None = None

    def __post_init__(self) -> None:
        rows, wanted = len(self.x_t), self.judgement.rows
        if rows != wanted or len(self.t) != rows or self.x_t.shape != self.target.shape:
            raise ValueError(
                f"{rows} problems are not {len(self.judgement.preference)} groups of {self.judgement.members}"
            )
