"""The denoising path of a picture: what the model takes x_0 to be, at each of its calls.

OUT/paths/ARM/<prompt index>_<seed>/<call>.png
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .manifest import image_path, save

if TYPE_CHECKING:
    from torch import Tensor

    from ..models import Family
    from .generation import Generation

FOLDER = "paths"


def beside(picture: Path) -> list[Path]:
    """The files of a picture's path, call by call; none if there is no path. ``picture``: images/ARM/NAME.png."""
    picture = picture.absolute()
    if len(picture.parents) < 3:
        return []
    folder = picture.parents[2] / FOLDER / picture.parent.name / picture.stem
    return sorted(folder.glob("[0-9]*.png")) if picture.parents[1].name == "images" else []


def lacking(out: Path, arm: Generation, row: dict[str, Any]) -> bool:
    """Is a path wanted of the picture of this row, and not whole? Of a prompt, the first seed has one."""
    if row["index"] >= arm.paths or row["seed"] != arm.seed:
        return False
    there = beside(image_path(out, row["arm"], row["index"], row["seed"]))
    return [path.name for path in there] != [_name(call) for call in range(arm.steps or 0)]


def forget(picture: Path) -> None:
    """Delete a picture's path: the picture is made again, maybe with other settings."""
    if found := beside(picture):
        shutil.rmtree(found[0].parent, ignore_errors=True)


@contextmanager
def recorded(pipe: Any, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Within it, every call of ``pipe`` adds its x_0, as the scheduler gets it, with guidance. The pipeline must have
    the scheduler of `generate.load`. Nothing is added if it is not ``wanted``."""
    if not wanted:
        yield []
        return
    from samplers.prediction import convert

    scheduler, step, found = pipe.scheduler, pipe.scheduler.step, []
    kind = scheduler.config.prediction_type
    kind = "flow" if kind == "flow_prediction" else kind

    @wraps(step)  # pipelines look at its signature
    def recording(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
        k = scheduler.step_index or 0
        x, output = sample.float(), model_output.float()
        output = output[:, : x.shape[1]]  # without a learned variance
        found.append(convert(x, output, kind, "sample", float(scheduler.plan.alpha[k]), float(scheduler.plan.sigma[k])))
        return step(model_output, timestep, sample, *args, **options)

    scheduler.step = recording
    try:
        yield found
    finally:
        del scheduler.step


def keep(pipe: Any, family: type[Family], estimates: Sequence[Tensor], picture: Path, size: tuple[int, int]) -> None:
    """Write the path of a picture. ``estimates``: of it alone. ``size``: its height and width in pixels."""
    folder = picture.parents[2] / FOLDER / picture.parent.name / picture.stem
    for call, image in enumerate(_decoded(pipe, family, estimates, size)):
        buffer = BytesIO()
        image.save(buffer, "PNG")
        save(folder / _name(call), buffer.getvalue())


def _decoded(pipe: Any, family: type[Family], latents: Sequence[Tensor], size: tuple[int, int]) -> Iterator[Any]:
    """The pipeline's latents, each of one picture, as pictures, one at a time. A VAE in half precision computes in
    float32, because SDXL's overflows."""
    import torch
    from PIL import Image

    from ..models import autoencoders, vae_factor

    vae, factor = pipe.vae, vae_factor(pipe)
    before = vae.dtype
    vae.to(torch.float32)
    try:
        for each in latents:
            x_0 = family.unpacked(each[None], size[0] // factor, size[1] // factor)
            with torch.inference_mode(), torch.autocast(vae.device.type, enabled=False):
                pixels = autoencoders.decode(vae, autoencoders.unscaled(x_0, autoencoders.about(vae)))[0]
            pixels = (pixels / 2 + 0.5).nan_to_num(0.5).clamp(0, 1).cpu()
            yield Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    finally:
        vae.to(before)


def _name(call: int) -> str:
    return f"{call:03d}.png"
