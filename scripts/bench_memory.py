"""Peak resident memory of `diffpo train` by setting, on a random SDXL of a chosen width, on a CPU.

    python scripts/bench_memory.py [--channels 128] [--resolution 256] [--out runs/bench-memory]

Every row is a process of its own that makes an update of Diffusion-DPO on a pair, from caches that are full; the rows
`caches` fill them. Peak is the most that was resident (VmHWM) from the making of the optimiser on, with imports, which
the row `imports` has alone. Before, while the float32 file is read, every row needs the same. Of `caches` and of 8-bit
AdamW it is the peak of the whole process.
`computed` is what `diffpo check` computes for the device, without imports. A CPU has one memory, so `model.offload` can
show only in what is computed. Finished rows are kept in OUT and not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from diffpo.commands import footprint
from diffpo.common import tables
from diffpo.common.carried import HOME as ROOT
from diffpo.config import load_config

PAIRS = ROOT / "assets" / "shapes-preferences" / "train.parquet"
HALF, AGAIN = "train.precision=bf16", "train.gradient_checkpointing=true"
FULL = ("lora=null", "train.lr=1e-6")
ROWS: dict[str, tuple[str, ...]] = {
    "bf16": (HALF,),
    "bf16, checkpointing": (HALF, AGAIN),
    "bf16, fp8": (HALF, "model.base_weights=fp8"),
    "bf16, checkpointing, fp8": (HALF, AGAIN, "model.base_weights=fp8"),
    "bf16, checkpointing, nf4": (HALF, AGAIN, "model.base_weights=nf4"),
    "bf16, checkpointing, offload": (HALF, AGAIN, "model.offload=true"),
    "bf16, checkpointing, text encoders": (HALF, AGAIN, "lora.text_encoders=true"),
    "whole network, bf16, checkpointing": (*FULL, HALF, AGAIN),
    "whole network, bf16, checkpointing, 8-bit AdamW": (
        *FULL,
        HALF,
        AGAIN,
        "train.optimizer=bitsandbytes.optim.AdamW8bit",
    ),
}
FILLING = "bf16"  # the row that fills the caches of the others in bf16
CACHES = {"caches, bf16": (HALF,), "caches, bf16, tiles": (HALF, "model.vae_tile=128")}


def recipe(folder: Path, model: Path, resolution: int) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{path: {model}}}\n"
        f"data: {{train: {PAIRS}, resolution: {resolution}, cache: {folder / 'cache'}}}\n"
        "lora: {rank: 8}\n"
        "objective: {name: diffusion_dpo, beta: 500}\n"
        "train: {steps: 1, batch_size: 1, lr: 5e-4, checkpoint_every: 500}\n"
        f"output: {folder / 'run'}\n"
    )
    return path


def peak(command: list[str], log: Path) -> int:
    """Bytes resident at most."""
    measured = log.with_name("peak")
    measured.unlink(missing_ok=True)
    paths = [str(ROOT / "scripts"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {"BENCH_PEAK": str(measured), "PYTHONPATH": os.pathsep.join(paths)}
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "1"}
    with open(log, "w") as said:
        process = subprocess.Popen(command, env={**os.environ, **own}, stdout=said, stderr=said)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"a row failed; see {log}")
    return 1024 * (int(measured.read_text()) if measured.exists() else used.ru_maxrss)


def computed(path: Path, overrides: tuple[str, ...]) -> str:
    """The amount in the line `memory` of `diffpo check`."""
    said: list[str] = []
    footprint.footprint(load_config(path, overrides), None, said.append)
    line = next(text for text in said if text.startswith("memory"))
    return " ".join(line.split()[2:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--channels", type=int, default=128, help="of the first level; SDXL has 320")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-memory"))
    asked = parser.parse_args()
    out = asked.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    model = out / f"sdxl-{asked.channels}"
    # in a process of its own: what a child has resident at most begins with what its parent has
    made = f"from training_bench import wide; wide.make(wide.Path({str(model)!r}), {asked.channels})"
    subprocess.run([sys.executable, "-c", made], cwd=ROOT / "scripts", check=True)
    path = recipe(out, model, asked.resolution)
    done = out / "peaks.json"
    found: dict[str, int] = json.loads(done.read_text()) if done.exists() else {}
    train = [sys.executable, "-m", "diffpo.cli", "train", str(path)]
    jobs = {"imports": [sys.executable, "-c", "import diffpo.train.loop, diffusers, transformers, datasets"]}
    jobs |= {name: [*train, *row, f"data.cache={out / 'new'}"] for name, row in CACHES.items()}
    jobs["fill"] = [*train, *ROWS[FILLING]]
    own = "train.optimizer=training_bench.resident:Measured"
    jobs |= {name: [*train, own, *row] for name, row in ROWS.items()}
    for name, command in jobs.items():
        if name in found:
            continue
        for old in (out / "run", out / "new"):
            shutil.rmtree(old, ignore_errors=True)
        try:
            found[name] = peak(command, out / "log")
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            shutil.copy(out / "log", out / f"log-{name.replace(' ', '-')}")
            continue
        done.write_text(json.dumps(found, indent=1))
        print(name, f"{found[name] / 2**30:.2f} GiB", flush=True)
    rows = [(name, f"{found[name] / 2**30:.2f}", "") for name in ("imports", *CACHES) if name in found]
    for name, row in ROWS.items():
        if name in found:
            rows.append((name, f"{found[name] / 2**30:.2f}", computed(path, row)))
    print("\n".join([tables.head(("setting", "peak (GiB)", "computed")), *map(tables.row, rows)]))


if __name__ == "__main__":
    main()
