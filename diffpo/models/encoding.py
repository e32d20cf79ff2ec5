"""A family's text encoders and VAE: loaded for the caches, and freed before the network comes."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..common.errors import DiffpoError
from ..config import Model
from ..data.cache import content_key, module_key
from . import autoencoders
from .file_header import is_one
from .file_parts import read_vae
from .pretrained import dtype_option, local, readable
from .process import ForwardProcess
from .source import load_pipeline

if TYPE_CHECKING:
    from PIL import Image


class Encoding(ForwardProcess, ABC):
    """The parts of a pipeline that make text and images into what the network reads.

    Attributes:
        component: the trained part's name in the pipeline, and its prefix in a LoRA file.
        encoders, tokenizers: the parts of the pipeline that read text.
        clips: those of the encoders that `lora.text_encoders` adapts.
        without: options of the pipeline's class, for parts that are never loaded.
        pipe: the pipeline with what is loaded of it.
        text_in_step: whether conditions hold tokens, which `embedded` makes embeddings of.
    """

    component: ClassVar[str] = "transformer"
    encoders: ClassVar[tuple[str, ...]] = ()
    tokenizers: ClassVar[tuple[str, ...]] = ()
    clips: ClassVar[tuple[str, ...]] = ()
    without: ClassVar[dict[str, Any]] = {}
    pipe: Any = None
    text_in_step = False
    settings: Model
    dtype: torch.dtype
    source: Any
    _configs: dict[str, dict[str, Any]]

    def load_encoders(self, device: Any = "cpu") -> None:
        """Text encoders in the run's precision; the VAE in float32, because SDXL's overflows in half precision."""
        without = {self.component: None, **self.without}
        place = "cpu" if self.settings.offload else device
        self.pipe = load_pipeline(self.settings, str(self.dtype).split(".")[1], place, vae=self._vae(), **without)
        self.vae_config = autoencoders.about(self.pipe.vae)  # outlives the VAE
        if self.settings.vae_tile:
            _set_tile(self.pipe.vae, self.settings.vae_tile, self.vae_factor())
        if self.settings.offload:
            self.pipe.vae.to(device)
            for name in self.encoders:
                _visit(getattr(self.pipe, name), torch.device(device))
        for name in (*self.encoders, "vae"):
            getattr(self.pipe, name).requires_grad_(False).eval()

    def _vae(self) -> torch.nn.Module:
        path, kind = self.settings.vae, autoencoders.vae_class(self.vae_settings())
        if not path:
            return self.source.module(kind, "vae", torch.float32)
        if is_one(path):
            return read_vae(path, self.source.name_or_path)
        with readable(path):
            return kind.from_pretrained(local(path), **dtype_option(torch.float32))

    def free_encoders(self, keep_vae: bool = False) -> None:
        for name in (*self.encoders, *(() if keep_vae else ("vae",))):
            setattr(self.pipe, name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def text_hash(self) -> str:
        """A hash of all that an embedding depends on but the caption. The number of tokens depends on the pipeline's
        class, and the unconditional embedding on its options."""
        options = {name: value for name, value in self.pipe.config.items() if isinstance(value, (bool, int, float))}
        tokenizers = [getattr(self.pipe, name) for name in self.tokenizers]
        words: list[Any] = []
        for each in tokenizers:
            found = getattr(each, "tokenizer", each)  # of a processor
            chat = getattr(each, "chat_template", None)
            words.append((sorted(found.get_vocab().items()), found.model_max_length, *([chat] if chat else [])))
        weights = [module_key(getattr(self.pipe, name)) for name in self.encoders]
        return content_key(type(self.pipe).__name__, sorted(options.items()), words, weights, str(self.dtype))

    def vae_hash(self) -> str:
        weights, tile = module_key(self.pipe.vae), self.settings.vae_tile
        return content_key(weights, tile) if tile else weights

    @abstractmethod
    def encode_text(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        """One row per caption; None is the unconditional embedding that sampling uses with guidance."""

    def encode_edits(
        self, captions: Sequence[str | None], pictures: Sequence[Sequence[Image.Image]]
    ) -> dict[str, Tensor]:
        """`encode_text` by encoders that see the pictures that each caption is about too (`Family.reads_source`): one,
        or as many for each caption (`Family.several`)."""
        raise NotImplementedError

    # ---- text encoders that are trained

    def train_text(self) -> None:
        """From now on conditions are `tokens`. DiffpoError if the family does not say how to embed them."""
        if not self.clips:
            raise DiffpoError(
                f"lora.text_encoders does not work with a {type(self).__name__} (its clips is not set): set "
                f"lora.text_encoders=false"
            )
        self.text_in_step = True

    def load_clips(self, device: Any) -> dict[str, torch.nn.Module]:
        """The text encoders that are adapted, frozen and in the run's precision."""
        parts = [name for name, value in self.source.index().items() if isinstance(value, list) and value[0]]
        without = {name: None for name in parts if name not in self.clips} | self.without
        pipe = load_pipeline(self.settings, str(self.dtype).split(".")[1], device, **without)
        return {name: getattr(pipe, name).requires_grad_(False).eval() for name in self.clips}

    def tokens(self, captions: Sequence[str | None]) -> dict[str, Tensor]:
        """`encode_text`, and beside it the tokens ``ids_NAME`` (n, length) for each of `clips`."""
        found, texts = self.encode_text(captions), [caption or "" for caption in captions]
        for name in self.clips:
            tokenizer = getattr(self.pipe, name.replace("text_encoder", "tokenizer"))
            length = tokenizer.model_max_length
            ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            found[f"ids_{name}"] = ids.input_ids
        return found

    def embedded(self, network: torch.nn.Module, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """``cond`` with the embeddings that the network's own text encoders give its tokens. An
        absent caption keeps its constant embedding if that is all zeros."""
        ids = {name: cond[f"ids_{name}"] for name in self.clips}
        rest = {name: value for name, value in cond.items() if not name.startswith("ids_")}
        for name, value in self.embed(network.text_encoders, ids, rest).items():
            zeros = (rest[name] == 0).flatten(1).all(1).reshape(-1, *[1] * (value.dim() - 1))
            rest[name] = torch.where(zeros, rest[name].to(value.dtype), value)
        return rest

    def embed(self, encoders: Any, ids: dict[str, Tensor], frozen: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of the conditions depends on the `clips`, for tokens by encoder; ``frozen``: the base's conditions."""
        raise NotImplementedError

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> dict[str, Tensor]:
        """(n, 3, H, W) in [-1, 1] -> ``mean`` and ``logvar`` of the posterior, (n, C, h, w) float32, unscaled."""
        with torch.autocast(self.pipe.vae.device.type, enabled=False):
            return autoencoders.encode(self.pipe.vae, pixels.to(self.pipe.vae.device, torch.float32))

    def scale_latents(self, latents: Tensor) -> Tensor:
        """Posterior samples -> x_0, the variance that the network was trained on."""
        return autoencoders.scaled(latents, self.vae_config)

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """(n, C, h, w) scaled latents -> pixels (n, 3, H, W) float32, about [-1, 1]; the VAE must still be there."""
        return self.decoded(x_0)

    def decoded(self, x_0: Tensor) -> Tensor:
        """`decode` with gradients by x_0."""
        latents = autoencoders.unscaled(x_0, self.vae_config)
        with torch.autocast(self.pipe.vae.device.type, enabled=False):
            return autoencoders.decode(self.pipe.vae, latents)

    def vae_factor(self) -> int:
        """Pixels per latent, each way."""
        return autoencoders.factor(self.vae_settings())

    def vae_settings(self) -> dict[str, Any]:
        from diffusers import AutoencoderKL

        if not self.settings.vae or is_one(self.settings.vae):  # a file has no config of its own
            return self._config("vae")
        with readable(self.settings.vae):
            return dict(AutoencoderKL.load_config(local(self.settings.vae)))

    def _config(self, part: str) -> dict[str, Any]:
        """The config.json of a part of the pipeline, or what stands for it."""
        if part not in self._configs:
            self._configs[part] = self.source.config(part)
        return self._configs[part]


def _visit(encoder: torch.nn.Module, device: torch.device) -> None:
    """Let ``encoder`` be on the ``device`` only while it computes."""
    encoder.register_forward_pre_hook(lambda module, _: module.to(device) and None)
    encoder.register_forward_hook(lambda module, _, output: module.to("cpu") and None)


def _set_tile(vae: Any, pixels: int, factor: int) -> None:
    """Let the VAE work in tiles, by diffusers' own means. DiffpoError if it has none for tiles of a size."""
    if not hasattr(vae, "tile_latent_min_size") or not hasattr(vae, "tile_sample_min_size"):
        raise DiffpoError(f"model.vae_tile does not work with a {type(vae).__name__}: set model.vae_tile=null")
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = pixels, pixels // factor
