"""Diffusion-SDPO: Diffusion-DPO in which rejected images cannot raise the chosen images' error."""

from . import Preset

PRESET = Preset(
    title="Diffusion-SDPO: Safeguarded Direct Preference Optimization for Diffusion Models",
    paper="Fu et al. 2025, arXiv 2511.03317",
    settings={"beta": 5000, "winner_safeguard": 0.6},
    equation=(
        "-log sigma(u), the gradient of err_rejected times clip((1 - mu) |g_w|^2 / <g_l, g_w>, 0, 1), g = d err / d "
        "prediction"
    ),
    published={
        "SD1.5": "mu 0.9, beta 5000, lr 1e-8 x 256 pairs per GPU, 2,000 steps, bf16, full fine-tuning",
        "SDXL": "mu 0.6, beta 5000, lr 1e-9 x 256 pairs per GPU, 2,000 steps, bf16, full fine-tuning",
        "with DSPO instead of DPO": "mu 0.2",
    },
    results=(
        "higher automated preference, aesthetic and prompt alignment scores than the objective it is added to "
        "(abstract)"
    ),
    notes=(
        "beta is defined as here. winner_safeguard works with every pair objective. The released code has one factor "
        "for a batch; here each pair has its own, so the result does not depend on how a batch is split."
    ),
)
