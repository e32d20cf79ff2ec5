"""For tests of step scorers: a random CLIP, pairs that differ in brightness, inputs of a scorer."""

import torch
from tiny import TEXT, clip_tokenizer, pick_a_pic_rows, picture, png

from diffpo import models
from diffpo.config import Model


def make_clip(folder):
    """A random CLIPModel of 16 px with tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    ids = {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**TEXT, **ids}, vision_config={**vision, "image_size": 16, "patch_size": 8}, projection_dim=12
    )
    CLIPModel(config).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    return folder


def brightness_rows(n, ties):
    """Rows in Pick-a-Pic's columns in which the brighter image wins; the last ``ties`` are ties."""
    rows = pick_a_pic_rows(n, ties=ties)
    for i, row in enumerate(rows):
        for which in (0, 1):
            dark = picture(2 * i + which).point(lambda value: value // 4)
            row[f"jpg_{which}"] = png(dark.point(lambda value: value + 190) if which == i % 2 else dark)
    return rows


def family_of(path):
    """The family with its encoders, and its network."""
    family = models.load(Model(path=str(path)))
    family.load_encoders()
    return family, family.load_network()


def inputs(family, n=3, seed=0):
    """x_t, x_0, t, captions, cond."""
    generator = torch.Generator().manual_seed(seed)
    x_t, x_0 = torch.randn(2, n, 4, 8, 8, generator=generator)
    captions = [f"cat {i}" for i in range(n)]
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).repeat(n, 1)
    cond = family.condition(family.encode_text(captions), sizes)
    return x_t, x_0, torch.tensor([900, 400, 0][:n]), captions, cond
