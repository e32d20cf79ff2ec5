"""For tests of exports: runs with a LoRA that is not zero, and calls of every family's network."""

import json

import diffusers
import tiny_transformers as tiny
import torch

from diffpo import models
from diffpo.config import Lora, Model
from diffpo.models.identity import base_identity
from diffpo.weights import lora, lora_file

MAKE = {
    "sd3": tiny.make_sd3,
    "pixart": tiny.make_pixart,
    "flux": tiny.make_flux,
    "dit": lambda folder: tiny.make_dit(folder, names=("golden retriever",)),
}


def train(path, run, rank=2, alpha=3, targets=None, kind="lora", **more):
    """A run folder ``run`` with a LoRA for the pipeline in ``path`` that is not zero; the network with it. ``more`` of
    the settings `lora`."""
    family = models.load(Model(path=str(path)), resolution=16)
    network = family.load_network()
    base = base_identity(network, "me/base")
    draw = torch.Generator().manual_seed(0)
    settings = Lora(kind=kind, rank=rank, alpha=alpha, targets=targets, **more)
    lora.add_lora(network, settings, family.lora_targets)
    for name, parameter in lora.adapter_parameters(network).items():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.randn(parameter.shape, generator=draw)
        else:
            torch.nn.init.normal_(parameter, std=0.2, generator=draw)
    about = {"objective": "ipo", "beta": 250.0, "base": base, "data_hash": "d4t4", "pairs_per_update": 8, "step": 5}
    run.mkdir()
    lora.save_lora(run / lora_file.FILE_NAME, network, family.component, about)
    return network


def inputs(network):
    """Something to call any of the networks with."""
    draw = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.randn(*shape, generator=draw)

    config, kind = network.config, type(network).__name__
    x, t = rand(2, 4, 8, 8), torch.tensor([50, 700])
    if kind == "UNet2DConditionModel":
        added = None
        if config.addition_embed_type:
            added = {"text_embeds": rand(2, 16), "time_ids": torch.full((2, 6), 16.0)}
        text = rand(2, 5, config.cross_attention_dim)
        return {"sample": x, "timestep": t, "encoder_hidden_states": text, "added_cond_kwargs": added}
    if kind == "DiTTransformer2DModel":
        return {"hidden_states": x, "timestep": t, "class_labels": torch.tensor([0, 3])}
    if kind == "PixArtTransformer2DModel":
        text = rand(2, 5, config.caption_channels)
        sizes = {"resolution": None, "aspect_ratio": None}
        return {"hidden_states": x, "timestep": t, "encoder_hidden_states": text, "added_cond_kwargs": sizes}
    text, pooled = rand(2, 5, config.joint_attention_dim), rand(2, config.pooled_projection_dim)
    common = {"timestep": t, "encoder_hidden_states": text, "pooled_projections": pooled}
    if kind == "SD3Transformer2DModel":
        return {"hidden_states": x, **common}
    ids = {"txt_ids": torch.zeros(5, 3), "img_ids": torch.zeros(16, 3), "guidance": torch.ones(2)}
    return {"hidden_states": rand(2, 16, 16), **common, **ids}


@torch.no_grad()
def output(network):
    return network(**inputs(network)).sample


def fresh(path):
    """The pipeline by diffusers alone; its network and scheduler are enough here."""
    index = json.loads((path / "model_index.json").read_text())
    parts = [name for name, value in index.items() if isinstance(value, list)]
    left_out = {name: None for name in parts if name not in ("unet", "transformer", "scheduler")}
    return diffusers.DiffusionPipeline.from_pretrained(path, **left_out)
