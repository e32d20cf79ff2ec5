"""LoRA, DoRA and LoKr by peft: adding an adapter to a network, its weights, and writing the diffusers file."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import DiffpoError
from ..common.files import write_atomic
from ..common.postponed import absent
from ..config import Lora
from . import text_names
from .lora_file import HEADER, sorted_header
from .sharding import like, whole

if TYPE_CHECKING:
    import torch

# names of the policy's adapter, of a moving reference's and of the behaviour policy's
ADAPTER, REFERENCE, BEHAVIOUR = "default", "reference", "behaviour"


def add_lora(network: torch.nn.Module, lora: Lora, targets: Sequence[str], seed: int = 0) -> list[torch.nn.Parameter]:
    """Add a fresh adapter of ``lora.kind`` (its change is 0, so the output is unchanged) and return its parameters,
    float32 whatever the base is."""
    import torch
    from peft import LoKrConfig, LoraConfig
    from peft.tuners.lora import LoraLayer

    alpha, chosen = lora.whole_alpha, list(lora.targets or targets)
    patterns: dict[str, Any] = {"rank_pattern": _patterns(lora.rank_pattern), "alpha_pattern": _patterns(lora.alphas)}
    if lora.kind == "lokr":
        config = LoKrConfig(r=lora.rank, alpha=alpha, target_modules=chosen, **patterns)
    else:
        config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=chosen, **patterns)
        config.init_lora_weights, config.use_dora = "gaussian", lora.kind == "dora"
    device = next(network.parameters()).device  # peft takes that of each layer's weight, which may be offloaded
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject(network, config, ADAPTER)
        except (ValueError, TypeError) as error:
            raise DiffpoError(f"lora.targets {config.target_modules} match no layer of the model: {error}") from None
        _all_used(lora, tuned_layers(network))
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        rounded = any(parameter.itemsize == 1 for parameter in parameters)  # peft gives them the base's fp8
        for parameter in parameters:
            parameter.data = parameter.data.to(device, torch.float32)
        if rounded:
            torch.manual_seed(seed)
        for layer in network.modules():
            if isinstance(layer, LoraLayer) and rounded:
                layer.reset_lora_parameters(ADAPTER, config.init_lora_weights)
            if isinstance(layer, LoraLayer) and config.use_dora:
                _measure(layer)
    tuned = tuned_layers(network).items() if lora.kind == "dora" else ()
    if coarse := [name for name, layer in tuned if is_coarse(layer.get_base_layer())]:
        raise DiffpoError(
            f"lora.kind=dora would compute the norms of {coarse[0]}, a convolution, in half precision, which is too "
            f"coarse: set train.precision=no, or lora.targets to linear layers"
        )
    return parameters


def _whole(number: float) -> float:
    """Without a decimal point where it has no decimals, as files have it."""
    return number if number % 1 else int(number)


def _patterns(by_name: dict[str, Any]) -> dict[str, Any]:
    return {re.escape(name): _whole(number) for name, number in by_name.items()}


def _all_used(lora: Lora, layers: Iterable[str]) -> None:
    """DiffpoError for a pattern that names no adapted layer."""
    layers = list(layers)
    for key in ("rank_pattern", "alpha_pattern"):
        for name in getattr(lora, key):
            if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
                ends = sorted({layer.rpartition(".")[2] for layer in layers})
                raise DiffpoError(
                    f"lora.{key} names {name}, which is no adapted layer: correct it, or add it to lora.targets. "
                    f"Adapted are layers that end in {', '.join(ends[:8])}"
                )


def by_rate(network: torch.nn.Module, parameters: list[torch.nn.Parameter], lora: Lora | None, lr: float) -> list[Any]:
    """What an optimiser gets: the parameters, or for LoRA+ (Hayou et al. 2024, arXiv 2402.12354) those of B apart,
    whose learning rate is ``lr`` times `Lora.b_lr_ratio`."""
    if lora is None or lora.b_lr_ratio == 1:
        return parameters
    own = {id(value) for name, value in adapter_parameters(network).items() if ".lora_B." in name}
    first, second = ([p for p in parameters if (id(p) in own) == is_b] for is_b in (False, True))
    return [{"params": first}, {"params": second, "lr": lr * lora.b_lr_ratio}]


def is_coarse(layer: torch.nn.Module) -> bool:
    """Would peft take a DoRA's norms of this layer's weight in half precision? It does so of convolutions."""
    import torch

    return layer.weight.dim() > 2 and layer.weight.dtype != torch.float32


def _measure(layer: Any) -> None:
    """Set a fresh DoRA's magnitudes to the norms of the base's weight in float32: those that peft took are of the
    base's precision, and in the forward pass, where they are float32, would not quite cancel."""
    import torch

    dora, weight = layer.lora_magnitude_vector[ADAPTER], layer.get_base_layer().weight.detach().float()
    dora.weight.data = dora.get_weight_norm(weight, torch.zeros_like(weight), 1)


def inject(network: torch.nn.Module, config: Any, name: str) -> None:
    """Give the network a fresh adapter ``name`` by peft's ``config``."""
    from peft import inject_adapter_in_model

    with _without_bitsandbytes():
        if hasattr(network, "add_adapter"):  # this also updates diffusers' own switches
            network.add_adapter(config, adapter_name=name)
        else:  # PixArt, DiT
            inject_adapter_in_model(config, network, name)
    for layer in tuned_layers(network).values():
        layer.training = network.training  # in training mode a LoKr draws random numbers; what it holds stays as it is


@contextlib.contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """If no layer is bitsandbytes' yet, none can be, and peft need not import it to look: that takes a second."""
    from peft import import_utils

    asks: list[Any] = [getattr(import_utils, f"is_bnb_{which}available", None) for which in ("", "4bit_")]
    forget = [ask.cache_clear for ask in asks if hasattr(ask, "cache_clear")]  # what it found before
    with absent("bitsandbytes"):
        for each in forget:
            each()
        yield
    for each in forget:
        each()


def tuned_layers(network: torch.nn.Module) -> dict[str, Any]:
    """The layers that hold adapters, by their names in the network without them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def adapter_parameters(network: torch.nn.Module, adapter: str = ADAPTER) -> dict[str, torch.nn.Parameter]:
    """The parameters of one adapter, by names without the adapter's name."""
    own = re.compile(rf"(\.(?:lora|lokr)_\w+)\.{re.escape(adapter)}(?=\.|$)")
    found = {}
    for name, parameter in network.named_parameters():
        short, count = own.subn(r"\1", name)
        if count:  # peft's files keep the old name of a DoRA's magnitudes
            found[short.removesuffix(".weight") if ".lora_magnitude_vector." in short else short] = parameter
    return found


def lora_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights on the CPU, by peft's names. Of a sharded network: to be called by all processes alike."""
    state = whole({name: parameter.detach() for name, parameter in adapter_parameters(network).items()})
    return {name: value.cpu().contiguous() for name, value in state.items()}


def set_lora_state(network: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put `lora_state` back. DiffpoError unless it has all weights of this adapter, in their shapes, and no others."""
    import torch

    here = adapter_parameters(network)
    if lost := sorted(here.keys() ^ state.keys()):
        raise DiffpoError(
            f"the LoRA does not fit the model: {len(lost)} weights are in only one of the two, e.g. {lost[0]}"
        )
    for name, parameter in here.items():
        if state[name].shape != parameter.shape:
            shapes = f"{tuple(state[name].shape)}, but the model needs {tuple(parameter.shape)}"
            raise DiffpoError(f"the LoRA does not fit the model: {name} is {shapes}")
    with torch.no_grad():
        for name, parameter in here.items():
            parameter.copy_(like(state[name], parameter.detach()))


def save_lora(
    path: Path,
    network: torch.nn.Module,
    component: str,
    about: dict[str, Any],
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write ``path`` so that `pipe.load_lora_weights` reads it with the right rank, alpha and targets. ``state`` is the
    network's `lora_state`, taken before where only one process saves a sharded one."""
    from safetensors.torch import save

    config = network.peft_config[ADAPTER]
    # what differs from LoraConfig's defaults and no more: older and newer versions of peft know other fields
    alpha = "alpha" if config.peft_type == "LOKR" else "lora_alpha"
    adapter = {"r": config.r, alpha: getattr(config, alpha), "target_modules": sorted(config.target_modules)}
    if getattr(config, "use_dora", False):
        adapter["use_dora"] = True
    adapter |= {key: value for key in ("rank_pattern", "alpha_pattern") if (value := getattr(config, key))}
    adapter = {f"{component}.{k}": v for k, v in adapter.items()} | text_names.settings(network, config)
    header = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapter, sort_keys=True),
        HEADER: json.dumps(about, sort_keys=True),
    }
    state = lora_state(network) if state is None else state
    content = save(text_names.in_file(component, state), header)
    write_atomic(path, sorted_header(content))


def network_of(pipe: Any) -> torch.nn.Module:
    """The part of a pipeline that LoRAs adapt."""
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
