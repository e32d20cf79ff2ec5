"""Pairs per second, start-up and memory of `diffpo train` against what the existing SDXL scripts do, in alternation.

    python scripts/bench_training.py [--model tiny|wide] [--steps 60] [--rounds 3] [--out runs/bench-training]

The two sides train the same LoRA of the same model on the same pairs, batch and resolution, each in a process of its
own, one after the other in each round. `scripts` is `training_bench/baseline.py`: it encodes pictures and captions in
every step. `second UNet` is the same with a second UNet as the reference. `diffpo` begins with an empty cache.

Seconds are CPU seconds of the process (user + system, one thread each), which other programs on the machine disturb
less than the clock. A step is the mean over all steps but the first five. Start-up is all before the first step ends,
less one step. Memory is the most that the process had resident. Intervals are of the mean log ratio over the rounds
(Student's t). Finished runs are kept in OUT and not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from math import exp, log, sqrt
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t as student

from diffpo.common import tables
from diffpo.common.carried import HOME as ROOT

PAIRS = ROOT / "assets" / "shapes-preferences" / "train.parquet"
WARM = 5  # steps
LENGTHS = (100, 1_000, 10_000)
SIDES = ("diffpo", "scripts", "second UNet")


@dataclass(frozen=True)
class Setting:
    """model: a folder; channels: 0 is assets/tiny-sdxl."""

    channels: int
    resolution: int
    batch_size: int
    steps: int
    overrides: tuple[str, ...] = ()

    def model(self, out: Path) -> Path:
        if not self.channels:
            return ROOT / "assets" / "tiny-sdxl"
        from training_bench import wide

        return wide.make(out / f"sdxl-{self.channels}", self.channels)


SETTINGS = {"tiny": Setting(0, 32, 16, 60), "wide": Setting(128, 128, 2, 20)}


def command(side: str, setting: Setting, model: Path, folder: Path) -> list[str]:
    if side != "diffpo":
        options = {"model": model, "data": PAIRS, "resolution": setting.resolution, "batch-size": setting.batch_size}
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        flags += ["--steps", str(setting.steps), *(["--second-unet"] if side == "second UNet" else [])]
        return [sys.executable, "-m", "training_bench.baseline", *flags]
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {model}}}\n"
        f"data: {{train: {PAIRS}, resolution: {setting.resolution}, cache: {folder / 'cache'}}}\n"
        "lora: {rank: 8}\n"
        "objective: {name: diffusion_dpo, beta: 500}\n"
        f"train: {{steps: {setting.steps}, batch_size: {setting.batch_size}, lr: 5e-4, checkpoint_every: 500,\n"
        "        optimizer: 'training_bench.clock:ClockedAdamW'}\n"
        f"output: {folder / 'run'}\n"
    )
    return [sys.executable, "-m", "diffpo.cli", "train", str(recipe), *setting.overrides]


@dataclass(frozen=True)
class Run:
    """Seconds, and bytes resident at most."""

    start_cpu: float
    start_wall: float
    step_cpu: float
    step_wall: float
    memory: int

    def total(self, steps: int) -> float:
        return self.start_cpu + steps * self.step_cpu


def measure(side: str, setting: Setting, model: Path, folder: Path) -> Run:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    paths = [str(ROOT / "scripts"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"BENCH_MARKS": str(folder / "marks.json"), "PYTHONPATH": os.pathsep.join(paths)}
    own |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    own |= {"HF_DATASETS_CACHE": str(folder / "datasets"), "ACCELERATE_USE_CPU": "true"}
    with open(folder / "log", "w") as said:
        began = time.monotonic()
        process = subprocess.Popen(
            command(side, setting, model, folder), env={**os.environ, **own}, stdout=said, stderr=said
        )
        _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{side} failed; see {folder / 'log'}")
    marks = json.loads((folder / "marks.json").read_text())
    each = [(marks[-1][k] - marks[WARM - 1][k]) / (len(marks) - WARM) for k in (0, 1)]
    shutil.rmtree(folder / "datasets", ignore_errors=True)
    return Run(marks[0][0] - each[0], marks[0][1] - began - each[1], *each, used.ru_maxrss * 1024)


def ratio(ours: list[float], theirs: list[float]) -> str:
    """theirs / ours, with its 95 % interval over the rounds."""
    logs = [log(b / a) for a, b in zip(ours, theirs, strict=True)]
    middle = mean(logs)
    if len(logs) < 2:
        return f"{exp(middle):.2f}"
    half = float(student.ppf(0.975, len(logs) - 1)) * stdev(logs) / sqrt(len(logs))
    return f"{exp(middle):.2f} [{exp(middle - half):.2f}, {exp(middle + half):.2f}]"


def markdown(columns: tuple[str, ...], rows: list[tuple]) -> str:
    return "\n".join([tables.head(columns), *map(tables.row, rows)])


def report(runs: dict[str, list[Run]], setting: Setting) -> str:
    rows = []
    for side, found in runs.items():
        step = mean(run.step_cpu for run in found)
        rows.append(
            (
                side,
                f"{mean(run.start_cpu for run in found):.1f}",
                f"{mean(run.start_wall for run in found):.1f}",
                f"{step:.3f}",
                f"{setting.batch_size / step:.1f}",
                f"{mean(run.memory for run in found) / 2**30:.2f}",
                *(f"{mean(run.total(steps) for run in found):,.0f}" for steps in LENGTHS),
            )
        )
    head = ("side", "CPU s before step 1", "wall s before step 1", "CPU s a step", "pairs a CPU s", "peak GiB")
    columns = head + tuple(f"CPU s, {steps:,} steps" for steps in LENGTHS)
    lines = [markdown(columns, rows), ""]
    ours, rest = runs["diffpo"], {side: found for side, found in runs.items() if side != "diffpo"}
    quantities = {"pairs per second": lambda run: run.step_cpu, "start-up": lambda run: run.start_cpu}
    quantities |= {f"{steps:,} steps": (lambda run, steps=steps: run.total(steps)) for steps in LENGTHS}
    quantities |= {"memory": lambda run: run.memory}
    rows = [
        (side, *(ratio(list(map(of, ours)), list(map(of, found))) for of in quantities.values()))
        for side, found in rest.items()
    ]
    return "\n".join([*lines, markdown(("times what diffpo needs", *quantities), rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SETTINGS, default="tiny")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--channels", type=int, help="of the wide model's first level; SDXL has 320")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-training"))
    parser.add_argument("overrides", nargs="*", help="settings of diffpo, a.b=c")
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in ("steps", "batch_size", "resolution", "channels")}
    given = {name: value for name, value in given.items() if value is not None}
    base = asdict(SETTINGS[args.model]) | given | {"overrides": tuple(args.overrides)}
    setting, out = Setting(**base), args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    model = setting.model(out)
    name = "-".join(str(value) for value in list(base.values())[:-1]) + "".join(f"-{each}" for each in args.overrides)
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for number in range(args.rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            kept = out / f"{name}-{side}-{number}.json"
            if not kept.exists():
                found = measure(side, setting, model, out / "working")
                kept.write_text(json.dumps(asdict(found)))
                print(f"round {number + 1}, {side}: {found}", flush=True)
            runs[side].append(Run(**json.loads(kept.read_text())))
    text = report(runs, setting)
    (out / f"{name}.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
