"""Paired generation: the same prompts and the same noise through the base model and the tuned one.

They go into a folder that manifest.py describes. Every image has its own random generator, seeded from (seed, prompt
index) on the CPU in float32, so a picture does not depend on the batch size, on the other prompts or on where an
interrupted run continued.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from hashlib import sha256
from importlib.metadata import version
from io import BytesIO
from itertools import islice
from pathlib import Path

from .. import models
from ..common import lock
from ..common.errors import DiffpoError
from ..common.text import plain
from ..common.threads import Threads
from ..config import Model
from ..data.prompts import load_prompts
from ..weights import lora as lora_module
from ..weights import trained
from .manifest import ARMS, check_same_run, image_path, intact, line, read_manifest, save, writing

_LIBRARIES = ("torch", "diffusers", "transformers", "peft")


def run(
    model: str | Path,
    prompts: str | Path | Sequence[str],
    out: str | Path,
    *,
    model_config: str | Path | None = None,
    lora: str | Path | None = None,
    user_pairs: str | Path | None = None,
    n: int | None = None,
    seed: int = 0,
    images_per_prompt: int = 1,
    steps: int = 20,
    solver: str = "dpmpp",
    guidance: float = 5.0,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str | None = None,
) -> list[dict]:
    """Generate the base arm and, with ``lora``, the tuned arm into ``out``; what is there and intact is kept.

    ``model`` is a pipeline folder, a hub id or one file, to which ``model_config`` gives the configs (`Model.config`),
    ``lora`` a LoRA file or the folder of a run, ``prompts`` anything
    `diffpo.data.prompts.load_prompts` reads, ``user_pairs`` pairs of the user that the tuned arm paints for (objective/users.py).
    Seeds are ``seed, ..., seed + images_per_prompt - 1``; ``height`` and ``width`` default to the model's. Returns the
    manifest rows of this call, arm by arm. Raises DiffpoError when ``out`` was made with other settings or is in use,
    the model or LoRA cannot be loaded, or an image comes out as NaN.
    """
    for key, value in {"steps": steps, "batch_size": batch_size, "images_per_prompt": images_per_prompt}.items():
        if value < 1:
            raise DiffpoError(f"{key} must be at least 1, not {value}")
    for key, value in {"height": height, "width": width}.items():
        if value is not None and (value < 8 or value % 8):
            raise DiffpoError(f"{key} must be a multiple of 8, not {value}")
    if not -(2**63) < seed <= 2**63 - images_per_prompt:
        raise DiffpoError(f"seed must be a number of 64 bits, not {seed}")
    if not math.isfinite(guidance):
        raise DiffpoError(f"guidance must be a number, not {guidance}")
    out, prompts = Path(out), load_prompts(prompts, n)
    base = models.named(model, model_config)
    settings = {
        "model": str(model),
        "model_hash": models.source_of(base).fingerprint(),
        "steps": steps,
        "solver": solver,
        "guidance": float(guidance),
        "negative_prompt": negative_prompt,
        "height": height,
        "width": width,
        "dtype": dtype,
        "versions": {name: version(name) for name in _LIBRARIES},
    }
    nobody = {"user_pairs": None, "user_hash": None}
    arms, user = {"base": {"lora": None, "lora_hash": None, **nobody}}, None
    if lora is not None:
        arms["tuned"] = {"lora": str(lora), "lora_hash": trained.file_hash(lora), **nobody}
    if user_pairs is not None:
        if lora is None:
            raise DiffpoError("--user-pairs says whom a tuned model paints for: name its LoRA with --lora")
        from ..objective import users

        user, user_hash = users.read_user(user_pairs, lora)
        arms["tuned"] |= {"user_pairs": str(user_pairs), "user_hash": user_hash}
    elif lora is not None and trained.knows_users(lora):
        print(f"the LoRA {lora} was trained with users; it paints for nobody in particular without --user-pairs")
    wanted = {
        (arm, index, s): {"arm": arm, "index": index, "seed": s, "prompt": prompt, **adapter, **settings}
        for arm, adapter in arms.items()
        for index, prompt in enumerate(prompts)
        for s in range(seed, seed + images_per_prompt)
    }

    with lock.held(out):
        done = read_manifest(out)
        check_same_run(out, done, wanted)
        finished = {(r["arm"], r["index"], r["seed"]): r for r in done if intact(out, r)}
        # rewritten whole before anything is added, so that a half-written last line does not swallow the next one
        save(out / "manifest.jsonl", b"".join(line(row) for row in finished.values()))
        missing = [row for key, row in wanted.items() if key not in finished]
        if missing:
            for row in _generate(missing, out, base, lora, user, batch_size, device):
                finished[row["arm"], row["index"], row["seed"]] = row
    return [finished[key] for key in wanted]


def _generate(missing: list[dict], out: Path, base: Model, lora, user, batch_size: int, device: str | None):
    """Make the missing images, one batch at a time; yields each row once its image and manifest line are on disk."""
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    import samplers

    first = missing[0]
    pipe = models.load_pipeline(base, first["dtype"], device)
    family = models.family_class(base)
    try:
        pipe.scheduler = samplers.SolverScheduler.from_config(pipe.scheduler.config, solver=first["solver"])
    except ValueError as error:
        raise DiffpoError(str(error)) from None
    if lora is not None:
        trained.check(pipe, lora)  # before hours go into the base arm
    if long := models.too_long(pipe, list(dict.fromkeys(row["prompt"] for row in missing))):
        print(long)
    pipe.set_progress_bar_config(disable=True)
    # neither belongs into a measurement: one blackens pictures, the other prints into them
    for extra in ("safety_checker", "watermark"):
        if getattr(pipe, extra, None) is not None:
            setattr(pipe, extra, None)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress, Threads(pipe.device.type) as threads, ExitStack() as painting:
        for arm in ARMS:
            todo = [row for row in missing if row["arm"] == arm]
            if not todo:
                continue
            if arm == "tuned":
                trained.load_into(pipe, lora)
                if user is not None:
                    from ..objective import users

                    taste = users.welcome(user, lora, base, pipe)
                    painting.enter_context(users.painting_for(lora_module.network_of(pipe), taste))
            task = progress.add_task(f"{arm} images", total=len(todo))
            rows = iter(todo)
            while batch := list(islice(rows, batch_size)):
                for row, png in zip(batch, _pngs(pipe, family, batch), strict=True):
                    path = image_path(out, arm, row["index"], row["seed"])
                    save(path, png)
                    row = {**row, "file": path.relative_to(out).as_posix(), "sha256": sha256(png).hexdigest()}
                    with writing(out / "manifest.jsonl"), open(out / "manifest.jsonl", "ab") as manifest:
                        manifest.write(line(row))
                    yield row
                progress.advance(task, len(batch))
                threads.adapt()


def initial_noise(shape: Sequence[int], seed: int, index: int):
    """The starting noise of one image, (C, h, w) float32 on the CPU, and its generator for what a solver adds later."""
    import torch

    generator = noise_generator(seed, index)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32), generator


def noise_generator(seed: int, index: int):
    """The generator of one image, before anything is drawn."""
    from ..common.rng import generator

    return generator(seed, "generate", index)


def _pngs(pipe, family, batch: list[dict]) -> list[bytes]:
    import torch
    from PIL import Image

    network, factor = lora_module.network_of(pipe), models.vae_factor(pipe)
    height, width = (batch[0][k] // factor if batch[0][k] else family.sample_size(pipe) for k in ("height", "width"))
    shape = (family.latent_channels(network.config), height, width)
    noises, generators = zip(*(initial_noise(shape, row["seed"], row["index"]) for row in batch), strict=True)
    latents = torch.stack(noises).to(pipe.device, network.dtype)
    prompts = [row["prompt"] for row in batch]
    options = family.painting(pipe, prompts, batch[0]["negative_prompt"], latents, batch[0]["guidance"])
    if "latents" not in options:  # the pipeline draws them itself
        generators = [noise_generator(row["seed"], row["index"]) for row in batch]
    try:
        with torch.inference_mode():
            images = pipe(
                **options, generator=list(generators), num_inference_steps=batch[0]["steps"], output_type="pt"
            ).images
    except ValueError as error:  # a number of calls that the solver cannot make, a size that the model does not take
        raise DiffpoError(f"cannot generate with {batch[0]['model']}: {' '.join(str(error).split())[:500]}") from error
    pngs = []
    for row, image in zip(batch, images.float().cpu(), strict=True):
        if not image.isfinite().all():
            raise DiffpoError(
                f"the {row['arm']} image of prompt {row['index']} ({plain(row['prompt'], 200)!r}) is NaN; the images "
                "before it are kept. In float16 the usual cause is the VAE: use --dtype bfloat16 or float32"
            )
        buffer = BytesIO()
        Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(buffer, "PNG")
        pngs.append(buffer.getvalue())
    return pngs
