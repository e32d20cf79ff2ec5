"""What all model families share, beside the forward process and the encoders: the network, where its features are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from samplers.prediction import guide

from ..common.errors import DiffpoError
from ..config import Model
from ..data.encoders import source_condition
from . import storage
from .encoding import Encoding
from .kohya_names import Kohya
from .original import Piece
from .source import source_of, vae_factor

if TYPE_CHECKING:
    from PIL import Image

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Family(Encoding):
    """Everything that training needs from a model. A subclass defines how text becomes conditions and how the network
    is called, and states the facts below. A fact that it leaves out is unknown and never guessed: whatever needs it is
    refused with a message.

    Attributes: those of `Encoding`, and
        pipelines: the classes of diffusers' pipelines that it serves.
        network_class: the class of the trained part, in diffusers.
        lora_targets: the layers that a LoRA adapts unless the config names others.
        repeated_blocks: the classes of the blocks that the network repeats; train.compile compiles each kind once.
        feature_blocks: the network's list of blocks, of which the first half gives its features.
        fsdp2: whether FSDP2 can shard the network.
        kohya: the format of its LoRA files in kohya's sd-scripts.
        comfyui: what stands before diffusers' names of layers in ComfyUI's LoRAs; ending in `_`, all dots are that.
        edits: whether `predict` takes the latents of a picture to edit, ``source`` (n, C, h, w).
        several: whether these may be several pictures for one caption, (n, k, C, h, w); `sources_in`.
        reads_source: whether the text encoder sees them too.
        needs_source: whether it makes pictures of pictures alone, so that every caption needs one.
        singly: whether its pipeline makes other pictures of a batch than of each text alone.
        guidance_is_input: whether pipelines pass the guidance scale to the network instead of calling it twice.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
    network_class: ClassVar[str]
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    repeated_blocks: ClassVar[tuple[str, ...]] = ()
    feature_blocks: ClassVar[str | None] = None
    fsdp2: ClassVar[bool | None] = None
    kohya: ClassVar[Kohya | None] = None
    comfyui: ClassVar[str | None] = None
    edits: bool = False
    several: bool = False
    reads_source: bool = False
    needs_source: bool = False
    singly: bool = False
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

    def condition(self, text: dict[str, Tensor], micro_conditioning: Tensor) -> dict[str, Tensor]:
        """Text rows and (n, 6) sizes and crops -> what `predict` takes; most families ignore the sizes."""
        return text

    # ---- for `diffpo check`

    def meta_inputs(
        self, network: torch.nn.Module, n: int, resolution: int, sources: int = 0
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x_t, t and cond of the right shapes on the meta device. ``sources``: with so many pictures to edit, of which
        `needs_source` always has one, and a family at most as many as it takes."""
        x_t = torch.empty(n, *self.latent_shape(network, resolution), device="meta")
        sources = max(sources, self.needs_source) if self.edits else 0
        sources = sources if self.several else min(sources, 1)
        cond = self.meta_edits(network, n, sources) if self.reads_source else self.meta_cond(network, n)
        if sources:
            cond["source"] = source_condition([torch.empty_like(x_t)] * sources)
        return x_t, torch.zeros(n, dtype=torch.long, device="meta"), cond

    def meta_edits(self, network: torch.nn.Module, n: int, sources: int) -> dict[str, Tensor]:
        """`meta_cond` where captions are encoded with so many pictures each."""
        return self.meta_cond(network, n)

    @abstractmethod
    def meta_cond(self, network: torch.nn.Module, n: int) -> dict[str, Tensor]:
        """Conditions of n samples, of the largest shapes that they have, on the meta device."""

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

    @classmethod
    def editing(cls, pipe: Any, pictures: Sequence[Image.Image]) -> AbstractContextManager[dict[str, Any]]:
        """The pipeline's further options that let it edit ``pictures`` of the size of the result, for calls within
        the context."""
        return nullcontext({"image": pictures[0] if len(pictures) == 1 else list(pictures)})


def no_users(network: torch.nn.Module) -> DiffpoError:
    """Why a network takes no user tokens; see `Family.text_width`."""
    return DiffpoError(
        f"a {type(network).__name__} cannot use user tokens, because it takes no text embedding of fixed length: set "
        f"objective.users=false"
    )
