"""TR-DPO: DPO with a reference that follows the policy."""

from . import Preset

PRESET = Preset(
    title="Learn Your Reference Model for Real Good Alignment",
    paper="Gorbatovski et al. 2024, arXiv 2404.09656",
    settings={"beta": 5000, "reference": {"policy": "ema", "decay": 0.4, "every": 512}},
    equation="-log sigma(u), reference <- a policy + (1 - a) reference every tau updates",
    published={
        "language models": "a 0.6, tau 512 (defaults of TRL); hard updates: a 1",
    },
    results="better than DPO by up to 19 % by GPT-4's judgement (abstract of v1)",
    notes=(
        "decay is 1 - a. Hard updates are reference.policy=sync. The LoRA's factors are averaged, not their product. "
        "beta is Diffusion-DPO's, because none is published for a diffusion model."
    ),
)
