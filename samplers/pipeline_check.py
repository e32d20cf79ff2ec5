"""Whether every option of the diffusers plug-in has a value of its kind, and no two contradict each other."""

from __future__ import annotations

import numpy as np

from .placing import SIGMA_FLAGS


def _number(low: float, high: float, whole: bool = False, unset: bool = False):
    """A test for numbers above `low` (whole numbers: from `low` on) up to `high`; for None too if `unset`."""

    def valid(value) -> bool:
        kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
        if value is None or isinstance(value, bool) or not isinstance(value, kinds):
            return unset and value is None
        return bool((low <= value if whole else low < value) and value <= high)

    return valid


_LARGEST = 1e6
_RULES = {  # option -> whether a value is valid, and what it must be
    "num_train_timesteps": (_number(2, _LARGEST, whole=True), "a whole number from 2 to a million"),
    "solver_order": (_number(1, _LARGEST, whole=True), "a whole number of at least 1"),
    "steps_offset": (_number(0, _LARGEST, whole=True), "a whole number of at least 0"),
    "beta_start": (_number(0, 1), "a number between 0 and 1"),
    "beta_end": (_number(0, 1), "a number between 0 and 1"),
    "dynamic_thresholding_ratio": (_number(0, 1), "a number above 0, at most 1"),
    "sample_max_value": (_number(0, _LARGEST), "a number above 0"),
    "clip_sample_range": (_number(0, _LARGEST), "a number above 0"),
    "flow_shift": (_number(0, _LARGEST), "a number above 0, at most a million (shift in FlowMatch configs)"),
    "guidance": (_number(-_LARGEST, _LARGEST), "a finite number"),
    "eta": (_number(-_LARGEST, _LARGEST, unset=True), "a finite number or None"),
    "sigma_min": (_number(0, _LARGEST, unset=True), "a number above 0 or None"),
    "sigma_max": (_number(0, _LARGEST, unset=True), "a number above 0 or None"),
    "shift_terminal": (lambda v: v == 0 or _number(0, 0.999, unset=True)(v), "a number from 0 to below 1 or None"),
    "lambda_min_clipped": (lambda v: v == -np.inf or _number(-_LARGEST, _LARGEST)(v), "a number or -inf"),
    "time_shift_type": (lambda v: v in ("exponential", "linear"), "'exponential' or 'linear'"),
    "solver_options": (lambda v: v is None or isinstance(v, dict), "options by name"),
    "trained_betas": (lambda v: v is None or isinstance(v, list | tuple | np.ndarray), "a list of numbers"),
}
_SWITCHES = (
    *("thresholding", "lower_order_final", "use_flow_sigmas", "use_dynamic_shifting", "rescale_betas_zero_snr"),
    *("clip_sample", "as_published", *SIGMA_FLAGS),
)
_NAMES = ("beta_schedule", "prediction_type", "solver_type", "final_sigmas_type", "timestep_spacing")


def check(config) -> None:
    """That every option has a value of its kind. Unknown names are found where they are looked up.

    Raises:
        ValueError: a wrong value, or two options that contradict each other; the message names them.
    """
    switch = (lambda v: v is None or isinstance(v, bool | np.bool_), "true or false")
    name = (lambda v: isinstance(v, str), "a name")
    name_or_none = (lambda v: v is None or isinstance(v, str), "a name or None")
    rules = _RULES | dict.fromkeys(_SWITCHES, switch) | dict.fromkeys(_NAMES, name)
    for option, (valid, what) in (
        rules | dict.fromkeys(("solver", "grid", "variance_type", "plan"), name_or_none)
    ).items():
        if not valid(config[option]):
            raise ValueError(f"{option} must be {what}, got {config[option]!r}")
    if sum(bool(config[flag]) for flag in SIGMA_FLAGS) > 1:
        raise ValueError(f"set at most one of {', '.join(SIGMA_FLAGS)}")
    if config.sigma_min is not None and config.sigma_max is not None and config.sigma_min >= config.sigma_max:
        raise ValueError(f"sigma_min must be below sigma_max, got {config.sigma_min} and {config.sigma_max}")
    if not config.use_flow_sigmas:
        for option in ("use_dynamic_shifting", "shift_terminal"):
            if config[option]:
                raise ValueError(f"{option} is an option of flow models: set use_flow_sigmas too")
        if config.prediction_type == "flow_prediction":
            raise ValueError("prediction_type 'flow_prediction' belongs to flow models: set use_flow_sigmas too")
    if config.trained_betas is not None and len(config.trained_betas) != config.num_train_timesteps:
        raise ValueError(
            f"num_train_timesteps is {config.num_train_timesteps}, but trained_betas has {len(config.trained_betas)} "
            "numbers: they must be as many"
        )
