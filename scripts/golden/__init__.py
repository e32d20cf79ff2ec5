"""How each official code's cases are run through `samplers`: one file per code, `run(setting, options) -> tensor`."""

from . import ddim, dpm_solver
from .folder import Golden, Setting, Unsupported

RUNNERS = {"ddim": ddim.run, "dpm_solver": dpm_solver.run}

__all__ = ["RUNNERS", "Golden", "Setting", "Unsupported"]
