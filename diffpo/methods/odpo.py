"""ODPO: the margin that a pair should reach grows with the difference of its scores."""

from . import Preset

PRESET = Preset(
    title="Direct Preference Optimization with an Offset",
    paper="Amini et al. 2024, arXiv 2402.10571",
    settings={"beta": 5000, "link": "margin"},
    equation="-log sigma(u - a gap), gap = score_chosen - score_rejected",
    published={
        "language models": "offset a f(gap), f = log in the paper's experiments (not verified)",
    },
    notes=(
        "The offset is linear here; link_options.scale is a, in units of 1/score. Needs scores (data.columns.score_0, "
        "score_1). beta is Diffusion-DPO's, because none is published for a diffusion model."
    ),
)
