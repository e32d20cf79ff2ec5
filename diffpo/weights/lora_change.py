"""What a LoRA, in the wide sense, does to the layers of a network: closed forms, and putting it into the weights.

With W (out, in, ...) a layer's weight and D what the factors say,

    LoRA  D = up down, or up mid down      LoHa  D = (a1 b1) * (a2 b2)      LoKr  D = w1 (x) w2      full  D itself
    W' = W + scale D                       DoRA  W' = m (W + scale D) / |W + scale D|, norms along all axes but m's

Sources: LoRA arXiv 2106.09685, DoRA 2402.09353, LoHa 2108.06098, LoKr and LoCon's middle factor LyCORIS 2309.14859.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.errors import DiffpoError

FACTORS = {
    "lora": {"down", "up", "mid"},
    "loha": {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"},
    "lokr": {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2"},
    "full": {"diff"},
}


class Part(NamedTuple):
    """The rows ``start`` to ``stop`` of a layer's weight."""

    layer: str
    start: int
    stop: int


Place = tuple[Part, ...]  # what a file calls one layer: whole layers of the model, or rows of several below one another


class Change(NamedTuple):
    """What a file does to one place.

    Attributes:
        kind: lora | loha | lokr | full.
        factors: float32: down (rank, in, ...), mid, up (out, rank, ...), diff, and by LyCORIS' names hada_w1_a, ...
        scale: of their product.
        magnitude: DoRA's norms, (out, 1, ...) or (1, in, 1, ...).
        bias: added to the layer's bias, (out,).
    """

    kind: str
    factors: dict[str, Tensor]
    scale: float = 1.0
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """D as a weight of ``shape``. RuntimeError if the factors give none such."""
        f = self.factors
        if self.kind == "lora":
            down, up = f["down"], f["up"]
            if "mid" in f:
                down = torch.einsum("ab...,bi->ai...", f["mid"], down.flatten(1))
            rest = down.shape[1:] if down.dim() > 2 else shape[1:]  # some write a kernel as a matrix
            return _as(up.flatten(1) @ down.flatten(1), up.shape[:1] + rest, shape)
        if self.kind == "loha":
            one, other = (_product(f, f"hada_w{i}", f"hada_t{i}") for i in (1, 2))
            return _as(one * other, one.shape[:1] + shape[1:], shape)
        if self.kind == "lokr":
            w1, w2 = (f[w] if (w := f"lokr_w{i}") in f else _product(f, w, f"lokr_t{i}") for i in (1, 2))
            product = torch.kron(w1.reshape(w1.shape + (1,) * (w2.dim() - 2)), w2.contiguous())
            return _as(product, product.shape[:1] + shape[1:], shape)
        return _as(f["diff"], f["diff"].shape, shape) if "diff" in f else torch.zeros(shape)

    def weight(self, base: Tensor, strength: float = 1.0) -> Tensor:
        """W' of W, both (out, in, ...) float32; ``strength`` goes straight from W (0) to W' (1)."""
        new = base + self.scale * self.delta(tuple(base.shape)).to(base)
        if self.magnitude is not None:
            norms = _norms(new, self.magnitude)
            new = new * (self.magnitude.to(base) / norms.clamp(min=torch.finfo(base.dtype).eps))
        return new if strength == 1 else base + strength * (new - base)


Changes = dict[str, list[tuple[Place, Change]]]  # by the pipeline's part


def _product(factors: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """A matrix from its two factors, or a kernel from three (a Tucker decomposition)."""
    a, b = factors[f"{name}_a"], factors[f"{name}_b"]
    return torch.einsum("ij...,ip,jr->pr...", factors[core], a, b) if core in factors else a @ b


def _as(value: Tensor, found: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """``value``, of which ``found`` is the shape but for axes of length 1, as ``shape``."""
    if [n for n in found if n > 1] != [n for n in shape if n > 1]:
        raise RuntimeError(f"its weights are of {tuple(found)}")
    return value.reshape(shape)


def _norms(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Norms of ``weight`` of the shape of ``magnitude``."""
    kept = 0 if magnitude.numel() == magnitude.shape[0] == weight.shape[0] else 1
    return torch.linalg.vector_norm(weight, dim=[d for d in range(weight.dim()) if d != kept], keepdim=True)


# ---- by layers


def by_layer(changed: list[tuple[Place, Change]]) -> dict[str, Change] | None:
    """The changes by whole layers; None if some cannot be divided into them. Layers that lie below one another in a
    LoRA's place each take their rows; of the rank what these use."""
    layers: dict[str, Change] = {}
    for place, change in changed:
        if len(place) == 1:
            layers[place[0].layer] = change
            continue
        per_row = change.magnitude is None or change.magnitude.numel() == change.magnitude.shape[0]
        if change.kind != "lora" or "mid" in change.factors or not per_row:
            return None
        ends = [sum(part.stop - part.start for part in place[: i + 1]) for i in range(len(place))]
        for layer in dict.fromkeys(part.layer for part in place):
            mine = sorted((p.start, p.stop, end) for p, end in zip(place, ends, strict=True) if p.layer == layer)
            rows = torch.cat([torch.arange(end - (stop - start), end) for start, stop, end in mine])
            up = change.factors["up"][rows]
            used = up.flatten(1).any(0)
            if not used.any():
                if change.magnitude is None and change.bias is None:
                    continue  # it is not adapted
                used[0] = True
            factors = {"down": change.factors["down"][used], "up": up[:, used]}
            magnitude, bias = (None if v is None else v[rows] for v in (change.magnitude, change.bias))
            layers[layer] = Change("lora", factors, change.scale, magnitude, bias)
    return layers


def kind_of(layers: Mapping[str, Change] | None) -> str | None:
    """Which kind of training (lora | dora | lokr) makes such changes; None if none does, or several."""
    kinds: set[str | None] = set()
    for change in (layers or {}).values():
        plain_factors = change.bias is None and "mid" not in change.factors
        per_row = change.magnitude is not None and change.magnitude.numel() == change.magnitude.shape[0]
        if change.kind == "lora" and plain_factors and (change.magnitude is None or per_row):
            kinds.add("dora" if per_row else "lora")
        elif change.kind == "lokr" and plain_factors and change.magnitude is None:
            kinds.add("lokr")
        else:
            kinds.add(None)
    return kinds.pop() if len(kinds) == 1 else None


def peft_state(layers: Mapping[str, Change]) -> dict[str, Tensor]:
    """The weights of an adapter of a `kind_of` training, by peft's names without the adapter's."""
    names = {"down": "lora_A.weight", "up": "lora_B.weight"}
    state = {f"{layer}.{names.get(k, k)}": v for layer, change in layers.items() for k, v in change.factors.items()}
    for layer, change in layers.items():
        if change.magnitude is not None:
            state[f"{layer}.lora_magnitude_vector"] = change.magnitude
    return state


# ---- into the weights


def merge(part: torch.nn.Module, changed: list[tuple[Place, Change]], strength: float = 1.0) -> None:
    """Put the changes into the weights of ``part``: computed in float32, and rounded once to what they are stored in.
    DiffpoError if one is too large for that."""
    modules = dict(part.named_modules())
    for place, change in changed:
        layers = [modules[p.layer] for p in place]
        if change.factors:
            _add(place, [layer.weight for layer in layers], partial(change.weight, strength=strength))
        if change.bias is not None:
            _add(place, [layer.bias for layer in layers], partial(_shifted, shift=change.bias, strength=strength))


def _shifted(bias: Tensor, shift: Tensor, strength: float) -> Tensor:
    return bias + strength * shift.to(bias)


@torch.no_grad()
def _add(place: Place, weights: list[Tensor], change: Callable[[Tensor], Tensor]) -> None:
    base = torch.cat([weight[part.start : part.stop].float() for part, weight in zip(place, weights, strict=True)])
    lengths = [part.stop - part.start for part in place]
    for part, weight, rows in zip(place, weights, change(base).split(lengths), strict=True):
        rows = rows.to(weight.dtype)
        if not rows.isfinite().all():
            raise DiffpoError(f"{part.layer} is not finite with the LoRA in it; use --dtype bfloat16")
        weight[part.start : part.stop] = rows
