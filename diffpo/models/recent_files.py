"""Networks in one file of the families whose text encoders are language models, as ComfyUI has them.

Such a file has the network, and perhaps the VAE. All else is that of the pipeline that `model.config` names. The names
of the weights do not say whose they are: Z-Image and its Turbo, Qwen-Image and Qwen-Image-Edit have the same.
"""

from __future__ import annotations

import re
from typing import NamedTuple

UNET = "model.diffusion_model."
VAE = ("first_stage_model.", "vae.")
START = rf"^({re.escape(UNET)})?"


class Recent(NamedTuple):
    """How a network's file is recognised and read.

    Attributes:
        title: of the family.
        mark: a regular expression that a name in it matches, behind the prefix.
        pipelines: the classes of the pipelines that have this network.
        encoders: how many text encoders these have.
        vae: the prefixes of the VAE's weights, if diffusers can read them.
        unused: names in the part of weights that the network does not have.
        examples: repositories with such pipelines.
    """

    title: str
    mark: str
    pipelines: tuple[str, ...]
    examples: tuple[str, ...]
    encoders: int = 1
    vae: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, tuple[str, ...]]:
        """As of `layouts.Layout`."""
        texts = [f"text_encoder{'' if number == 1 else f'_{number}'}" for number in range(1, self.encoders + 1)]
        return {"transformer": (UNET, ""), "vae": self.vae, **dict.fromkeys(texts, ())}


RECENT = {
    "chroma": Recent(
        "Chroma", r"distilled_guidance_layer\.in_proj\.", ("ChromaPipeline",), ("lodestones/Chroma1-HD",), vae=VAE
    ),
    "flux2": Recent(
        "FLUX.2",
        r"single_stream_modulation\.lin\.",
        ("Flux2Pipeline", "Flux2KleinPipeline"),
        ("black-forest-labs/FLUX.2-dev", "black-forest-labs/FLUX.2-klein-base-4B"),
    ),
    "z_image": Recent(
        "Z-Image",
        r"cap_pad_token$",
        ("ZImagePipeline",),
        ("Tongyi-MAI/Z-Image", "Tongyi-MAI/Z-Image-Turbo"),
        vae=VAE,
        unused=("norm_final.weight",),
    ),
    "lumina2": Recent(
        "Lumina-Image 2.0",
        r"cap_embedder\.1\.weight$",
        ("Lumina2Pipeline",),
        ("Alpha-VLLM/Lumina-Image-2.0",),
        vae=VAE,
        unused=("norm_final.weight",),
    ),
    "qwen_image": Recent(
        "Qwen-Image",
        r"transformer_blocks\.0\.img_mod\.1\.weight$",
        ("QwenImagePipeline", "QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
        ("Qwen/Qwen-Image", "Qwen/Qwen-Image-Edit-2511"),
        unused=("__index_timestep_zero__",),
    ),
    "hidream": Recent(
        "HiDream-I1",
        r"double_stream_blocks\.0\.block\.",
        ("HiDreamImagePipeline",),
        ("HiDream-ai/HiDream-I1-Full",),
        encoders=4,
        vae=VAE,
    ),
    "krea2": Recent("Krea 2", r"txtfusion\.", ("Krea2Pipeline",), ("a folder of Krea2Pipeline",)),
    "sana": Recent(
        "Sana",
        r"attention_y_norm\.weight$",
        ("SanaPipeline",),
        ("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",),
        unused=("pos_embed", "y_embedder.y_embedding"),
    ),
}
