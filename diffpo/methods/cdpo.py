"""cDPO: Diffusion-DPO where a share of the labels is taken to be wrong."""

from . import Preset

PRESET = Preset(
    title="A note on DPO with noisy preferences and relationship to IPO",
    paper="Mitchell 2023, ericmitchell.ai/cdpo.pdf",
    settings={"beta": 5000, "link_options": {"smoothing": 0.1}},
    equation="-(1 - e) log sigma(u) - e log sigma(-u)",
    published={
        "language models": "e is the believed share of flipped labels",
    },
    notes=(
        "The loss is least at u = log((1 - e)/e), which is 2.2 at e = 0.1. beta is Diffusion-DPO's, because none is "
        "published for a diffusion model."
    ),
)
