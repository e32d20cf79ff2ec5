"""Models that are one file with the original programs' names: read, trained on, painted with."""

import shutil

import exports
import original_format
import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from single_files import model_of, same, sparse

from diffpo import models
from diffpo.commands import check
from diffpo.common.errors import DiffpoError
from diffpo.config import Model
from diffpo.evaluation import generate
from diffpo.evaluation.generation import Generation
from diffpo.export import export
from diffpo.models import single_file
from diffpo.train.loop import train
from diffpo.weights import lora_file


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "embedded"])
def test_every_part_is_the_folders(one, name, dtype):
    folder, file = one(name)
    ours, theirs = (models.load_pipeline(m, dtype, "cpu") for m in (model_of(file, folder), str(folder)))
    assert type(ours) is type(theirs) and ours.components.keys() == theirs.components.keys()
    for part, module in theirs.components.items():
        if isinstance(module, torch.nn.Module):
            same(getattr(ours, part).state_dict(), module.state_dict())
            assert not getattr(ours, part).training
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert (
        ours.scheduler.config.prediction_type == theirs.scheduler.config.get("prediction_type") if name != "sd3" else 1
    )


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_the_caches_are_the_folders_too(one, name):
    """Latents and embeddings that were made by the folder are those of the file."""
    folder, file = one(name)
    hashes = []
    for model in (model_of(file, folder), Model(path=str(folder))):
        family = models.load(model, resolution=16)
        family.load_encoders()
        hashes.append((family.text_hash(), family.vae_hash()))
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_training_and_pictures_are_the_folders_to_the_last_bit(one, make_config, tmp_path, name):
    folder, file = one(name)
    runs = [tmp_path / "by-folder", tmp_path / "by-file"]
    train(make_config(folder, "train.steps=2", f"output={runs[0]}"))
    train(make_config(file, f"model.config={folder}", "train.steps=2", f"output={runs[1]}"))
    same(*(load_file(run / lora_file.FILE_NAME) for run in runs))
    cards = [(run / "README.md").read_text() for run in runs]
    assert f'from_single_file("{file.name}")' in cards[1].replace("'", '"')
    assert not any(str(path.parent) in card for path, card in zip((folder, file), cards, strict=True))
    # the LoRA of one on the other
    options = {"steps": 2, "device": "cpu"}
    rows = generate.run(Generation(folder, lora=runs[1], **options).arms(), ["a cat"], tmp_path / "a")
    made = Generation(file, model_config=folder, lora=runs[0], **options)
    other = generate.run(made.arms(), ["a cat"], tmp_path / "b")
    assert [row["sha256"] for row in rows] == [row["sha256"] for row in other]
    assert rows[0]["sha256"] != rows[1]["sha256"] and rows[0]["model_hash"] != other[0]["model_hash"]


def test_training_goes_on_from_a_lora_of_the_folder(one, make_config, tmp_path):
    folder, file = one("sd")
    train(make_config(folder, "train.steps=1", f"output={tmp_path / 'first'}"))
    more = (
        f"model.config={folder}",
        f"lora.start={tmp_path / 'first'}",
        "train.steps=1",
        f"output={tmp_path / 'second'}",
    )
    train(make_config(file, *more))
    before, after = (load_file(tmp_path / run / lora_file.FILE_NAME) for run in ("first", "second"))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


def test_a_check_reads_no_weights(one, make_config, monkeypatch, capsys):
    folder, file = one("sdxl")
    monkeypatch.setattr(single_file.SingleFile, "_state", lambda *args: pytest.fail("read"))
    check.check(make_config(file, f"model.config={folder}"))
    total = sum(value.numel() for value in original_format.part(folder, "unet")[0].values())
    assert f"StableDiffusionXL, epsilon; {total:,} parameters" in capsys.readouterr().out


def test_the_embedded_model_paints_the_same(one, tmp_path):
    folder, file = one("embedded")
    options = {"steps": 3, "device": "cpu"}
    rows = generate.run(Generation(folder, **options).arms(), "shapes:heldout", tmp_path / "a", 1)
    made = Generation(file, model_config=folder, **options)
    other = generate.run(made.arms(), "shapes:heldout", tmp_path / "b", 1)
    with Image.open(tmp_path / "a" / rows[0]["file"]) as ours, Image.open(tmp_path / "b" / other[0]["file"]) as theirs:
        assert ImageChops.difference(ours, theirs).getbbox() is None and ours.getextrema()[0][0] < 250


# ---- precision


def test_fp8_is_read_with_its_scale(one, tmp_path):
    folder, file = one("sd")
    whole = load_file(file)
    name = "model.diffusion_model.middle_block.1.proj_in"
    small = {key: value.to(torch.float8_e4m3fn) if value.is_floating_point() else value for key, value in whole.items()}
    save_file(small, tmp_path / "plain.safetensors")
    marks = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn), f"{name}.scale_weight": torch.tensor(3.0)}
    save_file(small | marks, tmp_path / "scaled.safetensors")
    for each, factor in (("plain", 1), ("scaled", 3)):
        family = models.load(model_of(tmp_path / f"{each}.safetensors", folder))
        found = family.load_network().mid_block.attentions[0].proj_in.weight
        assert torch.equal(found, factor * small[f"{name}.weight"].float())
    odd = small | {f"{name}.scale_weight": torch.tensor(3.0), f"{name}.weight": whole[f"{name}.weight"].to(torch.int8)}
    save_file(odd, tmp_path / "odd.safetensors")
    with pytest.raises(DiffpoError, match=rf"odd\.safetensors .*{name}\.weight is quantised as I8"):
        models.load(model_of(tmp_path / "odd.safetensors", folder)).load_network()
    exports.train(folder, tmp_path / "run")
    # a LoRA that stays one needs no precision of the base; the base of this LoRA is another
    with pytest.raises(DiffpoError, match="another base model"):
        export.run(
            export.Export(
                tmp_path / "run", "kohya", str(tmp_path / "plain.safetensors"), tmp_path / "k", model_config=folder
            )
        )
    with pytest.raises(DiffpoError, match="stored in F8_E4M3: add --dtype"):
        export.run(
            export.Export(
                tmp_path / "run", "single", str(tmp_path / "plain.safetensors"), tmp_path / "s", model_config=folder
            )
        )


def test_a_half_precision_file_is_the_same_base(one, tmp_path):
    folder, _ = one("sdxl")
    half = original_format.sdxl(folder, tmp_path / "half.safetensors", torch.bfloat16)
    exports.train(folder, tmp_path / "run")
    out = export.run(export.Export(tmp_path / "run", "single", str(half), tmp_path / "out", model_config=folder))
    found = load_file(out / "out.safetensors")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert torch.equal(
        found["first_stage_model.quant_conv.weight"], load_file(half)["first_stage_model.quant_conv.weight"]
    )


# ---- parts from elsewhere


def without(file, prefix, target):
    save_file({name: value for name, value in load_file(file).items() if not name.startswith(prefix)}, target)
    return target


def test_what_the_file_lacks_is_the_configs(one, tmp_path, capsys):
    folder, file = one("sdxl")
    bare = without(file, ("first_stage_model.", "conditioner."), tmp_path / "unet.safetensors")
    save_file(load_file(bare) | {"nobody.knows": torch.zeros(3)}, bare)
    with pytest.raises(DiffpoError, match=r"unet\.safetensors holds only unet.*hub id of a pipeline that has"):
        models.load(Model(path=str(bare)))
    ours, theirs = (models.load_pipeline(m, device="cpu") for m in (model_of(bare, folder), str(folder)))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        same(getattr(ours, part).state_dict(), getattr(theirs, part).state_dict())
    assert "1 weights belong to no part" in capsys.readouterr().out
    configs = tmp_path / "configs"
    shutil.copytree(folder, configs, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(DiffpoError, match=r"unet\.safetensors .*unet.*vae, text_encoder, text_encoder_2"):
        models.load(model_of(bare, configs))


def test_a_vae_in_a_file_of_its_own(one, tmp_path):
    folder, file = one("sdxl")
    bare = without(file, "first_stage_model.", tmp_path / "no-vae.safetensors")
    configs = tmp_path / "configs"
    shutil.copytree(folder, configs, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(DiffpoError, match=r"has vae, or model\.vae to a VAE"):
        models.load(model_of(bare, configs))
    state, config = original_format.part(folder, "vae")
    moved = {name: value + 1 for name, value in state.items()}
    for prefix in ("", "first_stage_model."):
        vae = tmp_path / "vae.safetensors"
        save_file(original_format.vae(moved, config, prefix), vae)
        for model in (model_of(bare, configs, vae=str(vae)), Model(path=str(folder), vae=str(vae))):
            family = models.load(model, resolution=16)
            family.load_encoders()
            same(family.pipe.vae.state_dict(), moved)


def test_configs_and_missing_parts_from_the_hubs_cache(tiny_sd3, tmp_path, monkeypatch):
    """Without a network: what `hf download` left. A file that holds the transformer alone, as ComfyUI keeps it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--stabilityai--stable-diffusion-3.5-medium"
    shutil.copytree(tiny_sd3, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    whole = original_format.sd3(tiny_sd3, tmp_path / "whole.safetensors")
    state = original_format.mmdit(*original_format.part(tiny_sd3, "transformer"), prefix="")
    save_file(state, tmp_path / "alone.safetensors")
    expected = models.load_pipeline(str(tiny_sd3), device="cpu").components
    for file in (whole, tmp_path / "alone.safetensors"):
        found = models.load_pipeline(str(file), device="cpu").components
        for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
            same(found[part].state_dict(), expected[part].state_dict())
        family = models.load(Model(path=str(file)), resolution=16)
        family.load_encoders()
        assert family.prediction == "flow" and models.source_of(Model(path=str(file))).fingerprint()
    (repository / "snapshots" / ("a" * 40) / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    models.load(Model(path=str(whole)), resolution=16)
    with pytest.raises(DiffpoError, match=r"alone\.safetensors .*the cache has no vae\)"):
        models.load(Model(path=str(tmp_path / "alone.safetensors")), resolution=16)


def test_the_transformer_alone_says_what_else_is_needed(tmp_path, monkeypatch):
    """ComfyUI's flux1-dev: its other parts are the hub's, which is not reached here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shapes = original_format.flux_model(guidance=True)
    file = sparse(
        tmp_path / "flux1-dev.safetensors", {n.partition(".")[2].partition(".")[2]: s for n, s in shapes.items()}
    )
    with pytest.raises(DiffpoError) as error:
        models.load(Model(path=str(file)))
    for words in ("flux1-dev.safetensors is FLUX.1", "hf download black-forest-labs/FLUX.1-dev", "'vae/*.safetensors'"):
        assert words in str(error.value)
    assert "--include 'text_encoder_2/*.safetensors'" in str(error.value) and "model.config" in str(error.value)
