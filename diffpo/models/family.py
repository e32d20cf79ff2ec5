"""What all model families share, beside the forward process: the encoders, the VAE, where the features are."""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from samplers.prediction import guide

from ..common.errors import DiffpoError
from ..config import Model
from ..data.cache import content_key, module_key
from . import autoencoders, storage
from .file_header import is_one
from .file_parts import read_vae
from .kohya_names import Kohya
from .original import Piece
from .pretrained import dtype_option, local, readable
from .process import ForwardProcess
from .source import load_pipeline, source_of, vae_factor

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Family(ForwardProcess, ABC):
    """Everything that training needs from a model. A subclass defines how text becomes conditions and how the network
    is called, and states the facts below. A fact that it leaves out is unknown and never guessed: whatever needs it is
    refused with a message.

    Attributes:
        pipelines: the classes of diffusers' pipelines that it serves.
        network_class: the class of the trained part, in diffusers.
        component: the trained part's name in the pipeline, and its prefix in a LoRA file.
        lora_targets: the layers that a LoRA adapts unless the config names others.
        encoders, tokenizers: the parts of the pipeline that read text.
        clips: those of the encoders that `lora.text_encoders` adapts.
        without: options of the pipeline's class, for parts that are never loaded.
        repeated_blocks: the classes of the blocks that the network repeats; train.compile compiles each kind once.
        feature_blocks: the network's list of blocks, of which the first half gives its features.
        fsdp2: whether FSDP2 can shard the network.
        kohya: the format of its LoRA files in kohya's sd-scripts.
        comfyui: what stands before diffusers' names of layers in ComfyUI's LoRAs; ending in `_`, all dots are that.
        edits: whether `predict` takes the latents of a picture to edit, ``source`` (n, C, h, w).
        guidance_is_input: whether pipelines pass the guidance scale to the network instead of calling it twice.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
    network_class: ClassVar[str]
    component: ClassVar[str] = "transformer"
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    encoders: ClassVar[tuple[str, ...]] = ()
    tokenizers: ClassVar[tuple[str, ...]] = ()
    clips: ClassVar[tuple[str, ...]] = ()
    without: ClassVar[dict[str, Any]] = {}
    repeated_blocks: ClassVar[tuple[str, ...]] = ()
    feature_blocks: ClassVar[str | None] = None
    fsdp2: ClassVar[bool | None] = None
    kohya: ClassVar[Kohya | None] = None
    comfyui: ClassVar[str | None] = None
    edits: bool = False
    guidance_is_input: bool = False

    def __init__(self, settings: Model, precision: str = "no", resolution: int = 1024) -> None:
        """``resolution`` of the images, in pixels: some flows shift their timesteps by it."""
        self.settings, self.dtype = settings, DTYPES[precision]
        self.source = source_of(settings)
        self.source.require({self.component, *self.encoders, *(() if settings.vae else ("vae",))})
        self._configs: dict[str, dict[str, Any]] = {}
        self._read_schedule(self._config("scheduler"), resolution)
        grain = self._grain()
        if grain and resolution % grain:
            raise DiffpoError(
                f"data.resolution={resolution} does not work with {settings.path}: set it to a multiple of {grain} px"
            )
        self.pipe: Any = None
        self.text_in_step = False  # conditions hold tokens, which `embedded` makes embeddings of

    # ---- the network

    def load_network(self, device: Any = "cpu") -> torch.nn.Module:
        """The frozen network in the run's precision, in eval mode, kept and computed as the settings say."""
        network = self.source.module(self._class(), self.component, self.dtype)
        network.requires_grad_(False).eval()
        if self.settings.attention:
            storage.set_attention(network, self.settings.attention)
        if self.settings.base_weights != "full" or self.settings.offload:
            network = storage.keep(network, self.settings.base_weights, self.settings.offload, self.dtype)
        return network.to(device)

    def meta_network(self) -> torch.nn.Module:
        """The network with shapes and no weights, on the meta device."""
        config = self._config(self.component)
        with torch.device("meta"):
            network = torch.nn.Module.to(self._class().from_config(config), self.dtype)
        self.source.fits(self.component, network)
        return network

    def require_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """DiffpoError unless the network takes pictures of these (width, height), the buckets of a data set."""
        grain = self._grain()
        for width, height in sizes:
            if grain and (width % grain or height % grain):
                raise DiffpoError(
                    f"data.buckets=true gives pictures of {width}x{height} px, but {self.settings.path} takes "
                    f"multiples of {grain} px. Set data.resolution to 512 or more, where sides are multiples of 64 px"
                )

    def _class(self) -> Any:
        import diffusers

        return getattr(diffusers, self.network_class)

    def _config(self, part: str) -> dict[str, Any]:
        """The config.json of a part of the pipeline, or what stands for it."""
        if part not in self._configs:
            self._configs[part] = self.source.config(part)
        return self._configs[part]

    @abstractmethod
    def predict(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """(n, C, h, w), (n,) and conditions -> the network's output (n, C, h, w)."""

    @staticmethod
    def _user(cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """The user's taste, where the network takes one (objective/users.py)."""
        return {"user": cond["user"]} if "user" in cond else {}

    def guided(self, cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance of the network's outputs, as the pipeline computes it; 1 is none."""
        return guide(cond, uncond, guidance)

    def latent_shape(self, network: torch.nn.Module, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of a square image's latents."""
        side = resolution // self.vae_factor()
        return self.latent_channels(network.config), side, side

    def patch(self) -> int | None:
        """Latents per token, each way; None where any number of latents will do."""
        return self._config(self.component).get("patch_size", 2)

    def _grain(self) -> int | None:
        """A side has a multiple of so many pixels; None where any number will do."""
        patch = self.patch()
        return patch and patch * self.vae_factor()

    @staticmethod
    def latent_channels(config: Any) -> int:
        return config.in_channels

    # ---- facts of the network

    @classmethod
    def known_blocks(cls, need: str) -> tuple[str, ...]:
        """`repeated_blocks`; DiffpoError if they are not known, where ``need`` names the setting that needs them."""
        if not cls.repeated_blocks:
            raise DiffpoError(
                f"{need} is not possible: {cls.__name__}.repeated_blocks is not set, so the blocks of a "
                f"{cls.network_class} are not known"
            )
        return cls.repeated_blocks

    @classmethod
    def checkpointed_blocks(cls) -> tuple[str, ...]:
        """The classes of the modules that gradient checkpointing computes again; empty if they are not known."""
        return cls.repeated_blocks

    @classmethod
    def text_width(cls, network: torch.nn.Module) -> int:
        """The width of the text embedding that the network attends to, to which user tokens are added. DiffpoError if
        the network attends to none, if it masks the padding, or if that is not known."""
        raise DiffpoError(
            f"objective.users does not work with a {cls.network_class}, because {cls.__name__} does not define "
            f"text_width: set objective.users=false"
        )

    @classmethod
    def names_in_loras(cls, layers: Collection[str], config: Any) -> Iterator[tuple[str, tuple[Piece, ...]]]:
        """The names that LoRA files of other programs have for the network's ``layers``, dots as underscores, each with
        the layers that are stacked in it. None are known by default: files are then read by diffusers' names alone."""
        return iter(())

    # ---- features of the network: NCP-DPO's error and the latent scorer

    @classmethod
    def _blocks(cls, network: torch.nn.Module) -> Any:
        if cls.feature_blocks is None:
            raise DiffpoError(
                f"objective.error=perceptual and latent step scorers are not possible: {cls.__name__}.feature_blocks "
                f"is not set, so it is not known which blocks of a {cls.network_class} give features"
            )
        return getattr(network, cls.feature_blocks)

    @classmethod
    def stages(cls, network: torch.nn.Module) -> list[torch.nn.Module]:
        """The blocks whose outputs the latent scorer uses, in their order; nothing after the last one needs to run."""
        blocks = cls._blocks(network)
        return [blocks[max(0, len(blocks) // 4 - 1)], blocks[max(0, len(blocks) // 2 - 1)]]

    @staticmethod
    def hidden(output: Any) -> Tensor:
        """What a stage returns, as (n, channels, positions)."""
        tokens = output[-1] if isinstance(output, tuple) else output  # text first, where it has its own stream
        return tokens.transpose(1, 2)

    def cut(self, network: torch.nn.Module, middle: bool = False) -> None:
        """Take away what follows the network's first half. ``middle``: of a UNet, what follows the middle block, not
        the last down block. DiffpoError if there is no middle block."""
        if middle:
            raise DiffpoError(f"a {type(network).__name__} has no middle block: set objective.features=encoder")
        blocks = self._blocks(network)
        assert self.feature_blocks is not None  # noqa: S101 (else `_blocks` raises)
        setattr(network, self.feature_blocks, blocks[: max(1, len(blocks) // 2)])

    def features(self, network: torch.nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Of a network that was `cut`: its features (n, ...), with gradients by x_t."""
        seen: list[Tensor] = []
        last = self._blocks(network)[-1]
        hook = last.register_forward_hook(lambda _m, _i, out: seen.append(self.hidden(out)))
        try:
            self.predict(network, x_t, t, cond)
        finally:
            hook.remove()
        return seen[0]

    def text_features(self, cond: dict[str, Tensor]) -> list[Tensor]:
        """Every condition as (n, d) float32 in the order of their names: sequences are averaged over their tokens."""
        values = [cond[name].float() for name in sorted(cond)]
        return [value.mean(1) if value.ndim == 3 else value for value in values]

    # ---- text and images; the encoders are loaded for the caches and freed before the network comes

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

    def condition(self, text: dict[str, Tensor], micro_conditioning: Tensor) -> dict[str, Tensor]:
        """Text rows and (n, 6) sizes and crops -> what `predict` takes; most families ignore the sizes."""
        return text

    # ---- for `diffpo check`

    def meta_inputs(
        self, network: torch.nn.Module, n: int, resolution: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x_t, t and cond of the right shapes on the meta device."""
        x_t = torch.empty(n, *self.latent_shape(network, resolution), device="meta")
        return x_t, torch.zeros(n, dtype=torch.long, device="meta"), self.meta_cond(network, n)

    @abstractmethod
    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        """Conditions of n samples, of the largest shapes that they have, on the meta device."""

    def vae_factor(self) -> int:
        """Pixels per latent, each way."""
        return autoencoders.factor(self.vae_settings())

    def vae_settings(self) -> dict[str, Any]:
        from diffusers import AutoencoderKL

        if not self.settings.vae or is_one(self.settings.vae):  # a file has no config of its own
            return self._config("vae")
        with readable(self.settings.vae):
            return dict(AutoencoderKL.load_config(local(self.settings.vae)))

    # ---- a whole pipeline, for generation

    @classmethod
    def as_read(cls, pipe: Any, prompts: Sequence[str]) -> list[str]:
        """The prompts with what the pipeline puts around them before it counts and cuts their tokens."""
        return list(prompts)

    @classmethod
    def unpacked(cls, latents: Tensor, height: int, width: int) -> Tensor:
        """The pipeline's latents of a picture -> (n, C, ``height``, ``width``)."""
        return latents

    @classmethod
    def sample_size(cls, pipe: Any) -> int:
        """The latents' usual height and width."""
        return getattr(pipe, cls.component).config.sample_size

    @classmethod
    def painting(
        cls, pipe: Any, prompts: list[str], negative: str | None, noise: Tensor, guidance: float
    ) -> dict[str, Any]:
        """What the pipeline is called with, beside steps, generators and what it returns. ``noise``: (n, C, h, w)."""
        height, width = (side * vae_factor(pipe) for side in noise.shape[-2:])
        return {
            "prompt": prompts,
            "negative_prompt": negative and [negative] * len(prompts),  # None is not "": SDXL then uses zeros
            "latents": noise,
            "guidance_scale": guidance,
            "height": height,
            "width": width,
        }


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


def no_users(network: torch.nn.Module) -> DiffpoError:
    """Why a network takes no user tokens; see `Family.text_width`."""
    return DiffpoError(
        f"a {type(network).__name__} cannot use user tokens, because it takes no text embedding of fixed length: set "
        f"objective.users=false"
    )
