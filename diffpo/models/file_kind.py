"""Which model a file holds, by the names and shapes of its weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ..common.errors import DiffpoError
from ..common.text import plain
from .file_header import Weight
from .layouts import LAYOUTS, UNET, Layout
from .recent_files import RECENT, START

FAMILY = "take a model of another family"
# what else people have in such files, by the name of a weight: what it is, and what to do with it
OTHERS = (
    (
        r"(^|\.|_)lora[._](unet|te\d?|transformer|A|B|up|down)[._]|\.(hada_w1_a|lokr_w1|oft_blocks|oft_diag)",
        "a LoRA, not a model",
        "pass it as --lora (or lora.start), and its base model as --model",
    ),
    (
        r"\.(absmax|quant_map|qweight|weight_scale_2)$|bitsandbytes__",
        "quantised to few bits",
        "take the model in fp16, bf16 or fp8; model.base_weights=nf4 quantises it while it is loaded",
    ),
    (r"^edm_mean$", "Playground v2.5, which has EDM's noise levels", FAMILY),
    (r"^control_model\.|controlnet_", "a ControlNet", "name the model that it is for"),
    (r"individual_token_refiner\.", "HunyuanVideo", FAMILY),
    (r"^all_x_embedder\.", "Z-Image's network alone, with diffusers' names", "name the folder of the pipeline"),
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


def kind_of(file: Path, weights: dict[str, Weight]) -> str:
    """Which of `LAYOUTS` it is. DiffpoError that says what it is if it is none of them."""
    names = "\n".join(weights)

    def has(pattern: str) -> bool:
        return re.search(pattern, names, re.MULTILINE) is not None

    for pattern, what, advice in OTHERS:
        if has(pattern):
            raise DiffpoError(f"{file} is {what}: {advice}")
    for kind, recent in RECENT.items():
        if has(START + recent.mark):
            return kind
    if has(rf"^{re.escape(UNET)}input_blocks\.0\.0\.weight$"):
        return _unet_kind(file, weights, has)
    if has(r"^(model\.diffusion_model\.)?joint_blocks\.0\.x_block\.attn\.qkv\.weight$"):
        return "sd3"
    if has(r"^(model\.diffusion_model\.)?double_blocks\.0\.img_attn\.qkv\.weight$"):
        return "flux"
    for pattern, what, advice in ALONE:
        if has(pattern):
            raise DiffpoError(f"{file} is {what}: {advice}")
    example = f", e.g. {plain(min(weights), 200)}" if weights else ""
    known = ", ".join(layout.title for layout in LAYOUTS.values())
    raise DiffpoError(
        f"{file} is not a model that diffpo knows ({len(weights)} weights{example}). One file can hold {known}; other "
        f"families are read from a pipeline's folder"
    )


def _unet_kind(file: Path, weights: dict[str, Weight], has: Callable[[str], bool]) -> str:
    """By the text encoders; without any by what the UNet takes: a pooled embedding, texts of some width."""
    if has(r"^conditioner\.embedders\.1\."):
        return "sdxl"
    if has(r"^cond_stage_model\."):
        return "sd2" if has(r"^cond_stage_model\.model\.") else "sd1"
    width = next((weight.shape[-1:] for name, weight in weights.items() if name.endswith(".attn2.to_k.weight")), ())
    if not has(rf"^{re.escape(UNET)}label_emb\."):
        return "sd2" if width == (1024,) else "sd1"
    if width == (1280,):
        raise DiffpoError(f"{file} is the UNet of SDXL's refiner: {FAMILY}")
    return "sdxl"


def parts_of(layout: Layout, weights: dict[str, Weight]) -> tuple[dict[str, dict[str, str]], list[str]]:
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
