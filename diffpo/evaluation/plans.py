"""Sampling plans of `diffpo calibrate` in generation: whether a plan fits the model, and the scheduler that runs it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import file_digest
from typing import TYPE_CHECKING, Any

from ..common.errors import DiffpoError
from ..common.text import plain
from .generation import Generation

if TYPE_CHECKING:
    import samplers


def identified(generation: Generation) -> Generation:
    """With the plan's hash and number of calls; unchanged without a plan.

    DiffpoError: the file is no plan, has another number of calls than ``steps``, or was fitted to another model.
    """
    if generation.plan is None:
        return generation
    plan, steps, path = read(generation.plan), generation.steps, generation.plan
    if steps not in (None, len(plan)):
        raise DiffpoError(
            f"the plan {path} has {len(plan)} model calls, and --steps is {steps}: leave --steps out, or calibrate a "
            f"plan of {steps} calls"
        )
    origin, ours = plan.origin, generation.model_hash
    if origin is not None and origin.model and origin.model != ours and not generation.any_model:
        raise DiffpoError(
            f"the plan {path} was fitted to another model, {plain(origin.model, 80)}; {generation.model} is {ours}. "
            "Fit one to this model with `diffpo calibrate`. If this is a copy of that model, or you want to try, pass "
            "--any-model"
        )
    with open(path, "rb") as file:
        found = file_digest(file, "sha256").hexdigest()
    return replace(generation, steps=len(plan), plan_hash=found)


def read(path: str) -> samplers.Plan:
    """The plan in a file. DiffpoError if it holds none."""
    from samplers import Plan

    try:
        return Plan.load(path)
    except ValueError as error:
        raise DiffpoError(f"--plan {error}; `diffpo calibrate` makes one") from None


def scheduler(generation: Generation, config: Any) -> Any:
    """The scheduler that runs the plan; prints why the plan may not suit the model.

    ``config``: of the model's scheduler. DiffpoError: the plan cannot run with it.
    """
    import samplers

    plan = read(generation.plan or "")
    with printed_warnings():
        try:
            return samplers.SolverScheduler.from_plan(plan, config, guidance=generation.guidance)
        except ValueError as error:
            raise DiffpoError(f"--plan {generation.plan}: {error}") from None


@contextmanager
def printed_warnings() -> Iterator[None]:
    """Within it, warnings of `samplers` are collected. They are printed at its end, as sentences without a line of
    code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(each.message) for each in caught if each.category is UserWarning):
        print(f"warning: {message}")
