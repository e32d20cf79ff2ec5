"""A LoRA that adapts the text encoders too: what is trained is what diffusers, ComfyUI and diffpo load."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import metrics_of

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Lora, Model
from diffpo.export import export
from diffpo.train.loop import train
from diffpo.weights import lora, lora_apply, text_encoders, trained

FAMILIES = ["sd", "sdxl", "sd3", "flux"]
CAPTIONS = ["a red square", None, "b"]
TRAINED = {"sd": 1, "sdxl": 2, "sd3": 2, "flux": 1}


def prepared(path, shake=0.0):
    """The family, its base embeddings and tokens of `CAPTIONS`, and a network with adapted encoders."""
    family = models.load(Model(path=str(path)), resolution=16)
    family.load_encoders()
    plain = family.encode_text(CAPTIONS)
    family.train_text()
    tokens, network = family.tokens(CAPTIONS), family.load_network()
    settings = Lora(rank=2, alpha=3, text_encoders=True)
    lora.add_lora(network, settings, family.lora_targets)
    own = text_encoders.attach(network, family.load_clips("cpu"), settings, 0)
    draw = torch.Generator().manual_seed(1)
    for parameter in lora.adapter_parameters(network).values():
        parameter.data += shake * torch.randn(parameter.shape, generator=draw)
    return family, network, own, plain, tokens


def embeddings(family, pipe):
    """By the pipeline's own encoders, which are those of ``pipe`` now."""
    family.pipe = pipe
    return family.encode_text(CAPTIONS)


@pytest.mark.parametrize("name", FAMILIES)
def test_encoders_in_the_step_are_the_pipelines_and_their_adapters_are_loaded_by_it(tiny_folder, tmp_path, name):
    """Fresh adapters change nothing; trained ones have the same effect in diffusers, in ComfyUI and in diffpo."""
    family, network, own, plain, tokens = prepared(tiny_folder(name))
    with torch.no_grad():
        for key, value in family.embedded(network, tokens).items():
            torch.testing.assert_close(value, plain[key], rtol=1e-5, atol=1e-6)
    family, network, own, plain, tokens = prepared(tiny_folder(name), shake=0.3)
    assert len(own) == TRAINED[name] * 2 * 4 * 2  # encoders, layers, projections, A and B
    with torch.no_grad():
        expected = family.embedded(network, tokens)
        with trained.of(network).switched(None) as base:
            for key, value in family.embedded(base, tokens).items():
                torch.testing.assert_close(value, plain[key], rtol=1e-5, atol=1e-6)
    moved = [key for key, value in expected.items() if (value - plain[key]).abs().max() > 1e-3]
    assert moved == {"sd": ["prompt_embeds"], "flux": ["pooled_prompt_embeds"]}.get(name, list(expected))
    lora.save_lora(tmp_path / "pytorch_lora_weights.safetensors", network, family.component, {})

    class_ = type(family.pipe)
    theirs, ours, comfy = (class_.from_pretrained(tiny_folder(name)) for _ in range(3))
    theirs.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    lora_apply.load_lora(ours, tmp_path)
    made = export.run(export.Export(tmp_path, "comfyui", str(tiny_folder(name)), tmp_path / "comfy"))
    in_comfyui(comfy, load_file(made / "comfy.safetensors"), family.clips)
    for pipe in (theirs, ours, comfy):
        for key, value in embeddings(family, pipe).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)


def in_comfyui(pipe, tensors, clips):
    """Put alpha / rank B A into the encoders, by the names in ComfyUI's table of CLIP."""
    used = set()
    for number, clip in enumerate(clips, 1):
        for name, module in getattr(pipe, clip).named_modules():
            inner = name if name.startswith("text_model.") else f"text_model.{name}"
            key = f"lora_te{number}_{inner.replace('.', '_')}"
            if f"{key}.alpha" in tensors:
                up, down, alpha = (tensors[f"{key}.{each}"] for each in ("lora_up.weight", "lora_down.weight", "alpha"))
                module.weight.data += alpha / len(down) * up @ down
                used |= {f"{key}.{each}" for each in ("lora_up.weight", "lora_down.weight", "alpha")}
    assert used == {key for key in tensors if key.startswith("lora_te")}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_starts_as_its_reference_moves_the_encoders_and_resumes(tiny_folder, make_config, tmp_path, name):
    options = ["lora.text_encoders=true", "train.lr=0.02", "train.steps=3", "data.caption_dropout=0.3"]
    straight = train(make_config(tiny_folder(name), *options, f"output={tmp_path / 'straight'}"))
    rows = metrics_of(tmp_path / "straight")
    for key in ("rewards/margins", "error/chosen_delta", "error/rejected_delta"):
        assert rows[0][key] == 0.0 and rows[-1][key] != 0.0
    state = load_file(straight)
    text = {key: value for key, value in state.items() if key.startswith("text_encoder")}
    assert len({key.partition(".")[0] for key in text}) == TRAINED[name]
    assert sum(value.any() for key, value in text.items() if "lora_B" in key) > len(text) / 4
    train(make_config(tiny_folder(name), *options, "train.steps=2"))
    assert train(make_config(tiny_folder(name), *options)).read_bytes() == straight.read_bytes()


def test_the_gradient_is_that_of_the_whole_chain(tiny_sdxl):
    """By a finite difference of the network's output along the encoders' B."""
    family, network, own, _, tokens = prepared(tiny_sdxl, shake=0.2)
    draw = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(3, 4, 8, 8, generator=draw), torch.tensor([100, 500, 900])
    tokens["time_ids"] = torch.full((3, 6), 16.0)
    network.double(), x_t.double()

    def loss():
        cond = family.embedded(network, tokens)
        family.dtype = torch.float64
        return family.predict(network, x_t, t, cond).square().mean()

    loss().backward()
    direction = [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in own]
    expected = sum((p.grad * d).sum() for p, d in zip(own, direction, strict=True) if p.grad is not None)
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for parameter, d in zip(own, direction, strict=True):
                parameter += step * d
            values.append(loss())
    torch.testing.assert_close((values[0] - values[1]) / 2e-5, expected, rtol=1e-5, atol=1e-9)


def test_what_does_not_go_with_it_is_named(tiny_folder, make_config, tmp_path):
    for option in ("lora.kind=dora", "model.offload=true", "objective.reference.policy=ema", "lora.start=x"):
        with pytest.raises(DiffpoError, match=rf"lora.text_encoders does not work with {option.partition('=')[0]}"):
            make_config(tiny_folder("sd"), "lora.text_encoders=true", option)
    with pytest.raises(DiffpoError, match=r"lora.text_encoders does not work with a PixArt"):
        train(make_config(tiny_folder("pixart"), "lora.text_encoders=true"))
    family, network, *_ = prepared(tiny_folder("sd"))
    lora.save_lora(tmp_path / "pytorch_lora_weights.safetensors", network, family.component, {})
    with pytest.raises(DiffpoError, match=r"adapts text encoders, .* use --to comfyui"):
        export.run(export.Export(tmp_path, "kohya", str(tiny_folder("sd")), tmp_path / "out"))
