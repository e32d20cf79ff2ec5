"""A model in one safetensors file with the original programs' names, as ComfyUI, A1111 and Forge read it.

The weights are the file's. The configs, tokenizers and the scheduler, which are not in it, are those of a pipeline:
`model.config`, else what released.py knows, else a repository of the hub. So are parts that the file lacks.

diffusers' `from_single_file` reads the network and the VAE. It has no public face for a text encoder, and its pipelines
tell two of them apart by their width alone, so that these go by original.py into transformers' loader.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..common.errors import DiffpoError
from ..common.hub import limit_waiting
from ..common.text import plain
from ..config import Model
from . import original, released
from .pipeline import Pipeline, hash_of, read_config, read_index
from .pretrained import dtype_option, hub_failed, hush, local

if TYPE_CHECKING:
    import torch

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", ".sft", ".gguf", *PICKLED)
CONFIGS = ("*.json", "*.txt", "*.model")  # of a repository: all but the weights
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # parts of a pipeline that no file has
VELOCITY = "-v"  # behind the name of a released pipeline: its network predicts v
HUB = {
    "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
    "flux-dev": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
}
CONVERT = """python -c "import torch; from safetensors.torch import save_file
d = torch.load('{0}', map_location='cpu', weights_only=True); d = d.get('state_dict', d)
save_file({{k: v.clone().contiguous() for k, v in d.items() if isinstance(v, torch.Tensor)}}, '{1}')\""""

FAMILY = "take a model of another family"
# what else people have in such files, by the name of a weight: what it is, and what to do with it
OTHERS = (
    (
        r"(^|\.|_)lora[._](unet|te\d?|transformer|A|B|up|down)[._]|\.(hada_w1_a|lokr_w1|oft_blocks|oft_diag)",
        "a LoRA, not a model",
        "name it with --lora (or lora.start), and with --model the model that it is of",
    ),
    (
        r"\.(absmax|quant_map|qweight|weight_scale_2)$|bitsandbytes__",
        "quantised to few bits",
        "take the model in fp16, bf16 or fp8; model.base_weights=nf4 quantises it while it is loaded",
    ),
    (r"^edm_mean$", "Playground v2.5, which has EDM's noise levels", FAMILY),
    (r"^control_model\.|controlnet_", "a ControlNet", "name the model that it is for"),
    (r"individual_token_refiner\.", "HunyuanVideo", FAMILY),
    (r"distilled_guidance_layer\.", "Chroma", FAMILY),
    (r"single_stream_modulation\.", "FLUX.2", FAMILY),
    (r"motion_modules\.|\.time_stack\.", "a model of videos", FAMILY),
    (r"^conditioner\.embedders\.0\.model\.", "SDXL's refiner, which only changes pictures of SDXL", FAMILY),
)
ALONE = (
    (
        r"^input_blocks\.0\.0\.weight$",
        "a UNet alone",
        "name the whole checkpoint, or the folder of a pipeline that has this UNet",
    ),
    (
        r"^(down_blocks\.0|(single_)?transformer_blocks\.0)\.",
        "the network of a pipeline alone, with diffusers' names",
        "name the folder of the pipeline",
    ),
    (
        r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.conv_in\.weight$",
        "a VAE alone",
        "set model.vae to it, and model.path to a model",
    ),
    (r"text_model\.|resblocks\.0\.|^encoder\.block\.0\.layer\.0\.", "a text encoder alone", "name a whole model"),
    (r"^(emb_params|string_to_param|clip_l|clip_g)$", "a textual inversion", "name the model that it is for"),
)
INPUTS = {  # channels that a network takes beside the 4 (FLUX: 64) of text-to-image
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an image-editing model",
    9: "an inpainting model",
    128: "FLUX Depth or Canny",
    384: "FLUX Fill, which is for inpainting",
}
FIRST = ("input_blocks.0.0.weight", "img_in.weight", "x_embedder.proj.weight")  # the layers that take them
SCALES = (".scale_weight", ".weight_scale")  # of fp8 weights, as ComfyUI writes them
# what is beside the weights of a part, or is not used by it
BESIDE = re.compile(
    r"\.(scale_weight|weight_scale|scale_input|input_scale|comfy_quant|position_ids|logit_scale)$|(^|\.)scaled_fp8$|"
    r"clip_l\..*text_projection\.weight$|^(first_stage_model|vae)\.(loss|model_ema)\."
)
# what is of no part and need not be read: averages of the weights, numbers of the noise schedule, marks
INCIDENTAL = re.compile(
    r"^model_ema\.|^(betas|logvar|lvlb_weights|scale_factor|global_step|v_pred|ztsnr)$|alphas_cumprod(_prev)?$|"
    r"^posterior_\w+$|^edm_vpred\.|^denoiser\."
)


class Weight(NamedTuple):
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]


def is_one(path: str) -> bool:
    """Does ``path`` mean a file, rather than a folder or a hub id?"""
    place = os.path.expanduser(path)  # os.path knows no errors, of names that are too long for example
    named = place.lower().endswith(SUFFIXES) or "://" in path
    return not os.path.isdir(place) and (named or os.path.isfile(place))


class SingleFile:
    """A model in one file, with the methods of `pipeline.Pipeline`.

    Only the header is read until a part is asked for, and nothing is ever unpickled. DiffpoError, which names the file
    and what it is, for anything but a model of a family that diffpo trains.

    Attributes:
        parts: the parts of the pipeline that are in the file: {name in the part: name in the file}.
        missing: those that are not.
        name: whose configs are used: a folder, a hub id, or one of released.py, with `VELOCITY` perhaps.
    """

    def __init__(self, settings: Model) -> None:
        self.settings, self.file = settings, Path(os.path.expanduser(settings.path))
        self.weights, self.metadata = read_header(self.file, settings.path)
        self.kind = kind_of(self.file, self.weights)
        self.layout = original.LAYOUTS[self.kind]
        self.parts, self.strangers = _parts(self.layout, self.weights)
        self.missing = [part for part in self.layout.parts if part not in self.parts]
        self.component = next(iter(self.layout.parts))
        self.name = settings.config or self._default()
        self.released = self.name.removesuffix(VELOCITY) in released.PIPELINES

    # ---- whose configs

    def _default(self) -> str:
        told = {"v": True, "epsilon": False}.get(self.metadata.get("modelspec.prediction_type", ""))
        told = True if "v_pred" in self.weights else told
        if self.kind == "sd2" and told is None:
            raise DiffpoError(
                f"{self.file} is {self.layout.title}, and does not say if it predicts noise or v: set model.config (or "
                f"--model-config) to sd2 or to sd2{VELOCITY}. The released models for 768 px predict v"
            )
        if self.kind in released.PIPELINES:
            return self.kind + (VELOCITY if told else "")
        inner = self.parts[self.component]
        if self.kind == "flux":
            return HUB["flux-dev" if "guidance_in.in_layer.weight" in inner else "flux-schnell"]
        if "joint_blocks.37.x_block.attn.qkv.weight" in inner:
            return HUB["sd3.5-large"]
        return HUB["sd3.5-medium" if "joint_blocks.0.x_block.attn2.qkv.weight" in inner else "sd3-medium"]

    @property
    def place(self) -> str:
        """What diffusers takes for the configs."""
        return str(self.folder)

    @property
    def lender(self) -> Pipeline:
        """The pipeline that has the parts which the file lacks."""
        here = self.released or os.path.isdir(local(self.name))
        return Pipeline(self.settings.model_copy(update={"path": self.place if here else self.name, "config": None}))

    @functools.cached_property
    def folder(self) -> Path:
        """Where its configs are on this machine."""
        if self.released:
            return released.folder(self.name.removesuffix(VELOCITY))
        folder = Path(local(self.name))
        if os.path.isdir(folder):
            if not (folder / "model_index.json").is_file():
                raise DiffpoError(f"model.config={self.name} is not the folder of a pipeline: no model_index.json")
            return folder
        if self.name.startswith(("/", ".", "~")) or self.name.count("/") > 1:
            raise DiffpoError(f"model.config={self.name}: there is no such folder; paths start from {Path.cwd()}")
        from huggingface_hub import snapshot_download

        limit_waiting()
        try:
            folder = Path(snapshot_download(self.name, revision=self.settings.revision, allow_patterns=[*CONFIGS]))
            if not (folder / "model_index.json").is_file():
                raise OSError("the copy in the cache holds no model_index.json")
            return folder
        except Exception as error:
            if not hub_failed(error):
                raise
            raise self._fetch(plain(error, 300)) from error

    def _fetch(self, reason: str) -> DiffpoError:
        """What to have fetched from the hub."""
        wanted = [*CONFIGS, *(f"{part}/*.safetensors" for part in self.missing)]
        include = " ".join(f"--include '{pattern}'" for pattern in wanted)
        lacking = f" and what it lacks ({', '.join(self.missing)})" if self.missing else ""
        known = ", ".join([*released.PIPELINES, *(name + VELOCITY for name in ("sd2", "sdxl"))])
        none = f"none of {known} and " if "/" not in self.name else ""
        return DiffpoError(
            f"{self.file} is {self.layout.title}. Its configs{lacking} are taken from {self.name!r}, which is {none}no "
            f"folder in {Path.cwd()}, and the hub did not give it. With a network, run `hf download {self.name} "
            f"{include}` once (log in with `hf auth login` if the model is gated). Without, set model.config (or "
            f"--model-config) to a pipeline's folder. ({reason})"
        )

    def index(self) -> dict[str, Any]:
        index = read_index(self.folder / "model_index.json")
        if index["_class_name"] != self.layout.pipeline:
            raise DiffpoError(
                f"{self.file} is {self.layout.title}, and model.config={self.name} is of a {index['_class_name']}: "
                f"name a {self.layout.pipeline}"
            )
        return index

    def config(self, part: str) -> dict[str, Any]:
        with self._reading(part):
            config = read_config(self.folder, part)
        if part == "scheduler" and self.kind in released.PIPELINES:
            if "v_pred" in self.weights or (self.released and self.name.endswith(VELOCITY)):
                config["prediction_type"] = "v_prediction"
            if "ztsnr" in self.weights:  # its last timestep is pure noise, where sampling begins (arXiv 2305.08891)
                config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return config

    def require(self, parts: set[str]) -> None:
        """DiffpoError unless this is a text-to-image model of the configs' family, and each of ``parts`` is in the file
        or can be where the configs are."""
        self.index()
        inner, wanted = self.parts[self.component], self.config(self.component).get("in_channels")
        takes = next((self.weights[inner[name]].shape[1:2] for name in FIRST if name in inner), ())
        if wanted and takes != (wanted,):
            channels = takes[0] if takes else 0
            known = f" It is {INPUTS[channels]}." if channels in INPUTS else ""
            raise DiffpoError(
                f"the network in {self.file} takes {channels} channels, and one by the configs of {self.name} takes "
                f"{wanted}.{known} Name a text-to-image model, or its own configs with model.config (--model-config)"
            )
        absent = [
            part for part in self.missing if part in parts and not any((self.folder / part).glob("*.safetensors"))
        ]
        if absent and self.lender.place != self.place:  # of the hub
            from huggingface_hub import constants

            if constants.HF_HUB_OFFLINE:
                raise self._fetch(f"HF_HUB_OFFLINE is set, and the cache has no {', '.join(absent)}")
        elif absent:
            vae = ", or model.vae to a VAE" if absent == ["vae"] else ""
            raise DiffpoError(
                f"{self.file} holds {', '.join(self.parts)} alone. Set model.config (or --model-config) to the folder "
                f"or hub id of a pipeline that has {', '.join(absent)}{vae}"
            )

    # ---- the parts

    def fits(self, part: str, module: torch.nn.Module) -> None:
        """DiffpoError unless ``module`` (on the meta device will do) has as many weights as the file."""
        there = sum(math.prod(self.weights[name].shape) for name in self.parts[part].values())
        here = sum(value.numel() for value in module.state_dict().values())
        if there != here:
            raise DiffpoError(
                f"the {part} in {self.file} has {there:,} weights, and one by the configs of {self.name} has {here:,}: "
                f"set model.config (or --model-config) to a pipeline of the same architecture"
            )

    def module(self, cls: Any, part: str, dtype: torch.dtype) -> torch.nn.Module:
        if part not in self.parts:
            self.require({part})
            return self.lender.module(cls, part, dtype)
        with self._reading(part):
            if not hasattr(cls, "from_single_file"):
                return self._text_encoder(cls, part, dtype)
            state = {self.parts[part][name]: value for name, value in self._state(part, dtype).items()}
            return _converted(cls, state, self.place, part, dtype)

    def _text_encoder(self, cls: Any, part: str, dtype: torch.dtype) -> torch.nn.Module:
        import torch
        import transformers

        config = cls.config_class.from_pretrained(str(self.folder), subfolder=part)
        state, prefix = self._state(part, dtype), self.layout.parts[part][0]
        if prefix.endswith(".model."):
            state = original.from_open_clip(state, config.num_hidden_layers)
            if cls.__name__ == "CLIPTextModel":
                state.pop("text_projection.weight", None)
        elif "clip_l" in prefix and cls.__name__ == "CLIPTextModelWithProjection":
            # SD3's own code does not project this embedding, for which diffusers has the identity
            state["text_projection.weight"] = torch.eye(config.hidden_size, dtype=dtype)
        elif not prefix.endswith("t5xxl.transformer."):
            state = original.clip(state)  # old merges lack a part of the names
        # what it would say of weights that do not fit is said below
        before = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
        try:
            module, found = cls.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        finally:
            transformers.utils.logging.set_verbosity(before)
        other = [name for name, *_ in found["mismatched_keys"]]
        if lost := sorted({*found["missing_keys"], *found["unexpected_keys"], *other}):
            raise ValueError(f"{len(lost)} weights are missing, not known or of another shape, e.g. {lost[0]}")
        return module

    def _state(self, part: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The part's weights by their names in it; fp8 in ``dtype``, multiplied by its scale if it has one."""
        from safetensors import safe_open

        state = {}
        with safe_open(self.file, "pt") as file:
            for name, full in self.parts[part].items():
                value, kind = file.get_tensor(full), self.weights[full].dtype
                scales = [scale for end in SCALES if (scale := full.removesuffix(".weight") + end) in self.weights]
                if scales and not kind.startswith("F8"):
                    raise ValueError(f"{full} is quantised as {kind}; take the model in fp16, bf16 or fp8")
                if scales:
                    value = value.float() * file.get_tensor(scales[0]).float()
                state[name] = value.to(dtype) if kind.startswith("F8") else value
        return state

    def _reading(self, part: str) -> contextlib.AbstractContextManager[None]:
        return _reading(f"the {part} of {self.file}", self.name)

    def pipeline(self, dtype: torch.dtype | dict[str, torch.dtype], **parts: Any) -> Any:
        from diffusers import DiffusionPipeline

        index = self.index()
        there = {name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[0]}
        there -= parts.keys()
        self.require(there)
        if self.strangers:
            print(
                f"{self.file}: {len(self.strangers)} weights are of no part of {self.layout.title} and were not read, "
                f"e.g. {plain(self.strangers[0])}"
            )
        for name in there.intersection(self.parts):
            parts[name] = self.module(self._class(name), name, dtype[name] if isinstance(dtype, dict) else dtype)
        if "scheduler" in there:
            parts["scheduler"] = self._class("scheduler").from_config(self.config("scheduler"))
        for name in there.intersection(OPTIONAL):
            parts[name] = None
        if "safety_checker" in there:
            parts["requires_safety_checker"] = False
        if there.intersection(self.missing):
            return self.lender.pipeline(dtype, **parts)
        with self._reading("tokenizer"):
            return DiffusionPipeline.from_pretrained(self.place, **dtype_option(dtype), **parts)

    def _class(self, part: str) -> Any:
        """The class of a part, of diffusers' and transformers' alone."""
        import diffusers
        import transformers

        library, name = self.index()[part]
        found = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), str(name), None)
        if found is None:
            raise DiffpoError(f"{self.folder / 'model_index.json'}: {part} is no class of diffusers or transformers")
        return found

    def fingerprint(self) -> str:
        """A hash of the file and of all else that decides an image."""
        total = sha256()
        with open(self.file, "rb") as file:
            total.update(file_digest(file, "sha256").digest())
        if self.lender.place == self.place:
            total.update(f"{self.name}{hash_of(self.folder, *(k[1:] for k in CONFIGS), '.safetensors')}".encode())
        else:
            total.update(self.folder.name.encode())  # the commit
        return f"sha256:{total.hexdigest()}"

    def stored(self, part: str) -> str | None:
        if part in self.missing:
            return self.lender.stored(part)
        counts = Counter(self.weights[name].dtype for name in self.parts.get(part, {}).values())
        return counts.most_common(1)[0][0] if counts else None


def read_vae(path: str, place: str) -> torch.nn.Module:
    """The VAE in a file, alone or beside others, in float32, by the VAE's config of the pipeline ``place``."""
    import torch
    from diffusers import AutoencoderKL
    from safetensors import safe_open

    file = Path(os.path.expanduser(path))
    weights, _ = read_header(file, path)
    prefixes = [each for each in (*original.VAE, "") if f"{each}decoder.conv_in.weight" in weights]
    if not prefixes:
        raise DiffpoError(f"model.vae={path} holds no VAE: there is no decoder.conv_in in it")
    with _reading(f"the VAE in {file}", place), safe_open(file, "pt") as opened:
        names = [name for name in weights if name.startswith(prefixes[0]) and not BESIDE.search(name)]
        state = {name: opened.get_tensor(name) for name in names}
        return _converted(AutoencoderKL, state, place, "vae", torch.float32)


def _converted(cls: Any, state: dict[str, torch.Tensor], place: str, part: str, dtype: torch.dtype) -> torch.nn.Module:
    """By diffusers. ValueError if weights are missing or left over, on which it does not insist."""
    hush()
    there = sum(value.numel() for value in state.values())
    module = cls.from_single_file(state, config=place, subfolder=part, **dtype_option(dtype))
    if empty := [name for name, value in module.state_dict().items() if value.is_meta]:
        raise ValueError(f"{len(empty)} of its weights are missing, e.g. {empty[0]}")
    if there != (here := sum(value.numel() for value in module.state_dict().values())):
        raise ValueError(f"it has {there:,} weights, and one by these configs has {here:,}")
    return module


@contextlib.contextmanager
def _reading(what: str, configs: str) -> Iterator[None]:
    """Turns what the loaders raise for weights or configs of another model into one message."""
    try:
        yield
    except DiffpoError:
        raise
    except Exception as error:  # of diffusers' converters, whatever weights with odd names lead them to
        reason = plain(error, 300) or type(error).__name__
        raise DiffpoError(
            f"cannot read {what} by the configs of {configs}: {reason}. Those of another model are set with "
            f"model.config (or --model-config)"
        ) from error


def write(path: Path, pipe: Any, source: Any) -> None:
    """Write the pipeline as one file, by the original names, and read it back by the configs of ``source``: every
    weight must be what it is, to the last bit. DiffpoError if it is not, or if a weight has no name there."""
    import torch
    from safetensors.torch import save_file

    kind = source.kind if isinstance(source, SingleFile) else original.kind(pipe)
    parts = [part for part in original.LAYOUTS[kind].parts if getattr(pipe, part, None) is not None]
    state = {name: value.contiguous() for name, value in original.weights(original.LAYOUTS[kind], pipe, parts)}
    header = {"format": "pt"}
    if kind in released.PIPELINES:
        velocity = pipe.scheduler.config.get("prediction_type") == "v_prediction"
        header["modelspec.prediction_type"] = "v" if velocity else "epsilon"
        marks = {"v_pred": velocity, "ztsnr": pipe.scheduler.config.get("rescale_betas_zero_snr")}
        state |= {mark: torch.zeros(0) for mark, wanted in marks.items() if wanted}
    save_file(state, path, header)
    del state
    configs = source.name if isinstance(source, SingleFile) else source.place
    written = SingleFile(source.settings.model_copy(update={"path": str(path), "config": configs}))
    for part in parts:
        module = getattr(pipe, part)
        ours, theirs = module.state_dict(), written.module(type(module), part, module.dtype).state_dict()
        if wrong := [name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])]:
            raise DiffpoError(
                f"one file does not keep the {part}: {wrong[0]} ({len(wrong)} of {len(ours)}) is read back as another "
                f"weight, so it was not kept. Use --to merged, a pipeline's folder"
            )


# ---- the header


def read_header(file: Path, path: str) -> tuple[dict[str, Weight], dict[str, str]]:
    """Names, types and shapes of all weights, and the metadata. DiffpoError unless it is a whole safetensors file."""
    from safetensors import safe_open

    if "://" in path:
        raise DiffpoError(f"{path} is an address: fetch the file (`hf download OWNER/NAME FILE`) and name it here")
    if not os.path.isfile(file):
        raise DiffpoError(
            f"there is no file {file} (relative paths start from {Path.cwd()}). One of the hub is fetched with `hf "
            f"download OWNER/NAME FILE`, which prints its place"
        )
    try:
        with open(file, "rb") as opened:
            start = opened.read(64)
        if start.startswith(b"GGUF") or file.suffix.lower() == ".gguf":
            raise DiffpoError(f"{file} is quantised for llama.cpp (GGUF): take the model as safetensors")
        # safetensors begin with the header's length, 8 bytes, which may be any
        other = start[8:9] != b"{" and start.startswith((b"PK\x03\x04", b"\x80"))
        if other or file.suffix.lower() in PICKLED:
            command = CONVERT.format(file, file.with_name(f"{file.stem}-converted.safetensors"))
            raise DiffpoError(
                f"{file} is pickled, and a pickle can run any program, so it is not opened. Take the model as "
                f"safetensors, or convert it (this reads tensors alone, and refuses the rest):\n{command}"
            )
        if start.startswith(b"version https://git-lfs"):
            raise DiffpoError(f"{file} is the pointer that Git LFS leaves: `git lfs pull` fetches the weights")
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            weights = {name: Weight(each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}
            return weights, dict(opened.metadata() or {})
    except DiffpoError:
        raise
    except Exception as error:  # of safetensors; OSError
        reason = getattr(error, "strerror", None) or plain(error, 200)
        raise DiffpoError(
            f"cannot read the model {file}: {reason}. It is truncated or no safetensors file: fetch it again"
        ) from error


def kind_of(file: Path, weights: dict[str, Weight]) -> str:
    """Which of `original.LAYOUTS` it is. DiffpoError that says what it is if it is none of them."""
    names = "\n".join(weights)

    def has(pattern: str) -> bool:
        return re.search(pattern, names, re.MULTILINE) is not None

    for pattern, what, advice in OTHERS:
        if has(pattern):
            raise DiffpoError(f"{file} is {what}: {advice}")
    if has(rf"^{re.escape(original.UNET)}input_blocks\.0\.0\.weight$"):
        return _unet_kind(file, weights, has)
    if has(r"^(model\.diffusion_model\.)?joint_blocks\.0\.x_block\.attn\.qkv\.weight$"):
        return "sd3"
    if has(r"^(model\.diffusion_model\.)?double_blocks\.0\.img_attn\.qkv\.weight$"):
        return "flux"
    for pattern, what, advice in ALONE:
        if has(pattern):
            raise DiffpoError(f"{file} is {what}: {advice}")
    example = f", e.g. {plain(min(weights), 200)}" if weights else ""
    known = ", ".join(layout.title for layout in original.LAYOUTS.values())
    raise DiffpoError(
        f"{file} is no model that is known here ({len(weights)} weights{example}). One file can hold {known}; other "
        f"families are read from a pipeline's folder"
    )


def _unet_kind(file: Path, weights: dict[str, Weight], has: Callable[[str], bool]) -> str:
    """By the text encoders; without any by what the UNet takes: a pooled embedding, texts of some width."""
    if has(r"^conditioner\.embedders\.1\."):
        return "sdxl"
    if has(r"^cond_stage_model\."):
        return "sd2" if has(r"^cond_stage_model\.model\.") else "sd1"
    width = next((weight.shape[-1:] for name, weight in weights.items() if name.endswith(".attn2.to_k.weight")), ())
    if not has(rf"^{re.escape(original.UNET)}label_emb\."):
        return "sd2" if width == (1024,) else "sd1"
    if width == (1280,):
        raise DiffpoError(f"{file} is the UNet of SDXL's refiner: {FAMILY}")
    return "sdxl"


def _parts(layout: original.Layout, weights: dict[str, Weight]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The weights of each part that is there, and the names of those that belong to none."""
    left = dict.fromkeys(name for name in weights if not BESIDE.search(name) and not INCIDENTAL.search(name))
    found = {}
    for part in sorted(layout.parts, key=lambda part: "" in layout.parts[part]):
        for prefix in layout.parts[part]:
            if names := {name.removeprefix(prefix): name for name in left if name.startswith(prefix)}:
                found[part] = names
                left = dict.fromkeys(name for name in left if not name.startswith(prefix))
                break
    return {part: found[part] for part in layout.parts if part in found}, sorted(left)
