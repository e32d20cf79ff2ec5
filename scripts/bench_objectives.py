"""Every method on the embedded world under one budget of model calls: docs/objectives.md.

python scripts/bench_objectives.py [--regime own|others|real] [--model tiny-sdxl|tiny-dit] [--seeds 0 1 2]
                                   [--only NAME ...] [--jobs 2] [--out runs/bench-objectives]
python scripts/bench_objectives.py --tune NAME ...                its grid of eight settings, seed 100
python scripts/bench_objectives.py --try NAME SETTING=VALUE ...   one more setting in the same way
python scripts/bench_objectives.py --report                       only write the page

The budget counts samples through the network, forward + 2 x backward, whatever they are for: training, the reference,
sampling, guidance, judging in latents. Each job (a method with a seed) is a process of its own. Its result is a small
file in scripts/objective_bench/results, which belongs to the job's content: settings, seed, data, model. What is there
is not run again, so the command can be interrupted, and one method can be run again alone. Settings that were tried are
lines of results/tried.jsonl. A method's recipe (`recipes.py`) names what was chosen from them.
"""

import argparse
import multiprocessing
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two jobs on two cores, a thread each
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from objective_bench import data, job, report, tune
from objective_bench.methods import METHODS, Method, named
from objective_bench.recipes import RECIPES

ALL = [*METHODS, *RECIPES]


def work(task: tuple) -> str:
    method, seed, setting, note = task
    name = f"{setting.label}-{method.name}-{seed}"
    log = setting.folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            result = tune.attempt(method, setting, note) if seed == tune.SEED else job.run(method, seed, setting)
        except BaseException as error:  # a method that fails must not take the others along
            traceback.print_exc()
            return f"{name}: failed, {type(error).__name__}: {str(error)[:200]}; see {log}"
    total = result["win"] if "win" in result else result["curve"][-1]["total"]["win"]
    return f"{name}: total {total[0]:.1%} [{total[1]:.1%}, {total[2]:.1%}] in {result['seconds']:.0f} s"


def prepare(setting: job.Setting, methods: list[Method]) -> None:
    """What the jobs of ``methods`` share: data, the base model's scores, step-aware scorers."""
    if not (setting.data / "pairs.parquet").exists():
        data.make(setting.data, setting.regime)
    if not setting.base.exists():
        job.measure_base(setting)
    if any("$SCORERS" in text for method in methods for text in method.overrides):
        data.scorers(setting.folder / "scorers", setting.folder / "cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-objectives"))
    parser.add_argument("--regime", choices=data.REGIMES, default="own")
    parser.add_argument("--model", choices=job.MODELS, default="tiny-sdxl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of methods and recipes")
    parser.add_argument("--tune", nargs="+", metavar="NAME", help="recipes whose grids are tried")
    parser.add_argument(
        "--try", nargs="+", dest="attempts", action="append", metavar="NAME", help="a recipe, and its settings"
    )
    parser.add_argument("--budget", type=int, default=12_800, help="calls; Diffusion-DPO's 100 updates of 16 pairs")
    parser.add_argument("--n", type=int, default=256, help="held-out prompts at the end")
    parser.add_argument("--n-curve", type=int, default=64, help="held-out prompts during training")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only write the page")
    args = parser.parse_args()
    setting = job.Setting(args.out.resolve(), args.budget, args.n, args.n_curve, args.model, args.regime)
    if not args.report:
        tasks = chosen(args, setting)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "diffusers", "peft", "objective_bench.warm"])
        with context.Pool(args.jobs, maxtasksperchild=1) as pool:
            pool.apply(prepare, (setting, [task[0] for task in tasks]))
            for i, line in enumerate(pool.imap_unordered(work, tasks), 1):
                print(f"[{i}/{len(tasks)}] {line}", flush=True)
    if args.report or not (args.only or args.tune or args.attempts):
        report.write()


def chosen(args: argparse.Namespace, setting: job.Setting) -> list[tuple]:
    """The jobs that the command line asks for. A recipe has a budget of its own."""
    try:
        if args.attempts:
            return [tune.task(named(name, RECIPES), settings, setting) for name, *settings in args.attempts]
        if args.tune:
            return [task for name in args.tune for task in tune.grid(named(name, RECIPES), setting)]
        methods = [named(name, ALL) for name in args.only] if args.only else METHODS
    except KeyError as error:
        sys.exit(str(error.args[0]))
    settings = {method.name: replace(setting, budget=method.budget or setting.budget) for method in methods}
    return [(method, seed, settings[method.name], "") for seed in args.seeds for method in methods]


if __name__ == "__main__":
    main()
