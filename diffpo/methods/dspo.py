"""DSPO: fine-tuning on the chosen images, with the target moved along the gradient of log sigma(u)."""

from . import Preset

PRESET = Preset(
    title="DSPO: Direct Score Preference Optimization for Diffusion Model Alignment",
    paper="Zhu et al., ICLR 2025",
    settings={"beta": 0.001, "link": "dspo"},
    equation="mean ((pred - y) - c (pred - pred_ref))^2 of the chosen image, c = b (1 - sigma(u))",
    published={
        "SD1.5": (
            "b 0.001 (searched in 0.001, 0.01, 0.05), beta of u the same, lr 1e-8 x batch, 2048 pairs per GPU, best at "
            "500 to 1,500 steps, AdamW, full fine-tuning"
        ),
        "SDXL": "beta 1000 to 5000 with another loss, best at 600 to 700 steps, Adafactor, full fine-tuning",
    },
    notes=(
        "link_options.weight is b, and beta scales u. At b = 0.001 this differs from fine-tuning on the chosen images "
        "by 0.05 %. The released SDXL code has another loss: it trains (1 - sigma(u))^2, here link=squared_sigmoid. It"
        " also lets sigma(u) take gradients; here sigma(u) belongs to the target. The paper in the proceedings was not"
        " read: title and authors are from its repository."
    ),
)
