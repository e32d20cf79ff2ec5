"""DRaFT: the gradient of a differentiable reward through the last calls of the sampler, into the LoRA."""

from . import Preset

PRESET = Preset(
    title="Directly Fine-Tuning Diffusion Models on Differentiable Rewards",
    paper="Clark et al. 2023, arXiv 2309.17400",
    settings={
        "beta": 1.0,
        "source": "reward",
        "direct": {"calls": 1},
        "rollout": {"steps": 50, "eta": 0.0, "guidance": 7.5},
        "reference": {"policy": "none"},
    },
    equation="-reward(decode(x_0)), x_0 sampled; the gradient stops before the last K calls (DRaFT-K)",
    published={
        "SD1.4": "K 1, 50 DDIM steps, guidance 7.5, LoRA on all attention layers (steps and scale not verified)"
    },
    results="more than 200 times faster than reinforcement learning on the aesthetic reward (paper; not verified)",
    notes=(
        "Set rollout.scorers to one scorer with gradients (pickscore, hps, clip, aesthetic, or a class of your own "
        "with rate), or rollout.step_scorer to a folder of `diffpo train-scorer`. direct.calls is K; null: all. "
        "DRaFT-LV is direct.copies=2 with K = 1. The activations of one call are kept at a time, whatever K, and "
        "calls are repeated in the backward pass. beta is not used. Rewards are hacked sooner or later: watch another "
        "score on held-out prompts."
    ),
)
