"""Models that edit pictures, and pairs with the picture that they are edits of."""

import pytest
import tiny_flows
import tiny_transformers
import torch
from pipeline_calls import calls_of, compare
from tiny import metrics_of, pick_a_pic_rows, picture, png, write_parquet

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.config import Model
from diffpo.data.batches import Batches
from diffpo.data.groups import load_groups
from diffpo.data.transforms import pixels, views
from diffpo.train.loop import train

SOURCE = "data.columns.source=before"


def make_kontext(folder):
    from diffusers import FluxKontextPipeline, FluxPipeline

    flux = FluxPipeline.from_pretrained(tiny_transformers.make_flux(folder.parent / "flux"))
    FluxKontextPipeline(**flux.components).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    make = {"kontext": make_kontext, "flux2_klein": tiny_flows.make_flux2_klein}
    made = {}

    def get(name):
        if name not in made:
            made[name] = make[name](tmp_path_factory.mktemp(name) / name)
        return made[name]

    return get


@pytest.fixture
def edits(tmp_path):
    """Four pairs, each with the picture that both are edits of."""
    rows = [row | {"before": png(picture(100 + i))} for i, row in enumerate(pick_a_pic_rows(4))]
    return write_parquet(tmp_path / "edits.parquet", rows)


@torch.no_grad()
@pytest.mark.parametrize("name", ["kontext", "flux2_klein"])
def test_a_picture_is_edited_as_by_the_pipeline(folder, name):
    """The network is given what the pipeline gives it: noise and picture side by side, and their places."""
    side = 64 if name == "flux2_klein" else 16  # its pipeline takes no smaller picture
    family = models.load(Model(path=str(folder(name))), resolution=side)
    family.load_encoders()
    pipe = models.load_pipeline(str(folder(name)), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    before = picture(7, (side, side))
    noise = torch.randn(1, *family.latent_shape(pipe.transformer, side), generator=torch.Generator().manual_seed(0))
    options = type(family).painting(pipe, ["make it blue"], None, noise, family.settings.guidance)
    if name == "kontext":
        options["_auto_resize"] = False
    else:
        options["guidance_scale"] = 1.0
    given = options | {"image": before, "num_inference_steps": 1, "output_type": "latent"}
    _, theirs = calls_of(pipe.transformer, lambda: pipe(**given))
    (view,) = views([before.size], before.size, "center", False, torch.Generator())
    source = family.scale_latents(family.encode_image(pixels(before, view)[None])["mean"])
    cond = family.encode_text(["make it blue"]) | {"source": source}
    t = theirs[0]["timestep"] * 1000
    out, ours = calls_of(pipe.transformer, lambda: family.predict(pipe.transformer, noise, t, cond))
    compare(ours, theirs)
    assert out.shape == noise.shape
    plain = family.predict(pipe.transformer, noise, t, {**cond, "source": torch.zeros_like(source)})
    assert (out - plain).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_batch_has_the_pictures_that_its_images_are_edits_of(folder, make_config, edits, crop):
    """From the cache or not: the picture's latents without noise, for each member."""
    family = models.load(Model(path=str(folder("kontext"))), resolution=16)
    family.load_encoders()
    data = make_config(folder("kontext"), SOURCE, f"data.crop={crop}", data=edits).data
    groups = load_groups(data, str(edits), "train")
    batches = Batches(groups, data, family)
    assert batches.cached == (crop == "center")
    cond = batches.batch([2, 0], [0, 1]).cond
    (view,) = views([(16, 16)], (16, 16), "center", False, torch.Generator())
    rows = torch.stack([pixels(picture(100 + groups.groups[i].row), view) for i in (2, 0)])
    expected = family.scale_latents(family.encode_image(rows)["mean"])
    torch.testing.assert_close(cond["source"], expected.repeat(2, 1, 1, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batches.unconditional(cond, [2, 0])["source"], cond["source"])


@pytest.mark.parametrize("name", ["kontext", "flux2_klein"])
def test_a_model_is_trained_on_edits(folder, make_config, edits, name):
    config = make_config(folder(name), SOURCE, "train.steps=2", "objective.beta=500", data=edits)
    train(config)
    first, second = metrics_of(config.output)
    assert first["rewards/chosen"] == 0 and first["grad_norm"] > 0 and second["error/chosen_delta"] != 0


def test_a_source_is_of_the_images_size_and_for_models_that_edit(folder, tiny_sd, make_config, edits, tmp_path):
    with pytest.raises(DiffpoError, match=r"data\.columns\.source=before"):
        train(make_config(tiny_sd, SOURCE, "train.steps=1", data=edits))
    rows = [row | {"before": png(picture(3, (24, 16)))} for row in pick_a_pic_rows(2)]
    other = write_parquet(tmp_path / "other.parquet", rows)
    with pytest.raises(DiffpoError, match=r"source differs in size.*24x16 and 16x16"):
        train(make_config(folder("kontext"), SOURCE, "train.steps=1", data=other))
    rows[1]["before"] = None
    lacking = write_parquet(tmp_path / "lacking.parquet", [row | {"before": None} for row in rows])
    with pytest.raises(DiffpoError, match="no picture that the images are edits of"):
        train(make_config(folder("kontext"), SOURCE, "train.steps=1", data=lacking))
