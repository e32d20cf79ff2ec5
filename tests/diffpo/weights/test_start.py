"""Training on from a LoRA: it is where the policy starts and what it is compared with."""

import exports
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import metrics_of

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Lora, Model
from diffpo.export import export
from diffpo.models.flux import Flux
from diffpo.train.loop import train
from diffpo.weights import lora, lora_apply, lora_file


@pytest.fixture
def start(tiny_sdxl, make_config, tmp_path):
    """A trained LoRA of rank 4, alpha 4."""
    return train(make_config(tiny_sdxl, f"output={tmp_path / 'first'}", "train.steps=2"))


def test_policy_and_reference_start_from_it(tiny_sdxl, make_config, start, tmp_path):
    config = make_config(tiny_sdxl, f"lora.start={start}", "train.lr=1e-12", "train.steps=2")
    train(config)
    first = metrics_of(config.output)[0]
    assert first["rewards/chosen"] == first["error/chosen_delta"] == 0.0 and first["grad_norm"] > 0
    # at no learning rate to speak of it stays what it was, which is not a fresh adapter's B = 0
    before, after = (lora_file.read_lora(path)[0] for path in (start, config.output))
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-9)
    assert any(value.abs().max() > 1e-3 for name, value in after.items() if "lora_B" in name)


def test_the_error_of_the_reference_is_that_of_the_pipeline_with_the_lora(tiny_sdxl, make_config, start):
    config = make_config(tiny_sdxl, f"lora.start={start}")
    family = models.load(config.model)
    network = family.load_network()
    lora.add_lora(network, config.lora, family.lora_targets)
    lora_apply.start_from(network, config.lora)
    pipe = models.load_pipeline(str(tiny_sdxl), device="cpu")
    lora_apply.load_lora(pipe, start)
    from diffpo.objective import reference
    from diffpo.problems.policy import Policy

    made = reference.make(config.objective.reference, Policy(family, network), started=True)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)  # the policy moves, the reference does not
    draw = torch.Generator().manual_seed(0)
    x_t, t = torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([100, 900])
    cond = {
        "prompt_embeds": torch.randn(2, 16, 32, generator=draw),
        "pooled_prompt_embeds": torch.randn(2, 16, generator=draw),
        "time_ids": torch.full((2, 6), 16.0),
    }
    with made.on() as reference_policy:
        module = reference_policy.network
        found = family.predict(module, x_t, t, cond)
    with torch.no_grad():
        expected, moved = family.predict(pipe.unet, x_t, t, cond), family.predict(network, x_t, t, cond)
    torch.testing.assert_close(found, expected)
    assert (moved - expected).abs().max() > 1e-3


def test_a_resumed_run_equals_a_straight_one(tiny_sdxl, make_config, start, tmp_path):
    straight, halves = (f"output={tmp_path / name}" for name in ("straight", "halves"))
    whole = train(make_config(tiny_sdxl, f"lora.start={start}", straight))
    train(make_config(tiny_sdxl, f"lora.start={start}", halves, "train.steps=2"))
    resumed = train(make_config(tiny_sdxl, f"lora.start={start}", halves))
    one, other = (lora_file.read_lora(path)[0] for path in (whole, resumed))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.rank=8", r"has lora.rank=4, .*=8: set lora.rank=4"),
        ("lora.alpha=2", r"has lora.alpha=4, .*=2: set lora.alpha=4"),
        ("lora.rank_pattern={to_q: 2}", r"lora.rank=4 lora.rank_pattern=\{to_q: 2\}: set lora.rank=4$"),
        ("lora.targets=[to_q]", r"has targets .* \['to_q'\]: set lora.targets="),
    ],
)
def test_another_shape_is_refused_by_name(tiny_sdxl, make_config, start, override, said):
    with pytest.raises(DiffpoError, match=said):
        train(make_config(tiny_sdxl, f"lora.start={start}", override))


def test_another_models_lora_is_refused(tiny_sd, make_config, start):
    with pytest.raises(DiffpoError, match="was trained on another base model"):
        train(make_config(tiny_sd, f"lora.start={start}"))


# ---- files from elsewhere


def started(path, file, **settings):
    """The adapter of a fresh network that starts from ``file``."""
    family = models.load(Model(path=str(path)))
    network, settings = family.load_network(), Lora(start=str(file), **settings)
    lora.add_lora(network, settings, family.lora_targets)
    lora_apply.start_from(network, settings)
    return lora.lora_state(network)


@pytest.mark.parametrize("form", ["kohya", "peft", "bare"])
def test_it_may_be_of_any_form(tiny_sdxl, tmp_path, form):
    network = exports.train(tiny_sdxl, tmp_path / "run", rank=2, alpha=3 if form == "kohya" else 2)
    if form == "kohya":
        file = (
            export.run(export.Export(tmp_path / "run", "kohya", str(tiny_sdxl), tmp_path / "out")) / "out.safetensors"
        )
    else:
        before = {"peft": "base_model.model.", "bare": ""}[form]
        tensors = load_file(tmp_path / "run" / lora_file.FILE_NAME)
        file = tmp_path / "adapter_model.safetensors"
        save_file({before + name.removeprefix("unet."): value for name, value in tensors.items()}, file)
    found = started(tiny_sdxl, file, rank=2, alpha=3 if form == "kohya" else 2)
    expected = lora.lora_state(network)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_layers_that_are_one_in_kohyas_flux_are_taken_apart(tiny_folder, tmp_path):
    """Each gets its own A, B and rank back, to the bit."""
    from diffpo.export import kohya
    from diffpo.weights import lora_change, lora_forms

    targets = [f"transformer_blocks.{i}.attn.{part}" for i in (0, 1) for part in ("to_q", "to_v", "add_k_proj")]
    targets += [f"single_transformer_blocks.1.{part}" for part in ("attn.to_k", "proj_mlp", "proj_out")]
    network = exports.train(tiny_folder("flux"), tmp_path / "run", rank=2, alpha=3, targets=targets)
    bare = models.load(Model(path=str(tiny_folder("flux")))).load_network()
    changed = lora_forms.read(tmp_path / "run" / lora_file.FILE_NAME, {"transformer": bare})["transformer"]
    state = kohya.convert(Flux, bare, lora_change.by_layer(changed))
    assert state["lora_unet_single_blocks_1_linear1.lora_down.weight"].shape[0] == 8
    save_file(state, tmp_path / "kohya.safetensors")
    found = started(tiny_folder("flux"), tmp_path / "kohya.safetensors", rank=2, alpha=3, targets=targets)
    expected = lora.lora_state(network)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_what_cannot_be_trained_on_is_refused_with_the_way_out(tiny_sdxl, tmp_path):
    exports.train(tiny_sdxl, tmp_path / "run", rank=2, alpha=2)
    tensors = load_file(tmp_path / "run" / lora_file.FILE_NAME)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    q = f"{layer}.lora_A.weight"
    narrow = {name: value[:1] if name == q else value for name, value in tensors.items()}
    narrow[f"{layer}.lora_B.weight"] = tensors[f"{layer}.lora_B.weight"][:, :1].contiguous()
    fewer = {name: value for name, value in tensors.items() if "to_out" not in name}
    loha = {
        f"{layer}.hada_w{i}_{side}": torch.ones((16, 2) if side == "a" else (2, 16)) for i in (1, 2) for side in "ab"
    }
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight"
    for name, changed, said in (
        ("ranks", narrow, rf"set lora.rank=2 lora.rank_pattern={{{layer[5:]}: 1}}"),
        ("layers", fewer, r"has targets \['to_k', 'to_q', 'to_v'\], .* set lora.targets="),
        ("loha", loha, "not a plain LoRA, DoRA or LoKr .*--to merged"),
        ("text", {**tensors, text: torch.ones(2, 16)}, r"text_encoder.*--to merged"),
        (
            "alpha",
            {**tensors, f"{layer}.alpha": torch.tensor(1.0)},
            rf"set lora.alpha=2 lora.alpha_pattern={{{layer[5:]}: 1}}",
        ),
    ):
        save_file(changed, tmp_path / f"{name}.safetensors")
        with pytest.raises(DiffpoError, match=said) as error:
            started(tiny_sdxl, tmp_path / f"{name}.safetensors", rank=2, alpha=2)
        assert "lora.start" in str(error.value) and f"{name}.safetensors" in str(error.value)
