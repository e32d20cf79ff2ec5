"""What a trained pipeline can do, read by the oracle: the table and pictures of its card."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from diffpo.common.tables import Table
from diffpo.shapes import ATTRIBUTES, heldout_captions, parse, score

from .common import LATENT_NOISE, SEED

GUIDANCE = 3.0
PROMPTS, STEPS = 1024, 20


def generate(pipe, prompts: list[str], seeds: list[int], steps: int, batch: int = 64, **options) -> list:
    """PIL pictures, one per prompt, each from its own seed. ``options`` go to the pipeline."""
    import samplers

    pipe.scheduler = samplers.SolverScheduler.from_config(pipe.scheduler.config, solver="dpmpp")
    pipe.set_progress_bar_config(disable=True)
    images = []
    for i in range(0, len(prompts), batch):
        generators = [torch.Generator().manual_seed(s) for s in seeds[i : i + batch]]
        images += pipe(
            prompts[i : i + batch], num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generators, **options
        ).images
    return images


def base_table(pipe, folder: Path, **options) -> str:
    """Share of held-out prompts with each attribute right, as Markdown; some of the pictures go into grid.png."""
    from diffpo.evaluation.statistics import wilson

    prompts = heldout_captions(PROMPTS)
    images = generate(pipe, prompts, [SEED * 10_000 + i for i in range(PROMPTS)], STEPS, **options)
    scores = [score(im, p) for im, p in zip(images, prompts, strict=True)]
    chance = [score(im, p) for im, p in zip(images, prompts[1:] + prompts[:1], strict=True)]
    table = Table(["attribute right", "share", "95 % interval", "chance"])
    for key in [f"right_{a}" for a in ATTRIBUTES] + ["all_right"]:
        values = np.array([s[key] for s in scores])
        values = values[~np.isnan(values)]
        low, high = wilson(values.sum(), len(values))
        by_chance = np.nanmean([s[key] for s in chance])
        interval = f"{low:.1%} to {high:.1%}"
        table.rows.append((key.removeprefix("right_"), f"{values.mean():.1%}", interval, f"{by_chance:.1%}"))
    # nearly all held-out prompts have two objects, so only the others separate counting from chance
    counted = [c for c in heldout_captions() if parse(c).relation is None] * 8
    seen = generate(pipe, counted, [SEED * 30_000 + i for i in range(len(counted))], STEPS, **options)
    values = [score(im, c)["right_count"] for im, c in zip(seen, counted, strict=True)]
    low, high = wilson(sum(values), len(values))
    by_chance = np.mean([score(im, c)["right_count"] for im, c in zip(seen, counted[1:] + counted[:1], strict=True)])
    name, interval = f"count, one to three equal objects (n {len(values)})", f"{low:.1%} to {high:.1%}"
    table.rows.append((name, f"{np.mean(values):.1%}", interval, f"{by_chance:.1%}"))
    for key in ("following", "appearance", "total"):
        values = [s[key] for s in scores]
        half = 1.96 * np.std(values) / math.sqrt(PROMPTS)
        by_chance = np.mean([s[key] for s in chance])
        table.rows.append((f"{key} (mean score)", f"{np.mean(values):.3f}", f"± {half:.3f}", f"{by_chance:.3f}"))
    contact_sheet(images[:96], 16).save(folder / "grid.png")
    return table.markdown()


def write_card(folder: Path, template: str, **values) -> None:
    """README.md: ``template`` with ``values`` and how it was measured."""
    text = template.format(seed=SEED, n=PROMPTS, steps=STEPS, guidance=GUIDANCE, **values)
    (folder / "README.md").write_text(text)
    print(text)


def write_log(work: Path, folder: Path, stages: dict[str, Callable]) -> None:
    """training-log.jsonl: what every stage was run with, and then what each reported."""
    values = {
        stage: {k: p.default for k, p in inspect.signature(f).parameters.items() if p.default is not p.empty}
        for stage, f in stages.items()
    }
    head = json.dumps({"stage": "settings", "seed": SEED, "latent_noise": LATENT_NOISE, **values}) + "\n"
    logs = [path for stage in stages for path in [work / f"log-{stage}.jsonl"] if path.exists()]
    (folder / "training-log.jsonl").write_text(head + "".join(path.read_text() for path in logs))


def parameters_and_megabytes(folder: Path, *modules: torch.nn.Module) -> dict[str, float]:
    """In millions each."""
    return {
        "parameters": sum(p.numel() for module in modules for p in module.parameters()) / 1e6,
        "megabytes": sum(f.stat().st_size for f in folder.rglob("*.safetensors")) / 1e6,
    }


def contact_sheet(images: list, columns: int):
    from PIL import Image

    sheet = Image.new("RGB", (columns * 68, math.ceil(len(images) / columns) * 68), "white")
    for i, image in enumerate(images):
        sheet.paste(image.resize((64, 64), Image.Resampling.NEAREST), (i % columns * 68 + 2, i // columns * 68 + 2))
    return sheet
