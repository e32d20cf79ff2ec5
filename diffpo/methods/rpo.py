"""RPO: DPO with fine-tuning on the chosen images added."""

from . import Preset

PRESET = Preset(
    title="Iterative Reasoning Preference Optimization",
    paper="Pang et al. 2024, arXiv 2404.19733; as a regulariser: Liu et al. 2024, arXiv 2405.16436",
    settings={"beta": 5000, "sft": 250},
    equation="-log sigma(u) + a err_chosen",
    published={
        "language models": "weight 1 of the mean negative log-likelihood beside DPO with beta 0.1 on sums",
    },
    notes=(
        "a is set here, to a fifth of DPO's own pull on err_chosen at the start (beta/4 = 1250): a weight of 1 would "
        "be lost against beta. beta is Diffusion-DPO's; no value for a diffusion model is published."
    ),
)
