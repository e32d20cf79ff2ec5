"""One step of a plan as a Gaussian: for log-probabilities, KL divergences and training on the sampler's own steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ._table import ANCHOR, HISTORY, NOISE, ONE, State, Table


@dataclass(frozen=True)
class Transition:
    """The Gaussian from which call k draws the next input x': `x' = mean + std z` with z ~ N(0, 1) and

        mean = anchor X + input x + outputs[0] o + outputs[1] m_{k-1} + outputs[2] m_{k-2} + ... + constant

    X and x are the anchor and the input of the state before the call, o is the network's output at x, and m_{k-1},
    m_{k-2}, ... are `state.history`. In a step of one call X is x, and `anchor` has the coefficients of both.

    Where `state` is an argument, it is the `State` before the call. A tensor x (batch, ...) will do for a step of one
    call without history (ddim, euler_ancestral and the like). `noise`, `output`, `x_next`: same shape as x.
    """

    anchor: float
    input: float
    outputs: tuple[float, ...]  # newest first
    constant: float
    std: float  # 0: a step without noise

    def mean(self, state: State | torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The mean of x', in the state's dtype."""
        rest = self._without_output(state)
        return rest + self.outputs[0] * output.to(rest.dtype)

    def sample(
        self, state: State | torch.Tensor, output: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x' for a standard normal `noise`, which may be left out if std is 0."""
        mean = self.mean(state, output)
        if not self.std:
            return mean
        if noise is None:
            raise ValueError("this step adds noise: pass noise=")
        return mean + self.std * noise.to(mean.dtype)

    def log_prob(self, state: State | torch.Tensor, output: torch.Tensor, x_next: torch.Tensor) -> torch.Tensor:
        """The log density of x' = x_next per sample, (batch,): a sum over the dimensions of a sample.

        Raises:
            ValueError: std is 0.
        """
        self._needs_noise()
        z = (x_next - self.mean(state, output)) / self.std
        return (-0.5 * z.square() - (math.log(self.std) + 0.5 * math.log(2 * math.pi))).flatten(1).sum(1)

    def kl(self, output: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The KL divergence between x' of two networks that returned `output` and `other` at one state, (batch,).

        Raises:
            ValueError: std is 0.
        """
        return self.weight * (output - other).square().flatten(1).sum(1)

    def target(self, state: State | torch.Tensor, x_next: torch.Tensor) -> torch.Tensor:
        """The output y* for which x_next is the mean. In a step of one call `y* = (x_next - anchor x) / outputs[0]`.

        Raises:
            ValueError: the step does not use the output.
        """
        if not self.outputs[0]:
            raise ValueError("this step does not use the network's output, so no output leads to a given x'")
        return (x_next - self._without_output(state)) / self.outputs[0]

    @property
    def weight(self) -> float:
        """outputs[0]^2 / (2 std^2). The log density of x_next is `-weight |output - y*|^2` and a constant, so that

            log p(x_next | policy) - log p(x_next | reference) = weight (|reference - y*|^2 - |policy - y*|^2).

        Raises:
            ValueError: std is 0.
        """
        self._needs_noise()
        return self.outputs[0] ** 2 / (2 * self.std**2)

    def _needs_noise(self) -> None:
        if not self.std:
            raise ValueError("this step adds no noise (std = 0), so its result has no density")

    def _without_output(self, state: State | torch.Tensor) -> torch.Tensor:
        x, anchor, history = (state, state, ()) if isinstance(state, torch.Tensor) else state
        if len(self.outputs) - 1 > len(history):
            raise ValueError(
                f"this step uses {len(self.outputs) - 1} earlier outputs, and the state holds {len(history)}: pass the "
                "State before the call"
            )
        if self.input and isinstance(state, torch.Tensor):
            raise ValueError("this call is the last of a step of several calls: pass the State before the call")
        total = self.anchor * anchor
        if self.input:
            total = total + self.input * x
        for c, m in zip(self.outputs[1:], history, strict=False):
            total = total + c * m
        return total + self.constant if self.constant else total


def of_call(plan: Table, k: int) -> Transition:
    """See `Plan.transition`."""
    where = f"call {k} of plan {plan.name!r}"
    if plan.rows.ndim > 3 or plan.reads.ndim > 2:
        raise ValueError(f"{where}: its coefficients vary over the sample, and a Transition has one number for each")
    following, anchor = plan.rows[k]
    if not plan._loop.same[k] and (anchor[NOISE] or (following[NOISE] and anchor[HISTORY:].any())):
        raise ValueError(
            f"{where} is a stage in a step of several calls. One noise enters the next input and the next anchor, so "
            "the draw is not a single Gaussian: use a solver with one call per step"
        )
    begins = bool((plan.start[0] == plan.start[1]).all()) if k == 0 else plan._loop.same[k - 1]  # the input is X
    of_x, of_output = plan.reads[k]
    newest, *older = following[HISTORY:]
    while older and not older[-1]:
        older.pop()
    return Transition(
        anchor=float(following[ANCHOR] + newest * of_x) if begins else float(following[ANCHOR]),
        input=0.0 if begins else float(newest * of_x),
        outputs=(float(newest * of_output), *map(float, older)),
        constant=float(following[ONE]),
        std=abs(float(following[NOISE])),
    )
