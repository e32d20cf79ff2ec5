"""Tiny pipelines of the families that read texts and pictures by Qwen-VL, with real architectures."""

from pathlib import Path

import torch
from tiny import vae
from tiny_language import CHAT, EYES, ROPE, WIDTH, language, qwen_tokenizer
from tiny_transformers import _not_zero, _save


def _qwen_vl(tokenizer):
    """Qwen2.5-VL, which has eyes too."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = language(vocab_size=len(tokenizer), rope_parameters=rope)
    del text["head_dim"]
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    marks = dict(zip(names, tokenizer.convert_tokens_to_ids(list(EYES)), strict=True))
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=eyes, **marks))


def qwen_vae():
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[-0.7, 0.1, 0.9, 0.2],
        latents_std=[2.8, 1.4, 0.6, 1.2],
    )


def _qwen_parts(folder_seed):
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

    torch.manual_seed(folder_seed)
    tokenizer = qwen_tokenizer()
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=ROPE,
    )
    scheduler = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    return {
        "transformer": _not_zero(transformer),
        "scheduler": FlowMatchEulerDiscreteScheduler(**scheduler, use_dynamic_shifting=True),
        "vae": qwen_vae(),
        "text_encoder": _qwen_vl(tokenizer),
        "tokenizer": tokenizer,
    }


def make_qwen_image(folder: Path, seed: int = 0) -> Path:
    from diffusers import QwenImagePipeline

    return _save(QwenImagePipeline(**_qwen_parts(seed)), folder)


def make_qwen_image_edit(folder: Path, seed: int = 0, plus: bool = False) -> Path:
    from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline

    parts = _qwen_parts(seed)
    kind = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    return _save(kind(**parts, processor=_qwen_processor(parts["tokenizer"])), folder)


def _qwen_processor(tokenizer):
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    return Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT)


def make_qwen_image_edit_plus(folder: Path) -> Path:
    return make_qwen_image_edit(folder, plus=True)


def make_krea2(folder: Path, seed: int = 0) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel
    from transformers import Qwen3VLConfig, Qwen3VLModel

    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = language(vocab_size=len(tokenizer), rope_parameters=rope)
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    eyes |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=ROPE,
    )
    shift = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 6400}
    pipe = Krea2Pipeline(
        transformer=_not_zero(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(**shift, use_dynamic_shifting=True),
        vae=qwen_vae(),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=eyes)),
        tokenizer=tokenizer,
        text_encoder_select_layers=(1, 2),
    )
    return _save(pipe, folder)


def make_qwen_image21(folder: Path, seed: int = 0) -> Path:
    """Its VAE has the real factor, 16 pixels to a latent, which the pipeline takes for granted."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    torch.manual_seed(seed)
    chat = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    tokenizer = qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    text = language(vocab_size=len(tokenizer), rope_parameters=rope)
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    eyes |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 16}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    marks = dict(zip(names, tokenizer.convert_tokens_to_ids(list(EYES)), strict=True))
    seen = Qwen2VLImageProcessor(size={"shortest_edge": 32 * 32, "longest_edge": 2**20}, patch_size=16)
    transformer = QwenImage21Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=WIDTH,
        axes_dims_rope=ROPE,
    )
    vae = AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, False, False, False],
        latents_mean=[-0.7, 0.1, 0.9, 0.2],
        latents_std=[2.8, 1.4, 0.6, 1.2],
    )
    pipe = QwenImage21Pipeline(
        transformer=_not_zero(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(base_shift=0.5, max_shift=0.9, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=eyes, **marks)),
        processor=Qwen3VLProcessor(seen, tokenizer, Qwen3VLVideoProcessor(), chat_template=chat),
    )
    return _save(pipe, folder)


def make_longcat(folder: Path, seed: int = 0, edit: bool = False) -> Path:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        LongCatImageEditPipeline,
        LongCatImagePipeline,
        LongCatImageTransformer2DModel,
    )

    torch.manual_seed(seed)
    channels = 16 if edit else 4  # the edit pipeline takes no other number
    tokenizer = qwen_tokenizer()
    transformer = LongCatImageTransformer2DModel(
        in_channels=4 * channels,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=ROPE,
    )
    pipe = (LongCatImageEditPipeline if edit else LongCatImagePipeline)(
        transformer=_not_zero(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(channels, shift_factor=0.1),
        text_encoder=_qwen_vl(tokenizer),
        tokenizer=tokenizer,
        text_processor=_qwen_processor(tokenizer),
    )
    return _save(pipe, folder)


def make_longcat_edit(folder: Path) -> Path:
    return make_longcat(folder, edit=True)
