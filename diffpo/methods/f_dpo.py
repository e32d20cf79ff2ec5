"""f-DPO: rewards of another divergence than the reverse KL, here Jensen-Shannon's."""

from . import Preset

PRESET = Preset(
    title="Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
    paper="Wang et al. 2023, arXiv 2309.16240, table 1",
    settings={"beta": 10000, "divergence": "js"},
    equation="-log sigma(phi(r_chosen) - phi(r_rejected)), phi(r) = log 2 + log sigma(r)",
    published={
        "language models": "reverse KL, forward KL, Jensen-Shannon, alpha in 0..1",
    },
    notes=(
        "phi has slope 1/2 at 0 for js, so beta is twice Diffusion-DPO's for the same first gradients (for forward_kl "
        "and alpha: slope 1 and beta 5000). The x of the divergence's e^x is the implicit reward; the log-ratio in "
        "nats is larger by factors of thousands. divergence works with every link of rewards."
    ),
)
