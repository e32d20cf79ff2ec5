"""How each official code's cases are run through `samplers`: one file per code, `run(setting, options) -> tensor`."""

from . import ddim, deis, diff_sampler, dpm_solver, edm, evodiff, k_diffusion, sa_solver, score_sde, unipc
from .folder import Golden, Setting, Unsupported

RUNNERS = {
    "ddim": ddim.run,
    "deis": deis.run,
    "diff_sampler": diff_sampler.run,
    "dpm_solver": dpm_solver.run,
    "edm": edm.run,
    "evodiff": evodiff.run,
    "k_diffusion": k_diffusion.run,
    "sa_solver": sa_solver.run,
    "score_sde": score_sde.run,
    "unipc": unipc.run,
}

__all__ = ["RUNNERS", "Golden", "Setting", "Unsupported"]
