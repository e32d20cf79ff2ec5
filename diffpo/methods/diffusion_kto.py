"""Diffusion-KTO: single images with a like or dislike, compared with the mean reward."""

from . import Preset

PRESET = Preset(
    title="Aligning Diffusion Models by Optimizing Human Utility",
    paper="Li et al. 2024, arXiv 2404.04465",
    settings={"beta": 2000, "link": "kto"},
    equation="1 - sigma(r - z) of liked images, 1 - sigma(z - r) of disliked ones, z = max(mean r, 0)",
    published={
        "SD1.5": (
            "b 1000, both weights 1, lr 1e-7, 8 images, 20,000 steps, 80 % liked images, 8-bit AdamW, full fine-tuning"
        ),
    },
    results="beats fine-tuning and Diffusion-DPO on PickScore, ImageReward and in human evaluation (abstract)",
    notes=(
        "Published b = 1000 has no 1/2: beta = 2000. Takes images with likes (data.columns.image, liked), or pairs as "
        "one liked and one disliked image. z is the mean of the previous update over all processes (in the released "
        "code: of the current batch). Its full fine-tuning casts the trained weights to half precision unless it runs "
        "under DeepSpeed."
    ),
)
