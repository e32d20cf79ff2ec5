#!/usr/bin/env python
"""Calibrated plans against every uncalibrated method, on held-out prompts: errors, scores and what the fits cost.

    python scripts/bench_calibrated.py [--models tiny-sdxl tiny-dit gmm2a gmm16a gmm16s] [--guidance 1 3 7.5]
                                       [--calls 4 5 6 8 10] [--methods NAME ...] [--prompts 256] [--fit 256]
                                       [--rivals N] [--budget CALLS] [--device cuda] [--batch 32] [--threads 1]
                                       [--out runs/bench-calibrated]
    python scripts/bench_calibrated.py --count       how many model calls the selected part still makes
    python scripts/bench_calibrated.py --lora FILE   plans of the base model on the tuned one
    python scripts/bench_calibrated.py --table       Markdown tables of what is there
    python scripts/bench_calibrated.py --sheet       contact sheets into OUT, 5 calls unless said

Error: latents against a solution with 500 calls (exact for the mixtures), at the method's own end. Settings of every
method are chosen on 32 training prompts: all of them on 8, the best three of a family on 32. Plans are fitted to other
training prompts. What is reported are held-out prompts. With --rivals only so many uncalibrated families are measured
on those, the best ones on the training prompts, and the default rule. An interrupted run goes on where it was; several
runs may share OUT. --methods takes names of calibrated methods and words of uncalibrated families, such as 'diffusers'.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from calibrated_bench import report, sheet, worlds
from calibrated_bench.cells import Cell, Sizes
from calibrated_bench.methods import calibrated
from calibrated_bench.references import References
from calibrated_bench.work import remaining


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=worlds.MODELS, default=[*worlds.MODELS])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, 3.0, 7.5])
    parser.add_argument("--calls", nargs="+", type=int)
    parser.add_argument("--methods", nargs="+", help="default: all, of both kinds")
    parser.add_argument("--prompts", type=int, default=256, help="held-out ones")
    parser.add_argument("--select", type=int, default=worlds.SELECT, help="training prompts to choose settings on")
    parser.add_argument("--fit", type=int, default=256, help="training prompts to fit plans to")
    parser.add_argument("--rivals", type=int, help="uncalibrated families to measure; default: all")
    parser.add_argument("--budget", type=int, help="model calls of the search (`searched`) on every fitted prompt")
    parser.add_argument("--reference-calls", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of all noises")
    parser.add_argument("--batch", type=int, default=32, help="prompts in one call, for references and measurements")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-calibrated"))
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--references", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--sheet", action="store_true")
    args = parser.parse_args(arguments)
    if not 1 <= args.select <= worlds.SELECT:
        parser.error(f"--select must be 1 to {worlds.SELECT}, not {args.select}")
    if args.lora is not None:
        args.models = [model for model in args.models if model in worlds.EMBEDDED]
    args.calls = args.calls or ([5] if args.sheet else [4, 5, 6, 8, 10])
    return args


def measure(args: argparse.Namespace) -> None:
    """References first, then cell after cell."""
    sizes = Sizes(args.prompts, args.select, args.fit, args.batch, args.rivals, args.budget)
    names = None if args.methods is None else [name for name in calibrated() if name in args.methods]
    for model in args.models:
        for guidance in args.guidance:
            options = worlds.Options(args.seed, args.reference_calls, args.device)
            base = worlds.world(model, guidance, options)
            world = base
            if args.lora is not None:
                options = worlds.Options(args.seed, args.reference_calls, args.device, args.lora)
                world = worlds.world(model, guidance, options)
            references = References(world, args.out, args.batch)
            cells = [Cell(world, calls, args.out, sizes, base, print_now) for calls in args.calls]
            fits = args.lora is None and names != []
            todo = remaining(cells, references, fits, args.methods)
            print_now(f"{world.name} g={guidance:g}: {todo}")
            if args.count:
                continue
            for split, count in (("select", args.select), ("heldout", args.prompts), ("fit", args.fit if fits else 0)):
                references.compute(split, count, print_now)
            for cell in [] if args.references else cells:
                cell.run_uncalibrated(args.methods)
                cell.run_calibrated(names, (lambda r=references: r.problem(args.fit)) if fits else None)
            print_now(f"{world.name} g={guidance:g}: made {world.tally.calls} calls, {world.tally.samples} x samples")


def tables(args: argparse.Namespace) -> None:
    names = [name for name in calibrated() if args.methods is None or name in args.methods]
    chosen = report.Selected(args.models, args.guidance, args.calls, names, args.prompts)
    ends = (f"-seed{args.seed}", f"-seed{args.seed}-ref{args.reference_calls}")
    found = list(report.cells(args.out, chosen, lambda key: key.endswith(ends)))
    own, tuned = ([r for r in found if (" + " in r.about["model"]) == lora] for lora in (False, True))
    parts = {"Ratios of RMS errors, 95 % intervals": report.ratios(own, names)}
    parts |= {"Cost of the calibrations": report.costs(own)}
    parts |= {"Plans of the base model with a LoRA on top": report.ratios(tuned, names)} if tuned else {}
    parts |= {"Everyone": report.everyone(found)}
    for title, table in parts.items():
        print(f"\n{title}\n\n{table.markdown()}")
    for line in ["", "Missing:", *(report.missing(own, chosen) or ["nothing"])]:
        print(line)


def sheets(args: argparse.Namespace) -> None:
    sizes = Sizes(args.prompts, args.select, args.fit, args.batch, args.rivals, args.budget)
    for model in [model for model in args.models if model in worlds.EMBEDDED]:
        for guidance in args.guidance:
            world = worlds.world(model, guidance, worlds.Options(args.seed, args.reference_calls, args.device))
            for calls in args.calls:
                path = args.out / f"sheet-{model}-g{guidance:g}-{calls}.png"
                sheet.draw(Cell(world, calls, args.out, sizes), min(12, args.prompts)).save(path)
                print_now(path)


def print_now(text: object) -> None:
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False
    (tables if args.table else sheets if args.sheet else measure)(args)


if __name__ == "__main__":
    main()
