"""Models that edit pictures: pairs with the picture that they are edits of, and pictures that are made of others."""

import json
import math

import numpy as np
import pytest
import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from pipeline_calls import compare, recorded, sampled
from tiny import metrics_of, pick_a_pic_rows, picture, png, write_parquet

from diffpo import models
from diffpo.commands.check import check
from diffpo.common.errors import DiffpoError
from diffpo.config import Model
from diffpo.data.batches import Batches
from diffpo.data.groups import load_groups
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
    "flux2": 64,
    "qwen_edit": 32,
    "qwen_edit_plus": 32,
    "longcat_edit": 32,
    "qwen_image21": 64,
}  # FLUX.2 takes no smaller picture
SEVERAL = ("flux2_klein", "flux2", "qwen_edit_plus", "qwen_image21")


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


def conditions(family, captions, *before):
    """Text and source of the captions for the pictures ``before``, by hand."""
    levels = torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in before]) / 127.5 - 1
    sources = family.scale_latents(family.encode_image(levels)["mean"])
    source = sources if len(before) == 1 else sources[None]
    pictures = [before] * len(captions)
    text = family.encode_edits(captions, pictures) if family.reads_source else family.encode_text(captions)
    return text | {"source": source.repeat(len(captions), *[1] * (source.ndim - 1))}


@torch.no_grad()
@pytest.mark.parametrize(("name", "number"), [*((name, 1) for name in SIDE), *((name, 2) for name in SEVERAL)])
def test_pictures_are_edited_as_by_the_pipeline(editor, small, monkeypatch, name, number):
    """One, or two. Its own sampler with three steps and guidance: noise and pictures side by side, their places, the
    text that the encoder makes of instruction and pictures, and the same latents in the end."""
    side = SIDE[name]
    family = models.load(Model(path=str(editor(name)), guidance=3.0), resolution=side)
    family.load_encoders()
    pipe = models.load_pipeline(str(editor(name)), device="cpu")
    pipe.set_progress_bar_config(disable=True)
    before = [picture(7 + k, (side, side)) for k in range(number)]
    noise = torch.randn(1, *family.latent_shape(pipe.transformer, side), generator=torch.Generator().manual_seed(0))
    options = type(family).painting(pipe, ["make it blue"], None, noise, 3.0)
    options["image"] = before if number > 1 else before[0]
    options |= {"kontext": {"_auto_resize": False}, "qwen_image21": {"output_resolution": side}}.get(name, {})
    # pictures are brought to 1024 x 1024 px: here to 32 x 32
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (side, side, None))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", side**2)
    monkeypatch.setattr(pipeline_longcat_image_edit, "calculate_dimensions", lambda area, ratio: (side, side))
    pictures, theirs, times, last = recorded(pipe, **options)
    cond = conditions(family, ["make it blue"], *before)
    free = None if family.guidance_is_input else conditions(family, [None], *before)
    policy = Policy(family, pipe.transformer)
    state, ours = sampled(policy, pipe.scheduler, times, noise, Conditioning(cond, free, 3.0))
    if free is None:
        compare(ours, theirs)
    found = type(family).unpacked(last, *noise.shape[-2:])
    torch.testing.assert_close(state, found, rtol=1e-5, atol=1e-5)
    if pictures.shape[1] == 4:  # on white
        pictures = pictures[:, :3] * pictures[:, 3:] + 1 - pictures[:, 3:]
    torch.testing.assert_close((family.decode(state) / 2 + 0.5).clamp(0, 1), pictures, rtol=1e-4, atol=1e-4)
    t = torch.tensor([500])
    out = family.predict(pipe.transformer, noise, t, cond)
    plain = family.predict(pipe.transformer, noise, t, {**cond, "source": torch.zeros_like(cond["source"])})
    assert out.shape == noise.shape and (out - plain).abs().max() > 1e-3
    if number > 1:  # their order counts
        swapped = family.predict(pipe.transformer, noise, t, {**cond, "source": cond["source"].flip(1)})
        assert (out - swapped).abs().max() > 3e-5  # the pipeline agrees to 1e-5


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


def rows_of_two(sizes=((16, 16), (24, 32)), n=4):
    """Pairs, each with two pictures that both are made of."""
    pictures = [[picture(100 + 10 * i + k, size) for k, size in enumerate(sizes)] for i in range(n)]
    return pictures, [
        row | {"before": list(map(png, own))} for row, own in zip(pick_a_pic_rows(n), pictures, strict=True)
    ]


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux2_klein", "qwen_edit_plus"])
def test_a_batch_has_all_pictures_of_its_rows(editor, small, make_config, tmp_path, name):
    """In their order, each scaled to the images' size and cut at the middle, from the cache; text and latents."""
    pictures, rows = rows_of_two()
    table = write_parquet(tmp_path / "two.parquet", rows)
    family = models.load(Model(path=str(editor(name))), resolution=16)
    family.load_encoders()
    data = make_config(editor(name), SOURCE, data=table).data
    batches = Batches(load_groups(data, str(table), "train"), data, family)
    cond = batches.batch([2, 0], [0, 1]).cond
    cut = [(a, b.resize((16, 21), Image.Resampling.LANCZOS).crop((0, 2, 16, 18))) for a, b in pictures]
    captions = [group.captions[0] for group in batches.groups.groups]
    for found, texts in ((cond, captions), (batches.unconditional(cond, [2, 0]), [None] * 4)):
        wanted = [conditions(family, [texts[index]], *cut[index]) for index in (2, 0, 2, 0)]
        assert found["source"].shape[:2] == (4, 2)
        for key, value in found.items():
            torch.testing.assert_close(value, torch.cat([each[key] for each in wanted]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pictures_of_one_size_are_cropped_alike(editor, make_config, tmp_path):
    """A random crop shows the same part of all pictures of a row: one of 17, and not the middle each time."""
    wide = picture(5, (32, 16))
    new = {"jpg_0": png(wide), "jpg_1": png(picture(6, (32, 16))), "before": [png(wide)] * 2}
    rows = [row | new for row in pick_a_pic_rows(4)]
    table = write_parquet(tmp_path / "same.parquet", rows)
    family = models.load(Model(path=str(editor("flux2_klein"))), resolution=16)
    family.load_encoders()
    data = make_config(editor("flux2_klein"), SOURCE, "data.crop=random", data=table).data
    source = Batches(load_groups(data, str(table), "train"), data, family).batch(range(4), range(4)).cond["source"]
    torch.testing.assert_close(source[:, 0], source[:, 1])
    parts = torch.stack([conditions(family, [None], wide.crop((k, 0, k + 16, 16)))["source"][0] for k in range(17)])
    distance = (source[:4, :1] - parts[None]).abs().amax((2, 3, 4))
    assert distance.amin(1).max() < 1e-4 and {*distance.argmin(1).tolist()} != {8}


@pytest.mark.parametrize("name", ["flux2_klein", "qwen_edit_plus"])
def test_a_model_is_trained_on_edits_of_two_pictures(editor, small, make_config, tmp_path, name):
    """From parquet, or from a folder whose metadata.jsonl names the files in a list. `diffpo check` counts them."""
    pictures, rows = rows_of_two()
    table = tmp_path / "two"
    if name == "flux2_klein":
        table.mkdir()
        for i, (row, own) in enumerate(zip(rows, pictures, strict=True)):
            files = {"jpg_0": row["jpg_0"], "jpg_1": row["jpg_1"], **{str(k): png(each) for k, each in enumerate(own)}}
            for key, encoded in files.items():
                (table / f"{i}-{key}.png").write_bytes(encoded)
            row |= {"jpg_0": f"{i}-jpg_0.png", "jpg_1": f"{i}-jpg_1.png", "before": [f"{i}-0.png", f"{i}-1.png"]}
        (table / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    else:
        table = write_parquet(tmp_path / "two.parquet", rows)
    config = make_config(editor(name), SOURCE, "train.steps=2", "train.lr=1e-2", "objective.beta=500", data=table)
    check(config)
    train(config)
    first, second = metrics_of(config.output)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6) and first["grad_norm"] > 0
    assert second["error/chosen_delta"] != 0


@pytest.mark.parametrize("name", list(SIDE))
def test_a_model_is_trained_on_edits(editor, small, make_config, edits, tmp_path, name):
    """Diffusion-DPO starts at u = 0 and moves. Qwen-Image-Edit's LoRA, loaded by the pipeline itself and by us, and
    merged, gives one network."""
    settings = (SOURCE, "train.steps=2", "train.lr=1e-2", "objective.beta=500")
    settings += ("data.resolution=32",) if name == "qwen_image21" else ()
    config = make_config(editor(name), *settings, data=edits)
    if name in ("qwen_edit", "qwen_image21"):
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
    plus = models.load(Model(path=str(editor("qwen_edit_plus"))), resolution=64)
    one, two = (plus.meta_inputs(plus.meta_network(), 2, 64, number)[2] for number in (1, 2))
    assert two["source"].shape == (2, 2, *one["source"].shape[1:])
    tokens = [each["prompt_embeds"].shape[1] for each in (one, two)]
    assert tokens[1] - tokens[0] == 64 + math.ceil(1.125 * 384**2 / 28**2)  # templates, and a picture


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
    _, rows = rows_of_two()
    two = write_parquet(tmp_path / "two.parquet", rows)
    for run in (train, check):
        with pytest.raises(DiffpoError, match=r"two\.parquet: row 0 has 2 pictures to edit.*takes one"):
            run(make_config(editor("kontext"), SOURCE, "train.steps=1", data=two))
    rows[2]["before"] = rows[2]["before"][:1]
    uneven = write_parquet(tmp_path / "uneven.parquet", rows)
    for run in (train, check):
        with pytest.raises(DiffpoError, match=r"row 2 has 1 pictures to edit, and row 0 has 2"):
            run(make_config(editor("flux2_klein"), SOURCE, "train.steps=1", data=uneven))
    rows[2]["before"] = [rows[2]["before"][0], b"no picture"]
    broken = write_parquet(tmp_path / "broken.parquet", rows)
    with pytest.raises(DiffpoError, match=r"row 2.*before\[1\]"):
        train(make_config(editor("flux2_klein"), SOURCE, "train.steps=1", data=broken))
    rows[1]["before"] = None
    lacking = write_parquet(tmp_path / "lacking.parquet", [row | {"before": None} for row in rows])
    with pytest.raises(DiffpoError, match="no picture that the images are edits of"):
        train(make_config(editor("kontext"), SOURCE, "train.steps=1", data=lacking))
