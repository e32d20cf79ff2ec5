"""Fine-tuning on the chosen or liked images, the baseline of all other methods."""

from . import Preset

PRESET = Preset(
    title="Diffusion Model Alignment Using Direct Preference Optimization",
    paper="Wallace et al. 2023, arXiv 2311.12908 (its baseline)",
    settings={"beta": 2, "link": "sft", "reference": {"policy": "none"}},
    equation="err of the chosen images",
    notes="Takes liked images or the chosen images of pairs. beta only scales the rewards that are logged.",
)
