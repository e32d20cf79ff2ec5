"""The methods of calibration by name, as `fit` and `diffpo calibrate --method` take them."""

from collections.abc import Callable

from ..plan import Plan
from .classical import classical

METHODS: dict[str, Callable[..., Plan]] = {
    "classical": classical,
}
