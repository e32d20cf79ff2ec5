"""OFS-DPO: the reference is a slow copy of the policy."""

from . import Preset

PRESET = Preset(
    title="Online DPO: Online Direct Preference Optimization with Fast-Slow Chasing",
    paper="Qi et al. 2024, arXiv 2406.05534",
    settings={"beta": 5000, "reference": {"policy": "fast_slow", "decay": 0.5}},
    equation="-log sigma(u), reference <- reference + (1 - d)(policy's step)",
    published={
        "language models": (
            "two LoRAs of different speed and a regulariser between their preferences (values not verified)"
        ),
    },
    notes=(
        "The slow adapter takes half of each of the policy's steps. COFS-DPO combines the LoRAs of several domains: "
        "`diffpo combine LORA@0.5 LORA@0.5 --model MODEL --out FOLDER`. Left out: the slow adapter's own gradient and "
        "the regulariser between the two. beta is Diffusion-DPO's, because none is published for a diffusion model."
    ),
)
