"""Models written as one file with the original programs' names."""

import json
import shutil

import exports
import original_format
import pytest
import torch
from safetensors.torch import load_file, save_file
from single_files import model_of, same

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Model
from diffpo.export import export
from diffpo.models import flux_names


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
