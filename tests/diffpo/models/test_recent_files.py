"""Networks in one file, as ComfyUI has them: written by hand, read by diffusers."""

import re

import pytest
import tiny_flows as tiny
import tiny_qwen
import torch
from safetensors.torch import load_file, save_file
from single_files import same

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Model
from diffpo.models import layouts
from diffpo.train.loop import train
from diffpo.weights import lora_file

MAKE = {
    "z_image": tiny.make_z_image,
    "qwen_image": tiny_qwen.make_qwen_image,
    "qwen_edit": tiny_qwen.make_qwen_image_edit,
    "flux2": tiny.make_flux2_klein,
    "sana": tiny.make_sana,
    "hidream": tiny.make_hidream,
    "krea2": tiny_qwen.make_krea2,
}
# diffusers' names as regular expressions, and the original's
NAMES = {
    "z_image": {
        r"^all_(x_embedder|final_layer)\.2-1": r"\1",
        r"attention\.norm_([qk])": r"attention.\1_norm",
        r"attention\.to_out\.0": "attention.out",
    },
    "flux2": {
        r"^x_embedder": "img_in",
        r"^context_embedder": "txt_in",
        r"^time_guidance_embed\.timestep_embedder\.linear_1": "time_in.in_layer",
        r"^time_guidance_embed\.timestep_embedder\.linear_2": "time_in.out_layer",
        r"modulation(_img|_txt)?\.linear": r"modulation\1.lin",
        r"^proj_out": "final_layer.linear",
        r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
        r"^transformer_blocks\.(\d+)\.attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
        r"^transformer_blocks\.(\d+)\.attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
        r"^transformer_blocks\.(\d+)\.attn\.norm_([qk])\.weight": r"double_blocks.\1.img_attn.norm.\2.scale",
        r"^transformer_blocks\.(\d+)\.attn\.norm_added_([qk])\.weight": r"double_blocks.\1.txt_attn.norm.\2.scale",
        r"^transformer_blocks\.(\d+)\.ff\.linear_in": r"double_blocks.\1.img_mlp.0",
        r"^transformer_blocks\.(\d+)\.ff\.linear_out": r"double_blocks.\1.img_mlp.2",
        r"^transformer_blocks\.(\d+)\.ff_context\.linear_in": r"double_blocks.\1.txt_mlp.0",
        r"^transformer_blocks\.(\d+)\.ff_context\.linear_out": r"double_blocks.\1.txt_mlp.2",
        r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj": r"single_blocks.\1.linear1",
        r"^single_transformer_blocks\.(\d+)\.attn\.to_out": r"single_blocks.\1.linear2",
        r"^single_transformer_blocks\.(\d+)\.attn\.norm_([qk])\.weight": r"single_blocks.\1.norm.\2.scale",
        r"norm\.q\.scale": "norm.query_norm.scale",
        r"norm\.k\.scale": "norm.key_norm.scale",
    },
    "krea2": {
        r"^img_in\.": "first.",
        r"^time_embed\.linear_1": "tmlp.0",
        r"^time_embed\.linear_2": "tmlp.2",
        r"^time_mod_proj": "tproj.1",
        r"^txt_in\.norm\.weight": "txtmlp.0.scale",
        r"^txt_in\.linear_1": "txtmlp.1",
        r"^txt_in\.linear_2": "txtmlp.3",
        r"^text_fusion": "txtfusion",
        r"^transformer_blocks\.(\d+)\.scale_shift_table": r"blocks.\1.mod.lin",
        r"^transformer_blocks": "blocks",
        r"^final_layer\.norm\.weight": "last.norm.scale",
        r"^final_layer\.scale_shift_table": "last.modulation.lin",
        r"^final_layer": "last",
        r"attn\.to_([qkv])\.": r"attn.w\1.",
        r"attn\.to_out\.0": "attn.wo",
        r"attn\.to_gate": "attn.gate",
        r"attn\.norm_([qk])\.weight": r"attn.qknorm.\1norm.scale",
        r"\.ff\.": ".mlp.",
        r"norm1\.weight": "prenorm.scale",
        r"norm2\.weight": "postnorm.scale",
    },
    "sana": {
        r"^patch_embed\.proj": "x_embedder.proj",
        r"^time_embed\.emb\.timestep_embedder\.linear_1": "t_embedder.mlp.0",
        r"^time_embed\.emb\.timestep_embedder\.linear_2": "t_embedder.mlp.2",
        r"^time_embed\.linear": "t_block.1",
        r"^caption_projection\.linear_": "y_embedder.y_proj.fc",
        r"^caption_norm": "attention_y_norm",
        r"^proj_out": "final_layer.linear",
        r"^scale_shift_table": "final_layer.scale_shift_table",
        r"attn1\.to_out\.0": "attn.proj",
        r"attn2\.to_out\.0": "cross_attn.proj",
        r"attn2\.to_q": "cross_attn.q_linear",
        r"ff\.conv_(inverted|depth|point)": r"mlp.\1_conv.conv",
        r"^transformer_blocks": "blocks",
    },
}
STACKED = {  # layers that are one in the original, in their order
    "z_image": {"attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v")},
    "flux2": {"img_attn.qkv": ("to_q", "to_k", "to_v"), "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj")},
    "sana": {
        "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    },
}
UNUSED = {  # what released files have beside
    "z_image": {"norm_final.weight": (4,)},
    "sana": {"pos_embed": (1, 4, 4), "y_embedder.y_embedding": (3, 4)},
}


def written(name, folder, file):
    """The network of the pipeline in ``folder`` as a ``file`` in the original's names."""
    state = load_file(next((folder / "transformer").glob("*.safetensors")))
    found = {}
    for whole, parts in STACKED.get(name, {}).items():
        for key in [key for key in state if re.search(rf"\.{re.escape(parts[0])}\.\w+$", key)]:
            start, end = key.split(parts[0])
            start = re.sub(r"^transformer_blocks\.(\d+)\.attn\.$", r"double_blocks.\1.", start)
            keys = [key.replace(parts[0], part) for part in parts]
            found[re.sub("^transformer_blocks", "blocks", start) + whole + end] = torch.cat(
                [state.pop(k) for k in keys]
            )
    for key, value in state.items():
        if name == "flux2" and key == "norm_out.linear.weight":
            value = torch.cat(value.chunk(2)[::-1])  # the original has the shift first
        if name == "krea2" and re.match(r"transformer_blocks\.\d+\.scale_shift_table", key):
            value = value.flatten()  # six vectors in one
        for pattern, new in NAMES.get(name, {}).items():
            key = re.sub(pattern, new, key)
        found[key] = value.contiguous()
    found |= {key: torch.zeros(shape) for key, shape in UNUSED.get(name, {}).items()}
    save_file({f"model.diffusion_model.{key}": value for key, value in found.items()}, file)
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = MAKE[name](tmp_path_factory.mktemp("recent") / name)
        return made[name]

    return get


@pytest.mark.parametrize("name", list(MAKE))
def test_the_network_of_a_file_is_the_folders(folder, tmp_path, name):
    """All else is the pipeline's of model.config, whose class says which family it is."""
    file = written(name, folder(name), tmp_path / f"{name}.safetensors")
    ours, theirs = (
        models.load(model, resolution=32)
        for model in (Model(path=str(file), config=str(folder(name))), Model(path=str(folder(name))))
    )
    assert type(ours) is type(theirs)
    same(ours.load_network().state_dict(), theirs.load_network().state_dict())
    ours.meta_network()
    assert ours.source.missing == ["vae", *ours.encoders]
    with pytest.raises(DiffpoError, match=rf"{name}\.safetensors is .*set model\.config .*e\.g\. "):
        models.load(Model(path=str(file)))
    state = load_file(file)
    state.pop(next(key for key in state if "norm_q" in key or "query_norm" in key or key.endswith("bias")))
    save_file(state, file)
    with pytest.raises(DiffpoError, match=rf"the transformer .*{name}\.safetensors"):
        models.load(Model(path=str(file), config=str(folder(name))), resolution=32).load_network()


def test_a_lora_of_a_file_is_that_of_the_folder(folder, make_config, tmp_path):
    file = written("flux2", folder("flux2"), tmp_path / "flux2.safetensors")
    runs = [tmp_path / "by-folder", tmp_path / "by-file"]
    train(make_config(folder("flux2"), "train.steps=1", f"output={runs[0]}"))
    train(make_config(file, f"model.config={folder('flux2')}", "train.steps=1", f"output={runs[1]}"))
    same(*(load_file(run / lora_file.FILE_NAME) for run in runs))


def test_such_files_are_not_written():
    with pytest.raises(DiffpoError, match=r"ZImagePipeline cannot be written as one file.*--to merged"):
        layouts.check_pipeline("ZImagePipeline")
