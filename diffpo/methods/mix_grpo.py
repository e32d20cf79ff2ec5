"""MixGRPO: noise, and training, in a moving window of the sampler's steps; the others follow the ODE."""

from . import Preset

PRESET = Preset(
    title="MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE",
    paper="Li et al. 2025, arXiv 2507.21802",
    settings={
        "beta": 2.0,
        "source": "trajectory",
        "link": "clipped_ratio",
        "link_options": {"clip": 1e-4},
        "rollout": {
            "samples": 12,
            "steps": 25,
            "step": "flow_sde",
            "step_options": {"amount": 0.7},
            "window": 4,
            "updates": 4,
        },
        "reference": {"policy": "none"},
        "behaviour": {"policy": "sync"},
    },
    equation="as flow_grpo without KL, in steps l to l + w - 1; the others have g = 0. l moves on by 1 every s rounds",
    published={
        "FLUX.1-dev": "window 4, moved by 1 every 25 rounds, 25 steps, 12 images of a prompt, lr 1e-5 (not verified)"
    },
    notes=(
        "Set rollout.scorers. On a UNet set rollout.step=ddim. MixGRPO-Flash's high-order solver after the window is "
        "left out. beta as in ddpo."
    ),
)
