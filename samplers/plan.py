"""The plan: a solver as a table of numbers, and the loop that runs it.

Call k of the model happens at input x_k. What it returns is first turned into the solver's own quantity, `m_k =
reads[k] . (x_k, output)`. Then two rows of the table, over the columns

    anchor | noise | 1 | m_k | m_{k-1} | m_{k-2} | ...

give the next *input* and the next *anchor*. The anchor is the state that the solver steps from. In a multistep method
it is the input; in a single-step method it stays at the beginning of the step while the stages are called. The input
after the last call is the result. Coefficients are float64 and may broadcast over the sample (trailing dimensions of
the table).
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from . import plan_file
from ._table import ANCHOR, ARRAYS, HISTORY, NOISE, ONE, Loop, State, Table, combine, terms
from .cfgpp import CFGPlusPlus
from .grid import Nodes
from .plan_check import check, check_direction
from .prediction import BLIND, Guidance, blind, conversion, convert, fitting
from .transition import Transition, of_call

__all__ = ["ANCHOR", "HISTORY", "NOISE", "ONE", "Plan", "Row", "State", "randn", "row"]


class Row(NamedTuple):
    """One linear combination; `ms` newest first."""

    anchor: float
    ms: tuple[float, ...] = ()
    noise: float = 0.0
    one: float = 0.0


def row(anchor: float, *ms: float, noise: float = 0.0, one: float = 0.0) -> Row:
    return Row(anchor, ms, noise, one)


Step = Row | tuple[Row, Row]  # the row of a call, or those of the next input and the next anchor


@dataclass(frozen=True, eq=False)
class Plan(Table):
    """A compiled sampler. Immutable; made by a solver, by `samplers.build_plan`, or by `Plan.load`.

    Shapes for K model calls and H remembered values, `*shape` empty or broadcastable to one sample:
        t, alpha, sigma (K+1,): at the calls and at the end. label (K,): the network's time input.
        rows (K, 2, 3+H, *shape): next input, next anchor. reads (K, 2, *shape): m_k from (input, output).
        start (2+P, 2): first input, first anchor and P values of history that cost no call, as combinations of (x,
        noise).
    origin: what a fitted plan was fitted to, and its measured errors; None of other plans.

    Raises:
        ValueError: a table that cannot run: shapes that do not fit, numbers that are not finite in float32, an unknown
            prediction, noise levels or labels that do not grow with t, a row that uses an output older than the first.
    """

    def __post_init__(self) -> None:
        for name in ARRAYS:
            given = getattr(self, name)
            try:
                if np.iscomplexobj(given):
                    raise TypeError
                array = np.array(given, np.float64)
            except (TypeError, ValueError):
                raise ValueError(f"plan {self.name!r}: {name} is not an array of real numbers") from None
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        check(self)
        levels = [s / a if a else math.inf for s, a in zip(self.sigma.tolist(), self.alpha.tolist(), strict=True)]
        loop = Loop(
            rows=[[terms(r) for r in pair] for pair in self.rows],
            reads=[terms(r) for r in self.reads],
            start=[terms(r) for r in self.start],
            same=[bool((pair[0] == pair[1]).all()) for pair in self.rows],
            direct=[bool((r[0] == 0).all() and (r[1] == 1).all()) for r in self.reads],
            noisy=[bool(pair[:, NOISE].any()) for pair in self.rows],
            noisy_start=bool(self.start[:, 1].any()),
            labels=self.label.tolist(),
            levels=levels,
        )
        object.__setattr__(self, "_loop", loop)

    @classmethod
    def build(cls, name: str, prediction: str, nodes: Nodes, steps: Sequence[Step], reads=None, start=None) -> Self:
        """A plan from a solver's rows: per call one `Row` (input = anchor) or a pair (next input, next anchor).

        Args:
            nodes: the K points where the model is called, then the end.
            prediction: the kind of prediction of the m, if `reads` is None.
        """
        pairs = [(step, step) if isinstance(step, Row) else step for step in steps]
        width = max(len(r.ms) for pair in pairs for r in pair)
        rows = [[[r.anchor, r.noise, r.one, *r.ms, *[0.0] * (width - len(r.ms))] for r in pair] for pair in pairs]
        reads = [[0.0, 1.0]] * len(pairs) if reads is None else reads
        extra: dict[str, Any] = {} if start is None else {"start": np.asarray(start)}
        label = nodes.label[: len(pairs)]
        return cls(name, prediction, nodes.t, nodes.alpha, nodes.sigma, label, np.array(rows), np.array(reads), **extra)

    def __len__(self) -> int:
        """The number of model calls."""
        return len(self.label)

    @property
    def stochastic(self) -> bool:
        return any(self._loop.noisy) or self._loop.noisy_start

    def needs_noise(self, k: int) -> bool:
        """Whether step k adds noise."""
        return self._loop.noisy[k]

    def for_prediction(self, kind: str) -> Plan:
        """The same plan for a network with another prediction type. Only `reads` changes."""
        if kind == self.prediction:
            return self
        maps = [
            conversion(kind, self.prediction, a, s) for a, s in zip(self.alpha[: len(self)], self.sigma, strict=False)
        ]
        reads = [[of_x + of_out * a, of_out * b] for (of_x, of_out), (a, b) in zip(self.reads, maps, strict=True)]
        return replace(self, prediction=kind, reads=np.array(reads))

    def to(self, device, dtype: torch.dtype) -> Plan:
        """The plan with its tensor coefficients on a device; the plan itself where all are plain numbers."""
        if self.rows.ndim == 3 and self.reads.ndim == 2:
            return self

        def move(row):
            return [(j, c.to(device, dtype) if isinstance(c, torch.Tensor) else c) for j, c in row]

        rows, reads = [[move(r) for r in pair] for pair in self._loop.rows], [move(r) for r in self._loop.reads]
        moved = copy.copy(self)
        object.__setattr__(moved, "_loop", self._loop._replace(rows=rows, reads=reads))
        return moved

    def begin(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> State:
        """The state before the first call. x: (batch, ...) at the first noise level; float32 if it is narrower."""
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise TypeError(f"the initial state must be a floating-point tensor, got {getattr(x, 'dtype', type(x))}")
        for name, shape in {"rows": self.rows.shape[3:], "reads": self.reads.shape[2:]}.items():
            sample = tuple(x.shape[1:])
            if len(shape) > len(sample) or any(
                n not in (1, m) for n, m in zip(shape[::-1], sample[::-1], strict=False)
            ):
                raise ValueError(f"plan {self.name!r}: its {name} are for samples of shape {shape}, not {sample}")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        first, anchor, *past = (combine(each, (x, noise), "the start") for each in self._loop.start)
        return State(first, anchor, tuple(past))

    def step(self, k: int, state: State, model_output: torch.Tensor, noise: torch.Tensor | None = None) -> State:
        """One model call's worth of sampling: a pure function.

        Args:
            k: which call, 0 to K - 1 (a Python int).
            state: from `begin` or the step before.
            model_output: what the network returned at `state.input`, same shape.
            noise: standard normal, same shape; needed where `needs_noise(k)`.
        """
        loop, where = self._loop, f"call {k}"
        if not 0 <= k < len(self):
            raise ValueError(f"this plan has calls 0 to {len(self) - 1}, no call {k}")
        output = fitting(state.input, model_output, f"{where}: the model returned")
        noise = None if noise is None else fitting(state.input, noise, f"{where}: the noise has")
        m = output if loop.direct[k] else combine(loop.reads[k], (state.input, output), where)
        history = (m, *state.history)[: self.rows.shape[2] - HISTORY]
        values = (state.anchor, noise, None, *history)
        following = combine(loop.rows[k][0], values, where)
        anchor = following if loop.same[k] else combine(loop.rows[k][1], values, where)
        return State(following, anchor, history)

    def transition(self, k: int) -> Transition:
        """The Gaussian that call k draws the next input from, given the state before the call and the network's output.

        For ancestral and SDE solvers, DDIM with eta, SA-Solver and EDM's churn; std is 0 for a call without noise. In a
        step of several calls the last one draws, and its mean uses the outputs of all of them. A corrector (SA-Solver)
        makes no draw of its own: it changes the mean of the draw that follows. Noise before the first call (`start`)
        belongs to no call.

        Raises:
            ValueError: the draw is no single Gaussian given the state and the output: a stage whose noise also enters
                the anchor (dpmpp_sde, singlestep with eta) or a Langevin corrector. Or no call k, or coefficients that
                vary over the sample.
        """
        if not 0 <= k < len(self):
            raise ValueError(f"this plan has calls 0 to {len(self) - 1}, no call {k}")
        return of_call(self, k)

    def run(
        self,
        model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        *,
        prediction: str | None = None,
        guidance: Guidance | CFGPlusPlus | None = None,
        threshold: Callable[[torch.Tensor], torch.Tensor] | None = None,
        noise: Callable[[int], torch.Tensor] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback: Callable[[int, State], None] | None = None,
        check_finite: bool = True,
    ) -> torch.Tensor:
        """Run the whole plan.

        Args:
            model: any callable `model(x, t)`; x as given to `run` (shape, dtype, device), t a scalar tensor
                (float32; float64 for float64).
            x: (batch, ...) initial state.
            prediction: what the model returns; None: what the plan was made for.
            guidance: classifier-free guidance, or CFG++. threshold: a function of x_0, e.g. `dynamic_threshold`.
            noise: `noise(k)` gives the draw for call k (-1: before the first). Default: drawn from `generator`, one
                or one per sample.
            callback: called as `callback(k, state)` after each step.
            check_finite: raise FloatingPointError if an output of the model (the message names the call) or the result
                is not finite. It reads from the device once, at the end; left out under torch.compile.

        Returns: the result, in x's dtype.
        """
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"the initial state must be a floating-point tensor, got {type(x)}")
        for name, given in {"guidance": guidance, "threshold": threshold, "noise": noise}.items():
            if given is not None and not callable(given):
                kind = "a samplers.Guidance" if name == "guidance" else "a function"
                raise TypeError(f"{name} must be {kind}, got {type(given).__name__}")
        prediction = prediction or self.prediction
        if threshold is None and not torch.compiler.is_compiling() and blind(prediction, float(self.alpha[0])):
            warnings.warn(f"{BLIND.format(prediction, self.alpha[0])}: check the prediction type", stacklevel=2)
        plan = self.for_prediction("sample" if threshold else prediction)
        if isinstance(guidance, CFGPlusPlus):
            guidance.check(plan, threshold)
        wide = torch.promote_types(x.dtype, torch.float32)
        plan = plan.to(x.device, wide)
        draw = noise or (lambda k: randn(x.shape, generator, x.device, wide))
        state = plan.begin(x, draw(-1) if plan._loop.noisy_start else None)
        labels = torch.tensor(plan._loop.labels, dtype=state.input.dtype, device=x.device)  # once, not per call
        sums = []
        for k in range(len(plan)):
            seen = state.input.to(x.dtype)
            output = fitting(state.input, model(seen, labels[k]), f"call {k}: the model returned")
            if isinstance(guidance, CFGPlusPlus):
                state, output = guidance(plan, k, state, (seen, labels[k]), output)
            elif guidance is not None:
                output = guidance(output, seen, labels[k], plan._loop.levels[k])
            if threshold is not None:
                x0 = convert(state.input, output, prediction, "sample", plan.alpha[k], plan.sigma[k])
                output = fitting(x0, threshold(x0), f"call {k}: threshold returned")
            sums.append(output.sum())
            state = plan.step(k, state, output, draw(k) if plan.needs_noise(k) else None)
            if callback is not None:
                callback(k, state)
        if check_finite and not torch.compiler.is_compiling():
            *finite, result = torch.isfinite(torch.stack([*sums, state.input.sum()])).tolist()
            if not all(finite):
                k = finite.index(False)
                where = f"call {k} of {len(plan)} (label {plan.label[k]:g}, sigma {plan.sigma[k]:.4g})"
                raise FloatingPointError(f"the model's output of {where} is not finite")
            if not result:
                raise FloatingPointError(
                    f"the result of plan {self.name!r} is not finite, though the model's outputs are: check the "
                    "initial noise and the grid"
                )
        return state.input.to(x.dtype)

    def save(self, path) -> None:
        """Write the plan as one safetensors file; a file that is there is replaced once the new one is complete."""
        check_direction(self)
        plan_file.write(self, path)

    @classmethod
    def load(cls, path) -> Plan:
        """Read a plan written by `save`.

        Raises:
            ValueError: the file is missing, is something else, or has a table that cannot run (see `Plan`) or whose
                times turn round between its steps.
        """
        try:
            about, arrays = plan_file.read(path)
            plan = Plan(about["name"], about["prediction"], origin=about["origin"], **arrays)
            check_direction(plan)
            return plan
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r}: {str(error)[:500]}") from None


def randn(shape, generator, device, dtype) -> torch.Tensor:
    """Standard normal noise, drawn on the generator's device. One generator per sample: independent of the batch."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}")
        return torch.cat([randn((1, *shape[1:]), g, device, dtype) for g in generator])
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"generator must be a torch.Generator or one per sample, got {type(generator).__name__}")
    source = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)
