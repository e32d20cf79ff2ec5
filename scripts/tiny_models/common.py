"""The scenes that the models learn from, and what every stage needs."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import torch

from diffpo.shapes import render, sample_scene

SEED = 20260
LATENT_CHANNELS = 8
LATENT_NOISE = 0.1  # std of the posterior, in units of the latents' own std


def log(work: Path, stage: str, **values) -> None:
    """One JSON line per report; the log is shipped beside the weights."""
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    line = {"stage": stage, **values, "cpu_s": round(cpu.ru_utime + cpu.ru_stime, 1)}
    line = {k: round(v, 5) if isinstance(v, float) else v for k, v in line.items()}
    print(json.dumps(line), flush=True)
    with open(work / f"log-{stage}.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")


def average(ema: list[torch.Tensor], parameters: list[torch.Tensor], step: int) -> None:
    """Let the moving average of the weights take a step, with a memory that grows to 1,000 steps."""
    decay = min(0.999, (1 + step) / (10 + step))
    torch._foreach_mul_(ema, decay)
    torch._foreach_add_(ema, [p.detach() for p in parameters], alpha=1 - decay)


def _render_part(args) -> tuple[np.ndarray, list[str]]:
    seed, n = args
    rng = np.random.default_rng([SEED, seed])
    scenes = [sample_scene(rng) for _ in range(n)]
    return np.stack([render(s, rng) for s in scenes]), [s.caption for s in scenes]


def data(work: Path, n: int = 48_000) -> None:
    """Render ``n`` scenes of the training split: images (n, 32, 32, 3) uint8 and their captions."""
    from multiprocessing import Pool

    with Pool(2) as pool:
        parts = pool.map(_render_part, [(k, 1000) for k in range(n // 1000)], chunksize=1)
    np.save(work / "images.npy", np.concatenate([p[0] for p in parts]))
    (work / "captions.json").write_text(json.dumps([c for p in parts for c in p[1]]))
    log(work, "data", images=n)


def load_scenes(work: Path) -> tuple[np.ndarray, list[str]]:
    """Images (n, 32, 32, 3) uint8 and captions; the last 1,000 are kept from the autoencoder's training."""
    return np.load(work / "images.npy"), json.loads((work / "captions.json").read_text())


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> float (B, 3, H, W) in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
