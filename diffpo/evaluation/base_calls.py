"""The base model for the first calls of a picture, the tuned one for the rest.

Gandikota and Bau 2025 (Distilling Diversity and Control in Diffusion Models, arXiv 2503.10637) do this with distilled
models, whose first call decides the layout of the picture and is the same for most noises.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from ..common.errors import DiffpoError
from ..weights.adapter import LoraWeights
from ..weights.lora import network_of, tuned_layers


@contextmanager
def base_first(pipe: Any, calls: int | None) -> Iterator[None]:
    """Within it the network of ``pipe`` is the base model for the first ``calls`` steps of the scheduler; for one run
    of the pipeline. Text encoders are as they are, and user tokens are silent together with the LoRA.

    DiffpoError if the tuning is not an adapter that can be switched off.
    """
    if not calls:
        yield
        return
    network, scheduler, done = network_of(pipe), pipe.scheduler, 0
    if not tuned_layers(network):
        raise DiffpoError(
            "--base-calls switches a LoRA off for the first calls, and this one is part of the weights: it has a "
            "strength other than 1, is LoHa or of mixed kinds, or is a whole network. Use a plain LoRA at strength 1"
        )
    step = scheduler.step
    with ExitStack() as base:
        base.enter_context(LoraWeights(network).switched(None))

        @wraps(step)  # pipelines look at its signature
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == calls:
                base.close()
            return step(*args, **options)

        before = vars(scheduler).get("step")  # of paths.py
        scheduler.step = counted
        try:
            yield
        finally:
            del scheduler.step
            if before is not None:
                scheduler.step = before
