"""LoRA by peft: adding it, and reading and writing the diffusers file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Lora
from .errors import DiffpoError
from .header import known
from .identity import base_identity, same_base

if TYPE_CHECKING:
    import torch

FILE_NAME = "pytorch_lora_weights.safetensors"  # diffusers looks for this name in a folder
USERS_FILE_NAME = "user_tokens.safetensors"  # beside it, if the run trained with users (users.py)
HEADER = "diffpo"  # our key in the safetensors header, beside diffusers' lora_adapter_metadata
ADAPTER = "default"


def add_lora(network: torch.nn.Module, lora: Lora, targets: Sequence[str], seed: int = 0) -> list[torch.nn.Parameter]:
    """Add a fresh adapter (B = 0, so the output is unchanged) and return its parameters, float32 whatever the base
    is."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale_alpha if lora.scale_alpha % 1 else int(lora.scale_alpha),
        target_modules=list(lora.targets or targets),
        init_lora_weights="gaussian",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            inject(network, config, ADAPTER)
        except ValueError as error:
            raise DiffpoError(f"lora.targets {config.target_modules} fit no layer of the model: {error}") from None
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        rounded = any(parameter.itemsize == 1 for parameter in parameters)  # peft gives them the base's fp8
        for parameter in parameters:
            parameter.data = parameter.data.float()
        if rounded:
            torch.manual_seed(seed)
            for layer in network.modules():
                if isinstance(layer, LoraLayer):
                    layer.reset_lora_parameters(ADAPTER, config.init_lora_weights)
    return parameters


def start_from(network: torch.nn.Module, lora: Lora) -> None:
    """Give the fresh adapter of `add_lora` the weights of the LoRA ``lora.start``. DiffpoError if it is of another
    model, or has another rank, alpha or other layers than ``lora`` asks for."""
    path = lora_file(lora.start)
    weights, about = read_lora(path)
    if "base" in about and not same_base(about["base"], base_identity(network)):
        raise DiffpoError(
            f"lora.start={path} was trained on another base model: {about['base'].get('name', 'unknown')}"
        )
    adapter, config = adapter_of(path), network.peft_config[ADAPTER]
    if not adapter:
        raise DiffpoError(f"lora.start={path} does not say its rank, alpha and layers, so it cannot be trained on")
    for name, key in {"r": "rank", "lora_alpha": "alpha", "target_modules": "targets"}.items():
        asked, there = getattr(config, name), adapter.get(name)
        if name == "target_modules":
            asked, there = sorted(asked), sorted(map(str, there)) if isinstance(there, list) else there
        if asked != there:
            raise DiffpoError(
                f"lora.start={path} has {key} {there}, and this run asks for {asked}: set lora.{key}={there}"
            )
    set_lora_state(network, {name.partition(".")[2]: value for name, value in weights.items()})


def adapter_of(path: Path) -> dict[str, Any]:
    """peft's settings of the network's adapter in a file in diffusers' format; empty if it does not tell."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            header = _header(file, "lora_adapter_metadata")
    except Exception as error:
        raise _unreadable(path, error) from error
    return {name.partition(".")[2]: value for name, value in header.items() if not name.startswith("text_encoder")}


def inject(network: torch.nn.Module, config: Any, name: str) -> None:
    """Give the network a fresh adapter ``name`` by peft's ``config``."""
    from peft import inject_adapter_in_model

    if hasattr(network, "add_adapter"):  # tells diffusers' own switches too
        network.add_adapter(config, adapter_name=name)
    else:  # PixArt, DiT
        inject_adapter_in_model(config, network, name)


def lora_state(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights on the CPU, by peft's names. Of a sharded network: to be called by all processes alike."""
    from peft import get_peft_model_state_dict

    from .engine import whole

    state = whole(get_peft_model_state_dict(network, adapter_name=ADAPTER))
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def set_lora_state(network: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    from .engine import like

    here = get_peft_model_state_dict(network, adapter_name=ADAPTER)
    state = {name: like(value, here[name]) if name in here else value for name, value in state.items()}
    try:
        result = set_peft_model_state_dict(network, state, adapter_name=ADAPTER)
    except (RuntimeError, LookupError) as error:  # other shapes
        raise DiffpoError(f"the LoRA does not fit the model: {' '.join(str(error).split())[:300]}") from error
    missing = [name for name in result.missing_keys if "lora_" in name and f".{ADAPTER}." in name]
    lost = missing + list(result.unexpected_keys)
    if lost:
        raise DiffpoError(f"the LoRA does not fit the model: {len(lost)} weights have no counterpart, e.g. {lost[0]}")


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
    adapter = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
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
    return DiffpoError(f"cannot read the LoRA {path}: {error} (truncated, or not a safetensors file)")


def lora_file(path: str | Path) -> Path:
    """The LoRA file that ``path`` means: itself, or `pytorch_lora_weights.safetensors` in the folder ``path``."""
    path = Path(path).expanduser()
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise DiffpoError(f"there is no LoRA at {path}; give the file or the folder of a finished training run")
    return path


def users_file(path: str | Path) -> Path:
    """Where the user tokens of the run lie whose LoRA ``path`` means; it is there if the run trained with users."""
    return lora_file(path).parent / USERS_FILE_NAME


def file_hash(path: str | Path) -> str:
    """sha256 of the LoRA file that ``path`` means."""
    return sha256(lora_file(path).read_bytes()).hexdigest()


def check_lora(pipe: Any, path: str | Path) -> None:
    """Is this a LoRA, and was it trained on this very base?

    Raises DiffpoError for a missing or damaged file, one without LoRA weights, and a LoRA of another base. A file that
    does not say what it was trained on (not written by diffpo) passes.
    """
    path = lora_file(path)
    weights, about = read_lora(path)
    if not any("lora" in name for name in weights):
        raise DiffpoError(f"{path} holds no LoRA: none of its {len(weights)} weights is named as one")
    if "base" in about and not same_base(about["base"], base_identity(network_of(pipe))):
        raise DiffpoError(
            f"the LoRA {path} was trained on another base model: {about['base'].get('name', 'unknown')}. Load that "
            f"model, or train a LoRA on this one"
        )


def load_lora(pipe: Any, path: str | Path) -> None:
    """`pipe.load_lora_weights`, after `check_lora`; DiffpoError as there, and where the shapes do not fit."""
    check_lora(pipe, path)
    path = lora_file(path)
    try:
        if hasattr(pipe, "load_lora_weights"):
            pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        else:
            _load_adapter(network_of(pipe), path)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, LookupError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DiffpoError(f"the LoRA {path} does not fit this model: {reason}") from error


def _load_adapter(network: torch.nn.Module, path: Path) -> None:
    """For pipelines that have no LoRA loader (PixArt, DiT): the adapter that `save_lora` wrote, by peft."""
    import torch
    from peft import LoraConfig

    adapter = adapter_of(path)
    if not adapter:
        raise ValueError("it does not say its rank and targets, and this pipeline has no loader of its own")
    with torch.random.fork_rng(devices=[]):  # of the weights that the file's replace
        inject(network, LoraConfig(**adapter), ADAPTER)
    set_lora_state(network, {name.partition(".")[2]: value for name, value in read_lora(path)[0].items()})


def network_of(pipe: Any) -> torch.nn.Module:
    """The part of a pipeline that LoRAs adapt."""
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
