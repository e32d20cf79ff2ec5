"""The methods of calibration by name, as `fit` and `diffpo calibrate --method` take them."""

from collections.abc import Callable

from ..plan import Plan
from .baseline import baseline
from .learn import learned

METHODS: dict[str, Callable[..., Plan]] = {
    "learned": learned,
    "classical": baseline,
}
