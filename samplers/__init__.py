"""Fast, exact sampling of diffusion models, with every solver as a table of numbers."""

from . import adjoint, forward, gradients, likelihood
from ._needs import needs as _needs
from .adaptive import sample_adaptive
from .cfgpp import CFGPlusPlus
from .default import default_solver
from .grid import Grid, Nodes
from .inpainting import inpaint
from .origin import Origin
from .plan import Plan, State
from .prediction import Guidance, convert, dynamic_threshold, guide
from .sample import build_plan, sample
from .schedule import EDM, RectifiedFlow, Schedule, VPDiscrete, VPLinear
from .solvers import SOLVERS
from .solvers.afs import without_first_call
from .solvers.denoise import then_denoise
from .solvers.dualfast import dualfast
from .solvers.renoise import renoise
from .statistics import Statistics
from .transition import Transition

_NAMED = (  # SolverScheduler with a fixed solver: named.py
    "DDIM",
    "DDPM",
    "DEIS",
    "DPMSolver2M",
    "DPMSolverPP2M",
    "DPMSolverPP2MSDE",
    "DPMSolverPP2S",
    "DPMSolverPP2SAncestral",
    "DPMSolverPP3M",
    "DPMSolverPP3S",
    "DPMSolverPPSDE",
    "Euler",
    "EulerAncestral",
    "Heun",
    "IPNDM",
    "KDPM2",
    "KDPM2Ancestral",
    "LMS",
    "PNDM",
    "SASolver",
    "UniPC",
)

__all__ = [
    "SOLVERS",
    "EDM",
    "CFGPlusPlus",
    "Grid",
    "Guidance",
    "Nodes",
    "Origin",
    "Plan",
    "RectifiedFlow",
    "Schedule",
    "SolverScheduler",
    "State",
    "Statistics",
    "Transition",
    "VPDiscrete",
    "VPLinear",
    "adjoint",
    "build_plan",
    "convert",
    "default_solver",
    "dualfast",
    "dynamic_threshold",
    "forward",
    "gradients",
    "guide",
    "inpaint",
    "likelihood",
    "renoise",
    "sample",
    "sample_adaptive",
    "then_denoise",
    "without_first_call",
    *_NAMED,
]


def __getattr__(name: str):
    # Only these need diffusers, which is slow to import. When diffusers loads a saved pipeline, it looks for
    # SchedulerMixin in the class's module to find out how to load the class.
    if name in ("SolverScheduler", "SchedulerMixin", *_NAMED):
        _needs("diffusers", f"samplers.{name}")
        from . import named, scheduler

        return getattr(named if name in _NAMED else scheduler, name)
    raise AttributeError(f"module 'samplers' has no attribute {name!r}")
