"""`train.stop_when`: stop when the pictures show that the scorer is being gamed, or when they get no better."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from .. import scorers
from ..common import files
from ..common.errors import DiffpoError
from ..common.names import hint
from ..common.run_folder import BEST
from ..common.worker import Worker
from ..config import Config, StopSettings
from ..evaluation import signals, statistics
from ..evaluation.hacking import hacking
from ..evaluation.measured import Measured
from ..evaluation.verdict import deciding
from ..problems.policy import Policy
from ..rollout.prompts import PromptConditions
from .samples import Look, Samples

if TYPE_CHECKING:
    from PIL.Image import Image

    from .run import Run


class StopRule:
    """Judges the looks of `Samples`, of which ``planned`` are to come in all.

    Each look makes the tests of `hacking.hacking` at the level false_alarms / planned. So the probability of stopping
    for hacking at any of the looks, while there is none, is ``false_alarms`` at most, however the looks depend on each
    other (Bonferroni). The same level decides whether a look is better than the best one before.

    Attributes:
        stopped: why training ended; empty before.
        best: the best look; None as long as none is better than the first one.
    """

    def __init__(self, settings: StopSettings, trained: str, samples: Samples, planned: int) -> None:
        """``trained``: the score that is trained on. DiffpoError unless it is one of the samples' scores."""
        if trained not in samples.names:
            raise DiffpoError(
                f"train.stop_when needs the score that is trained on, {trained}, among log.samples.scorers: "
                f"{hint(trained, samples.names)}"
            )
        self.settings, self.trained, self.samples = settings, trained, samples
        self.level = settings.false_alarms / planned
        self.best: Look | None = None
        self.idle = 0  # looks since there was something better
        self.stopped = ""

    def judge(self, look: Look) -> bool:
        """Is ``look`` the best so far? Sets `stopped` if training is to end."""
        now, base = f"step {look.step}", self.samples.base
        assert base is not None  # noqa: S101 (`Samples.begin` comes first)
        measured = self._measured(now, look, base)
        if found := hacking(measured, self.level):
            self.stopped = " ".join(found[now][:3])  # the first scorers that were named
            return False
        before = self.best or base
        better = self._better(deciding(measured), look, before)
        self.idle = 0 if better else self.idle + 1
        if better:
            self.best = look
        elif self.idle >= self.settings.patience:
            since = f"No look since step {before.step} was shown to be better on {deciding(measured)}"
            self.stopped = f"{since} ({self.idle} in a row)."
        return better

    def _measured(self, now: str, look: Look, base: Look) -> Measured:
        ids = np.arange(len(look.features))
        kind = self.trained.partition(".")[0]
        return Measured(
            {name: {"base": base.scores[name], now: values} for name, values in look.scores.items()},
            ids,
            "base",
            self.trained,
            frozenset(name for name in look.scores if name != self.trained and name.partition(".")[0] == kind),
            {name: {"base": base.signals[name], now: values} for name, values in look.signals.items()},
            {now: signals.distance(look.features, base.features)},
            {"base": signals.diversity(base.features, ids), now: signals.diversity(look.features, ids)},
        )

    def _better(self, score: str, look: Look, before: Look) -> bool:
        """Is it shown that ``look`` beats ``before``?"""
        mine, theirs = look.scores[score], before.scores[score]
        both = ~(np.isnan(mine) | np.isnan(theirs))
        if not both.any():
            return False
        pair = theirs[both], mine[both], np.flatnonzero(both)
        return statistics.win_rate(*pair).value > 0.5 and statistics.p_value(*pair) < self.level

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"best": self.best.state() if self.best else None, "idle": self.idle, "stopped": self.stopped}

    def load(self, state: dict[str, Any]) -> None:
        """Put `state` back."""
        self.best = Look.of(state["best"]) if state["best"] else None
        self.idle, self.stopped = state["idle"], state["stopped"]


class Looks:
    """What the loop does at each look: samples, the rule if there is one, and the best weights so far in OUTPUT/best.
    Collective throughout: all processes come to the same decision, because they gather the same numbers."""

    def __init__(self, samples: Samples, rule: StopRule | None = None) -> None:
        self.samples, self.rule = samples, rule

    def due(self, done: int, last: int) -> bool:
        """Is there a look after ``done`` updates of ``last``?"""
        return done % self.samples.settings.every == 0 or done == last

    def begin(self, run: Run) -> None:
        """Before the first update of this process: the first look, unless a checkpoint has it. A run that was stopped
        stays so."""
        if self.samples.base is None:
            self.samples.base = self.samples.look(run.step, run.output)
        if self.rule and self.rule.stopped:
            self._end(run)

    def look(
        self, run: Run, done: int, writer: Callable[[int], Callable[[Path], Any]]
    ) -> tuple[dict[str, float], list[Image]]:
        """After update ``done``: its metrics and its pictures."""
        look = self.samples.look(done, run.output)
        if self.rule:
            if self.rule.judge(look):
                write = writer(done)
                if run.main:
                    with files.whole_folder(run.output / BEST, replace=True) as part:
                        write(part)
            if self.rule.stopped:
                self._end(run)
        return self.samples.metrics(look), self.samples.shown

    def _end(self, run: Run) -> None:
        assert self.rule is not None  # noqa: S101 (of the callers)
        best = self.chosen()
        kept = "No look was shown to be better than the first, so what is written is the last step as it is."
        if best is not None:
            kept = f"What is written is step {best}, the best look."
        if run.main:  # above the progress bar
            tqdm.write(f"train.stop_when: {self.rule.stopped} {kept} To train on, set train.stop_when=null.")
        run.end()

    def chosen(self) -> int | None:
        """The step of the best look, if the rule has stopped the run and there is one."""
        stopped = self.rule is not None and self.rule.stopped
        return self.rule.best.step if stopped and self.rule and self.rule.best else None

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"samples": self.samples.state(), "rule": self.rule.state() if self.rule else None}

    def load(self, state: dict[str, Any]) -> None:
        """Put `state` back; one of other pictures is left aside."""
        if self.samples.load(state.get("samples", {})) and self.rule and state["rule"]:
            self.rule.load(state["rule"])


def make(config: Config, conditions: PromptConditions, policy: Policy, worker: Worker) -> Looks:
    """The looks of a config with `log.samples`. DiffpoError if a scorer cannot be loaded, or if the score that is
    trained on is not among theirs."""
    settings, rule = config.log.samples, config.train.stop_when
    assert settings is not None  # noqa: S101 (of the caller)
    samples = Samples(settings, conditions, policy, worker)
    if rule is None:
        return Looks(samples)
    trained = rule.train_scorer
    if trained is None:
        spec = scorers.parse(config.objective.rollout.scorers[0])
        trained = spec.number or spec.name
    planned = -(-config.train.steps // settings.every)
    return Looks(samples, StopRule(rule, trained, samples, planned))
