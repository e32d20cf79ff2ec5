"""`diffpo check --vram`: which settings should fit into a GPU of a given memory.

All numbers are computed from shapes: weights as they are stored, trained ones with gradients and moments, the outputs
of all layers that a backward pass needs, and the encoders while the caches are built. To these is added what shapes do
not say: `RESERVED` for the context and the kernels' workspace, and `SLACK` for what the allocator cannot use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import Config
from ..data.batches import portion
from ..data.groups import Groups
from .footprint import _amount, _weights, activations, encoder, members

if TYPE_CHECKING:
    import torch

    from ..models import Family

RESERVED, SLACK = 2**30, 0.1
LIVE = 4  # outputs of the VAE's largest size that are there at once: a residual block's input, and three within it


class Need(NamedTuple):
    """Bytes of the device while it trains, and while the caches are built; None: not known."""

    training: int | None
    caches: int | None

    @property
    def most(self) -> int | None:
        if self.training is None or self.caches is None:
            return None
        return max(self.training, self.caches)


def recommend(
    config: Config, groups: Groups | None, vram: float, say: Callable[[str], None], sources: int | None = None
) -> None:
    """Print what settings need, from the config's own on, each with one more concession, until ``vram`` GiB suffice.
    ``sources``: see `activations`."""
    room, fits = vram * 2**30, None
    say(f"settings for a GPU of {vram:g} GiB, computed from shapes (no GPU was measured):")
    half = _with(config, {"train.precision": "bf16"}) or config
    for overrides in ladder(config, tiles=caches(half, _family(half)) > room):
        changed = _with(config, overrides)
        if changed is None:
            continue
        need = needed(changed, members(groups), sources)
        said = " ".join(f"{key}={_plain(value)}" for key, value in overrides.items()) or "as in the config"
        if need.most is None:
            say("  not known for this model: its family does not say which blocks it repeats")
            return
        assert need.training is not None and need.caches is not None  # noqa: S101 (see `Need.most`)
        say(f"  {_amount(need.training):>9} training, {_amount(need.caches):>9} caches   {said}")
        if need.most <= room:
            fits = said
            break
    if fits is None:
        say("  nothing fits: lower data.resolution, or train a LoRA of a smaller model")
    elif fits != "as in the config":
        say(f"recommended: {fits}")


def ladder(config: Config, tiles: bool) -> Iterator[dict[str, Any]]:
    """Overrides, those that cost least time first, each with all before it but where it replaces one. ``tiles``:
    of the VAE too, which only the caches need."""
    found: dict[str, Any] = {}
    yield dict(found)
    if config.train.precision == "no":
        found["train.precision"] = "bf16"
        yield dict(found)
    if config.lora is None:
        found["train.optimizer"] = "bitsandbytes.optim.AdamW8bit"
        yield dict(found)
    if not config.train.gradient_checkpointing:
        found["train.gradient_checkpointing"] = True
        yield dict(found)
    if config.train.batch_size > 1:
        found |= {"train.batch_size": 1, "train.accumulation": config.train.batch_size * config.train.accumulation}
        yield dict(found)
    if tiles and config.model.vae_tile is None and config.data.resolution > 512:
        found["model.vae_tile"] = 512
        yield dict(found)
    if config.lora is None:
        found["train.optimizer"] = "bitsandbytes.optim.PagedAdamW8bit"
        yield dict(found)
        return
    if config.lora.kind == "lora":
        yield found | {"model.base_weights": "fp8"}
    yield found | {"model.offload": True}
    if config.lora.kind == "lora":
        yield found | {"model.base_weights": "fp8", "model.offload": True}
        yield found | {"model.base_weights": "nf4"}


def _with(config: Config, overrides: dict[str, Any]) -> Config | None:
    """The config with ``overrides``; None if they do not go with the rest of it."""
    from pydantic import ValidationError

    settings = config.model_dump(mode="json")
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        settings[section][name] = value
    try:
        return Config.model_validate(settings)
    except ValidationError:
        return None


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def needed(config: Config, images: int, sources: int | None = None) -> Need:
    """What ``config`` needs; ``images``: of a group; ``sources``: see `activations`."""
    family = _family(config)
    network = family.meta_network()
    weights = _weights(config, family, network)
    kept = activations(family, network, images * config.train.batch_size, config.data, config.train, sources)
    training = None if kept is None else _whole(weights.frozen + weights.trained + kept)
    if training is not None and (config.objective.on_policy or not config.data.cache_latents):
        _, vae, picture = encoding(family, config.data.resolution)
        training += vae + picture
    return Need(training, caches(config, family))


def caches(config: Config, family: Family) -> int:
    """Bytes while the caches are built: all encoders, and what the VAE holds while it encodes. Offloaded text encoders
    are there one at a time, and not beside the VAE's work."""
    encoders, vae, picture = encoding(family, config.data.resolution)
    if config.model.offload:
        return _whole(vae + max(*encoders, picture))
    return _whole(vae + sum(encoders) + picture)


def _family(config: Config) -> Family:
    from .. import models

    return models.load(config.model, config.train.precision, config.data.resolution)


def _whole(size: int) -> int:
    return round(size * (1 + SLACK)) + RESERVED


def encoding(family: Family, resolution: int) -> tuple[list[int], int, int]:
    """Bytes of each text encoder, of the VAE (float32), and of what the VAE holds while it encodes."""
    import torch

    from ..models import autoencoders

    encoders = [encoder(family, name) for name in family.encoders]
    sizes = [sum(p.numel() for p in each.parameters()) * family.dtype.itemsize for each in encoders]
    settings = family.vae_settings()
    with torch.device("meta"):
        vae = autoencoders.vae_class(settings).from_config(settings)
    tile = min(family.settings.vae_tile or resolution, resolution)
    at_once = portion(resolution, resolution)
    largest = _largest(vae, torch.empty(at_once, 3, tile, tile, device="meta"))
    return sizes, sum(each.numel() for each in vae.parameters()) * 4, LIVE * largest


def _largest(vae: torch.nn.Module, pixels: torch.Tensor) -> int:
    """Bytes of the largest output of a layer of the encoder."""
    import torch

    from ..models import autoencoders

    found = 0

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        nonlocal found
        if isinstance(output, torch.Tensor):
            found = max(found, output.numel() * output.element_size())

    hooks = [module.register_forward_hook(note) for module in vae.modules()]
    with torch.no_grad():
        autoencoders.encode(vae, pixels)
    for hook in hooks:
        hook.remove()
    return found
