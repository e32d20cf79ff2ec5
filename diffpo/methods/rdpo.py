"""rDPO: an unbiased estimate of DPO's loss when a known share of the labels is flipped."""

from . import Preset

PRESET = Preset(
    title="Provably Robust DPO: Aligning Language Models with Noisy Feedback",
    paper="Chowdhury et al. 2024, arXiv 2403.00409",
    settings={"beta": 5000, "link": "robust"},
    equation="[-(1 - e) log sigma(u) + e log sigma(-u)]/(1 - 2 e)",
    published={
        "language models": (
            "e 0.1, the share of flipped labels; beta 0.01 on summed log-probabilities, lr 1e-3, 16 pairs (TRL's paper "
            "index)"
        ),
    },
    notes=(
        "Unbounded below: the gradient raises u also where cDPO stops. beta is Diffusion-DPO's, because none is "
        "published for a diffusion model."
    ),
)
