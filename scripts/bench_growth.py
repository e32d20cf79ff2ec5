"""Does memory grow with the steps of a run, or with the rows of its data?

    python scripts/bench_growth.py steps [--steps 2000] [--out runs/bench-growth]
    python scripts/bench_growth.py rows [--rows 1000000] [--out runs/bench-growth]

`steps` trains assets/tiny-sdxl on two pairs a step, in a process of its own, and fits a line to what is resident after
each step from a quarter of the run on. `rows` makes parquet shards of two pictures of 8 px a row, and reads them as
training does with `data.streaming=true`: first the copy, in which rows can be read in any order, then the check of
every row. Seconds are CPU seconds, of one thread.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from training_bench.resident import status

from diffpo.common.carried import HOME as ROOT

PAIRS = ROOT / "assets" / "shapes-preferences" / "train.parquet"
SHARD = 50_000  # rows of a parquet file
PICTURES = 1000  # different ones


def steps(out: Path, number: int) -> None:
    recipe, resident = out / "recipe.yaml", out / "resident.json"
    recipe.write_text(
        f"model: {{path: {ROOT / 'assets' / 'tiny-sdxl'}}}\n"
        f"data: {{train: {PAIRS}, resolution: 32, cache: {out / 'cache'}}}\n"
        "lora: {rank: 8}\n"
        "objective: {name: diffusion_dpo, beta: 500}\n"
        f"train: {{steps: {number}, batch_size: 2, lr: 1e-5, checkpoint_every: 500,\n"
        "        optimizer: 'training_bench.resident:Followed'}\n"
        f"output: {out / f'run-{number}'}\n"
    )
    paths = [str(ROOT / "scripts"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"BENCH_RESIDENT": str(resident), "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "diffpo.cli", "train", str(recipe)]
    subprocess.run(command, env={**os.environ, **own, "ACCELERATE_USE_CPU": "true"}, check=True)
    found = np.array(json.loads(resident.read_text())) / 1024
    first = len(found) // 4
    place = np.arange(first, len(found))
    slope, level = np.polyfit(place, found[first:], 1)
    rest = found[first:] - (slope * place + level)
    print(
        f"{len(found)} steps; resident after step 1, a quarter, the last: {found[0]:.1f}, {found[first]:.1f}, "
        f"{found[-1]:.1f} MiB; from a quarter on {1024 * slope:.2f} KiB a step (scatter {rest.std():.2f} MiB)"
    )


def picture(generator: random.Random) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.frombytes("RGB", (8, 8), generator.randbytes(192)).save(file, "PNG")
    return file.getvalue()


def make(folder: Path, number: int) -> None:
    """Shards of ``number`` rows with different captions, so that no two are equal."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    pictures = [picture(generator) for _ in range(PICTURES)]
    for start in range(0, number, SHARD):
        path = folder / f"train-{start // SHARD:05d}-of-{-(-number // SHARD):05d}.parquet"
        if path.exists():
            continue
        rows = range(start, min(start + SHARD, number))
        # two different pictures; the second of a row changes from one thousand rows to the next
        sides = [[pictures[(row * step + step) % PICTURES] for row in rows] for step in (1, 7)]
        columns = {"caption": [f"caption {row}" for row in rows], "chosen": sides[0], "rejected": sides[1]}
        pq.write_table(pa.table(columns), path, row_group_size=1000)


def rows(out: Path, number: int) -> None:
    made = out / f"shards-{number}"
    child = f"from pathlib import Path; import bench_growth; bench_growth.make(Path({str(made)!r}), {number})"
    subprocess.run([sys.executable, "-c", child], cwd=ROOT / "scripts", check=True)
    from diffpo.config import Data
    from diffpo.data.groups import scan
    from diffpo.data.source import open_source

    data = Data(train=str(made), resolution=8, streaming=True, cache=str(out / f"copy-{number}"))
    opened = open_source(str(made), "train", data)
    before, began = status("VmRSS"), time.process_time()
    copy = opened.rows.select_columns(["caption", "chosen", "rejected"])
    took, after = time.process_time() - began, status("VmRSS")
    assert len(copy) == number
    print(f"copy: {number:,} rows, {1e6 * took / number:.1f} us a row, resident {(after - before) / 1024:+.1f} MiB")
    before, began = status("VmRSS"), time.process_time()
    groups = scan(data, str(made), "train")
    took, after = time.process_time() - began, status("VmRSS")
    print(
        f"check of every row: {len(groups):,} pairs, {1e6 * took / number:.0f} us a row, resident "
        f"{(after - before) / 1024:+.1f} MiB, {1024 * (after - before) / number:.0f} bytes a row"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "rows"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-growth"))
    asked = parser.parse_args()
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    steps(out, asked.steps) if asked.what == "steps" else rows(out, asked.rows)


if __name__ == "__main__":
    main()
