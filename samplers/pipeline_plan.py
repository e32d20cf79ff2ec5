"""A fitted plan in the diffusers plug-in: as text in the scheduler's config, and whether it fits that config."""

from __future__ import annotations

import json
import warnings

import numpy as np
from numpy.typing import ArrayLike

from ._table import ARRAYS
from .plan import Plan
from .plan_check import check_direction
from .plan_file import LAYOUT, header_of, read_header
from .schedule import Array, RectifiedFlow, Schedule, VPDiscrete

OF_PLAN = "of the plan"  # the beta_schedule of a config without betas: the plan's own noise levels are used


def to_text(plan: Plan) -> str:
    """A plan as one line of JSON, which keeps every float64 number exactly."""
    check_direction(plan)
    return json.dumps(
        {"header": json.loads(header_of(plan)), **{name: getattr(plan, name).tolist() for name in ARRAYS}}
    )


def from_text(text: object) -> Plan:
    """The inverse of `to_text`.

    Raises:
        ValueError: the text is something else, or its table cannot run.
    """
    try:
        values = json.loads(text) if isinstance(text, str) and len(text) <= LAYOUT.most_bytes else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or set(values) != {"header", *ARRAYS}:
        raise ValueError("the config's plan is not one that this scheduler has saved: make it by from_plan")
    try:
        about = read_header(json.dumps(values.pop("header")))
        plan = Plan(about["name"], about["prediction"], origin=about["origin"], **values)
        check_direction(plan)
    except ValueError as error:
        raise ValueError(f"the config's plan: {str(error)[:500]}") from None
    return plan


def config_with(plan: Plan, guidance: float | None) -> dict:
    """The options of a config that runs the plan: its text, and the guidance scale.

    Warns: the plan was fitted at another guidance scale.
    """
    fitted_at = None if plan.origin is None else plan.origin.guidance
    if guidance is not None and fitted_at is not None and abs(guidance - fitted_at) > 1e-6:
        warnings.warn(
            f"plan {plan.name!r} was fitted at guidance {fitted_at:g}, and the guidance is {guidance:g} now: it may be "
            "no better than the default solver",
            stacklevel=3,
        )
    scale = next((float(each) for each in (guidance, fitted_at) if each is not None), 5.0)
    return {"plan": to_text(plan), "guidance": scale}


def described_by(plan: Plan) -> dict:
    """The options of a config for the model that a plan was made for, as far as the plan determines them.

    A flow's noise levels follow from the plan. Of betas only the levels at the plan's own calls are known, so the
    config then has `OF_PLAN` in place of them.
    """
    first = int(plan.alpha.argmin())
    flow = np.allclose(plan.alpha + plan.sigma, 1.0, atol=1e-6) and first < len(plan)
    kind = "flow_prediction" if plan.prediction == "flow" else plan.prediction
    if flow:
        n = round(float(plan.label[first] / plan.sigma[first]))
        if n > 1 and np.allclose(plan.label, n * plan.sigma[:-1], rtol=1e-4, atol=1e-3 * n):
            return {"use_flow_sigmas": True, "num_train_timesteps": n, "prediction_type": kind}
    return {"beta_schedule": OF_PLAN, "prediction_type": kind}


class OwnLevels(Schedule):
    """The noise levels at a plan's calls and at its end, and nothing between them."""

    def __init__(self, plan: Plan) -> None:
        self._t, self._label = plan.t, plan.label
        self._levels = {"alpha": plan.alpha, "sigma": plan.sigma}
        self.t_min, self.t_max = self.t_limits = float(plan.t.min()), float(plan.t.max())
        self.init_scale = 1.0 if plan.alpha[0] < 1.0 else float(plan.sigma[0])

    def _at(self, name: str, t: ArrayLike) -> Array:
        nearest = np.abs(np.asarray(t, np.float64)[..., None] - self._t).argmin(-1)
        return self._levels[name][nearest]

    def alpha(self, t: ArrayLike) -> Array:
        return self._at("alpha", t)

    def sigma(self, t: ArrayLike) -> Array:
        return self._at("sigma", t)

    def log_alpha(self, t: ArrayLike) -> Array:
        with np.errstate(divide="ignore"):
            return np.log(self.alpha(t))

    def t_of_model_time(self, label: ArrayLike) -> Array:
        """The time of the call with this label.

        Raises:
            ValueError: no call has it.
        """
        apart = np.abs(np.asarray(label, np.float64)[..., None] - self._label)
        if (apart.min(-1) > 1e-5 * np.abs(self._label).max() + 1e-6).any():
            own = ", ".join(f"{x:g}" for x in self._label)
            raise ValueError(
                f"a plan has the noise levels of its own calls only, whose labels are {own}, not {label!r}: pass "
                "the model's scheduler config to from_plan"
            )
        return self._t[apart.argmin(-1)]

    def model_time(self, t: ArrayLike) -> Array:
        return self._label[np.abs(np.asarray(t, np.float64)[..., None] - self._t[: len(self._label)]).argmin(-1)]


def compare(plan: Plan, schedule: Schedule, prediction: str) -> None:
    """Warns if a plan was made for another noise schedule or for another kind of network than the config describes."""
    origin = plan.origin
    if not isinstance(schedule, OwnLevels):
        if origin is not None:
            same = origin.same_schedule(schedule)
        else:
            t = schedule.t_of_model_time(plan.label)
            same = np.allclose(schedule.alpha(t), plan.alpha[:-1], rtol=1e-3, atol=1e-4)
        if not same:
            warnings.warn(
                f"plan {plan.name!r} was made for another noise schedule than this scheduler's config describes "
                f"({_named(schedule)}): check that it belongs to this model",
                stacklevel=4,
            )
    made_for = plan.prediction if origin is None else origin.prediction
    if made_for != prediction:
        warnings.warn(
            f"plan {plan.name!r} was made for a network that predicts {made_for!r}, and this scheduler is set up for "
            f"{prediction!r}: check that it belongs to this model",
            stacklevel=4,
        )


def _named(schedule: Schedule) -> str:
    if isinstance(schedule, VPDiscrete):
        return f"betas from {schedule.betas[0]:g} to {schedule.betas[-1]:g}"
    return "a rectified flow" if isinstance(schedule, RectifiedFlow) else type(schedule).__name__


def calls_differ(plan: Plan, calls: int) -> ValueError:
    return ValueError(
        f"plan {plan.name!r} has {len(plan)} calls, but num_inference_steps is {calls}: pass "
        f"num_inference_steps={len(plan)}, or a plan of {calls} calls"
    )
