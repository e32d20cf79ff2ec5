"""How each official code's cases are run through `samplers`: one file per code, `run(setting, options) -> tensor`."""

from . import (
    adjoint_dpm,
    dc_solver,
    ddim,
    deis,
    diff_sampler,
    dpm_solver,
    dpm_solver_v3,
    edm,
    evodiff,
    gits,
    k_diffusion,
    sa_solver,
    score_sde,
    unipc,
)
from .folder import Golden, Setting, Unsupported

RUNNERS = {
    "adjoint_dpm": adjoint_dpm.run,
    "dc_cpr": dc_solver.regression,
    "dc_solver": dc_solver.run,
    "dc_solver_diffusers": dc_solver.run_diffusers,
    "dc_solver_search": dc_solver.search,
    "ddim": ddim.run,
    "deis": deis.run,
    "diff_sampler": diff_sampler.run,
    "dpm_solver": dpm_solver.run,
    "dpm_solver_v3": dpm_solver_v3.run,
    "edm": edm.run,
    "gits_dp": gits.run,
    "ems_estimation": dpm_solver_v3.run_estimation,
    "evodiff": evodiff.run,
    "k_diffusion": k_diffusion.run,
    "sa_solver": sa_solver.run,
    "score_sde": score_sde.run,
    "unipc": unipc.run,
}

__all__ = ["RUNNERS", "Golden", "Setting", "Unsupported"]
