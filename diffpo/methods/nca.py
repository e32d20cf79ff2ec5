"""NCA: each reward by itself, so that the chosen image's likelihood rises."""

from . import Preset

PRESET = Preset(
    title="Noise Contrastive Alignment of Language Models with Explicit Rewards",
    paper="Chen et al. 2024, arXiv 2402.05369",
    settings={"beta": 5000, "link": "nca"},
    equation="-log sigma(r_chosen) - 1/2 log sigma(-r_chosen) - 1/2 log sigma(-r_rejected)",
    published={
        "language models": "beta 0.01 on summed log-probabilities, lr 5e-6, 32 pairs (TRL's paper index)",
    },
    notes="beta is Diffusion-DPO's, because none is published for a diffusion model.",
)
