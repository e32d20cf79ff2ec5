"""Paired generation: the same prompts and the same noise through every arm, e.g. the base model and the tuned one.

They go into a folder that manifest.py describes. Every image has its own random generator, seeded from (seed, prompt
index) on the CPU in float32. So a picture does not depend on the batch size, on the other prompts or on where an
interrupted run continued.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import models
from ..common import processes
from ..common.errors import DiffpoError
from ..common.files import writing
from ..common.imports import search_working_directory
from ..common.instruction import Instruction, key_of
from ..common.processes import Processes
from ..common.text import plain
from ..common.threads import Threads
from ..data.prompts import load_prompts
from ..scorers import features
from ..weights import lora as lora_module
from ..weights import trained, unconditional
from . import paths, plans, sources
from .base_calls import base_first
from .generation import Generation
from .manifest import check_same_run, image_path, intact, line, manifest_file, read_manifest, save, write_manifest

if TYPE_CHECKING:
    from PIL import Image

_LIBRARIES = ("torch", "diffusers", "transformers", "peft")


@dataclass(frozen=True)
class Picture:
    """A picture to make: a prompt with its number, which the noise depends on, and the seed."""

    index: int
    seed: int
    prompt: str  # an `Instruction` if it is to edit pictures


def run(
    arms: Mapping[str, Generation], prompts: str | Path | Sequence[str], out: str | Path, n: int | None = None
) -> list[dict[str, Any]]:
    """Generate the pictures of ``arms``, e.g. of `Generation.arms`, into ``out``; intact pictures are kept.

    Under `accelerate launch` each process makes its share of them.

    ``prompts``: anything that `diffpo.data.prompts.load_prompts` reads, of which the first ``n`` count; each an
    `Instruction`, for models that edit pictures, or none of them. Returns the
    manifest rows of this call, arm by arm. Raises DiffpoError if ``out`` is in use or was made with other settings, if
    a model or LoRA cannot be loaded, or for a NaN image.
    """
    out, prompts = Path(out), load_prompts(prompts, n)
    arms, users = _identified(arms)
    versions = {name: version(name) for name in _LIBRARIES}
    wanted: dict[tuple[str, int, int], dict[str, Any]] = {
        (name, index, seed): {"arm": name, "index": index, "seed": seed, "prompt": prompt}
        | sources.about(prompt)
        | arm.recorded()
        | {"versions": versions}
        for name, arm in arms.items()
        for index, prompt in enumerate(prompts)
        for seed in arm.seeds
    }
    ours = processes.here()
    with ours.lock(out):
        done = read_manifest(out)
        check_same_run(out, done, arms, prompts)
        finished = {_key(row): row | {"prompt": sources.prompt_of(out, row)} for row in done if intact(out, row)}
        ours.wait()  # until all have read it
        if ours.main:
            # rewritten whole before anything is added, so that a half-written last line does not swallow the next one
            write_manifest(out, finished.values())
            sources.write(out, prompts)
        ours.wait()
        missing = [
            finished.get(key, row)  # a finished one whose path is wanted is painted again, and not written
            for key, row in wanted.items()
            if key not in finished or paths.lacking(out, arms[row["arm"]], row)
        ]
        if own := ours.share(missing):
            for row in _generate(own, arms, users, out, ours):
                finished[_key(row)] = row
        ours.wait()
        if ours.count > 1 and missing:
            finished = {_key(row): row for row in read_manifest(out)}
            ours.wait()
            if ours.main:
                write_manifest(out, finished.values())
            ours.wait()
    return [finished[key] for key in wanted]


def _key(row: Mapping[str, Any]) -> tuple[str, int, int]:
    return row["arm"], row["index"], row["seed"]


def _identified(arms: Mapping[str, Generation]) -> tuple[dict[str, Generation], dict[str, Any]]:
    """The arms with the hashes of what they name, and the pairs of the users that they are personalised for."""
    found, users = {}, {}
    fingerprint = cache(lambda *model: models.source_of(models.named(*model)).fingerprint())
    for name, arm in arms.items():
        hashes = {"model_hash": fingerprint(arm.model, arm.model_config)}
        if arm.negative_lora is not None:
            hashes["negative_lora_hash"] = trained.file_hash(arm.negative_lora)
        if arm.lora is not None:
            hashes["lora_hash"] = trained.file_hash(arm.lora)
            if arm.user_pairs is not None or arm.steer is not None:
                from ..objective.users import read_person

                users[name], hashes["user_hash"] = read_person(arm.lora, arm.user_pairs, arm.steer)
            elif trained.knows_users(arm.lora):
                print(
                    f"the LoRA {arm.lora} was trained with users or several rewards; without --user-pairs or --steer "
                    f"images are for nobody in particular"
                )
        found[name] = plans.identified(replace(arm, **hashes))
    return found, users


def _base(generation: Generation) -> Any:
    """The settings of the model."""
    return models.named(generation.model, generation.model_config, generation.family)


def _generate(
    missing: Sequence[dict], arms: dict[str, Generation], users: dict[str, Any], out: Path, ours: Processes
) -> Iterator[dict[str, Any]]:
    """Make the missing images, one batch at a time; yields each row once its image and manifest line are on disk."""
    from tqdm.auto import tqdm

    todo = {name: rows for name in arms if (rows := [row for row in missing if row["arm"] == name])}
    loaded = arms[next(iter(todo))].base()
    pipe = load(loaded)
    sources.require(pipe, _base(loaded), missing)
    for arm in (arms[name] for name in todo):
        if arm.lora is not None and arm.base() == loaded:
            trained.check(pipe, arm.lora)  # before hours are spent on the base arm
    if long := models.too_long(pipe, list(dict.fromkeys(row["prompt"] for row in missing))):
        print(long)
    with Threads(pipe.device.type) as threads:
        for name, rows in todo.items():
            arm = arms[name]
            if arm.base() != loaded:
                pipe = load(arm.base())
                sources.require(pipe, _base(arm), missing)
            loaded, family = arm, models.family_class(_base(arm), type(pipe).__name__)
            with ExitStack() as personal:
                if arm.negative_lora is not None:
                    personal.callback(_two_halves(pipe, arm))
                if arm.lora is not None:
                    trained.load_into(pipe, arm.lora, 1.0 if arm.lora_weight is None else arm.lora_weight)
                if name in users:
                    personal.enter_context(_personalised(pipe, arm, users[name]))
                about = {"desc": f"{name} images", "unit": "image", "delay": 1, "disable": not ours.main}
                bar = personal.enter_context(tqdm(total=len(rows), **about))
                rest = iter(rows)
                # pipelines take several pictures as being for one prompt
                size = 1 if family.singly or key_of(rows[0]["prompt"]) else arm.batch_size
                while batch := list(islice(rest, size)):
                    pictures = [Picture(row["index"], row["seed"], row["prompt"]) for row in batch]
                    for row in batch:
                        if "sha256" not in row:
                            paths.forget(image_path(out, name, row["index"], row["seed"]))
                    wanted = [paths.lacking(out, arm, row) for row in batch]
                    with paths.recorded(pipe, any(wanted)) as estimates:
                        images = paint(pipe, arm, pictures)
                    for k, (row, image) in enumerate(zip(batch, images, strict=True)):
                        if wanted[k]:
                            target = image_path(out, name, row["index"], row["seed"])
                            paths.keep(pipe, family, [each[k] for each in estimates], target, image.size[::-1])
                        yield row if "sha256" in row else _keep(row, image, out, manifest_file(out, ours))
                    bar.update(len(batch))
                    threads.adapt()


def _two_halves(pipe: Any, arm: Generation) -> Callable[[], None]:
    """Give the unconditional half the arm's negative LoRA; before the arm's LoRA is loaded."""
    if models.family_class(_base(arm), type(pipe).__name__).guidance_is_input:
        raise DiffpoError(
            f"--negative-lora is for the unconditional half of guidance, which {type(pipe).__name__} does not compute"
        )
    assert arm.negative_lora is not None  # noqa: S101
    strengths = [1.0 if each is None else each for each in (arm.negative_lora_weight, arm.lora_weight)]
    other = unconditional.prepared(pipe, arm.negative_lora, strengths[0], arm.lora, strengths[1])
    return unconditional.attach(lora_module.network_of(pipe), other)


def _personalised(pipe: Any, arm: Generation, person: Any) -> Any:
    """A context in which ``pipe``, with the arm's LoRA, makes pictures for ``person``."""
    from ..objective import user_attention, users

    assert arm.lora is not None  # noqa: S101 (`Generation` takes no user_pairs and no steer without a LoRA)
    seen = None if arm.user_features is None else features.load(arm.user_features, str(pipe.device))
    vector = users.welcome(person, arm.lora, _base(arm), pipe, seen)
    return user_attention.painting_for(lora_module.network_of(pipe), vector)


def _keep(row: dict[str, Any], image: Image.Image, out: Path, manifest_file: Path) -> dict[str, Any]:
    """The row with its file and hash, once both are on disk."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    path = image_path(out, row["arm"], row["index"], row["seed"])
    save(path, buffer.getvalue())
    row = {**row, "file": path.relative_to(out).as_posix(), "sha256": sha256(buffer.getvalue()).hexdigest()}
    with writing(manifest_file), open(manifest_file, "ab") as manifest:
        manifest.write(line(row))
    return row


def load(generation: Generation) -> Any:
    """The pipeline of the model, without the LoRA, with the solver. DiffpoError if either cannot be loaded."""
    import samplers

    pipe = models.load_pipeline(_base(generation), generation.dtype, generation.device)
    if generation.plan is not None:
        pipe.scheduler = plans.scheduler(generation, pipe.scheduler.config)
        return _ready(pipe)
    options = {"solver": generation.solver, "guidance": _scale(generation, pipe)}
    if ":" in (generation.solver or ""):
        search_working_directory()
    try:
        pipe.scheduler = samplers.SolverScheduler.from_config(pipe.scheduler.config, **options)
    except ValueError as error:
        raise DiffpoError(str(error)) from None
    return _ready(pipe)


def _scale(generation: Generation, pipe: Any) -> float:
    """The guidance scale for the solver: 1 where the pipeline gives it to the network and calls that once."""
    kind = models.family_class(_base(generation), type(pipe).__name__)
    return 1.0 if kind.guidance_is_input or pipe.config.get("is_distilled") else generation.guidance


def _ready(pipe: Any) -> Any:
    """The pipeline without its progress bar and without what changes finished pictures."""
    pipe.set_progress_bar_config(disable=True)
    # the safety checker blackens pictures and the watermark changes them: not in a measurement
    for extra in ("safety_checker", "watermark"):
        if getattr(pipe, extra, None) is not None:
            setattr(pipe, extra, None)
    return pipe


def initial_noise(shape: Sequence[int], seed: int, index: int):
    """The starting noise of one image, (C, h, w) float32 on the CPU, and its generator for what a solver adds later."""
    import torch

    generator = noise_generator(seed, index)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32), generator


def noise_generator(seed: int, index: int):
    """The generator of one image, before anything is drawn."""
    from ..common.rng import generator

    return generator(seed, "generate", index)


def paint(pipe: Any, generation: Generation, batch: Sequence[Picture]) -> list[Image.Image]:
    """The pictures ``batch`` by the pipeline of `load`, in one go. DiffpoError if the model cannot make them, or one
    comes out as NaN."""
    import torch
    from PIL import Image

    network, factor = lora_module.network_of(pipe), models.vae_factor(pipe)
    family = models.family_class(_base(generation), type(pipe).__name__)
    height, width = (
        side // factor if side else family.sample_size(pipe) for side in (generation.height, generation.width)
    )
    shape = (family.latent_channels(network.config), height, width)
    noises, generators = zip(*(initial_noise(shape, each.seed, each.index) for each in batch), strict=True)
    latents = torch.stack(noises).to(pipe.device, network.dtype)
    prompts = [each.prompt for each in batch]
    options = family.painting(pipe, prompts, generation.negative_prompt, latents, generation.guidance)
    if "latents" not in options:  # the pipeline draws them itself
        generators = tuple(noise_generator(each.seed, each.index) for each in batch)
    options |= {"generator": list(generators), "num_inference_steps": generation.steps, "output_type": "pt"}
    edited: AbstractContextManager[dict[str, Any]] = nullcontext({})
    if isinstance(prompt := prompts[0], Instruction):
        edited = family.editing(pipe, sources.shown_at(prompt, (width * factor, height * factor)))
    try:
        with torch.inference_mode(), base_first(pipe, generation.base_calls), edited as more:
            images = pipe(**options, **more).images
    except ValueError as error:  # a number of calls that the solver cannot make, a size that the model does not take
        raise DiffpoError(f"cannot generate with {generation.model}: {' '.join(str(error).split())[:500]}") from error
    pictures = []
    for each, image in zip(batch, images.float().cpu(), strict=True):
        if not image.isfinite().all():
            tuned = f" with {generation.lora}" if generation.lora else ""
            raise DiffpoError(
                f"the image{tuned} of prompt {each.index} ({plain(each.prompt, 200)!r}) is NaN; the images before it "
                "are kept. In float16 the usual cause is the VAE: use --dtype bfloat16 or float32"
            )
        pictures.append(Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()))
    return pictures
