"""SimPO: DPO without a reference and with a margin."""

from . import Preset

PRESET = Preset(
    title="SimPO: Simple Preference Optimization with a Reference-Free Reward",
    paper="Meng et al. 2024, arXiv 2405.14734, eq. 6",
    settings={"beta": 500, "link_options": {"margin": 1.0}, "reference": {"policy": "none"}},
    equation="-log sigma((beta/2)(err_rejected - err_chosen) - gamma)",
    published={
        "language models": "beta 2 to 2.5 on mean log-probabilities, gamma 1 to 1.6",
    },
    notes=(
        "beta 500 is what MaPO's margin comes to; no value for a diffusion model is published. Nothing holds the "
        "policy: short runs, or add sft."
    ),
)
