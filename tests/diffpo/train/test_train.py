import os
import shutil
import signal

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from tiny import metrics_of, pick_a_pic_rows, write_parquet

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Train, load_config
from diffpo.data.batches import Batches
from diffpo.data.groups import load_groups
from diffpo.data.order import order
from diffpo.objective.reference import Reference
from diffpo.objective.reward import Objective, score
from diffpo.problems.forward import Forward
from diffpo.problems.policy import Policy
from diffpo.train import metrics as track
from diffpo.train import update as module
from diffpo.train.build import make_optimizer
from diffpo.train.loop import train
from diffpo.train.run import Interrupted
from diffpo.weights import lora, lora_file


def run(config) -> tuple[dict[str, torch.Tensor], list[dict]]:
    return load_file(train(config)), metrics_of(config.output)


def same_rows(one: list[dict], other: list[dict]) -> bool:
    """Equal in all but the clock."""
    clock = ("time", "pairs_per_second")
    return [{k: v for k, v in row.items() if k not in clock} for row in one] == [
        {k: v for k, v in row.items() if k not in clock} for row in other
    ]


@pytest.mark.parametrize("name", ["tiny_sdxl", "tiny_sd", "tiny_sd_v"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_policy_is_the_reference_bit_for_bit_before_the_first_update_and_not_after(
    request, make_config, name, checkpointing
):
    config = make_config(
        request.getfixturevalue(name), "train.steps=2", f"train.gradient_checkpointing={checkpointing}"
    )
    _, (first, second) = run(config)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "error/chosen_delta", "error/rejected_delta"):
        assert first[key] == 0.0 and second[key] != 0.0
    assert first["loss"] == pytest.approx(0.693147, abs=1e-6) and first["rewards/accuracies"] == 0.5
    assert first["grad_norm"] > 0


@pytest.mark.parametrize("name", ["tiny_sdxl", "tiny_sd", "tiny_sd_v"])
def test_logged_rewards_and_loss_are_those_of_the_saved_lora_in_a_diffusers_pipeline(request, make_config, name):
    """Step 2's numbers, computed again from checkpoint-000001 with diffusers' own loading, noising and targets."""
    path = request.getfixturevalue(name)
    config = make_config(path, "train.steps=2", "train.checkpoint_every=1", "data.caption_dropout=0.3")
    _, rows = run(config)
    family = models.load(config.model)
    family.load_encoders()
    batches = Batches(load_groups(config.data, config.data.train, "train"), config.data, family)
    positions = [4, 5, 6, 7]
    batch = batches.batch([order(0, len(batches.groups), position) for position in positions], positions)
    regression = Forward(family)(batch)
    noise = (regression.x_t - family.alpha_sigma(regression.t)[0] * batch.x_0) / family.alpha_sigma(regression.t)[1]
    scheduler = DDPMScheduler.from_pretrained(config.model.path, subfolder="scheduler")
    target = scheduler.get_velocity(batch.x_0, noise, regression.t) if name.endswith("_v") else noise
    pipe = models.load_pipeline(str(path), device="cpu")
    added, cond = {}, regression.conditioning.cond
    if name == "tiny_sdxl":
        names = {"text_embeds": "pooled_prompt_embeds", "time_ids": "time_ids"}
        added = {"added_cond_kwargs": {ours: cond[theirs] for ours, theirs in names.items()}}

    def errors():
        with torch.no_grad():
            output = pipe.unet(regression.x_t, regression.t, cond["prompt_embeds"], **added).sample
        return ((output - target) ** 2).mean(dim=(1, 2, 3)).double()

    base = errors()
    pipe.load_lora_weights(config.output / "checkpoint-000001")
    tuned = errors()
    d = base - tuned
    u = 0.5 * config.objective.beta * (d[:4] - d[4:])
    assert u.abs().max() > 1e-3
    row = rows[1]
    assert row["rewards/margins"] == pytest.approx(u.mean().item(), rel=2e-3, abs=1e-5)
    assert row["rewards/chosen"] == pytest.approx(250 * d[:4].mean().item(), rel=2e-3, abs=1e-5)
    assert row["error/rejected_delta"] == pytest.approx(-d[4:].mean().item(), rel=2e-3, abs=1e-8)
    assert row["loss"] == pytest.approx(torch.nn.functional.softplus(-u).mean().item(), rel=1e-4)
    assert row["rewards/accuracies"] == (u > 0).double().mean().item()


def test_interrupted_and_resumed_equals_straight_bit_for_bit(tiny_sdxl, make_config, tmp_path, monkeypatch):
    options = ("train.steps=5", "train.lr_schedule=cosine", "train.warmup=2", "train.checkpoint_every=2")
    more = ("data.caption_dropout=0.3", f"data.validation={make_config(tiny_sdxl).data.train}", "train.eval_every=2")
    straight = run(make_config(tiny_sdxl, *options, *more, f"output={tmp_path / 'straight'}"))
    log, handler = track.Tracker.log, signal.getsignal(signal.SIGINT)

    def interrupt(self, step, metrics):
        log(self, step, metrics)
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(track.Tracker, "log", interrupt)
    config = make_config(tiny_sdxl, *options, *more)
    with pytest.raises(Interrupted, match="step 3 is saved") as error:
        train(config)
    assert error.value.exit_code == 130 and (config.output / "checkpoint-000003").is_dir()
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    # a crash may leave lines beyond the checkpoint and one that is cut off: they are not part of the run
    with open(config.output / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 99}\n{"step": 5, "lo')
    resumed = run(config)
    assert same_rows(resumed[1], straight[1]) and [row["step"] for row in resumed[1]] == [1, 2, 3, 4, 5]
    assert resumed[0].keys() == straight[0].keys()
    assert all(torch.equal(resumed[0][name], straight[0][name]) for name in straight[0])
    assert [row["step"] for row in resumed[1] if "eval/accuracy" in row] == [2, 4, 5]


def test_one_batch_of_eight_equals_eight_accumulated(tiny_sdxl, make_config, tmp_path):
    """SGD, named by its path: Adam's first steps are signs, which turn rounding into differences of 2 lr."""
    common = ("train.optimizer=torch.optim.SGD", "train.lr=0.3", "train.steps=3", "data.caption_dropout=0.2")
    one = run(make_config(tiny_sdxl, *common, "train.batch_size=8", f"output={tmp_path / 'one'}"))
    eight = run(make_config(tiny_sdxl, *common, "train.batch_size=1", "train.accumulation=8"))
    for ours, theirs in zip(one[1], eight[1], strict=True):
        assert ours.keys() == theirs.keys()
        for key in ("loss", "rewards/margins", "error/chosen_delta", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3, abs=2e-6)
    moved = 0.0
    for name, value in one[0].items():
        torch.testing.assert_close(value, eight[0][name], rtol=1e-3, atol=1e-6)
        moved += value.abs().sum().item() if "lora_B" in name else 0
    assert moved > 1e-3


def test_clipping_clips(tiny_sd, make_config):
    """B starts at 0 and A's gradient with it, so one SGD step leaves |B| = lr * clipped norm exactly."""
    options = ("train.optimizer=torch.optim.SGD", "train.lr=2.0", "train.steps=1", "train.max_grad_norm=1e-4")
    weights, rows = run(make_config(tiny_sd, *options))
    assert rows[0]["grad_norm"] > 1e-2
    norm = torch.cat([value.flatten() for name, value in weights.items() if "lora_B" in name]).norm().item()
    assert norm == pytest.approx(2e-4, rel=1e-2)


def test_without_clipping_the_whole_gradient_is_applied(tiny_sd, make_config):
    options = ("train.optimizer=torch.optim.SGD", "train.lr=0.01", "train.steps=1", "train.max_grad_norm=null")
    weights, rows = run(make_config(tiny_sd, *options))
    norm = torch.cat([value.flatten() for name, value in weights.items() if "lora_B" in name]).norm().item()
    assert norm == pytest.approx(0.01 * rows[0]["grad_norm"], rel=1e-4)


def test_bf16_base_keeps_a_float32_lora_and_an_exact_start(tiny_sdxl, make_config, fresh_accelerate, monkeypatch):
    seen = []
    add_lora = lora.add_lora

    def watched(unet, *rest):
        seen.append(unet)
        return add_lora(unet, *rest)

    monkeypatch.setattr(lora, "add_lora", watched)
    weights, rows = run(make_config(tiny_sdxl, "train.precision=bf16", "train.steps=2", "train.lr=1e-5"))
    assert seen[0].conv_in.weight.dtype == torch.bfloat16
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert rows[0]["rewards/margins"] == rows[0]["rewards/chosen"] == 0.0
    # an update of 1e-5 is below bfloat16's resolution of A's entries; all of them move in the second step
    start = models.load(make_config(tiny_sdxl).model).load_network()
    add_lora(start, make_config(tiny_sdxl).lora, ("to_q", "to_k", "to_v", "to_out.0"), 0)
    before = lora.lora_state(start)
    moved = [(weights[f"unet.{name}"] != value).float().mean() for name, value in before.items() if "lora_A" in name]
    assert min(moved) > 0.9


def test_precision_that_the_machine_cannot_do(tiny_sd, make_config, fresh_accelerate):
    if torch.cuda.is_available():
        pytest.skip("this machine can do fp16")
    with pytest.raises(DiffpoError, match=r"train.precision=fp16 does not work on this machine"):
        train(make_config(tiny_sd, "train.precision=fp16"))


def test_learning_rate_warms_up(tiny_sd, make_config):
    _, rows = run(make_config(tiny_sd, "train.warmup=4", "train.steps=4"))
    assert [row["lr"] for row in rows] == pytest.approx([0, 0.0025, 0.005, 0.0075])


def test_an_unusable_optimizer_is_named(tiny_sd, make_config):
    for override, words in {
        "train.optimizer=torch.optim.Adamm": r"'torch.optim.Adamm' cannot be imported: .*\bAdam\b",
        "train.optimizer=nowhere.AdamW": "'nowhere.AdamW' cannot be imported",
        "train.optimizer=AdamW": "'AdamW' cannot be imported",
        "train.optimizer_args={momentum: 1}": "optimizer_args do not fit torch.optim.AdamW",
    }.items():
        with pytest.raises(DiffpoError, match=words):
            train(make_config(tiny_sd, override))


def test_nothing_is_called_but_a_class_of_torchs_optimizers(tmp_path, monkeypatch):
    (tmp_path / "odd_optimizers.py").write_text(
        "from pathlib import Path\nimport torch\nmark = Path(__file__).with_name('called').touch\n"
        "class Plain:\n    def __init__(self, *rest, **more): mark()\n"
        "class Mine(torch.optim.SGD):\n    pass\n"
        "def function(*rest, **more):\n    mark()\n    return torch.optim.SGD(*rest, **more)\n"
    )
    (tmp_path / "exits.py").write_text("import sys\nsys.exit('bye')\n")
    (tmp_path / "not_a_module.txt").touch()
    monkeypatch.syspath_prepend(tmp_path)

    def made(name, **args):
        settings = Train(steps=1, batch_size=1, lr=1, optimizer=name, optimizer_args=args)
        return make_optimizer(settings, [torch.nn.Parameter(torch.zeros(2, 2))])

    assert type(made("odd_optimizers.Mine")).__mro__[1] is torch.optim.SGD
    for name, words in {
        "odd_optimizers.function": "is not a class derived from torch.optim.Optimizer",
        "odd_optimizers.Plain": "is not a class derived from torch.optim.Optimizer",
        "os.system": "is not a class derived from torch.optim.Optimizer",
        "exits.AdamW": "cannot be imported: SystemExit: bye",
        "torch.optim.Optimizer": "optimizer_args do not fit",
        "../not_a_module.txt": "write package.module:attribute",
        "torch.optim..AdamW": "write package.module:attribute",
        "a b.AdamW": "write package.module:attribute",
    }.items():
        with pytest.raises(DiffpoError, match=words) as error:
            made(name)
        assert name in str(error.value)
    assert not (tmp_path / "called").exists()
    with pytest.raises(DiffpoError, match=r"optimizer_args do not fit torch\.optim\.AdamW: .*momentum"):
        made("torch.optim.AdamW", momentum=1)


def test_nan_stops_the_run_and_the_state_before_it_is_kept(tiny_sd, make_config):
    config = make_config(tiny_sd, "train.optimizer=torch.optim.SGD", "train.lr=1e30", "train.max_grad_norm=null")
    with pytest.raises(DiffpoError, match=r"not finite at step 2.*checkpoint-000001"):
        train(config)
    weights, about = lora_file.read_lora(config.output / "checkpoint-000001")
    assert about["step"] == 1 and all(value.isfinite().all() for value in weights.values())
    assert not (config.output / lora_file.FILE_NAME).exists()
    assert [row["step"] for row in metrics_of(config.output)] == [1]


def test_nan_in_the_first_batch(tiny_sd, make_config, monkeypatch):
    monkeypatch.setattr(module, "score", poisoned(module.score))
    config = make_config(tiny_sd)
    with pytest.raises(DiffpoError, match="loss is not finite at step 1"):
        train(config)
    assert not list(config.output.glob("checkpoint-*"))


def test_weights_that_overflow_in_a_step_are_never_saved(tiny_sd, make_config):
    """The loss of that step is still finite, so only the weights show it."""
    options = ("train.optimizer=torch.optim.SGD", "train.optimizer_args={weight_decay: 1e38}", "train.lr=3e38")
    config = make_config(tiny_sd, *options, "train.steps=1", "train.max_grad_norm=null")
    with pytest.raises(DiffpoError, match="weights are not finite after step 1"):
        train(config)
    assert not list(config.output.glob("**/*.safetensors"))


@pytest.mark.parametrize(("name", "words"), [("LBFGS", "NoneType"), ("SparseAdam", "does not support dense gradients")])
def test_an_optimizer_that_cannot_step_is_named(tiny_sd, make_config, name, words):
    with pytest.raises(DiffpoError, match=f"torch.optim.{name} failed at step 1: .*{words}"):
        train(make_config(tiny_sd, f"train.optimizer=torch.optim.{name}"))


def test_nan_in_the_models_encoders_is_an_error_and_is_not_cached(tiny_sd, make_config, tmp_path):
    from safetensors.torch import save_file

    model = tmp_path / "model"
    shutil.copytree(tiny_sd, model)
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.weight"][0, 0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    config = make_config(model, f"data.cache={tmp_path / 'cache'}")
    with pytest.raises(DiffpoError, match=r"latents.*NaN.*model\.vae"):
        train(config)
    assert not list((tmp_path / "cache").glob("latents*/*"))


def test_captions_beyond_the_text_encoders_length_are_counted(tiny_sd, make_config, tmp_path, capsys, caplog):
    rows = pick_a_pic_rows(4)
    rows[1]["caption"] = "very " * 40 + "long"
    train(make_config(tiny_sd, "train.steps=1", data=write_parquet(tmp_path / "long.parquet", rows)))
    captured = capsys.readouterr()
    assert "captions: 1 of 3 texts have more than the 16 tokens that the model reads" in captured.out
    assert "truncated" not in captured.err and "indexing errors" not in captured.err


def poisoned(score):
    def spoil(policy, objective, regression):
        regression.x_t[0, 0, 0, 0] = float("nan")
        return score(policy, objective, regression)

    return spoil


def test_random_crop_and_flip_train_without_a_latent_cache_and_say_so(tiny_sdxl, make_config, capsys):
    config = make_config(tiny_sdxl, "data.flip=true", "data.crop=random", "data.resolution=8", "train.steps=2")
    _, rows = run(config)
    assert len(rows) == 2 and "latents are not cached, because data.flip or data.crop=random" in capsys.readouterr().out


def test_run_folder_holds_the_resolved_config_a_card_and_tensorboard(tiny_sd, make_config, tmp_path, pairs_parquet):
    pytest.importorskip("tensorboard")
    config = make_config(tiny_sd, "log.tensorboard=true", f"data.validation={pairs_parquet}", "data.ties=soft")
    weights, rows = run(config)
    assert load_config(config.output / "config.yaml") == config
    card = (config.output / "README.md").read_text()
    assert "load_lora_weights" in card and f"{rows[-1]['eval/accuracy']:.3f}" in card
    assert f'base_model: "{tiny_sd.name}"' in card and str(tiny_sd) not in card  # whose disk it was is no matter
    assert list((config.output / "tensorboard").iterdir())
    assert rows[-1]["eval/pairs"] == 12
    _, about = lora_file.read_lora(config.output)
    assert about["objective"] == "diffusion_dpo" and about["beta"] == 500 and about["step"] == 4
    assert about["data_hash"] == load_groups(config.data, config.data.train, "train").data_hash
    # what is finished stays as it is when the command is run again
    assert all(torch.equal(value, weights[name]) for name, value in run(config)[0].items())


@pytest.mark.parametrize("name", ["tiny_sdxl", "tiny_sd_v"])
def test_an_update_raises_the_margin_of_its_own_pairs(request, make_config, name):
    """The sign of the whole chain: after one small step, the same pairs with the same draws are ranked better."""
    options = ("train.optimizer=torch.optim.SGD", "train.lr=0.01", "train.steps=1", "train.batch_size=10")
    config = make_config(request.getfixturevalue(name), *options)
    weights, rows = run(config)
    family = models.load(config.model)
    family.load_encoders()
    batches = Batches(load_groups(config.data, config.data.train, "train"), config.data, family)
    regression = Forward(family)(batches.batch([order(0, 10, i) for i in range(10)], list(range(10))))
    unet = family.load_network()
    lora.add_lora(unet, config.lora, family.lora_targets)
    lora.set_lora_state(unet, {key.removeprefix("unet."): value for key, value in weights.items()})
    with torch.no_grad():
        policy = Policy(family, unet)
        objective = Objective(config.objective, Reference(policy), lambda t: torch.ones(len(t)))
        u = score(policy, objective, regression).margin
    # to first order the loss falls by lr |gradient|^2 = |B's step| |gradient|, and every pair's weight is 1/2 at the
    # start
    gain = torch.log(torch.tensor(2.0)) - torch.nn.functional.softplus(-u).mean()
    assert gain.item() == pytest.approx(0.01 * min(rows[0]["grad_norm"], 1) * rows[0]["grad_norm"], rel=0.2)


def test_a_margin_that_grows_because_both_errors_rise_is_said_once_in_a_while():
    said = []
    watch = track.Watch(said.append)
    for step in range(1, 101):
        watch.look(step, {"error/chosen_delta": 0.01, "error/rejected_delta": 0.02, "rewards/margins": 2.5})
    assert len(said) == 1 and all(number in said[0] for number in ("50", "2.5", "0.01", "0.02"))
    healthy = track.Watch(said.append)
    for step in range(1, 101):
        healthy.look(step, {"error/chosen_delta": -0.01, "error/rejected_delta": 0.02, "rewards/margins": 7.5})
    assert len(said) == 1


def test_metrics_of_an_update_by_hand():
    # loss, both rewards, both deltas, t, mean reward, preference, reference error, single
    table = torch.tensor(
        [
            [0.5, 1.0, -1.0, -0.1, 0.2, 0, 0, 1, 1, 0],
            [0.7, 0.0, 0.0, 0.1, 0.1, 199, 0, 1, 1, 0],
            [0.9, -2.0, 0.5, 0.4, 0.0, 999, 0, 1, 1, 0],
        ]
    )
    metrics = track.summarize(table, 1000)
    expected = {
        "loss": 0.7,
        "rewards/chosen": -1 / 3,
        "rewards/rejected": -1 / 6,
        "rewards/margins": -1 / 6,
        "rewards/accuracies": 0.5,
        "error/chosen_delta": 0.4 / 3,
        "error/rejected_delta": 0.1,
        "timesteps/0-199/margins": 1.0,
        "timesteps/0-199/chosen_delta": 0.0,
        "timesteps/0-199/rejected_delta": 0.15,
        "timesteps/800-999/margins": -2.5,
        "timesteps/800-999/chosen_delta": 0.4,
        "timesteps/800-999/rejected_delta": 0.0,
    }
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_every_epoch_shows_every_pair_once():
    epochs = [[order(3, 10, epoch * 10 + i) for i in range(10)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert order(3, 10, 25) == epochs[2][5]


def test_pairs_of_real_files_may_have_any_shape(tiny_sdxl, make_config, tmp_path):
    data = write_parquet(tmp_path / "wide.parquet", pick_a_pic_rows(6, size=(40, 24)))
    _, rows = run(make_config(tiny_sdxl, "train.steps=1", data=data))
    assert rows[0]["rewards/margins"] == 0
