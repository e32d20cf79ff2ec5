"""How long do torch's waiting threads spin: cached updates of the quickstart, on an idle machine and beside busy ones.

python scripts/bench_threads.py [--settings ours default 0 10000] [--rounds 3] [--steps 60] [--busy 2] [--load hash]

Each setting is a process of its own: `ours` is what diffpo does by itself (`ours-10000`: with another spin count),
`default` is torch's own way, a number is GOMP_SPINCOUNT with all threads. The settings alternate, first on the idle
machine and then beside ``--busy`` processes that compute all the time (or that train, with ``--load train``). Prints
the median seconds of the updates, and each setting's ratio to the best (idle) and to one thread (busy).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffpo.common.tables import Table

ROOT = Path(__file__).resolve().parents[1]
ONE = "one thread"
KNOBS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
BURN = "import hashlib\nwhile True: hashlib.sha256(bytes(10**6))"


def environment(setting: str) -> dict[str, str]:
    """A process's environment: ``setting`` is `ONE`, `ours`, `default` or a spin count."""
    knobs = {name: value for name, value in os.environ.items() if name not in KNOBS}
    if setting.startswith("ours"):
        return knobs | ({"GOMP_SPINCOUNT": setting[5:]} if setting[5:] else {})
    if setting == ONE:
        return {**knobs, "OMP_NUM_THREADS": "1"}
    # a number of threads that is given stays as it is; 300000 is OpenMP's default
    spins = "300000" if setting == "default" else setting
    return {**knobs, "OMP_NUM_THREADS": str(os.cpu_count()), "GOMP_SPINCOUNT": spins}


def command(out: Path, steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "diffpo.cli", "train", "configs/quickstart.yaml", f"train.steps={steps}"),
        *("train.eval_every=1000", "train.checkpoint_every=1000", f"data.cache={out / 'cache'}"),
    ]


def seconds(out: Path, setting: str, steps: int) -> float:
    """Of ``steps`` updates after the first five, from what the run measured itself."""
    run = out / "run"
    subprocess.run(["rm", "-rf", str(run)], check=True)
    subprocess.run(
        [*command(out, steps), f"output={run}"], cwd=ROOT, env=environment(setting), check=True, capture_output=True
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sum(16 / row["pairs_per_second"] for row in rows[5:])


@contextmanager
def load(kind: str, number: int, out: Path) -> Iterator[None]:
    """``number`` other processes that compute all the time, or train with torch's own waiting."""
    commands = [
        [sys.executable, "-c", BURN]
        if kind == "hash"
        else [*command(out, 100000), f"output={out / f'load-{k}'}", f"train.seed={k + 1}"]
        for k in range(number)
    ]
    options = {"cwd": ROOT, "env": environment("default"), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [subprocess.Popen(each, **options) for each in commands]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measure(out: Path, settings: list[str], rounds: int, steps: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {setting: [] for setting in settings}
    for turn in range(rounds):
        for setting in settings[turn % len(settings) :] + settings[: turn % len(settings)]:
            found[setting].append(seconds(out, setting, steps))
            print(f"  {setting:>12} {found[setting][-1]:7.1f} s", flush=True)
    return found


def table(title: str, found: dict[str, list[float]], against: float) -> None:
    rows = []
    for setting, times in found.items():
        middle = statistics.median(times)
        rows.append((setting, f"{middle:.1f}", f"{middle / against:.2f}", " ".join(f"{t:.1f}" for t in times)))
    print(Table([title, "median s", "ratio", "all"], rows).markdown())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["ours", "default", "0", "10000"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--busy", type=int, default=2)
    parser.add_argument("--load", choices=["hash", "train"], default="hash")
    parser.add_argument("--only", choices=["idle", "busy"])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-threads"))
    args = parser.parse_args()
    settings, out = [ONE, *args.settings], args.out.resolve()
    seconds(out, "0", 6)  # fills the caches
    if args.only != "busy":
        found = measure(out, settings, args.rounds, args.steps)
        table("idle", found, min(map(statistics.median, found.values())))
    if args.only != "idle":
        with load(args.load, args.busy, out):
            found = measure(out, settings, args.rounds, args.steps)
        table(f"beside {args.busy} ({args.load})", found, statistics.median(found[ONE]))


if __name__ == "__main__":
    main()
