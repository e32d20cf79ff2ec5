"""What is fitted to one model: plans, and the statistics and coefficients that they are built from.

Imports the rest of `samplers`, which imports nothing of it. Every method is a function `(problem, calls, ...) -> Plan`.
"""

from .compensation import compensated
from .gits import gits_grid
from .problem import Batch, Problem, errors, reference
from .ratios import RatioSurface, Searched, fit_surface, published_ratios
from .search import searched

__all__ = [
    "Batch",
    "Problem",
    "RatioSurface",
    "Searched",
    "compensated",
    "errors",
    "fit_surface",
    "gits_grid",
    "published_ratios",
    "reference",
    "searched",
]
