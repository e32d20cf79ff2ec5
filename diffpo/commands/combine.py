"""`diffpo combine`: several LoRAs of one model as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import models
from ..common.errors import DiffpoError
from ..common.text import plain
from ..weights.combine import Share, combine


def run(loras: Sequence[str], out: Path, model: str, model_config: str | None, family: str | None) -> Path:
    """Combine ``loras``, each LORA@WEIGHT, for the model; the file that was written."""
    shares = [_share(text) for text in loras]
    pipe = models.load_pipeline(models.named(model, model_config, family), "float32", "cpu")
    return combine(pipe, shares, out)


def _share(text: str) -> Share:
    lora, at, weight = text.rpartition("@")
    try:
        return Share(lora, float(weight)) if at else Share(text, 1.0)
    except ValueError:
        raise DiffpoError(f"{plain(text, 200)}: the weight behind @ is no number; write LORA@WEIGHT") from None
