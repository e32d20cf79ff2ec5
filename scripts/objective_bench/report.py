"""docs/objectives.md and its pictures, from the results of the jobs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from diffpo.commands.quickstart import ROOT
from diffpo.common.tables import Table

from . import claims, reasons
from .job import Setting
from .methods import METHODS, Method
from .results import BAR, SEEDS, cell, points, pooled, reached, read

PAGE, CURVES = ROOT / "docs" / "objectives.md", ROOT / "assets" / "objectives.png"


def write(setting: Setting) -> None:
    """The page, as far as there are results."""
    results = read(setting.folder)
    base = json.loads((setting.folder / "base.json").read_text())
    text = [HEAD.format(budget=setting.budget, n=setting.n, n_curve=setting.n_curve)]
    done = [method for method in METHODS if method.name in results]
    missing = SEEDS * len(METHODS) - sum(len(results[method.name]) for method in done)
    if missing:
        text.append(f"**Unfinished**: {missing} of {SEEDS * len(METHODS)} runs are still to be made.")
    main = sorted((m for m in done if m.main), key=lambda m: -pooled(results[m.name], "total")[0])
    text += [table(main, results, base["diversity"]), losers(main, results)]
    text += [claims.section(results)]
    text += [notes([m for m in done if m.note])]
    PAGE.write_text("\n\n".join(part for part in text if part) + "\n")
    draw(main, results)


def table(methods: list[Method], results: dict[str, list[dict[str, Any]]], diversity: float) -> str:
    columns = ["method", "seeds", "total", "following", "appearance", f"diversity (base {diversity:.3f})", "updates"]
    columns += ["calls forward + backward", f"cost to {BAR:.0%}", "seconds", "GB"]
    rows = []
    for method in methods:
        runs = results[method.name]
        last = [run["curve"][-1] for run in runs]
        forward, backward = (np.mean([one[key] for one in last]) for key in ("forward", "backward"))
        at = reached(runs)
        row = [method.name, len(runs), *(cell(runs, score) for score in ("total", "following", "appearance"))]
        row += [f"{np.mean([run['diversity'] for run in runs]):.3f}", runs[0]["steps"]]
        row += [f"{forward:,.0f} + {backward:,.0f}", "never" if at is None else f"{at:,.0f}"]
        row += [f"{np.mean([run['seconds'] for run in runs]):.0f}", f"{max(run['gigabytes'] for run in runs):.2f}"]
        rows.append(row)
    return Table(columns, rows).markdown()


def losers(methods: list[Method], results: dict[str, list[dict[str, Any]]]) -> str:
    """Which methods do not beat the base model, or not every time, and which move the hard axis every time."""

    def worst(name: str, score: str) -> float:
        return min(run["curve"][-1][score]["win"][1] for run in results[name])

    failing = [m.name for m in methods if worst(m.name, "total") <= 0.5]
    hard = [m.name for m in methods if worst(m.name, "following") > 0.5 and len(results[m.name]) >= SEEDS]
    text = (
        f"**Better than the base**: {len(methods) - len(failing)} of {len(methods)} methods have the interval of total "
        "above 50 % for every seed."
    )
    text += f" The others: {', '.join(failing)}." if failing else ""
    text += f"\n\n**Better at following**: above 50 % for every seed with {', '.join(hard) or 'none'}."
    return "\n\n".join(part for part in (text, reasons.section(failing, results)) if part)


def notes(methods: list[Method]) -> str:
    return SETTINGS + "\n".join(f"- **{m.name}**: {m.note}" for m in methods) if methods else ""


def draw(methods: list[Method], results: dict[str, list[dict[str, Any]]]) -> None:
    """Win rate of both axes over cost, one thin line a method, the named ones in colour."""
    from matplotlib.figure import Figure

    named = {"diffusion_dpo": "#0072B2", "d3po": "#D55E00", "spo": "#009E73", "inpo": "#CC79A7"}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, score in zip(figure.subplots(1, 3, sharey=True), ("total", "following", "appearance"), strict=True):
        for method in methods:
            x, y = zip(*points(results[method.name], score), strict=True)
            colour = named.get(method.name)
            label = method.name if colour else None
            if method in (methods[0], methods[-1]):  # the best and the worst of `total`
                axis.annotate(method.name, (x[-1], y[-1]), (-4, 4), textcoords="offset points", ha="right", fontsize=8)
            axis.plot(x, y, color=colour or "#b8bcc4", lw=2 if colour else 0.8, label=label, zorder=3 if colour else 1)
        axis.axhline(0.5, color="black", lw=0.6)
        axis.set(title=score, xlabel="forward + 2 x backward calls")
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("win rate over the base, mean of the seeds")
    figure.axes[0].legend(frameon=False)
    figure.savefig(CURVES, dpi=110)


SETTINGS = """## Settings that differ

All others use learning rate 5e-4 and beta 500. The lower rates, and some settings of the on-policy methods, were
chosen after a look at seed 0. TR-DPO's interval, and the guidance that the trained pixel scorer learns with, were
chosen after a look at all three seeds.

"""
HEAD = """# Choose a method

`python scripts/bench_objectives.py` writes this page. Every method trains a rank-8 LoRA of `assets/tiny-sdxl` with
AdamW until {budget:,} calls are used. A call is one sample through the network, for any purpose (policy, reference,
sampling, guidance); calls are counted as forward + 2 x backward.

- Measured on {n} held-out prompts ({n_curve} during training), with the same noise as the base model, 6 calls of the
  default solver and guidance 3.
- Win rates are over the base model: the mean of the training seeds, and in brackets the lowest and the highest end of
  their 95 % Wilson intervals.
- `total` labelled the training data (half following, half appearance). *Following* is the hard axis, *appearance* the
  easy one.
- Diversity is the mean distance between four pictures of one prompt.
- Memory is that of the whole process, imports and pictures included.

![win rates against calls](../assets/objectives.png)"""
