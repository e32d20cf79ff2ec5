"""Plackett-Luce DPO: the likelihood of a whole ranking."""

from . import Preset

PRESET = Preset(
    title="Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    paper="Rafailov et al. 2023, arXiv 2305.18290, appendix A.3",
    settings={"beta": 5000, "link": "plackett_luce"},
    equation="-sum_i log softmax(r_i, ..., r_k)_i, best first",
    notes=(
        "Takes ranked lists (data.columns.images with scores or ranks, data.list_size). For lists of two it is "
        "Diffusion-DPO. beta is Diffusion-DPO's, because none is published for a diffusion model."
    ),
)
