"""ORPO: fine-tuning on the chosen images plus their log-odds against the rejected ones, without a reference."""

from . import Preset

PRESET = Preset(
    title="ORPO: Monolithic Preference Optimization without Reference Model",
    paper="Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7",
    settings={"beta": 2, "link": "orpo", "reference": {"policy": "none"}},
    equation="err_chosen - lambda log sigma(log odds(e^-err_chosen) - log odds(e^-err_rejected))",
    published={
        "language models": "lambda 0.1",
    },
    notes=(
        "The link uses errors as -log p. With beta = 2 the logged rewards are log p. diffusers' example has the sign "
        "reversed, so that it raises the chosen image's error against the rejected one's; its README points to MaPO "
        "instead."
    ),
)
