"""What is fitted to one model: plans, and the statistics and coefficients that they are built from.

Imports the rest of `samplers`, which imports nothing of it. Every method is a function `(problem, calls, ...) -> Plan`.
"""

from .baseline import baseline, classical
from .compensation import compensated
from .fit import Fitted, fit, ratio
from .gits import gits_grid
from .learn import GaussNewton, learned
from .methods import METHODS
from .problem import Batch, Problem, errors, reference
from .ratios import DCRatios, RatioSurface, fit_surface, published_ratios
from .search import searched
from .statistics import estimate
from .transport import Transport, fit_transport, latents_at
from .v3 import v3

__all__ = [
    "METHODS",
    "Batch",
    "DCRatios",
    "Fitted",
    "GaussNewton",
    "Problem",
    "RatioSurface",
    "Transport",
    "baseline",
    "classical",
    "compensated",
    "errors",
    "estimate",
    "fit",
    "fit_surface",
    "fit_transport",
    "gits_grid",
    "latents_at",
    "learned",
    "published_ratios",
    "ratio",
    "reference",
    "searched",
    "v3",
]
