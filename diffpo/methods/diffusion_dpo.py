"""Diffusion-DPO: the Bradley-Terry likelihood of the pairs, with both errors at one (t, eps)."""

from . import Preset

PRESET = Preset(
    title="Diffusion Model Alignment Using Direct Preference Optimization",
    paper="Wallace et al. 2023, arXiv 2311.12908, eq. 14",
    settings={"beta": 5000},
    equation="-log sigma(u)",
    published={
        "SD1.5": (
            "beta 5000 (released launcher; whether the paper's text has 2000 was not verified), lr 1e-8 x 2048 pairs, "
            "2,000 steps, warm-up 500, AdamW, full fine-tuning, 512 px, prompt dropout 0.2"
        ),
        "SDXL": "beta 5000, lr 1e-8 x 2048 pairs, 2,000 steps, warm-up 200, Adafactor, full fine-tuning, 1024 px",
        "SD1.5 and SDXL, LoRA (diffusers example)": (
            "beta 2500 without the 1/2 and 5000 with it, which is the same; lr 1e-5, 32 and 16 pairs, 10,000 and 2,000 "
            "steps, rank 8"
        ),
    },
    results=(
        "SDXL-DPO is preferred by human raters over SDXL base and over base + refiner (851,293 Pick-a-Pic v2 pairs); "
        "about 24 h (SD1.5, 2,000 steps) on 16 GPUs"
    ),
    notes=(
        "beta is defined as here. The released code evaluates the reference in half precision, which adds noise to u "
        "(std 0.09 in fp16, 0.73 in bf16 at an error of 0.1). Its README and its launcher differ by a factor of 128 in"
        " batch and learning rate."
    ),
)
