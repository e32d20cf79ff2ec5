"""What is fitted to one model: plans, and the statistics and coefficients that they are built from.

Imports the rest of `samplers`, which imports nothing of it. Every method is a function `(problem, calls, ...) -> Plan`.
"""

from .baseline import baseline
from .fit import Fitted, fit, ratio
from .learn import Fit, best_classical, classical, learned
from .methods import METHODS
from .problem import Batch, Problem, errors, reference

__all__ = [
    "METHODS",
    "Batch",
    "Fit",
    "Fitted",
    "Problem",
    "baseline",
    "best_classical",
    "classical",
    "errors",
    "fit",
    "learned",
    "ratio",
    "reference",
]
