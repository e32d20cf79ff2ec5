"""Diffusion-NPO: a model of what people reject, for the unconditional half of guidance."""

from . import Preset

PRESET = Preset(
    title=(
        "Diffusion-NPO: Negative Preference Optimization for Better Preference Aligned Generation of Diffusion Models"
    ),
    paper="Wang et al. 2025, arXiv 2505.11245",
    settings={"beta": 500, "flipped": True},
    equation="-log sigma(r_rejected - r_chosen); sampling with u + s (c - u), c by the tuned model, u by this one",
    published={
        "SD1.5": "beta 500, lr 5e-6, 64 pairs, 5,000 steps, LoRA rank 8, Pick-a-Pic v1 (README)",
        "SDXL": "beta 2000, 2,000 steps (name of the released weights)",
    },
    results="better PickScore, HPSv2 and ImageReward than the same positive model alone, at guidance 5 (README)",
    notes=(
        "Trains a LoRA like diffusion_dpo's, towards the worse images. Then `diffpo generate --lora POSITIVE "
        "--negative-lora THIS`: the unconditional half is computed by base + positive + negative change, as in the "
        "released code (its merge_weight 0). Without --lora the positive model is the base. The same works for other "
        "objectives of data: objective.flipped=true. Of those that sample for themselves (the paper's SPO and reward "
        "variants) name a scorer of the opposite sign."
    ),
)
