"""Models that edit pictures: pairs with the picture that they are edits of, and pictures that are made of others."""

import math

import pytest
import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from pipeline_calls import compare, recorded, sampled
from tiny import metrics_of, pick_a_pic_rows, picture, png, write_parquet

from diffpo import models
from diffpo.commands.check import check
from diffpo.common.errors import DiffpoError
from diffpo.config import Model
from diffpo.data.batches import Batches
from diffpo.data.groups import load_groups
from diffpo.data.transforms import pixels, views
from diffpo.export import export
from diffpo.models import qwen_image_edit
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning
from diffpo.train.loop import train
from diffpo.weights import lora_apply

SOURCE = "data.columns.source=before"
SIDE = {
    "kontext": 16,
    "flux2_klein": 64,
    "qwen_edit": 32,
    "qwen_edit_plus": 32,
    "longcat_edit": 32,
}  # FLUX.2's takes no smaller picture


@pytest.fixture
def edits(tmp_path):
    """Four pairs, each with the picture that both are edits of."""
    rows = [row | {"before": png(picture(100 + i))} for i, row in enumerate(pick_a_pic_rows(4))]
    return write_parquet(tmp_path / "edits.parquet", rows)


@pytest.fixture
def small(monkeypatch):
    """The text encoder of Plus sees 32 x 32 pixels in place of 384 x 384, ours and the pipeline's."""
    monkeypatch.setattr(qwen_image_edit, "SEEN", 32 * 32)
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", 32 * 32)


def conditions(family, captions, before):
    """Text and source of the captions for the picture ``before``, by hand."""
    (view,) = views([before.size], before.size, "center", False, torch.Generator())
    source = family.scale_latents(family.encode_image(pixels(before, view)[None])["mean"])
    pictures = [before] * len(captions)
    text = family.encode_edits(captions, pictures) if family.reads_source else family.encode_text(captions)
    return text | {"source": source.repeat(len(captions), 1, 1, 1)}


@torch.no_grad()
@pytest.mark.parametrize("name", list(SIDE))
def test_a_picture_is_edited_as_by_the_pipeline(editor, small, monkeypatch, name):
    """Its own sampler with three steps and guidance: noise and picture side by side, their places, the text that the
    encoder makes of instruction and picture, and the same latents in the end."""
    side = SIDE[name]
    family = models.load(Model(path=str(editor(name)), guidance=3.0), resolution=side)
    family.load_encoders()
    pipe = models.load_pipeline(str(editor(name)), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    before = picture(7, (side, side))
    noise = torch.randn(1, *family.latent_shape(pipe.transformer, side), generator=torch.Generator().manual_seed(0))
    options = type(family).painting(pipe, ["make it blue"], None, noise, 3.0) | {"image": before}
    if name == "kontext":
        options["_auto_resize"] = False
    # pictures are brought to 1024 x 1024 px: here to 32 x 32
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (side, side, None))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", side**2)
    monkeypatch.setattr(pipeline_longcat_image_edit, "calculate_dimensions", lambda area, ratio: (side, side))
    pictures, theirs, times, last = recorded(pipe, **options)
    cond = conditions(family, ["make it blue"], before)
    free = None if family.guidance_is_input else conditions(family, [None], before)
    policy = Policy(family, pipe.transformer)
    state, ours = sampled(policy, pipe.scheduler, times, noise, Conditioning(cond, free, 3.0))
    if free is None:
        compare(ours, theirs)
    found = type(family).unpacked(last, *noise.shape[-2:])
    torch.testing.assert_close(state, found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((family.decode(state) / 2 + 0.5).clamp(0, 1), pictures, rtol=1e-4, atol=1e-4)
    t = torch.tensor([500])
    out = family.predict(pipe.transformer, noise, t, cond)
    plain = family.predict(pipe.transformer, noise, t, {**cond, "source": torch.zeros_like(cond["source"])})
    assert out.shape == noise.shape and (out - plain).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("name", "crop"), [("kontext", "center"), ("kontext", "random"), ("qwen_edit", "center")])
def test_a_batch_has_the_pictures_that_its_images_are_edits_of(editor, make_config, edits, name, crop):
    """From the cache or not: the picture's latents without noise, for each member, and the text that the encoder makes
    of caption and picture."""
    family = models.load(Model(path=str(editor(name))), resolution=16)
    family.load_encoders()
    data = make_config(editor(name), SOURCE, f"data.crop={crop}", data=edits).data
    groups = load_groups(data, str(edits), "train")
    batches = Batches(groups, data, family)
    assert batches.cached == (crop == "center")
    cond = batches.batch([2, 0], [0, 1]).cond
    expected = [conditions(family, [group.captions[0]], picture(100 + group.row)) for group in groups.groups]
    empty = batches.unconditional(cond, [2, 0])
    absent = [conditions(family, [None], picture(100 + group.row)) for group in groups.groups]
    for found, wanted in ((cond, expected), (empty, absent)):
        assert found.keys() == wanted[0].keys()
        for key, value in found.items():
            rows = torch.cat([wanted[index][key] for index in (2, 0, 2, 0)])
            torch.testing.assert_close(value, rows, rtol=1e-4, atol=1e-4)
    if name == "qwen_edit":  # of one text and two pictures
        assert (empty["prompt_embeds"][0] - empty["prompt_embeds"][1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", list(SIDE))
def test_a_model_is_trained_on_edits(editor, small, make_config, edits, tmp_path, name):
    """Diffusion-DPO starts at u = 0 and moves. Qwen-Image-Edit's LoRA, loaded by the pipeline itself and by us, and
    merged, gives one network."""
    config = make_config(editor(name), SOURCE, "train.steps=2", "train.lr=1e-2", "objective.beta=500", data=edits)
    if name == "qwen_edit":
        check(config)
    train(config)
    first, second = metrics_of(config.output)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6) and first["grad_norm"] > 0
    assert second["error/chosen_delta"] != 0
    if name != "qwen_edit":
        return
    family = models.load(Model(path=str(editor(name))), resolution=16)
    family.load_encoders()
    theirs, ours = (models.load_pipeline(str(editor(name)), device="cpu") for _ in range(2))
    theirs.load_lora_weights(config.output)
    lora_apply.load_lora(ours, config.output)
    export.run(export.Export(config.output, "merged", str(editor(name)), tmp_path / "merged"))
    merged = models.load(Model(path=str(tmp_path / "merged")), resolution=16).load_network()
    cond, t = conditions(family, ["make it blue"], picture(3)), torch.tensor([500])
    x_t = torch.randn(1, *family.latent_shape(merged, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        networks = (family.load_network(), theirs.transformer, ours.transformer, merged)
        plain, *found = (family.predict(each, x_t, t, cond) for each in networks)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)
    assert (found[0] - plain).abs().max() > 1e-4


def test_what_is_computed_of_shapes_has_the_picture_to_edit(editor):
    family = models.load(Model(path=str(editor("qwen_edit"))), resolution=64)
    network = family.meta_network()
    x_t, t, cond = family.meta_inputs(network, 2, 64)
    assert cond["source"].shape == x_t.shape and cond["prompt_embeds"].shape[1] > 512
    assert family.predict(network, x_t, t, cond).shape == x_t.shape
    kontext = models.load(Model(path=str(editor("kontext"))), resolution=16)  # which also makes pictures of texts alone
    seen = ["source" in kontext.meta_inputs(kontext.meta_network(), 2, 16, source)[2] for source in (False, True)]
    assert seen == [False, True]


def test_a_source_is_of_the_images_size_and_for_models_that_edit(editor, tiny_sd, make_config, edits, tmp_path):
    with pytest.raises(DiffpoError, match=r"data\.columns\.source=before"):
        train(make_config(tiny_sd, SOURCE, "train.steps=1", data=edits))
    with pytest.raises(DiffpoError, match=r"each row needs one.*data\.columns\.source=COLUMN"):
        train(make_config(editor("qwen_edit"), "train.steps=1", data=edits))
    with pytest.raises(DiffpoError, match=r"training cannot start: .*data\.columns\.source=COLUMN"):
        check(make_config(editor("qwen_edit"), "train.steps=1", data=edits))
    with pytest.raises(DiffpoError, match=r"data\.flip=false"):
        train(make_config(editor("qwen_edit"), SOURCE, "data.flip=true", "train.steps=1", data=edits))
    rows = [row | {"before": png(picture(3, (24, 16)))} for row in pick_a_pic_rows(2)]
    other = write_parquet(tmp_path / "other.parquet", rows)
    with pytest.raises(DiffpoError, match=r"source differs in size.*24x16 and 16x16"):
        train(make_config(editor("kontext"), SOURCE, "train.steps=1", data=other))
    rows[1]["before"] = None
    lacking = write_parquet(tmp_path / "lacking.parquet", [row | {"before": None} for row in rows])
    with pytest.raises(DiffpoError, match="no picture that the images are edits of"):
        train(make_config(editor("kontext"), SOURCE, "train.steps=1", data=lacking))
