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
        "a is this preset's choice: a fifth of DPO's own gradient on err_chosen at the start (beta/4 = 1250). With "
        "weight 1 the term would have no effect beside beta. beta is Diffusion-DPO's, because none is published for a "
        "diffusion model."
    ),
)
