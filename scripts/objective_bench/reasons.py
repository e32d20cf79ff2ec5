"""Why some methods do not beat the base model on the embedded world, as far as the runs show it."""

from __future__ import annotations

from typing import Any

import numpy as np

from .job import cost
from .results import Earlier, cell, pooled

Results = dict[str, list[dict[str, Any]]]


def delta(runs: list[dict[str, Any]], which: str) -> str:
    """Error of the policy minus the reference's over the last quarter, by seed (the bare error where there is no
    reference)."""
    return ", ".join(f"{run['log'][f'error/{which}_delta']:+.2g}" for run in runs)


def win(results: Results, name: str, score: str = "total") -> str:
    return f"{pooled(results[name], score)[0]:.0%}"


def longer(runs: list[dict[str, Any]]) -> str:
    """What as many updates as Diffusion-DPO's budget pays for would have brought, and cost."""
    calls = np.mean([cost(run["curve"][-1]["forward"], run["curve"][-1]["backward"]) for run in runs])
    steps = runs[0]["steps"]
    return f" After {steps} updates, {calls:,.0f} calls, it reaches {cell(runs, 'total')}."


def section(failing: list[str], results: Results, before: Earlier) -> str:
    lines = [reason(name, results) if name in results else f"- **{name}** {before.reasons[name]}" for name in failing]
    head = "### Why the others fail\n\nThe brackets give the win rate in `total` of each seed.\n\n"
    return head + "\n".join(lines) if lines else ""


def reason(name: str, results: Results) -> str:
    runs = results[name]
    seeds = ", ".join(f"{run['curve'][-1]['total']['win'][0]:.0%}" for run in runs)
    if name == "sft" or name in ANCHORED or name in FREE:
        return f"- **{name}** ({seeds}) {imitation(name, results)}"
    if name in TEXTS:
        steps = np.mean([run["steps"] for run in runs])
        text = TEXTS[name].format(
            steps=f"{steps:.0f}",
            chosen=delta(runs, "chosen"),
            rejected=delta(runs, "rejected"),
            total=win(results, name),
            long=longer(results[f"{name}_long"]) if f"{name}_long" in results else "",
        )
        return f"- **{name}** ({seeds}) {text}"
    return f"- **{name}** ({seeds}) has no reason found yet."


def imitation(name: str, results: Results) -> str:
    runs = results[name]
    if name == "sft":
        text = (
            f"imitates pictures that this model drew itself, with guidance, and that its autoencoder processed twice; "
            f"sampling adds guidance again. Appearance loses ({win(results, name, 'appearance')}), following gains "
            f"({win(results, name, 'following')})"
        )
        if "sft_rejected" in results:
            scores = ", ".join(f"{score} {win(results, 'sft_rejected', score)}" for score in SCORES)
            text += f". The imitation is the cause, not the choice: on the rejected images {scores}"
        return text + "."
    way = f"following {win(results, name, 'following')}, appearance {win(results, name, 'appearance')}"
    if name in ANCHORED:
        return f"{ANCHORED[name].format(chosen=delta(runs, 'chosen'))}, with the effect of sft: {way}."
    return f"{FREE[name]}: {way}."


SCORES = ("total", "following", "appearance")
ANCHORED = {
    "dspo": "regresses on the chosen images, with the preference as a small correction (their error: {chosen})",
    "rpo": "adds fine-tuning on the chosen images (their error: {chosen})",
    "dpop": "punishes every rise of the chosen images' error (it ends at {chosen})",
}
FREE = {
    "cpo": "has no reference and adds fine-tuning on the chosen images",
    "orpo": "is fine-tuning on the chosen images with a weak contrast, by odds instead of a reference",
    "simpo": "has no reference. Errors of 0.06 that differ by noise and image content hide a difference of 0.0005",
    "mapo": "has no reference and pulls towards the chosen images",
    "asft": "has no reference. At beta 500 both rewards are about -16, where its term for the rejected image is flat",
}
ABSOLUTE = (
    "rewards the chosen images for themselves, not only above the rejected ones. Their error changes by {chosen}, the "
    "rejected ones' by {rejected}. Letting both errors rise, as Diffusion-DPO does, is faster here."
)
SELF_PLAY = (
    "learns to separate the data from its own samples, but here the data are its own samples. What is left to learn "
    "is, most likely, how noisy the latents are: those of the data have the autoencoder's noise "
    "([numbers](#real-pictures))."
)
TEXTS = {
    "diffusion_nft": "is held to the base by a divergence, and makes {steps} updates. An earlier preset without the "
    "divergence had 64.6% [54.8%, 75.9%].",
    "apo_down": "lowers the chosen images' reward on purpose, and nothing limits it. Their error rises by {chosen}, "
    "the rejected ones' by {rejected}, which nearly doubles both. The effect on the pictures is luck.",
    "nca": ABSOLUTE,
    "sppo": ABSOLUTE,
    "spin_diffusion": SELF_PLAY,
    "ddo": SELF_PLAY,
    "pso": "is meant for distilled models. This model draws poorly with ten re-noised steps, so the better ones "
    "among them do not improve the pictures of a solver.",
    "spo_trained": "is judged by a scorer that learnt on unguided estimates ([details](on_policy.md)), but scores "
    "guided ones.",
    "spo": "is judged by the oracle and beats the base with two seeds of three. It makes {steps} updates.{long}",
    "d3po": "gives every step of a trajectory the label of its picture, and spends most of the budget on sampling: "
    "{steps} updates.{long}",
    "inpo": "spends most of the budget on inversions: {steps} updates.{long}",
    "smpo": "spends most of the budget on inversions, two calls a level: {steps} updates.",
    "ncp_dpo": "spends more than half of the budget on features: {steps} updates.{long}",
}
