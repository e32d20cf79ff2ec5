"""SPIN-Diffusion: images of the data are preferred to the reference's own samples, in several rounds."""

from . import Preset

PRESET = Preset(
    title="Self-Play Fine-Tuning of Diffusion Models for Text-to-Image Generation",
    paper="Yuan et al. 2024, arXiv 2402.10210",
    settings={"beta": 5000, "source": "self_play", "rollout": {"guidance": 1.0}},
    equation="-log sigma(u) of a pair (image of the data, sample of the reference)",
    published={
        "SD1.5": "up to three rounds on the chosen images of Pick-a-Pic (beta and learning rate not verified)",
    },
    notes=(
        "beta is Diffusion-DPO's. The reference samples without guidance: guided samples are of another distribution "
        "than the one in the reward. For the rounds set reference.policy=sync and reference.every to the updates of a "
        "round. Needs no preferences: only the chosen image of a pair is used."
    ),
)
