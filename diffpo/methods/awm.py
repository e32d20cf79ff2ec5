"""AWM: a policy gradient whose log-likelihood is minus the error of the noised sample, as in pretraining."""

from . import Preset

PRESET = Preset(
    title="Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models",
    paper="Xue et al. 2025, arXiv 2509.25050",
    settings={
        "beta": 2.0,
        "source": "samples",
        "link": "clipped_ratio",
        "link_options": {"clip": 1e-4},
        "kl": 1e-3,
        "forward": {"shared_noise": False},
        "rollout": {"samples": 24, "steps": 10, "eta": 0.0, "guidance": 1.0, "same_noise": False},
        "behaviour": {"policy": "sync"},
    },
    equation="-min(A rho, A clip(rho, 1 - e, 1 + e)) + w (pred - pred_base)^2, log rho = err_old - err, noised",
    published={"SD3.5-M": "24 images of a prompt, ODE sampling; clip, KL weight and guidance not verified"},
    results="up to 24 times faster than Flow-GRPO at the same scores (abstract; not verified)",
    notes=(
        "Set rollout.scorers. beta 2 makes err_old - err the log-ratio. objective.weighting multiplies it, as the "
        "code's weights t and t^2 do. The code's further KL divergence to a moving average is reference.policy=ema."
    ),
)
