"""Noise levels that were published for one model and number of calls. Other numbers are interpolated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .schedule import VPDiscrete

# Align Your Steps (Sabour et al. 2024, arXiv 2404.14507): sigma / alpha of 10 steps, SD 1.5 and SDXL
AYS = {
    "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
# Optimal Stepsize (Pei et al. 2025, arXiv 2503.21774): sigma of FLUX's flow, 10 steps
OPTIMAL_STEPS = (0.9968, 0.9886, 0.9819, 0.975, 0.966, 0.9471, 0.9158, 0.8287, 0.5512, 0.2808, 0.001)
# GITS (Zhou et al. 2024, arXiv 2405.11326) for SD 1.5, as ComfyUI has it, coefficient 1.2: hundredths of the network's
# last label, by the number of calls
GITS = {
    1: (100, 0),
    2: (100, 29, 0),
    3: (100, 49, 18, 0),
    4: (100, 61, 33, 11, 0),
    5: (100, 66, 42, 21, 6, 0),
    6: (100, 83, 57, 34, 15, 3, 0),
    7: (100, 83, 62, 42, 23, 8, 1, 0),
    8: (100, 83, 62, 45, 29, 15, 6, 1, 0),
    9: (100, 83, 66, 50, 34, 21, 11, 4, 1, 0),
    10: (100, 83, 66, 51, 38, 27, 17, 9, 4, 1, 0),
    11: (100, 83, 67, 54, 42, 30, 21, 13, 7, 3, 1, 0),
    12: (100, 83, 68, 56, 45, 34, 25, 17, 11, 6, 3, 1, 0),
    13: (100, 86, 71, 61, 49, 38, 29, 21, 15, 10, 6, 3, 1, 0),
    14: (100, 86, 71, 62, 50, 40, 31, 23, 17, 12, 8, 5, 3, 1, 0),
    15: (100, 88, 78, 68, 58, 48, 38, 30, 23, 17, 12, 8, 5, 3, 1, 0),
    16: (100, 88, 78, 68, 58, 48, 38, 30, 23, 17, 13, 9, 6, 4, 2, 1, 0),
    17: (100, 88, 78, 68, 58, 48, 38, 30, 23, 17, 13, 10, 7, 5, 3, 2, 1, 0),
    18: (100, 88, 78, 68, 59, 50, 41, 33, 26, 20, 15, 11, 8, 6, 4, 3, 2, 1, 0),
    19: (100, 88, 78, 68, 59, 50, 42, 34, 27, 21, 16, 12, 9, 7, 5, 4, 3, 2, 1, 0),
    20: (100, 88, 78, 68, 59, 50, 42, 34, 27, 21, 17, 13, 10, 8, 6, 5, 4, 3, 2, 1, 0),
}


def _between(levels: Sequence[float] | np.ndarray, n: int) -> np.ndarray:
    """n levels, log-linear between the given ones."""
    return np.exp(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(levels)), np.log(levels)))


def _gits(n: int) -> np.ndarray:
    schedule = VPDiscrete.scaled_linear()
    row = np.array(GITS[min(n - 1, max(GITS))]) if n > 1 else np.array([100])
    label = row / 100 * schedule.model_time(schedule.t_max)
    levels = schedule.noise_level(schedule.t_of_model_time(label))
    return levels if n == len(row) else _between(levels, n)


def _optimal_steps(n: int) -> np.ndarray:
    u = _between(OPTIMAL_STEPS, n)
    return u / (1 - u)


def _interpolated(levels: Sequence[float]) -> Callable[[int], np.ndarray]:
    return lambda n: _between(levels, n)


# n levels sigma / alpha, from noise to data
LEVELS: dict[str, Callable[[int], np.ndarray]] = {name: _interpolated(levels) for name, levels in AYS.items()}
LEVELS |= {"gits": _gits, "optimal_steps": _optimal_steps}
