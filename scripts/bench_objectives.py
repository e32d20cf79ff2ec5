"""Every method on the embedded world under one budget of model calls: docs/objectives.md and its pictures.

python scripts/bench_objectives.py [--out runs/bench-objectives] [--seeds 0 1 2] [--only NAME ...] [--jobs 2]

The budget counts samples through the network, forward + 2 x backward, whatever they are for: training, the reference,
sampling, guidance, judging in latents. Each job (a method with a seed) is a process of its own; finished jobs are kept
in OUT/results and not run again, so the command can be interrupted. `--report` writes the page from what is there.
"""

import argparse
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two jobs on two cores, a thread each
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from objective_bench import data, job, report
from objective_bench.methods import METHODS


def work(task: tuple) -> str:
    method, seed, setting = task
    name = f"{method.name}-{seed}"
    log = setting.folder / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            result = job.run(method, seed, setting)
        except BaseException as error:  # a method that fails must not take the others along
            traceback.print_exc()
            return f"{name}: failed, {type(error).__name__}: {str(error)[:200]}; see {log}"
    total = result["curve"][-1]["total"]["win"]
    return f"{name}: total {total[0]:.1%} [{total[1]:.1%}, {total[2]:.1%}] in {result['seconds']:.0f} s"


def base_pictures(setting: job.Setting) -> None:
    import json

    drawn = job.draw(None, range(setting.n))
    content = {"scores": drawn["scores"], "diversity": job.diversity(None)}
    setting.folder.mkdir(parents=True, exist_ok=True)
    (setting.folder / "base.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-objectives"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--budget", type=int, default=12_800, help="calls; Diffusion-DPO's 100 updates of 16 pairs")
    parser.add_argument("--n", type=int, default=256, help="held-out prompts at the end")
    parser.add_argument("--n-curve", type=int, default=64, help="held-out prompts during training")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only write the page")
    args = parser.parse_args()
    setting = job.Setting(args.out.resolve(), args.budget, args.n, args.n_curve)
    if not args.report:
        if unknown := set(args.only or ()) - {method.name for method in METHODS}:
            sys.exit(f"unknown methods: {', '.join(sorted(unknown))}; there are {', '.join(m.name for m in METHODS)}")
        if not (setting.folder / "data").exists():
            data.make(setting.folder / "data")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "diffusers", "peft", "objective_bench.warm"])
        with context.Pool(args.jobs, maxtasksperchild=1) as pool:
            if not (setting.folder / "base.json").exists():
                pool.apply(base_pictures, (setting,))
            chosen = [method for method in METHODS if not args.only or method.name in args.only]
            if any("$SCORERS" in text for method in chosen for text in method.overrides):
                pool.apply(data.scorers, (setting.folder / "scorers", setting.folder / "cache"))
            tasks = [(method, seed, setting) for seed in args.seeds for method in chosen]
            for i, line in enumerate(pool.imap_unordered(work, tasks), 1):
                print(f"[{i}/{len(tasks)}] {line}", flush=True)
    if not args.only:
        report.write(setting)


if __name__ == "__main__":
    main()
