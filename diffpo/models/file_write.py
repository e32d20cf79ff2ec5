"""Writing a pipeline as one file, and reading it back before it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..common.errors import DiffpoError
from . import layouts, released
from .single_file import SingleFile


def write(path: Path, pipe: Any, source: Any) -> None:
    """Write the pipeline as one file, by the original names, and read it back by the configs of ``source``: every
    weight must be what it is, to the last bit. DiffpoError if it is not, or if a weight has no name there."""
    import torch
    from safetensors.torch import save_file

    kind = source.kind if isinstance(source, SingleFile) else layouts.kind(pipe)
    parts = [part for part in layouts.LAYOUTS[kind].parts if getattr(pipe, part, None) is not None]
    state = {name: value.contiguous() for name, value in layouts.weights(layouts.LAYOUTS[kind], pipe, parts)}
    header = {"format": "pt"}
    if kind in released.PIPELINES:
        velocity = pipe.scheduler.config.get("prediction_type") == "v_prediction"
        header["modelspec.prediction_type"] = "v" if velocity else "epsilon"
        marks = {"v_pred": velocity, "ztsnr": pipe.scheduler.config.get("rescale_betas_zero_snr")}
        state |= {mark: torch.zeros(0) for mark, wanted in marks.items() if wanted}
    save_file(state, path, header)
    del state
    configs = source.name if isinstance(source, SingleFile) else source.name_or_path
    written = SingleFile(source.settings.model_copy(update={"path": str(path), "config": configs}))
    for part in parts:
        module = getattr(pipe, part)
        ours, theirs = module.state_dict(), written.module(type(module), part, module.dtype).state_dict()
        if wrong := [name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])]:
            raise DiffpoError(
                f"the {part} cannot be kept in one file: {wrong[0]} ({len(wrong)} of {len(ours)} weights) is read back "
                f"with other values, so the file was not kept. Use --to merged, which writes a folder"
            )
