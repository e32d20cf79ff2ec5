"""Models that are one file with the original programs' names: read, trained on, painted with, written, refused."""

import json
import shutil

import exports
import original_format
import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from tiny_transformers import make_sd3

from diffpo import models
from diffpo.commands import check
from diffpo.commands.quickstart import ROOT
from diffpo.common.errors import DiffpoError
from diffpo.config import Model
from diffpo.evaluate import generate
from diffpo.evaluate.generation import Generation
from diffpo.export import export
from diffpo.models import flux_names, original, released, sd3_names, single_file, unet_names
from diffpo.train.loop import train
from diffpo.weights import lora_file

EMBEDDED = ROOT / "assets" / "tiny-sdxl"


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory):
    """SD3.5's network. The original does not project CLIP-L's embedding, for which diffusers has the identity."""
    folder = make_sd3(tmp_path_factory.mktemp("sd3") / "sd3", qk_norm="rms_norm", dual_attention_layers=(0,))
    file = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {"text_projection.weight": torch.eye(16)}, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def one(tmp_path_factory, tiny_sd, tiny_sdxl, tiny_sd3):
    """one(name): the folder of a tiny pipeline, and the same as one file."""
    folders, made = {"sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "embedded": EMBEDDED}, {}
    write = {"sd": original_format.sd1, "sd3": original_format.sd3}

    def get(name):
        if name not in made:
            file = tmp_path_factory.mktemp("files") / f"{name}.safetensors"
            made[name] = write.get(name, original_format.sdxl)(folders[name], file)
        return folders[name], made[name]

    return get


def model_of(file, folder, **options):
    return Model(path=str(file), config=str(folder), **options)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


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


# ---- written


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_an_export_is_the_merged_pipeline_by_the_original_names(one, tmp_path, name):
    folder, file = one(name)
    exports.train(folder, tmp_path / "run")
    merged = export.run(export.Export(tmp_path / "run", "merged", str(folder), tmp_path / "merged"))
    single = export.run(export.Export(tmp_path / "run", "single", str(folder), tmp_path / "single"))
    again = export.run(export.Export(tmp_path / "run", "single", str(file), tmp_path / "again", model_config=folder))
    for to in ("diffusers", "kohya") if name != "sd3" else ("diffusers",):
        loras = [export.run(export.Export(tmp_path / "run", to, str(folder), tmp_path / "a" / to))]
        loras += [export.run(export.Export(tmp_path / "run", to, str(file), tmp_path / "b" / to, model_config=folder))]
        same(*(load_file(next(each.glob("*.safetensors"))) for each in loras))
    write = {"sd": original_format.sd1, "sd3": original_format.sd3}.get(name, original_format.sdxl)
    expected = load_file(write(merged, tmp_path / "expected.safetensors"))
    incidental = ("position_ids", "logit_scale", "betas", "alphas_cumprod", "encoder.embed_tokens.weight")
    expected = {name: value for name, value in expected.items() if not name.endswith(incidental)}
    same(load_file(single / "single.safetensors"), expected)
    same(load_file(again / "again.safetensors"), expected)
    assert any(not torch.equal(value, expected[key]) for key, value in load_file(file).items() if key in expected)
    assert str(tmp_path) not in (single / "README.md").read_text()


def test_fluxs_transformer_by_the_original_names(tiny_folder):
    """Alone: diffusers reads FLUX in its released width only, so that no tiny one can be read back."""
    state, config = original_format.part(tiny_folder("flux"), "transformer")
    network = models.load(Model(path=str(tiny_folder("flux"))), resolution=16).load_network()
    same(flux_names.flux(network.state_dict(), network.config), original_format.flux(state, config))


def test_what_is_read_back_otherwise_is_not_kept(tiny_folder, tmp_path):
    """SD3 whose first CLIP projects its embedding, which the format cannot say."""
    exports.train(tiny_folder("sd3"), tmp_path / "run")
    with pytest.raises(DiffpoError, match=r"text_projection\.weight .* not kept"):
        export.run(export.Export(tmp_path / "run", "single", str(tiny_folder("sd3")), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_sd2_with_a_layer_more_than_is_computed(tiny_sd, tmp_path):
    """Its text encoder is open_clip's, in which diffusers leaves out the last layer and the projection."""
    folder, file = tmp_path / "sd2", tmp_path / "sd2.safetensors"
    shutil.copytree(tiny_sd, folder)
    text, config = original_format.part(folder, "text_encoder")
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    prefix = "cond_stage_model.model."
    parts = original_format.unet(*original_format.part(folder, "unet"))
    parts |= original_format.vae(*original_format.part(folder, "vae")) | original_format.open_clip(text, prefix)
    first = f"{prefix}transformer.resblocks.0."
    more = {name.replace("resblocks.0.", "resblocks.2."): value + 1 for name, value in parts.items() if first in name}
    save_file(
        parts | more | {f"{prefix}text_projection": torch.ones(16, 16), f"{prefix}logit_scale": torch.ones(())}, file
    )
    found = models.load_pipeline(model_of(file, folder), device="cpu").text_encoder
    same(found.state_dict(), models.load_pipeline(str(folder), device="cpu").text_encoder.state_dict())
    exports.train(folder, tmp_path / "run")
    for name, base, options in (("a", folder, {}), ("b", file, {"model_config": folder})):
        out = export.run(export.Export(tmp_path / "run", "single", str(base), tmp_path / name, **options))
        written = load_file(out / f"{name}.safetensors")
        assert written.keys() == parts.keys()
        same({key: written[key] for key in parts if key.startswith(prefix)}, original_format.open_clip(text, prefix))


def test_old_names_of_the_text_encoder(one, tmp_path):
    folder, file = one("sd")
    state = {name.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): value
             for name, value in load_file(file).items()}  # fmt: skip
    save_file(state, tmp_path / "old.safetensors")
    found = models.load_pipeline(model_of(tmp_path / "old.safetensors", folder), device="cpu").text_encoder
    same(found.state_dict(), models.load_pipeline(str(folder), device="cpu").text_encoder.state_dict())


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_families_without_such_a_format_are_refused(tiny_folder, tmp_path, name):
    exports.train(tiny_folder(name), tmp_path / "run")
    with pytest.raises(DiffpoError, match=r"cannot be written as one file.*--to merged"):
        export.run(export.Export(tmp_path / "run", "single", str(tiny_folder(name)), tmp_path / "out"))


def test_a_model_that_predicts_v_is_marked(one, tmp_path):
    folder, file = one("sd")
    marked = original_format.sd1(folder, tmp_path / "v.safetensors", v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    family, plain = (models.load(model_of(each, folder)) for each in (marked, file))
    assert (family.prediction, plain.prediction) == ("v_prediction", "epsilon")
    last = torch.tensor([999])
    assert family.alpha_sigma(last)[0].item() == 0 and plain.alpha_sigma(last)[0].item() > 0.05
    exports.train(folder, tmp_path / "run")
    out = export.run(export.Export(tmp_path / "run", "single", str(marked), tmp_path / "out", model_config=folder))
    assert {"v_pred", "ztsnr"} <= load_file(out / "out.safetensors").keys()
    pipe = models.load_pipeline(model_of(out / "out.safetensors", folder), device="cpu")
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.rescale_betas_zero_snr


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
    with pytest.raises(DiffpoError, match=r"unet\.safetensors holds unet alone.*vae, text_encoder, text_encoder_2"):
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


# ---- the released models


def sparse(path, shapes, metadata=None):
    """A safetensors file with these shapes in fp8, whose zeros take no place on the disk."""
    header, end = {"__metadata__": metadata or {}}, 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel()
        header[name] = {"dtype": "F8_E4M3", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


SD1 = original_format.ldm_unet(320, (1, 2, 4, 4), (1, 1, 1, 0), 768, linear=False)
SD2 = original_format.ldm_unet(320, (1, 2, 4, 4), (1, 1, 1, 0), 1024, linear=True)
SDXL = original_format.ldm_unet(320, (1, 2, 4), (0, 2, 10), 2048, linear=True, label=2816)


def test_the_lists_are_the_released_files():
    """As many tensors and numbers as in v1-5-pruned-emaonly, sd_xl_base_1.0, flux1-dev and flux1-schnell."""
    sizes = {
        name: (len(shapes), sum(torch.Size(shape).numel() for shape in shapes.values()))
        for name, shapes in {
            "sd1": SD1,
            "sdxl": SDXL,
            "vae": original_format.ldm_vae(),
            "dev": original_format.flux_model(True),
            "schnell": original_format.flux_model(False),
        }.items()
    }
    assert sizes == {
        "sd1": (686, 859_520_964),
        "sdxl": (1680, 2_567_463_684),
        "vae": (248, 83_653_863),
        "dev": (780, 11_901_408_320),
        "schnell": (776, 11_891_178_560),
    }


MMDIT = {"in_channels": 16, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
FLUX = {"in_channels": 64, "num_layers": 19, "num_single_layers": 38}


def mmdit(depth, positions, **options):
    wide = {"num_attention_heads": depth, "num_layers": depth, "caption_projection_dim": 64 * depth}
    return MMDIT | wide | {"pos_embed_max_size": positions, "qk_norm": "rms_norm", **options}


RELEASED = {
    "sd1": ("UNet2DConditionModel", released.UNET, SD1),
    "sd2": ("UNet2DConditionModel", released.UNET_2, SD2),
    "sdxl": ("UNet2DConditionModel", released.UNET_XL, SDXL),
    "sd3.5-medium": (
        "SD3Transformer2DModel",
        mmdit(24, 384, dual_attention_layers=list(range(13))),
        original_format.sd3_mmdit(24, 384, range(13)),
    ),
    "sd3.5-large": ("SD3Transformer2DModel", mmdit(38, 192), original_format.sd3_mmdit(38, 192)),
    "sd3-medium": (
        "SD3Transformer2DModel",
        mmdit(24, 192, qk_norm=None),
        original_format.sd3_mmdit(24, 192, (), False),
    ),
    "flux-dev": ("FluxTransformer2DModel", FLUX | {"guidance_embeds": True}, original_format.flux_model(True)),
    "flux-schnell": ("FluxTransformer2DModel", FLUX, original_format.flux_model(False)),
    "vae": ("AutoencoderKL", released.VAE, original_format.ldm_vae()),
    "vae-16": (
        "AutoencoderKL",
        released.VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        original_format.ldm_vae(16, quant=False),
    ),
}


@pytest.mark.parametrize("name", list(RELEASED))
def test_names_and_shapes_of_the_released_networks(name):
    """On the meta device: ours are the original program's, and diffusers' converter gives its own back."""
    import diffusers
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    cls, config, expected = RELEASED[name]
    with torch.device("meta"):
        network = getattr(diffusers, cls).from_config(dict(config))
    write = {
        "SD3Transformer2DModel": sd3_names.sd3,
        "FluxTransformer2DModel": flux_names.flux,
        "AutoencoderKL": original.vae,
    }
    state = network.state_dict()
    found = write.get(cls, unet_names.unet)(state, network.config)
    prefix = "" if cls == "AutoencoderKL" else "model.diffusion_model."
    assert {prefix + key: tuple(value.shape) for key, value in found.items()} == expected
    back = SINGLE_FILE_LOADABLE_CLASSES[cls]["checkpoint_mapping_fn"]
    given = back(checkpoint={prefix + key: value for key, value in found.items()}, config=dict(config))
    assert {k: v.shape for k, v in given.items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize(("name", "released_as"), [("ViT-H-14", released.CLIP_H), ("ViT-bigG-14", released.CLIP_G)])
def test_names_and_shapes_of_open_clip(name, released_as):
    """Against open_clip itself; of SD 2.x's 24 layers diffusers has 23, and no projection."""
    import open_clip
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        theirs = open_clip.create_model(name, device="meta")
        cls = CLIPTextModelWithProjection if name == "ViT-bigG-14" else CLIPTextModel
        ours = cls(CLIPTextConfig(**released_as))
    expected = {
        key: tuple(value.shape)
        for key, value in theirs.state_dict().items()
        if not key.startswith(("visual.", "logit_scale")) and "attn_mask" not in key
    }
    if name == "ViT-H-14":
        expected = {k: v for k, v in expected.items() if "resblocks.23." not in k and k != "text_projection"}
    found = original.open_clip(ours.state_dict())
    assert {key: tuple(value.shape) for key, value in found.items()} == expected
    back = original.from_open_clip(found, released_as["num_hidden_layers"])
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in original.clip(ours.state_dict()).items()}


def text_shapes(config, prefix, projection=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(CLIPTextConfig(**config))
    write = original.open_clip if prefix.endswith(".model.") else original.clip
    return {prefix + name: tuple(value.shape) for name, value in write(model.state_dict()).items()}


@pytest.fixture(scope="module")
def released_files(tmp_path_factory):
    """Files with the released models' names and shapes."""
    folder = tmp_path_factory.mktemp("released")
    vae = {f"first_stage_model.{name}": shape for name, shape in original_format.ldm_vae().items()}
    sd1 = SD1 | vae | text_shapes(released.CLIP_L, "cond_stage_model.transformer.")
    sd2 = SD2 | vae | text_shapes(released.CLIP_H, "cond_stage_model.model.")
    sdxl = SDXL | vae | text_shapes(released.CLIP_L, "conditioner.embedders.0.transformer.")
    sdxl |= text_shapes(released.CLIP_G, "conditioner.embedders.1.model.", projection=True)
    return {
        "sd1": sparse(folder / "sd1.safetensors", sd1),
        "sd2": sparse(folder / "sd2.safetensors", sd2),
        "sd2-v": sparse(folder / "sd2-v.safetensors", sd2, {"modelspec.prediction_type": "v"}),
        "sdxl": sparse(folder / "sdxl.safetensors", sdxl),
        "sdxl-v": sparse(folder / "sdxl-v.safetensors", sdxl | {"v_pred": (0,)}),
    }


@pytest.mark.parametrize(
    ("name", "family", "prediction", "scale"),
    [
        ("sd1", "StableDiffusion", "epsilon", 0.18215),
        ("sd2-v", "StableDiffusion", "v_prediction", 0.18215),
        ("sdxl", "StableDiffusionXL", "epsilon", 0.13025),
        ("sdxl-v", "StableDiffusionXL", "v_prediction", 0.13025),
    ],
)
def test_released_models_need_nothing_from_the_hub(released_files, monkeypatch, name, family, prediction, scale):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = models.load(Model(path=str(released_files[name])), "bf16", 512)
    assert (type(found).__name__, found.prediction) == (family, prediction)
    assert found.vae_settings()["scaling_factor" if scale != 0.18215 else "layers_per_block"] in (scale, 2)
    network = found.meta_network()
    assert network.config.sample_size == {"sd1": 64, "sd2-v": 64}.get(name, 128) and found.vae_factor() == 8
    # abar_T by hand: betas evenly spaced in their roots
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    last = (1 - betas).prod().sqrt().item()
    assert found.alpha_sigma(torch.tensor([999]))[0].item() == pytest.approx(last, rel=1e-4)


def test_sd2_is_asked_what_it_predicts(released_files):
    file = str(released_files["sd2"])
    with pytest.raises(DiffpoError, match=r"sd2\.safetensors is Stable Diffusion 2\.x, .* sd2 or to sd2-v"):
        models.load(Model(path=file))
    assert models.load(Model(path=file, config="sd2")).prediction == "epsilon"
    assert models.load(Model(path=file, config="sd2-v")).prediction == "v_prediction"
    with pytest.raises(DiffpoError, match=r"sd2\.safetensors has 865,910,724 weights.* sd1 .*859,520,964"):
        models.load(Model(path=file, config="sd1")).meta_network()
    with pytest.raises(DiffpoError, match="is of a StableDiffusionXLPipeline: name a StableDiffusionPipeline"):
        models.load(Model(path=file, config="sdxl"))


def test_the_vocabulary_is_clips():
    """The same numbers for words as by open_clip's own tokenizer."""
    import open_clip
    from transformers import CLIPTokenizer

    texts = ["a photo of a cat", "Über-naïve straße, 3 dogs'!", "猫 🐈 photorealistic masterpiece"]
    expected = open_clip.SimpleTokenizer()
    for part, pad in (("tokenizer", 49407), ("tokenizer_2", 0)):
        tokenizer = CLIPTokenizer.from_pretrained(released.folder("sdxl"), subfolder=part)
        assert len(tokenizer) == 49408 and tokenizer.pad_token_id == pad
        for text in texts[: 3 if pad else 1]:  # "!" is special where it pads
            assert tokenizer(text).input_ids[1:-1] == expected.encode(text), text
        assert tokenizer("cat", padding="max_length").input_ids == [49406, 2368, 49407, *[pad] * 74]


# ---- refused


def names_of(*names, width=4):
    return {name: torch.zeros(width, width, 1, 1) for name in names}


UNET = "model.diffusion_model.input_blocks.0.0.weight"
REFUSED = {
    "kohya": (names_of("lora_unet_mid_block_attentions_0.lora_down.weight"), "a LoRA, not a model.*--lora"),
    "peft": (names_of("unet.mid_block.to_q.lora_A.weight"), "a LoRA, not a model"),
    "flux-lora": (names_of("diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"), "a LoRA, not a model"),
    "vae": (names_of("first_stage_model.decoder.conv_in.weight"), "a VAE alone: set model.vae"),
    "bare-vae": (names_of("encoder.conv_in.weight", "decoder.conv_in.weight"), "a VAE alone: set model.vae"),
    "text": (names_of("text_model.encoder.layers.0.mlp.fc1.weight"), "a text encoder alone"),
    "t5": (names_of("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"), "a text encoder alone"),
    "embedding": (names_of("emb_params"), "a textual inversion"),
    "unet": (names_of("input_blocks.0.0.weight", "out.2.weight"), "a UNet alone"),
    "diffusers": (names_of("down_blocks.0.resnets.0.conv1.weight"), "alone, with diffusers' names.*folder"),
    "controlnet": (names_of(UNET, "control_model.time_embed.0.weight"), "a ControlNet"),
    "refiner": (names_of(UNET, "conditioner.embedders.0.model.ln_final.weight"), "SDXL's refiner"),
    "flux2": (names_of("double_blocks.0.img_attn.qkv.weight", "single_stream_modulation.lin.weight"), "FLUX.2"),
    "chroma": (names_of("double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.bias"), "Chroma"),
    "nf4": (names_of("double_blocks.0.img_attn.qkv.weight.absmax"), "quantised to few bits.*nf4"),
    "upscaler": (names_of("conv_first.weight", "body.0.rdb1.conv1.weight"), r"2 weights"),
    "empty": ({}, r"\(0 weights\)"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_other_files_are_called_what_they_are(tmp_path, name):
    state, said = REFUSED[name]
    file = tmp_path / f"{name}.safetensors"
    save_file(state, file)
    with pytest.raises(DiffpoError, match=rf"{name}\.safetensors .*{said}"):
        models.load(Model(path=str(file)))


def test_inpainting_is_refused(one, tmp_path):
    folder, file = one("sd")
    state = load_file(file)
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(8, 9, 3, 3)
    save_file(state, tmp_path / "inpaint.safetensors")
    with pytest.raises(DiffpoError, match=r"inpaint\.safetensors takes 9 input channels.*inpainting"):
        models.load(model_of(tmp_path / "inpaint.safetensors", folder))


def test_no_weight_may_be_missing_or_too_much(one, tmp_path):
    folder, file = one("sdxl")
    lost = {
        "unet": "model.diffusion_model.middle_block.1.proj_in.weight",
        "vae": "first_stage_model.encoder.norm_out.bias",
        "text_encoder": "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "text_encoder_2": "conditioner.embedders.1.model.text_projection",
    }
    for part, name in lost.items():
        state = load_file(file)
        value = state.pop(name)
        save_file(state, tmp_path / "less.safetensors")
        with pytest.raises(DiffpoError, match=rf"the {part} .*less\.safetensors"):
            models.load_pipeline(model_of(tmp_path / "less.safetensors", folder), device="cpu")
        prefix = name.rpartition("." if part != "text_encoder_2" else "text")[0].rstrip(".")
        save_file(load_file(file) | {f"{prefix}.and_more.weight": value.clone()}, tmp_path / "more.safetensors")
        with pytest.raises(DiffpoError, match=rf"the {part} .*more\.safetensors"):
            models.load_pipeline(model_of(tmp_path / "more.safetensors", folder), device="cpu")


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    for name in ("model.ckpt", "model.pt", "model.bin", "model.safetensors"):
        torch.save({"state_dict": Bomb()}, tmp_path / name)
        with pytest.raises(DiffpoError, match=rf"{name} is pickled(.|\n)*weights_only=True"):
            models.load(Model(path=str(tmp_path / name)))
    # the way out does what it says
    state = {"a": torch.arange(3.0), "b": torch.ones(2).to(torch.float16)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.ckpt")
    with pytest.raises(DiffpoError) as error:
        models.load(Model(path=str(tmp_path / "model.ckpt")))
    program = str(error.value).partition('python -c "')[2].removesuffix('"')
    exec(program, {})
    same(load_file(tmp_path / "model-converted.safetensors"), state)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.safetensors", None, r"cut\.safetensors: .*truncated"),
        ("page.safetensors", b"<!DOCTYPE html><html>log in</html>", r"page\.safetensors: .*not a safetensors file"),
        ("empty.safetensors", b"", r"empty\.safetensors: .*not a safetensors file"),
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        ("model.gguf", b"GGUF\x03\x00", r"model\.gguf is quantised"),
    ],
)
def test_damaged_files(one, tmp_path, name, content, said):
    whole = one("sd")[1].read_bytes()
    (tmp_path / name).write_bytes(whole[:-100] if content is None else content)
    with pytest.raises(DiffpoError, match=said):
        models.load(Model(path=str(tmp_path / name)))


def test_files_that_are_not_there(one, tmp_path):
    folder, file = one("sd")
    with pytest.raises(DiffpoError, match=r"there is no file .*gone\.safetensors"):
        models.load(Model(path=str(tmp_path / "gone.safetensors")))
    with pytest.raises(DiffpoError, match=r"https://host/a/b\.safetensors is a URL"):
        models.load(Model(path="https://host/a/b.safetensors"))
    with pytest.raises(DiffpoError, match=r"holds no model_index\.json.*name the file itself: .*sd\.safetensors"):
        models.load(Model(path=str(file.parent)))
    with pytest.raises(DiffpoError, match=r"model\.config .*leave it out"):
        models.load(model_of(folder, folder))
    with pytest.raises(DiffpoError, match=r"model\.config=.*nowhere: there is no such folder"):
        models.load(model_of(file, tmp_path / "nowhere"))
    with pytest.raises(DiffpoError, match=r"'sdxxl', which is none of sd1, sd2, sdxl, sd2-v, sdxl-v and no folder"):
        models.load(model_of(file, "sdxxl"))
    with pytest.raises(DiffpoError, match="is not the folder of a pipeline"):
        models.load(model_of(file, tmp_path))
    with pytest.raises(DiffpoError, match=r"cannot read the scheduler|cannot read the unet"):
        (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        models.load(model_of(file, tmp_path))


def test_the_embedded_model_paints_the_same(one, tmp_path):
    folder, file = one("embedded")
    options = {"steps": 3, "device": "cpu"}
    rows = generate.run(Generation(folder, **options).arms(), "shapes:heldout", tmp_path / "a", 1)
    made = Generation(file, model_config=folder, **options)
    other = generate.run(made.arms(), "shapes:heldout", tmp_path / "b", 1)
    with Image.open(tmp_path / "a" / rows[0]["file"]) as ours, Image.open(tmp_path / "b" / other[0]["file"]) as theirs:
        assert ImageChops.difference(ours, theirs).getbbox() is None and ours.getextrema()[0][0] < 250
