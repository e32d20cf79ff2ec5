"""A model with its prompts as a problem for `samplers.calibrate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from samplers.calibrate import Batch, Problem, reference
from samplers.calibrate.problem import REFERENCE_CALLS

from ..common.rng import generator, normal
from ..evaluation.generation import Generation
from .guided_model import PromptedModel

if TYPE_CHECKING:
    from tqdm import tqdm


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


def make_problem(
    generation: Generation, samples: Samples, bar: Callable[[int], tqdm], pixels: int | None = None
) -> Calibrated:
    """Load the model, encode the prompts once, draw the noises and compute what a long solver makes of them.

    ``pixels``: the side of the pictures; None is the model's own. ``bar(total)`` is the progress bar of the calls for
    the last. DiffpoError: see `calibrate.run`.
    """
    prompts = (*samples.fitting, *samples.heldout)
    model = PromptedModel(generation, prompts, pixels)
    schedule, prediction = model.family.schedule(), model.family.prediction
    starts = [
        list(range(first, min(first + generation.batch_size, end)))
        for begin, end in ((0, len(samples.fitting)), (len(samples.fitting), len(prompts)))
        for first in range(begin, end, generation.batch_size)
    ]
    scale = 1.0 if model.family.guidance_is_input else generation.guidance  # what the solver sees
    progress = bar(REFERENCE_CALLS * len(starts))
    batches = []
    for places in starts:
        draws = [generator(generation.seed, "calibrate", place) for place in places]
        noise = normal(draws, model.shape).to(model.device)
        guided = model.at([prompts[place] for place in places])
        guided.counted = progress.update
        target = reference(guided, noise, schedule, prediction, REFERENCE_CALLS, scale)
        guided.stage, guided.calls, guided.counted = "the calibration", 0, lambda: None
        batches.append(Batch(guided, noise, target))
    progress.close()
    fitting = sum(places[0] < len(samples.fitting) for places in starts)
    problem = Problem(
        schedule=schedule,
        prediction=prediction,
        fitting=tuple(batches[:fitting]),
        heldout=tuple(batches[fitting:]),
        guidance=generation.guidance,
    )
    return Calibrated(problem, model.model_hash, model.lora_hash, model.device.type)
