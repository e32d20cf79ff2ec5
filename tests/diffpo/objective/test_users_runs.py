"""PPD through the trainer and the generator: resume, new users, and what is refused."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import metrics_of, pick_a_pic_rows, picture, png, write_parquet

from diffpo.commands.check import check
from diffpo.common.errors import DiffpoError
from diffpo.evaluation import generate
from diffpo.evaluation.generation import Generation
from diffpo.objective import users
from diffpo.train.loop import train
from diffpo.weights import lora_file

FAST = {"steps": 2, "guidance": 3.0, "batch_size": 4}
PROMPTS = ["a cat", "a dog"]


def generated(model, out, prompts=PROMPTS, **options):
    return generate.run(Generation(model, **FAST, **options).arms(), prompts, out)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 pairs of two users, as the column ``who`` has it."""
    rows = [{**row, "who": f"user {i % 2}"} for i, row in enumerate(pick_a_pic_rows(12))]
    return write_parquet(tmp_path_factory.mktemp("users") / "pairs.parquet", rows)


def config_of(make_config, model, data, *overrides):
    more = ("objective.name=ppd", "data.columns.user=who", f"data.validation={data}", "train.eval_every=2")
    return make_config(model, *more, *overrides, data=data)


def opposite(folder, seed: int = 50):
    """The pairs of one user, and of one who likes the other picture of each."""
    files = []
    for name, label in (("one", 1.0), ("other", 0.0)):
        rows = [
            {
                "caption": "a cat",
                "jpg_0": png(picture(seed + 2 * i)),
                "jpg_1": png(picture(seed + 2 * i + 1)),
                "label_0": label,
            }
            for i in range(5)
        ]
        files.append(write_parquet(folder / f"{name}.parquet", rows))
    return files


@pytest.fixture
def trained(tiny_sdxl, make_config, data):
    """A run of a few updates, its user tokens made strong enough to be seen in a picture of 16 pixels."""
    config = config_of(make_config, tiny_sdxl, data)
    train(config)
    path = config.output / lora_file.USERS_FILE_NAME
    state = load_file(path)
    from safetensors.torch import save_file

    for name in state:
        state[name] *= 1000 if name.startswith("values.") else 1
    save_file(state, path, {"format": "pt"})
    return config.output


def test_a_run_with_users_starts_at_its_reference_and_learns_tokens(tiny_sdxl, make_config, data):
    config = config_of(make_config, tiny_sdxl, data)
    train(config)
    first, *_, last = metrics_of(config.output)
    assert first["rewards/margins"] == first["error/chosen_delta"] == 0.0 != last["rewards/margins"]
    assert 0 <= last["eval/accuracy"] <= 1
    state = load_file(config.output / lora_file.USERS_FILE_NAME)
    assert state["values.0.weight"].abs().max() > 0 and state["resolution"] == 16
    assert "--user-pairs" in (config.output / "README.md").read_text()


def test_resumed_equals_straight_bit_for_bit(tiny_sdxl, make_config, data, tmp_path):
    straight = config_of(make_config, tiny_sdxl, data, "data.caption_dropout=0.3", f"output={tmp_path / 'straight'}")
    train(straight)
    whole = config_of(make_config, tiny_sdxl, data, "data.caption_dropout=0.3")
    train(whole)
    shutil.rmtree(whole.output / "checkpoint-000004")
    for name in (lora_file.FILE_NAME, lora_file.USERS_FILE_NAME):
        (whole.output / name).unlink()
    train(whole)
    for name in (lora_file.FILE_NAME, lora_file.USERS_FILE_NAME):
        ours, theirs = (load_file(config.output / name) for config in (whole, straight))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for ours, theirs in zip(metrics_of(whole.output), metrics_of(straight.output), strict=True):
        assert {**ours, "time": 0, "pairs_per_second": 0} == {**theirs, "time": 0, "pairs_per_second": 0}


def test_opposite_users_get_different_pictures_and_nobody_gets_the_plain_loras(tiny_sdxl, trained, tmp_path, capsys):
    one, other = opposite(tmp_path)
    plain = tmp_path / "plain"  # the LoRA without its tokens
    plain.mkdir()
    shutil.copy(trained / lora_file.FILE_NAME, plain)
    found = {}
    for name, folder, pairs in (
        ("one", trained, one),
        ("other", trained, other),
        ("nobody", trained, None),
        ("plain", plain, None),
    ):
        capsys.readouterr()
        out = tmp_path / "out" / name
        rows = generated(tiny_sdxl, out, lora=folder, user_pairs=pairs)
        found[name] = [(out / row["file"]).read_bytes() for row in rows]
        assert ("--user-pairs" in capsys.readouterr().out) == (name == "nobody")
    base = {name: pictures[:2] for name, pictures in found.items()}
    assert base["one"] == base["other"] == base["plain"]
    assert found["nobody"] == found["plain"]
    for a, b in (("one", "other"), ("one", "plain"), ("other", "plain")):
        assert found[a][2] != found[b][2] and found[a][3] != found[b][3]


class Decoupled:
    """An attention processor of diffusers that also attends to a user's keys and values (1, 4, d)."""

    def __init__(self, keys, values):
        self.keys, self.values = keys, values

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        def heads(x):
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        def attended(keys, values):
            weights = (heads(attn.to_q(hidden_states)) @ heads(keys).mT * attn.scale).softmax(-1)
            return (weights @ heads(values)).transpose(1, 2).flatten(2)

        found = attended(attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states))
        n = len(hidden_states)
        found = found + attended(self.keys.expand(n, -1, -1), self.values.expand(n, -1, -1))
        return attn.to_out[0](found)


def test_a_picture_for_a_user_is_that_of_his_taste_in_a_plain_pipeline(tiny_sdxl, trained, tmp_path):
    """Against diffusers, with the first four pairs' latents computed here."""
    import numpy as np
    from diffusers import StableDiffusionXLPipeline

    import samplers

    pairs, _ = opposite(tmp_path)
    (row,) = generated(tiny_sdxl, tmp_path / "out", PROMPTS[:1], lora=trained, user_pairs=pairs)[1:]
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = samplers.SolverScheduler.from_config(pipe.scheduler.config, guidance=3.0)
    pipe.load_lora_weights(trained, weight_name=lora_file.FILE_NAME)
    images = torch.stack([torch.from_numpy(np.array(picture(50 + i))) for i in range(8)]).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = pipe.vae.encode(images / 127.5 - 1).latent_dist.mean * pipe.vae.config.scaling_factor
        his = users.taste(latents[::2], latents[1::2])
        state = load_file(trained / lora_file.USERS_FILE_NAME)
        hidden = torch.nn.functional.silu(state["hidden.weight"] @ (his / state["scale"]) + state["hidden.bias"])
        tokens = (state["tokens.weight"] @ hidden + state["tokens.bias"]).view(1, 4, -1)
        layers = [module for name, module in pipe.unet.named_modules() if name.endswith("attn2")]
        for i, layer in enumerate(layers):
            layer.set_processor(Decoupled(tokens @ state[f"keys.{i}.weight"].T, tokens @ state[f"values.{i}.weight"].T))
        noise, _ = generate.initial_noise((4, 8, 8), seed=0, index=0)
        image = pipe(
            PROMPTS[0],
            latents=noise[None],
            num_inference_steps=2,
            guidance_scale=3.0,
            height=16,
            width=16,
        ).images[0]
    ours = np.asarray(Image.open(tmp_path / "out" / row["file"])).astype(int)
    assert np.abs(ours - np.asarray(image).astype(int)).max() <= 1


def test_pictures_for_different_users_are_never_mixed(tiny_sdxl, trained, tmp_path):
    one, other = opposite(tmp_path)
    out = tmp_path / "out"
    rows = generated(tiny_sdxl, out, lora=trained, user_pairs=one)
    assert [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()] == rows
    assert [bool(row["user_hash"]) for row in rows] == [False, False, True, True]
    for pairs in (other, None):
        with pytest.raises(DiffpoError, match="user_hash="):
            generated(tiny_sdxl, out, lora=trained, user_pairs=pairs)


def test_what_cannot_be_used_is_refused(tiny_sdxl, make_config, data, trained, pairs_parquet, tmp_path):
    with pytest.raises(DiffpoError, match=r"data\.columns\.user=NAME"):
        make_config(tiny_sdxl, "objective.name=ppd", data=data)
    for option in ("cache_latents=false", "crop=random", "flip=true"):
        with pytest.raises(DiffpoError, match=r"data\.cache_latents=true, data\.crop=center"):
            config_of(make_config, tiny_sdxl, data, f"data.{option}")
    with pytest.raises(DiffpoError, match=r"'who'.*data\.columns\.user"):
        train(config_of(make_config, tiny_sdxl, pairs_parquet, f"output={tmp_path / 'a'}"))
    alone = [{**row, "who": str(i)} for i, row in enumerate(pick_a_pic_rows(3))]
    config = config_of(make_config, tiny_sdxl, write_parquet(tmp_path / "alone.parquet", alone))
    config = config.model_copy(update={"output": tmp_path / "b"})
    for verb in (train, check):
        with pytest.raises(DiffpoError, match=r"alone\.parquet: .*data\.columns\.user"):
            verb(config)
    # generation
    his, _ = opposite(tmp_path)
    ties = write_parquet(tmp_path / "ties.parquet", pick_a_pic_rows(2, ties=2))
    with pytest.raises(DiffpoError, match=r"ties\.parquet: .*ties"):
        generated(tiny_sdxl, tmp_path / "out", lora=trained, user_pairs=ties)
    with pytest.raises(DiffpoError, match="--lora"):
        generated(tiny_sdxl, tmp_path / "out", user_pairs=his)
    (trained / lora_file.USERS_FILE_NAME).unlink()
    with pytest.raises(DiffpoError, match="--user-pairs"):
        generated(tiny_sdxl, tmp_path / "out", lora=trained, user_pairs=his)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "choice",
    [
        "objective.inversion.steps=3",
        "objective.error=perceptual",
        "objective.reference.policy=ema",
        "objective.weighting=measured",
        "train.gradient_checkpointing=true",
        "train.precision=bf16",
    ],
)
def test_users_go_with_other_choices(tiny_sdxl, make_config, data, choice, fresh_accelerate):
    inverted = ["objective.source=inversion"] if choice.startswith("objective.inversion") else []
    config = config_of(make_config, tiny_sdxl, data, choice, "train.steps=2", *inverted)
    train(config)
    first, second = metrics_of(config.output)
    assert first["rewards/margins"] == 0.0 != second["rewards/margins"] and first["grad_norm"] > 0
    assert load_file(config.output / lora_file.USERS_FILE_NAME)["tokens.weight"].abs().max() > 0
