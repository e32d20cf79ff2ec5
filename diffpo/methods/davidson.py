"""Davidson DPO: a tie is an outcome of its own, as likely as the geometric mean of win and loss."""

from . import Preset

PRESET = Preset(
    title="On Extending Direct Preference Optimization to Accommodate Ties",
    paper="Chen et al. 2024, arXiv 2409.17431; Davidson 1970",
    settings={"beta": 5000, "link": "davidson"},
    equation="win -log(e^(u/2)/Z), tie -log(2 nu/Z), Z = e^(u/2) + e^(-u/2) + 2 nu",
    published={
        "language models": "nu 1: half of even matches are ties",
    },
    results="as Rao-Kupper DPO",
    notes=(
        "Set data.ties=soft; otherwise tied pairs are dropped. beta is Diffusion-DPO's, because none is published for "
        "a diffusion model."
    ),
)
