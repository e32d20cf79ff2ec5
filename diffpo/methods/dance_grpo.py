"""DanceGRPO: a clipped policy gradient on the sampler's steps, for UNets and flows; best and worst of many images."""

from . import Preset

PRESET = Preset(
    title="DanceGRPO: Unleashing GRPO on Visual Generation",
    paper="Xue et al. 2025, arXiv 2505.07818",
    settings={
        "beta": 2.0,
        "source": "trajectory",
        "link": "clipped_ratio",
        "link_options": {"clip": 1e-4},
        "rollout": {"samples": 12, "updates": 4},
        "reference": {"policy": "none"},
        "behaviour": {"policy": "sync"},
    },
    equation="as ddpo; on flows g is constant: dx = [v + g^2/(2t) (x + (1 - t) v)] dt + g dw",
    published={
        "FLUX.1-dev": (
            "g 0.3, 16 steps, 12 images of a prompt from one noise, clip 1e-4, advantages cut at 5, no KL term, 60 % "
            "of the steps, lr 1e-5, full weights (partly not verified)"
        ),
    },
    notes=(
        "Set rollout.scorers. For a flow set rollout.step=flow_sde, rollout.step_options={amount: 0.3, law: constant}. "
        "Best-of-n is rollout.keep: train on the best and the worst of more images. A share of the steps is trained "
        "on where updates x batch is less than images x steps. beta as in ddpo."
    ),
)
