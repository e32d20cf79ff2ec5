"""Kill a training run again and again and let it resume: is the LoRA the uninterrupted run's, bit for bit?

python scripts/bench_faults.py [--out runs/bench-faults] [--kills 60] [--seed 0] [--objectives diffusion_dpo d3po]

Each run trains a LoRA of assets/tiny-sdxl for 12 updates with a checkpoint after every one and is killed (SIGKILL) six
times: at a random moment, or at a random operation on a file of the run's folder (open, fsync, rename, delete), so that
many kills fall inside the writing of a checkpoint or of the LoRA. In between the newest checkpoint is sometimes torn.
"""

import argparse
import builtins
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from diffpo.common import tables
from diffpo.common.carried import HOME as ROOT
from diffpo.config import load_config
from diffpo.weights.lora_file import FILE_NAME

STEPS, KILLS_A_RUN = 12, 6
OPERATIONS = ("fsync", "replace", "rename", "rmdir", "unlink", "open")  # of the module os, and the built-in open
SAMPLES = (
    "data.train=null",
    "data.prompts=shapes:train:20",
    "objective.rollout.prompts=4",
    "objective.rollout.steps=4",
)
OBJECTIVES = {
    "diffusion_dpo": ("objective.beta=500",),
    "d3po": ("objective.beta=0.2", *SAMPLES, "objective.rollout.updates=3", "objective.rollout.scorers=[shapes.total]"),
    "tr_dpo": ("objective.beta=500", "objective.reference.every=5"),
}


def config(objective: str, output: Path, cache: Path, *more: str):
    paths = {
        "model.path": ROOT / "assets" / "tiny-sdxl",
        "data.train": ROOT / "assets" / "shapes-preferences" / "validation.parquet",
        "data.cache": cache,
        "output": output,
    }
    settings = [f"{key}={value}" for key, value in paths.items()]
    settings += ["data.validation=null", f"train.steps={STEPS}", "train.batch_size=2", "train.checkpoint_every=1"]
    return load_config(
        ROOT / "configs" / "quickstart.yaml", [*settings, f"objective.name={objective}", *OBJECTIVES[objective], *more]
    )


def train(objective: str, output: Path, cache: Path, operation: int | None) -> None:
    """In a process of its own. ``operation``: the number of the operation on a file of the run to be killed at."""
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if operation is not None:
        ambush(output, operation, lambda: os.kill(os.getpid(), signal.SIGKILL))
    from diffpo.train.loop import train

    train(config(objective, output, cache))


def ambush(output: Path, operation: int, then: Callable[[], None]) -> None:
    """``then`` comes before the ``operation``-th operation from now on a file under ``output``."""
    left = [operation]

    def watched(original):
        def call(path, *rest, **options):
            if isinstance(path, (str, os.PathLike)) and str(output) in os.fspath(path):
                left[0] -= 1
                if left[0] == 0:
                    then()
            return original(path, *rest, **options)

        return call

    for name in OPERATIONS:
        setattr(os, name, watched(getattr(os, name)))
    builtins.open = watched(builtins.open)


def one_run(context, objective: str, output: Path, cache: Path, rng: random.Random, seconds: float) -> dict:
    """Kill and resume until it is finished; counts of kills by kind."""
    counts = {"moment": 0, "file": 0, "torn": 0}
    for attempt in range(KILLS_A_RUN + 1):
        last = attempt == KILLS_A_RUN
        at_file = not last and attempt % 2 == 0
        operation = rng.randrange(1, 60) if at_file else None
        process = context.Process(target=train, args=(objective, output, cache, operation))
        process.start()
        process.join(None if last or at_file else rng.uniform(0.2, 0.8) * seconds)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        if process.exitcode == -signal.SIGKILL:
            counts["file" if at_file else "moment"] += 1
        elif process.exitcode:
            raise SystemExit(f"{output} failed with {process.exitcode}: see {output.with_suffix('.log')}")
        checkpoints = sorted(output.glob("checkpoint-*"))
        if not last and len(checkpoints) > 1 and rng.random() < 0.2:
            state = checkpoints[-1] / rng.choice(["state.pt", FILE_NAME, "checkpoint.json"])
            os.truncate(state, rng.randrange(state.stat().st_size))
            counts["torn"] += 1
    return counts


def prepare(out: Path):
    """An empty folder ``out``, and what starts processes that need not import the libraries again."""
    out = out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "diffusers", "peft", "objective_bench.warm"])
    return out, context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-faults"))
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    args = parser.parse_args()
    out, context = prepare(args.out)
    rng, total, wrong = random.Random(args.seed), 0, 0
    columns = ["objective", "runs", "killed at a moment", "at a file operation"]
    print(tables.head([*columns, "newest checkpoint torn", "LoRAs that differ"]), flush=True)
    for objective in args.objectives:
        straight = out / f"{objective}-straight"
        for _ in range(2):  # the first one fills the caches
            shutil.rmtree(straight, ignore_errors=True)
            started = time.perf_counter()
            process = context.Process(target=train, args=(objective, straight, out / "cache", None))
            process.start()
            process.join()
            seconds = time.perf_counter() - started
        expected = (straight / FILE_NAME).read_bytes()
        runs, differ, counts = 0, 0, {"moment": 0, "file": 0, "torn": 0}
        while counts["moment"] + counts["file"] < args.kills / len(args.objectives):
            output = out / f"{objective}-{runs}"
            for kind, count in one_run(context, objective, output, out / "cache", rng, seconds).items():
                counts[kind] += count
            differ += (output / FILE_NAME).read_bytes() != expected
            runs += 1
        total, wrong = total + counts["moment"] + counts["file"], wrong + differ
        row = (objective, runs, counts["moment"], counts["file"], counts["torn"], differ)
        print(tables.row(row), flush=True)
    print(f"\n{total} kills, {wrong} LoRAs that differ")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
