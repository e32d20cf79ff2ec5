"""Tiny pipelines as one file, and the names and shapes of the released ones: by hand, from the original programs.

Sources: CompVis/latent-diffusion (diffusionmodules/openaimodel.py and model.py), Stability-AI/generative-models
and sd3-ref (mmdit.py), black-forest-labs/flux (model.py, layers.py), mlfoundations/open_clip (transformer.py).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RESNET = {  # LDM's ResBlock -> diffusers' ResnetBlock2D
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def part(folder: Path, name: str):
    (file,) = (folder / name).glob("*.safetensors")
    return load_file(file), json.loads((folder / name / "config.json").read_text())


def unet_blocks(config):
    """(original's prefix, diffusers' prefix) of all blocks, in the order of LDM's constructor."""
    layers = config["layers_per_block"]
    yield from (("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"))
    yield from (("label_emb.0.0", "add_embedding.linear_1"), ("label_emb.0.2", "add_embedding.linear_2"))
    yield "input_blocks.0.0", "conv_in"
    number = 1
    downs = config["down_block_types"]
    for level, kind in enumerate(downs):
        for i in range(layers):
            yield f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{i}"
            if kind == "CrossAttnDownBlock2D":
                yield f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{i}"
            number += 1
        if level < len(downs) - 1:
            yield f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
            number += 1
    yield "middle_block.0", "mid_block.resnets.0"
    yield "middle_block.1", "mid_block.attentions.0"
    yield "middle_block.2", "mid_block.resnets.1"
    number = 0
    for level, kind in enumerate(config["up_block_types"]):
        for i in range(layers + 1):
            yield f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{i}"
            after = 1
            if kind == "CrossAttnUpBlock2D":
                yield f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{i}"
                after = 2
            if i == layers and level < len(downs) - 1:
                yield f"output_blocks.{number}.{after}.conv", f"up_blocks.{level}.upsamplers.0.conv"
            number += 1
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"


def unet(state, config):
    found = {}
    for original, theirs in unet_blocks(config):
        inner = [name for name in state if name.startswith(f"{theirs}.")]
        for name in inner:
            rest = name[len(theirs) + 1 :]
            if ".resnets." in f".{theirs}.":
                layer, _, kind = rest.rpartition(".")
                rest = next(ours for ours, its in RESNET.items() if its == layer) + "." + kind
            found[f"model.diffusion_model.{original}.{rest}"] = state[name]
    assert len(found) == len(state)
    return found


def vae(state, config, prefix="first_stage_model."):
    levels, found = len(config["block_out_channels"]), {}
    pairs = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        pairs += [(f"{half}.conv_in", f"{half}.conv_in"), (f"{half}.conv_out", f"{half}.conv_out")]
        pairs += [
            (f"{half}.norm_out", f"{half}.conv_norm_out"),
            (f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0"),
        ]
        pairs += [(f"{half}.mid.block_{i}", f"{half}.mid_block.resnets.{i - 1}") for i in (1, 2)]
    for level in range(levels):
        up = levels - 1 - level  # diffusers counts from the smallest picture
        pairs += [(f"encoder.down.{level}.block.{i}", f"encoder.down_blocks.{level}.resnets.{i}") for i in range(9)]
        pairs += [(f"decoder.up.{level}.block.{i}", f"decoder.up_blocks.{up}.resnets.{i}") for i in range(9)]
        pairs += [(f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv")]
        pairs += [(f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{up}.upsamplers.0.conv")]
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    for original, theirs in pairs:
        for name in state:
            if name.startswith(f"{theirs}."):
                rest, value = name[len(theirs) + 1 :].replace("conv_shortcut", "nin_shortcut"), state[name]
                if "attn_1" in original:
                    layer, _, kind = rest.rpartition(".")
                    rest = f"{attention[layer]}.{kind}"
                    value = value[:, :, None, None] if value.ndim == 2 else value
                found[f"{prefix}{original}.{rest}"] = value
    assert len(found) == len(state)
    return found


def openai_clip(state, prefix):
    plain = {name.removeprefix("text_model."): value for name, value in state.items()}
    return {
        f"{prefix}{'' if name.startswith('text_projection') else 'text_model.'}{name}": value
        for name, value in plain.items()
    }


def open_clip(state, prefix):
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    if "text_projection.weight" in state:
        found["text_projection"] = state["text_projection.weight"].T.contiguous()
        found["logit_scale"] = torch.tensor(4.6)
    number = 0
    while f"encoder.layers.{number}.layer_norm1.weight" in state:
        theirs, block = f"encoder.layers.{number}", f"transformer.resblocks.{number}"
        for kind in ("weight", "bias"):
            rows = [state[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{block}.attn.in_proj_{kind}"] = torch.cat(rows)
            found[f"{block}.attn.out_proj.{kind}"] = state[f"{theirs}.self_attn.out_proj.{kind}"]
            found[f"{block}.mlp.c_fc.{kind}"] = state[f"{theirs}.mlp.fc1.{kind}"]
            found[f"{block}.mlp.c_proj.{kind}"] = state[f"{theirs}.mlp.fc2.{kind}"]
            for i in (1, 2):
                found[f"{block}.ln_{i}.{kind}"] = state[f"{theirs}.layer_norm{i}.{kind}"]
        number += 1
    return {prefix + name: value for name, value in found.items()}


def mmdit(state, config, prefix="model.diffusion_model."):
    """SD3's transformer, block by block as in mmdit.py."""
    found, last = {}, config["num_layers"] - 1

    def take(original, *theirs, swap=False):
        for kind in ("weight", "bias"):
            if f"{theirs[0]}.{kind}" in state:
                value = torch.cat([state[f"{each}.{kind}"] for each in theirs])
                found[f"{original}.{kind}"] = torch.cat(value.chunk(2)[::-1]) if swap else value

    found["pos_embed"] = state["pos_embed.pos_embed"]
    take("x_embedder.proj", "pos_embed.proj")
    take("context_embedder", "context_embedder")
    for original, theirs in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        for i, number in ((0, 1), (2, 2)):
            take(f"{original}.mlp.{i}", f"time_text_embed.{theirs}.linear_{number}")
    for n in range(last + 1):
        x, context, theirs = f"joint_blocks.{n}.x_block", f"joint_blocks.{n}.context_block", f"transformer_blocks.{n}"
        for attn in ("attn", "attn2"):
            take(f"{x}.{attn}.qkv", *(f"{theirs}.{attn}.to_{part}" for part in "qkv"))
            take(f"{x}.{attn}.proj", f"{theirs}.{attn}.to_out.0")
            for part in "qk":
                take(f"{x}.{attn}.ln_{part}", f"{theirs}.{attn}.norm_{part}")
        take(f"{context}.attn.qkv", *(f"{theirs}.attn.add_{part}_proj" for part in "qkv"))
        take(f"{context}.attn.proj", f"{theirs}.attn.to_add_out")
        for part in "qk":
            take(f"{context}.attn.ln_{part}", f"{theirs}.attn.norm_added_{part}")
        take(f"{x}.adaLN_modulation.1", f"{theirs}.norm1.linear")
        take(f"{context}.adaLN_modulation.1", f"{theirs}.norm1_context.linear", swap=n == last)
        for place, ff in ((x, "ff"), (context, "ff_context")):
            take(f"{place}.mlp.fc1", f"{theirs}.{ff}.net.0.proj")
            take(f"{place}.mlp.fc2", f"{theirs}.{ff}.net.2")
    take("final_layer.linear", "proj_out")
    take("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    assert sum(value.numel() for value in found.values()) == sum(value.numel() for value in state.values())
    return {prefix + name: value for name, value in found.items()}


def flux(state, config):
    """FLUX's transformer, block by block as in model.py and layers.py."""
    found = {}

    def take(original, *theirs, swap=False):
        for kind in ("weight", "bias"):
            value = torch.cat([state[f"{each}.{kind}"] for each in theirs])
            found[f"{original}.{kind}"] = torch.cat(value.chunk(2)[::-1]) if swap else value

    take("img_in", "x_embedder")
    take("txt_in", "context_embedder")
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
    for original, theirs in embedders.items():
        take(f"{original}.in_layer", f"time_text_embed.{theirs}.linear_1")
        take(f"{original}.out_layer", f"time_text_embed.{theirs}.linear_2")
    for n in range(config["num_layers"]):
        theirs = f"transformer_blocks.{n}"
        for half, q, out, norm, ff in (
            ("img", "attn.to_{}", "attn.to_out.0", "norm1", "ff"),
            ("txt", "attn.add_{}_proj", "attn.to_add_out", "norm1_context", "ff_context"),
        ):
            block, added = f"double_blocks.{n}.{half}", "" if half == "img" else "added_"
            take(f"{block}_attn.qkv", *(f"{theirs}.{q.format(part)}" for part in "qkv"))
            take(f"{block}_attn.proj", f"{theirs}.{out}")
            take(f"{block}_mod.lin", f"{theirs}.{norm}.linear")
            take(f"{block}_mlp.0", f"{theirs}.{ff}.net.0.proj")
            take(f"{block}_mlp.2", f"{theirs}.{ff}.net.2")
            for part, name in (("q", "query"), ("k", "key")):
                found[f"{block}_attn.norm.{name}_norm.scale"] = state[f"{theirs}.attn.norm_{added}{part}.weight"]
    for n in range(config["num_single_layers"]):
        theirs, block = f"single_transformer_blocks.{n}", f"single_blocks.{n}"
        take(f"{block}.linear1", *(f"{theirs}.attn.to_{part}" for part in "qkv"), f"{theirs}.proj_mlp")
        take(f"{block}.linear2", f"{theirs}.proj_out")
        take(f"{block}.modulation.lin", f"{theirs}.norm.linear")
        for part, name in (("q", "query"), ("k", "key")):
            found[f"{block}.norm.{name}_norm.scale"] = state[f"{theirs}.attn.norm_{part}.weight"]
    take("final_layer.linear", "proj_out")
    take("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    return found


# ---- whole files


def sdxl(folder: Path, file: Path, dtype=None, **more) -> Path:
    state = {**unet(*part(folder, "unet")), **vae(*part(folder, "vae"))}
    state |= openai_clip(part(folder, "text_encoder")[0], "conditioner.embedders.0.transformer.")
    state |= open_clip(part(folder, "text_encoder_2")[0], "conditioner.embedders.1.model.")
    state["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(16)[None]
    return _save(state | more, file, dtype)


def sd1(folder: Path, file: Path, dtype=None, **more) -> Path:
    state = {**unet(*part(folder, "unet")), **vae(*part(folder, "vae"))}
    state |= openai_clip(part(folder, "text_encoder")[0], "cond_stage_model.transformer.")
    state |= {"betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000)}
    return _save(state | more, file, dtype)


def sd3(folder: Path, file: Path, dtype=None, bare=False, **more) -> Path:
    state = {**mmdit(*part(folder, "transformer"), *([""] if bare else [])), **vae(*part(folder, "vae"))}
    for name, theirs in {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}.items():
        state |= openai_clip(part(folder, theirs)[0], f"text_encoders.{name}.transformer.")
    t5 = part(folder, "text_encoder_3")[0]
    state |= {f"text_encoders.t5xxl.transformer.{name}": value for name, value in t5.items()}
    return _save(state | more, file, dtype)


def _save(state, file, dtype):
    state = {
        name: (value.to(dtype) if dtype and value.is_floating_point() else value).contiguous()
        for name, value in state.items()
    }
    save_file(state, file, {"format": "pt"})
    return file


# ---- names and shapes of the released files


def ldm_unet(channels, mult, depths, context, linear, label=None):
    """openaimodel.UNetModel with two ResBlocks a level; ``depths`` of the transformers at each level (0: none)."""
    found, wide = {}, 4 * channels

    def layer(name, *shape):
        found[f"{name}.weight"] = shape
        found[f"{name}.bias"] = shape[:1]

    def resblock(name, ins, outs):
        layer(f"{name}.in_layers.0", ins)
        layer(f"{name}.in_layers.2", outs, ins, 3, 3)
        layer(f"{name}.emb_layers.1", outs, wide)
        layer(f"{name}.out_layers.0", outs)
        layer(f"{name}.out_layers.3", outs, outs, 3, 3)
        if ins != outs:
            layer(f"{name}.skip_connection", outs, ins, 1, 1)

    def transformer(name, width, depth):
        one = () if linear else (1, 1)
        layer(f"{name}.norm", width)
        layer(f"{name}.proj_in", width, width, *one)
        for i in range(depth):
            block = f"{name}.transformer_blocks.{i}"
            for attn, keys in (("attn1", width), ("attn2", context)):
                found[f"{block}.{attn}.to_q.weight"] = (width, width)
                found[f"{block}.{attn}.to_k.weight"] = found[f"{block}.{attn}.to_v.weight"] = (width, keys)
                layer(f"{block}.{attn}.to_out.0", width, width)
            layer(f"{block}.ff.net.0.proj", 8 * width, width)
            layer(f"{block}.ff.net.2", width, 4 * width)
            for norm in ("norm1", "norm2", "norm3"):
                layer(f"{block}.{norm}", width)
        layer(f"{name}.proj_out", width, width, *one)

    layer("time_embed.0", wide, channels)
    layer("time_embed.2", wide, wide)
    if label:
        layer("label_emb.0.0", wide, label)
        layer("label_emb.0.2", wide, wide)
    layer("input_blocks.0.0", channels, 4, 3, 3)
    width, number, kept = channels, 1, [channels]
    for level, factor in enumerate(mult):
        for _ in range(2):
            resblock(f"input_blocks.{number}.0", width, channels * factor)
            width = channels * factor
            if depths[level]:
                transformer(f"input_blocks.{number}.1", width, depths[level])
            kept.append(width)
            number += 1
        if level < len(mult) - 1:
            layer(f"input_blocks.{number}.0.op", width, width, 3, 3)
            kept.append(width)
            number += 1
    resblock("middle_block.0", width, width)
    transformer("middle_block.1", width, depths[-1] or 1)
    resblock("middle_block.2", width, width)
    number = 0
    for level, factor in reversed(list(enumerate(mult))):
        for i in range(3):
            resblock(f"output_blocks.{number}.0", width + kept.pop(), channels * factor)
            width = channels * factor
            if depths[level]:
                transformer(f"output_blocks.{number}.1", width, depths[level])
            if level and i == 2:
                layer(f"output_blocks.{number}.{2 if depths[level] else 1}.conv", width, width, 3, 3)
            number += 1
    layer("out.0", width)
    layer("out.2", 4, width, 3, 3)
    return {f"model.diffusion_model.{name}": shape for name, shape in found.items()}


def ldm_vae(latents=4, quant=True, channels=128, mult=(1, 2, 4, 4)):
    """model.Encoder and Decoder with two ResBlocks a level (the decoder three)."""
    found = {}

    def layer(name, *shape):
        found[f"{name}.weight"] = shape
        found[f"{name}.bias"] = shape[:1]

    def resblock(name, ins, outs):
        layer(f"{name}.norm1", ins)
        layer(f"{name}.conv1", outs, ins, 3, 3)
        layer(f"{name}.norm2", outs)
        layer(f"{name}.conv2", outs, outs, 3, 3)
        if ins != outs:
            layer(f"{name}.nin_shortcut", outs, ins, 1, 1)

    def middle(half, width):
        resblock(f"{half}.mid.block_1", width, width)
        layer(f"{half}.mid.attn_1.norm", width)
        for each in ("q", "k", "v", "proj_out"):
            layer(f"{half}.mid.attn_1.{each}", width, width, 1, 1)
        resblock(f"{half}.mid.block_2", width, width)
        layer(f"{half}.norm_out", width if half == "encoder" else channels)

    layer("encoder.conv_in", channels, 3, 3, 3)
    width = channels
    for level, factor in enumerate(mult):
        for i in range(2):
            resblock(f"encoder.down.{level}.block.{i}", width, channels * factor)
            width = channels * factor
        if level < len(mult) - 1:
            layer(f"encoder.down.{level}.downsample.conv", width, width, 3, 3)
    middle("encoder", width)
    layer("encoder.conv_out", 2 * latents, width, 3, 3)
    layer("decoder.conv_in", width, latents, 3, 3)
    middle("decoder", width)
    for level, factor in reversed(list(enumerate(mult))):
        for i in range(3):
            resblock(f"decoder.up.{level}.block.{i}", width, channels * factor)
            width = channels * factor
        if level:
            layer(f"decoder.up.{level}.upsample.conv", width, width, 3, 3)
    layer("decoder.conv_out", 3, width, 3, 3)
    if quant:
        layer("quant_conv", 2 * latents, 2 * latents, 1, 1)
        layer("post_quant_conv", latents, latents, 1, 1)
    return found


def sd3_mmdit(depth, positions, dual=(), normed=True):
    """mmdit.MMDiT with 64 channels a head and as many heads as blocks."""
    width, found = 64 * depth, {"pos_embed": (1, positions**2, 64 * depth)}

    def layer(name, *shape):
        found[f"{name}.weight"] = shape
        found[f"{name}.bias"] = shape[:1]

    layer("x_embedder.proj", width, 16, 2, 2)
    layer("context_embedder", width, 4096)
    for name, ins in (("t_embedder", 256), ("y_embedder", 2048)):
        layer(f"{name}.mlp.0", width, ins)
        layer(f"{name}.mlp.2", width, width)
    for n in range(depth):
        for half in ("context_block", "x_block"):
            block, pre_only = f"joint_blocks.{n}.{half}", half == "context_block" and n == depth - 1
            for attn in ("attn", *(["attn2"] if half == "x_block" and n in dual else [])):
                layer(f"{block}.{attn}.qkv", 3 * width, width)
                if not pre_only:
                    layer(f"{block}.{attn}.proj", width, width)
                if normed:
                    found[f"{block}.{attn}.ln_q.weight"] = found[f"{block}.{attn}.ln_k.weight"] = (64,)
            chunks = 2 if pre_only else 9 if half == "x_block" and n in dual else 6
            layer(f"{block}.adaLN_modulation.1", chunks * width, width)
            if not pre_only:
                layer(f"{block}.mlp.fc1", 4 * width, width)
                layer(f"{block}.mlp.fc2", width, 4 * width)
    layer("final_layer.linear", 64, width)
    layer("final_layer.adaLN_modulation.1", 2 * width, width)
    return {f"model.diffusion_model.{name}": shape for name, shape in found.items()}


def flux_model(guidance):
    """model.Flux, of the released size."""
    width, found = 3072, {}

    def layer(name, *shape):
        found[f"{name}.weight"] = shape
        found[f"{name}.bias"] = shape[:1]

    layer("img_in", width, 64)
    layer("txt_in", width, 4096)
    for name, ins in (("time_in", 256), ("vector_in", 768), *([("guidance_in", 256)] if guidance else [])):
        layer(f"{name}.in_layer", width, ins)
        layer(f"{name}.out_layer", width, width)
    for n in range(19):
        for half in ("img", "txt"):
            block = f"double_blocks.{n}.{half}"
            layer(f"{block}_mod.lin", 6 * width, width)
            layer(f"{block}_attn.qkv", 3 * width, width)
            found[f"{block}_attn.norm.query_norm.scale"] = found[f"{block}_attn.norm.key_norm.scale"] = (128,)
            layer(f"{block}_attn.proj", width, width)
            layer(f"{block}_mlp.0", 4 * width, width)
            layer(f"{block}_mlp.2", width, 4 * width)
    for n in range(38):
        block = f"single_blocks.{n}"
        layer(f"{block}.linear1", 7 * width, width)
        layer(f"{block}.linear2", width, 5 * width)
        found[f"{block}.norm.query_norm.scale"] = found[f"{block}.norm.key_norm.scale"] = (128,)
        layer(f"{block}.modulation.lin", 3 * width, width)
    layer("final_layer.linear", 64, width)
    layer("final_layer.adaLN_modulation.1", 2 * width, width)
    return {f"model.diffusion_model.{name}": shape for name, shape in found.items()}
