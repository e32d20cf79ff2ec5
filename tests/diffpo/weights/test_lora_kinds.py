"""What lora.kind trains (LoRA, DoRA, LoKr): from its first step to every form that it is exported to."""

import shutil

import pytest
import torch
from exports import MAKE, fresh, output
from exports import train as train_nothing
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import metrics_of

from diffpo import models
from diffpo.commands import footprint
from diffpo.common.errors import DiffpoError
from diffpo.config import Lora, Model, ReferenceSettings
from diffpo.export import export
from diffpo.models import identity
from diffpo.objective import reference
from diffpo.problems.policy import Policy
from diffpo.train.loop import train
from diffpo.weights import lora, lora_apply, lora_file, trained

KINDS = ["lora", "dora", "lokr"]


def closed_form(file, base):
    """The base's weights with the file's change in each layer, from its tensors and rank 2, alpha 3 alone."""
    tensors = load_file(file)
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    for layer in {key.split(".", 1)[1].rsplit(".lo", 1)[0] for key in tensors}:
        own = {key.rsplit(f"{layer}.")[-1]: value for key, value in tensors.items() if f".{layer}.lo" in key}
        weight = weights[f"{layer}.weight"]
        if "lora_A.weight" in own:
            new = weight + 1.5 * own["lora_B.weight"] @ own["lora_A.weight"]
            if "lora_magnitude_vector" in own:
                new = torch.stack(
                    [m * row / row.norm() for m, row in zip(own["lora_magnitude_vector"], new, strict=True)]
                )
        else:
            w2 = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
            rows = [torch.cat([value * w2 for value in row], 1) for row in own["lokr_w1"]]
            new = weight + 1.5 * torch.cat(rows)
        weights[f"{layer}.weight"] = new
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_as_its_reference_resumes_bit_for_bit_and_is_merged(tiny_sdxl, make_config, tmp_path, kind):
    common = (f"lora.kind={kind}", "lora.rank=2", "lora.alpha=3", "train.lr=0.02", "train.steps=3")
    straight = make_config(tiny_sdxl, *common, f"output={tmp_path / 'straight'}")
    train(straight)
    halves = (*common, f"output={tmp_path / 'halves'}", "train.gradient_checkpointing=true")
    train(make_config(tiny_sdxl, *halves, "train.steps=2"))
    file = train(make_config(tiny_sdxl, *halves, "train.gradient_checkpointing=false"))
    first, second, _ = metrics_of(straight.output)
    for key in ("rewards/margins", "error/chosen_delta", "error/rejected_delta"):
        assert first[key] == 0.0 and second[key] != 0.0
    one, other = load_file(straight.output / lora_file.FILE_NAME), load_file(file)
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6)
    # resumed where nothing else differs: the same file
    shutil.copytree(straight.output, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-000003")
    again = train(make_config(tiny_sdxl, *common, f"output={tmp_path / 'again'}"))
    assert again.read_bytes() == (straight.output / lora_file.FILE_NAME).read_bytes()

    expected = closed_form(file, fresh(tiny_sdxl).unet)
    merged = fresh(export.run(export.Export(file, "merged", str(tiny_sdxl), tmp_path / "merged"))).unet
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    pipe = fresh(tiny_sdxl)
    before = output(pipe.unet)
    lora_apply.load_lora(pipe, file)
    torch.testing.assert_close(output(pipe.unet), output(merged), rtol=1e-4, atol=1e-5)
    assert (output(merged) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["dora", "lokr"])
@pytest.mark.parametrize("family", ["sd", *MAKE])
def test_every_family_trains_it_and_its_reference_is_the_base(tiny_folder, tmp_path, kind, family):
    base = fresh(tiny_folder(family))
    network = train_nothing(tiny_folder(family), tmp_path / "run", kind=kind)
    assert identity.base_identity(network) == identity.base_identity(lora.network_of(base))
    with trained.of(network).switched(None) as off:
        torch.testing.assert_close(output(off), output(lora.network_of(base)), rtol=1e-5, atol=1e-5)
    assert (output(network) - output(lora.network_of(base))).abs().max() > 1e-2
    lora_apply.load_lora(base, tmp_path / "run")
    torch.testing.assert_close(output(lora.network_of(base)), output(network), rtol=1e-4, atol=1e-5)
    merged = fresh(export.run(export.Export(tmp_path / "run", "merged", str(tiny_folder(family)), tmp_path / "merged")))
    torch.testing.assert_close(output(lora.network_of(merged)), output(network), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dora", "lokr"])
@pytest.mark.parametrize("family", ["sd", "sd3", "pixart", "flux"])
def test_every_family_takes_a_step_from_zero(tiny_folder, make_config, kind, family):
    config = make_config(tiny_folder(family), f"lora.kind={kind}", "lora.rank=2", "train.steps=1")
    weights = load_file(train(config))
    (row,) = metrics_of(config.output)
    assert row["error/chosen_delta"] == row["error/rejected_delta"] == 0.0 and row["grad_norm"] > 0
    moved = [value.any() for name, value in weights.items() if name.endswith(("lora_B.weight", "lokr_w1"))]
    assert sum(moved) >= 0.9 * len(moved)  # SD3's last block has a query whose output nobody reads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_half_precision_a_fresh_one_changes_nothing_and_is_float32(tiny_sd, kind, dtype):
    """A DoRA's magnitudes are the norms that the forward pass divides by, exactly."""
    family = models.load(Model(path=str(tiny_sd)), dtype)
    network = family.load_network()
    x, t = torch.randn(2, 4, 8, 8).to(family.dtype), torch.tensor([50, 700])
    text = torch.randn(2, 5, 16).to(family.dtype)
    with torch.no_grad(), torch.autocast("cpu", family.dtype):
        before = network(x, t, text).sample
        parameters = lora.add_lora(network, Lora(kind=kind, rank=2), [*family.lora_targets, "proj_in"])
        after = network(x, t, text).sample
    assert torch.equal(before, after)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    names = set(lora.lora_state(network))
    assert len(names) == len(parameters) and not any("default" in name for name in names)
    if kind == "dora":
        with pytest.raises(DiffpoError, match=r"conv1, a convolution, .* train.precision=no"):
            lora.add_lora(family.load_network(), Lora(kind=kind, rank=2), ["conv1"])


@pytest.mark.parametrize("kind", ["dora", "lokr"])
@pytest.mark.parametrize("policy", ["ema", "accelerated"])
def test_a_reference_that_moves_is_a_second_one(tiny_sd, kind, policy):
    family = models.load(Model(path=str(tiny_sd)))
    network = family.load_network()
    parameters = lora.add_lora(network, Lora(kind=kind, rank=2), family.lora_targets)
    made = reference.make(ReferenceSettings(policy=policy, decay=0.75, every=1), Policy(family, network))
    before = {name: value.clone() for name, value in lora.lora_state(network).items()}
    assert made.weights.keys() == before.keys() and len(before) == len(parameters)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(1.0)
    made.after_update(1)
    step = 0.25 if policy == "ema" else 1 + made.settings.strength
    for name, value in made.weights.items():
        torch.testing.assert_close(value, before[name] + step, rtol=1e-5, atol=1e-6)
    state = made.state()
    made.load(state)
    with made.on() as reference_policy:
        module = reference_policy.network
        moved = output(module)
    for parameter, value in zip(lora.adapter_parameters(network).values(), made.weights.values(), strict=True):
        parameter.data.copy_(value)
    assert torch.equal(moved, output(network))


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_training_goes_on_from_it_and_not_from_another_kind(tiny_sdxl, make_config, tmp_path, kind):
    common = (f"lora.kind={kind}", "train.steps=2")
    start = train(make_config(tiny_sdxl, *common, f"output={tmp_path / 'first'}"))
    config = make_config(tiny_sdxl, *common, f"lora.start={start}", "train.lr=1e-12", f"output={tmp_path / 'second'}")
    file = train(config)
    first = metrics_of(config.output)[0]
    assert first["error/chosen_delta"] == 0.0 and first["grad_norm"] > 0
    before, after = load_file(start), load_file(file)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-9)
    with pytest.raises(DiffpoError, match=rf"has kind {kind}, .* lora: set lora.kind={kind}"):
        train(make_config(tiny_sdxl, f"lora.start={start}", f"output={tmp_path / 'third'}"))


@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_lokr_in_kohyas_format_is_what_it_was(tiny_folder, tmp_path, family, rank):
    """Read back by names and closed form of LyCORIS: alpha / rank of factors of low rank, 1 of whole ones."""
    network = train_nothing(tiny_folder(family), tmp_path / "run", kind="lokr", rank=rank)
    made = export.run(export.Export(tmp_path / "run", "kohya", str(tiny_folder(family)), tmp_path / "style"))
    tensors = load_file(made / "style.safetensors")
    assert {key.rsplit(".", 1)[1] for key in tensors} >= {"lokr_w1", "alpha"}
    stem = "lora_unet_mid_block_attentions_0" if family == "sd" else "lora_unet_middle_block_1"
    own = {
        key.rsplit(".", 1)[1]: value
        for key, value in tensors.items()
        if f"{stem}_transformer_blocks_0_attn1_to_q." in key
    }
    low = "lokr_w2_a" in own
    w2 = own["lokr_w2_a"] @ own["lokr_w2_b"] if low else own["lokr_w2"]
    assert low == (rank == 1)
    scale = own["alpha"].item() / len(own["lokr_w2_b"]) if low else 1.0
    tuned = network.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(5, 16)
    expected = tuned(x) - tuned.get_base_layer()(x)
    torch.testing.assert_close(x @ (scale * torch.kron(own["lokr_w1"], w2)).T, expected, rtol=1e-4, atol=1e-5)
    pipe = fresh(tiny_folder(family))
    lora_apply.load_lora(pipe, made / "style.safetensors")
    torch.testing.assert_close(output(pipe.unet), output(network), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_reads_it_by_the_call_in_the_card(tiny_folder, tmp_path, kind, family):
    """Of a LoKr the network's own loader; the pipelines' refuses it."""
    path = tiny_folder(family)
    network = train_nothing(path, tmp_path / "run", kind=kind)
    made = export.run(export.Export(tmp_path / "run", "diffusers", str(path), tmp_path / "out"))
    pipe = fresh(path)
    without, part = output(lora.network_of(pipe)), "unet" if "sd3" != family != "flux" else "transformer"
    (call,) = [line for line in (made / "README.md").read_text().splitlines() if "load_lora" in line]
    if kind == "lokr":
        assert call.startswith(f"pipe.{part}.load_lora_adapter(")
        with pytest.raises(ValueError, match="lora"):
            fresh(path).load_lora_weights(made, weight_name=lora_file.FILE_NAME)
    exec(call.replace("THIS_FOLDER", str(made)), {"pipe": pipe})
    found = output(lora.network_of(pipe))
    assert (found - without).abs().max() > 1e-2
    torch.testing.assert_close(found, output(network), rtol=1e-5, atol=1e-5)


def test_what_other_programs_would_read_otherwise_is_refused_with_the_way_out(tiny_folder, tmp_path):
    train_nothing(tiny_folder("sd"), tmp_path / "dora", kind="dora")
    with pytest.raises(DiffpoError, match=r"DoRA in kohya's format .* --to merged"):
        export.run(export.Export(tmp_path / "dora", "kohya", str(tiny_folder("sd")), tmp_path / "out"))
    train_nothing(tiny_folder("flux"), tmp_path / "lokr", kind="lokr")
    with pytest.raises(DiffpoError, match=r"to_q.* kohya's format, .* --to merged"):
        export.run(export.Export(tmp_path / "lokr", "kohya", str(tiny_folder("flux")), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["fp8", "nf4"])
def test_rounded_base_weights_are_refused(tiny_folder, make_config, how):
    with pytest.raises(DiffpoError, match=r"lora.kind=dora .* model.base_weights=full"):
        make_config(tiny_folder("pixart"), "lora.kind=dora", f"model.base_weights={how}")


def test_check_counts_what_is_trained(tiny_sd, make_config):
    for kind in KINDS:
        said = []
        footprint.footprint(make_config(tiny_sd, f"lora.kind={kind}"), None, said.append)
        network = models.load(Model(path=str(tiny_sd))).load_network()
        family = models.load(Model(path=str(tiny_sd)))
        count = sum(p.numel() for p in lora.add_lora(network, Lora(kind=kind, rank=4), family.lora_targets))
        name = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr"}[kind]
        assert any(f"{count:,} trainable ({name} rank 4, float32)" in line for line in said)


def test_the_header_says_what_it_is(tiny_sd, tmp_path):
    for kind, expected in {
        "lora": '"unet.lora_alpha": 3, "unet.r": 2',
        "dora": '"unet.use_dora": true',
        "lokr": '"unet.alpha": 3, "unet.r": 2',
    }.items():
        train_nothing(tiny_sd, tmp_path / kind, kind=kind)
        with safe_open(tmp_path / kind / lora_file.FILE_NAME, "pt") as file:
            assert expected in file.metadata()["lora_adapter_metadata"]
