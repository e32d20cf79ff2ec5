"""Davidson DPO: ties are an outcome of their own, as likely as win and loss together suggest."""

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
        "Set data.ties=soft, or tied pairs are dropped before they get here. beta is Diffusion-DPO's; no value for a "
        "diffusion model is published."
    ),
)
