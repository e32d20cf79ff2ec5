"""The solvers: one function per family, `solver(grid, steps, **options) -> Plan`, pure and in float64.

`steps` is the number of model calls; the function asks `grid.nodes(n)` for as many intervals as its calls make. A
new solver is one such function and one line in SOLVERS.
"""

from ..stochastic import euler_maruyama, predictor_corrector, reverse_diffusion
from .adams import abm, ipndm, lms
from .ancestral import dpm2_ancestral, dpmpp_2s_ancestral, dpmpp_sde, euler_ancestral
from .ddim import ddim
from .deis import deis
from .dpmpp import dpmpp
from .pndm import pndm
from .rungekutta import dpm2, euler, heun, runge_kutta
from .sa import sa_solver
from .singlestep import singlestep
from .unipc import unipc

SOLVERS = {
    solver.__name__: solver
    for solver in (
        *(ddim, dpmpp, singlestep, unipc, sa_solver),
        *(abm, deis, lms, ipndm, pndm),
        *(euler, heun, dpm2, runge_kutta),
        *(euler_ancestral, dpm2_ancestral, dpmpp_2s_ancestral, dpmpp_sde),
        *(reverse_diffusion, euler_maruyama, predictor_corrector),
    )
}
