"""From the name in a config to the scorer: a folder of `diffpo train-scorer`, or a number of an ordinary scorer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..judge import Judge
from .base import StepScorer, is_folder, pictures, read_about
from .latent import LatentScorer
from .pixel import StepAwareScorer


def load(spec: str, family: Any, network: nn.Module) -> StepScorer:
    """The scorer of a folder or of the name ``NUMBER`` or ``NAME=SOURCE``, as in `diffpo eval --scorers`.

    ``network``: the run's own module; whatever adapters it has are off while a scorer computes its features. Raises
    DiffpoError: no such folder or scorer, damaged files, a latent scorer of another base model.
    """
    device = next(network.parameters()).device
    if not is_folder(spec):
        return DecodedScorer(spec, family, str(device))
    folder = Path(spec).expanduser()
    if read_about(folder)["kind"] == "latent":
        return LatentScorer.load(folder, family, network)
    return StepAwareScorer.load(folder, family, device)


def needs_vae(spec: str) -> bool:
    """`StepScorer.needs_vae` before anything large is loaded."""
    return not is_folder(spec) or read_about(Path(spec).expanduser())["kind"] != "latent"


class DecodedScorer:
    """One number of an ordinary scorer, of the decoded x_0 estimate. Time-blind."""

    needs_vae = True

    def __init__(self, spec: str, family: Any, device: str) -> None:
        self.family, self.judge = family, Judge([spec], device)

    def score(self, x_t: Tensor, x_0: Tensor, t: Tensor, captions: Sequence[str], cond: dict[str, Tensor]) -> Tensor:
        found = self.judge.scores(pictures(self.family.decode(x_0)), list(captions))
        return found[:, 0].float().to(x_0.device)
