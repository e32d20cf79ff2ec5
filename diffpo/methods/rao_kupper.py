"""Rao-Kupper DPO: a tie is an outcome of its own, for rewards that differ by less than a threshold."""

from . import Preset

PRESET = Preset(
    title="On Extending Direct Preference Optimization to Accommodate Ties",
    paper="Chen et al. 2024, arXiv 2409.17431; Rao and Kupper 1967",
    settings={"beta": 5000, "link": "rao_kupper"},
    equation="win -log sigma(u - a), tie -log[(e^2a - 1) sigma(u - a) sigma(-u - a)]",
    published={
        "language models": "nu = e^a = 3: half of even matches are ties",
    },
    results=(
        "ties can be added to the data without the loss of quality that DPO has from them; they regularise (abstract)"
    ),
    notes=(
        "Set data.ties=soft; otherwise tied pairs are dropped. beta is Diffusion-DPO's, because none is published for "
        "a diffusion model."
    ),
)
