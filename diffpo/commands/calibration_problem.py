"""A model with its prompts as a problem for `samplers.calibrate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from samplers.calibrate import Batch, Problem, reference
from samplers.calibrate.problem import REFERENCE_CALLS

from .. import models
from ..common.errors import DiffpoError
from ..common.rng import generator, normal
from ..common.text import plain
from ..evaluate import generate
from ..evaluate.generation import Generation
from ..problems.policy import Policy
from ..problems.regression import Conditioning
from ..weights import lora as lora_module
from ..weights import trained

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..models.family import Family

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
ENCODED = 16  # prompts at a time


@dataclass(frozen=True)
class Samples:
    """The prompt of each noise; noise i belongs to the i-th of both together."""

    fitting: tuple[str, ...]
    heldout: tuple[str, ...]


@dataclass(frozen=True)
class Calibrated:
    """The problem, and which model it is of."""

    problem: Problem
    model_hash: str
    lora_hash: str | None
    device: str


class Guided:
    """The model at some prompts as a function ``(x, label)``, with guidance.

    ``stage`` is what the calls are made for, and ``calls`` counts them in it.
    """

    def __init__(self, policy: Policy, given: Conditioning, prompts: Sequence[str], counted: Callable[[], Any]) -> None:
        self.policy, self.given, self.prompts, self.counted = policy, given, list(prompts), counted
        self.stage, self.calls = "the reference", 0

    def __call__(self, x: Tensor, label: Tensor) -> Tensor:
        t = torch.as_tensor(label, dtype=torch.float32, device=x.device).expand(len(x))
        output = self.policy.output(x, t, self.given).to(x.dtype)
        self.calls += 1
        self.counted()
        finite = output.detach().isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            prompt = self.prompts[int(finite.int().argmin())]
            raise DiffpoError(
                f"the model's output for the prompt {plain(prompt, 200)!r} is not finite in call {self.calls} of "
                f"{self.stage} (timestep {float(t[0]):.5g}). In float16 use --dtype bfloat16 or float32; else leave "
                "this prompt out"
            )
        return output


def make_problem(
    generation: Generation, samples: Samples, bar: Callable[[int], tqdm], pixels: int | None = None
) -> Calibrated:
    """Load the model, encode the prompts once, draw the noises and compute what a long solver makes of them.

    ``pixels``: the side of the pictures; None is the model's own. ``bar(total)`` is the progress bar of the calls for
    the last. DiffpoError: see `calibrate.run`.
    """
    settings = models.named(generation.model, generation.model_config, generation.family)
    settings = settings.model_copy(update={"guidance": generation.guidance})  # for networks that take it as an input
    model_hash = models.source_of(settings).fingerprint()
    pipe = generate.load(generation.base())
    lora_hash = None
    if generation.lora is not None:
        lora_hash = trained.file_hash(generation.lora)
        trained.check(pipe, generation.lora)
        trained.load_into(pipe, generation.lora)
    prompts = (*samples.fitting, *samples.heldout)
    if long := models.too_long(pipe, list(dict.fromkeys(prompts))):
        print(long)
    own = models.family_class(settings, type(pipe).__name__).sample_size(pipe)
    pixels = pixels or own * models.vae_factor(pipe)
    family = models.load(settings, PRECISIONS[generation.dtype], pixels)
    family.pipe = pipe
    device = pipe.device
    network = lora_module.network_of(pipe).requires_grad_(False).eval()
    encoded = Prompts(family, prompts, pixels)
    family.free_encoders()
    guided = generation.guidance > 1 and not family.guidance_is_input  # as the pipelines decide
    shape = family.latent_shape(network, pixels)
    starts = [
        list(range(first, min(first + generation.batch_size, end)))
        for begin, end in ((0, len(samples.fitting)), (len(samples.fitting), len(prompts)))
        for first in range(begin, end, generation.batch_size)
    ]
    progress = bar(REFERENCE_CALLS * len(starts))
    batches = []
    for places in starts:
        noise = normal([generator(generation.seed, "calibrate", place) for place in places], shape).to(device)
        texts = [prompts[place] for place in places]
        uncond = encoded.conditions([None] * len(places), device) if guided else None
        given = Conditioning(encoded.conditions(texts, device), uncond, generation.guidance)
        model = Guided(Policy(family, network), given, texts, progress.update)
        target = reference(model, noise, family.schedule(), family.prediction, REFERENCE_CALLS)
        model.stage, model.calls, model.counted = "the calibration", 0, lambda: None
        batches.append(Batch(model, noise, target))
    progress.close()
    fitting = sum(places[0] < len(samples.fitting) for places in starts)
    problem = Problem(
        schedule=family.schedule(),
        prediction=family.prediction,
        fitting=tuple(batches[:fitting]),
        heldout=tuple(batches[fitting:]),
        guidance=generation.guidance,
    )
    return Calibrated(problem, model_hash, lora_hash, device.type)


class Prompts:
    """The embeddings of prompts and of the empty one, made once. ``pixels``: the side of the pictures."""

    @torch.no_grad()
    def __init__(self, family: Family, prompts: Sequence[str], pixels: int) -> None:
        texts: list[str | None] = [*dict.fromkeys(prompts), None]
        self.family, self.rows = family, dict[str | None, dict[str, Tensor]]()
        for first in range(0, len(texts), ENCODED):
            part = texts[first : first + ENCODED]
            found = family.encode_text(part)
            self.rows |= {text: {name: value[i] for name, value in found.items()} for i, text in enumerate(part)}
        self._sizes = torch.tensor([pixels, pixels, 0, 0, pixels, pixels], dtype=torch.float32)

    def conditions(self, texts: Sequence[str | None], device: Any) -> dict[str, Tensor]:
        """What `Family.predict` takes for these texts."""
        names = self.rows[None]
        text = {name: torch.stack([self.rows[each][name] for each in texts]).to(device) for name in names}
        return self.family.condition(text, self._sizes.to(device).repeat(len(texts), 1))
