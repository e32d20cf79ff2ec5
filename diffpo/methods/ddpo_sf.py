"""DDPO with the score function: the policy gradient by REINFORCE on the steps of the sampler."""

from . import Preset

PRESET = Preset(
    title="Training Diffusion Models with Reinforcement Learning",
    paper="Black et al. 2023, arXiv 2305.13301",
    settings={
        "beta": 2.0,
        "source": "trajectory",
        "link": "score_function",
        "rollout": {
            "samples": 4,
            "steps": 50,
            "same_noise": False,
            "advantages": {"limit": 10.0},
        },
        "reference": {"policy": "none"},
        "behaviour": {"policy": "sync"},
    },
    equation="-A log p(x_next | x_t) at each step, A the score standardised over the images of its prompt",
    published={"SD1.4": "as ddpo, with one update a round (not verified)"},
    results="less sample efficient than DDPO with importance sampling (paper)",
    notes="As ddpo. With rollout.updates above 1 the estimate is biased; ddpo is meant for that.",
)
