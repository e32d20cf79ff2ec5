"""AlignProp: the gradient of a differentiable reward through a random number of the sampler's last calls."""

from . import Preset

PRESET = Preset(
    title="Aligning Text-to-Image Diffusion Models with Reward Backpropagation",
    paper="Prabhudesai et al. 2023, arXiv 2310.03739",
    settings={
        "beta": 1.0,
        "source": "reward",
        "direct": {"truncation": "random"},
        "rollout": {"steps": 50},
        "reference": {"policy": "none"},
    },
    equation="-reward(decode(x_0)), x_0 sampled; the gradient stops before the last K calls, K drawn for each update",
    published={"SD1.5": "K uniform in 0..50, 50 steps, guidance 5, eta 1, LoRA (steps, scale and eta not verified)"},
    results="25 times as sample efficient as DDPO (documentation of TRL's AlignPropTrainer; not verified)",
    notes=(
        "Scorers as for draft. K is uniform in 1..direct.calls here (null: all), because K = 0 gives no gradient. One "
        "K serves all images of an update, as in the paper. The released code detaches the network's outputs of the "
        "earlier calls; that is the same gradient. beta is not used."
    ),
)
