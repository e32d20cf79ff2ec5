"""LoRA, DoRA and LoKr by peft: adding them, and writing and reading the diffusers file. Other forms: lora_forms.py."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import DiffpoError
from ..common.text import plain, read_text
from ..config import Lora
from ..models.identity import base_identity, same_base
from .header import known

if TYPE_CHECKING:
    import torch

    from .lora_change import Change, Changes

FILE_NAME = "pytorch_lora_weights.safetensors"  # diffusers looks for this name in a folder
PEFT_FILE_NAME = "adapter_model.safetensors"  # and peft for this one
USERS_FILE_NAME = "user_tokens.safetensors"  # beside it, if the run trained with users (users.py)
HEADER = "diffpo"  # our key in the safetensors header, beside diffusers' lora_adapter_metadata
ADAPTER = "default"


def add_lora(network: torch.nn.Module, lora: Lora, targets: Sequence[str], seed: int = 0) -> list[torch.nn.Parameter]:
    """Add a fresh adapter of ``lora.kind`` (its change is 0, so the output is unchanged) and return its parameters,
    float32 whatever the base is."""
    import torch
    from peft import LoKrConfig, LoraConfig
    from peft.tuners.lora import LoraLayer

    alpha = lora.scale_alpha if lora.scale_alpha % 1 else int(lora.scale_alpha)
    chosen = list(lora.targets or targets)
    if lora.kind == "lokr":
        config = LoKrConfig(r=lora.rank, alpha=alpha, target_modules=chosen)
    else:
        config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=chosen, init_lora_weights="gaussian")
        config.use_dora = lora.kind == "dora"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject(network, config, ADAPTER)
        except (ValueError, TypeError) as error:
            raise DiffpoError(f"lora.targets {config.target_modules} fit no layer of the model: {error}") from None
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        rounded = any(parameter.itemsize == 1 for parameter in parameters)  # peft gives them the base's fp8
        for parameter in parameters:
            parameter.data = parameter.data.float()
        if rounded:
            torch.manual_seed(seed)
        for layer in network.modules():
            if isinstance(layer, LoraLayer) and rounded:
                layer.reset_lora_parameters(ADAPTER, config.init_lora_weights)
            if isinstance(layer, LoraLayer) and config.use_dora:
                _measure(layer)
    tuned = tuned_layers(network).items() if lora.kind == "dora" else ()
    if coarse := [name for name, layer in tuned if _is_coarse(layer.get_base_layer())]:
        raise DiffpoError(
            f"lora.kind=dora takes the norms of {coarse[0]}, a convolution, in half precision, which is too coarse: "
            f"set train.precision=no, or lora.targets to linear layers"
        )
    return parameters


def _is_coarse(layer: torch.nn.Module) -> bool:
    """Would peft take a DoRA's norms of this layer's weight in half precision? It does so of convolutions."""
    import torch

    return layer.weight.dim() > 2 and layer.weight.dtype != torch.float32


def _measure(layer: Any) -> None:
    """Set a fresh DoRA's magnitudes to the norms of the base's weight in float32: those that peft took are of the
    base's precision, and in the forward pass, where they are float32, would not quite cancel."""
    import torch

    dora, weight = layer.lora_magnitude_vector[ADAPTER], layer.get_base_layer().weight.detach().float()
    dora.weight.data = dora.get_weight_norm(weight, torch.zeros_like(weight), 1)


def start_from(network: torch.nn.Module, lora: Lora) -> None:
    """Give the fresh adapter of `add_lora` the weights of the LoRA ``lora.start``, a file of any form (lora_forms.py).
    DiffpoError if it is of another model, or has another kind, rank, alpha or other layers than ``lora`` asks for."""
    from . import lora_change, lora_forms, lora_names

    path = lora_file(lora.start)
    _, about = read_lora(path)
    if "base" in about and not same_base(about["base"], base_identity(network)):
        raise DiffpoError(
            f"lora.start={path} was trained on another base model: {plain(about['base'].get('name', 'unknown'), 200)}"
        )
    try:
        ((_, changed),) = lora_forms.read(path, {"network": network}).items()
    except DiffpoError as error:
        raise DiffpoError(
            f"lora.start: {error}. Training goes on from what a LoRA does to the network alone: one that also adapts "
            f"text encoders can be merged first (diffpo export --to merged)"
        ) from None
    layers = lora_change.by_layer(changed)
    kind = lora_change.kind_of(layers)
    if kind is None:
        raise DiffpoError(
            f"lora.start={path} is no plain LoRA, DoRA or LoKr of whole layers, so it cannot be trained on; merge it "
            f"(diffpo export --to merged), and train a LoRA on what comes out"
        )
    if kind != lora.kind:
        raise DiffpoError(f"lora.start={path} has kind {kind}, and this run asks for {lora.kind}: set lora.kind={kind}")
    ranks = sorted({len(change.factors["down"]) for change in layers.values() if "down" in change.factors})
    alphas = sorted({float(f"{change.scale * lora.rank:.6g}") for change in layers.values()})
    for key, there, asked in (("rank", ranks, lora.rank), ("alpha", alphas, lora.scale_alpha)):
        if len(there) > 1:
            raise DiffpoError(
                f"lora.start={path} has layers of {key} {', '.join(f'{n:g}' for n in there[:3])}, and a run has one "
                f"{key}; merge it (diffpo export --to merged), and train a LoRA on what comes out"
            )
        if there and not math.isclose(there[0], asked, rel_tol=1e-5):
            said = f"{there[0]:g}"
            raise DiffpoError(
                f"lora.start={path} has {key} {said}, and this run asks for {asked:g}: set lora.{key}={said}"
            )
    if layers.keys() != tuned_layers(network).keys():
        targets = lora_names.targets_of(layers, lora_names.layer_shapes(network))
        asked = sorted(network.peft_config[ADAPTER].target_modules)
        raise DiffpoError(
            f"lora.start={path} has targets {targets}, and this run asks for {asked}: set lora.targets={targets}"
        )
    try:
        _fill(network, layers)
    except DiffpoError as error:  # LoKr's factors
        raise DiffpoError(f"lora.start={path}: {error}") from None


def settings_of(path: str | Path) -> dict[str, dict[str, Any]]:
    """peft's settings of the adapters in a file, by the pipeline's part ("" if it does not say which): from the file's
    header, as diffusers writes them, or from the adapter_config.json beside peft's adapter_model.safetensors."""
    from safetensors import safe_open

    path = lora_file(path)
    try:
        with safe_open(path, "pt") as file:
            header = _header(file, "lora_adapter_metadata")
    except Exception as error:
        raise _unreadable(path, error) from error
    if not header and (beside := _config_beside(path)):
        try:
            header = json.loads(read_text(beside))
            if not isinstance(header, dict):
                raise ValueError("it is no JSON object")
        except (OSError, ValueError, RecursionError) as error:
            raise DiffpoError(f"cannot read {beside}: {error}; it says how {path} is scaled") from error
    settings: dict[str, dict[str, Any]] = {}
    for key, value in header.items():
        part, dot, name = key.partition(".")
        settings.setdefault(part if dot else "", {})[name if dot else key] = value
    return settings


def _config_beside(path: Path) -> Path | None:
    """peft's settings beside its weights."""
    beside = path.with_name("adapter_config.json")
    return beside if path.name == PEFT_FILE_NAME and beside.is_file() else None


def inject(network: torch.nn.Module, config: Any, name: str) -> None:
    """Give the network a fresh adapter ``name`` by peft's ``config``."""
    from peft import inject_adapter_in_model

    if hasattr(network, "add_adapter"):  # tells diffusers' own switches too
        network.add_adapter(config, adapter_name=name)
    else:  # PixArt, DiT
        inject_adapter_in_model(config, network, name)
    for layer in tuned_layers(network).values():
        layer.training = network.training  # in training mode a LoKr draws random numbers; what it holds stays as it is


def tuned_layers(network: torch.nn.Module) -> dict[str, Any]:
    """The layers that hold adapters, by their names in the network without them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


def adapter_parameters(network: torch.nn.Module, adapter: str = ADAPTER) -> dict[str, torch.nn.Parameter]:
    """The parameters of one adapter, by names that do not tell which."""
    own = re.compile(rf"(\.(?:lora|lokr)_\w+)\.{re.escape(adapter)}(?=\.|$)")
    found = {}
    for name, parameter in network.named_parameters():
        short, count = own.subn(r"\1", name)
        if count:  # peft's files call a DoRA's magnitudes as they were called once
            found[short.removesuffix(".weight") if ".lora_magnitude_vector." in short else short] = parameter
    return found


def lora_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights on the CPU, by peft's names. Of a sharded network: to be called by all processes alike."""
    from ..train.distributed import whole

    state = whole({name: parameter.detach() for name, parameter in adapter_parameters(network).items()})
    return {name: value.cpu().contiguous() for name, value in state.items()}


def set_lora_state(network: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put `lora_state` back. DiffpoError unless it has all weights of this adapter, in their shapes, and no others."""
    import torch

    from ..train.distributed import like

    here = adapter_parameters(network)
    if lost := sorted(here.keys() ^ state.keys()):
        raise DiffpoError(f"the LoRA does not fit the model: {len(lost)} weights have no counterpart, e.g. {lost[0]}")
    for name, parameter in here.items():
        if state[name].shape != parameter.shape:
            shapes = f"{tuple(state[name].shape)}, and here it is {tuple(parameter.shape)}"
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
    header = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"{component}.{k}": v for k, v in adapter.items()}, sort_keys=True),
        HEADER: json.dumps(about, sort_keys=True),
    }
    state = lora_state(network) if state is None else state
    content = save({f"{component}.{name}": value for name, value in state.items()}, header)
    path.write_bytes(_sorted_header(content))


def _sorted_header(content: bytes) -> bytes:
    """The same safetensors file with its header's keys in order: safetensors writes metadata in a random one, and equal
    LoRAs should be equal files. (Format: length of the header as 8 bytes, JSON padded with spaces to a multiple of 8,
    then the data, addressed from its own beginning.)"""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def read_lora(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights, and what is `known` of our header (empty for a file from elsewhere). DiffpoError if the file is
    missing or damaged."""
    from safetensors import safe_open

    path = lora_file(path)
    try:
        with safe_open(path, "pt") as file:
            about = known(_header(file, HEADER))
            return {name: file.get_tensor(name) for name in file.keys()}, about
    except Exception as error:  # of safetensors, and what it says of types that this torch does not know
        raise _unreadable(path, error) from error


def _header(file: Any, key: str) -> dict[str, Any]:
    """The JSON object under ``key`` in the header of an open safetensors file; empty if there is none."""
    found = json.loads((file.metadata() or {}).get(key, "{}"))
    if not isinstance(found, dict):
        raise ValueError(f"{key} in its header is no object")
    return found


def _unreadable(path: Path, error: Exception) -> DiffpoError:
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        return DiffpoError(f"the LoRA {path} is not read: pickled files can run code; convert it to safetensors")
    return DiffpoError(f"cannot read the LoRA {path}: {plain(error, 300)} (truncated, or not a safetensors file)")


def lora_file(path: str | Path) -> Path:
    """The LoRA file that ``path`` means: itself, or in the folder ``path`` pytorch_lora_weights.safetensors or
    adapter_model.safetensors."""
    path = Path(path).expanduser()
    if path.is_dir():
        peft = path / PEFT_FILE_NAME
        path = peft if peft.is_file() and not (path / FILE_NAME).is_file() else path / FILE_NAME
    if not path.is_file():
        raise DiffpoError(f"there is no LoRA at {path}; give the file or the folder of a finished training run")
    return path


def users_file(path: str | Path) -> Path:
    """Where the user tokens of the run lie whose LoRA ``path`` means; it is there if the run trained with users."""
    return lora_file(path).parent / USERS_FILE_NAME


def file_hash(path: str | Path) -> str:
    """sha256 of the LoRA file that ``path`` means, and of peft's settings beside it."""
    path = lora_file(path)
    beside = _config_beside(path)
    return sha256(path.read_bytes() + (beside.read_bytes() if beside else b"")).hexdigest()


def check_lora(pipe: Any, path: str | Path) -> Changes:
    """What a LoRA file does to the pipeline. Was it trained on this very base, and can all of it be applied?

    Raises DiffpoError for a missing or damaged file, a LoRA of another base, and what `lora_forms.read` refuses. A file
    that does not say what it was trained on (not written by diffpo) is judged by its layers alone.
    """
    from . import lora_forms

    path = lora_file(path)
    _, about = read_lora(path)
    if "base" in about and not same_base(about["base"], base_identity(network_of(pipe))):
        raise DiffpoError(
            f"the LoRA {path} was trained on another base model: {plain(about['base'].get('name', 'unknown'), 200)}. "
            f"Load that model, or train a LoRA on this one"
        )
    return lora_forms.read(path, lora_forms.parts_of(pipe))


def load_lora(pipe: Any, path: str | Path) -> None:
    """Apply all of a LoRA to a pipeline, or raise DiffpoError as `check_lora`.

    A LoRA, DoRA or LoKr of the network becomes an adapter of peft's, as in training. What else there is (text encoders,
    LoHa, differences, kinds mixed in one file) is added to the weights themselves, rounded to their precision once; so
    is a DoRA of convolutions in half precision, whose norms would be rounded in peft.
    """
    from . import lora_change, lora_forms

    network, changes = network_of(pipe), check_lora(pipe, path)
    for name, part in lora_forms.parts_of(pipe).items():
        changed = changes.get(name, [])
        layers = lora_change.by_layer(changed) if part is network else None
        kind = lora_change.kind_of(layers)
        coarse = kind == "dora" and any(_is_coarse(part.get_submodule(layer)) for layer in layers)
        if kind and not coarse:
            _adapt(part, layers, kind)
        else:
            lora_change.merge(part, changed)


def _adapt(network: torch.nn.Module, layers: dict[str, Change], kind: str) -> None:
    """Give the network the adapter with these changes by layer, all of one kind."""
    import torch
    from peft import LoKrConfig, LoraConfig

    names = "|".join(map(re.escape, layers))
    if kind == "lokr":
        config = LoKrConfig(r=1, alpha=1, target_modules=names)
    else:
        by_rank: dict[int, list[str]] = {}
        for layer, change in layers.items():
            by_rank.setdefault(len(change.factors["down"]), []).append(re.escape(layer))
        (rank, _), *others = by_rank.items()
        patterns = {f"^(?:{'|'.join(each)})": other for other, each in others}
        config = LoraConfig(r=rank, rank_pattern=patterns, target_modules=names, use_dora=kind == "dora")
    with torch.random.fork_rng(devices=[]):  # of the weights that these replace
        inject(network, config, ADAPTER)
    for layer, module in tuned_layers(network).items():
        change = layers[layer]
        module.scaling[ADAPTER] = change.scale
        if kind == "lokr":
            module.alpha[ADAPTER] = change.scale
            _replace(module, change.factors)
        else:
            module.lora_alpha[ADAPTER] = change.scale * len(change.factors["down"])
    for parameter in adapter_parameters(network).values():
        if kind == "dora":  # norms in half precision would disturb the base's part of the output
            parameter.data = parameter.data.float()
        parameter.requires_grad_(False)
    _fill(network, layers)


def _replace(module: Any, factors: dict[str, torch.Tensor]) -> None:
    """Give a LoKr layer factors of these shapes in place of those that peft's settings make."""
    import torch

    like = next(module.parameters())
    for name in module.adapter_layer_names:
        held = getattr(module, name)
        if ADAPTER in held:
            del held[ADAPTER]
        if name in factors:
            held[ADAPTER] = torch.nn.Parameter(torch.empty_like(factors[name], dtype=like.dtype, device=like.device))


def _fill(network: torch.nn.Module, layers: dict[str, Change]) -> None:
    """Put changes by layer into the adapter; DiffpoError as of `set_lora_state`."""
    from . import lora_change

    here, state = adapter_parameters(network), lora_change.peft_state(layers)
    for name, value in state.items():  # a 1 x 1 convolution's is written as a matrix by some
        if name in here and here[name].numel() == value.numel():
            state[name] = value.reshape(here[name].shape)
    set_lora_state(network, state)


def network_of(pipe: Any) -> torch.nn.Module:
    """The part of a pipeline that LoRAs adapt."""
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
