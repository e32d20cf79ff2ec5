"""Putting a LoRA file of any form into a network: to continue its training, or to sample with it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..common.errors import DiffpoError
from ..common.text import plain
from ..config import Lora
from ..models.identity import base_identity, same_base
from . import lora_change, lora_forms, lora_names
from .lora import ADAPTER, adapter_parameters, inject, is_coarse, network_of, set_lora_state, tuned_layers
from .lora_change import Change, Changes
from .lora_file import lora_file, read_lora


def start_from(network: torch.nn.Module, lora: Lora) -> None:
    """Give the fresh adapter of `add_lora` the weights of the LoRA ``lora.start``, a file of any form (lora_forms.py).
    DiffpoError if it is of another model, or has another kind, rank, alpha or other layers than ``lora`` asks for."""
    assert lora.start is not None  # noqa: S101 (called for a run with lora.start only)
    path = lora_file(lora.start)
    _, about = read_lora(path)
    if "base" in about and not same_base(about["base"], base_identity(network)):
        raise DiffpoError(
            f"lora.start={path} was trained on another base model: {plain(about['base'].get('name', 'unknown'), 200)}. "
            f"Set model.path to that model"
        )
    try:
        ((_, changed),) = lora_forms.read(path, {"network": network}).items()
    except DiffpoError as error:
        raise DiffpoError(
            f"lora.start: {error}. Training can continue only a LoRA of the network. If it also adapts text encoders, "
            f"merge it first (diffpo export --to merged)"
        ) from None
    layers = lora_change.by_layer(changed)
    kind = lora_change.kind_of(layers)
    if layers is None or kind is None:
        raise DiffpoError(
            f"lora.start={path} is not a plain LoRA, DoRA or LoKr of whole layers, so training cannot continue it. "
            f"Merge it (diffpo export --to merged), and train a LoRA on the merged model"
        )
    if kind != lora.kind:
        raise DiffpoError(f"lora.start={path} has kind {kind}, but lora.kind is {lora.kind}: set lora.kind={kind}")
    if layers.keys() != tuned_layers(network).keys():
        targets = lora_names.targets_of(layers, lora_names.layer_shapes(network))
        wanted = sorted(network.peft_config[ADAPTER].target_modules)
        raise DiffpoError(
            f"lora.start={path} has targets {targets}, but this run has {wanted}: set lora.targets={targets}"
        )
    tuned = tuned_layers(network)
    ranks = {layer: len(change.factors["down"]) for layer, change in layers.items() if "down" in change.factors}
    alphas = {layer: float(f"{change.scale * tuned[layer].r[ADAPTER]:.6g}") for layer, change in layers.items()}
    for key, there in (("rank", ranks), ("alpha", alphas)):
        asked = {layer: _setting(tuned[layer], key) for layer in there}
        if not all(math.isclose(number, asked[layer], rel_tol=1e-5) for layer, number in there.items()):
            theirs, ours = _pattern(key, there), _pattern(key, asked)
            raise DiffpoError(f"lora.start={path} has {theirs}, but this run has {ours}: set {theirs}")
    try:
        _fill(network, layers)
    except DiffpoError as error:  # LoKr's factors
        raise DiffpoError(f"lora.start={path}: {error}") from None


def _setting(layer: Any, key: str) -> float:
    """The rank or alpha of an adapted layer."""
    if key == "rank":
        return layer.r[ADAPTER]
    return (layer.lora_alpha if hasattr(layer, "lora_alpha") else layer.alpha)[ADAPTER]


def _pattern(key: str, by_layer: Mapping[str, float]) -> str:
    """The numbers of layers as settings: what most have, and a pattern of the others."""
    (common, _), *others = Counter(by_layer.values()).most_common()
    said = f"lora.{key}={common:g}"
    if not others:
        return said
    rest: dict[str, float] = {}
    for number, _ in others:
        own = [layer for layer, each in by_layer.items() if each == number]
        rest |= dict.fromkeys(lora_names.targets_of(own, by_layer), number)
    names = ", ".join(f"{name}: {number:g}" for name, number in list(rest.items())[:20])
    return f"{said} lora.{key}_pattern={{{names}}}"


def check_lora(pipe: Any, path: str | Path) -> Changes:
    """What a LoRA file does to the pipeline. Was it trained on this very base, and can all of it be applied?

    Raises DiffpoError for a missing or damaged file, a LoRA of another base, and what `lora_forms.read` refuses. A file
    without a record of its base (not written by diffpo) is checked by its layers alone.
    """
    path = lora_file(path)
    _, about = read_lora(path)
    if "base" in about and not same_base(about["base"], base_identity(network_of(pipe))):
        raise DiffpoError(
            f"the LoRA {path} was trained on another base model: {plain(about['base'].get('name', 'unknown'), 200)}. "
            f"Load that model, or train a LoRA on this one"
        )
    return lora_forms.read(path, lora_forms.parts_of(pipe))


def load_lora(pipe: Any, path: str | Path, strength: float = 1.0) -> None:
    """Apply all of a LoRA to a pipeline, or raise DiffpoError as `check_lora`.

    A LoRA, DoRA or LoKr of the network becomes an adapter of peft's, as in training. What else there is (text encoders,
    LoHa, differences, kinds mixed in one file) is added to the weights themselves, rounded to their precision once; so
    is a DoRA of convolutions in half precision, whose norms would be rounded in peft. So is any LoRA of another
    ``strength`` than 1, which goes straight from the base (0) to the trained network (1).
    """
    network, changes = network_of(pipe), check_lora(pipe, path)
    for name, part in lora_forms.parts_of(pipe).items():
        changed = changes.get(name, [])
        layers = lora_change.by_layer(changed) if part is network else None
        kind = lora_change.kind_of(layers)
        coarse = kind == "dora" and any(is_coarse(part.get_submodule(layer)) for layer in layers or ())
        if layers and kind and not coarse and strength == 1:
            _adapt(part, layers, kind)
        else:
            lora_change.merge(part, changed, strength)


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
    like = next(module.parameters())
    for name in module.adapter_layer_names:
        held = getattr(module, name)
        if ADAPTER in held:
            del held[ADAPTER]
        if name in factors:
            held[ADAPTER] = torch.nn.Parameter(torch.empty_like(factors[name], dtype=like.dtype, device=like.device))


def _fill(network: torch.nn.Module, layers: dict[str, Change]) -> None:
    """Put changes by layer into the adapter; DiffpoError as of `set_lora_state`."""
    here, state = adapter_parameters(network), lora_change.peft_state(layers)
    for name, value in state.items():  # a 1 x 1 convolution's is written as a matrix by some
        if name in here and here[name].numel() == value.numel():
            state[name] = value.reshape(here[name].shape)
    set_lora_state(network, state)
