"""Accelerated preference optimization: rounds of DPO, each started beyond where the last one ended."""

from . import Preset

PRESET = Preset(
    title="Accelerated Preference Optimization for Large Language Model Alignment",
    paper="He et al. 2024, arXiv 2410.06293",
    settings={"beta": 5000, "reference": {"policy": "accelerated", "every": 100}},
    equation="-log sigma(u); every round: policy <- reference <- policy + a (policy - policy of the round before)",
    published={
        "language models": "three rounds over the data with Nesterov's extrapolation (its weight not verified)",
    },
    results=(
        "faster than iterative DPO in theory; AlpacaEval 2.0 length-controlled win rate 31.73 % (a summary of the "
        "paper)"
    ),
    notes=(
        "Rounds of 100 updates and a = 0.5 are set here. Policies are extrapolated by their LoRA factors. beta is "
        "Diffusion-DPO's; no value for a diffusion model is published."
    ),
)
