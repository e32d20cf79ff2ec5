"""One calibration from beginning to end: fit a plan, measure it on held-out samples, and note where it comes from."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .._names import unknown
from ..origin import Origin, points_of
from ..plan import Plan
from .baseline import baseline, classical
from .methods import METHODS
from .problem import Problem, errors, rms

ENOUGH = 64  # samples to fit to
OVERFITTED = 1.5  # error on held-out samples / on those that the plan was fitted to


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted plan and its errors, one for each sample: root mean square differences from the target.

    Attributes:
        plan: with its `origin`.
        fitted: (n_fitted,), of the plan on the samples that it was fitted to.
        heldout: (n_heldout,), of the plan on samples that it was not fitted to.
        default, classical: (n_heldout,), on the same samples, of the default rule's plan and of the classical plan that
            is best on the fitted samples.
        names: of these two plans.
    """

    plan: Plan
    fitted: np.ndarray
    heldout: np.ndarray
    default: np.ndarray
    classical: np.ndarray
    names: tuple[str, str]


def fit(
    problem: Problem,
    method: str | Callable[..., Plan],
    calls: int,
    progress: Callable[[int, int], None] | None = None,
    model: str = "",
    settings: dict | None = None,
) -> Fitted:
    """Fit a plan of so many calls, and measure it.

    Args:
        method: a name in `samplers.calibrate.METHODS`, or a function `(problem, calls) -> Plan`. If it takes `progress`
            or `start`, it gets the one below, and the best classical plan.
        progress: called as `progress(done, total)` by methods that take long.
        model: the model's hash, for the origin. settings: further values for it.

    Raises:
        ValueError: an unknown method (with the nearest one); a method that returns no plan, or one of another number of
            calls.

    Warns: there are few samples; the error on held-out samples is much larger than on the fitted ones, or not below
        that of the best classical plan.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise unknown("method of calibration", method, METHODS)
        name, run = method, METHODS[method]
    else:
        name, run = getattr(method, "__name__", str(method)), method
    started = time.perf_counter()
    shown = progress if run is baseline else None
    default, best = classical(problem, calls)[0], baseline(problem, calls, shown)
    taken = inspect.signature(run).parameters
    options = {key: value for key, value in {"start": best, "progress": progress}.items() if key in taken}
    plan = best if run is baseline else run(problem, calls, **options)
    seconds = time.perf_counter() - started
    if not isinstance(plan, Plan) or len(plan) != calls:
        got = f"a plan of {len(plan)} calls" if isinstance(plan, Plan) else type(plan).__name__
        raise ValueError(f"method {name!r} returned {got}, not a plan of {calls} calls")
    found = Fitted(
        plan=plan,
        fitted=errors(plan, problem.fitting, problem.prediction),
        heldout=errors(plan, problem.heldout, problem.prediction),
        default=errors(default, problem.heldout),
        classical=errors(best, problem.heldout),
        names=(default.name, best.name),
    )
    origin = Origin(
        method=name,
        model=model,
        guidance=problem.guidance,
        calls=len(plan),
        schedule=points_of(problem.schedule),
        prediction=problem.prediction,
        n_fitted=len(found.fitted),
        n_heldout=len(found.heldout),
        fitted_error=rms(found.fitted),
        heldout_error=rms(found.heldout),
        classical_error=rms(found.classical),
        seconds=round(seconds, 3),
        settings={"classical": best.name, "default_error": rms(found.default), **(settings or {})},
    )
    if origin.n_fitted < ENOUGH or origin.heldout_error > OVERFITTED * origin.fitted_error:
        warnings.warn(
            f"the plan was fitted to {origin.n_fitted} samples. Its error is {origin.fitted_error:.4g} on them and "
            f"{origin.heldout_error:.4g} on {origin.n_heldout} held-out ones: expect the latter. More samples bring "
            "the two together",
            stacklevel=2,
        )
    if plan is not best and origin.heldout_error >= origin.classical_error:
        warnings.warn(
            f"the plan's error on held-out samples is {origin.heldout_error:.4g}, not below "
            f"{origin.classical_error:.4g} of {best.name}: use that plan, or more than {origin.n_fitted} samples",
            stacklevel=2,
        )
    return replace(found, plan=replace(plan.for_prediction(problem.prediction), origin=origin))


def ratio(one: np.ndarray, other: np.ndarray, groups: object = None, draws: int = 2000) -> tuple[float, float, float]:
    """The root mean square of `one` over that of `other`, with a 95 % interval.

    The interval is the percentile bootstrap's over samples that both share: (n,) values each. Samples of one group,
    e.g. of one prompt, are drawn together.
    """
    members = np.arange(len(one)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = [np.bincount(members, weights=np.square(values)) for values in (one, other)]
    pick = np.random.default_rng(0).integers(0, len(sums[0]), (draws, len(sums[0])))
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanquantile(np.sqrt(sums[0][pick].sum(1) / sums[1][pick].sum(1)), [0.025, 0.975])
        return float(np.sqrt(sums[0].sum() / sums[1].sum())), float(low), float(high)
