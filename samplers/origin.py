"""Where a fitted plan comes from: what it was fitted to, by which method, and the errors that were measured."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields

import numpy as np

from .prediction import PREDICTIONS
from .schedule import Schedule

LONGEST = 200  # characters of a text
MOST_SETTINGS = 40
_POINTS = (0.05, 0.25, 0.5, 0.75, 0.95)  # of a schedule's range of labels
_NEAR = 1e-3  # in log-SNR: betas in float32 and in float64 differ less, other schedules much more

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Origin:
    """The provenance of a plan that was fitted to a model. It is saved in the plan's file.

    Attributes:
        method: how the plan was fitted, a name in `samplers.calibrate.METHODS`.
        model: the hash of the model, as the program that fitted the plan computes it; empty if it was not given.
        guidance: scale of classifier-free guidance that the plan was fitted with.
        calls: number of model calls of the fitted plan.
        schedule: some labels of the network with the half log-SNR there, from `points_of`.
        prediction: what the network returned.
        settings: the method's options, and whatever else belongs to the fit: text, numbers, booleans and None by name.
        n_fitted, n_heldout: numbers of samples.
        fitted_error, heldout_error: root mean square error of the final states, against a long solver.
        classical_error: on the same held-out samples, that of the classical plan that is best on the fitted ones.
        seconds: that the fit took.

    Raises:
        ValueError: a value of another kind, too long, or not finite. The message names it.
    """

    method: str
    model: str
    guidance: float
    calls: int
    schedule: Points
    prediction: str
    n_fitted: int
    n_heldout: int
    fitted_error: float
    heldout_error: float
    classical_error: float
    seconds: float
    settings: dict[str, str | float | bool | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("method", "model", "prediction"):
            if not _short(getattr(self, name)):
                raise _wrong(name, f"one line of at most {LONGEST} characters")
        if self.prediction not in PREDICTIONS:
            raise _wrong("prediction", f"one of {', '.join(PREDICTIONS)}")
        for name in ("calls", "n_fitted", "n_heldout"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value < 2**31:
                raise _wrong(name, "a whole number of at least 0")
        for name in ("guidance", "fitted_error", "heldout_error", "classical_error", "seconds"):
            value = getattr(self, name)
            if not _number(value) or (name != "guidance" and value < 0):
                raise _wrong(name, "a finite number" if name == "guidance" else "a finite number of at least 0")
            object.__setattr__(self, name, float(value))
        object.__setattr__(self, "schedule", _points(self.schedule))
        settings = self.settings
        if not isinstance(settings, dict) or len(settings) > MOST_SETTINGS:
            raise _wrong("settings", f"at most {MOST_SETTINGS} values by name")
        for name, value in settings.items():
            if not _short(name) or not (value is None or type(value) is bool or _short(value) or _number(value)):
                raise _wrong("settings", "short texts, finite numbers, booleans or None, by name")
        object.__setattr__(self, "settings", dict(settings))

    @classmethod
    def of(cls, values: object) -> Origin:
        """The inverse of `plain`, for what a file holds.

        Raises:
            ValueError: a value is missing, or as above.
        """
        names = {each.name for each in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(f"a plan's origin must have exactly {', '.join(sorted(names))}")
        return cls(**values)

    def plain(self) -> dict:
        """As values that JSON has."""
        return json.loads(json.dumps(asdict(self)))

    def same_schedule(self, schedule: Schedule) -> bool:
        """Whether the noise level at the labels is that of `schedule`. Flows that differ only in their shift are one
        schedule: a label means the same level in all of them."""
        labels, lams = np.array(self.schedule).T
        with np.errstate(all="ignore"):
            found = schedule.lam(schedule.t_of_model_time(labels))
        return bool((np.abs(found - lams) < _NEAR).all())  # NaN, outside the schedule, is not near


def points_of(schedule: Schedule) -> Points:
    """Five labels within the schedule's range and the half log-SNR log(alpha / sigma) there."""
    low, high = (float(schedule.model_time(t)) for t in (schedule.t_min, schedule.t_max))
    labels = [float(f"{low + share * (high - low):.6g}") for share in _POINTS]
    return tuple((label, float(f"{schedule.lam(schedule.t_of_model_time(label)):.8g}")) for label in labels)


def _points(value: object) -> Points:
    try:
        points = tuple((label, lam) for label, lam in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        points = ()
    if not 1 <= len(points) <= 20 or not all(_number(each) for point in points for each in point):
        raise _wrong("schedule", "up to 20 pairs of a label and a half log-SNR")
    return tuple((float(label), float(lam)) for label, lam in points)


def _number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)  # type: ignore[arg-type]


def _short(value: object) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST and value.isprintable()


def _wrong(name: str, what: str) -> ValueError:
    return ValueError(f"the origin's {name} must be {what}")
