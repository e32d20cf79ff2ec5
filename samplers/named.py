"""Schedulers by name: each is `SolverScheduler` with its solver and options fixed.

    pipe.scheduler = samplers.UniPC.from_config(pipe.scheduler.config)

docs/diffusers.md lists which diffusers scheduler each one replaces and where the two agree. Everything but the solver
stays configurable: grid, eta, solver_options, prediction_type and so on.
"""

from .scheduler import SolverScheduler


class DDIM(SolverScheduler, solver="ddim"):
    """DDIM (arXiv 2010.02502). `eta` in the config or the pipeline call adds noise."""


class DDPM(SolverScheduler, solver="ddim", eta=1.0):
    """Ancestral sampling of DDPM (arXiv 2006.11239) on any number of steps: DDIM with eta = 1."""


class DPMSolverPP2M(SolverScheduler, solver="dpmpp", order=2):
    """DPM-Solver++(2M) (arXiv 2211.01095)."""


class DPMSolverPP3M(SolverScheduler, solver="dpmpp", order=3):
    """DPM-Solver++(3M) (arXiv 2211.01095), with the third-order term corrected (docs/corrections.md)."""


class DPMSolverPP2MSDE(SolverScheduler, solver="dpmpp", order=2, eta=1.0):
    """SDE-DPM-Solver++(2M), "DPM++ 2M SDE" (arXiv 2211.01095)."""


class DPMSolverPP2S(SolverScheduler, solver="singlestep", order=2):
    """DPM-Solver++(2S) (arXiv 2211.01095): two calls per step, any number of calls."""


class DPMSolverPP3S(SolverScheduler, solver="singlestep", order=3):
    """DPM-Solver++(3S) (arXiv 2211.01095): three calls per step, any number of calls."""


class DPMSolverPPSDE(SolverScheduler, solver="dpmpp_sde"):
    """k-diffusion's single-step DPM++ SDE: two calls per step, one in the last."""


class DPMSolver2M(SolverScheduler, solver="dpmpp", order=2, target="epsilon"):
    """DPM-Solver multistep of order 2 (arXiv 2206.00927), on the noise prediction."""


class Euler(SolverScheduler, solver="euler"):
    """Euler's method in sigma / alpha (= DDIM), with EDM's churn by solver_options."""


class EulerAncestral(SolverScheduler, solver="euler_ancestral"):
    """Ancestral sampling with Euler steps (k-diffusion)."""


class Heun(SolverScheduler, solver="heun"):
    """Heun's method of EDM (arXiv 2206.00364): two calls per step, one in the last."""


class KDPM2(SolverScheduler, solver="dpm2"):
    """DPM-Solver-2 as in k-diffusion: two calls per step, one in the last."""


class KDPM2Ancestral(SolverScheduler, solver="dpm2_ancestral"):
    """Ancestral sampling with DPM-Solver-2 steps, two calls each."""


class DPMSolverPP2SAncestral(SolverScheduler, solver="dpmpp_2s_ancestral"):
    """Ancestral sampling with DPM-Solver++(2S) steps, two calls each."""


class LMS(SolverScheduler, solver="lms"):
    """Linear multistep method of order 4 in sigma / alpha."""


class PNDM(SolverScheduler, solver="pndm"):
    """PNDM (arXiv 2202.09778) with Stable Diffusion's short warm-up (PLMS)."""


class IPNDM(SolverScheduler, solver="ipndm"):
    """iPNDM (arXiv 2204.13902): PNDM's coefficients without its warm-up."""


class UniPC(SolverScheduler, solver="unipc"):
    """UniPC (arXiv 2302.04867); `solver_order` (2) and `solver_type` ('bh2') as in diffusers."""


class DEIS(SolverScheduler, solver="deis"):
    """DEIS (arXiv 2204.13902), the paper's tAB; solver_type='logrho' is diffusers' variant."""


class SASolver(SolverScheduler, solver="sa_solver"):
    """SA-Solver (arXiv 2309.05019); predictor_order, corrector_order and tau by solver_options."""


for _class in [value for value in globals().values() if isinstance(value, type)]:
    _class.__module__ = "samplers"  # the name in saved pipelines: `import samplers` is enough to load them
del _class
