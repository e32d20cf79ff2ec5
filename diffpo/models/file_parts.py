"""The parts of a pipeline out of a file's weights, by the loaders of diffusers and transformers.

diffusers' `from_single_file` reads the network and the VAE. It has no public interface for a text encoder, and its
pipelines distinguish two of them by their width alone. So these are renamed (original.py) for transformers' loader.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import DiffpoError
from ..common.text import plain
from . import original
from .file_header import read_header
from .file_kind import BESIDE
from .layouts import VAE
from .pretrained import dtype_option, hush

if TYPE_CHECKING:
    import torch


def converted(
    cls: Any,
    state: dict[str, torch.Tensor],
    config: tuple[str, str],
    dtype: torch.dtype,
    unused: Collection[str] = (),
) -> torch.nn.Module:
    """By diffusers, with the ``config`` of a pipeline's part. ValueError if weights are missing or left over beside
    those that are ``unused``, which diffusers itself accepts."""
    hush()
    there = sum(value.numel() for name, value in state.items() if name not in unused)
    module = cls.from_single_file(state, config=config[0], subfolder=config[1], **dtype_option(dtype))
    if empty := [name for name, value in module.state_dict().items() if value.is_meta]:
        raise ValueError(f"{len(empty)} of its weights are missing, e.g. {empty[0]}")
    if there != (here := sum(value.numel() for value in module.state_dict().values())):
        raise ValueError(f"it has {there:,} weights, but these configs give {here:,}")
    return module


def text_encoder(
    cls: Any, config: Any, prefix: str, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> torch.nn.Module:
    """By transformers, whose class ``cls`` has this ``config``; ``prefix``: what its weights have in the file, which
    says whose names they are. ValueError if weights are missing, left over or of another shape."""
    import torch
    import transformers

    if prefix.endswith(".model."):
        state = original.from_open_clip(state, config.num_hidden_layers)
        if cls.__name__ == "CLIPTextModel":
            state.pop("text_projection.weight", None)
    elif "clip_l" in prefix and cls.__name__ == "CLIPTextModelWithProjection":
        # SD3's own code does not project this embedding, for which diffusers has the identity
        state["text_projection.weight"] = torch.eye(config.hidden_size, dtype=dtype)
    elif not prefix.endswith("t5xxl.transformer."):
        state = original.clip(state)  # old merges lack a part of the names
    options = {"ignore_mismatched_sizes": True, "output_loading_info": True}
    # what it would say of weights that do not fit is said below
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    try:
        module, found = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)
    finally:
        transformers.utils.logging.set_verbosity(before)
    other = [name for name, *_ in found["mismatched_keys"]]
    if lost := sorted({*found["missing_keys"], *found["unexpected_keys"], *other}):
        raise ValueError(f"{len(lost)} weights are missing, unknown or of another shape, e.g. {lost[0]}")
    return module


@contextlib.contextmanager
def reading(what: str, configs: str) -> Iterator[None]:
    """Turns the loaders' errors for weights or configs of another model into one message."""
    try:
        yield
    except DiffpoError:
        raise
    except Exception as error:  # of diffusers' converters, whatever weights with odd names lead them to
        reason = plain(error, 300) or type(error).__name__
        raise DiffpoError(
            f"cannot read {what} with the configs of {configs}: {reason}. To use other configs, set model.config (or "
            f"--model-config)"
        ) from error


def read_vae(path: str, name_or_path: str) -> torch.nn.Module:
    """The VAE in a file, alone or beside others, in float32, by the VAE's config of the pipeline ``name_or_path``."""
    import torch
    from diffusers import AutoencoderKL
    from safetensors import safe_open

    file = Path(os.path.expanduser(path))
    weights, _ = read_header(file, path)
    prefixes = [each for each in (*VAE, "") if f"{each}decoder.conv_in.weight" in weights]
    if not prefixes:
        raise DiffpoError(f"model.vae={path} holds no VAE: there is no decoder.conv_in in it")
    with reading(f"the VAE in {file}", name_or_path), safe_open(file, "pt") as opened:
        names = [name for name in weights if name.startswith(prefixes[0]) and not BESIDE.search(name)]
        state = {name: opened.get_tensor(name) for name in names}
        return converted(AutoencoderKL, state, (name_or_path, "vae"), torch.float32)
