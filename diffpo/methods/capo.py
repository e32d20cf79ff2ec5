"""CaPO: regression of the margin onto the difference of calibrated scores."""

from . import Preset

PRESET = Preset(
    title="Calibrated Multi-Preference Optimization for Aligning Diffusion Models",
    paper="Lee et al. 2025, arXiv 2502.02588",
    settings={"beta": 5000, "link": "capo"},
    equation="(u - gap)^2, gap the difference of expected win rates",
    published={
        "SDXL, SD3-M": (
            "100,000 DiffusionDB prompts with 16 images each, rewards calibrated to win rates against the base model, "
            "pairs from Pareto fronts (beta not verified)"
        ),
    },
    results="GenEval 0.55 -> 0.59 (SDXL) and 0.68 -> 0.71 (SD3-M) (a review of the paper)",
    notes=(
        "Needs scores that are win rates in 0..1 (data.columns.score_0, score_1). Calibrate the scores and choose the "
        "pairs when you make the data. beta is Diffusion-DPO's."
    ),
)
