"""The forward and backward pass of peft's LoRA on linear layers, with fewer operations: the same numbers but for the
rounding. The parameters, their names and all switches stay peft's.

peft scales the adapter's output, adds it, and casts its input, each in a pass over memory of its own, and autograd adds
up two gradients of the input. Here the matrix products add their results up themselves: y = x W^T + b + s (x A^T) B^T.

The text is the same for all images of a group, and for policy and reference. Within `shared` the layers that it is the
input of (keys and values of cross-attention) compute its rows once for a group, and W x + b once for an update.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def install(network: torch.nn.Module) -> None:
    """Let the plain LoRAs on linear layers of ``network`` be computed here. Other adapters stay as they are."""
    from peft.tuners.lora.layer import Linear

    known = _Known()
    network.shared_inputs = known
    for layer in network.modules():
        if type(layer) is Linear and type(layer.base_layer) is torch.nn.Linear and layer.base_layer.weight.itemsize > 1:
            layer.forward = functools.partial(_forward, layer, known)


@contextlib.contextmanager
def shared(network: torch.nn.Module, inputs: Iterable[Tensor], members: int) -> Iterator[None]:
    """Within it each of ``inputs`` (members * n, tokens, d), laid out by member, is an input of passes of ``network``
    that does not depend on weights. Its rows are computed once where they are equal for all members. The backward pass
    belongs within it too: gradient checkpointing computes layers again."""
    known = getattr(network, "shared_inputs", None)
    if known is None:
        yield
        return
    known.add(inputs, members)
    try:
        yield
    finally:
        known.clear()


class _Known:
    """The inputs of the update at hand with the number of their first rows that all others repeat, and what the base
    layers make of these rows."""

    def __init__(self) -> None:
        self.inputs: list[tuple[Tensor, int]] = []
        self.base: dict[tuple[torch.nn.Module, int], Tensor] = {}

    def add(self, inputs: Iterable[Tensor], members: int) -> None:
        for each in inputs:
            parts = each.unflatten(0, (members, -1))
            alike = all(torch.equal(parts[0], part) for part in parts[1:])
            self.inputs.append((each, len(each) // members if alike else len(each)))

    def clear(self) -> None:
        self.inputs.clear()
        self.base.clear()

    def rows(self, x: Tensor) -> int | None:
        """How many rows of x are to be computed, if it is one of the inputs."""
        for each, rows in self.inputs:
            if x is each or (x.data_ptr() == each.data_ptr() and x.shape == each.shape and x.dtype == each.dtype):
                return rows
        return None


def _forward(layer: Any, known: _Known, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base, adapter = layer.base_layer, None
    if not layer.disable_adapters:
        adapter = _plain(layer)
    if args or kwargs or layer.merged or (adapter is None and not layer.disable_adapters):
        return type(layer).forward(layer, x, *args, **kwargs)
    if not torch.is_autocast_enabled(x.device.type):
        fits = x.dtype == base.weight.dtype
    else:
        fits = torch.get_autocast_dtype(x.device.type) == base.weight.dtype
    if not fits:
        return type(layer).forward(layer, x)
    rows = known.rows(x)
    if rows is None:
        return base(x) if adapter is None else _Lora.apply(x, layer, adapter, None, *_factors(layer, adapter))
    first = x[:rows]
    found = known.base.pop((layer, rows), None)
    if adapter is None:
        y = found = base(first) if found is None else found
        known.base[layer, rows] = found
    else:
        y = _Lora.apply(first, layer, adapter, found, *_factors(layer, adapter))
    return y if rows == len(x) else y.repeat(len(x) // rows, *[1] * (y.ndim - 1))


def _plain(layer: Any) -> str | None:
    """The name of the layer's active adapter if it is a single LoRA without dropout, bias or variant."""
    names = layer.active_adapters
    if len(names) != 1 or names[0] not in layer.lora_A or names[0] in layer.lora_variant:
        return None
    (name,) = names
    plain = isinstance(layer.lora_dropout[name], torch.nn.Identity) and layer.lora_B[name].bias is None
    return name if plain else None


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


class _Lora(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T in the precision of W, with gradients of x, A and B.

    ``known``: x W^T + b, which is overwritten; None to compute it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, adapter: str, known: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        weight = layer.base_layer.weight
        flat = x.to(weight.dtype).reshape(-1, x.shape[-1])
        low = flat @ a.to(weight.dtype).t()
        if known is None:
            y = torch.nn.functional.linear(flat, weight, layer.base_layer.bias)
        else:
            y = known.detach().view(-1, known.shape[-1])
        y.addmm_(low, b.to(weight.dtype).t(), alpha=layer.scaling[adapter])
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scale, ctx.shape, ctx.dtype = layer.scaling[adapter], x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        flat, low, weight, a, b = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        inner = gradient @ b.to(gradient.dtype)
        of_x = of_a = of_b = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(inner, a.to(inner.dtype), alpha=ctx.scale).view(ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[4]:
            of_a = (inner.t() @ flat).to(a.dtype).mul_(ctx.scale)
        if ctx.needs_input_grad[5]:
            of_b = (gradient.t() @ low).to(b.dtype).mul_(ctx.scale)
        return of_x, None, None, None, of_a, of_b
