"""Flow-GRPO: a clipped policy gradient on the steps of the flow's SDE, with a KL divergence to the base."""

from . import Preset

PRESET = Preset(
    title="Flow-GRPO: Training Flow Matching Models via Online RL",
    paper="Liu et al. 2025, arXiv 2505.05470",
    settings={
        "beta": 2.0,
        "source": "trajectory",
        "link": "clipped_ratio",
        "link_options": {"clip": 1e-4},
        "kl": 0.04,
        "rollout": {
            "samples": 24,
            "steps": 10,
            "step": "flow_sde",
            "step_options": {"amount": 0.7},
            "guidance": 4.5,
            "same_noise": False,
        },
        "behaviour": {"policy": "sync"},
    },
    equation=(
        "-min(A rho, A clip(rho, 1 - e, 1 + e)) + w KL(policy || base) at each step of dx = [v + g^2/(2t) (x + (1 - t) "
        "v)] dt + g dw, g = a sqrt(t/(1 - t)); KL = k (pred - pred_base)^2"
    ),
    published={
        "SD3.5-M": (
            "a 0.7, 10 steps in training, guidance 4.5, 24 images of a prompt, clip 1e-4, KL weight 0.04 (GenEval, "
            "OCR) or 0.01 (PickScore), advantages cut at 5, lr 3e-4, LoRA rank 32 alpha 64"
        ),
    },
    results="SD3.5-M: GenEval 0.63 -> 0.95, OCR 0.59 -> 0.92, PickScore 21.72 -> 23.31 (paper)",
    notes=(
        "Set rollout.scorers. The steps are exact for a fixed x_0, so the flow's marginals are kept at 10 steps; the "
        "paper's Euler-Maruyama steps are rollout.step_options.as_published=true. On a UNet set rollout.step=ddim. The "
        "spread of all images of the round as unit is rollout.advantages.spread=round. beta as in ddpo."
    ),
)
