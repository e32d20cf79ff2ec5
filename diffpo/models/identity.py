"""Which base model a trained file belongs to: a short record of a network's weights, and how two are compared."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ADAPTED = ("lora_", "lokr_")  # in the names of an adapter's weights, which are not part of the base


def _samples(module: torch.nn.Module) -> tuple[str, torch.Tensor]:
    """A hash of all names and shapes, and up to 64 evenly spaced values of every weight, float32 on the CPU."""
    import torch

    # the adapter is not part of the base, and peft moves the base's weights one level down
    weights = {
        name.replace(".base_layer.", "."): value
        for name, value in module.state_dict().items()
        if not any(mark in name for mark in ADAPTED)
    }
    structure = blake2b(digest_size=16)
    values = []
    for name in sorted(weights):
        flat = weights[name].detach().reshape(-1)
        structure.update(f"{name}{tuple(weights[name].shape)}".encode())
        values.append(flat[:: max(1, flat.numel() // 64)][:64].float().cpu())
    return structure.hexdigest(), torch.cat(values)


def base_identity(network: torch.nn.Module, name: str = "") -> dict[str, Any]:
    """What a LoRA file records of its base: ``hash`` is exact; ``structure`` and ``sample`` also recognise the same
    model in another precision. Of a network that is kept as fp8 or nf4: that of the weights it was made from."""
    if known := getattr(network, "kept_from", None):
        return {**known, "name": name}
    structure, values = _samples(network)
    sample = values[:: max(1, values.numel() // 512)][:512]
    exact = blake2b(structure.encode() + values.numpy().tobytes(), digest_size=16).hexdigest()
    return {"name": name, "hash": exact, "structure": structure, "sample": [float(f"{v:.5g}") for v in sample.tolist()]}


def same_base(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two identities are of one model, allowing for bfloat16 rounding (relative error at most 2^-9 a value)."""
    try:
        if one["hash"] == other["hash"]:
            return True
        if one["structure"] != other["structure"]:
            return False
        pairs = list(zip(one["sample"], other["sample"], strict=True))
        close = sum(abs(a - b) <= 2**-8 * max(abs(a), abs(b)) + 1e-6 for a, b in pairs)
        return close >= 0.98 * len(pairs)
    except (KeyError, TypeError, ValueError):  # a damaged file's
        return False
