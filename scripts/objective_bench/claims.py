"""Claims of the papers that can be tried on the embedded world, each with what it would take and what was measured."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffpo.common.tables import Table
from diffpo.evaluation import statistics

from .data import FLIPS
from .methods import ROBUST
from .results import SEEDS, Earlier, cell, points, pooled, reached

Results = dict[str, list[dict[str, Any]]]


def section(results: Results, before: Earlier) -> str:
    """All claims whose runs have all their seeds (one seed is no verdict), and the earlier text of the others."""
    results = {name: runs for name, runs in results.items() if len(runs) >= SEEDS}
    now = {
        "spo": sooner(
            results, "spo", "SPO reaches Diffusion-DPO's win rate with far fewer calls (paper: 20 x faster)", 5.0
        ),
        "inpo": sooner(results, "inpo", "InPO needs far fewer updates than Diffusion-DPO (paper: 400 for 2,000)", 2.0),
        "ncp_dpo": sooner(results, "ncp_dpo", "NCP-DPO converges faster than Diffusion-DPO", 1.0),
        "lists": lists(results),
        "robust": robust(results),
        "sdpo": safeguard(results),
    }
    found = [now.get(name) or before.claims.get(name, "") for name in now]
    return "\n\n".join(["## Claims of the papers, tried in small", *(part for part in found if part)])


def sooner(results: Results, name: str, claim: str, factor: float) -> str:
    """Whether ``name`` needs less than 1/``factor`` of the calls, and of the updates, of Diffusion-DPO's final win
    rate."""
    if "diffusion_dpo" not in results:
        return ""
    runs = results["diffusion_dpo"]
    bar = pooled(runs, "total")[0]
    parts = [f"- {claim}. Diffusion-DPO ends at {cell(runs, 'total')}."]
    for variant, unit in ((name, "calls"), (f"{name}_long", "updates")):
        if variant in results:
            parts.append(f"By {unit}, {verdict(runs, results[variant], bar, unit, factor)}.")
    return " ".join(parts) if len(parts) > 1 else ""


def verdict(runs: list[dict[str, Any]], others: list[dict[str, Any]], bar: float, unit: str, factor: float) -> str:
    theirs, ours = reached(runs, bar, unit=unit), reached(others, bar, unit=unit)
    spent = f"{points(others, 'total', unit)[-1][0]:,.0f} {unit}"
    if ours is None:
        return f"**not reproduced**: {cell(others, 'total')} after {spent}"
    word = "reproduced" if theirs / ours > factor else "not reproduced"
    how = f"{theirs:,.0f} for Diffusion-DPO, {theirs / ours:.1f} times as many"
    return f"**{word}**: it is there after {ours:,.0f} ({how}), and ends at {cell(others, 'total')} after {spent}"


def against(results: Results, one: str, other: str) -> str:
    """Paired difference of the mean totals, prompts as units, seeds averaged."""
    ours, theirs = (np.mean([run["total"] for run in results[name]], 0) for name in (one, other))
    found = statistics.mean_difference(theirs, ours, np.arange(len(ours)))
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


RANKED = ("rankdpo", "rankdpo_win_rates", "rankdpo_minmax", "plackett_luce", "pairs_of_lists", "diffusion_dpo")


def lists(results: Results) -> str:
    names = [name for name in RANKED if name in results]
    if not {"rankdpo", "pairs_of_lists"} <= set(names):
        return ""
    rows = ", ".join(f"{name} {cell(results[name], 'total')}" for name in names)
    gap = against(results, "rankdpo", "pairs_of_lists")
    word = "reproduced" if float(gap.split("[")[1].split(",")[0]) > 0 else "not reproduced"
    return (
        f"- RankDPO beats pairs from the same images (700 lists of 8). **{word}**: {rows}; RankDPO minus pairs in mean "
        f"total, paired by prompt: {gap}."
    )


def robust(results: Results) -> str:
    rows = []
    for name in ROBUST:
        cells = [cell(results[key], "total") if key in results else "" for key in (name, *flipped(name))]
        if all(cells):
            rows.append([name, *cells])
    if not rows:
        return ""
    columns = ["link", "as shipped (4 % flipped)", *(f"{share} % flipped" for share in FLIPS)]
    gaps: dict[str, list[str]] = {}
    for name in ROBUST[1:]:
        for share in FLIPS:
            pair = [f"{each}_flipped_{share}" for each in (name, "diffusion_dpo")]
            if all(key in results for key in pair):
                gaps.setdefault(name, []).append(against(results, *pair))
    better = [name for name, found in gaps.items() if all(float(gap.split("[")[1].split(",")[0]) > 0 for gap in found)]
    word = f"reproduced for {', '.join(better)}" if better else "not reproduced"
    text = (
        f"- Robust links keep their win rate under flipped labels. **{word}**, with the presets' own epsilon"
        f"{'' if better else ': none keeps it'}. Minus Diffusion-DPO with the same labels, in mean total, paired by "
        f"prompt, at {' and '.join(f'{share} %' for share in FLIPS)}: "
        f"{'; '.join(f'{name} ' + ', '.join(found) for name, found in gaps.items())}.\n\n"
    )
    return text + Table(columns, rows).markdown()


def flipped(name: str) -> list[str]:
    return [f"{name}_flipped_{share}" for share in FLIPS]


def safeguard(results: Results) -> str:
    if "sdpo" not in results or "diffusion_dpo" not in results:
        return ""
    deltas = {name: [run["log"]["error/chosen_delta"] for run in results[name]] for name in ("diffusion_dpo", "sdpo")}
    text = "; ".join(f"{name} " + ", ".join(f"{value:+.2g}" for value in values) for name, values in deltas.items())
    word = "reproduced" if max(deltas["sdpo"]) <= 0 else "not reproduced"
    return (
        f"- Diffusion-SDPO keeps the chosen images' error from rising. **{word}**: their error minus the reference's "
        f"over the last quarter of training, by seed: {text}."
    )
