"""The solvers: one function per family, `solver(grid, steps, **options) -> Plan`, pure and in float64.

`steps` is the number of model calls. The function takes from `grid.nodes(n)` as many intervals as its calls make. A
solver of your own is one such function, named by its path `package.module:attribute`. One that stays in this package
also gets a line in SOLVERS.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import partial

from .._names import unknown
from ..plan import Plan
from ..stochastic import euler_maruyama, predictor_corrector, reverse_diffusion
from .adams import abm, gradient_estimation, ipndm, lms
from .aliases import ALIASES, CFG_PP, ELSEWHERE, without_cfg_pp
from .ancestral import dpm2_ancestral, dpmpp_2s_ancestral, dpmpp_sde, euler_ancestral
from .dc import dc_solver
from .ddim import ddim
from .deis import deis
from .dpmpp import dpmpp
from .ersde import er_sde
from .evodiff import evodiff
from .flowsde import flow_sde
from .pndm import pndm
from .renoise import renoise
from .rungekutta import dpm2, euler, heun, runge_kutta
from .sa import sa_solver
from .singlestep import singlestep
from .unipc import unipc
from .v3 import dpm_solver_v3

SOLVERS = {
    solver.__name__: solver
    for solver in (
        *(ddim, dpmpp, singlestep, unipc, sa_solver, dpm_solver_v3, dc_solver),
        *(abm, deis, lms, ipndm, pndm),
        *(euler, heun, dpm2, runge_kutta),
        *(euler_ancestral, dpm2_ancestral, dpmpp_2s_ancestral, dpmpp_sde),
        *(reverse_diffusion, euler_maruyama, predictor_corrector),
        *(er_sde, gradient_estimation, evodiff),
        *(flow_sde,),
    )
}


def find_solver(name: str) -> Callable[..., Plan]:
    """The solver function of a name in `SOLVERS` or `ALIASES`, or of a path `package.module:attribute`.

    An alias, such as ComfyUI's 'dpmpp_2m', has its options as defaults. A path imports its module, which runs the
    module's code. Take it from the user, never from a downloaded file.

    Raises:
        ValueError: no such name (the message has the nearest one, or what to use), module or attribute, or the
            attribute is not a function of a grid and a number of steps.
    """
    if ":" not in name:
        return _named(name)
    module_name, _, attribute = name.partition(":")
    if not (attribute.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise ValueError(f"solver {name!r} is not of the form package.module:attribute")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"solver {name!r}: module {module_name!r} cannot be imported ({error})") from error
    if not hasattr(module, attribute):
        functions = [each for each, value in vars(module).items() if inspect.isfunction(value)]
        raise unknown(f"function of module {module_name!r}", attribute, functions)
    solver = getattr(module, attribute)
    try:
        inspect.signature(solver).bind(None, 1)
    except (TypeError, ValueError):
        raise ValueError(f"{name!r} is not a solver, which is a function (grid, steps, **options) -> Plan") from None
    return solver


def _named(name: str) -> Callable[..., Plan]:
    if name in SOLVERS:
        return SOLVERS[name]
    if name in ALIASES:
        solver, options = ALIASES[name]
        function = partial({"renoise": renoise, **SOLVERS}[solver], **options)
        function.__name__ = name  # type: ignore[attr-defined]
        return function
    plain = without_cfg_pp(name)
    if name.endswith(CFG_PP) and plain in (*SOLVERS, *ALIASES):
        raise ValueError(
            f"solver {name!r} is {plain!r} with another guidance: pass solver={plain!r} and "
            "guidance=samplers.CFGPlusPlus(scale, uncond)"
        )
    if name in ELSEWHERE:
        raise ValueError(f"solver {name!r} is not one of this package: {ELSEWHERE[name]}")
    raise unknown("solver", name, (*SOLVERS, *ALIASES))
