"""DPO-Positive: a penalty where the chosen image's reward is negative."""

from . import Preset

PRESET = Preset(
    title="Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
    paper="Pal et al. 2024, arXiv 2402.13228, eq. 3",
    settings={"beta": 5000, "link": "dpop", "link_options": {"weight": 50.0}},
    equation="-log sigma(u - lambda max(0, -r_chosen))",
    published={
        "language models": "lambda 50, beta 0.3 on summed log-probabilities (not verified)",
    },
    notes="beta is Diffusion-DPO's, because none is published for a diffusion model.",
)
