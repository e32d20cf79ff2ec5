"""Hinge: pairs count until their margin is 1. The link of Diffusion-DRO, and of SLiC before it."""

from . import Preset

PRESET = Preset(
    title="Ranking-based Preference Optimization for Diffusion Models from Implicit User Feedback",
    paper="Wu et al. 2025, arXiv 2510.18353; hinge on rewards: SLiC-HF, arXiv 2305.10425, and RSO, arXiv 2309.06657",
    settings={"beta": 2000, "link": "hinge"},
    equation="max(0, 1 - u)",
    published={
        "SD1.5 (Diffusion-DRO)": (
            "max(0, m - (d_expert - d_policy)), d = err_ref - err, m 1e-3, experts the 500 best images, negatives "
            "sampled from the policy, independent noise"
        ),
    },
    notes=(
        "Diffusion-DRO's margin m on raw errors is this loss with beta/2 = 1/m, so beta = 2000, up to a factor m. Only"
        " its link is implemented: Diffusion-DRO also samples the negatives from the policy at intermediate x_t."
    ),
)
