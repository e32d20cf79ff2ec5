"""Exact gradients of a loss on the image, through all calls of a plan, in memory that does not grow with their number.

The gradient is that of the numbers which `Plan.run` computes (to rounding), with respect to the initial noise and
everything that the model depends on: conditioning, weights, a LoRA. What autograd would keep of every call, the model's
activations, is computed again one call at a time. For that a few states of the run are kept, at places that make the
least work (binomial checkpointing: Griewank & Walther 2000, Revolve, ACM TOMS 26, algorithm 799).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .plan import Plan, State, randn
from .prediction import fitting

Generators = torch.Generator | Sequence[torch.Generator]
SNAPSHOTS = 8


def sample(
    plan: Plan,
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    *,
    noise: Callable[[int], torch.Tensor] | Generators | None = None,
    last: int | None = None,
    snapshots: int = SNAPSHOTS,
) -> torch.Tensor:
    """`plan.run(model, x)`, with gradients at the price of the activations of one call and `snapshots` states.

    The result is an ordinary tensor of autograd: `backward`, `torch.autograd.grad` and wrappers such as DDP work. The
    forward pass keeps no activations. The backward pass calls the model again: `evaluations` counts the calls.

    Args:
        plan: any plan, for the model's own prediction (`Plan.for_prediction`).
        model: any callable `model(x, t)` as in `Plan.run`, guidance inside. It must give the same output when it is
            called again; dropout is replayed.
        x: (batch, ...) initial state.
        noise: of a stochastic plan: a generator, one per sample, None (torch's own), or a function as in `Plan.run`
            that gives the same draw whenever it is asked for call k. Draws of generators are repeated, not kept.
        last: gradients through the last so many calls only (DRaFT-K, arXiv 2309.17400); 0 to len(plan), None: all.
            With fewer than all, x has no gradient.
        snapshots: states kept at a time, at least 1. A state is the input and the plan's history.

    Returns: the result, in x's dtype.

    Raises:
        ValueError: `last` or `snapshots` out of range; in the backward pass, a `noise` that gives another draw.
    """
    calls = len(plan)
    last = calls if last is None else last
    if not 0 <= last <= calls:
        raise ValueError(f"this plan has {calls} calls: gradients go through the last 0 to {calls}, not {last}")
    if snapshots < 1:
        raise ValueError(f"snapshots must be at least 1, got {snapshots}")
    wide = torch.promote_types(x.dtype, torch.float32)
    plan = plan.to(x.device, wide)
    draw = _Repeated(noise, x, wide)
    labels = torch.tensor(plan.label.tolist(), dtype=wide, device=x.device)

    def call(k: int, state: State) -> State:
        output = fitting(state.input, model(state.input.to(x.dtype), labels[k]), f"call {k}: the model returned")
        return plan.step(k, state, output, draw(k) if plan.needs_noise(k) else None)

    state = plan.begin(x, draw(-1) if plan.start[:, 1].any() else None)
    first = calls - last
    with torch.no_grad():
        for k in range(first):
            state = call(k, state)
    state = _chain(call, (first, calls), snapshots, state, keep_last=False)
    return state.input.to(x.dtype)


def evaluations(calls: int, snapshots: int = SNAPSHOTS) -> int:
    """How often `sample` and its backward pass call the model.

    Twice per call up to snapshots + 1 calls; with 8 snapshots less than 3 times up to 45 calls, less than 4 times up to
    165. (Plain autograd: once, with the activations of all calls kept. All states kept: twice.)
    """
    if calls < 1:
        return 0
    repeats = _repeats(calls, snapshots)
    return (repeats + 1) * calls - math.comb(snapshots + repeats, snapshots + 1) + 1


def _chain(call, span: tuple[int, int], free: int, state: State, keep_last: bool) -> State:
    """The calls from span[0] up to span[1]. `free` states may be kept, the one given included.

    Its parts are computed again in the backward pass, the last one first. By then the states after it are let go, so
    that each part may keep as many states as there are from its own on. The last call of a part that is computed
    again keeps its activations (`keep_last`), which are used next.
    """
    first, end = span
    while end - first > 1:
        middle = first + _part(end - first, free)
        state = _again(partial(_chain, call, (first, middle), free, keep_last=True), state)
        first, free = middle, free - 1
    if end == first:
        return state
    return call(first, state) if keep_last else _again(partial(call, first), state)


def _again(run: Callable[..., State], state: State) -> State:
    """`run(state)`, computed again when its gradient is asked for. Only the state is kept."""

    def flat(x, anchor, *history):
        return run(state=State(x, anchor, history))

    found = checkpoint(flat, state.input, state.anchor, *state.history, use_reentrant=False)
    return State(*found)


def _repeats(n: int, free: int) -> int:
    """How often a call of n may have to be computed again with so many states: Griewank's r, C(free + r, r) >= n."""
    repeats = 0
    while math.comb(free + repeats, repeats) < n:
        repeats += 1
    return repeats


def _part(n: int, free: int) -> int:
    """How many of n calls come before the next state that is kept: Griewank & Walther's rule, of least work."""
    repeats = _repeats(n, free)
    before = math.comb(free + repeats - 2, free) if repeats > 1 else 1
    return min(max(before, n - math.comb(free - 1 + repeats, repeats)), n - 1)


class _Repeated:
    """Draws for a call that are the same whenever they are asked for."""

    def __init__(self, noise, x: torch.Tensor, dtype: torch.dtype):
        self.noise = noise if callable(noise) else None
        self.like, self.dtype = (x.shape, x.device), dtype
        self.single = noise is None or isinstance(noise, torch.Generator)
        self.generators = [] if self.noise else [noise] if self.single else list(noise)
        self.seen: dict[int, Any] = {}

    def __call__(self, k: int) -> torch.Tensor:
        shape, device = self.like
        if self.noise is not None:
            value = self.noise(k)
            total = value.detach().sum()
            if not torch.equal(self.seen.setdefault(k, total), total):
                raise ValueError(f"noise({k}) gave another draw when it was asked again: it must depend on k only")
            return value
        generators = [_default(device) if g is None else g for g in self.generators]
        if k in self.seen:  # from the same state, and without moving the caller's generators
            generators = [torch.Generator(g.device) for g in generators]
            for generator, state in zip(generators, self.seen[k], strict=True):
                generator.set_state(state)
        else:
            self.seen[k] = [g.get_state() for g in generators]
        return randn(shape, generators[0] if self.single else generators, device, self.dtype)


def _default(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
