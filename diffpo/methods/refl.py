"""ReFL: the reward of the x_0 that is predicted at a random late step, with the gradient of that one call."""

from . import Preset

PRESET = Preset(
    title="ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation",
    paper="Xu et al. 2023, arXiv 2304.05977",
    settings={
        "beta": 1.0,
        "source": "reward",
        "link_weight": 1e-3,
        "direct": {"truncation": "one_step", "calls": 10},
        "rollout": {"steps": 40, "eta": 0.0, "guidance": 1.0},
        "reference": {"policy": "none"},
    },
    equation="-w reward(decode(x_0 predicted at step t)), t among the last ten of 40; plus sft ||pred - y*||^2 on data",
    published={
        "SD1.4": "w 1e-3, reward ReLU(2 - r) of ImageReward, t in 30..39 of 40, pretraining loss on data, full weights "
        "(guidance not verified)"
    },
    notes=(
        "Scorers as for draft. The pretraining loss of the paper is objective.sft=1 with data.train: the chosen images "
        "of pairs. Without it the optimiser's scale makes link_weight irrelevant. The ReLU is direct.ceiling=2, for a "
        "score whose unit is ImageReward's; by default there is none. One t serves all images of an update. beta is "
        "not used."
    ),
)
