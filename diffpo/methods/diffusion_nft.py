"""DiffusionNFT: regression onto the policy's own good samples, and away from the bad ones."""

from . import Preset

PRESET = Preset(
    title="DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
    paper="Zheng et al. 2025, arXiv 2509.16117",
    settings={
        "beta": 5000,
        "source": "samples",
        "link": "nft_adaptive",
        "link_weight": 5.0,
        "kl": 1e-4,
        "forward": {"shared_noise": False},
        "rollout": {
            "samples": 24,
            "steps": 10,
            "eta": 0.0,
            "guidance": 1.0,
            "same_noise": False,
            "sampler": "behaviour",
        },
        "behaviour": {"policy": "ema", "ramp": 0.001},
    },
    equation=(
        "5 [liked ||v+ - y||^2/w+ + (1 - liked) ||v- - y||^2/w-]/b + 1e-4 ||v - v_base||^2, v+- = v_old +- b (v - "
        "v_old), errors as x_0 and w+- their mean absolute value; liked = clip(A/5, -1, 1)/2 + 1/2, A the group's "
        "standardised score"
    ),
    published={
        "SD3.5-M": (
            "b 1 (GenEval, PickScore) or 0.1 (OCR, several rewards), lr 3e-4, 48 groups of 24 images, KL weight 1e-4, "
            "decay rising by 0.001 a round from 0 to 0.5, LoRA rank 32 alpha 64, about 1,000 steps, no guidance"
        ),
    },
    results="SD3.5-M: GenEval 0.24 -> 0.98 within 1,000 steps; up to 25 times more efficient than Flow-GRPO (abstract)",
    notes=(
        "link_options.mix is the published beta; the setting beta only scales the rewards that are logged. Set "
        "rollout.scorers. The old policy is the behaviour policy, which moves at the end of a round. link nft is the "
        "same without adaptive weights. The flow family's spread of the whole round is "
        "rollout.advantages.spread=round. The 10 sampling steps were not verified."
    ),
)
