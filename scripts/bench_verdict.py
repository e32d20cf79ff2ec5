#!/usr/bin/env python
"""Is the verdict of `diffpo eval` right? Five arms whose quality is known, with three training seeds.

    python scripts/bench_verdict.py [--seeds 0 1 2] [--n 256] [--out runs/bench-verdict]

The arms, all of assets/tiny-sdxl, on held-out prompts with the same noise:

    base     the model itself
    good     the quickstart's LoRA: Diffusion-DPO on pairs that the oracle labelled
    kohya    another good LoRA (IPO on the same pairs), exported in kohya's format
    hack     DRaFT on a score that is easy to game: the mean saturation of the picture
    folder   a folder of pictures without a manifest: the base model with 4 calls

`hack` was trained on saturation, so the report marks that score as the training signal. The oracle was not trained on:
it decides, and it says which arms are in fact better. Right is: a good arm is to be used, and `hack` alone is flagged.
An interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torchvision.transforms.functional import to_tensor

from diffpo.common import tables
from diffpo.common.carried import HOME as ROOT
from diffpo.config import load_config
from diffpo.evaluation import evaluate, generate
from diffpo.evaluation.generation import Generation
from diffpo.evaluation.scoring import Scoring
from diffpo.export import export
from diffpo.train.loop import train

PAIRS = ROOT / "assets" / "shapes-preferences"
MODEL = ROOT / "assets" / "tiny-sdxl"
VIVID = "bench_verdict:Vivid"
SCORERS = ("shapes", VIVID)
MADE = {"guidance": 3.0, "steps": 10, "batch_size": 64, "seed": 1000}


class Vivid:
    """The mean saturation (HSV's chroma) of a picture, with gradients: what many scorers like, and no quality."""

    names = ("vivid",)
    optional: frozenset[str] = frozenset()

    def rate(self, pixels: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        return {"vivid": (pixels.amax(1) - pixels.amin(1)).mean((1, 2))}

    @torch.inference_mode()
    def score(self, images: list, prompts: list[str]) -> dict:
        pixels = torch.stack([to_tensor(image.convert("RGB")) for image in images])
        return {name: values.double().numpy() for name, values in self.rate(pixels, prompts).items()}


def trained(out: Path, *overrides: str) -> Path:
    """A LoRA of the quickstart's recipe with other settings; a finished one is kept."""
    places = [f"model.path={MODEL}", f"data.train={PAIRS / 'train.parquet'}"]
    places += [f"data.validation={PAIRS / 'validation.parquet'}", f"output={out}"]
    if not (out / "pytorch_lora_weights.safetensors").is_file():
        train(load_config(ROOT / "configs" / "quickstart.yaml", [*places, *overrides]))
    return out


def arms(seed: int, out: Path, n: int) -> dict[str, Generation | Path]:
    good = trained(out / "good", f"train.seed={seed}")
    other = trained(out / "ipo", f"train.seed={seed}", "objective.name=ipo", "objective.beta=500")
    hack = trained(
        out / "hack",
        f"train.seed={seed}",
        "objective.name=draft",
        f"objective.rollout.scorers=[{VIVID}]",
        "objective.rollout.steps=8",
        "objective.rollout.guidance=3",
        "data.train=null",
        "data.validation=null",
        "data.prompts=shapes:train:512",
        "train.batch_size=8",
        "train.steps=40",
        "train.lr=3e-3",
    )
    if not (kohya := out / "kohya").is_dir():
        export.run(export.Export(lora=str(other), to="kohya", model=str(MODEL), out=kohya))
    (file,) = kohya.glob("*.safetensors")
    return {
        "base": Generation(model=str(MODEL), **MADE),
        "good": Generation(model=str(MODEL), lora=str(good), **MADE),
        "kohya": Generation(model=str(MODEL), lora=str(file), **MADE),
        "hack": Generation(model=str(MODEL), lora=str(hack), **MADE),
        "folder": pictures(out / "folder", n),
    }


def pictures(folder: Path, n: int) -> Path:
    """Pictures as from elsewhere: no manifest, texts beside them."""
    if not folder.is_dir():
        made = Generation(model=str(MODEL), **{**MADE, "steps": 4})
        beside = folder.with_name("folder-made")
        rows = generate.run({"base": made}, "shapes:heldout", beside, n)
        folder.mkdir()
        for row in rows:
            shutil.copy(beside / row["file"], folder / f"{row['index']}_{row['seed']}.png")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-verdict"))
    args = parser.parse_args()
    lines = [tables.head(["seed", "arm", "total [95 %]", "vivid [95 %]", "to use", "flagged"])]
    said: list[str] = []
    for seed in args.seeds:
        out = (args.out / f"seed-{seed}").resolve()
        made = arms(seed, out, args.n)
        found = evaluate.run(out / "eval-vivid", made, "shapes:heldout", args.n, Scoring(SCORERS, "vivid"))
        for arm in found.arms[1:]:
            rates = [found.row(score, arm).win_rate for score in ("shapes.total", "vivid")]
            numbers = [f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}]" for rate in rates]
            last = [arm == found.verdict.arm, arm in found.verdict.flagged]
            lines.append(tables.row([seed, arm, *numbers, *["yes" if each else "" for each in last]]))
        said += [f"seed {seed}: {found.verdict.sentence}", *found.verdict.findings, ""]
    print("\n".join([*lines, "", *said]))
    (args.out / "results.json").write_text(json.dumps([*lines, *said]))


if __name__ == "__main__":
    main()
