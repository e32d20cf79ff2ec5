"""InPO: images of the pairs are inverted to the levels where they are compared, not noised at random."""

from . import Preset

PRESET = Preset(
    title="InPO: Inversion Preference Optimization with Reparametrized DDIM for Efficient Diffusion Model Alignment",
    paper="Lu et al. 2025, arXiv 2503.18454",
    settings={"beta": 5000, "source": "inversion", "inversion": {"eta": 0.1}},
    equation="-log sigma(u) at x_t from DDIM inversion of x_0; y* = (x_t - alpha_t x_0)/sigma_t for a noise predictor",
    published={
        "SD1.5": (
            "beta 2000, 10 inversion steps, eta 0.1, lr 1e-8 x 1024 pairs, 400 steps, warm-up 200, AdamW, full "
            "fine-tuning of an SFT checkpoint"
        ),
        "SDXL": "beta 5000, 10 inversion steps, eta 0.1, lr 1e-8 x 1024 pairs, 400 steps, Adafactor, full fine-tuning",
    },
    results="state of the art among preference methods for text-to-image diffusion models after 400 steps (abstract)",
    notes=(
        "beta is defined as here (for SD1.5 set beta=2000). The released code draws t from 0..999 but inverts on a "
        "grid of 10 steps. So the level differs from t by up to 99 steps, and by at most 5 in only 6 % of the draws. "
        "Here t is drawn from the grid. The code inverts with the policy; here the reference inverts, so the result "
        "can be cached. The code takes the first pair's t for the whole batch. It adds eta's noise on top; here the "
        "noise replaces a share of the predicted noise."
    ),
)
