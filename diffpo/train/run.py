"""What every training run does besides training: claim its folder, resume, save, log, and stop in good order.

`diffpo train` and `diffpo train-scorer` are loops over `Run.steps`:

    run = Run(config, accelerator)
    with run.claimed(check_folder):
        learner = ...
        run.resume(learner, origin)
        with run.working(advice):
            for step in run.steps():
                metrics = ...
                run.log(metrics, headline)
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from tqdm.auto import tqdm

from ..common import lock
from ..common.errors import DiffpoError
from ..common.files import write_atomic
from ..common.run_folder import CHECKPOINT, CONFIG_NAME
from ..common.text import plain
from ..config import Config, Optimisation, ScorerConfig
from . import checkpoint, distributed, outside
from .metrics import Tracker
from .update import Diverged, Stuck

if TYPE_CHECKING:
    from accelerate import Accelerator

ConfigT = TypeVar("ConfigT", bound=Config | ScorerConfig)

BASE_IS_WRONG = "The base model itself causes this: check its weights, its VAE (model.vae) and train.precision"


class Interrupted(DiffpoError):
    exit_code = 130


class Checkpointed(Protocol):
    """What is trained, and all that a checkpoint of it holds. All processes call `writer` and `state` alike."""

    def writer(self, step: int) -> Callable[[Path], Any]:
        """A function that writes what is trained into a folder; one process calls it."""

    def state(self) -> dict[str, Any]:
        """Optimiser, schedule and whatever else decides how training goes on: tensors, numbers and texts."""

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Put back what `writer` wrote into ``folder``, and the `state`."""


class Run(Generic[ConfigT]):
    """One training run: its settings, the machine and its folder.

    Attributes: config; settings (config.train); output, the folder; accelerator; main, is this the process that writes;
    step, the number of updates that are done.
    """

    def __init__(self, config: ConfigT, accelerator: Accelerator) -> None:
        self.config, self.output = config, config.output
        self.settings: Optimisation = config.train
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        self.step = 0
        self._saved: int | None = None  # the step of the newest checkpoint
        self._ended = False
        self._keep = getattr(config.train, "checkpoint_keep", 1)

    def say(self, text: str) -> None:
        """Printed by one process."""
        self.accelerator.print(text)

    # ---- before the first step

    @contextlib.contextmanager
    def claimed(self, check: Callable[[ConfigT], None]) -> Iterator[None]:
        """No other run writes into the folder within this. DiffpoError if one does, or if ``check(config)`` refuses the
        folder; all processes get it."""
        with distributed.by_main(self.accelerator, self._locked(check)):
            yield

    @contextlib.contextmanager
    def _locked(self, check: Callable[[ConfigT], None]) -> Iterator[None]:
        check(self.config)
        with lock.held(self.output):
            check(self.config)  # another run may have ended there just now
            yield

    def resume(self, learner: Checkpointed, origin: dict[str, Any]) -> None:
        """Go on from the newest checkpoint, if there is one.

        ``origin`` is what the run starts from (JSON: settings, base, data_hash, pairs_per_update and more); every
        checkpoint's manifest holds it. DiffpoError if the checkpoint started from something else, if all are damaged,
        or if the newest is beyond the last step.
        """
        self._learner, self._origin = learner, origin
        found = checkpoint.latest(self.output, self.say)
        if not found:
            return
        folder, manifest = found
        checkpoint.check_unchanged(folder, manifest, self._origin)
        if manifest["step"] > self.settings.steps:
            step, steps = manifest["step"], self.settings.steps
            raise DiffpoError(
                f"{self.output} is already at step {step}, beyond train.steps={steps}: raise train.steps, or choose "
                f"another folder with output=FOLDER"
            )
        learner.load(folder, checkpoint.read_state(folder))
        self.step = self._saved = manifest["step"]
        self.say(f"resuming from {folder} (step {self.step})")

    # ---- while it trains

    @contextlib.contextmanager
    def working(self, advice: str) -> Iterator[None]:
        """Within it metrics are logged, the first SIGINT or SIGTERM waits for the end of the step, and every error says
        what is saved. ``advice``: what to change after a loss that is not finite.

        config.yaml is written here, once it is certain that the run continues what is in its folder.
        """
        tracker = None
        with checkpoint.disk_errors(self.output), contextlib.ExitStack() as stack:
            if self.main:
                write_atomic(self.output / CONFIG_NAME, self.config.to_yaml().encode())
                config, others = self.config, None
                if isinstance(config, Config):
                    others = outside.make(config, self.accelerator, self.step)
                tracker = stack.enter_context(contextlib.closing(Tracker(self.output, self.step, others)))
            self._tracker, name = tracker, plain(self.output.name, 40)
            self._interrupted = stack.enter_context(interruption(self.accelerator))
            options = {"initial": self.step, "desc": name, "unit": "step", "delay": 1, "disable": not self.main}
            self._bar = stack.enter_context(tqdm(total=self.settings.steps, **options))
            try:
                yield
            except Diverged as error:
                raise self._diverged(error, advice) from None
            except Stuck as error:
                raise self._stuck(error) from None

    def steps(self) -> Iterator[int]:
        """The numbers of the updates to make, from 0. After each it saves if that is due.

        Raises Interrupted after SIGINT or SIGTERM, once the step is saved. After `end` there are no more.
        """
        while self.step < self.settings.steps and not self._ended:
            yield self.step
            self.step += 1
            stop, last = self._interrupted(), self._ended or self.step == self.settings.steps
            if stop or last or self.step % self.settings.checkpoint_every == 0:
                self.save()
            if stop and not last:
                where = f"step {self.step} is saved in {self.output}"
                raise Interrupted(f"interrupted: {where}; the same command resumes there")

    def end(self) -> None:
        """Make the step at hand the last one; before the first step: make none. All processes call it alike."""
        self._ended = True

    def log(self, metrics: dict[str, float], headline: str, images: Sequence[Any] = ()) -> None:
        """Of the update at hand; ``headline`` stands behind the progress bar. ``images``: PIL pictures, for trackers
        that show them; they are in OUTPUT/samples too."""
        if self._tracker:
            self._tracker.log(self.step + 1, metrics)
            self._tracker.show(self.step + 1, images)
            self._bar.set_postfix_str(headline, refresh=False)
            self._bar.update()

    def save(self) -> None:
        """Write a checkpoint of `step`, unless there is one."""
        if self._saved == self.step:
            return
        write, state = self._learner.writer(self.step), self._learner.state()
        if self.main:
            checkpoint.save(self.output, self.step, write, state, self._origin, self._keep)
        self._saved = self.step

    def _diverged(self, error: Diverged, advice: str) -> DiffpoError:
        """The state before the bad update is saved; DiffpoError that says where."""
        if self.step and not error.spoilt:
            self.save()
        kept = "there is no good state yet"
        if self._saved:
            kept = f"the state before it is in {self.output / f'{CHECKPOINT}{self._saved:06d}'}"
        if self.step == 0 and not error.spoilt:  # nothing was trained yet
            advice = BASE_IS_WRONG
        return DiffpoError(f"{error}. The run stopped; {kept}. {advice}")

    def _stuck(self, error: Stuck) -> DiffpoError:
        kept = ""
        # with several processes the others wait for this one, and all of them must save together
        if self.step and self.accelerator.num_processes == 1:
            self.save()
            kept = f" (stopped; step {self.step} is saved in {self.output}, and the same command resumes there)"
        return DiffpoError(f"{error}{kept}")


@contextlib.contextmanager
def interruption(accelerator: Accelerator) -> Iterator[Callable[[], bool]]:
    """Within it the first SIGINT or SIGTERM only sets a flag. Yields a function: was any process asked to stop?"""
    asked: list[int] = []

    def note(number: int, _frame: Any) -> None:
        asked.append(number)
        accelerator.print("\nfinishing the step and saving; press Ctrl-C again to stop at once")
        for each, handler in previous.items():
            signal.signal(each, handler)

    previous: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # signals belong to the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)

    def interrupted() -> bool:
        if accelerator.num_processes == 1:
            return bool(asked)
        flag = torch.tensor([float(len(asked))], device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item())

    try:
        yield interrupted
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
