"""Ranks and alphas of single layers, convolutions (LoCon), and a learning rate of B's own (LoRA+)."""

import pytest
import torch
from exports import fresh, output
from exports import train as train_nothing
from safetensors.torch import load_file
from tiny import metrics_of

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Lora, Model
from diffpo.train.loop import train
from diffpo.weights import lora, lora_apply, lora_file

CONVS = ["to_q", "to_out.0", "conv1", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
PATTERNS = {"rank_pattern": {"conv1": 3, "to_out.0": 1}, "alpha_pattern": {"to_q": 5.0}}


def closed_form(file, base, scale_of):
    """The base's weights, each changed by ``scale_of(layer, rank)`` times B A of the file."""
    tensors, weights = load_file(file), {name: value.clone() for name, value in base.state_dict().items()}
    for key in tensors:
        if key.endswith(".lora_A.weight"):
            layer = key.removeprefix("unet.").removesuffix(".lora_A.weight")
            down, up = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            weight = weights[f"{layer}.weight"]
            weight += scale_of(layer, len(down)) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return weights


def scale(layer, rank):
    """Of `PATTERNS`, and rank 2, alpha null."""
    wanted = 3 if layer.endswith(".conv1") else 1 if layer.endswith(".to_out.0") else 2
    assert rank == wanted
    return 5 / 2 if layer.endswith(".to_q") else 1.0


def test_each_layer_has_its_rank_and_scale_through_every_reader(tiny_sdxl, tmp_path):
    """Of convolutions too: diffusers' loader, ours, and a run that starts from the file."""
    network = train_nothing(tiny_sdxl, tmp_path / "run", alpha=None, targets=CONVS, **PATTERNS)
    base, expected = fresh(tiny_sdxl).unet, output(network)
    base.load_state_dict(closed_form(tmp_path / "run" / lora_file.FILE_NAME, base, scale))
    torch.testing.assert_close(output(base), expected, rtol=1e-5, atol=1e-5)
    pipe, ours = fresh(tiny_sdxl), fresh(tiny_sdxl)
    pipe.load_lora_weights(tmp_path / "run", weight_name=lora_file.FILE_NAME)
    lora_apply.load_lora(ours, tmp_path / "run")
    assert (expected - output(fresh(tiny_sdxl).unet)).abs().max() > 1e-2
    for each in (pipe, ours):
        torch.testing.assert_close(output(each.unet), expected, rtol=1e-5, atol=1e-5)
    settings = Lora(rank=2, targets=CONVS, start=str(tmp_path / "run"), **PATTERNS)
    other = models.load(Model(path=str(tiny_sdxl))).load_network()
    lora.add_lora(other, settings, [])
    lora_apply.start_from(other, settings)
    assert torch.equal(output(other), expected)


def test_a_run_with_patterns_resumes_and_another_pattern_is_refused(tiny_sdxl, make_config, tmp_path):
    options = ["lora.rank=2", f"lora.targets={CONVS}", "lora.rank_pattern.conv1=3", "train.lr=0.02", "train.steps=3"]
    straight = train(make_config(tiny_sdxl, *options, f"output={tmp_path / 'straight'}"))
    train(make_config(tiny_sdxl, *options, "train.steps=2"))
    assert train(make_config(tiny_sdxl, *options)).read_bytes() == straight.read_bytes()
    rows = metrics_of(tmp_path / "straight")
    assert rows[0]["rewards/margins"] == 0 and rows[-1]["rewards/margins"] != 0
    with pytest.raises(DiffpoError, match=r"rank_pattern"):
        train(make_config(tiny_sdxl, *options[:2], *options[3:]))
    start = (*options[:2], f"lora.start={straight}", f"output={tmp_path / 'other'}")
    with pytest.raises(DiffpoError, match=r"set lora.rank=2 lora.rank_pattern={conv1: 3}"):
        train(make_config(tiny_sdxl, *start))


def test_a_pattern_of_nothing_is_refused(tiny_sdxl, make_config):
    with pytest.raises(DiffpoError, match=r"lora.rank_pattern names conv9, .* to_k"):
        train(make_config(tiny_sdxl, "lora.rank_pattern.conv9=3"))
    with pytest.raises(DiffpoError, match=r"rank_pattern: 'conv\*' is not the name"):
        make_config(tiny_sdxl, "lora.rank_pattern={conv*: 3}")
    with pytest.raises(DiffpoError, match=r"b_lr_ratio .* LoKr lacks"):
        make_config(tiny_sdxl, "lora.kind=lokr", "lora.b_lr_ratio=16")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_b_moves_so_many_times_faster(tiny_sd, make_config, tmp_path, kind):
    """One step of SGD: B is -lr ratio times its gradient, which does not depend on the ratio. A has none yet."""
    common = [f"lora.kind={kind}", "train.optimizer=torch.optim.SGD", "train.lr=0.1", "train.steps=1"]
    found = []
    for ratio in (1, 16):
        config = make_config(tiny_sd, *common, f"lora.b_lr_ratio={ratio}", f"output={tmp_path / str(ratio)}")
        found.append(load_file(train(config)))
        assert metrics_of(config.output)[0]["lr"] == 0.1
    for name, value in found[0].items():
        times = 16 if ".lora_B." in name else 1
        torch.testing.assert_close(found[1][name], times * value, rtol=1e-5, atol=1e-9)
    assert any(value.any() for name, value in found[0].items() if ".lora_B." in name)


def test_lora_plus_resumes_and_its_rates_fall_together(tiny_sd, make_config, tmp_path):
    options = ["lora.b_lr_ratio=16", "train.lr=0.002", "train.lr_schedule=linear", "train.warmup=1", "train.steps=3"]
    options.append("train.checkpoint_every=2")
    straight = train(make_config(tiny_sd, *options, f"output={tmp_path / 'straight'}"))
    (tmp_path / "again").mkdir()
    (tmp_path / "straight" / "checkpoint-000002").rename(tmp_path / "again" / "checkpoint-000002")
    again = train(make_config(tiny_sd, *options, f"output={tmp_path / 'again'}"))
    assert again.read_bytes() == straight.read_bytes()
    state = torch.load(tmp_path / "again" / "checkpoint-000003" / "state.pt", weights_only=True)
    rates = [group["initial_lr"] for group in state["optimizer"]["param_groups"]]
    assert rates == pytest.approx([0.002, 0.032])
