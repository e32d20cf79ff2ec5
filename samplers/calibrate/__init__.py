"""What is fitted to one model: plans, and the statistics and coefficients that they are built from.

Imports the rest of `samplers`, which imports nothing of it. Every method is a function `(problem, calls, ...) -> Plan`.
"""

from .problem import Batch, Problem, errors, reference
from .transport import Transport, fit_transport, latents_at

__all__ = ["Batch", "Problem", "Transport", "errors", "fit_transport", "latents_at", "reference"]
