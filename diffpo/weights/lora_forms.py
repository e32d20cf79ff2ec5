"""LoRA files of any form, read into one value: what a file does to each layer of a model.

Read are the names of peft, diffusers (those of attention processors too), kohya, LyCORIS and ComfyUI (lora_names.py),
and of weights LoRA, DoRA, LoHa, LoKr and plain differences (lora_change.py). Every key of a file is used, or named in
an error. The scale is alpha / rank, with alpha = rank where a file does not say it, as diffusers has it. Of a LoKr of
two whole factors in LyCORIS' form it is 1: the alpha that is written there means nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.errors import DiffpoError
from ..common.text import plain
from .header import BASE_NORMS
from .lora_change import FACTORS, Change, Changes, Part, Place
from .lora_file import read_lora, settings_of
from .lora_names import layer_shapes, matching, places_of, prefixes_of

KEY = re.compile(
    r"(?P<layer>.+?)(?:"
    r"[._]lora(?:_linear_layer)?(?P<number>[12]?)\.(?P<side>down|up)\.weight"  # diffusers before peft; XLabs numbers
    r"|\.lora_(?P<factor>down|up|mid|A|B)(?:\.[^.]+)?\.weight|\.lora_(?P<bare>A|B)"  # an adapter's name between
    r"|\.lora_B(?:\.[^.]+)?\.(?P<bias>bias)"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.[^.]+){0,2}"
    r"|\.(?P<lycoris>(?:hada|lokr)_[wt][12](?:_[ab])?)(?:\.[^.]+)?"
    r"|\.(?P<other>alpha|dora_scale|diff|diff_b|w_norm|b_norm)"
    r")"
)
FIELDS = {"A": "down", "B": "up", "bias": "lora_bias", "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude"}
FIELDS |= {"w_norm": "diff", "diff_b": "bias", "b_norm": "bias"}
PATTERN = re.compile(r"\^?[\w.-]+\$?")  # peft's patterns as they are written for layers; others could be any expression
WRAPPERS = ("base_model.model.", "_orig_mod.", "module.", "processor.")  # between the names of layers, saying nothing
# peft's settings that are read here, or change nothing of what a finished adapter computes
USED = {"r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "peft_type"}
HARMLESS = {
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "rank_dropout"),
    *("module_dropout", "rank_dropout_scale", "megatron_core", "qalora_group_size", "runtime_config", "loftq_config"),
    *("init_weights", "init_lora_weights", "decompose_both", "decompose_factor", "use_effective_conv2d"),
    *("eva_config", "corda_config", "bias", "ensure_weight_tying"),
}
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that also change the base's weights
Fields = dict[str, tuple[str, Tensor]]  # of one layer in a file: what a weight is -> its key and itself


# ---- reading


def parts_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """The parts of a pipeline that LoRAs change, by name: the network first, then its text encoders."""
    names = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    return {name: part for name in names if (part := getattr(pipe, name, None)) is not None}


def read(path: Path, parts: Mapping[str, torch.nn.Module]) -> Changes:
    """What the file ``path`` does to each of ``parts`` (`parts_of`).

    Raises DiffpoError, which names the keys, for weights that are not understood, incomplete, not finite, of layers or
    shapes that the model lacks, for settings that are not understood, and for a file that changes nothing.
    """
    weights, header = read_lora(path)
    if BASE_NORMS in header:
        raise DiffpoError(
            f"{path} is a DoRA for ComfyUI (diffpo export --to comfyui), which only ComfyUI and Forge read: give the "
            f"file or the folder of the run instead"
        )
    settings = settings_of(path)
    shapes = {name: layer_shapes(part) for name, part in parts.items()}
    tables = {name: (prefixes_of(name, part), places_of(part, shapes[name])) for name, part in parts.items()}
    found: dict[tuple[str, Place], Fields] = {}
    lost: dict[str, Fields] = {}
    strange = []
    for key in sorted(weights):
        match = KEY.fullmatch(key)
        if not match:
            strange.append(key)
            continue
        layer, field = match["layer"] + (match["number"] or ""), _field(match)
        where = _places(layer, tables)
        if len(where) > 1:
            names = " or of ".join(sorted({name for name, _ in where}))
            raise DiffpoError(f"{path}: {plain(key, 200)} may be of {names}: add the part's name before the keys")
        fields = found.setdefault(where[0], {}) if where else lost.setdefault(layer, {})
        if field in fields:
            raise _twice(path, fields[field][0], key)
        fields[field] = (key, weights[key])
    if strange:
        some = f"{len(strange)} of the {len(weights)} weights of {path} are not understood"
        if len(strange) == len(weights):
            some = f"{path} holds no LoRA: none of its {len(weights)} weights is understood"
        raise DiffpoError(
            f"{some}, e.g. {_some(strange)}. diffpo reads LoRA, DoRA, LoHa, LoKr and weight differences. Nothing was "
            f"applied"
        )
    # what is zero changes nothing, whether or not the model has its layer
    if keys := [key for fields in lost.values() if not _idle(fields) for key, _ in fields.values()]:
        model = ", ".join(f"{name} ({type(part).__name__})" for name, part in parts.items())
        some = f"{len(keys)} of the {len(weights)} weights of {path} belong to no layer of"
        raise DiffpoError(
            f"{some if found else f'no weight of {path} belongs to'} the {model}, e.g. {_some(keys)}. The file is for "
            f"another model, or adapts layers that this one does not have. Nothing was applied"
        )
    if not found:
        raise DiffpoError(f"{path} changes nothing: it is empty, or all its weights are zero")
    changes: Changes = {}
    abouts = {name: _about(path, settings, name) for name, _ in found}
    for (name, place), fields in found.items():
        shape = (sum(part.stop - part.start for part in place), *shapes[name][place[0].layer][1:])
        change = _change(path, fields, abouts[name], place, shape)
        if change.bias is not None and any(parts[name].get_submodule(each.layer).bias is None for each in place):
            raise DiffpoError(f"{path} changes the bias of {place[0].layer}, which has none in this model")
        changes.setdefault(name, []).append((place, change))
    for name in changes:
        mine = {place: fields for (part, place), fields in found.items() if part == name}
        _once(path, mine)
        _complete(path, abouts[name], {part.layer for place in mine for part in place}, shapes[name])
    return changes


def _field(match: re.Match[str]) -> str:
    groups = ("side", "factor", "bare", "bias", "magnitude", "lycoris", "other")
    name = next(match[group] for group in groups if match[group])
    return FIELDS.get(name, name)


def _places(layer: str, tables: Mapping[str, tuple[list[str], dict[str, Place]]]) -> list[tuple[str, Place]]:
    """Which places of which parts the ``layer`` of a file can be."""
    flat = _flat(layer)
    found: dict[tuple[str, Place], None] = {}  # in the tables' order
    for name, (before, table) in tables.items():
        for prefix in before:
            if flat.startswith(prefix) and flat[len(prefix) :] in table:
                found[name, table[flat[len(prefix) :]]] = None
    return list(found)


def _flat(layer: str) -> str:
    """A layer's name without wrappers, its dots written as kohya's underscores."""
    layer = f".{layer}"
    for wrapper in WRAPPERS:
        layer = layer.replace(f".{wrapper}", ".")
    return layer[1:].replace(".", "_")


def _idle(fields: Fields) -> bool:
    """Are these weights of a layer a change by 0?"""
    outer = [value.float() for field, (_, value) in fields.items() if field in ("up", "diff", "bias")]
    known = fields.keys() <= {"up", "mid", "down", "alpha", "diff", "bias"}
    return bool(outer) and known and not any(value.any() for value in outer)


def _some(keys: Sequence[str]) -> str:
    return ", ".join(plain(key, 200) for key in keys[:3])


def _twice(path: Path, one: str, other: str) -> DiffpoError:
    return DiffpoError(
        f"{path} changes one layer twice, by {plain(one, 200)} and {plain(other, 200)}; nothing was applied"
    )


def _once(path: Path, found: Mapping[Place, Fields]) -> None:
    """DiffpoError if rows of a layer are changed twice, as a part of one place and of another."""
    seen: dict[str, list[tuple[Part, str]]] = {}
    for place, fields in found.items():
        key = next(iter(fields.values()))[0]
        for part in place:
            for other, first in seen.setdefault(part.layer, []):
                if part.start < other.stop and other.start < part.stop:
                    raise _twice(path, first, key)
            seen[part.layer].append((part, key))


# ---- one change


def _change(path: Path, fields: Fields, about: dict[str, Any], place: Place, shape: tuple[int, ...]) -> Change:
    """The change that the ``fields`` of one ``place`` of ``shape`` say."""
    keys = {field: plain(key, 200) for field, (key, _) in fields.items()}
    kinds = [kind for kind, names in FACTORS.items() if names & fields.keys()]
    if len(kinds) > 1:
        one, other = (min(keys[field] for field in FACTORS[kind] & fields.keys()) for kind in kinds[:2])
        raise _twice(path, one, other)
    kind = kinds[0] if kinds else "full"
    if missing := _missing(kind, fields.keys()):
        raise DiffpoError(
            f"{path} has {min(keys.values())} without {missing} of the same layer: the file is incomplete"
        )
    values = {field: _number(path, key, value) for field, (key, value) in fields.items() if field != "alpha"}
    factors = {field: value for field, value in values.items() if field in FACTORS[kind]}
    if empty := [keys[field] for field, value in factors.items() if not value.numel()]:
        raise DiffpoError(f"{path}: {empty[0]} is empty")
    rank = _rank(kind, factors)
    scale = _scale(path, fields.get("alpha"), rank, kind, about, place[0].layer)
    magnitude = _magnitude(path, *fields["magnitude"], shape) if "magnitude" in fields else None
    if about.get("use_dora") and magnitude is None:
        raise DiffpoError(
            f"{path} has the setting use_dora, but no magnitudes beside {min(keys.values())}: the file is incomplete"
        )
    bias = values.get("bias")
    if "lora_bias" in values:
        bias = scale * values["lora_bias"] + (0 if bias is None else bias)
    if bias is not None and (tuple(bias.shape) != shape[:1] or ("lora_bias" in values and magnitude is not None)):
        raise DiffpoError(f"{path}: {keys.get('lora_bias') or keys['bias']} does not fit {place[0].layer}")
    change = Change(kind, factors, scale, magnitude, bias)
    try:
        change._replace(factors={field: value.to("meta") for field, value in factors.items()}).delta(shape)
    except (RuntimeError, IndexError, ValueError) as error:
        given = ", ".join(f"{keys[field]} {tuple(value.shape)}" for field, value in factors.items())
        raise DiffpoError(
            f"{path} does not fit this model: {given} give no change of {place[0].layer} {shape}"
        ) from error
    return change


def _missing(kind: str, fields: Set[str]) -> str | None:
    """What a change of the ``kind`` lacks to be whole."""
    needed: list[tuple[set[str], ...]] = []
    if kind == "lora":
        needed = [({"down", "up"},)]
    elif kind == "loha":
        needed = [({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},)]
        needed += [({"hada_t1", "hada_t2"},)] if {"hada_t1", "hada_t2"} & fields else []
    elif kind == "lokr":
        needed = [({f"lokr_w{i}"}, {f"lokr_w{i}_a", f"lokr_w{i}_b"}) for i in (1, 2)]
    elif not fields & {"diff", "bias"}:
        needed = [({"down", "up"},)]
    for choices in needed:
        if not any(choice <= fields for choice in choices):
            return min(min(choice - fields) for choice in choices)
    return None


def _number(path: Path, key: str, value: Tensor) -> Tensor:
    """A weight as float32; DiffpoError unless it is of real numbers."""
    if not value.is_floating_point():
        raise DiffpoError(f"{path}: {plain(key, 200)} is of type {value.dtype}, which no LoRA weight has")
    value = value.float()
    if not value.isfinite().all():
        raise DiffpoError(f"{path}: {plain(key, 200)} is not finite")
    return value


def _rank(kind: str, factors: Mapping[str, Tensor]) -> int | None:
    """The rank by which alpha is divided; None where nothing has a rank."""
    names = {"lora": ["down"], "loha": ["hada_w1_b"], "lokr": ["lokr_w2_b", "lokr_w1_b"], "full": []}
    return next((len(factors[name]) for name in names[kind] if name in factors and factors[name].dim()), None)


def _scale(
    path: Path, alpha: tuple[str, Tensor] | None, rank: int | None, kind: str, about: dict[str, Any], layer: str
) -> float:
    """alpha / rank, by the file's alpha of the layer, by peft's settings, or 1."""
    if kind == "full":
        return 1.0
    said = None
    if "r" in about:
        stated = _pattern(about["rank_pattern"], layer, about["r"])
        if rank is not None and stated != rank:
            raise DiffpoError(f"{path} states rank {stated} for {layer}, but its weights have rank {rank}")
        size = math.sqrt(stated) if about.get("use_rslora") else stated
        said = _pattern(about["alpha_pattern"], layer, about.get("lora_alpha", about.get("alpha", stated))) / size
    if alpha is None:
        return 1.0 if said is None else said
    key, value = alpha
    if rank is None:
        return 1.0 if said is None else said
    if value.numel() != 1 or not value.isreal().all() or not math.isfinite(value.item()) or not value.item():
        raise DiffpoError(f"{path}: {plain(key, 200)} is {plain(value.tolist(), 50)}, which is not a valid alpha")
    scale = value.item() / rank
    if said is not None and not math.isclose(said, scale, rel_tol=1e-3):
        raise DiffpoError(f"{path}: {plain(key, 200)} gives a scale of {scale:g}, but its settings give {said:g}")
    return scale


def _pattern(patterns: Mapping[tuple[bool, str], tuple[int, float]], layer: str, default: float) -> float:
    """What peft's patterns say of a layer: the first that names it, or the end of its name."""
    steps = layer.split(".")
    ends = [(False, ".".join(steps[i:])) for i in range(len(steps))]
    found = [patterns[key] for key in ((True, layer), *ends) if key in patterns]
    return min(found)[1] if found else default


def _magnitude(path: Path, key: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """DoRA's norms as (out, 1, ...), which peft has as (out,) or (1, out, 1, 1), or as (1, in, 1, ...)."""
    value = _number(path, key, value)
    ones = (1,) * (len(shape) - 2)
    if value.numel() == shape[0] and (value.dim() == 1 or value.shape[0] == shape[0] or "magnitude" in key):
        return value.reshape(-1, 1, *ones)
    if value.dim() > 1 and value.shape[0] == 1 and value.numel() == value.shape[1] == shape[1]:
        return value.reshape(1, -1, *ones)
    raise DiffpoError(f"{path} does not fit this model: {plain(key, 200)} {tuple(value.shape)} is no norm of {shape}")


# ---- settings


def _about(path: Path, settings: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """peft's settings of the part ``name``, checked; empty if the file has none."""
    network = [] if name.startswith("text_encoder") else ["unet", "transformer"]
    about = next((settings[key] for key in (name, *network, "") if key in settings), {})
    if about.get("peft_type") not in (None, "LORA", "LOHA", "LOKR"):
        raise DiffpoError(f"{path} is of peft's kind {plain(about['peft_type'], 50)}; diffpo reads LORA, LOHA and LOKR")
    for key, value in about.items():
        if value and key not in USED | HARMLESS:
            raise DiffpoError(f"{path}: its setting {plain(key, 50)}={plain(value, 50)} is not understood")
    start = about.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(REWRITES_BASE):
        raise DiffpoError(
            f"{path} began with init_lora_weights={plain(start, 50)}, which changes the base model too: save it with "
            f"peft's path_initial_model_for_weight_conversion"
        )
    for key in ("r", "lora_alpha", "alpha"):
        if key in about and not _positive(about[key]):
            raise DiffpoError(f"{path}: its setting {key}={plain(about[key], 50)} is not a number above 0")
    return about | {key: _patterns(path, key, about.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")}


def _patterns(path: Path, key: str, patterns: Any) -> dict[tuple[bool, str], tuple[int, float]]:
    """peft's rank_pattern or alpha_pattern by names: whether a name is whole (or the end of one) -> when it is asked,
    and the number. Other regular expressions than names are refused, as some take forever."""
    if not isinstance(patterns, dict) or not all(map(_positive, patterns.values())):
        raise DiffpoError(f"{path}: its setting {key} does not map layers to numbers")
    found: dict[tuple[bool, str], tuple[int, float]] = {}
    for order, (pattern, value) in enumerate(patterns.items()):
        name = pattern.replace("\\.", ".")
        if not PATTERN.fullmatch(name):
            raise DiffpoError(f"{path}: {plain(pattern, 100)} in its setting {key} is not the name of a layer")
        found.setdefault((name[:1] == "^", name.strip("^$")), (order, value))
    return found


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


def _complete(path: Path, about: dict[str, Any], changed: Set[str], layers: Iterable[str]) -> None:
    """DiffpoError if layers are missing that the settings say were adapted."""
    targets = about.get("target_modules")
    if not isinstance(targets, list) or any(about.get(key) for key in ("exclude_modules", "layers_to_transform")):
        return
    if missing := sorted(matching(layers, targets) - changed):
        raise DiffpoError(f"{path} has no weights of {missing[0]}, which its settings list; the file is incomplete")
