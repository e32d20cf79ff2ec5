"""Tokenizer, text encoders and UNet (stage unet)."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffpo.shapes import SIZE, train_captions

from .common import LATENT_CHANNELS, LATENT_NOISE, SEED, average, load_scenes, log, to_tensor
from .vae import load_vae

TEXT_LENGTH = 24


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges are learnt from this world's captions."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    t = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    t.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    t.train_from_iterator(train_captions(), trainer)
    merges = [
        tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in json.loads(t.to_str())["model"]["merges"]
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *[a + "</w>" for a in alphabet], *["".join(m) for m in merges]]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {w: i for i, w in enumerate(dict.fromkeys(words))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for word in sorted({w for c in train_captions() for w in c.split()}):
        if len(tokenizer(word).input_ids) != 3:
            raise RuntimeError(f"{word!r} is not one token: {tokenizer.tokenize(word)}")
    return tokenizer


def make_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    def config(**more) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **more,
        )

    return CLIPTextModel(config()), CLIPTextModelWithProjection(config(projection_dim=64, hidden_act="gelu"))


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(4, 8),  # the number of heads, in this class
        cross_attention_dim=128,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 64,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def encode_text(encoders, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As StableDiffusionXLPipeline does: penultimate hidden states side by side, pooled from the second encoder."""
    one = encoders[0](ids, output_hidden_states=True)
    two = encoders[1](ids, output_hidden_states=True)
    return torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1), two.text_embeds


def sdxl_alphas() -> torch.Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def train_unet(work: Path, steps: int = 4400, decay_steps: int = 800, batch: int = 32, lr: float = 1e-3) -> None:
    """Epsilon prediction, SDXL's noise schedule, min-SNR-5 weights, 10 % zeroed text (the pipeline's force_zeros).

    Constant rate with a linear decay at the end. Stopped on purpose while the model still errs: about 200,000 samples
    would get three held-out prompts in four wholly right and leave alignment little to do.
    """
    torch.manual_seed(SEED + 2)
    images, captions = load_scenes(work)
    vae, tokenizer = load_vae(work), make_tokenizer(work / "tokenizer")
    with torch.no_grad():
        latents = torch.cat([vae.encode(to_tensor(x)).latent_dist.mode() for x in np.array_split(images, 200)])
    distinct = sorted(set(captions))
    ids = tokenizer(distinct, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    position = {c: i for i, c in enumerate(distinct)}
    index = torch.tensor([position[c] for c in captions])
    log(work, "unet", latents=len(latents), latent_std=latents.std().item(), captions=len(distinct))

    unet, encoders = make_unet(), make_text_encoders(tokenizer)
    modules = {"unet": unet, "text_encoder": encoders[0], "text_encoder_2": encoders[1]}
    parameters = [p for m in modules.values() for p in m.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-2)
    ema = [p.detach().clone() for p in parameters]
    abar = sdxl_alphas()
    time_ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32)

    def save(name: str) -> None:
        state, it = {}, iter(ema)
        for prefix, module in modules.items():
            for key, _ in module.named_parameters():
                state[f"{prefix}.{key}"] = next(it).clone()
        save_file(state, work / name)
        log(work, "unet", step=step, saved=name)

    started, step, running = time.time(), 0, None
    while step < steps:
        rate = lr * min(1.0, (step + 1) / 200, (steps - step) / decay_steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        pick = torch.randint(0, len(latents), (batch,))
        x0 = latents[pick] + LATENT_NOISE * torch.randn(batch, LATENT_CHANNELS, SIZE // 4, SIZE // 4)
        text, pooled = encode_text(encoders, ids[index[pick]])
        keep = (torch.rand(batch) > 0.1).float()
        text, pooled = text * keep[:, None, None], pooled * keep[:, None]
        # stratified timesteps: less variance per batch than independent ones
        t = ((torch.rand(batch) + torch.arange(batch)) / batch * 1000).long().clamp(max=999)
        a = abar[t][:, None, None, None]
        noise = torch.randn_like(x0)
        x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
        added = {"text_embeds": pooled, "time_ids": time_ids.expand(batch, -1)}
        predicted = unet(x_t, t, text, added_cond_kwargs=added).sample
        mse = (predicted - noise).pow(2).mean((1, 2, 3))
        snr = abar[t] / (1 - abar[t])
        loss = (mse * (5 / snr).clamp(max=1)).mean()
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        average(ema, parameters, step)
        step += 1
        running = mse.mean().item() if running is None else 0.98 * running + 0.02 * mse.mean().item()
        if step % 200 == 0:
            log(
                work,
                "unet",
                step=step,
                of=steps,
                mse=running,
                grad_norm=norm.item(),
                lr=rate,
                seconds=time.time() - started,
            )
        if step % 600 == 0:
            save(f"unet-{step}.safetensors")
    save("unet.safetensors")
