#!/usr/bin/env python
"""Is the verdict of `diffpo eval` right? Five arms whose quality is known, with three training seeds.

    python scripts/bench_verdict.py [--seeds 0 1 2] [--n 256] [--out runs/bench-verdict]

The arms, all of assets/tiny-sdxl, on held-out prompts with the same noise:

    base     the model itself
    good     the quickstart's LoRA: Diffusion-DPO on pairs that the oracle labelled
    kohya    another good LoRA (IPO on the same pairs), exported in kohya's format
    hack     DRaFT on the similarity to the caption by assets/tiny-clip, at a learning rate that is far too high
    folder   a folder of pictures without a manifest: the base model with 4 calls

`good` and `kohya` were trained for the oracle, `hack` for the clip score. So there are two reports: one marks the
oracle's total as the training score, the other the clip score. Right is: a good arm is to be used, and only `hack` is
flagged, by the second report. The oracle's total says which arms are in fact better. An interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from diffpo.commands.quickstart import ROOT
from diffpo.common import tables
from diffpo.config import load_config
from diffpo.evaluation import evaluate, generate
from diffpo.evaluation.generation import Generation
from diffpo.evaluation.scoring import Scoring
from diffpo.export import export
from diffpo.train.loop import train

MODEL = ROOT / "assets" / "tiny-sdxl"
CLIP = "bench_verdict:TinyClip"
SCORERS = ("shapes", CLIP)
MADE = {"guidance": 3.0, "steps": 10, "batch_size": 64, "seed": 1000}


class TinyClip:
    """The cosine of picture and caption by assets/tiny-clip, with gradients."""

    names = ("clip",)
    optional: frozenset[str] = frozenset()

    def __init__(self) -> None:
        folder = ROOT / "assets" / "tiny-clip"
        self.model = transformers.CLIPModel.from_pretrained(folder).eval().requires_grad_(False)
        self.processor = transformers.AutoProcessor.from_pretrained(folder)

    def rate(self, pixels: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        images = self.processor.image_processor
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (images.image_mean, images.image_std))
        options = {"padding": "max_length", "max_length": 24, "truncation": True, "return_tensors": "pt"}
        texts = self.processor.tokenizer(prompts, **options)
        found = self.model(pixel_values=(pixels - mean) / std, **texts)
        return {"clip": (found.image_embeds * found.text_embeds).sum(1)}

    @torch.inference_mode()
    def score(self, images: list, prompts: list[str]) -> dict:
        from torchvision.transforms.functional import to_tensor

        pixels = torch.stack([to_tensor(image.convert("RGB")) for image in images])
        return {name: values.double().numpy() for name, values in self.rate(pixels, prompts).items()}


def trained(out: Path, *overrides: str) -> Path:
    """A LoRA of the quickstart's recipe with other settings; a finished one is kept."""
    places = [f"model.path={MODEL}", f"data.train={ROOT / 'assets' / 'shapes-preferences' / 'train.parquet'}"]
    places += ["data.validation=null", f"output={out}"]
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
        f"objective.rollout.scorers=[{CLIP}]",
        "objective.rollout.steps=8",
        "objective.rollout.guidance=3",
        "data.train=null",
        "data.prompts=shapes:train:512",
        "train.steps=60",
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
    lines = [tables.head(["seed", "trained on", "arm", "total [95 %]", "clip [95 %]", "to use", "flagged"])]
    for seed in args.seeds:
        out = (args.out / f"seed-{seed}").resolve()
        made = arms(seed, out, args.n)
        for signal in ("shapes.total", "clip"):
            scoring = Scoring(SCORERS, signal)
            found = evaluate.run(out / f"eval-{signal}", made, "shapes:heldout", args.n, scoring)
            for arm in found.arms[1:]:
                rates = [found.row(score, arm).win_rate for score in ("shapes.total", "clip")]
                numbers = [f"{rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}]" for rate in rates]
                last = [arm == found.verdict.arm, arm in found.verdict.flagged]
                lines.append(tables.row([seed, signal, arm, *numbers, *["yes" if each else "" for each in last]]))
            lines += [f"\nseed {seed}, {signal}: {found.verdict.sentence}", *found.verdict.findings, ""]
    print("\n".join(lines))
    (args.out / "results.json").write_text(json.dumps(lines))


if __name__ == "__main__":
    main()
