"""The methods of calibration by name, as `fit` and `diffpo calibrate --method` take them."""

from collections.abc import Callable

from ..plan import Plan
from .baseline import baseline
from .compensation import compensated
from .learn import learned
from .search import searched
from .v3 import v3

METHODS: dict[str, Callable[..., Plan]] = {
    "learned": learned,
    "compensated": compensated,
    "searched": searched,
    "v3": v3,
    "classical": baseline,
}
