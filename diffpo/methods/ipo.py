"""IPO: the margin is regressed onto a target, so that it does not grow without end."""

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
        "Rescaled: with u = tau h this is tau^2 times the published loss, and tau's role is beta's. The diffusers "
        "script takes h in raw errors (target out of scale) and ends in an AttributeError. beta is Diffusion-DPO's; no "
        "value for a diffusion model is published."
    ),
)
