import json
import os
import re
import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from diffpo.common.errors import DiffpoError
from diffpo.config import Lora
from diffpo.data.prompts import load_prompts
from diffpo.evaluation import evaluate, generate, manifest
from diffpo.evaluation.generation import Generation
from diffpo.models.identity import base_identity
from diffpo.weights.lora import add_lora, save_lora
from diffpo.weights.lora_file import FILE_NAME

PROMPTS = ["a cat", "a dog", "two birds", "a red house", "a green fish"]
FAST = {"steps": 2, "guidance": 3.0}


def generated(model, prompts, out, n=None, **options):
    """The rows of both arms."""
    return generate.run(Generation(model, **{**FAST, **options}).arms(), prompts, out, n)


@pytest.fixture(scope="module")
def model(tiny_sdxl):
    return tiny_sdxl


@pytest.fixture(scope="module")
def lora(model, tmp_path_factory):
    return random_lora(model, tmp_path_factory.mktemp("lora"))


def random_lora(model, folder):
    """A LoRA whose B is not zero, so that it changes pictures."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    torch.manual_seed(1)
    for parameter in add_lora(unet, Lora(rank=4), ["to_q", "to_k", "to_v", "to_out.0"]):
        torch.nn.init.normal_(parameter)
    save_lora(folder / FILE_NAME, unet, "unet", {"base": base_identity(unet)})
    return folder


@pytest.fixture(scope="module")
def made(model, lora, tmp_path_factory):
    """Both arms in one go, for tests that only look."""
    out = tmp_path_factory.mktemp("made")
    rows = generated(model, PROMPTS, out, lora=lora, batch_size=5)
    return out, rows


def pixels(out, row):
    return np.asarray(Image.open(out / row["file"])).astype(int)


def test_layout_and_manifest(made, model, lora):
    out, rows = made
    assert [(r["arm"], r["index"], r["seed"]) for r in rows] == [(a, i, 0) for a in ("base", "tuned") for i in range(5)]
    assert rows[7]["file"] == "images/tuned/00002_0.png" and rows[7]["prompt"] == "two birds"
    assert [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()] == rows
    for row in rows:
        assert pixels(out, row).shape == (16, 16, 3)
        assert (row["steps"], row["solver"], row["guidance"]) == (2, None, 3.0)
        assert row["versions"]["torch"] == torch.__version__.partition("+")[0] and len(row["model_hash"]) > 40
        assert (row["lora_hash"] is None) == (row["arm"] == "base")
    assert not list(out.rglob("*.part"))


def test_pictures_do_not_depend_on_the_batch_size(made, model, lora, tmp_path):
    out, rows = made
    again = generated(model, PROMPTS, tmp_path, lora=lora, batch_size=2)
    for one, other in zip(rows, again, strict=True):
        # BLAS may add in another order for another batch size: at most one level of 255
        assert np.abs(pixels(out, one) - pixels(tmp_path, other)).max() <= 1


def test_the_arms_share_the_noise_and_differ_by_the_lora(made, model):
    """Against an independent computation: the plain pipeline with the same starting noise and the same solver."""
    from diffusers import StableDiffusionXLPipeline

    import samplers

    out, rows = made
    pipe = StableDiffusionXLPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = samplers.SolverScheduler.from_config(pipe.scheduler.config, solver=None, guidance=3.0)
    noise, _ = generate.initial_noise((4, 8, 8), seed=0, index=3)
    image = pipe(PROMPTS[3], latents=noise[None], num_inference_steps=2, guidance_scale=3.0, height=16, width=16).images
    assert np.abs(np.asarray(image[0]).astype(int) - pixels(out, rows[3])).max() <= 1
    assert np.abs(pixels(out, rows[8]) - pixels(out, rows[3])).max() > 1


def test_noise_is_fixed_by_seed_and_index_alone():
    a, _ = generate.initial_noise((4, 64, 64), 0, 1)
    assert torch.equal(a, generate.initial_noise((4, 64, 64), 0, 1)[0]) and a.dtype == torch.float32
    for seed, index in ((1, 0), (0, 2), (1, 1)):
        b, _ = generate.initial_noise((4, 64, 64), seed, index)
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 5 / np.sqrt(a.numel())  # five standard errors of independent noise


def test_only_missing_and_damaged_images_are_made_again(model, tmp_path, monkeypatch):
    rows = generated(model, PROMPTS, tmp_path)
    paths = [tmp_path / row["file"] for row in rows]
    before = [path.read_bytes() for path in paths]
    paths[1].unlink()
    paths[3].write_bytes(before[3][:100])
    with open(tmp_path / "manifest.jsonl", "a") as file:
        file.write('{"arm": "base", "ind')  # an interrupted write
    times = [path.stat().st_mtime_ns for i, path in enumerate(paths) if i not in (1, 3)]
    again = generated(model, PROMPTS, tmp_path, batch_size=2)
    assert [path.stat().st_mtime_ns for i, path in enumerate(paths) if i not in (1, 3)] == times
    for i in (1, 3):
        difference = np.abs(pixels(tmp_path, again[i]) - np.asarray(Image.open(BytesIO(before[i]))).astype(int))
        assert difference.max() <= 1
    # and nothing at all is left to do: not even the model is loaded
    finished = manifest.read_manifest(tmp_path)
    assert len(finished) == 5
    monkeypatch.setattr(generate.models, "load_pipeline", None)
    assert generated(model, PROMPTS, tmp_path) == again


def test_more_prompts_and_the_tuned_arm_can_be_added_later(model, lora, tmp_path):
    first = generated(model, PROMPTS, tmp_path, n=2)
    both = generated(model, PROMPTS, tmp_path, n=3, lora=lora)
    assert both[:2] == first and [r["arm"] for r in both] == ["base"] * 3 + ["tuned"] * 3


def test_arms_are_painted_by_themselves_in_any_order(made, model, lora, tmp_path):
    """The LoRA of one arm is not in the next one."""
    _, rows = made
    arms = Generation(model, lora=lora, batch_size=5, **FAST).arms()
    turned = generate.run({"base": arms["tuned"], "tuned": arms["base"]}, PROMPTS, tmp_path)
    assert [row["sha256"] for row in turned] == [row["sha256"] for row in (*rows[5:], *rows[:5])]


def test_stable_diffusion_1_is_generated_too(tiny_sd, tmp_path):
    lora = random_lora(tiny_sd, tmp_path)
    base, tuned = generated(tiny_sd, PROMPTS[:1], tmp_path / "out", lora=lora, negative_prompt="a fish")
    assert np.abs(pixels(tmp_path / "out", base) - pixels(tmp_path / "out", tuned)).max() > 1


def test_bfloat16_is_close_to_float32_because_the_noise_is_the_same(made, model, tmp_path):
    out, rows = made
    half = generated(model, PROMPTS, tmp_path, dtype="bfloat16")
    for one, other in zip(rows, half, strict=False):
        difference = np.abs(pixels(out, one) - pixels(tmp_path, other)).mean()
        assert 0 < difference < 0.25 * np.abs(pixels(out, rows[0]) - pixels(out, rows[1])).mean()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"steps": 3}, "steps=2"),
        ({"guidance": 5.0}, "guidance=3.0"),
        ({"prompts": ["another prompt", *PROMPTS[1:]]}, "prompt='a cat'"),
        ({"height": 24}, "height=None"),
    ],
)
def test_a_folder_of_other_settings_is_refused_and_kept(made, model, change, key):
    out, _ = made
    before = (out / "manifest.jsonl").read_bytes()
    with pytest.raises(DiffpoError, match=key):
        generated(**{"model": model, "prompts": PROMPTS, "out": out, **change})
    assert (out / "manifest.jsonl").read_bytes() == before


def test_another_model_under_the_same_name_is_noticed(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    generated(copy, PROMPTS[:1], tmp_path / "out")
    config = json.loads((copy / "scheduler" / "scheduler_config.json").read_text())
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "beta_end": 0.02}))
    with pytest.raises(DiffpoError, match="model_hash"):
        generated(copy, PROMPTS[:1], tmp_path / "out")


def test_a_folder_of_foreign_images_is_not_overwritten(model, tmp_path):
    (tmp_path / "images" / "base").mkdir(parents=True)
    (tmp_path / "images" / "base" / "00000_0.png").write_bytes(b"mine")
    with pytest.raises(DiffpoError, match=re.escape(str(tmp_path))):
        generated(model, PROMPTS, tmp_path)
    assert (tmp_path / "images" / "base" / "00000_0.png").read_bytes() == b"mine"


def test_nan_names_the_prompt_and_keeps_what_is_done(model, tmp_path, monkeypatch):
    original = generate.paint

    def broken(pipe, generation, batch):
        if batch[0].index == 2:
            pipe.vae.post_quant_conv.weight.data.fill_(float("nan"))
        return original(pipe, generation, batch)

    monkeypatch.setattr(generate, "paint", broken)
    with pytest.raises(DiffpoError, match=r"prompt 2 \('two birds'\) is NaN"):
        generated(model, PROMPTS, tmp_path, batch_size=1)
    assert len(manifest.read_manifest(tmp_path)) == 2


def test_a_full_disk_is_one_error_and_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DiffpoError, match=r"a\.png: the disk is full"):
        manifest.save(tmp_path / "a.png", b"data")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no-such/model"}, "no-such/model.*hf download"),
        ({"lora": "/no/such/lora.safetensors"}, "/no/such/lora.safetensors"),
        ({"solver": "dpmp"}, "dpmpp"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"n": 6}, "5 prompts.*1 to 5.*not 6"),
    ],
)
def test_bad_input_is_one_clear_error(model, tmp_path, options, message):
    with pytest.raises(DiffpoError, match=message):
        generated(**{"model": model, "prompts": PROMPTS, "out": tmp_path, **options})


def test_prompts_come_from_text_jsonl_and_the_embedded_world(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one", "id": 3}\n{"prompt": "two"}\n')
    assert load_prompts(tmp_path / "a.txt") == load_prompts(tmp_path / "a.jsonl") == ["one", "two"]
    held_out, train = load_prompts("shapes:heldout:40"), load_prompts("shapes:train", 40)
    assert len(set(held_out)) == len(set(train)) == 40 and not set(held_out) & set(train)
    assert load_prompts("shapes:heldout:20") == held_out[:20]  # a longer run continues a shorter one


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"missing\.txt"),
        ("a.txt", "", "no prompts"),
        ("a.jsonl", '{"prompt": "one"}\n{"caption": "two"}\n', r"a\.jsonl:2"),
        ("a.jsonl", '{"prompt": " "}\n', r"a\.jsonl:1: .*' '"),
        ("shapes:heldot", None, "shapes:heldout"),
    ],
)
def test_bad_prompts_name_file_and_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DiffpoError, match=message):
        load_prompts(name if name.startswith("shapes") else tmp_path / name)


def test_a_lora_of_another_base_is_refused_before_any_image_is_made(model, lora, tiny_sd, tmp_path):
    with pytest.raises(DiffpoError, match="was trained on another base model"):
        generated(tiny_sd, PROMPTS, tmp_path / "out", lora=lora)
    assert not list(tmp_path.glob("out/**/*.png"))
    weights = tiny_sd / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(DiffpoError, match="holds no LoRA"):
        generated(tiny_sd, PROMPTS, tmp_path / "out", lora=weights)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"height": 20}, "height must be a multiple of 8, not 20"),
        ({"width": 4}, "width must be a multiple of 8, not 4"),
        ({"guidance": float("nan")}, "guidance must be a number, not nan"),
        ({"device": "gpu"}, "the device 'gpu' cannot be used here: Expected one of cpu, cuda"),
    ],
)
def test_options_that_no_pipeline_takes(model, tmp_path, options, words):
    with pytest.raises(DiffpoError, match=words):
        generated(model, ["a cat"], tmp_path, **options)


def test_prompts_with_line_separators_blank_lines_and_a_byte_order_mark(model, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('\ufeff{"prompt": "a\u2028cat"}\n\n{"prompt": "a\x85dog"}\n', encoding="utf-8")
    assert load_prompts(file) == ["a\u2028cat", "a\x85dog"]
    file.with_suffix(".txt").write_text("\ufeffa\u2028cat\r\n\r\na dog", encoding="utf-8")
    assert load_prompts(file.with_suffix(".txt")) == ["a\u2028cat", "a dog"]
    rows = generated(model, file, tmp_path / "out")
    assert manifest.read_manifest(tmp_path / "out") == rows


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"file": "../../etc/passwd"}, "file is '../../etc/passwd'"),
        ({"file": "/etc/passwd"}, "file is '/etc/passwd'"),
        ({"file": "images/base/00001_0.png"}, "not 'images/base/00000_0.png'"),
        ({"file": 7}, "file is 7"),
        ({"source": ["sources/0.png", "../1.png"]}, "source is '../1.png'"),
        ({"source": ["sources/0.png", 1]}, "source is ['sources/0.png', 1]"),
        ({"source": ["a.png", "b.png"], "source_hash": "0"}, "source_hash is '0', for 2 sources"),
        ({"prompt": ["a cat"]}, "prompt is"),
        ({"seed": True}, "seed is True"),
        ({"index": -1}, "index is -1"),
        ({"steps": "2"}, "steps is '2'"),
        ({"guidance": None}, "guidance is None"),
        ({"guidance": 10**400}, "guidance is 1000"),
        ({"versions": []}, "versions is"),
        ({"lora_hash": 5}, "lora_hash is 5"),
        ({"height": "16"}, "height is '16'"),
    ],
)
def test_an_edited_manifest_is_refused_and_names_the_line(made, tmp_path, change, words):
    _, rows = made
    lines = [json.dumps(rows[0] | change), json.dumps(rows[1])]
    for text in ("\n".join(lines) + "\n", "\n".join(reversed(lines))):  # also as a last line without an end
        (tmp_path / "manifest.jsonl").write_text(text)
        with pytest.raises(DiffpoError, match=r"manifest\.jsonl:[12] is not a manifest line") as error:
            manifest.read_manifest(tmp_path)
        assert words in str(error.value)


def test_a_picture_that_is_a_pipe_or_a_device_is_made_again(made, tmp_path):
    out, rows = made
    path = tmp_path / rows[0]["file"]
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert not manifest.intact(tmp_path, rows[0])
    path.unlink()
    path.symlink_to("/dev/zero")
    assert not manifest.intact(tmp_path, rows[0])
    path.unlink()
    shutil.copy(out / rows[0]["file"], path)
    assert manifest.intact(tmp_path, rows[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "a cow"}, "prompt is 'a cat' for images/base/00000_0.png and 'a cow' for images/tuned/00000_0.png"),
        ({"steps": 3}, "steps is 2 for images/base/00000_0.png and 3 for"),
        ({"lora_hash": "f" * 64}, "lora_hash is"),
    ],
)
def test_pictures_that_a_manifest_does_not_describe_are_not_compared(made, tmp_path, change, words):
    out, rows = made
    shutil.copytree(out, tmp_path / "made")
    lines = [json.dumps(row | (change if row is rows[5] else {})) + "\n" for row in rows]
    (tmp_path / "made" / "manifest.jsonl").write_text("".join(lines))
    with pytest.raises(DiffpoError) as error:
        evaluate.run(tmp_path / "eval", tmp_path / "made")
    assert words in str(error.value)
    assert not (tmp_path / "eval").exists()


def test_files_of_others_are_not_overwritten_by_an_evaluation(made, tmp_path):
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(DiffpoError, match=r"report\.html"):
        evaluate.run(tmp_path, made[0])
    (tmp_path / "scores.parquet").write_text("mine too")
    with pytest.raises(DiffpoError, match=r"scores\.parquet"):
        evaluate.run(tmp_path, made[0])
    assert (tmp_path / "report.html").read_text() == "mine"


def test_an_interruption_is_no_loss(model, lora, tmp_path, monkeypatch):
    original = generate.paint

    def pressed(pipe, generation, batch):
        if generation.lora is not None:
            raise KeyboardInterrupt
        return original(pipe, generation, batch)

    monkeypatch.setattr(generate, "paint", pressed)
    with pytest.raises(KeyboardInterrupt):
        generated(model, PROMPTS[:2], tmp_path / "out", lora=lora)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert len(times) == 2 and not (tmp_path / "out" / ".lock").exists()
    monkeypatch.undo()
    assert len(generated(model, PROMPTS[:2], tmp_path / "out", lora=lora)) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


@pytest.mark.parametrize("seed", [-3, 2**62])
def test_a_seed_is_a_number_of_64_bits(model, tmp_path, seed):
    (row,) = generated(model, ["a cat"], tmp_path, seed=seed)
    assert row["file"] == f"images/base/00000_{seed}.png" and manifest.read_manifest(tmp_path) == [row]
    with pytest.raises(DiffpoError, match="seed"):
        generated(model, ["a cat"], tmp_path / "long", seed=10**60)


@pytest.mark.parametrize("line", ['{"arm": "base", "index": 0, "seed": 0}', '{"arm": "x", "index": 0, "seed": 0}', "7"])
def test_a_manifest_from_elsewhere_is_refused(tmp_path, line):
    (tmp_path / "manifest.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(DiffpoError, match=r"manifest\.jsonl:1 is not a manifest line"):
        manifest.read_manifest(tmp_path)


def test_a_lora_loads_in_silence_and_texts_that_are_cut_off_are_counted(model, lora, tmp_path, capfd):
    generated(model, ["a cat", "very " * 40], tmp_path, lora=lora)
    captured = capfd.readouterr()
    assert "1 of 2 texts have more than the 16 tokens that the model reads" in captured.out
    for noise in ("No LoRA keys", "was truncated", "indexing errors"):
        assert noise not in captured.err
