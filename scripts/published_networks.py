"""Networks of released models with random weights: from their published configs, without a network connection."""

import json
from pathlib import Path

import torch

from diffpo import models
from diffpo.common.carried import HOME as ROOT
from diffpo.config import Model
from diffpo.models.released import DDIM, EULER, UNET, UNET_XL

# config.json of the released networks where it differs from the class's defaults
MMDIT = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
MODELS = {  # pipeline, scheduler, component, its config
    "sd15": ("StableDiffusionPipeline", DDIM, "unet", UNET),
    "sdxl": ("StableDiffusionXLPipeline", EULER, "unet", UNET_XL),
    "sd3": ("StableDiffusion3Pipeline", FLOW, "transformer", MMDIT),
}


def make_family(name: str, precision: str, resolution: int, folder: Path):
    """The family of a pipeline of configs without weights, which are written into ``folder``."""
    if name == "tiny":
        return models.load(Model(path=str(ROOT / "assets" / "tiny-sdxl")), precision, resolution)
    pipeline, scheduler, component, config = MODELS[name]
    vae = {"block_out_channels": [128, 256, 512, 512]}  # 8 px to a latent
    files = {"scheduler/scheduler_config": scheduler, "vae/config": vae, f"{component}/config": config}
    for path, content in ({"model_index": {"_class_name": pipeline}} | files).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / f"{path}.json").write_text(json.dumps(content))
    family = models.load(Model(path=str(folder)), precision, resolution)
    family.meta_network()  # reads the config, which is not there for long
    return family


def make_network(family, device):
    """Random weights, in the precision of the run from the start: twice as much might not fit."""
    torch.manual_seed(0)
    torch.set_default_dtype(family.dtype)
    with device:
        network = family._class().from_config(family._config(family.component))
    torch.set_default_dtype(torch.float32)
    return torch.nn.Module.to(network, family.dtype).requires_grad_(False).eval()
