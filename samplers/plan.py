"""The plan: a solver as a table of numbers, and the executor that runs any of them.

Call k of the model happens at input x_k. What it returns is first turned into the solver's own quantity, `m_k =
reads[k] . (x_k, output)`. Then two rows of the table, over the columns

    anchor | noise | 1 | m_k | m_{k-1} | m_{k-2} | ...

give the next *input* and the next *anchor*. The anchor is whatever the solver steps from: in a multistep method it
is the input; in a single-step method it stays at the beginning of the step while the stages are called; with a
corrector it is the corrected state. The input after the last call is the result. Coefficients are float64 and may
broadcast over the sample (trailing dimensions of the table).
"""

from __future__ import annotations

import copy
import json
import math
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ._files import write_whole
from ._names import unknown
from .grid import MOST_CALLS, Nodes
from .prediction import BLIND, PREDICTIONS, Guidance, blind, conversion, convert, fitting

ANCHOR, NOISE, ONE, HISTORY = 0, 1, 2, 3  # columns; the newest m is at HISTORY
MOST_BYTES = 64 * 2**20  # of a saved plan


class State(NamedTuple):
    """All that a run remembers: explicit, so any number of runs can share one plan. float32 or wider."""

    input: torch.Tensor  # what the model sees next; after the last call, the result
    anchor: torch.Tensor
    history: tuple[torch.Tensor, ...]  # m_k, newest first


class Row(NamedTuple):
    """One linear combination; `ms` newest first."""

    anchor: float
    ms: tuple[float, ...] = ()
    noise: float = 0.0
    one: float = 0.0


def row(anchor: float, *ms: float, noise: float = 0.0, one: float = 0.0) -> Row:
    return Row(anchor, ms, noise, one)


@dataclass(frozen=True, eq=False)
class Plan:
    """A compiled sampler. Immutable; made by a solver, by `samplers.build_plan`, or by `Plan.load`.

    Shapes for K model calls and H remembered values, `*shape` empty or broadcastable to one sample:
        t, alpha, sigma (K+1,): the times of the calls and the end; label (K,): what the network is told.
        rows (K, 2, 3+H, *shape): next input, next anchor. reads (K, 2, *shape): m_k from (input, output).
        start (2+P, 2): first input, first anchor and P values of history that cost no call, as combinations of (x,
        noise).

    Raises:
        ValueError: a table that cannot run: shapes that do not fit, numbers that float32 does not hold, an unknown
            prediction, noise levels or labels that do not grow with t, a row that uses an output older than the first.
    """

    name: str
    prediction: str  # what the network returns (prediction.py); see `for_prediction`
    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    label: np.ndarray
    rows: np.ndarray
    reads: np.ndarray
    start: np.ndarray = field(default_factory=lambda: np.array([[1.0, 0.0], [1.0, 0.0]]))

    def __post_init__(self):
        for name in _ARRAYS:
            given = getattr(self, name)
            try:
                if np.iscomplexobj(given):
                    raise TypeError
                array = np.array(given, np.float64)
            except (TypeError, ValueError):
                raise ValueError(f"plan {self.name!r}: {name} is not an array of real numbers") from None
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        _check(self)
        # Python numbers for the loop: zeros are left out, a row that repeats is computed once.
        loop = {
            "_rows": [[_terms(r) for r in pair] for pair in self.rows],
            "_reads": [_terms(r) for r in self.reads],
            "_same": [bool((pair[0] == pair[1]).all()) for pair in self.rows],
            "_direct": [bool((r[0] == 0).all() and (r[1] == 1).all()) for r in self.reads],  # m is the output itself
            "_noisy": [bool(pair[:, NOISE].any()) for pair in self.rows],
            "_start": [_terms(r) for r in self.start],
            "_noisy_start": bool(self.start[:, 1].any()),
            "_labels": self.label.tolist(),
            "_first_alpha": float(self.alpha[0]),
            "_levels": [
                s / a if a else math.inf for s, a in zip(self.sigma.tolist(), self.alpha.tolist(), strict=True)
            ],
        }
        for name, value in loop.items():
            object.__setattr__(self, name, value)

    @classmethod
    def build(
        cls, name: str, prediction: str, nodes: Nodes, steps: Sequence[Row | tuple[Row, Row]], reads=None, start=None
    ) -> Plan:
        """A plan from the rows a solver wrote: per call one `Row` (input = anchor) or a pair (next input, next anchor).

        `nodes`: the K points where the model is called, then the end. `prediction`: the kind that the m are, if
            `reads` is None.
        """
        pairs = [(step, step) if isinstance(step, Row) else step for step in steps]
        width = max(len(r.ms) for pair in pairs for r in pair)
        rows = [[[r.anchor, r.noise, r.one, *r.ms, *[0.0] * (width - len(r.ms))] for r in pair] for pair in pairs]
        reads = [[0.0, 1.0]] * len(pairs) if reads is None else reads
        extra = {} if start is None else {"start": np.asarray(start)}
        label = nodes.label[: len(pairs)]
        return cls(name, prediction, nodes.t, nodes.alpha, nodes.sigma, label, np.array(rows), np.array(reads), **extra)

    def __len__(self) -> int:
        """The number of model calls."""
        return len(self.label)

    @property
    def stochastic(self) -> bool:
        return any(self._noisy) or self._noisy_start

    def needs_noise(self, k: int) -> bool:
        """Whether step k adds noise."""
        return self._noisy[k]

    def for_prediction(self, kind: str) -> Plan:
        """The same plan for a network that returns another kind of prediction. Only `reads` changes."""
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

        def move(terms):
            return [(j, c.to(device, dtype) if isinstance(c, torch.Tensor) else c) for j, c in terms]

        moved = copy.copy(self)
        object.__setattr__(moved, "_rows", [[move(r) for r in pair] for pair in self._rows])
        object.__setattr__(moved, "_reads", [move(r) for r in self._reads])
        return moved

    def begin(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> State:
        """The state before the first call. x: (batch, ...) at the first noise level; half precision becomes float32."""
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise TypeError(f"the initial state must be a floating-point tensor, got {getattr(x, 'dtype', type(x))}")
        for name, shape in {"rows": self.rows.shape[3:], "reads": self.reads.shape[2:]}.items():
            sample = tuple(x.shape[1:])
            if len(shape) > len(sample) or any(
                n not in (1, m) for n, m in zip(shape[::-1], sample[::-1], strict=False)
            ):
                raise ValueError(f"plan {self.name!r}: its {name} vary over samples of shape {shape}, not {sample}")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        first, anchor, *past = (_combine(terms, (x, noise), "the start") for terms in self._start)
        return State(first, anchor, tuple(past))

    def step(self, k: int, state: State, model_output: torch.Tensor, noise: torch.Tensor | None = None) -> State:
        """One model call's worth of sampling: a pure function.

        Args:
            k: which call, 0 to K - 1 (a Python int).
            state: from `begin` or the step before.
            model_output: what the network returned at `state.input`, same shape.
            noise: standard normal, same shape; needed where `needs_noise(k)`.
        """
        if not 0 <= k < len(self):
            raise ValueError(f"this plan has calls 0 to {len(self) - 1}, no call {k}")
        output = fitting(state.input, model_output, f"call {k}: the model returned")
        noise = None if noise is None else fitting(state.input, noise, f"call {k}: the noise has")
        m = output if self._direct[k] else _combine(self._reads[k], (state.input, output), f"call {k}")
        history = (m, *state.history)[: self.rows.shape[2] - HISTORY]
        values = (state.anchor, noise, None, *history)
        following = _combine(self._rows[k][0], values, f"call {k}")
        anchor = following if self._same[k] else _combine(self._rows[k][1], values, f"call {k}")
        return State(following, anchor, history)

    def run(
        self,
        model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        *,
        prediction: str | None = None,
        guidance: Guidance | None = None,
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
            guidance: classifier-free guidance. threshold: a function of x_0, e.g. `dynamic_threshold`.
            noise: `noise(k)` gives the draw for call k (-1: before the first); default: fresh from `generator`, one
                or one per sample.
            callback: called as `callback(k, state)` after each step.
            check_finite: raise FloatingPointError that names the call whose output was not finite, or says that the
                result is not. One device read at the end, left out under torch.compile.

        Returns: the result, in x's dtype.
        """
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"the initial state must be a floating-point tensor, got {type(x)}")
        for name, given in {"guidance": guidance, "threshold": threshold, "noise": noise}.items():
            if given is not None and not callable(given):
                kind = "a samplers.Guidance" if name == "guidance" else "a function"
                raise TypeError(f"{name} must be {kind}, got {type(given).__name__}")
        prediction = prediction or self.prediction
        if threshold is None and blind(prediction, self._first_alpha) and not torch.compiler.is_compiling():
            warnings.warn(f"{BLIND.format(prediction, self._first_alpha)}: check the prediction type", stacklevel=2)
        plan = self.for_prediction("sample" if threshold else prediction)
        wide = torch.promote_types(x.dtype, torch.float32)
        plan = plan.to(x.device, wide)
        draw = noise or (lambda k: randn(x.shape, generator, x.device, wide))
        state = plan.begin(x, draw(-1) if plan._noisy_start else None)
        labels = torch.tensor(plan._labels, dtype=state.input.dtype, device=x.device)  # once, not per call
        sums = []
        for k in range(len(plan)):
            seen = state.input.to(x.dtype)
            output = fitting(state.input, model(seen, labels[k]), f"call {k}: the model returned")
            if guidance is not None:
                output = guidance(output, seen, labels[k], plan._levels[k])
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
                    f"the result of plan {self.name!r} is not finite, though the model's outputs are"
                )
        return state.input.to(x.dtype)

    def save(self, path) -> None:
        """Write the plan as one safetensors file: float64 arrays, and the names in its header. A file that stood there
        is replaced when the new one is complete."""
        _check_direction(self)
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        header = {"samplers_plan": json.dumps({"version": 1, "name": self.name, "prediction": self.prediction})}
        content = save(arrays, metadata=header)
        if len(content) > MOST_BYTES:
            raise ValueError(f"plan {self.name!r} takes {len(content)} bytes; {MOST_BYTES} can be saved")
        write_whole(path, content)

    @classmethod
    def load(cls, path) -> Plan:
        """Read a plan written by `save`.

        Raises:
            ValueError: the file is missing, is something else, or holds a table that cannot run (see `Plan`) or whose
                times turn round between its steps.
        """
        try:
            about, arrays = _read(os.fspath(path))
            plan = Plan(about["name"], about["prediction"], **arrays)
            _check_direction(plan)
            return plan
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r}: {str(error)[:500]}") from None


_ARRAYS = ("t", "alpha", "sigma", "label", "rows", "reads", "start")


def _read(path: str) -> tuple[dict, dict[str, np.ndarray]]:
    """The header and the arrays of a saved plan."""
    try:
        status = os.stat(path)  # before it is opened: a pipe would wait for its writer
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MOST_BYTES:
            raise ValueError(f"not a sampling plan (a file of {status.st_size} bytes)")
        with safe_open(path, framework="numpy") as f:
            about = _header((f.metadata() or {}).get("samplers_plan"))
            kinds = {name: f.get_slice(name).get_dtype() for name in f.keys()}
            for name in set(kinds) ^ set(_ARRAYS):
                raise ValueError(f"a plan has {'no' if name in kinds else 'an'} array {name[:100]!r}")
            for name, kind in kinds.items():
                if kind != "F64":
                    raise ValueError(f"{name} is {kind}, a plan's numbers are float64")
            return about, {name: f.get_tensor(name) for name in _ARRAYS}
    except OSError as error:
        raise ValueError(error.strerror or "not a sampling plan") from None
    except SafetensorError:
        raise ValueError("not a sampling plan (no safetensors file)") from None


def _header(text: str | None) -> dict:
    if text is None:
        raise ValueError("not a sampling plan (no 'samplers_plan' in its header)")
    try:
        about = json.loads(text) if len(text) < 10_000 else None
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or type(about.get("version")) is not int:
        raise ValueError("not a sampling plan (its header has no version)")
    if about["version"] != 1:
        raise ValueError(f"a plan of version {about['version']}; this release reads version 1")
    if set(about) != {"version", "name", "prediction"}:
        raise ValueError("a plan's header has a version, a name and a prediction")
    return about


def _check(plan: Plan) -> None:
    """That a plan can run: ValueError if not."""
    if not (isinstance(plan.name, str) and len(plan.name) <= 1000 and plan.name.isprintable()):
        raise ValueError("a plan's name is a line of text")
    if not isinstance(plan.prediction, str) or plan.prediction not in PREDICTIONS:
        raise unknown("prediction", plan.prediction, PREDICTIONS)

    def require(condition, what: str) -> None:
        if not condition:
            raise ValueError(f"plan {plan.name!r}: {what}")

    t, alpha, sigma, label, rows, reads, start = (getattr(plan, name) for name in _ARRAYS)
    calls = len(label) if label.ndim == 1 else 0
    require(0 < calls <= MOST_CALLS, f"label has shape {label.shape}, not (K,) with 1 to {MOST_CALLS} calls")
    for name, array in {"t": t, "alpha": alpha, "sigma": sigma}.items():
        require(array.shape == (calls + 1,), f"{name} has shape {array.shape}, not {(calls + 1,)}")
    fits = rows.ndim > 2 and rows.shape[:2] == (calls, 2) and rows.shape[2] > HISTORY and rows.size
    require(fits, f"rows have shape {rows.shape}, not ({calls}, 2, 3+H, ...)")
    require(reads.ndim > 1 and reads.shape[:2] == (calls, 2) and reads.size, f"reads have shape {reads.shape}")
    width = rows.shape[2] - HISTORY
    fits = start.ndim == 2 and 2 <= len(start) <= 2 + width and start.shape[1] == 2
    require(fits, f"start has shape {start.shape}, not (2+P, 2) with P <= {width}")
    for name in _ARRAYS:
        largest = np.abs(getattr(plan, name)).max()  # NaN if one is
        require(largest <= _LARGEST, f"{name} is not finite in float32; the solver cannot take these nodes")
    require((alpha >= 0).all() and (sigma >= 0).all(), "alpha and sigma must not be negative")
    require((sigma[:-1] > 0).all() and alpha[-1] + sigma[-1] > 0, "the network is called at sigma = 0")

    used = (rows[:, :, HISTORY:] != 0).any(axis=(1, *range(3, rows.ndim)))  # (call, how many calls ago)
    early = used & (np.arange(width) >= np.arange(calls)[:, None] + len(start) - 1)
    require(not early.any(), f"call {early.any(1).argmax()} uses an output older than the first")

    angle = np.arctan2(sigma, alpha)
    order = np.lexsort((angle, t))
    level, apart = np.diff(angle[order]), np.diff(t[order]) > 1e-9 * np.abs(t).max()
    moved = (np.diff(alpha[order]) != 0) | (np.diff(sigma[order]) != 0)
    grows = (level[apart] > -1e-12).all() and moved[apart].all() and (level[~apart] < 1e-5).all()
    require(grows, "the noise level does not grow with t")
    told, apart = np.diff(label[order[order < calls]]), np.diff(t[order[order < calls]]) > 1e-9 * np.abs(t).max()
    slack = 1e-5 * np.abs(label).max() + 1e-12
    require((told >= -slack).all() and (told[~apart] <= slack).all(), "the labels do not grow with t")


def _check_direction(plan: Plan) -> None:
    """That the times of a saved plan run one way from step to step; ValueError if not.

    Stages may lie anywhere, and noise may raise the level (EDM's churn). In memory other steps may go up too: those
    that lead out of a step in whose middle an image-to-image run begins (`tail`).
    """
    ends = np.flatnonzero([*plan._same[:-1], True])  # the calls that end a step
    moves = np.diff(plan.t[np.append(0, ends + 1)])
    moves = moves[~(np.array(plan._noisy)[ends] & (moves > 0))]
    if not ((moves <= 0).all() or (moves >= 0).all()):
        raise ValueError(f"plan {plan.name!r}: its times turn round, but t must go down from step to step")


_LARGEST = float(np.finfo(np.float32).max)


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


def _terms(coefficients: np.ndarray) -> list[tuple[int, float | torch.Tensor]]:
    """The non-zero terms of a row: (column, Python float), or (column, tensor) where it broadcasts over the sample."""
    if coefficients.ndim == 1:
        return [(j, c) for j, c in enumerate(coefficients.tolist()) if c]
    return [(j, torch.tensor(c)) for j, c in enumerate(coefficients) if c.any()]


def _combine(terms, values, where: str) -> torch.Tensor:
    """The linear combination of `terms` over `values`; values[ONE], the constant 1, is passed as None.

    One new tensor, then additions in place: memory traffic is what a step costs.
    """
    total = None
    for column, c in terms:
        if column >= len(values):
            raise ValueError(f"{where} uses more outputs than the state holds: begin with `begin`, step by step")
        value = values[column]
        if value is None and column == NOISE:
            raise ValueError(f"{where} of this plan adds noise: pass noise=")
        if total is None:  # the constant comes after anchor and noise, so it is first only in a row without either
            total = torch.zeros_like(values[ANCHOR]).add_(c) if value is None else value * c
        elif value is None:
            total = total.add_(c)
        elif isinstance(c, torch.Tensor):
            total = total.addcmul_(value, c)
        else:
            total = total.add_(value, alpha=c)
    return torch.zeros_like(values[0]) if total is None else total
