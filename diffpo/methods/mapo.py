"""MaPO: fine-tuning on the chosen images and a bounded margin, without a reference."""

from . import Preset

PRESET = Preset(
    title="Margin-aware Preference Optimization for Aligning Diffusion Models without Reference",
    paper="Hong et al. 2024, arXiv 2406.06424",
    settings={"beta": 500, "link": "mapo", "reference": {"policy": "none"}},
    equation="err_chosen - 0.1 log sigma(1000 (s(err_chosen) - s(err_rejected))), s(l) = kappa l/(e^(kappa l) - 1)",
    published={
        "SDXL": (
            "lambda 0.1, kappa 0.5, T 1000, lr 1e-5, 16 pairs, 2,000 steps, 8-bit AdamW, full fine-tuning or LoRA rank "
            "8"
        ),
    },
    results=(
        "15 % less training time than Diffusion-DPO, and a gain that grows with the mismatch between reference and "
        "data (abstract)"
    ),
    notes=(
        "The link uses errors and no rewards. beta = kappa T = 500 is the equivalent value at small errors, and only "
        "scales the rewards that are logged."
    ),
)
