"""What is fitted to one model: plans, and the statistics and coefficients that they are built from.

Imports the rest of `samplers`, which imports nothing of it. Every method is a function `(problem, calls, ...) -> Plan`.
"""

from .learn import Fit, best_classical, classical, learned
from .problem import Batch, Problem, errors, reference

__all__ = ["Batch", "Fit", "Problem", "best_classical", "classical", "errors", "learned", "reference"]
