"""DCPO: Diffusion-DPO in which each image of a pair has its own caption."""

from . import Preset

PRESET = Preset(
    title="Dual Caption Preference Optimization for Diffusion Models",
    paper="Saeidi et al. 2025, arXiv 2502.06023",
    settings={"beta": 5000},
    equation="-log sigma(r(x_chosen | caption_chosen) - r(x_rejected | caption_rejected))",
    published={
        "SD2.1": (
            "DCPO-c: both captions from a captioner, DCPO-p: the prompt and a perturbed prompt, DCPO-h: perturbed "
            "captions; beta not verified"
        ),
    },
    results=(
        "SD2.1: beats fine-tuning, Diffusion-DPO and MaPO on PickScore, HPSv2.1, GenEval, CLIPScore and ImageReward "
        "(abstract)"
    ),
    notes=(
        "The method needs data with a caption for each image: name the columns data.columns.caption_chosen and "
        "caption_rejected, or caption_0 and caption_1 for labelled pairs (any captioner may write them). beta is "
        "Diffusion-DPO's."
    ),
)
