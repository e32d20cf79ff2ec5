"""DNO: rounds of DPO on the policy's own samples, each against the policy of the round before."""

from . import Preset

PRESET = Preset(
    title="Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences",
    paper="Rosset et al. 2024, arXiv 2404.03715",
    settings={
        "beta": 5000,
        "source": "samples",
        "rollout": {"prompts": 800, "updates": 100, "samples": 5, "same_noise": False},
        "reference": {"policy": "sync", "every": 100},
    },
    equation="-log sigma(u) of best and worst of a prompt's samples by the policy at the round's start, the reference",
    published={
        "language models": "DNO-Prct: three rounds, five samples of the policy and one of a teacher for each prompt",
    },
    results="AlpacaEval 2.0 length-controlled win rate 33 % of a 7B model, an absolute gain of 26 % (abstract)",
    notes=(
        "A round is 100 updates on 800 prompts here; keep rollout.updates and reference.every equal. The paper's pairs "
        "with a large margin only, and its teacher's sample, are left out. beta is Diffusion-DPO's, because none is "
        "published for a diffusion model."
    ),
)
