"""Train on pairs of which some pictures are damaged: are they all named, and does skipping them change nothing else?

python scripts/bench_corrupted.py [--out runs/bench-corrupted] [--pairs 2000] [--shares 0.001 0.1] [--seed 0]

Of the first pairs of assets/shapes-preferences a share gets one picture that is cut off, a web page, empty, or zeros.
data.bad_rows=error must name them and write nothing; data.bad_rows=skip must train, with finite losses, the LoRA that
a run on the other pairs alone trains, bit for bit. Caches are not shared, so both runs encode for themselves.
"""

import argparse
import json
import math
import os
import random
import shutil
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyarrow as pa
import pyarrow.parquet as pq
from bench_faults import ROOT, config

from diffpo.common.errors import DiffpoError
from diffpo.common.tables import Table
from diffpo.train.loop import train
from diffpo.weights.lora_file import FILE_NAME, read_lora

DAMAGE = {
    "cut off": lambda picture: picture[: len(picture) // 2],
    "web page": lambda picture: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "empty": lambda picture: b"",
    "zeros": lambda picture: bytes(len(picture)),
}


def write(path: Path, rows: list[dict], schema: pa.Schema) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def damaged(rows: list[dict], share: float, rng: random.Random) -> tuple[list[dict], list[int]]:
    """A copy of ``rows`` in which a share has one damaged picture; and which those are."""
    where = sorted(rng.sample(range(len(rows)), round(share * len(rows))))
    rows = [dict(row) for row in rows]
    for number, index in enumerate(where):
        picture = rng.choice(["jpg_0", "jpg_1"])
        rows[index][picture] = list(DAMAGE.values())[number % len(DAMAGE)](rows[index][picture])
    return rows, where


def run(out: Path, name: str, data: Path, bad_rows: str) -> Path:
    """Train in a folder and with a cache of its own; returns the LoRA."""
    settings = config(
        "diffusion_dpo", out / name, out / f"{name}-cache", f"data.train={data}", f"data.bad_rows={bad_rows}"
    )
    train(settings)
    return out / name / FILE_NAME


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-corrupted"))
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.001, 0.1])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    table = pq.read_table(ROOT / "assets" / "shapes-preferences" / "train.parquet").slice(0, args.pairs)
    rows, rng, wrong = table.to_pylist(), random.Random(args.seed), 0
    columns = ["share", "pairs", "damaged", "all counted and the first named (`error`)", "losses finite (`skip`)"]
    results = Table([*columns, "same data_hash as the other pairs alone", "same LoRA, bit for bit"])
    for share in args.shares:
        bad, where = damaged(rows, share, rng)
        source = write(out / f"damaged-{share}.parquet", bad, table.schema)
        clean = write(
            out / f"clean-{share}.parquet", [row for i, row in enumerate(rows) if i not in where], table.schema
        )
        message = ""
        try:
            run(out, f"error-{share}", source, "error")
        except DiffpoError as error:
            message = str(error)
        named = (
            f"{len(where)} of {len(rows)} rows cannot be used" in message and f"the first is row {where[0]}:" in message
        )
        nothing = not list((out / f"error-{share}").glob("*.safetensors")) + list(
            (out / f"error-{share}").glob("check*")
        )
        skipped, alone = run(out, f"skip-{share}", source, "skip"), run(out, f"clean-{share}", clean, "error")
        metrics = [json.loads(line) for line in (skipped.parent / "metrics.jsonl").read_text().splitlines()]
        finite = bool(metrics) and all(each["loss"] is not None and math.isfinite(each["loss"]) for each in metrics)
        same_data = read_lora(skipped)[1]["data_hash"] == read_lora(alone)[1]["data_hash"]
        equal = skipped.read_bytes() == alone.read_bytes()
        good = [named and nothing, finite, same_data, equal]
        wrong += not all(good)
        results.rows.append((f"{share:.1%}", len(rows), len(where), *("yes" if each else "no" for each in good)))
    print(results.markdown())
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
