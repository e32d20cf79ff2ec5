"""LPO: SPO with a reward model of latents, so that candidates need no decoding."""

from . import Preset

PRESET = Preset(
    title="Diffusion Model as a Noise-Aware Latent Reward Model for Step-Level Preference Optimization",
    paper="Zhang et al. 2025, arXiv 2502.01051",
    settings={"beta": 1000, "source": "pool", "clip": 0.1, "rollout": {"start": 0, "threshold": 0.425}},
    equation="as SPO, with scores of the noisy latents from the base UNet's own features",
    published={
        "SD1.5": (
            "b 500, clip 0.1, 20 DDIM steps, eta 1, guidance 5, pool 4 from step 0, threshold 0.35 to 0.5 in "
            "proportion to sigma_t, lr 6e-5, 10 pairs x 4 GPUs, LoRA rank 4, 5 epochs of 4,000 prompts"
        ),
        "SDXL": "b 500, threshold 0.45 to 0.6, lr 1e-5, 4 pairs x 4 GPUs, LoRA rank 64, 5 epochs",
    },
    results="10 to 28 times faster than Diffusion-DPO and 2.5 to 3.5 times faster than SPO (README)",
    notes=(
        "Published b = 500 without 1/2: beta = 1000. |u| may reach 100, so the clip is almost the only bound. The "
        "threshold is constant here, the middle of SD1.5's range. Set rollout.step_scorer to a folder of `diffpo "
        "train-scorer` with the latent kind. The released code clips no gradients (as SPO's)."
    ),
)
