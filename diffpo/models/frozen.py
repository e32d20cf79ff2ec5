"""Frozen layers that compute with a passing copy of their weights: weights may be fp8, or stay in the CPU's memory.

diffusers' hooks for that (layerwise casting, group offload, sequential offload) exchange `parameter.data` around each
forward pass. A convolution's backward pass then finds the exchanged data, and a linear layer's keeps every copy alive
until it. Here both passes fetch the weights for themselves. The gradient of a frozen layer needs its weights and
nothing else, so no copy and no input is kept between the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

LAYERS = (torch.nn.Linear, torch.nn.Conv2d)


def freeze(layer: torch.nn.Module, dtype: torch.dtype, storage: torch.dtype | None, offload: bool) -> None:
    """Let ``layer`` (one of `LAYERS`) compute in ``dtype`` with weights that are kept as ``storage`` (None: as they
    are), and in the CPU's memory if ``offload``: they are no parameters then, so that no `to` moves them."""
    layer.__class__ = _Linear if isinstance(layer, torch.nn.Linear) else _Conv
    layer.computed_in = dtype
    own = {name: value for name, value in layer._parameters.items() if value is not None}
    for value in own.values():
        value.requires_grad_(False)
        value.data = value.data.to(storage or value.dtype)
    if offload:
        kept = {name: _pinned(value.data) for name, value in own.items()}
        for name in kept:
            del layer._parameters[name]
        layer.kept = kept


def _pinned(value: Tensor) -> Tensor:
    value = value.cpu()
    return value.pin_memory() if torch.cuda.is_available() else value


class _Frozen:
    """The forward pass of both kinds of layer."""

    kept: dict[str, Tensor]
    computed_in: torch.dtype

    def __getattr__(self, name: str) -> Any:
        kept = self.__dict__.get("kept", {})
        return kept[name] if name in kept else super().__getattr__(name)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.computed_in)
        return _Product.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self.product(x)

    def fetched(self, name: str, device: torch.device) -> Any:
        """The layer's weight or bias to compute with."""
        value = getattr(self, name)
        return None if value is None else value.to(device, self.computed_in, non_blocking=True)

    def product(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient(self, shape: torch.Size, gradient: Tensor) -> Tensor:
        """By the input of that shape."""
        raise NotImplementedError


class _Linear(_Frozen, torch.nn.Linear):
    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fetched("weight", x.device), self.fetched("bias", x.device))

    def gradient(self, shape: torch.Size, gradient: Tensor) -> Tensor:
        return gradient @ self.fetched("weight", gradient.device)


class _Conv(_Frozen, torch.nn.Conv2d):
    def product(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.fetched("weight", x.device), self.fetched("bias", x.device))

    def gradient(self, shape: torch.Size, gradient: Tensor) -> Tensor:
        weight = self.fetched("weight", gradient.device)
        place = (self.stride, self.padding, self.dilation, self.groups)
        return conv2d_input(shape, weight, gradient, *place)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Frozen) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        with torch.autocast(gradient.device.type, enabled=False):
            return ctx.layer.gradient(ctx.shape, gradient.to(ctx.layer.computed_in)), None


def offloaded(network: torch.nn.Module) -> Iterator[Tensor]:
    """The weights that lie in the CPU's memory."""
    for layer in network.modules():
        if isinstance(layer, _Frozen):
            yield from layer.__dict__.get("kept", {}).values()
