"""Pictures that are made of other pictures: generate, eval and label with models that edit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image, ImageChops
from tiny import picture, png, write_parquet

import diffpo
from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.common.instruction import Instruction
from diffpo.config import Data
from diffpo.data.groups import load_groups
from diffpo.data.prompts import load_prompts
from diffpo.evaluation import evaluate, generate, items
from diffpo.evaluation.generation import Generation
from diffpo.evaluation.scoring import Scoring
from diffpo.labelling import label

FAST = {"steps": 2, "guidance": 2.0, "device": "cpu", "height": 32, "width": 16}


class Changed:
    """How far a result is from the picture that it was made of, mean over the pixels in 0..255."""

    names = ("changed",)

    def score(self, images, prompts):
        pairs = [(image, prompt.open().resize(image.size)) for image, prompt in zip(images, prompts, strict=True)]
        return {"changed": np.array([distance(one, other) for one, other in pairs])}


def row_of(grid, picture):
    """Where in a grid the ``picture`` begins from above, of four times its size."""
    shown = np.asarray(picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.NEAREST))
    whole, (height, width) = np.asarray(grid), shown.shape[:2]
    for top, left in zip(*np.nonzero((whole == shown[0, 0]).all(-1)), strict=True):
        part = whole[top : top + height, left : left + width]
        if part.shape == shown.shape and (part == shown).all():
            return top
    raise AssertionError("the picture is not there")


def distance(one, other):
    return float(np.asarray(ImageChops.difference(one, other), np.float64).mean())


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """One instruction for two pictures, and another: files beside the table."""
    folder = tmp_path_factory.mktemp("prompts")
    lines = []
    for i, text in enumerate(("make it blue", "make it blue", "brighter")):
        picture(50 + i, (40, 32)).save(folder / f"{i}.png")
        lines.append(json.dumps({"prompt": text, "before": f"{i}.png"}))
    (folder / "edits.jsonl").write_text("\n".join(lines))
    return load_prompts(folder / "edits.jsonl", pictures="before")


@pytest.fixture(scope="module")
def made(editor, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("edited")
    return out, generate.run(Generation(editor("kontext"), batch_size=3, **FAST).arms(), prompts, out)


def test_prompts_bring_their_pictures(prompts, tmp_path):
    """From files and from bytes in a table; equal texts about different pictures are different prompts."""
    assert [str(each) for each in prompts] == ["make it blue", "make it blue", "brighter"]
    assert len(set(prompts)) == 3 and prompts[0] != "make it blue"
    for i, prompt in enumerate(prompts):
        assert ImageChops.difference(prompt.open(), picture(50 + i, (40, 32))).getbbox() is None
    rows = [{"caption": str(each), "before": png(each.open())} for each in prompts]
    table = load_prompts(write_parquet(tmp_path / "edits.parquet", rows), 2, pictures="before")
    assert table == prompts[:2]
    for given, said in (
        ("shapes:heldout:4", r"shapes:heldout:4 has no column 'before'"),
        (tmp_path / "edits.parquet", r"no column 'after'"),
    ):
        with pytest.raises(DiffpoError, match=said):
            load_prompts(given, pictures="before" if "shapes" in str(given) else "after")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "before": "none.png"}')
    with pytest.raises(DiffpoError, match=r"bad.jsonl:1.*none\.png"):
        load_prompts(tmp_path / "bad.jsonl", pictures="before")


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["kontext", "flux2_klein", "qwen_edit", "qwen_edit_plus", "longcat_edit", "qwen_image21"]
)
def test_a_picture_is_what_the_pipeline_makes_of_its_source(editor, prompts, made, tmp_path, monkeypatch, name):
    """The source is scaled to the result's size and cut at the middle, as in training."""
    # what they take: FLUX.2 no smaller pictures, Qwen-Image 2.1 multiples of 32 px
    size = {"flux2_klein": (64, 64), "qwen_image21": (32, 32)}.get(name, (16, 32))
    size = dict(zip(("width", "height"), size, strict=True))
    making = Generation(editor(name), **FAST | size)
    if name == "kontext":
        out, rows = made
    else:
        out = tmp_path
        rows = generate.run(making.arms(), prompts[:2], out)
    prompt = prompts[1]
    pipe = generate.load(making)
    family = models.built_in()[type(pipe).__name__]
    channels = family.latent_channels(pipe.transformer.config)
    factor = models.vae_factor(pipe)
    noise, generator = generate.initial_noise((channels, size["height"] // factor, size["width"] // factor), 0, 1)
    options = family.painting(pipe, [str(prompt)], None, noise[None], 2.0)
    source = prompt.open().resize((40, 32)).crop((12, 0, 28, 32))
    if name == "flux2_klein":
        source = prompt.open().resize((80, 64), Image.Resampling.LANCZOS).crop((8, 0, 72, 64))
    if name == "qwen_image21":
        source = prompt.open().resize((40, 32)).crop((4, 0, 36, 32))
    options |= {"kontext": {"_auto_resize": False}, "qwen_image21": {"output_resolution": 32}}.get(name, {})
    # the others' pipelines bring pictures to 1024 x 1024 px
    monkeypatch.setattr(pipeline_longcat_image_edit, "calculate_dimensions", lambda area, ratio: (16, 32))
    own, large = pipeline_qwenimage_edit_plus.calculate_dimensions, pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (16, 32, None))
    monkeypatch.setattr(
        pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda a, r: (16, 32) if a == large else own(a, r)
    )
    expected = pipe(image=source, **options, generator=[generator], num_inference_steps=2).images[0]
    with Image.open(out / rows[1]["file"]) as found, Image.open(out / rows[0]["file"]) as other:
        assert found.mode == expected.mode == ("RGBA" if name == "qwen_image21" else "RGB")
        assert found.size == (size["width"], size["height"])
        assert max(high for _, high in ImageChops.difference(found, expected).getextrema()) <= 1
        assert distance(found, other) > 0


class First:
    """How far a result is from the first picture that it was made of, and from the second."""

    names = ("first", "second")

    def score(self, images, prompts):
        rows = [
            [distance(image, each.resize(image.size)) for each in prompt.pictures()]
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return dict(zip(self.names, np.array(rows).T, strict=True))


@pytest.fixture(scope="module")
def several(editor, tmp_path_factory):
    """Two prompts with two pictures each, those of the second in the other order; and pictures made of them."""
    folder = tmp_path_factory.mktemp("several")
    for k in range(2):
        picture(70 + k, (40, 32) if k else (64, 64)).save(folder / f"{k}.png")
    lines = [{"prompt": "put both together", "before": ["0.png", "1.png"]}]
    lines.append(lines[0] | {"before": ["1.png", "0.png"]})
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = load_prompts(folder / "edits.jsonl", pictures="before")
    making = Generation(editor("flux2_klein"), images_per_prompt=2, **FAST | {"width": 64, "height": 64})
    return prompts, making, folder / "out", generate.run(making.arms(), prompts, folder / "out")


@torch.no_grad()
def test_a_picture_is_made_of_several(several):
    """The pipeline's own, of both pictures in their order, each scaled and cut to the size of the result."""
    prompts, making, out, rows = several
    assert len(set(prompts)) == 2 and len(list((out / "sources").iterdir())) == 2
    first, second = ([out / each for each in row["source"]] for row in (rows[0], rows[2]))
    assert first == second[::-1] and [Image.open(each).size for each in first] == [(64, 64), (40, 32)]
    pipe = generate.load(making)
    family = models.built_in()[type(pipe).__name__]
    noise, generator = generate.initial_noise((16, 16, 16), 0, 0)
    options = family.painting(pipe, ["put both together"], None, noise[None], 2.0)
    wide = picture(71, (40, 32)).resize((80, 64), Image.Resampling.LANCZOS).crop((8, 0, 72, 64))
    given = [picture(70, (64, 64)), wide]
    expected = pipe(image=given, **options, generator=[generator], num_inference_steps=2).images[0]
    with Image.open(out / rows[0]["file"]) as found, Image.open(out / rows[2]["file"]) as other:
        assert max(high for _, high in ImageChops.difference(found, expected).getextrema()) <= 1
        assert distance(found, other) > 0


def test_several_pictures_are_found_again_scored_and_labelled(several, tmp_path):
    """From the manifest alone: items, `diffpo score` of the folder and of an arm's, eval, and labels to train on."""
    prompts, _, out, rows = several
    found = sorted(items.of_folder(out, None, []))
    assert [each.prompt for each in found] == [prompts[k] for k in (0, 0, 1, 1)]
    own = [First().score([Image.open(out / row["file"])], [prompts[row["index"]]]) for row in rows]
    for source in (out, out / "images" / "base"):
        table = diffpo.score(source, tmp_path / source.name, scorers=[f"{__name__}:First"]).table().to_pydict()
        scored = {(Path(k).name, n): v for k, n, v in zip(*map(table.get, ("key", "scorer", "value")), strict=True)}
        for row, values in zip(rows, own, strict=True):
            for name, (value,) in values.items():
                assert scored[Path(row["file"]).name, name] == pytest.approx(value)
    evaluate.run(
        tmp_path / "eval", {"one": out, "two": out / "images" / "base"}, scoring=Scoring((f"{__name__}:First",))
    )
    labels = label.run(tmp_path / "labels", {"base": out}, label.Labelling((f"{__name__}:First.second",)), None)
    data = Data(train=str(labels.path), resolution=64, columns={"source": "source"}, cache=str(tmp_path))
    groups = load_groups(data, str(labels.path), "train")
    assert len(groups) == 2 and all(len(group.sources) == 2 for group in groups.groups)
    assert groups.groups[0].sources == groups.groups[1].sources[::-1]


def test_a_folder_of_edits_is_continued_and_names_its_sources(editor, prompts, made, tmp_path):
    out, rows = made
    before = {row["file"]: row["sha256"] for row in rows}
    assert len(set(before.values())) == 3
    (out / rows[2]["file"]).unlink()
    again = generate.run(Generation(editor("kontext"), batch_size=1, **FAST).arms(), prompts, out)
    assert {row["file"]: row["sha256"] for row in again} == before
    found = sorted(items.of_folder(out, None, []))
    assert [each.prompt for each in found] == prompts
    for each, prompt in zip(found, prompts, strict=True):
        assert ImageChops.difference(each.prompt.open(), prompt.open()).getbbox() is None
    other = [prompts[1], prompts[0], prompts[2]]
    with pytest.raises(DiffpoError, match="source_hash"):
        generate.run(Generation(editor("kontext"), **FAST).arms(), other, out)


def test_models_and_prompts_that_do_not_fit_are_refused(editor, tiny_sd, prompts, tmp_path):
    with pytest.raises(DiffpoError, match=r"from texts alone.*--source"):
        generate.run(Generation(tiny_sd, **FAST).arms(), prompts, tmp_path / "one")
    two = [prompts[0], Instruction("both", [png(prompts[0].open())] * 2)]
    with pytest.raises(DiffpoError, match=r"one picture.*prompt 1 \('both'\) has 2"):
        generate.run(Generation(editor("kontext"), **FAST).arms(), two, tmp_path / "three")
    with pytest.raises(DiffpoError, match=r"edits pictures.*--source COLUMN"):
        generate.run(Generation(editor("qwen_edit"), **FAST).arms(), ["a cat"], tmp_path / "two")


def test_scorers_are_given_the_source(made, prompts, tmp_path):
    """eval of two folders: the number of each picture is that of its own source, though two texts are equal."""
    out, rows = made
    arms = {"one": out / "images" / "base", "two": tmp_path / "two"}
    arms["two"].mkdir()
    for i in range(3):
        prompts[i].open().resize((16, 32)).save(arms["two"] / f"{i:05d}_0.png")
    found = evaluate.run(tmp_path / "eval", arms, prompts, scoring=Scoring((f"{__name__}:Changed",)))
    assert [item.prompt for item in found.items] == prompts
    row = found.rows[0]
    expected = [
        distance(Image.open(out / r["file"]), p.open().resize((16, 32))) for r, p in zip(rows, prompts, strict=True)
    ]
    grid = Image.open(tmp_path / "eval" / "grid.png").convert("RGB")
    assert row_of(grid, prompts[0].open()) < grid.height / 3
    assert row.base == pytest.approx(np.mean(expected)) and row.tuned == pytest.approx(0)


def test_labels_of_edits_are_pairs_to_train_on(editor, prompts, tmp_path):
    """Two results of each picture, not of each text; the table has the source at the size of the results."""
    making = Generation(editor("kontext"), images_per_prompt=2, **FAST)
    found = label.run(tmp_path / "labels", {"base": making}, label.Labelling((f"{__name__}:Changed",)), prompts)
    assert found.counts["prompts"] == found.counts["rows"] == 3
    data = Data(train=str(found.path), resolution=16, columns={"source": "source"}, cache=str(tmp_path))
    groups = load_groups(data, str(found.path), "train")
    assert len(groups) == 3 and len({group.source for group in groups.groups}) == 3
    for index, group in enumerate(groups.groups):
        source, better, worse = groups.image(index, -1), *groups.images(index)
        assert source.size == better.size == group.size
        assert group.captions[0] == str(prompts[index])
        whole = prompts[index].open().resize((16, 32))
        assert distance(better, whole) > distance(worse, whole)
