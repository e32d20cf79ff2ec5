"""What is fitted to one model: plans, and the statistics and coefficients that they are built from.

Imports the rest of `samplers`, which imports nothing of it. Every method is a function `(problem, calls, ...) -> Plan`.
"""

from .classical import classical
from .fit import Fit, fit, ratio
from .methods import METHODS
from .problem import Batch, Problem, errors, reference

__all__ = ["METHODS", "Batch", "Fit", "Problem", "classical", "errors", "fit", "ratio", "reference"]
