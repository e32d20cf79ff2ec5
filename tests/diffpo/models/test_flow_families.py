"""The families whose text encoders are language models, against diffusers' own pipelines."""

import copy
import json
import math
from dataclasses import replace

import methods
import numpy as np
import pytest
import tiny_flows as tiny
import tiny_qwen
import torch
from PIL import Image, ImageChops
from pipeline_calls import compare, recorded, sampled
from safetensors.torch import load_file
from tiny import metrics_of, pick_a_pic_rows, write_parquet

from diffpo import models
from diffpo.commands.check import check
from diffpo.common.errors import DiffpoError
from diffpo.config import Lora, Model
from diffpo.evaluation import evaluate, generate
from diffpo.evaluation.generation import Generation
from diffpo.evaluation.scoring import Scoring
from diffpo.export import export
from diffpo.models import chroma, flux2, lumina2, z_image
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning
from diffpo.train.loop import train
from diffpo.weights import lora, lora_apply, lora_file

MAKE = {
    "z_image": tiny.make_z_image,
    "qwen_image": tiny_qwen.make_qwen_image,
    "flux2_klein": tiny.make_flux2_klein,
    "flux2": tiny.make_flux2,
    "sana": tiny.make_sana,
    "lumina2": tiny.make_lumina2,
    "chroma": tiny.make_chroma,
    "hidream": tiny.make_hidream,
    "ovis_image": tiny.make_ovis_image,
    "krea2": tiny_qwen.make_krea2,
    "longcat": tiny_qwen.make_longcat,
    "qwen_image21": tiny_qwen.make_qwen_image21,
}
CAPTIONS = ("a cat", "a long red dog, on a chair")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(name): the tiny pipeline of a family, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = MAKE[name](tmp_path_factory.mktemp("flows") / name)
        return made[name]

    return get


@pytest.fixture
def few_tokens(monkeypatch, tmp_path):
    """Captions are cut to 64 tokens, where the pipelines pad to 512; the option of their cache."""
    for module in (z_image, flux2, chroma, lumina2):
        monkeypatch.setattr(module, "TOKENS", 64)
    return f"data.cache={tmp_path / 'cache of 64 tokens'}"


def side_of(name):
    return 32 if name in ("sana", "qwen_image21") else 16  # their pipelines take multiples of 32 px


def family_of(path, side, **options):
    return models.load(Model(path=str(path), **options), resolution=side)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", list(MAKE))
def test_our_calls_and_latents_are_those_of_the_pipeline(folder, name, guidance):
    """Its own sampler with three steps: every call of the network is given what we give it, and ours leads to the same
    latents: text, its absence and its mask, time and its direction, sign, packing, guidance."""
    side = side_of(name)
    family = family_of(folder(name), side, guidance=guidance)
    pipe = models.load_pipeline(str(folder(name)), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    network = pipe.transformer
    shape = family.latent_shape(network, side)
    noise = torch.stack([generate.initial_noise(shape, 3, index)[0] for index in range(2)])
    made = []
    for rows in ([0], [1]) if family.singly else ([0, 1],):
        texts = [CAPTIONS[row] for row in rows]
        made.append(recorded(pipe, **type(family).painting(pipe, texts, None, noise[rows], guidance)))
    pictures, last = (torch.cat([each[k] for each in made]) for k in (0, 3))
    theirs, times = made[0][1], made[0][2]
    if pictures.shape[1] == 4:  # on white
        pictures = pictures[:, :3] * pictures[:, 3:] + 1 - pictures[:, 3:]
    family.load_encoders()
    prompted, empty = (family.encode_text(list(texts)) for texts in (CAPTIONS, (None, None)))
    free = None if guidance == 1 or family.guidance_is_input else empty
    given = Conditioning(prompted, free, guidance)
    state, ours = sampled(Policy(family, network), pipe.scheduler, times, noise, given)
    if free is None and not family.singly:
        compare(ours, theirs)
    found = type(family).unpacked(last, *noise.shape[-2:])
    torch.testing.assert_close(state, found, rtol=1e-5, atol=1e-5)
    assert (found - noise).std() > 0.1
    torch.testing.assert_close((family.decode(state) / 2 + 0.5).clamp(0, 1), pictures, rtol=1e-4, atol=1e-4)


class Light:
    """The mean of a picture."""

    names = ("light",)

    def score(self, images, prompts):
        return {"light": np.array([np.asarray(image, np.float64).mean() for image in images])}


def small(name):
    """Wide pictures of two calls."""
    return {"steps": 2, "guidance": 2.0, "device": "cpu", "height": side_of(name), "width": 2 * side_of(name)}


def compared(tuned, out):
    """By `diffpo eval`: sizes as asked for, a batch is its members, and the LoRA counts."""
    found = evaluate.run(out, replace(tuned, batch_size=2), list(CAPTIONS), scoring=Scoring((f"{__name__}:Light",)))
    rows = [tuned.base(), tuned]
    alone = generate.run(dict(zip(found.arms, rows, strict=True)), [CAPTIONS[0]], out.with_name("alone"))
    for row in alone:
        here, there = found.items[0].pictures[row["arm"]], out.with_name("alone") / row["file"]
        with Image.open(here) as one, Image.open(there) as other:
            assert one.size == (tuned.width, tuned.height)
            assert max(high for _, high in ImageChops.difference(one, other).getextrema()) <= 2
    assert len(found.items) == 2 and found.rows[0].base != found.rows[0].tuned


@pytest.mark.parametrize("name", list(MAKE))
def test_a_lora_is_trained_and_loaded_by_diffusers(folder, few_tokens, make_config, tmp_path, capsys, name):
    """`diffpo check` lets a run of Diffusion-DPO start, at u = 0, and it moves. Its file, loaded by the pipeline's own
    `load_lora_weights`, and by us, gives the network of the run, and `diffpo eval` other pictures than the base's."""
    side = side_of(name)
    data = write_parquet(tmp_path / "pairs.parquet", pick_a_pic_rows(4, (side, side)))
    settings = (few_tokens, f"data.resolution={side}", "train.steps=2", "train.lr=1e-2", "objective.beta=500")
    config = make_config(folder(name), *settings, "lora.alpha=4", data=data)
    check(config)
    assert "training can start" in capsys.readouterr().out
    train(config)
    first, second = metrics_of(config.output)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6) and first["grad_norm"] > 0
    assert second["error/chosen_delta"] != 0
    theirs, ours = (models.load_pipeline(str(folder(name)), device="cpu") for _ in range(2))
    base = copy.deepcopy(theirs.transformer)
    loads = hasattr(theirs, "load_lora_weights")  # Ovis-Image's pipeline does not
    theirs.load_lora_weights(config.output) if loads else lora_apply.load_lora(theirs, config.output)
    lora_apply.load_lora(ours, config.output)
    family = family_of(folder(name), side)
    family.load_encoders()
    cond, t = family.encode_text(list(CAPTIONS)), torch.tensor([50, 700])
    x_t = torch.randn(2, *family.latent_shape(base, side), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, other, plain = (
            family.predict(each, x_t, t, cond) for each in (theirs.transformer, ours.transformer, base)
        )
    torch.testing.assert_close(found, other)
    assert (found - plain).abs().max() > 1e-4
    lora_layers = lora.tuned_layers(theirs.transformer)
    assert lora_layers.keys() == lora.tuned_layers(ours.transformer).keys()
    saved, _ = lora_file.read_lora(config.output)
    assert len(saved) == 2 * len(lora_layers) > 0
    compared(Generation(str(folder(name)), lora=str(config.output), **small(name)), tmp_path / "pictures")
    export.run(export.Export(config.output, "merged", str(folder(name)), tmp_path / "merged"))
    merged = family_of(tmp_path / "merged", side).load_network()
    with torch.no_grad():
        torch.testing.assert_close(family.predict(merged, x_t, t, cond), found, rtol=1e-4, atol=1e-5)
    if family.comfyui is None:
        return
    made = export.run(export.Export(config.output, "comfyui", str(folder(name)), tmp_path / "comfyui"))
    tensors = load_file(made / "comfyui.safetensors")
    assert len(tensors) == 3 * len(lora_layers)
    for layer in lora_layers:
        up, down, alpha = (tensors[f"transformer.{layer}.{k}"] for k in ("lora_up.weight", "lora_down.weight", "alpha"))
        expected = base.get_submodule(layer).weight + alpha / len(down) * up @ down
        torch.testing.assert_close(merged.get_submodule(layer).weight, expected.detach())


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("z_image", "d3po"),
        ("z_image", "ncp_dpo"),
        ("qwen_image", "spo"),
        ("flux2_klein", "inpo"),
        ("flux2", "online_dpo"),
        ("sana", "diffusion_nft"),
        ("lumina2", "ncp_dpo"),
        ("chroma", "pso"),
        ("hidream", "rankdpo"),
        ("ovis_image", "flow_grpo"),
        ("krea2", "mapo"),
        ("longcat", "dspo"),
        ("qwen_image21", "diffusion_nft"),
    ],
)
def test_other_kinds_of_objectives_train(folder, few_tokens, make_config, tmp_path, name, method):
    more = [few_tokens, f"data.resolution={side_of(name)}"]
    methods.run(method, folder(name), make_config, methods.write_data(tmp_path), *more)


def test_a_pipeline_without_a_family_is_refused_with_those_that_have_one(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "Kandinsky3Pipeline"}')
    with pytest.raises(DiffpoError, match=r"Kandinsky3Pipeline.*ZImagePipeline, QwenImagePipeline"):
        models.load(Model(path=str(tmp_path)))


# transformer/config.json of the released models where it differs from the class's defaults, with the numbers of layers;
# their parameters; what a LoRA of rank 1 has: inputs and outputs of the layers
KLEIN = {"num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False}
LUMINA = {"hidden_size": 2304, "num_attention_heads": 24, "num_kv_heads": 8, "cap_feat_dim": 2304}
SPARSE = {
    "axes_dims_rope": [64, 32, 32],
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "caption_channels": [4096, 4096],
}
Z, ROPE = {"axes_lens": [1536, 512, 512]}, {"axes_dim_rope": [32, 32, 32]}
REAL = {
    "Z-Image": ("z_image", Z, {"n_layers": 30, "n_refiner_layers": 2}, (30 + 2 + 2) * 4 * 2 * 3840),
    "Qwen-Image": ("qwen_image", {}, {"num_layers": 60}, 60 * 8 * 2 * 3072),
    "FLUX.2-klein-4B": ("flux2_klein", KLEIN, {"num_layers": 5, "num_single_layers": 20}, (5 * 8 * 2 + 20 * 10) * 3072),
    "FLUX.2-dev": ("flux2", {}, {"num_layers": 8, "num_single_layers": 48}, (8 * 8 * 2 + 48 * 10) * 6144),
    "Sana-1.6B": ("sana", {}, {"num_layers": 20}, 20 * 8 * 2 * 2240),
    "Lumina-Image-2.0": ("lumina2", LUMINA | ROPE, {"num_layers": 26, "num_refiner_layers": 2}, 30 * 4 * 3840),
    "Chroma1-HD": ("chroma", {}, {"num_layers": 19, "num_single_layers": 38}, (19 * 8 + 38 * 3) * 2 * 3072),
    "HiDream-I1": ("hidream", SPARSE, {"num_layers": 16, "num_single_layers": 32}, (16 * 8 + 32 * 4) * 2 * 2560),
    "LongCat-Image": ("longcat", {}, {"num_layers": 10, "num_single_layers": 20}, (10 * 8 + 20 * 3) * 2 * 3072),
    "Krea-2": (
        "krea2",
        {},
        {"num_layers": 28, "num_layerwise_text_blocks": 2, "num_refiner_text_blocks": 2},
        28 * (6 * 6144 + 2 * 1536) + 4 * 8 * 2560,
    ),
    "Qwen-Image-2.1": ("qwen_image21", {}, {"num_layers": 32}, 32 * 4 * 2 * 4096),
    "Ovis-Image-7B": ("ovis_image", {}, {"num_layers": 6, "num_single_layers": 27}, (6 * 8 + 27 * 3) * 2 * 3072),
}
PARAMETERS = {  # Qwen-Image: of its published shards; the others round to their published sizes in billions
    "Z-Image": 6_154_908_736,
    "Qwen-Image": 20_430_401_088,
    "FLUX.2-klein-4B": 3_875_544_576,
    "FLUX.2-dev": 32_223_281_152,
    "Sana-1.6B": 1_604_462_752,
    "Lumina-Image-2.0": 2_609_769_152,
    "Chroma1-HD": 8_899_983_424,
    "HiDream-I1": 17_105_733_184,
    "LongCat-Image": 6_270_668_864,
    "Krea-2": 12_820_073_036,
    "Ovis-Image-7B": 7_370_449_728,
    # in closed form: of each block attention, MLP and two norms; modulation, text, time and last norm; in and out
    "Qwen-Image-2.1": 32 * (13 * 4096**2 + 2 * 128) + 8 * 4096**2 + 4096 + 256 * 4096 + 2 * 64 * 4096,
}


@pytest.mark.parametrize("released", list(REAL))
def test_the_lora_of_a_released_model_has_its_closed_form_size(folder, tmp_path, released):
    """Of the real width, on the meta device; what `diffpo check` counts can be computed. Both sizes grow by the same
    with each layer, so those of all layers follow from networks of one and two."""
    name, settings, layers, per_rank = REAL[released]
    for part in ("model_index.json", "scheduler/scheduler_config.json", "vae/config.json"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_text((folder(name) / part).read_text())
    (tmp_path / "transformer").mkdir()
    kind = family_of(folder(name), side_of(name)).network_class

    def sizes(**more):
        """Of the network, and of its LoRA."""
        counts = dict.fromkeys(layers, 1) | more
        if name == "hidream":  # which layer of Llama each block reads, and one for all
            counts["llama_layers"] = list(range(sum(counts.values())))
        config = {"_class_name": kind, **settings, **counts}
        (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
        family = family_of(tmp_path, 64)
        network = family.meta_network()
        whole = sum(each.numel() for each in network.parameters())
        parameters = lora.add_lora(network.requires_grad_(False), Lora(rank=8), family.lora_targets)
        if not more:
            inputs = family.meta_inputs(network, 2, 64)
            with torch.no_grad():
                assert family.predict(network, *inputs).shape == inputs[0].shape
        return np.array([whole, sum(each.numel() for each in parameters)])

    one = sizes()
    found = one + sum((count - 1) * (sizes(**{kind_of: 2}) - one) for kind_of, count in layers.items())
    assert found.tolist() == [PARAMETERS[released], 8 * per_rank]


def test_the_experts_of_hidream_have_gradients(folder):
    """In the mode that networks are called in, diffusers computes its experts without: by finite differences."""
    family = family_of(folder("hidream"), 16)
    family.load_encoders()
    network, cond, t = family.load_network(), family.encode_text(["a cat"]), torch.tensor([400])
    draw = torch.Generator().manual_seed(0)
    x_t, toward = torch.randn(2, 1, 4, 8, 8, generator=draw).unbind()
    network = network.double()
    family.dtype = torch.float64
    layer = next(each for each in network.modules() if hasattr(each, "experts")).experts[0].w2
    x_t, toward = x_t.double(), toward.double()
    layer.weight.requires_grad_(True)

    def value():
        return (family.predict(network, x_t, t, cond) * toward).sum()

    (gradient,) = torch.autograd.grad(value(), layer.weight)
    change = torch.randn(layer.weight.shape, generator=draw).double()
    with torch.no_grad():
        layer.weight += 1e-4 * change
        high = value()
        layer.weight -= 2e-4 * change
        low = value()
    assert float((gradient * change).sum()) == pytest.approx(float((high - low) / 2e-4), rel=1e-3)
    assert gradient.abs().max() > 0
