"""The solvers: one function per family, `solver(grid, steps, **options) -> Plan`, pure and in float64.

`steps` is the number of model calls; the function asks `grid.nodes(n)` for as many intervals as its calls make. A
new solver is one such function and one line in SOLVERS.
"""

from .ddim import ddim
from .dpmpp import dpmpp

SOLVERS = {"ddim": ddim, "dpmpp": dpmpp}

__all__ = ["SOLVERS", "ddim", "dpmpp"]
