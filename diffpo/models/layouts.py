"""How a whole model in one file is laid out, by the names of the program that it came from (original.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..common.errors import DiffpoError
from . import original
from .flux_names import flux
from .recent_files import RECENT, UNET, VAE
from .sd3_names import sd3
from .unet_names import unet


class Layout(NamedTuple):
    """How a file of a family is laid out.

    Attributes:
        pipeline: the class of the pipeline that it becomes.
        parts: each part of the pipeline with the prefixes that its weights may have, beginning with the one that is
            written; the empty prefix means all weights that are of no other part. The network comes first.
        network: its state_dict and config -> its weights by the original's names; None: such files are not written.
        fits: whether a pipeline of that class is written like this.
        also: further classes of pipelines that it may become.
        unused: names in the network's part that belong to no weight of it.
        examples: pipelines that may lend the configs, where the file does not say which; empty: it does.
    """

    title: str
    pipeline: str
    parts: dict[str, tuple[str, ...]]
    network: Callable[[Mapping[str, Tensor], Any], original.State] | None
    fits: Callable[[Any], bool] = lambda pipe: True
    also: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()


_CLIP_L, _CLIP_G, _T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))


def _open_clip(pipe: Any) -> bool:
    """SD 2.x has open_clip's encoder, which computes the exact gelu."""
    return pipe.text_encoder.config.hidden_act == "gelu"


LAYOUTS = {
    "sd1": Layout(
        "Stable Diffusion 1.x",
        "StableDiffusionPipeline",
        {"unet": (UNET,), "vae": VAE, "text_encoder": ("cond_stage_model.transformer.",)},
        unet,
        lambda pipe: not _open_clip(pipe),
    ),
    "sd2": Layout(
        "Stable Diffusion 2.x",
        "StableDiffusionPipeline",
        {"unet": (UNET,), "vae": VAE, "text_encoder": ("cond_stage_model.model.",)},
        unet,
        _open_clip,
    ),
    "sdxl": Layout(
        "SDXL",
        "StableDiffusionXLPipeline",
        {
            "unet": (UNET,),
            "vae": VAE,
            "text_encoder": ("conditioner.embedders.0.transformer.",),
            "text_encoder_2": ("conditioner.embedders.1.model.",),
        },
        unet,
    ),
    "sd3": Layout(
        "Stable Diffusion 3",
        "StableDiffusion3Pipeline",
        {
            "transformer": (UNET, ""),
            "vae": VAE,
            "text_encoder": (_CLIP_L,),
            "text_encoder_2": (_CLIP_G,),
            "text_encoder_3": (_T5,),
        },
        sd3,
    ),
    "flux": Layout(
        "FLUX.1",
        "FluxPipeline",
        {"transformer": (UNET, ""), "vae": VAE[::-1], "text_encoder": (_CLIP_L,), "text_encoder_2": (_T5,)},
        flux,
    ),
}


LAYOUTS |= {
    kind: Layout(
        each.title,
        each.pipelines[0],
        each.parts,
        None,
        also=each.pipelines[1:],
        unused=each.unused,
        examples=each.examples,
    )
    for kind, each in RECENT.items()
}
WRITTEN = {kind: layout for kind, layout in LAYOUTS.items() if layout.network is not None}


def check_pipeline(pipeline: str) -> None:
    """DiffpoError if there is no original format for the pipeline's class."""
    if pipeline not in {layout.pipeline for layout in WRITTEN.values()}:
        known = ", ".join(layout.title for layout in WRITTEN.values())
        raise DiffpoError(
            f"a {pipeline} cannot be written as one file: such files are of {known}. Use --to merged, which writes a "
            f"folder"
        )


def kind(pipe: Any) -> str:
    """Which of `WRITTEN` a pipeline is written as."""
    check_pipeline(name := type(pipe).__name__)
    return next(kind for kind, layout in WRITTEN.items() if layout.pipeline == name and layout.fits(pipe))


def weights(layout: Layout, pipe: Any, parts: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Name in the file and tensor of all weights of the pipeline's ``parts``. DiffpoError for weights that have no name
    there."""
    network = next(iter(layout.parts))
    assert layout.network is not None  # noqa: S101 (of `WRITTEN`)
    for part in parts:
        module, prefix = getattr(pipe, part), layout.parts[part][0]
        state = module.state_dict()
        if part == network:
            found = layout.network(state, module.config)
        elif part == "vae":
            found = original.vae(state, module.config)
        elif prefix.endswith(".model."):
            found = original.open_clip(state)
        else:
            found = original.t5(state) if prefix == _T5 else original.clip(state)
        for name, value in found.items():
            yield prefix + name, value
