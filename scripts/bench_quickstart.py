"""The quickstart for several training seeds: win rates with intervals, seconds, peak memory; one Markdown table.

python scripts/bench_quickstart.py [--seeds 0 1 2] [--n 512] [--dit] [--out runs/bench-quickstart]

Every seed is a fresh `diffpo quickstart` in a process of its own, with a cache of its own; a folder from an earlier
call is refused.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from diffpo.common import tables

ROWS = ("shapes.total", "shapes.following", "shapes.appearance", "shapes.all_right")


def run(seed: int, n: int, out: Path, *options: str) -> dict:
    if out.exists():
        raise SystemExit(f"{out} exists: delete it or choose another --out")
    command = [sys.executable, "-m", "diffpo.cli", "quickstart", "--seed", str(seed), "--n", str(n), "--out", str(out)]
    command += options
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.log", "w") as log:
        started = time.time()
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "HOME": f"{out}.home"}
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.time() - started
    if status:
        raise SystemExit(f"quickstart failed for seed {seed}: see {out}.log")
    rows = {row["scorer"]: row for row in json.loads((out / "eval" / "summary.json").read_text())["rows"]}
    return {"seconds": seconds, "gigabytes": usage.ru_maxrss / 2**20, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-quickstart"))
    parser.add_argument("--dit", action="store_true", help="the embedded DiT, not the SDXL")
    args = parser.parse_args()
    columns = ["seed", "score", "base", "tuned", "difference [95 %]", "win rate [95 %]", "n", "seconds", "peak GB"]
    print(tables.head(columns), flush=True)
    for seed in args.seeds:
        result = run(seed, args.n, (args.out / f"seed-{seed}").resolve(), *["--dit"] * args.dit)
        for i, name in enumerate(ROWS):
            row = result["rows"][name]
            d, w = row["difference"], row["win_rate"]
            cells = [
                str(seed) if i == 0 else "",
                name.removeprefix("shapes."),
                f"{row['base']:.3f}",
                f"{row['tuned']:.3f}",
                f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]",
                f"{w['value']:.1%} [{w['low']:.1%}, {w['high']:.1%}]",
                str(row["n"]),
                f"{result['seconds']:.0f}" if i == 0 else "",
                f"{result['gigabytes']:.2f}" if i == 0 else "",
            ]
            print(tables.row(cells), flush=True)
    print(f"\n{os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}")


if __name__ == "__main__":
    main()
