"""The search space of USF (Liu et al., ICLR 2024, "A Unified Sampling Framework for Solver Searching of Diffusion
Probabilistic Models"): what every step of a plan does, as a few decisions; and the plan that they make.

A step goes from the state at an earlier node to the next node. It integrates a Taylor polynomial of the network's
quantity along the clock of its target: lambda for x_0 and the noise (expint.py), sigma / (alpha + sigma) for the flow
(line.py). The derivatives come from the polynomial through the newest values. DPM-Solver, DPM-Solver++, UniPC, DEIS in
lambda, Adams and Runge-Kutta methods differ in the decisions alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ..grid import Nodes
from ..plan import ANCHOR, HISTORY, Plan
from ..prediction import conversion
from ..solvers.expint import ExpStep, through
from ..solvers.line import Line
from .combinations import rows_of

Target = Literal["sample", "epsilon", "flow"]
Relaxation = Literal["exact", "bh1", "bh2"]
TARGETS: tuple[Target, ...] = get_args(Target)
RELAXATIONS: tuple[Relaxation, ...] = get_args(Relaxation)
MOST_VALUES = 4
_STEEPEST = 100.0  # largest factor on the state in one step


@dataclass(frozen=True)
class Decision:
    """What one step does.

    Attributes:
        order: terms of the Taylor polynomial, from 1; the step's order of accuracy where the values suffice.
        points: values that its derivatives are estimated from, `order` to 4.
        target: what the polynomial is of: x_0 ('sample'), the noise ('epsilon') or eps - x_0 ('flow').
        start: how many nodes back the step starts. 0 is a multistep method; k makes a single-step method of k + 1
            stages.
        relaxation: of a formula through two values: the weight of the slope. 'exact' is its integral, 'bh2' half the
            weight of the value (the midpoint rule of DPM-Solver-2 and ++(2M)), 'bh1' half the step.
        corrector: values of the corrector, the new one included, 2 to 5; 0 for none. It costs no call.
    """

    order: int = 2
    points: int = 2
    target: Target = "sample"
    start: int = 0
    relaxation: Relaxation = "exact"
    corrector: int = 0

    def __post_init__(self) -> None:
        if (
            not 1 <= self.order <= self.points <= MOST_VALUES
            or self.start < 0
            or self.corrector not in (0, *range(2, MOST_VALUES + 2))
        ):
            raise ValueError(
                f"a step needs 1 <= order <= points <= {MOST_VALUES}, start >= 0 and a corrector of 0 or 2 to "
                f"{MOST_VALUES + 1} values: {self}"
            )
        if self.target not in TARGETS or self.relaxation not in RELAXATIONS:
            raise ValueError(f"targets are {', '.join(TARGETS)}, relaxations {', '.join(RELAXATIONS)}: got {self}")


def decided(nodes: Nodes, decisions: Sequence[Decision], name: str = "decided") -> Plan:
    """The plan of K steps that do as decided; one model call each.

    A step takes no more values than there are, starts no earlier than the first node, and is of first order where its
    clock is infinite. The last step has no corrector.

    Args:
        nodes: K calls, then the end.
        decisions: (K,).

    Raises:
        ValueError: a wrong number of decisions, or decisions whose plan would magnify its state.
    """
    calls = len(nodes) - 1
    if len(decisions) != calls:
        raise ValueError(f"{len(decisions)} decisions for {calls} steps: pass one per step")
    targets = {decision.target for decision in decisions}
    kind = targets.pop() if len(targets) == 1 else "flow"  # the flow determines the others at every noise level
    if kind == "epsilon" and nodes.alpha[0] == 0.0:
        kind = "flow"
    # Every state is a combination of the initial state and the m's: a vector (1 + K).
    unit = np.eye(1 + calls)
    inputs, states = [unit[0]], [unit[0]]  # states: inputs, after their corrector

    def value(k: int, target: str) -> np.ndarray:
        of_x, of_m = conversion(kind, target, nodes.alpha[k], nodes.sigma[k])
        return of_x * inputs[k] + of_m * unit[1 + k]

    for i, decision in enumerate(decisions):
        step = _Step(nodes, max(0, i - decision.start), i + 1, decision)
        newest = range(i, max(-1, i - decision.points), -1)
        predicted = step.apply(states, value, newest, min(decision.order, len(newest)))
        if decision.corrector and i + 1 < calls and step.finite:
            inputs.append(predicted)
            at = range(i + 1, max(-1, i + 1 - decision.corrector), -1)
            states.append(step.apply(states, value, at, len(at)))
        else:
            inputs.append(predicted)
            states.append(predicted)
    rows = rows_of(np.array(inputs))
    for i, row in enumerate(rows):
        if not abs(row[0, ANCHOR]) < _STEEPEST:
            raise ValueError(f"step {i} would multiply its state by {row[0, ANCHOR]:.3g}: take other decisions")
        weights = row[:, HISTORY:]
        weights[np.abs(weights) < 1e-14 * np.abs(weights).max()] = 0.0  # rounding where a term cancels
    width = 1 + max(np.flatnonzero(rows[:, 0, HISTORY:].any(axis=0)), default=0)
    reads = np.tile([0.0, 1.0], (calls, 1))
    return Plan(
        name, kind, nodes.t, nodes.alpha, nodes.sigma, nodes.label[:calls], rows[:, :, : HISTORY + width], reads
    )


class _Step:
    """One step from node s to node t along its target's clock."""

    def __init__(self, nodes: Nodes, s: int, t: int, decision: Decision):
        self.s, self.relaxation, self.target = s, decision.relaxation, decision.target
        if self.target == "epsilon" and nodes.alpha[s] == 0.0:
            self.target = "sample"
        if self.target == "flow":
            line = Line(nodes, "flow")
            h = line.u[t] - line.u[s]
            self.offsets, self.finite = (line.u - line.u[s]) / h, True
            self.carry = line.scale[t] / line.scale[s]
            self.moments = [line.scale[t] * h / math.factorial(k + 1) for k in range(MOST_VALUES + 1)]
            self.half_step = self.moments[1]
        else:
            step = ExpStep(nodes, s, t, self.target)
            self.carry, self.finite = step.carry, step.finite
            self.moments = [step.first]
            if step.finite:
                self.offsets = (nodes.lam - nodes.lam[s]) / step.h
                self.moments += [step.weight(k + 1) for k in range(1, MOST_VALUES + 1)]
                self.half_step = 0.5 * step.scale * step.h

    def apply(self, states, value, at: range, order: int) -> np.ndarray:
        """The state at t: from the state at s, the first `order` terms of the polynomial through the values at `at`."""
        indices = [k for k in at if self.finite and np.isfinite(self.offsets[k])] or [at[0]]
        if not self.finite or len(indices) == 1:
            indices, weights = indices[:1], np.array(self.moments[:1])
        else:
            moments = [self.moments[k] if k < order else 0.0 for k in range(len(indices))]
            if len(indices) == 2 and order == 2 and self.relaxation != "exact":
                moments[1] = self.half_step if self.relaxation == "bh1" else 0.5 * moments[0]
            weights = through(self.offsets[indices], moments)
        terms = (w * value(k, self.target) for w, k in zip(weights, indices, strict=True))
        return self.carry * states[self.s] + sum(terms)
