"""ASFT: fine-tuning with the absolute odds of the chosen and of the rejected image, without a reference."""

from . import Preset

PRESET = Preset(
    title="ASFT: Aligned Supervised Fine-Tuning through Absolute Likelihood",
    paper="Wang et al. 2024, arXiv 2409.10571",
    settings={"beta": 2, "link": "asft", "reference": {"policy": "none"}},
    equation="err_chosen - log sigma(log odds(e^-err_chosen)) - log sigma(-log odds(e^-err_rejected))",
    notes=(
        "The link uses errors as -log p. With beta = 2 the logged rewards are log p. The gradient is largest on "
        "rejected images of small error."
    ),
)
