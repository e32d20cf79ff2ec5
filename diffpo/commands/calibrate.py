"""`diffpo calibrate`: fit a sampling plan to a model, a guidance scale and a number of calls, and measure it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from samplers.calibrate import METHODS, Fitted, fit, ratio
from samplers.calibrate.problem import REFERENCE_CALLS, rms

from ..common import devices
from ..common.errors import DiffpoError
from ..common.files import writing
from ..common.names import hint
from ..common.rng import generator
from ..common.tables import Table, console
from ..common.text import plain
from ..common.threads import Threads
from ..data.prompts import load_prompts
from ..evaluation.generation import Dtype, Generation
from ..evaluation.plans import printed_warnings
from .calibration_problem import Calibrated, Samples, make_problem

if TYPE_CHECKING:
    from tqdm import tqdm


@dataclass(frozen=True)
class Calibration:
    """What a plan is fitted to. The defaults of the verb stand here.

    Attributes:
        model, model_config, family, lora, guidance, dtype, batch_size, device: as of `Generation`.
        prompts: as for `load_prompts`; ``out``: a new file.
        calls: of the model, for a picture.
        method: a name in `samplers.calibrate.METHODS`.
        n, heldout: numbers of noises that the plan is fitted to and measured on; their prompts differ.
        seed: of the noises, and of which prompts are held out.
        resolution: the side of the pictures in pixels; None is the model's own.

    Raises DiffpoError if a number is out of range or the method is not known.
    """

    model: str
    prompts: str
    out: Path
    model_config: str | None = None
    family: str | None = None
    lora: str | None = None
    guidance: float = Generation.guidance
    calls: int = 5
    method: str = "learned"
    n: int = 256
    heldout: int = 64
    seed: int = Generation.seed
    resolution: int | None = None
    dtype: Dtype = Generation.dtype
    batch_size: int = 32
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("calls", "n", "heldout"):
            if getattr(self, name) < 1:
                raise DiffpoError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.method not in METHODS:
            raise DiffpoError(f"unknown method {plain(self.method, 100)!r}: {hint(self.method, METHODS)}")
        object.__setattr__(self, "out", Path(self.out))
        if self.device is None and devices.best() == "mps":  # a plan is fitted in float64
            object.__setattr__(self, "device", "cpu")

    def generation(self) -> Generation:
        """The pictures that the plan is for."""
        names = ("model", "model_config", "family", "lora", "guidance", "seed", "dtype", "device")
        size = min(self.batch_size, -(-self.n // 4))  # a method may take a batch for each step, and keep one aside
        return Generation(steps=self.calls, batch_size=size, **{name: getattr(self, name) for name in names})


def run(settings: Calibration) -> Fitted:
    """Fit the plan, write it to ``settings.out`` and print its errors.

    DiffpoError: the file exists already, there are fewer than two prompts, a model or LoRA cannot be loaded, or the
    model returns NaN, where the message names prompt and call.
    """
    out = settings.out
    if os.path.lexists(out):
        raise DiffpoError(f"{out} exists already; choose another file with --out, or delete it")
    with writing(out, "--out", kept=""):
        out.parent.mkdir(parents=True, exist_ok=True)
    samples = split(load_prompts(settings.prompts), settings)
    with ExitStack() as stack:
        reference = partial(_bar, stack, "reference calls")
        made = make_problem(settings.generation(), samples, reference, settings.resolution)
        threads = stack.enter_context(Threads(made.device))
        found = _fitted(settings, made, threads)
    with writing(out, "--out", kept=""):
        try:
            found.plan.save(out)
        except ValueError as error:
            raise DiffpoError(f"{out}: {error}") from None
    _report(settings, found, samples)
    return found


def split(prompts: list[str], settings: Calibration) -> Samples:
    """Prompts for the noises of both parts. No prompt is in both; where they are fewer than noises, they repeat.

    DiffpoError: there are fewer than two different prompts.
    """
    different = list(dict.fromkeys(prompts))
    if len(different) < 2:
        raise DiffpoError(
            f"{settings.prompts} has {len(different)} different prompt; at least 2 are needed, because the plan is "
            "measured on prompts that it was not fitted to. For one prompt only, write it in two ways"
        )
    order = torch.randperm(len(different), generator=generator(settings.seed, "calibrate prompts", 0)).tolist()
    share = settings.heldout / (settings.n + settings.heldout)
    kept = min(max(1, round(share * len(different))), settings.heldout, len(different) - 1)
    heldout, fitting = order[:kept], order[kept:][: settings.n]
    return Samples(
        fitting=tuple(different[fitting[i % len(fitting)]] for i in range(settings.n)),
        heldout=tuple(different[heldout[i % len(heldout)]] for i in range(settings.heldout)),
    )


def _fitted(settings: Calibration, made: Calibrated, threads: Threads) -> Fitted:
    about: dict[str, Any] = {"seed": settings.seed, "prompts": plain(Path(settings.prompts).name, 100)}
    about |= {"dtype": settings.dtype, "lora_hash": made.lora_hash}
    with ExitStack() as stack, printed_warnings():
        bars: list[tqdm] = []

        def progress(done: int, total: int) -> None:
            if not bars:
                bars.append(_bar(stack, f"fitting ({settings.method})", total))
            bars[0].total = total
            bars[0].update(done - bars[0].n)
            threads.adapt()

        try:
            return fit(made.problem, settings.method, settings.calls, progress, made.model_hash, about)
        except (ValueError, FloatingPointError) as error:
            raise DiffpoError(
                f"cannot fit a plan of {settings.calls} calls: {' '.join(str(error).split())[:500]}"
            ) from error


def _bar(stack: ExitStack, what: str, total: int) -> tqdm:
    from tqdm.auto import tqdm

    return stack.enter_context(tqdm(total=total, desc=what, delay=1))


def _report(settings: Calibration, found: Fitted, samples: Samples) -> None:
    """One table and how to use the plan."""
    origin = found.plan.origin
    assert origin is not None  # noqa: S101 (`fit` gives it)
    table = Table(["plan", "fitted", "held-out", "ratio [95 %]"])
    rows = [(f"{settings.method} (this plan)", found.heldout, f"{origin.fitted_error:.4g}")]
    rows += [(f"best classical: {found.names[1]}", found.classical, "")]
    rows += [(f"default rule: {found.names[0]}", found.default, "")]
    for name, errors, fitted in rows:
        value, low, high = ratio(errors, found.classical, samples.heldout)
        table.rows.append([name, fitted, f"{rms(errors):.4g}", f"{value:.2f} [{low:.2f}, {high:.2f}]"])
    screen = console()
    screen.print(table.terminal())
    screen.print(
        f"RMS difference from {REFERENCE_CALLS} calls at guidance {settings.guidance:g}, of {origin.n_fitted} fitted "
        f"and {origin.n_heldout} held-out samples; the ratio is that of the held-out errors, to the best classical "
        "plan's. "
        f"The fit took {origin.seconds:.0f} s.",
        soft_wrap=True,
    )
    if origin.heldout_error > 0.98 * origin.classical_error and settings.method != "classical":
        screen.print(f"This plan is no better than {found.names[1]} here.", soft_wrap=True)
    screen.print(f"The plan of {origin.calls} calls is in {settings.out}: diffpo generate --plan, or", soft_wrap=True)
    screen.print(
        f'pipe.scheduler = samplers.SolverScheduler.from_plan("{settings.out}", pipe.scheduler.config)', soft_wrap=True
    )
