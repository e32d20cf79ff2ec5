"""MODPO: labels of one objective with the difference of another reward as a margin, for the weighted sum of both."""

from . import Preset

PRESET = Preset(
    title="Beyond One-Preference-Fits-All Alignment: Multi-Objective Direct Preference Optimization",
    paper="Zhou et al. 2023, arXiv 2310.03708, eq. 10",
    settings={"beta": 5000, "link": "modpo"},
    equation="-log sigma((u - (1 - w) gap)/w), gap: chosen minus rejected by the other reward",
    published={"language models": "w in {0.1, ..., 0.9}, one model for each (beta 0.1 not verified)"},
    notes=(
        "One LoRA for one weight w, link_options.weight. The labels are of the first objective, and "
        "data.columns.score_0 and score_1 hold the other reward, in units of the implicit reward (link_options.scale "
        "converts). For one LoRA with the weights chosen at generation, see dpa. beta is Diffusion-DPO's, because none "
        "is published for a diffusion model."
    ),
)
