"""One training run as the existing SDXL scripts for Diffusion-DPO with a LoRA do it, written afresh.

Each step decodes and transforms the pictures of its pairs, encodes both with the VAE (float32, 8 at a time) and the
captions with both text encoders, and runs the UNet twice: with gradients for the policy, and without for the reference.
The reference is the same UNet with its adapter off (diffusers' train_diffusion_dpo_sdxl.py) or a second UNet in memory
(DiffusionDPO's train.py). One process for accelerate, AdamW, a clip of the gradient's norm, no caches.
"""

import argparse
import io
import math

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from PIL import Image
from torchvision import transforms
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

from .clock import ClockedAdamW

VAE_BATCH = 8
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class Pairs:
    """Rows of a Pick-a-Pic table as examples: pixels (6, H, W) with the chosen picture first, sizes, crops, tokens."""

    def __init__(self, resolution: int, tokenizers: list) -> None:
        self.resolution, self.tokenizers = resolution, tokenizers
        self.resize = transforms.Resize(resolution, interpolation=transforms.InterpolationMode.BILINEAR)
        self.to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])

    def picture(self, data: bytes) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        size = (image.height, image.width)
        image = self.resize(image)
        top = max(0, round((image.height - self.resolution) / 2))
        left = max(0, round((image.width - self.resolution) / 2))
        image = transforms.functional.crop(image, top, left, self.resolution, self.resolution)
        return self.to_tensor(image), size, (top, left)

    def __call__(self, rows: dict) -> dict:
        found: dict[str, list] = {"pixel_values": [], "size": [], "crop": []}
        for first, second, label in zip(rows["jpg_0"], rows["jpg_1"], rows["label_0"], strict=True):
            chosen, rejected = (first, second) if label else (second, first)
            pictures = [self.picture(data) for data in (chosen, rejected)]
            found["pixel_values"].append(torch.cat([pixels for pixels, _, _ in pictures]))
            found["size"].append(pictures[0][1])
            found["crop"].append(pictures[0][2])
        for k, tokenizer in enumerate(self.tokenizers):
            length = tokenizer.model_max_length
            options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
            found[f"tokens_{k}"] = list(tokenizer(list(rows["caption"]), **options).input_ids)
        return found


def collate(examples: list[dict]) -> dict:
    batch = {key: torch.stack([each[key] for each in examples]) for key in ("pixel_values", "tokens_0", "tokens_1")}
    return batch | {key: [each[key] for each in examples] for key in ("size", "crop")}


def encode_text(encoders: list, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The penultimate states of both encoders side by side, and the pooled output of the second."""
    states, pooled = [], None
    for k, encoder in enumerate(encoders):
        out = encoder(batch[f"tokens_{k}"], output_hidden_states=True, return_dict=False)
        pooled = out[0]
        states.append(out[-1][-2])
    return torch.cat(states, -1), pooled


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--second-unet", action="store_true")
    args = parser.parse_args()

    accelerator = Accelerator()
    set_seed(0)
    noise_schedule = DDPMScheduler.from_pretrained(args.model, subfolder="scheduler")
    tokenizers = [AutoTokenizer.from_pretrained(args.model, subfolder=f"tokenizer{k}") for k in ("", "_2")]
    encoders = [
        CLIPTextModel.from_pretrained(args.model, subfolder="text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(args.model, subfolder="text_encoder_2"),
    ]
    vae = AutoencoderKL.from_pretrained(args.model, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet")
    second = UNet2DConditionModel.from_pretrained(args.model, subfolder="unet") if args.second_unet else None
    for module in (*encoders, vae, unet, *([second] if second else [])):
        module.requires_grad_(False).to(accelerator.device)
    unet.add_adapter(
        LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=TARGETS)
    )
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = ClockedAdamW(weights, lr=5e-4)

    rows = datasets.load_dataset("parquet", data_files={"train": args.data}, split="train")
    for name in ("jpg_0", "jpg_1"):
        if isinstance(rows.features[name], datasets.Image):
            rows = rows.cast_column(name, datasets.Value("binary"))
    rows = rows.filter(lambda label: label in (0, 1), input_columns="label_0").with_transform(
        Pairs(args.resolution, tokenizers)
    )
    loader = torch.utils.data.DataLoader(
        rows, batch_size=args.batch_size, shuffle=True, collate_fn=collate, drop_last=True, num_workers=0
    )
    schedule = get_scheduler("constant", optimizer=optimizer)
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    unet.train()

    bar = tqdm(total=args.steps, desc="baseline")
    done, epochs = 0, math.ceil(args.steps / len(loader))
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(unet):
                logs = step(batch, unet, second, vae, encoders, noise_schedule, accelerator)
                accelerator.backward(logs["loss"])
                accelerator.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            bar.update(1)
            bar.set_postfix({name: value.detach().item() for name, value in logs.items()})
            done += 1
            if done == args.steps:
                return


def step(batch, unet, second, vae, encoders, noise_schedule, accelerator) -> dict[str, torch.Tensor]:
    """The loss of a batch of pairs, and what is logged beside it."""
    with torch.no_grad():
        pixels = torch.cat(batch["pixel_values"].chunk(2, dim=1))
        parts = [vae.encode(part).latent_dist.sample() for part in pixels.split(VAE_BATCH)]
        latents = torch.cat(parts) * vae.config.scaling_factor
        noise = torch.randn_like(latents).chunk(2)[0].repeat(2, 1, 1, 1)
        count = len(latents) // 2
        t = torch.randint(0, noise_schedule.config.num_train_timesteps, (count,), device=latents.device).repeat(2)
        noisy = noise_schedule.add_noise(latents, noise, t)
        side = batch["pixel_values"].shape[-1]
        sizes = [[*size, *crop, side, side] for size, crop in zip(batch["size"], batch["crop"], strict=True)]
        time_ids = torch.tensor(sizes, dtype=latents.dtype, device=latents.device).repeat(2, 1)
        text, pooled = encode_text(encoders, batch)
        added = {"time_ids": time_ids, "text_embeds": pooled.repeat(2, 1)}
        inputs = {"encoder_hidden_states": text.repeat(2, 1, 1), "added_cond_kwargs": added}
    target = noise
    if noise_schedule.config.prediction_type == "v_prediction":
        target = noise_schedule.get_velocity(latents, noise, t)
    losses = F.mse_loss(unet(noisy, t, **inputs).sample.float(), target.float(), reduction="none").mean((1, 2, 3))
    bare = accelerator.unwrap_model(unet)
    with torch.no_grad():
        if second is None:
            bare.disable_adapters()
        reference = (second or bare)(noisy, t, **inputs).sample
        if second is None:
            bare.enable_adapters()
        reference = F.mse_loss(reference.float(), target.float(), reduction="none").mean((1, 2, 3))
    ours, theirs = (errors.chunk(2)[0] - errors.chunk(2)[1] for errors in (losses, reference))
    logits = -0.5 * 500 * (ours - theirs)
    accuracy = (logits > 0).float().mean() + 0.5 * (logits == 0).float().mean()
    return {
        "loss": -F.logsigmoid(logits).mean(),
        "raw_loss": losses.mean(),
        "ref_loss": reference.mean(),
        "accuracy": accuracy,
    }


if __name__ == "__main__":
    main()
