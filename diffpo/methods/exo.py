"""EXO, for diffusion models DMPO: the reverse KL between label and model in place of the cross-entropy."""

from . import Preset

PRESET = Preset(
    title="Divergence Minimization Preference Optimization for Diffusion Model Alignment",
    paper="Li et al. 2025, arXiv 2507.07510; EXO: Ji et al. 2024, arXiv 2402.00856",
    settings={"beta": 2000, "link": "exo"},
    equation="sigma(u) [log sigma(u) - log(1 - e)] + sigma(-u) [log sigma(-u) - log e]",
    published={
        "SD1.5, SDXL (DMPO)": "beta 2000, e 0.01 (called alpha)",
        "language models (EXO)": "beta 0.1 on summed log-probabilities, lr 1e-6, 64 pairs (TRL's paper index)",
    },
    results=(
        "at least 64.6 % PickScore win rate over all baselines (abstract of v1; v2 claims the best PickScore in each "
        "case)"
    ),
    notes="beta is defined as here. The losses of the two papers are the same function.",
)
