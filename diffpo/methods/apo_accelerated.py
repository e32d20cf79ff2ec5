"""Accelerated preference optimization: rounds of DPO, each started beyond the end of the one before."""

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
        "Rounds of 100 updates and a = 0.5 are this preset's choice. The extrapolation is of the LoRA factors. beta is"
        " Diffusion-DPO's, because none is published for a diffusion model."
    ),
)
