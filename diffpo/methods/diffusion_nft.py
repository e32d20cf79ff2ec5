"""DiffusionNFT: regression onto the policy's own good samples, and away from the bad ones."""

from . import Preset

PRESET = Preset(
    title="DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
    paper="Zheng et al. 2025, arXiv 2509.16117",
    settings={
        "beta": 5000,
        "source": "samples",
        "link": "nft",
        "forward": {"shared_noise": False},
        "rollout": {
            "samples": 24,
            "steps": 10,
            "eta": 0.0,
            "guidance": 1.0,
            "same_noise": False,
            "sampler": "reference",
        },
        "reference": {"policy": "ema", "decay": 0.5},
    },
    equation=(
        "[liked ||v+ - y||^2 + (1 - liked) ||v- - y||^2]/b, v+- = v_old +- b (v - v_old); liked = clip(A/5, -1, 1)/2 + "
        "1/2, A the group's standardised score"
    ),
    published={
        "SD3.5-M": (
            "b 1 (GenEval, PickScore) or 0.1 (OCR, several rewards), lr 3e-4, 48 groups of 24 images, KL weight 1e-4, "
            "LoRA rank 32 alpha 64, about 1,000 steps, no guidance"
        ),
    },
    results="SD3.5-M: GenEval 0.24 -> 0.98 within 1,000 steps; up to 25 times more efficient than Flow-GRPO (abstract)",
    notes=(
        "link_options.mix is the published beta; the setting beta only scales the rewards that are logged. Set "
        "rollout.scorers. The old policy is the moving reference. Its decay is constant here; in the released code it "
        "rises by 0.001 an update from 0 to 0.5. Left out: the code's division by the size of the residual (adaptive "
        "weights), its factor 5, and the KL term. The 10 sampling steps were not verified."
    ),
)
