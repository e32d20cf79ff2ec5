"""On-policy objectives of models that edit: samples are made of the prompts' pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import ImageChops
from tiny import metrics_of, picture, png

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.common.instruction import Instruction
from diffpo.config import Model
from diffpo.data.prompts import load_prompts
from diffpo.data.transforms import pixels, shown, views
from diffpo.models import qwen_image_edit
from diffpo.rollout.prompts import PromptConditions
from diffpo.train.loop import train

SEEN = []  # (instruction, source, result) of everything that was judged


class Change:
    """The distance of a result from its source."""

    names = ("change",)

    def score(self, images, prompts):
        SEEN.extend((str(prompt), prompt.key, image.size) for prompt, image in zip(prompts, images, strict=True))
        pairs = [(image, prompt.open().resize(image.size)) for image, prompt in zip(images, prompts, strict=True)]
        return {"change": np.array([np.asarray(ImageChops.difference(*both), float).mean() for both in pairs])}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Two instructions about one picture, and one of them about another."""
    folder = tmp_path_factory.mktemp("instructions")
    lines = []
    for text, seed in (("make it blue", 1), ("brighter", 1), ("make it blue", 2)):
        picture(seed, (24, 16)).save(folder / f"{seed}.png")
        lines.append(json.dumps({"prompt": text, "before": f"{seed}.png"}))
    (folder / "edits.jsonl").write_text("\n".join(lines))
    return folder / "edits.jsonl"


@torch.no_grad()
@pytest.mark.parametrize("name", ["kontext", "qwen_edit"])
def test_conditions_have_the_picture_of_each_prompt(editor, table, make_config, name):
    family = models.load(Model(path=str(editor(name))), resolution=16)
    family.load_encoders()
    prompts = load_prompts(table, pictures="before")
    found = PromptConditions(prompts, make_config(editor(name)).data, family)([2, 0, 1], 2.0)
    for cond, absent in ((found.cond, False), (found.uncond, True)):
        for row, index in enumerate((2, 0, 1)):
            whole = prompts[index].open()
            (view,) = views([(24, 16)], (16, 16), "center", False, torch.Generator())
            caption = [None if absent else str(prompts[index])]
            edited = [[shown(whole, view)]]
            seen = family.encode_text(caption) if name == "kontext" else family.encode_edits(caption, edited)
            source = family.scale_latents(family.encode_image(pixels(whole, view)[None])["mean"])
            for key, value in (seen | {"source": source}).items():
                torch.testing.assert_close(cond[key][row : row + 1], value, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_conditions_have_all_pictures_of_each_prompt(editor, make_config, monkeypatch):
    """Two of each: the second prompt has those of the first in the other order."""
    monkeypatch.setattr(qwen_image_edit, "SEEN", 32 * 32)
    family = models.load(Model(path=str(editor("qwen_edit_plus"))), resolution=16)
    family.load_encoders()
    one, two, three = (png(picture(seed)) for seed in range(3))
    prompts = [Instruction("both", [one, two]), Instruction("both", [two, one]), Instruction("mix", [three, one])]
    found = PromptConditions(prompts, make_config(editor("qwen_edit_plus")).data, family)([1, 2], 1.0).cond
    for row, seeds in enumerate(((1, 0), (2, 0))):
        own = [picture(seed) for seed in seeds]
        levels = torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in own]) / 127.5 - 1
        wanted = family.encode_edits([str(prompts[row + 1])], [own])
        wanted["source"] = family.scale_latents(family.encode_image(levels)["mean"])[None]
        for key, value in wanted.items():
            torch.testing.assert_close(found[key][row : row + 1], value, rtol=1e-4, atol=1e-4)
    for name, given, said in (
        ("kontext", prompts, r"prompt 0 has 2 pictures.*takes one"),
        ("qwen_edit_plus", [*prompts, Instruction("one", one)], r"prompt 3 has 1 pictures to edit, and prompt 0 has 2"),
    ):
        with pytest.raises(DiffpoError, match=said):
            PromptConditions(given, make_config(editor(name)).data, models.load(Model(path=str(editor(name)))))


@pytest.mark.parametrize("name", ["kontext", "qwen_edit"])
def test_a_round_is_made_of_the_pictures_and_judged_beside_them(editor, table, make_config, name):
    settings = ("data.train=null", f"data.prompts={table}", "data.columns.source=before", "objective.name=online_dpo")
    rollout = ("prompts=3", "samples=2", "steps=2", "guidance=1.0", f"scorers=[{__name__}:Change]")
    chosen = [f"objective.rollout.{each}" for each in rollout]
    SEEN.clear()
    config = make_config(editor(name), *settings, *chosen, "train.steps=2", "train.lr=1e-2")
    train(config)
    first, second = metrics_of(config.output)
    assert first["grad_norm"] > 0 and first["error/chosen_delta"] == 0 != second["error/chosen_delta"]
    judged = {(text, key) for text, key, _ in SEEN}
    assert judged == {(str(each), each.key) for each in load_prompts(table, pictures="before")}
    if name == "kontext":  # it makes pictures from texts too
        return
    with pytest.raises(DiffpoError, match=r"edits pictures.*data\.columns\.source"):
        train(make_config(editor("qwen_edit"), *chosen, *settings, "data.columns.source=null", "output=runs/other"))
