"""CPO: DPO without a reference, with fine-tuning on the chosen images."""

from . import Preset

PRESET = Preset(
    title="Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
    paper="Xu et al. 2024, arXiv 2401.08417",
    settings={"beta": 500, "link_weight": 0.1, "sft": 1.0, "reference": {"policy": "none"}},
    equation="err_chosen - w log sigma((beta/2)(err_rejected - err_chosen))",
    published={
        "language models": "beta 0.1 on summed log-probabilities, weight 1 of the negative log-likelihood",
    },
    notes="beta and the weight w = 0.1 are MaPO's. NCP-DPO's paper trains CPO on SD1.5 and SDXL with error=perceptual.",
)
