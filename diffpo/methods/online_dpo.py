"""Online DPO: pairs of the policy's own samples, judged during training."""

from . import Preset

PRESET = Preset(
    title="Direct Language Model Alignment from Online AI Feedback",
    paper="Guo et al. 2024, arXiv 2402.04792",
    settings={"beta": 5000, "source": "samples", "rollout": {"same_noise": False}},
    equation="-log sigma(u) of best and worst of a prompt's samples, forward noise",
    published={
        "language models": "two samples of a prompt, judged by a language model",
        "SD3.5-M (flow_grpo's Flow-DPO)": (
            "beta 100, best and worst of 24 images, lr 3e-4, LoRA rank 32 alpha 64, reference replaced by the policy "
            "every 40 updates"
        ),
    },
    notes=(
        "Set rollout.scorers. Images with equal scores make no pair (flow_grpo's code labels them arbitrarily). For a "
        "moving reference set reference.policy=sync. beta is Diffusion-DPO's."
    ),
)
