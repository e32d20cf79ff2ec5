"""The names that users of ComfyUI, k-diffusion and RES4LYF know: each is a solver of this package and its options.

A name that this package has itself keeps its own options: `sa_solver` is the ODE here, ComfyUI's adds noise.
"""

from __future__ import annotations

_STEADY = {"lower_order_final": False}  # k-diffusion keeps the order to the end
_BAND = {"tau": (1.0, 0.2, 0.8)}  # ComfyUI's default: noise while 0.2 <= t <= 0.8

ALIASES: dict[str, tuple[str, dict]] = {
    "dpm_2": ("dpm2", {}),
    "dpm_2_ancestral": ("dpm2_ancestral", {}),
    "dpm_fast": ("singlestep", {"order": 3, "target": "epsilon", "as_published": True}),
    "dpmpp_2m": ("dpmpp", {"order": 2, **_STEADY}),
    "dpmpp_2m_sde": ("dpmpp", {"order": 2, "eta": 1.0, **_STEADY}),
    "dpmpp_2m_sde_heun": ("dpmpp", {"order": 2, "eta": 1.0, "solver_type": "heun", **_STEADY}),
    "dpmpp_3m_sde": ("dpmpp", {"order": 3, "eta": 1.0, "solver_type": "heun", **_STEADY}),
    # Refined exponential solver (Zhang et al. 2023, arXiv 2308.02157): the weights of Hochbruck & Ostermann 2005
    "res_2s": ("singlestep", {"order": 2, "solver_type": "heun"}),  # c_2 = 1/2, b_2 = phi_2 / c_2, b_1 = phi_1 - b_2
    "res_2m": ("dpmpp", {"order": 2, "solver_type": "heun", **_STEADY}),
    "res_multistep": ("dpmpp", {"order": 2, "solver_type": "heun", **_STEADY}),
    "res_3m": ("dpmpp", {"order": 3, "solver_type": "heun", **_STEADY}),
    "ddpm": ("ddim", {"eta": 1.0}),
    "lcm": ("renoise", {}),
    "ipndm_v": ("ipndm", {"variable": True}),
    "uni_pc": ("unipc", {"order": 3, "variant": "bh1"}),
    "uni_pc_bh2": ("unipc", {"order": 3, "variant": "bh2"}),
    "sa_solver_pece": ("sa_solver", {"pece": True, **_BAND}),
}
ALIASES |= {f"{name}_gpu": ALIASES[name] for name in ("dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")}
ALIASES |= {"dpmpp_sde_gpu": ("dpmpp_sde", {})}

# name -> what to use, for what is no solver of its own here
ELSEWHERE = {
    "dpm_adaptive": "it chooses its own steps: call samplers.sample_adaptive",
    "res_multistep_ancestral": "use 'dpmpp_2m_sde_heun', the SDE form with the same weights",
    "seeds_2": "use 'singlestep' with order=2, eta=1.0",
    "seeds_3": "use 'singlestep' with order=3, eta=1.0",
    "exp_heun_2_x0": "use 'res_2s', which has its second call in the middle of the step",
    "exp_heun_2_x0_sde": "use 'singlestep' with order=2, eta=1.0",
    "heunpp2": "use 'runge_kutta' with method='kutta3', which also makes three calls per step",
}
CFG_PP = "_cfg_pp"


def without_cfg_pp(name: str) -> str:
    """'euler' for 'euler_cfg_pp'; any other name as it is."""
    return name.removesuffix(CFG_PP)
