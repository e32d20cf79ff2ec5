"""Why a method does not beat the base model on the embedded world, as far as the runs tell. Only used for those."""

from __future__ import annotations

from typing import Any

import numpy as np

from .results import pooled

Results = dict[str, list[dict[str, Any]]]

# methods whose loss pulls towards the chosen images themselves, not only away from the rejected ones
IMITATES = ("sft", "dspo", "rpo", "dpop", "cpo", "orpo", "simpo", "mapo", "asft")


def delta(runs: list[dict[str, Any]], which: str) -> str:
    """Error of the policy minus the reference's over the last quarter, by seed (the bare error where there is no
    reference)."""
    return ", ".join(f"{run['log'][f'error/{which}_delta']:+.2g}" for run in runs)


def win(results: Results, name: str, score: str = "total") -> str:
    return f"{pooled(results[name], score)[0]:.0%}"


def section(failing: list[str], results: Results) -> str:
    lines = [line for name in failing if (line := reason(name, results))]
    return "### Why they do not\n\n" + "\n".join(lines) if lines else ""


def reason(name: str, results: Results) -> str:
    runs = results[name]
    if name in IMITATES:
        return f"- **{name}** {imitation(name, results)}"
    if name in TEXTS:
        steps = np.mean([run["steps"] for run in runs])
        text = TEXTS[name].format(
            steps=f"{steps:.0f}",
            chosen=delta(runs, "chosen"),
            rejected=delta(runs, "rejected"),
            total=win(results, name),
        )
        return f"- **{name}** {text}"
    return ""


def imitation(name: str, results: Results) -> str:
    if name == "sft":
        text = (
            "imitates pictures that the model itself drew with guidance and that went through its VAE twice: guidance "
            "on top of that overshoots. Appearance pays ({appearance}), following gains ({following})"
        )
        text = text.format(appearance=win(results, name, "appearance"), following=win(results, name, "following"))
        if "sft_rejected" in results:
            text += (
                f". Fine-tuning on the rejected images costs as much: total {win(results, 'sft_rejected')}, appearance "
                f"{win(results, 'sft_rejected', 'appearance')}, following {win(results, 'sft_rejected', 'following')}"
            )
        return text + "."
    return ""


TEXTS: dict[str, str] = {}
