#!/usr/bin/env python
"""The pictures of samplers/README.md: error against calls on an analytic mixture, a contact sheet of the tiny model.

    python scripts/plot_samplers.py [--out assets] [--only order sheet]

Writes solver-orders.png and solver-sheet.png, and prints the measured orders.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import samplers
from samplers.analytic import GaussianMixture

ROOT = Path(__file__).resolve().parents[1]
COLOURS = ("#8a8f98", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#000000")  # Okabe and Ito
FULL = {"lower_order_final": False}
ORDERS = [  # label, solver, options
    ("DDIM (1)", "ddim", {}),
    ("Heun (2)", "heun", {}),
    ("DPM-Solver++ 2M (2)", "dpmpp", {"order": 2, **FULL}),
    ("DPM-Solver++ 3M as published (2)", "dpmpp", {"order": 3, "as_published": True, **FULL}),
    ("DPM-Solver++ 3M (3)", "dpmpp", {"order": 3, **FULL}),
    ("UniPC-3 (4)", "unipc", {"order": 3, **FULL}),
    ("DEIS-tAB (4)", "deis", {"order": 4}),
    ("Runge-Kutta (4)", "runge_kutta", {"method": "rk4"}),
]
SHEET = [  # label, options of SolverScheduler
    ("the rule", {}),
    ("UniPC-3", {"solver": "unipc", "solver_order": 3}),
    ("iPNDM-2", {"solver": "ipndm", "solver_options": {"order": 2}}),
    ("DPM-Solver++ 3M", {"solver": "dpmpp", "solver_order": 3}),
    ("DPM-Solver++ 2M", {"solver": "dpmpp", "solver_order": 2}),
    ("DDIM", {"solver": "ddim"}),
]
CALLS = (5, 6, 8, 10, 15, 20)
PROMPTS = (
    "a yellow square above a yellow triangle on a black background",
    "a cyan circle right of a red square on a brown background",
)


def orders(path: Path) -> None:
    """RMSE to the exact solution on three Gaussians in two dimensions, VP schedule, log-SNR grid, ending at t_min."""
    data = GaussianMixture(
        [0.27, 0.51, 0.22],
        [[-0.86, -0.74], [0.90, 0.24], [-0.26, 0.02]],
        [[0.31, 0.20], [0.16, 0.34], [0.31, 0.26]],
    )
    schedule = samplers.VPLinear()
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact, model = data.exact(schedule, x), data.model(schedule)
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for (label, solver, options), colour in zip(ORDERS, COLOURS, strict=True):
        stages = {"heun": 2, "runge_kutta": 4}.get(solver, 1)
        calls = [stages * round(n / stages) for n in (12, 20, 40, 80, 160, 320)]
        errors = []
        for n in calls:
            out = samplers.sample(model, x, schedule=schedule, solver=solver, steps=n, end="t_end", **options)
            errors.append((out - exact).square().mean().sqrt().item())
        slope = np.log2(errors[-2] / errors[-1]) / np.log2(calls[-1] / calls[-2])
        print(f"{label:34s} measured order {slope:.2f}  RMSE {' '.join(f'{e:.1e}' for e in errors)}")
        axes.loglog(calls, errors, "o-", ms=3.5, lw=1.5, color=colour, label=f"{label}: {slope:.2f}")
    axes.set(xlabel="model calls", ylabel="RMSE to the exact solution", title="solver (claimed order): measured order")
    axes.set_xticks(calls, calls, minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def sheet(path: Path) -> None:
    """The same prompts and the same noise through every solver: rows are solvers, columns numbers of calls."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(ROOT / "assets" / "tiny-sdxl", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config

    def images(calls, **options):
        pipe.scheduler = samplers.SolverScheduler.from_config(config, guidance=3.0, **options)
        noise = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
        made = pipe(
            list(PROMPTS), num_inference_steps=calls, guidance_scale=3.0, generator=noise, output_type="np"
        ).images
        return np.concatenate(list(made), axis=1)

    exact = images(200, solver="dpmpp", solver_order=3)
    figure = Figure(figsize=(1.75 * (len(CALLS) + 1) + 1.2, 1.0 * len(SHEET) + 0.5), layout="constrained")
    cells = figure.subplots(len(SHEET), len(CALLS) + 1)
    for line, (label, options) in zip(cells, SHEET, strict=True):
        for axes, calls in zip(line, CALLS, strict=False):
            made = images(calls, **options)
            axes.imshow(made, interpolation="nearest")
            axes.set_xlabel(f"{np.sqrt(np.mean((made - exact) ** 2)):.3f}", fontsize=7, labelpad=2)
        line[-1].imshow(exact, interpolation="nearest")
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for axes, calls in zip(cells[0], (*CALLS, "200 calls"), strict=True):
        axes.set_title(calls, fontsize=9)
    for axes in cells.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "assets")
    parser.add_argument("--only", nargs="+", choices=("order", "sheet"), default=("order", "sheet"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    if "order" in args.only:
        orders(args.out / "solver-orders.png")
    if "sheet" in args.only:
        sheet(args.out / "solver-sheet.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
