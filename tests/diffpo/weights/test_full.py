"""Full fine-tuning: the network itself is trained, and compared with a frozen copy."""

import json
import math
import shutil

import diffusers
import pytest
import torch
from exports import MAKE, fresh, inputs
from on_policy import Brightness
from safetensors.torch import load_file
from tiny import metrics_of, pick_a_pic_rows, write_parquet
from whole_networks import file_of, move, ready, same

from diffpo import models
from diffpo.commands import check
from diffpo.common.errors import DiffpoError
from diffpo.train.loop import train
from diffpo.weights import full, lora, trained

CLASSES = {"sd": "UNet2DConditionModel", "pixart": "PixArtTransformer2DModel", "dit": "DiTTransformer2DModel"}


@pytest.mark.parametrize("name", ["sd", "sdxl", *MAKE])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_all_weights_are_trained_and_the_copy_stays(tiny_folder, make_config, name, precision):
    config = make_config(tiny_folder(name), "lora=null", f"train.precision={precision}")
    family, network, parameters, made = ready(config)
    base = fresh(tiny_folder(name))
    weights = lora.network_of(base).state_dict()
    assert same(network.state_dict(), weights)  # unrounded, under the same names: the copy is not in there
    assert {id(p) for p in parameters} == {id(p) for p in network.parameters()}
    assert {p.dtype for p in parameters} == {torch.float32} and len(parameters) > 20
    arguments = {key: inputs(network)[key] for key in inputs(network)}

    def policy():
        with torch.autocast("cpu", family.dtype, enabled=precision == "bf16"):
            return network(**arguments).sample.float()

    before = policy()
    with made.on() as reference_policy, trained.of(network).switched(None) as off:
        module = reference_policy.network
        still = module(**arguments).sample
        assert off is module and not still.requires_grad and still.dtype == torch.float32
        assert torch.equal(still, before)  # to the last bit: u = 0
    before.square().sum().backward()
    assert not [n for n, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert all(p.grad is None for p in module.parameters())
    move(parameters)
    with made.on() as reference_policy:
        module = reference_policy.network
        assert torch.equal(module(**arguments).sample, still)
    assert (policy() - still).abs().max() > 1e-3
    layers = [m for m in module.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    assert {p.dtype for m in layers for p in m.parameters()} == {family.dtype}  # two bytes a weight in half precision


@pytest.mark.parametrize("name", ["sd", "pixart", "dit"])
def test_a_run_begins_at_log_2_and_diffusers_reads_what_it_wrote(tiny_folder, make_config, tmp_path, name):
    rows = [{**row, "caption": str(i % 3)} for i, row in enumerate(pick_a_pic_rows(8))]  # DiT knows numbers only
    data = write_parquet(tmp_path / "pairs.parquet", rows)
    config = make_config(tiny_folder(name), "lora=null", "train.lr=1e-3", "train.steps=2", data=data)
    folder = train(config)
    assert folder == config.output / lora_part(name)
    first, second = metrics_of(config.output)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["grad_norm"] > 0
    assert first["rewards/chosen"] == first["error/chosen_delta"] == 0.0 != second["rewards/chosen"]
    assert second["calls/forward"] == 2 * first["calls/forward"] == 2 * (8 + 8)  # policy and copy, a pair each
    cls = getattr(diffusers, CLASSES[name])
    network = cls.from_pretrained(config.output, subfolder=lora_part(name))
    checkpoint = config.output / "checkpoint-000002"
    assert same(network.state_dict(), load_file(file_of(checkpoint)))
    base = lora.network_of(fresh(tiny_folder(name))).state_dict()
    assert all(not torch.equal(p, base[n]) for n, p in network.named_parameters())
    assert network.dtype == torch.float32 and not list(config.output.glob("**/.*part"))
    assert str(tiny_folder(name)) not in (folder / "config.json").read_text()
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    assert f"{lora_part(name)}/diffusion_pytorch_model.safetensors" in manifest["files"]
    # AdamW's moments of every weight, and of nothing else
    state = torch.load(checkpoint / "state.pt", weights_only=True)["optimizer"]["state"]
    assert sum(each["exp_avg"].numel() for each in state.values()) == sum(p.numel() for p in network.parameters())
    card = (config.output / "README.md").read_text()
    assert f'{CLASSES[name]}.from_pretrained("FOLDER_OF_THIS_FILE", subfolder="{lora_part(name)}")' in card
    assert "all weights" in card and "lora" not in card.lower()


def lora_part(name):
    return "unet" if name.startswith("sd") and name != "sd3" else "transformer"


def test_the_first_update_is_minus_lr_times_the_gradient_of_the_loss(tiny_sd, make_config):
    """At u = 0 the loss is log 2 with slope -1/2, so the step is that of (beta/4) (error of chosen - of rejected)."""
    from diffpo.data.batches import Batches
    from diffpo.data.groups import load_groups
    from diffpo.data.order import order
    from diffpo.problems.forward import Forward

    sgd = ("train.optimizer=torch.optim.SGD", "train.lr=1e-3", "train.max_grad_norm=null", "train.steps=1")
    config = make_config(tiny_sd, "lora=null", *sgd)
    after = load_file(file_of(train(config).parent))
    family = models.load(config.model)
    family.load_encoders()
    batches = Batches(load_groups(config.data, config.data.train, "train"), config.data, family)
    regression = Forward(family)(batches.batch([order(0, len(batches.groups), i) for i in range(4)], list(range(4))))
    unet = diffusers.UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet")
    found = unet(regression.x_t, regression.t, regression.conditioning.cond["prompt_embeds"]).sample
    chosen, rejected = (found - regression.target).square().mean((1, 2, 3)).chunk(2)
    (config.objective.beta / 4 * (chosen - rejected)).mean().backward()
    for name, parameter in unet.named_parameters():
        expected = parameter.detach() - 1e-3 * parameter.grad
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["adapter_off", "accelerated"])
def test_a_resumed_run_equals_a_straight_one(tiny_sd, make_config, tmp_path, policy):
    options = ("lora=null", "train.lr=1e-3", "train.steps=2", f"objective.reference.policy={policy}")
    straight = train(make_config(tiny_sd, *options, f"output={tmp_path / 'straight'}"))
    halves = make_config(tiny_sd, *options, f"output={tmp_path / 'halves'}")
    train(halves.model_copy(update={"train": halves.train.model_copy(update={"steps": 1})}))
    with pytest.raises(DiffpoError, match=r"holds another run.*lora"):
        train(make_config(tiny_sd, *options[1:], f"output={tmp_path / 'halves'}"))
    resumed = train(halves)
    assert file_of(resumed.parent).read_bytes() == file_of(straight.parent).read_bytes()
    assert trained.file_hash(resumed) == trained.file_hash(straight.parent)
    if policy != "adapter_off":
        return
    # a torn newest checkpoint is named, and the one before it read
    torn = file_of(tmp_path / "halves" / "checkpoint-000002")
    torn.write_bytes(torn.read_bytes()[:-8])
    shutil.rmtree(resumed)
    again = train(halves)
    assert file_of(again.parent).read_bytes() == file_of(straight.parent).read_bytes()


@pytest.mark.parametrize("policy", ["ema", "sync", "accelerated", "fast_slow"])
def test_references_that_move_move_by_their_rule(tiny_sd, make_config, policy):
    own = {"ema": ", decay: 0.75", "fast_slow": ", decay: 0.75", "accelerated": ", strength: 0.5"}.get(policy, "")
    config = make_config(tiny_sd, "lora=null", f"objective.reference={{policy: {policy}{own}}}")
    _, network, parameters, made = ready(config)
    base = [p.detach().clone() for p in parameters]
    move(parameters)
    theta = [p.detach().clone() for p in parameters]
    made.after_update(1)
    share = {"ema": 0.25, "sync": 1.0, "accelerated": 1.5, "fast_slow": 0.25}[policy]
    with made.on() as reference_policy:
        module = reference_policy.network
        assert module is not network
        for b, t, r, p in zip(base, theta, module.parameters(), parameters, strict=True):
            expected = b + share * (t - b)
            torch.testing.assert_close(r, expected, rtol=0, atol=1e-6)
            torch.testing.assert_close(p, expected if policy == "accelerated" else t, rtol=0, atol=1e-6)
    assert len(list(network.parameters())) == len(base)


def test_without_a_reference_there_is_no_copy(tiny_sd, make_config):
    _, network, _, made = ready(make_config(tiny_sd, "lora=null", "objective.name=simpo"))
    assert made.free and trained.of(network).frozen() == []
    measured = make_config(tiny_sd, "lora=null", "objective.name=simpo", "objective.weighting=measured")
    assert full.needed(measured.objective) == [full.BASE]  # what it measures on


def test_on_policy(tiny_sd, make_config, tmp_path, monkeypatch):
    """One step of D3PO, and a second one that begins in the middle of a round that is sampled again."""
    monkeypatch.setattr("diffpo.scorers.judge.scorers.load", lambda spec, device: Brightness())
    (tmp_path / "prompts.txt").write_text("red cat\nblue dog\n")
    rollout = "{prompts: 2, steps: 3, guidance: 2.0, scorers: [shapes.total], updates: 2}"
    names = ("objective.name=d3po", f"objective.rollout={rollout}", f"data.prompts={tmp_path / 'prompts.txt'}")
    options = ("lora=null", "data.train=null", *names, "train.lr=1e-3", "train.batch_size=2", "train.steps=2")
    straight = train(make_config(tiny_sd, *options, f"output={tmp_path / 'straight'}"))
    first = metrics_of(straight.parent)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["grad_norm"] > 0
    halves = make_config(tiny_sd, *options, f"output={tmp_path / 'halves'}")
    train(halves.model_copy(update={"train": halves.train.model_copy(update={"steps": 1})}))
    assert file_of(train(halves).parent).read_bytes() == file_of(straight.parent).read_bytes()


@pytest.mark.parametrize(
    ("options", "bytes_each"),
    [((), (4, 16)), (("train.precision=bf16",), (2, 18)), (("objective.reference.policy=ema",), (4, 16))],
)
def test_check_counts_the_memory(tiny_sd, make_config, capsys, options, bytes_each):
    """Frozen weights, and the trained ones with gradients, AdamW's two moments and autocast's copy."""
    check.check(make_config(tiny_sd, "lora=null", *options))
    said = " ".join(capsys.readouterr().out.split())
    total = sum(p.numel() for p in fresh(tiny_sd).unet.parameters())
    assert f"{total:,} trainable (all of them, float32)" in said
    frozen, held = (f"{each * total / 2**20:.1f} MiB" for each in bytes_each)
    assert f"frozen weights {frozen}, network, gradients, optimiser {held}" in said


def test_users_are_refused(tiny_sd, make_config):
    with pytest.raises(DiffpoError, match=r"needs a LoRA.*lora=null"):
        make_config(tiny_sd, "lora=null", "objective.name=ppd", "data.columns.user=user")
