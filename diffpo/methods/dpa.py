"""DPA: one LoRA for all weights of several rewards; the weights are given when pictures are made."""

from . import Preset

PRESET = Preset(
    title=(
        "Arithmetic Control of LLMs for Diverse User Preferences: Directional Preference Alignment with "
        "Multi-Objective Rewards"
    ),
    paper="Wang et al. 2024, arXiv 2402.18571",
    settings={"beta": 5000, "steered": True},
    equation=(
        "-log sigma(r(x_better | caption, w) - r(x_worse | caption, w)), better by w . rewards, w drawn for each pair"
    ),
    published={
        "language models": (
            "directions in the plane of helpfulness and verbosity, written into the prompt; rejection sampling "
            "fine-tuning of the best samples by the weighted sum (numbers not verified)"
        ),
    },
    results="a better trade-off of helpfulness against verbosity than SteerLM and DPO (abstract)",
    notes=(
        "Name the rewards with data.columns.rewards=[A, B]: columns A_0, A_1, B_0, B_1. Each is taken in units of its "
        "root mean square over the pairs. Pairs train it instead of rejection sampling, and the weights enter as "
        'tokens of their own in cross-attention, not as text. Then `diffpo generate --steer "A:0.7 B:0.3"`. beta is '
        "Diffusion-DPO's."
    ),
)
