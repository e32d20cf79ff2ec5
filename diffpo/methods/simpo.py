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
        "beta 500 is the equivalent of MaPO's margin; none is published for a diffusion model. No reference limits the"
        " policy: train briefly, or add sft."
    ),
)
