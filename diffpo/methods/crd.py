"""CRD: within a prompt's images the log-ratio to the behaviour policy is regressed on the score, both centred."""

from . import Preset

PRESET = Preset(
    title="Diffusion Reinforcement Learning via Centered Reward Distillation",
    paper="Zhu et al. 2026, arXiv 2603.14128",
    settings={
        "beta": 2.0,
        "source": "samples",
        "link": "crd",
        "link_weight": 5.0,
        "kl": 1e-4,
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
    equation="mean_i ((q_i - mean q) - s (A_i - mean A))^2, q = (b/2) (err_old - err), plus w (pred - pred_base)^2",
    published={"SD3.5-M": "decay rising by 0.001 to 0.5, factor 5 / b (as in Flow-Factory)"},
    notes=(
        "Set rollout.scorers. The code's crd_beta is beta/2 here. Left out: weights of the centring by softmax, the "
        "cross-entropy form, the second moving average that samples, and KL weights that follow the reward."
    ),
)
