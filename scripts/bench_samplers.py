#!/usr/bin/env python
"""Every solver here, every diffusers scheduler and the official codes against `default_solver`, by error and by time.

    python scripts/bench_samplers.py [--analytic] [--tiny] [--overhead] [--calls 5 8 10 15 20]
                                     [--seed 0] [--fresh] [--guidance 1 3] [--models tiny-sdxl tiny-dit]
                                     [--prompts 64] [--json OUT] [--markdown OUT]

--analytic: six Gaussian mixtures under the Stable Diffusion schedule, RMSE to the exact solution at the solver's own
end (sigma 0 or label 0). --tiny: latents of assets/tiny-sdxl and tiny-dit against a solution with 500 calls.
--overhead: time per call without the model. Without any of them all three. Ratios below 1: the rule is better.
Intervals are 95 %, from paired bootstrap over the samples. About 4, 60 and 1 minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from sampler_bench import overhead, report
from sampler_bench.problems import six_problems
from sampler_bench.tiny import TinyDiT, TinySDXL

MODELS = {"tiny-sdxl": TinySDXL, "tiny-dit": TinyDiT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("analytic", "tiny", "overhead"):
        parser.add_argument(f"--{part}", action="store_true")
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 8, 10, 15, 20])
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise and, with --fresh, of the mixtures")
    parser.add_argument("--fresh", action="store_true", help="six other mixtures of the same kinds")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0], help="of the embedded models")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], help="of --tiny")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    every = not (args.analytic or args.tiny or args.overhead)
    torch.set_num_threads(1)
    console = Console(width=200)
    results = {"machine": report.machine(), "seed": args.seed}
    console.print(f"{results['machine']}, seed {args.seed}")
    if args.analytic or every:
        problems = six_problems(args.seed, others=args.fresh)
        results["analytic"] = [report.cell(p, n, console=console) for p in problems for n in args.calls]
    if args.tiny or every:
        problems = [MODELS[m](g, args.prompts, args.seed) for m in args.models for g in args.guidance]
        results["tiny"] = [report.cell(p, n, scan=4, console=console) for p in problems for n in args.calls]
    if args.overhead or every:
        results["overhead"] = overhead.run()
    for table in report.tables(results):
        console.print(table.terminal())
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    if args.markdown:
        args.markdown.write_text(
            "\n\n".join(f"{table.title}\n\n{table.markdown()}" for table in report.tables(results)) + "\n"
        )


if __name__ == "__main__":
    main()
