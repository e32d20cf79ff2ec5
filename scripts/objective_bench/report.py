"""docs/objectives.md, from the results of the jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffpo.common.carried import HOME as ROOT
from diffpo.common.tables import Table

from . import chart, claims, reasons, store
from .methods import METHODS, Method
from .recipes import RECIPES
from .results import BAR, Earlier, cell, earlier, pooled, reached, read

PAGE = ROOT / "docs" / "objectives.md"
PICTURE, DATA_PICTURE = (ROOT / "assets" / f"{name}.png" for name in ("objectives", "objectives-data"))
SCORES = ("total", "following", "appearance")
Results = dict[str, list[dict[str, Any]]]
# folders of results: heading, what the data are
REGIMES = {
    "others": (
        "Pairs of other models' samples",
        "The pictures of 350 captions are by other models: guidance 1 and 7, the distilled tiny-turbo, and tiny-dit. "
        "Diffusion-DPO and Diffusion-KTO gain as with the model's own samples, and improve following with every seed. "
        "MaPO, whose paper claims pairs that are foreign to the model, loses with every seed: not reproduced at these "
        "settings, which are not tuned for it. InPO "
        "gains with none: its errors fall for the chosen and the rejected pictures alike, so it imitates both. Methods "
        "that sample do not read these pairs, so they are not listed.",
    ),
    "real": (
        "Real pictures",
        "The chosen pictures are rendered scenes, the rejected ones the model's own samples; 700 captions. Fine-tuning "
        "and the methods that imitate the chosen pictures gain here with every seed, in appearance. With the model's "
        "own samples they lose. Following is not shown to improve with any method.\n\nThe self-play methods, "
        "spin_diffusion and ddo, spoil the model. A likely reason: their own samples, 10 noisy steps without guidance, "
        "have smoother latents than the data. The base's error is 0.036 on them and 0.056 on the data, of which the "
        "autoencoder's posterior noise makes a large part (0.033 without it). Samples of 50 steps without noise have "
        "0.055 (64 prompts each). So noise tells the two apart. It is not all: with 10 steps without noise, "
        "spin_diffusion has 10.2% [7.0%, 14.5%] (seed 100). More steps and a larger beta were not tried.",
    ),
    "own-tiny-dit": (
        "Another architecture",
        "`assets/tiny-dit`, a flow transformer, learns from the pairs of tiny-sdxl, so these are another model's "
        "samples. Beta is 100.",
    ),
}


def write() -> None:
    """The page and its pictures, as far as there are results."""
    results, before = read("own"), earlier()
    draw(results, before)
    done = [method for method in METHODS if method.name in results or method.name in before.rows]
    text = [HEAD, main_table(results, before), losers(results, before)]
    text += [recipes(), needs(results), others(), claims.section(results, before)]
    text += [notes([m for m in done if m.note]), tuning()]
    PAGE.write_text("\n\n".join(part for part in text if part) + "\n")


COLUMNS = ["method", "seeds", "total", "following", "appearance", "diversity", "updates", "calls forward + backward"]
COLUMNS += [f"cost to {BAR:.0%}", "seconds", "GB"]


def row(name: str, runs: list[dict[str, Any]]) -> list[Any]:
    last = [run["curve"][-1] for run in runs]
    forward, backward = (np.mean([one[key] for one in last]) for key in ("forward", "backward"))
    at = reached(runs)
    found = [name, len(runs), *(cell(runs, score) for score in SCORES)]
    found += [f"{np.mean([run['diversity'] for run in runs]):.3f}", runs[0]["steps"]]
    found += [f"{forward:,.0f} + {backward:,.0f}", "never" if at is None else f"{at:,.0f}"]
    return [*found, f"{np.mean([run['seconds'] for run in runs]):.0f}", f"{max(run['gigabytes'] for run in runs):.2f}"]


def earlier_row(name: str, one: dict[str, Any]) -> list[Any]:
    wins = [one[score] for score in SCORES]
    found = [name, one["seeds"], *(f"{mean:.1%} [{low:.1%}, {high:.1%}]" for mean, low, high in wins)]
    found += [f"{one['diversity']:.3f}", one["updates"], f"{one['forward']:,} + {one['backward']:,}"]
    found += ["never" if one["to_bar"] is None else f"{one['to_bar']:,}"]
    return [*found, f"{one['seconds']:.0f}", f"{one['gigabytes']:.2f}"]


def draw(results: Results, before: Earlier) -> None:
    """The pictures: of all methods, and of those with results on several kinds of data."""
    names = [m.name for m in METHODS if m.main and (m.name in results or m.name in before.rows)]
    wins = {name: {score: win(name, score, results, before) for score in SCORES} for name in names}
    chart.methods([chart.Line(name, wins[name], name in results) for name in names], PICTURE)
    others = {text: read(regime) for regime, text in KINDS.items()}
    found = {
        name: {"its own samples": wins[name]["total"]}
        | {text: pooled(runs[name], "total") for text, runs in others.items() if name in runs}
        for name in names
    }
    several = {name: by_kind for name, by_kind in found.items() if len(by_kind) > 1}
    if several:
        chart.kinds(dict(sorted(several.items(), key=lambda one: -one[1]["its own samples"][0])), DATA_PICTURE)


KINDS = {"others": "other models' samples", "real": "real pictures against its own samples"}


def win(name: str, score: str, results: Results, before: Earlier) -> chart.Win:
    """Win rate of a method, with the interval; of the earlier version where nothing newer is there."""
    if name in results:
        return pooled(results[name], score)
    mean, low, high = before.rows[name][score]
    return mean, low, high


def main_table(results: Results, before: Earlier) -> str:
    """All methods at the comparison's settings, the best first; those of `before` where nothing newer is there."""
    rows = [
        (pooled(results[m.name], "total")[0], row(f"**{m.name}**", results[m.name]))
        for m in METHODS
        if m.main and m.name in results
    ]
    rows += [(one["total"][0], earlier_row(name, one)) for name, one in before.rows.items() if name not in results]
    return Table(COLUMNS, [each for _, each in sorted(rows, key=lambda pair: -pair[0])]).markdown()


def losers(results: Results, before: Earlier) -> str:
    """Which methods do not beat the base model, or not every time, and which move the hard axis every time."""
    names = [m.name for m in METHODS if m.main and (m.name in results or m.name in before.rows)]

    failing = [name for name in names if win(name, "total", results, before)[1] <= 0.5]
    hard = [name for name in names if win(name, "following", results, before)[1] > 0.5]
    text = (
        f"**Better than the base**: {len(names) - len(failing)} of {len(names)} methods have the interval of total "
        f"above 50 % for every seed. The others: {', '.join(failing) or 'none'}."
        f"\n\n**Better at following**: above 50 % for every seed with {', '.join(hard) or 'none'}."
    )
    return "\n\n".join(part for part in (text, reasons.section(failing, results, before)) if part)


def recipes() -> str:
    found = read("own")
    rows = [[*row(r.name, found[r.name]), listed(r.overrides[r.common :])] for r in RECIPES if r.name in found]
    return RECIPES_HEAD + Table([*COLUMNS, "settings"], rows).markdown() if rows else ""


def needs(results: Results) -> str:
    """A sentence or two about each named method: what it needs, what it costs, when to use it."""

    def each(name: str, found: Results = results) -> str:
        wins = [(run["seed"], *run["curve"][-1]["total"]["win"]) for run in found.get(name, [])]
        return ", ".join(f"{win:.1%} [{low:.1%}, {high:.1%}] (seed {seed})" for seed, win, low, high in wins)

    names = {"spo": "spo_tuned", "gentle": "spo_gentle", "d3po": "d3po_tuned", "patient": "d3po_patient"}
    names |= {"awm": "awm_tuned", "grpo": "dance_grpo_tuned"}
    names |= {"dpo": "diffusion_dpo_tuned", "weighted": "diffusion_dpo_min_snr"}
    foreign = each("inpo", read("others"))
    return NEEDS.format(foreign=foreign, **{word: each(name) for word, name in names.items()})


def listed(settings: Sequence[str]) -> str:
    return ", ".join(f"`{text.removeprefix('objective.')}`" for text in settings)


def others() -> str:
    parts = []
    for regime, (heading, text) in REGIMES.items():
        if found := read(regime):
            rows = [
                row(name, runs) for name, runs in sorted(found.items(), key=lambda one: -pooled(one[1], "total")[0])
            ]
            parts.append(f"### {heading}\n\n{text}\n\n{Table(COLUMNS, rows).markdown()}")
    return "\n\n".join([OTHERS_HEAD, *parts]) if parts else ""


def tuning() -> str:
    """Every setting that was tried, method by method."""
    columns = ["method", "data", "settings", "seed", "prompts", "updates", "calls", "total", "following"]
    rows = []
    for line in sorted(store.tried(), key=lambda one: (one["regime"], one["model"], one["method"], -one["win"][0])):
        low, high = line["win"][1:]
        settings = listed(line["settings"]) or "as in the comparison"
        rows.append([line["method"], line["regime"], settings, line["seed"], line["n"], line["steps"]])
        win = f"{line['win'][0]:.1%} [{low:.1%}, {high:.1%}]"
        rows[-1] += [f"{line['calls']:,.0f}", win, f"{line['following'][0]:.1%}"]
    return TRIED_HEAD + Table(columns, rows).markdown() if rows else ""


def notes(methods: list[Method]) -> str:
    return SETTINGS + "\n".join(f"- **{m.name}**: {m.note}" for m in methods) if methods else ""


SETTINGS = """## Settings that differ

All others use learning rate 5e-4 and beta 500. The lower rates, and some settings of the on-policy methods, were
chosen after a look at seed 0. TR-DPO's interval, and the guidance that the trained pixel scorer learns with, were
chosen after a look at all three seeds.

"""
OTHERS_HEAD = """## Other data

The comparison's settings and budget, on other pairs. The picture has the methods that were run on several kinds.

![win rates by the kind of data](../assets/objectives-data.png)"""
RECIPES_HEAD = """## Tuned

Above, all methods share one learning rate and beta. Here each was tuned on seed 100 with 12,800 calls, and then run
once on seeds 0, 1 and 2 with twice as many calls and 512 held-out prompts. `spo_gentle` and `d3po_patient`, which has
four times the calls, were thought of after that, and were run on seeds 3, 4 and 5. The trials are listed
[below](#settings-that-were-tried). They are few and of one seed each, so a setting that looks best may have had luck.

"""
NEEDS = """## What each named method needs

- **Diffusion-DPO** needs pairs and nothing else, costs 128 calls for an update of 16 pairs, and comes first wherever
  there are pairs.
- **D3PO** needs a judge of finished pictures and four times Diffusion-DPO's calls, costs 192 calls an update, and is
  for judges (or people) that can only read finished pictures.
- **SPO** needs a judge that can read unfinished pictures, costs 178 calls an update, and is for such a judge and no
  data.
- **InPO** needs pairs and exact inversions, costs 228 to 304 calls an update, and is not shown to be worth them: at
  equal calls use Diffusion-DPO.

What these sentences rest on:

- **SPO**: 145 updates, 25,760 calls, with a learning rate that falls from 5e-4: {gentle}. So it beats the base every
  time. From 1e-3: {spo}. With guidance in the policy, 1e-3 destroys the model: 31.4% [27.6%, 35.6%] after 100 updates
  (seed 3). With guidance and 10 steps, an update costs 392 calls.
- **D3PO**: its labels say little about single steps. With noise in all steps, three trials on seed 100 gave 41.8% to
  46.9%. With noise in one step (`rollout.window`) it was 62.9%, with a falling learning rate 71.5%. That was luck in
  part: the same recipe gave 59.4% [55.1%, 63.5%], 46.1% [41.8%, 50.4%] and 50.0% [45.7%, 54.3%] on seeds 0, 1 and 2.
  With twice the calls: {d3po}. So it is better than the base with two seeds of three, and not shown to be with the
  third. With four times the calls, 51,200: {patient}. So it beats the base every time. Beta and guidance made no
  difference that could be seen.
- **InPO**: in the comparison's settings, with 10 inversion steps, 100 updates (30,369 calls) reach 61.7% [51.3%, 75.2%]
  on seeds 0, 1 and 2, so each is better than the base. With a falling learning rate of 5e-4, 5 inversion steps give
  52.0% on seed 100, and 3 give 49.6%. At 1e-3, 5 steps give 63.3%, but 52.9% [48.6%, 57.2%] on seed 0. On other
  models' pictures it does not gain: {foreign}.
- **Policy gradients** were tried with one setting each, on seed 100: `dance_grpo` with noise in one step 51.2% [45.1%,
  57.2%], `awm`, which noises finished samples, 57.0% [50.9%, 63.0%]. With twice the calls `awm` has {awm}, and
  `dance_grpo` {grpo}. Neither is shown to beat the base with every seed.
- **Gradients of a scorer** (`draft`, `alignprop`, `refl`) beat the base with every seed (in the table above), in
  appearance alone. They need a scorer with gradients: here the step-aware scorer of `configs/train_scorer_pixel.yaml`.

**Combinations.** On seed 100 none of the trials [below](#settings-that-were-tried) beats Diffusion-DPO with a falling
learning rate of 1e-3 (75.4% [69.8%, 80.3%] of `total`, 59.0% of *following*): ranked lists, moving references, more
rank, smaller batches, on-policy pairs in the second half. Measured weights had 5 and 20 updates only, because their
measurement was counted as if every update made one. That is mended, but they were not tried again. Weights by `min_snr`
are as good in total and better at following (64.1%). With twice the calls these two have {dpo} without and {weighted}
with them. **The fewest calls** are needed by `curriculum_dpo` with these weights: with 16 pairs an update, the easiest
quarter of the pairs first and the next one every 8 updates, it reaches 72.3, 76.2 and 75.8% on seeds 0, 1 and 2 after
48 updates, 6,144 calls, and 70% after 10 updates in the mean ([the curves](performance.md#sooner-to-the-same-quality)).
It was chosen among five such settings on seed 100. The quickstart's constant 5e-4 has 82.8, 72.3 and 74.8% with 25,600
calls, on pictures of 10 calls, so it stays. Other seeds were not run.
"""
TRIED_HEAD = """## Settings that were tried

About 12,800 calls each. What is not named is as in the comparison. Of the settings tried on seed 100, the one with the
highest win rate made the recipe. Lines of other seeds are recipes that were given up.

"""
HEAD = """# Choose a method

`python scripts/bench_objectives.py` writes this page from the files in `scripts/objective_bench/results`. Every method
trains a rank-8 LoRA of `assets/tiny-sdxl` with AdamW until 12,800 calls are used. A call is one sample through the
network, for any purpose (policy, reference, sampling, guidance); calls are counted as forward + 2 x backward.

- Measured on 256 held-out prompts (64 during training), with the same noise as the base model, 6 calls and guidance 3.
  The sampler is `ipndm` of order 2 on the default grid of the first results, which is kept in
  `scripts/objective_bench/plans`.
- Win rates are over the base model: the mean of the training seeds, and in brackets the lowest and the highest end of
  their 95 % Wilson intervals.
- `total` labelled the training data (half following, half appearance). *Following* is the hard axis, *appearance* the
  easy one.
- Diversity is the mean distance between four pictures of one prompt (the base model's: 0.202).
- Seconds are of training on one core. Those of some rows were measured beside other work, which can double them.
- Memory is that of the whole process, imports and pictures included.
- Rows in bold were measured with the current version. The others are of an earlier one, not measured again. Of these,
  `ddo` and `spin_diffusion` are of earlier presets (guidance 5 for their own samples, now 1).

## The model's own samples

![win rates of all methods in total, following and appearance](../assets/objectives.png)

Filled circles: the current version; hollow ones: an earlier one. Blue: better than the base with every seed; orange:
worse with every seed."""
