import original_format
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_transformers import make_sd3

from diffpo.common.carried import HOME as ROOT

EMBEDDED = ROOT / "assets" / "tiny-sdxl"


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory):
    """SD3.5's network. The original does not project CLIP-L's embedding, for which diffusers has the identity."""
    folder = make_sd3(tmp_path_factory.mktemp("sd3") / "sd3", qk_norm="rms_norm", dual_attention_layers=(0,))
    file = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {"text_projection.weight": torch.eye(16)}, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def one(tmp_path_factory, tiny_sd, tiny_sdxl, tiny_sd3):
    """one(name): the folder of a tiny pipeline, and the same as one file."""
    folders, made = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "embedded": EMBEDDED}, {}
    write = {"sd": original_format.sd1, "sd3": original_format.sd3}

    def get(name):
        if name not in made:
            file = tmp_path_factory.mktemp("files") / f"{name}.safetensors"
            made[name] = write.get(name, original_format.sdxl)(folders[name], file)
        return folders[name], made[name]

    return get
