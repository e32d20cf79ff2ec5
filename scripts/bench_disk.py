"""Fill the disk under a training run, make room, and run the same command again: is the LoRA the undisturbed run's?

python scripts/bench_disk.py [--out runs/bench-disk] [--runs 20] [--seed 0] [--objectives diffusion_dpo d3po]

Each run has a small disk of its own (tmpfs; mounting takes root). At a random operation on the run's files the rest of
it is filled up to a random remainder. So the space ends while checkpoints, metrics, the LoRA or the model card are
written.
"""

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path

from bench_faults import OBJECTIVES, ambush, config, prepare, train

from diffpo.common import tables
from diffpo.common.errors import DiffpoError
from diffpo.weights.lora_file import FILE_NAME

DISK, MESSAGE = 2**25, "the disk is full"


def fill(disk: Path, remainder: int) -> None:
    """All but ``remainder`` bytes of the disk, in whole pages."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    os.posix_fallocate(os.open(disk / "filler", os.O_WRONLY | os.O_CREAT), 0, max(1, free - remainder))


def train_until_full(objective: str, output: Path, cache: Path, operation: int, remainder: int) -> None:
    """In a process of its own; its output goes into the log beside the disk."""
    log = os.open(output.parent.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ambush(output, operation, lambda: fill(output.parent, remainder))
    from diffpo.train.loop import train

    try:
        train(config(objective, output, cache))
    except DiffpoError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)


def one_run(context, objective: str, disk: Path, cache: Path, rng: random.Random) -> bool:
    """Did the disk fill up? That must raise DiffpoError and nothing else. Afterwards there is room again."""
    output = disk / "run"
    process = context.Process(
        target=train_until_full,
        args=(objective, output, cache, rng.randrange(1, 40), rng.choice([0, 4096, 2**16, 2**19, 2**20])),
    )
    process.start()
    process.join()
    said = disk.with_suffix(".log").read_text()
    if process.exitcode not in (0, 2) or (process.exitcode == 2) != (MESSAGE in said) or "Traceback" in said:
        raise SystemExit(f"{output} ended with {process.exitcode}: see {disk.with_suffix('.log')}")
    (disk / "filler").unlink(missing_ok=True)
    again = context.Process(target=train, args=(objective, output, cache, None))
    again.start()
    again.join()
    return process.exitcode == 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-disk"))
    parser.add_argument("--runs", type=int, default=20, help="of each objective")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=["diffusion_dpo", "d3po"])
    args = parser.parse_args()
    out, context = prepare(args.out)
    rng, wrong = random.Random(args.seed), 0
    columns = ["objective", "runs", "stopped by the full disk with one message", "LoRAs that differ"]
    print(tables.head(columns), flush=True)
    for objective in args.objectives:
        straight = context.Process(target=train, args=(objective, out / objective, out / "cache", None))
        straight.start()
        straight.join()
        expected, full, differ = (out / objective / FILE_NAME).read_bytes(), 0, 0
        for number in range(args.runs):
            disk = out / f"{objective}-{number}"
            disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(disk)], check=True)
            try:
                full += one_run(context, objective, disk, out / "cache", rng)
                differ += (disk / "run" / FILE_NAME).read_bytes() != expected
            finally:
                subprocess.run(["umount", str(disk)], check=True)
        wrong += differ
        print(tables.row([objective, args.runs, full, differ]), flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
