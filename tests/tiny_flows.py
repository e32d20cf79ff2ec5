"""Tiny pipelines of the other families whose text encoders are language models, with real architectures."""

from pathlib import Path

import torch
from tiny import TEXT, clip_text_config, clip_tokenizer, vae
from tiny_language import ROPE, WIDTH, language, qwen_tokenizer
from tiny_transformers import T5_WIDTH, _not_zero, _save, _t5


def make_z_image(folder: Path, seed: int = 0) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=list(ROPE),
        axes_lens=[1024, 64, 64],
    )
    pipe = ZImagePipeline(
        transformer=_not_zero(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1),
        text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **language())),
        tokenizer=tokenizer,
    )
    return _save(pipe, folder)


def _flux2_vae():
    from diffusers import AutoencoderKLFlux2

    found = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
    )
    found.bn.running_mean.normal_()
    found.bn.running_var.uniform_(0.5, 2)
    return found


def _flux2_transformer(guidance: bool):
    from diffusers import Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    return _not_zero(transformer)


def _flux2_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def make_flux2_klein(folder: Path, seed: int = 0, distilled: bool = False) -> Path:
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    text = language(vocab_size=len(tokenizer), num_hidden_layers=28, num_attention_heads=1)  # layer 27 is read
    pipe = Flux2KleinPipeline(
        transformer=_flux2_transformer(guidance=False),
        scheduler=_flux2_scheduler(),
        vae=_flux2_vae(),
        text_encoder=Qwen3ForCausalLM(Qwen3Config(**text)),
        tokenizer=tokenizer,
        is_distilled=distilled,
    )
    return _save(pipe, folder)


def make_ovis_image(folder: Path, seed: int = 0) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    transformer = OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=ROPE,
    )
    pipe = OvisImagePipeline(
        transformer=_not_zero(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1),
        text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **language())),
        tokenizer=tokenizer,
    )
    return _save(pipe, folder)


def gemma_tokenizer(phrases):
    """A real Gemma tokenizer that spells words out in letters; each of the ``phrases`` is one token."""
    from transformers import GemmaTokenizer

    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:<>-'"
    symbols = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    tokenizer = GemmaTokenizer(
        vocab={token: i for i, token in enumerate(symbols)}, merges=[], model_max_length=2048, padding_side="right"
    )
    tokenizer.add_tokens(list(phrases))
    return tokenizer


def _gemma(tokenizer):
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), query_pre_attn_scalar=8, **language()))


def make_sana(folder: Path, seed: int = 0) -> Path:
    import inspect

    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    torch.manual_seed(seed)
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    tokenizer = gemma_tokenizer(instruction)
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    sizes = {"attention_head_dim": 4, "latent_channels": 4, "scaling_factor": 0.41407}
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_block_types": blocks, f"{half}_block_out_channels": (8, 8, 8)}
        sizes |= {f"{half}_layers_per_block": (1, 1, 1), f"{half}_qkv_multiscales": ((), (), (5,))}
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=32,
    )
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe = SanaPipeline(
        transformer=_not_zero(transformer),
        scheduler=DPMSolverMultistepScheduler(**flow),
        vae=AutoencoderDC(**sizes),
        text_encoder=_gemma(tokenizer),
        tokenizer=tokenizer,
    )
    return _save(pipe, folder)


def make_lumina2(folder: Path, seed: int = 0) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    torch.manual_seed(seed)
    system = (
        "You are an assistant designed to generate superior images with the superior degree of image-text alignment"
    )
    tokenizer = gemma_tokenizer([system, " based on textual prompts or user prompts.", " <Prompt Start> "])
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=ROPE,
        axes_lens=(300, 32, 32),
        cap_feat_dim=WIDTH,
    )
    pipe = Lumina2Pipeline(
        transformer=_not_zero(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=vae(shift_factor=0.1),
        text_encoder=_gemma(tokenizer),
        tokenizer=tokenizer,
    )
    return _save(pipe, folder)


def make_chroma(folder: Path, seed: int = 0) -> Path:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(seed)
    t5, tokenizer = _t5()
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        axes_dims_rope=ROPE,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipe = ChromaPipeline(
        transformer=_not_zero(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(shift_factor=0.1),
        text_encoder=t5,
        tokenizer=tokenizer,
    )
    return _save(pipe, folder)


def make_hidream(folder: Path, seed: int = 0) -> Path:
    from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline, HiDreamImageTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    t5, t5_tokenizer = _t5()
    long = {**clip_text_config().to_dict(), "max_position_embeddings": 248}
    clips = [CLIPTextModelWithProjection(CLIPTextConfig(**long)) for _ in range(2)]
    tokenizer = qwen_tokenizer()
    llama = LlamaConfig(vocab_size=len(tokenizer), _attn_implementation="eager", **language())
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[T5_WIDTH, WIDTH],
        text_emb_dim=2 * TEXT["projection_dim"],
        axes_dims_rope=ROPE,
        max_resolution=(16, 16),
        llama_layers=[0, 1, 1],
    )
    pipe = HiDreamImagePipeline(
        transformer=_not_zero(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.1),
        text_encoder=clips[0],
        tokenizer=clip_tokenizer(),
        text_encoder_2=clips[1],
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
        text_encoder_4=LlamaForCausalLM(llama),
        tokenizer_4=tokenizer,
    )
    return _save(pipe, folder)


def _pixtral_processor():
    """A tokenizer that reads conversations of text and pictures."""
    from transformers import PixtralImageProcessor, PixtralProcessor

    tokenizer = qwen_tokenizer()
    tokenizer.add_tokens(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], special_tokens=True)
    chat = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>{% endfor %}"
    )
    return PixtralProcessor(image_processor=PixtralImageProcessor(), tokenizer=tokenizer, chat_template=chat)


def make_flux2(folder: Path, seed: int = 0) -> Path:
    from diffusers import Flux2Pipeline
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(seed)
    processor = _pixtral_processor()
    text = {"model_type": "mistral", "vocab_size": len(processor.tokenizer)}
    text |= language(num_hidden_layers=31, num_attention_heads=1)  # layer 30 is read
    eyes = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    eyes |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 32, "patch_size": 16}
    marked = processor.tokenizer.convert_tokens_to_ids("[IMG]")
    config = Mistral3Config(text_config=text, vision_config=eyes, image_token_index=marked)
    pipe = Flux2Pipeline(
        transformer=_flux2_transformer(guidance=True),
        scheduler=_flux2_scheduler(),
        vae=_flux2_vae(),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=processor,
    )
    return _save(pipe, folder)
