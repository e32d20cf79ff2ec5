"""Scorers that judge a picture while it is being sampled: noisy latents, an x_0 estimate and a time in, a number out.

`load` takes a folder written by `diffpo train-scorer` (a step-aware preference model over pictures, pixel.py, or
one over latents, latent.py), or the number of an ordinary scorer such as ``shapes.total``. That is computed from the
decoded x_0 estimate and does not depend on the time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...common.errors import DiffpoError
from ...common.text import read_text
from ...weights.header import known
from .. import is_outside, is_url

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

ABOUT = "scorer.json"


class StepScorer(Protocol):
    """``score`` gives (n,) float32 on x_0's device, without gradients; higher is better. The scorers that `diffpo
    train-scorer` trains have ``rate`` too, the same with gradients by the latents.

    x_t and x_0 (n, C, h, w): scaled latents at time t and the estimate of the clean ones from them; t (n,) integers,
    0 for finished pictures (then x_t is x_0); captions: n texts; cond: what `family.predict` takes, n rows.
    ``needs_vae``: `family.decode` is called, so the VAE must not be freed.
    """

    needs_vae: bool

    def score(self, x_t: Tensor, x_0: Tensor, t: Tensor, captions: Sequence[str], cond: dict[str, Tensor]) -> Tensor:
        """DiffpoError that names scorer and prompt if a number is not finite."""


def is_folder(spec: str) -> bool:
    return (
        "=" not in spec
        and not is_url(spec)
        and not is_outside(spec)
        and (Path(spec).expanduser().is_dir() or "/" in spec)
    )


def read_about(folder: Path) -> dict[str, Any]:
    """What loading needs of what a scorer's ``save`` wrote into ``folder``: `known` values, sizes, one switch."""
    try:
        about = json.loads(read_text(folder / ABOUT))
        if about["kind"] not in ("pixel", "latent"):
            raise ValueError(f"kind {about['kind']!r}")
        if about["kind"] == "pixel":
            return {"kind": "pixel", "time_aware": bool(about["time_aware"])}
        sizes = about["head"]
        image, texts, width = sizes["image"], sizes["texts"], sizes["width"]
        if not all(type(size) is int and 0 < size <= 2**16 for size in (image, width, *texts)):
            raise ValueError("its sizes are not numbers of features")
        head = {"image": image, "texts": texts, "width": width}
        return {"kind": "latent", "base": known({"base": about["base"]})["base"], "head": head}
    except OSError as error:
        raise DiffpoError(
            f"there is no step scorer in {folder}: cannot read {ABOUT} ({error.strerror}); it is written when `diffpo "
            "train-scorer` ends"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DiffpoError(f"{folder / ABOUT} does not describe a step scorer ({error!r})") from None


def read_weights(module: nn.Module, path: Path) -> None:
    """Put a safetensors file's weights into ``module``; DiffpoError if the file is damaged or does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        module.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DiffpoError(
            f"cannot read the step scorer {path}: {reason}. Train it again with `diffpo train-scorer`"
        ) from error


def finite(scores: Tensor, name: str, captions: Sequence[str]) -> Tensor:
    """(n,) float32; DiffpoError that names the scorer and the first prompt whose number is none."""
    scores = scores.float()
    if tuple(scores.shape) != (len(captions),):
        raise DiffpoError(
            f"the scorer {name} gave numbers of shape {tuple(scores.shape)} for {len(captions)} pictures, the first of "
            f"the prompt {captions[0]!r}; it must give one each"
        )
    if not scores.isfinite().all():
        place = int((~scores.isfinite()).nonzero()[0])
        raise DiffpoError(
            f"the scorer {name} gave {scores[place].item()} for the prompt {captions[place]!r}: nothing can be "
            "preferred by it; leave out that prompt or choose another scorer"
        )
    return scores


def pictures(pixels: Tensor) -> list[Image.Image]:
    """(n, 3, H, W) in [-1, 1] -> PIL pictures, as a pipeline's last step makes them."""
    from PIL import Image

    array = (pixels.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray((each * 255).round().astype("uint8")) for each in array]
