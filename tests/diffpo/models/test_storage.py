"""How the frozen network is kept (fp8, nf4), compiled, and by what its attention is computed."""

import functools
import importlib.util
import re
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import metrics_of
from tiny_transformers import make_flux, make_pixart, make_sd3
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from diffpo import models
from diffpo.cli import app
from diffpo.common.errors import DiffpoError
from diffpo.config import Lora, Model, ScorerConfig, load_config
from diffpo.models import frozen, storage
from diffpo.models.identity import base_identity
from diffpo.train import distributed
from diffpo.train.loop import train
from diffpo.weights import lora, trained

needs_bitsandbytes = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="no bitsandbytes")
SMALL = ["fp8", pytest.param("nf4", marks=needs_bitsandbytes)]


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    return make_pixart(tmp_path_factory.mktemp("models") / "pixart", layers=3)


def networks(path, how, precision="no", seed=0):
    """The network kept small with a LoRA that does something, and beside it the whole one."""
    family = models.load(Model(path=str(path), base_weights=how), precision)
    small = family.load_network()
    parameters = lora.add_lora(small, Lora(rank=4), family.lora_targets)
    torch.manual_seed(seed)
    for parameter in parameters:
        if not parameter.any():
            parameter.data.normal_(0, 0.1)
    return family, small, models.load(Model(path=str(path)), precision).load_network()


def inputs(family, network, n=2):
    draw = torch.Generator().manual_seed(0)
    x_t, _, cond = family.meta_inputs(network, n, 16)
    fill = lambda value: torch.rand(value.shape, generator=draw)  # noqa: E731
    return fill(x_t), torch.tensor([100, 700]), {name: fill(value) for name, value in cond.items()}


def dequantised(network, whole, how):
    """The whole network with the small one's weights, written out."""
    kept = dict(network.named_parameters())
    for name, parameter in whole.named_parameters():
        stem, _, leaf = name.rpartition(".")
        small = kept.get(f"{stem}.base_layer.{leaf}", kept.get(name))
        if small.dtype == torch.uint8:
            import bitsandbytes

            small = bitsandbytes.functional.dequantize_4bit(small.data, small.quant_state)
        parameter.data = small.detach().to(parameter.dtype)
    return whole


@pytest.mark.parametrize("how", SMALL)
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("which", ["transformer", "unet"])
def test_computes_with_the_rounded_weights_and_gradients_reach_a_float32_lora(pixart, tiny_sdxl, which, how, precision):
    """Both passes against a plain network that holds the rounded weights; of a UNet, with its convolutions."""
    family, small, whole = networks(pixart if which == "transformer" else tiny_sdxl, how, precision)
    parameters = [parameter for parameter in small.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    plain = dequantised(small, whole, how)
    lora.add_lora(plain, Lora(rank=4), family.lora_targets)
    lora.set_lora_state(plain, lora.lora_state(small))
    problem = inputs(family, small)
    found = []
    for network in (small, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = family.predict(network, *problem)
            with trained.of(network).switched(None):
                base = family.predict(network, *problem)
        output.float().square().mean().backward()
        found.append((output, base, [p.grad for p in network.parameters() if p.requires_grad]))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if precision == "no" else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(found[0], found[1], **tolerance)
    assert not torch.equal(found[0][0], found[0][1]) and all(gradient.any() for gradient in found[0][2])


@pytest.mark.parametrize(("how", "bytes_each"), [("fp8", 1), pytest.param("nf4", 0.516, marks=needs_bitsandbytes)])
def test_weights_take_less_memory_and_the_estimate_says_how_much(pixart, how, bytes_each):
    family = models.load(Model(path=str(pixart), base_weights=how))
    whole, small = models.load(Model(path=str(pixart))).load_network(), family.load_network()
    linear = sum(m.weight.numel() for n, m in whole.named_modules() if n.startswith("transformer_blocks.") and leaf(m))
    before, after = bytes_of(whole), bytes_of(small)
    assert before - after >= (4 - bytes_each) * linear * 0.98  # NF4's scales: whole blocks of 64
    assert storage.size(family.meta_network(), how) == pytest.approx(after, rel=0.02)
    assert storage.size(family.meta_network(), "full") == before


def test_check_says_what_fp8_and_offload_save(pixart, make_config, tmp_path):
    make_config(pixart)
    weights = []
    for option in ("train.steps=3", "model.base_weights=fp8", "model.offload=true"):
        said = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml"), option]).output
        assert ("parameters in float32, kept as fp8" in said) == ("fp8" in option)
        weights.append(float(re.search(r"frozen weights ([\d.]+) MiB", said).group(1)))
    assert weights == [0.2, 0.1, 0.0]  # 166,592, about 78,000, and less than 52,000 bytes


@pytest.mark.parametrize(
    "options", [{"base_weights": "fp8"}, {"offload": True}, {"base_weights": "fp8", "offload": True}]
)
@pytest.mark.parametrize("which", ["transformer", "unet"])
def test_no_copy_of_a_weight_is_kept_between_the_passes(pixart, tiny_sdxl, which, options):
    """Of a layer with a LoRA its input is kept, for the LoRA."""
    family = models.load(Model(path=str(pixart if which == "transformer" else tiny_sdxl), **options))
    network = family.load_network()
    layers = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)]
    weights = [layer.weight.detach().float().flatten().sort()[0] for layer in layers]
    lora.add_lora(network, Lora(rank=3), family.lora_targets)
    own, kept = {p.untyped_storage().data_ptr() for p in network.parameters()}, []

    def note(value):
        if value.untyped_storage().data_ptr() not in own and value.dim() > 1 and value.is_floating_point():
            flat = value.float().flatten().sort()[0]
            kept.extend(value.shape for weight in weights if torch.equal(flat, weight))
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        family.predict(network, *inputs(family, network)).sum().backward()
    assert not kept and all(p.grad is not None for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("small", ["full", "fp8"])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_an_offloaded_run_is_the_same_one(tiny_sdxl, make_config, tmp_path, small, kind):
    """With its text encoders on the device one after another; and it may go on without. But for the rounding of
    LoRA's own layers (lora_forward.py), which do not compute with offloaded weights."""
    if kind == "lokr" and small == "fp8":
        return
    options = [f"model.base_weights={small}", f"lora.kind={kind}", "train.steps=3"]
    straight = train(make_config(tiny_sdxl, *options, f"output={tmp_path / 'straight'}"))
    cache = f"data.cache={tmp_path / 'cache'}"
    train(make_config(tiny_sdxl, *options, "model.offload=true", cache, "train.steps=2"))
    found, expected = load_file(train(make_config(tiny_sdxl, *options))), load_file(straight)
    assert found.keys() == expected.keys()
    rounding = 0 if kind == "lokr" or small == "fp8" else 1e-3
    assert all((found[name] - value).norm() <= rounding * value.norm() for name, value in expected.items())


def test_what_is_offloaded_stays_where_it_is(tiny_sdxl, monkeypatch):
    """Of the network all convolutions and linear layers; and one text encoder at a time is moved to the device."""
    family = models.load(Model(path=str(tiny_sdxl), offload=True))
    network = family.load_network()
    assert sum(each.numel() for each in frozen.offloaded(network)) > 0.97 * sum(
        each.numel() for each in models.load(Model(path=str(tiny_sdxl))).load_network().parameters()
    )
    network.to(torch.float64)
    assert {each.dtype for each in frozen.offloaded(network)} == {torch.float32}
    family.load_encoders()
    plain = models.load(Model(path=str(tiny_sdxl)))
    plain.load_encoders()
    moves, names, move = [], {id(getattr(family.pipe, name)): name for name in family.encoders}, torch.nn.Module.to

    def noted(module, *places):
        if id(module) in names:
            moves.append((names[id(module)], str(places[0])))
        return move(module, *places)

    monkeypatch.setattr(torch.nn.Module, "to", noted)
    family.pipe.text_encoder.to = functools.partial(noted, family.pipe.text_encoder)  # transformers has its own
    family.pipe.text_encoder_2.to = functools.partial(noted, family.pipe.text_encoder_2)
    for name, value in family.encode_text(["a", None]).items():
        assert torch.equal(value, plain.encode_text(["a", None])[name])
    assert moves == [(n, "cpu") for n in ("text_encoder",) * 2 + ("text_encoder_2",) * 2]


def test_tiles_give_nearly_the_same_latents_and_a_cache_of_their_own(tiny_sdxl):
    """Of a VAE whose receptive field is larger than a tile, so that the error is that of any real one."""
    whole, tiled = (models.load(Model(path=str(tiny_sdxl), vae_tile=tile)) for tile in (None, 64))
    pixels = torch.rand(1, 3, 160, 160, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = []
    for family in (whole, tiled):
        family.load_encoders()
        latents.append(family.encode_image(pixels)["mean"])
    assert 0 < (latents[0] - latents[1]).std() < 0.2 * latents[0].std()
    assert torch.equal(
        whole.encode_image(pixels[..., :64, :64])["mean"], tiled.encode_image(pixels[..., :64, :64])["mean"]
    )
    assert whole.vae_hash() != tiled.vae_hash()


def leaf(module):
    return isinstance(module, torch.nn.Linear)


def bytes_of(network):
    total = sum(parameter.nbytes for parameter in network.parameters())
    states = [parameter.quant_state for parameter in network.parameters() if hasattr(parameter, "quant_state")]
    return total + sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)


@pytest.mark.parametrize("how", SMALL)
def test_a_small_network_is_still_known_as_what_it_was_made_from(pixart, how):
    _, small, whole = networks(pixart, how)
    assert base_identity(small, "name") == base_identity(whole, "name")


def test_the_lora_starts_from_unrounded_numbers(pixart):
    """peft casts a fresh adapter to the base's fp8."""
    family = models.load(Model(path=str(pixart), base_weights="fp8"))
    first, other = (lora.add_lora(family.load_network(), Lora(rank=4), family.lora_targets, seed) for seed in (0, 1))
    again = lora.add_lora(family.load_network(), Lora(rank=4), family.lora_targets, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    drawn = [parameter for parameter in first if parameter.any()]
    assert len(drawn) == len(first) / 2  # A; B is 0
    assert all((a != a.to(torch.float8_e4m3fn).float()).float().mean() > 0.8 for a in drawn)
    assert torch.cat([a.flatten() for a in drawn]).std().item() == pytest.approx(1 / 4, rel=0.05)  # peft's 1 / rank
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True) if a.any())


@pytest.mark.parametrize("how", SMALL)
@pytest.mark.parametrize("make", [make_sd3, make_flux])
def test_other_transformers_start_at_zero_logit_too(make_config, tmp_path, make, how):
    options = [f"model.base_weights={how}", "train.steps=2", "train.gradient_checkpointing=true"]
    train(make_config(make(tmp_path / "model"), *options))
    rows = metrics_of(tmp_path / "run")
    assert rows[0]["rewards/margins"] == 0 and rows[1]["rewards/margins"] != 0


@pytest.mark.parametrize("how", SMALL)
def test_trains_and_resumes_bit_for_bit(pixart, make_config, tmp_path, how):
    small = [
        f"model.base_weights={how}",
        "train.steps=3",
        "train.checkpoint_every=2",
        "train.gradient_checkpointing=true",
    ]
    straight = load_file(train(make_config(pixart, *small, f"output={tmp_path / 'straight'}")))
    rows = metrics_of(tmp_path / "straight")
    assert rows[0]["rewards/margins"] == 0 and rows[-1]["rewards/margins"] != 0
    train(make_config(pixart, *small, "train.steps=2"))
    resumed = load_file(train(make_config(pixart, *small)))
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())
    with pytest.raises(DiffpoError, match=r"base_weights: '.*' there, 'full' here"):
        train(make_config(pixart, "train.steps=3"))


def test_what_does_not_go_with_small_weights_is_refused(pixart, make_config, tmp_path):
    with pytest.raises(DiffpoError, match=r"fp8 weights cannot be trained: set model.base_weights=full"):
        make_config(pixart, "model.base_weights=fp8", "lora=null")
    for small in ("model.base_weights=fp8", "model.offload=true"):
        with pytest.raises(DiffpoError, match=r"set train.compile=false"):
            make_config(pixart, small, "train.compile=true")
    for other in ("lora=null", "lora.kind=dora", "model.base_weights=nf4"):
        with pytest.raises(DiffpoError, match=r"set model.offload=false"):
            make_config(pixart, "model.offload=true", other)
    recipe = tmp_path / "scorer.yaml"
    recipe.write_text(
        "model: {path: x, base_weights: nf4}\ndata: {train: a, validation: b, resolution: 16}\n"
        "scorer: {kind: latent}\ntrain: {steps: 1, batch_size: 1, lr: 1}\noutput: out\n"
    )
    with pytest.raises(DiffpoError, match=r"set model.base_weights to full"):
        load_config(recipe, (), ScorerConfig)


def test_a_missing_package_is_named_with_its_command(pixart, make_config, tmp_path, monkeypatch):
    for module in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DiffpoError, match=r'nf4 needs bitsandbytes .*pip install "diffpo\[quantised\]"'):
        models.load(Model(path=str(pixart), base_weights="nf4")).load_network()
    with pytest.raises(DiffpoError, match=r'AdamW8bit.*pip install "diffpo\[quantised\]"'):
        train(make_config(pixart, "train.optimizer=bitsandbytes.optim.AdamW8bit"))
    make_config(pixart)
    options = ["model.base_weights=nf4", "train.optimizer=bitsandbytes.optim.AdamW8bit", "model.attention=flash"]
    said = CliRunner().invoke(app, ["check", str(tmp_path / "recipe.yaml"), *options])
    assert isinstance(said.exception, DiffpoError)
    assert {"nf4 needs bitsandbytes", "AdamW8bit", "model.attention=flash"} <= {
        phrase
        for phrase in ("nf4 needs bitsandbytes", "AdamW8bit", "model.attention=flash")
        if phrase in str(said.exception)
    }


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_an_8_bit_optimiser_resumes_bit_for_bit(pixart, make_config, tmp_path, name):
    options = [f"train.optimizer=bitsandbytes.optim.{name}", "train.optimizer_args.min_8bit_size=16", "train.steps=4"]
    straight = load_file(train(make_config(pixart, *options, f"output={tmp_path / 'straight'}")))
    train(make_config(pixart, *options, "train.steps=2"))
    state = torch.load(tmp_path / "run" / "checkpoint-000002" / "state.pt", weights_only=True)["optimizer"]
    assert torch.uint8 in {value.dtype for value in tree_leaves(state) if isinstance(value, torch.Tensor)}
    resumed = load_file(train(make_config(pixart, *options)))
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())


# ---- compiled


def test_a_compiled_run_is_the_eager_one(pixart, make_config, tmp_path, monkeypatch):
    """Its blocks, that is; by a backend that is quick to compile. Interrupted, and resumed without."""
    compiled, blocks = [], distributed.compile_blocks

    def quick(family, network):
        def backend(graph, inputs):
            compiled.append(graph)
            return graph.forward

        blocks(family, network, backend=backend)

    monkeypatch.setattr(distributed, "compile_blocks", quick)
    options = ["train.optimizer=torch.optim.SGD", "train.lr=0.3", "train.batch_size=2", "train.steps=3"]
    eager = load_file(train(make_config(pixart, *options, f"output={tmp_path / 'eager'}")))
    assert not compiled
    train(make_config(pixart, *options, "train.compile=true", "train.steps=2"))
    assert compiled
    found = load_file(train(make_config(pixart, *options)))
    assert found.keys() == eager.keys()
    for name, value in eager.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)
    for ours, theirs in zip(metrics_of(tmp_path / "run"), metrics_of(tmp_path / "eager"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


# ---- attention


def test_attention_backends_agree_and_unknown_ones_are_named(tmp_path, pixart):
    problem, outputs = None, []
    flux = make_flux(tmp_path / "flux")
    for name in (None, "native", "_native_math"):
        family = models.load(Model(path=str(flux), attention=name))
        network = family.load_network()
        problem = problem or inputs(family, network)
        outputs.append(family.predict(network, *problem))
        chosen = {str(m.processor._attention_backend) for m in network.modules() if hasattr(m, "processor")}
        assert name is None or chosen == {f"AttentionBackendName.{name.upper()}"}
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(DiffpoError, match=r"model.attention=flush .*flash, .*native.*xformers"):
        models.load(Model(path=str(flux), attention="flush")).load_network()
    with pytest.raises(DiffpoError, match=r"model.attention=flash_hub .*choose one of"):  # would run code from the hub
        models.load(Model(path=str(flux), attention="flash_hub")).load_network()
    with pytest.raises(DiffpoError, match=r"model.attention=flash cannot be used here"):
        models.load(Model(path=str(flux), attention="flash")).load_network()
    for path in (pixart, make_sd3(tmp_path / "sd3")):
        models.load(Model(path=str(path), attention="native")).load_network()
        with pytest.raises(DiffpoError, match=r"model\.attention=_native_math .*native .*xformers"):
            models.load(Model(path=str(path), attention="_native_math")).load_network()


def test_kernels_may_change_within_a_run_and_weights_may_not(make_config, pixart):
    identity = make_config(pixart).identity()
    for option in ("train.compile=true", "model.attention=native"):
        assert make_config(pixart, option).identity() == identity
    assert make_config(pixart, "model.base_weights=nf4").identity() != identity
