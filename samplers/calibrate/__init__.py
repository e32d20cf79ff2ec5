"""What is fitted to one model: plans, and the statistics and coefficients that they are built from.

Imports the rest of `samplers`, which imports nothing of it. Every method is a function `(problem, calls, ...) -> Plan`.
"""

from .problem import Batch, Problem, errors, reference
from .statistics import estimate
from .v3 import v3

__all__ = ["Batch", "Problem", "errors", "estimate", "reference", "v3"]
