"""IPO: regression of the margin onto a target, so that the margin stays bounded."""

from . import Preset

PRESET = Preset(
    title="A General Theoretical Paradigm to Understand Learning from Human Preferences",
    paper="Azar et al. 2023, arXiv 2310.12036, eq. 17",
    settings={"beta": 5000, "link": "ipo"},
    equation="(u - 1/2)^2",
    published={
        "language models": "(h - 1/(2 tau))^2 of the log-ratio difference h",
    },
    notes=(
        "Rescaled: with u = tau h this is tau^2 times the published loss, and beta has tau's role. The diffusers "
        "script takes h in raw errors, for which the target is far too large, and ends in an AttributeError. beta is "
        "Diffusion-DPO's, because none is published for a diffusion model."
    ),
)
