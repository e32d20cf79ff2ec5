"""One cell = one problem at one number of calls: who is best, and how the rule compares. Then tables of cells."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from diffpo.common.tables import Table

from . import ours, published, theirs
from .compare import errors, geometric_mean, measure, ratio, rmse

SHORTLIST = 4  # methods that a scan of a few samples passes on to the full measurement


def machine() -> str:
    """Processor, Python, torch and diffusers."""
    import diffusers

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((ln.split(":")[1].strip() for ln in info.read_text().splitlines() if "model name" in ln), cpu)
    return f"{cpu}, Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}"


def cell(problem, calls: int, scan: int = 0, console=None) -> dict:
    """Measure the rule and all others at one number of calls.

    `scan`: look at this many samples with every method first, and measure on all samples only the `SHORTLIST` most
    accurate ones of each family.
    """
    others = theirs.methods(problem.prediction)
    families = {
        "diffusers in common use": {name: others[name] for name in theirs.common(problem.prediction)},
        "diffusers at any setting": others,
        "official codes": published.methods(),
        "samplers": ours.methods(ours.GRIDS[:2] if scan else ours.GRIDS),
    }
    everyone = {name: method for methods in families.values() for name, method in methods.items()}
    if scan:
        order = measure(problem.head(scan), everyone, calls)
        short = {n for methods in families.values() for n in [n for n in order if n in methods][:SHORTLIST]}
        everyone = {name: everyone[name] for name in short}  # a method counts in every family that it belongs to
    measured = measure(problem, everyone, calls)
    rule = errors(problem, ours.rule, calls)
    found = {"problem": problem.name, "calls": calls, "n": len(rule), "rule": rmse(rule), "against": {}}
    for family, names in families.items():
        name = next(n for n in measured if n in names)  # the best first
        value, low, high = ratio(rule, measured[name])
        found["against"][family] = {
            "best": name,
            "rmse": rmse(measured[name]),
            "ratio": value,
            "low": low,
            "high": high,
        }
    fitted = published.FITTED.get((problem.name, calls))
    if fitted:
        found["fitted"] = {"best": fitted[0], "rmse": fitted[1], "ratio": rmse(rule) / fitted[1]}
    if console:
        console.print(summary(found))
    return found


def summary(found: dict) -> str:
    parts = [f"{a['ratio']:.2f} x {family} ({a['best']})" for family, a in found["against"].items()]
    return f"{found['problem']}, {found['calls']} calls: rule {found['rule']:.4f} = " + ", ".join(parts)


def tables(results: dict) -> list[Table]:
    """What the bench prints."""
    found = [_against(results[part], part) for part in ("analytic", "tiny") if part in results]
    found += [_means(results["analytic"])] if "analytic" in results else []
    return found + ([_overhead(results["overhead"])] if "overhead" in results else [])


def _against(cells: list[dict], part: str) -> Table:
    families = list(cells[0]["against"])
    title = f"{part}: RMSE of the rule, and its ratio to the best of each family [95 %], n = {cells[0]['n']}"
    table = Table(["problem", "calls", "rule", *families, "fitted codes"], title=title)
    for c in cells:
        row = [c["problem"], str(c["calls"]), f"{c['rule']:.4f}"]
        for a in c["against"].values():
            row.append(f"{a['ratio']:.2f} [{a['low']:.2f}, {a['high']:.2f}] {a['best']}")
        table.rows.append([*row, f"{c['fitted']['ratio']:.2f} {c['fitted']['best']}" if "fitted" in c else ""])
    return table


def _means(cells: list[dict]) -> Table:
    """Geometric means over the problems."""
    families = list(cells[0]["against"])
    title = "analytic: geometric mean of the ratios (and the largest)"
    table = Table(["calls", *families, "official or fitted"], title=title)
    groups = {"5 to 10": [c for c in cells if 5 <= c["calls"] <= 10], "all": cells}
    groups |= {str(n): [c for c in cells if c["calls"] == n] for n in sorted({c["calls"] for c in cells})}
    for name, group in groups.items():
        columns = [[c["against"][f]["ratio"] for c in group] for f in families]
        fitted = [c["fitted"]["ratio"] if "fitted" in c else 0.0 for c in group]
        columns.append([max(pair) for pair in zip(columns[families.index("official codes")], fitted, strict=True)])
        if group:
            table.rows.append([name, *(f"{geometric_mean(v):.2f} ({max(v):.2f})" for v in columns)])
    return table


def _overhead(rows: list[dict]) -> Table:
    shapes = list(dict.fromkeys(tuple(r["shape"]) for r in rows))
    columns = ["", *(f"{list(s)}: us, x DPM++2M, x UniPC 3" for s in shapes)]
    table = Table(columns, title="time per call without the model, 1 thread, float32")
    for name in dict.fromkeys(r["name"] for r in rows):
        line = [name]
        for shape in shapes:
            us = {r["name"]: r["microseconds"] for r in rows if tuple(r["shape"]) == shape}
            base, unipc = us["diffusers DPM++2M"], us["diffusers UniPC order 3"]
            line.append(f"{us[name]:.0f}, {us[name] / base:.2f}, {us[name] / unipc:.2f}")
        table.rows.append(line)
    return table
