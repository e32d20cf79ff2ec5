"""`objective.beta: auto`: train with several betas, and go on with the one that gains most on held-out pairs.

Each of `betas` is trained by itself, with the run's seed and for all of its updates: beta shows only once the margins
are large enough to saturate the link, so shorter trials would not tell. Then the pairs of data.validation are measured
as in `heldout`. The gain of a pair is its margin u / beta, times 2 p - 1 for a label p. Up to a factor that all betas
share, u / beta is how much more likely the policy has made the better picture than the worse one, against the
reference: the identity of Diffusion-DPO. So for pairs of the model's own pictures the mean gain is the first-order
change of the votes for its pictures, E_ref[r log(policy / reference)]. The likelihood of the labels cannot choose: the
optimum of DPO has the same one for every beta.

The beta is chosen whose mean gain less one standard error is the largest. Where no bound is above 0, that is the beta
that has moved least. No picture is made.

OUTPUT/beta.json      the betas, their losses and accuracies, the chosen one
OUTPUT/beta/500/      the run with beta 500, with held_out.json, the margins
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..common import processes
from ..common.errors import DiffpoError
from ..common.files import write_atomic
from ..common.run_folder import BETA, BETAS, CHECKPOINT, CONFIG_NAME, METRICS_NAME
from ..common.text import plain, read_text
from ..config import Config
from ..config.presets import find
from ..config.settings import Log
from ..data.groups import load_groups
from .claim import check_folder
from .metrics import accuracy

if TYPE_CHECKING:
    from ..objective.reward import Objective
    from ..problems.policy import Policy
    from .heldout import HeldOut

FACTORS = (0.02, 0.1, 0.5, 2.5)  # of the preset's beta
MARGINS = "held_out.json"
LEAST = 8  # held-out pairs
Fit = Callable[[Config, "Callable[[HeldOut, Policy, Objective], None]"], Path]


@dataclass(frozen=True)
class Trial:
    """What the held-out pairs say of one beta: the mean gain, its standard error over the pairs, and the share of
    positive margins."""

    beta: float
    gain: float
    error: float
    accuracy: float

    @property
    def bound(self) -> float:
        return self.gain - self.error


def betas(config: Config) -> tuple[float, ...]:
    """What is tried, from the smallest."""
    own = find(config.objective.name, lambda _: []).settings["beta"]
    return tuple(float(f"{own * factor:.6g}") for factor in FACTORS)


def resolved(config: Config, fit: Fit) -> Config:
    """``config`` with a number for beta; with `beta: auto`, after the trials, or from their record.

    ``fit(config, after)`` trains, and calls ``after`` with the held-out pairs, policy and objective at the end. The
    same command goes on after an interruption. DiffpoError if the folder has the record of other settings, or for too
    few pairs.
    """
    if config.objective.beta != "auto":
        return config
    record, ours = config.output / BETA, processes.here()
    if (known := _read(record)) is not None:
        if known.get("settings") != config.identity():
            raise DiffpoError(f"{record} was chosen with other settings: choose another folder with output=FOLDER")
        if ours.main:
            _adopt(config, float(known["chosen"]))
        ours.wait()
        return _with(config, float(known["chosen"]), config.output)
    tried = betas(config)
    check_folder(_with(config, tried[0], config.output))
    _check_pairs(config)
    measured = [_measured(config, beta, fit) for beta in tried]
    margins, preferences = torch.stack([each[0] for each in measured]), measured[0][1]
    trials = judged(tried, margins, preferences)
    best, pairs = chosen(trials), len(preferences)
    if ours.main:
        show(trials, best, pairs)
        about: dict[str, Any] = {"chosen": best.beta, "pairs": pairs, "updates": config.train.steps}
        about |= {"trials": [asdict(trial) for trial in trials], "settings": config.identity()}
        write_atomic(record, json.dumps(about, indent=1).encode())
        _adopt(config, best.beta)
    ours.wait()
    return _with(config, best.beta, config.output)


def judged(tried: tuple[float, ...], margins: Tensor, preferences: Tensor) -> list[Trial]:
    """Of margins (betas, pairs), and preferences (pairs,): the probabilities that the first pictures are better."""
    gains = (2 * preferences - 1) * margins / torch.tensor(tried, dtype=margins.dtype)[:, None]
    columns = (gains.mean(1), gains.std(1) / gains.shape[1] ** 0.5, accuracy(margins).mean(1))
    return [Trial(beta, *each) for beta, *each in zip(tried, *(column.tolist() for column in columns), strict=True)]


def chosen(trials: list[Trial]) -> Trial:
    return max(trials, key=lambda each: (each.bound, each.beta))


def show(trials: list[Trial], best: Trial, pairs: int) -> None:
    from ..common.tables import Table, console

    table = Table(["beta", "gain on held-out pairs (s.e.)", "gain less s.e.", "accuracy"])
    for each in trials:
        mark = " (chosen)" if each is best else ""
        gain = f"{each.gain:.2e} ({each.error:.1e})"
        table.rows.append([f"{each.beta:g}{mark}", gain, f"{each.bound:.2e}", f"{each.accuracy:.1%}"])
    console().print(table.terminal())
    print(f"objective.beta=auto: {best.beta:g}, by {pairs} held-out pairs")


def _with(config: Config, beta: float, output: Path) -> Config:
    return config.model_copy(update={"objective": config.objective.model_copy(update={"beta": beta}), "output": output})


def _trial(config: Config, beta: float) -> Config:
    train = config.train.model_copy(update={"stop_when": None, "checkpoint_keep": 1})
    one = _with(config, beta, config.output / BETAS / f"{beta:g}")
    return one.model_copy(update={"log": Log(), "train": train})


def _check_pairs(config: Config) -> None:
    data = config.data
    n = len(load_groups(data, str(data.validation), data.validation_split, "pair"))
    if n < LEAST:
        raise DiffpoError(
            f"objective.beta=auto needs {LEAST} pairs that are not trained on, and {data.validation} has {n}: add "
            f"some to data.validation, or write a number"
        )


def _measured(config: Config, beta: float, fit: Fit) -> tuple[Tensor, Tensor]:
    """Margins and preferences of the held-out pairs, (n,) float64 each, after the trial with ``beta``, which is trained
    unless it is finished."""
    trial, ours = _trial(config, beta), processes.here()
    path, settings = trial.output / MARGINS, trial.identity() | {"updates": trial.train.steps}

    def after(held_out: HeldOut, policy: Policy, objective: Objective) -> None:
        margins = held_out.margins(policy, objective)
        found = {"margins": margins.tolist(), "preferences": held_out.preferences.tolist(), "settings": settings}
        if ours.main:
            write_atomic(path, json.dumps(found).encode())

    known = _read(path)
    if known is None or known.get("settings") != settings:
        if ours.main:
            print(f"objective.beta=auto: trying {beta:g}", flush=True)
        fit(trial, after)
        known = _read(path)
    assert known is not None  # noqa: S101 (written above)
    margins, preferences = torch.tensor([known["margins"], known["preferences"]], dtype=torch.float64)
    return margins, preferences


def _adopt(config: Config, beta: float) -> None:
    """Move the checkpoint of the chosen trial into the run's folder, where the run resumes from it: it would compute
    the same. Not if the run also looks at pictures while it trains."""
    there, here = _trial(config, beta).output, config.output
    found = list(there.glob(f"{CHECKPOINT}*"))
    if config.log != Log() or config.train.stop_when is not None or any(here.glob(f"{CHECKPOINT}*")) or not found:
        return
    for name in (CONFIG_NAME, METRICS_NAME):
        write_atomic(here / name, (there / name).read_bytes())
    for folder in found:
        folder.rename(here / folder.name)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(read_text(path))
        if not isinstance(found, dict):
            raise ValueError("no settings in it")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DiffpoError(f"cannot read {path}: {plain(error, 200)}. Delete it to train and choose again") from None
    return found
