"""Where the pictures of `diffpo annotate` come from, and what the command line says of the votes."""

import importlib.util
import json

import pytest
from annotated import cast, make_session, picture, vote, write_pairs
from PIL import Image, ImageChops
from typer.testing import CliRunner

from diffpo.annotate import export
from diffpo.annotate.assign import Plan
from diffpo.annotate.session import Session
from diffpo.annotate.tasks import Tasks, digest
from diffpo.cli import app
from diffpo.commands.annotate import Address, Shown, find, run, summary
from diffpo.common.errors import DiffpoError
from diffpo.config import Data
from diffpo.data.groups import load_groups


def arms(folder, *names, n=3):
    """A folder of `diffpo eval` with n pictures of each arm."""
    rows = []
    for a, arm in enumerate(names):
        (folder / "images" / arm).mkdir(parents=True)
        for k in range(n):
            picture(100 * a + k).save(folder / "images" / arm / f"{k:05d}_0.png")
            file = f"images/{arm}/{k:05d}_0.png"
            rows.append({"arm": arm, "index": k, "seed": 0, "prompt": f"prompt {k}", "file": file})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def named(tasks: Tasks):
    return sorted((task.prompt, *(each.name for each in task.pictures)) for task in tasks.all)


def test_the_arms_of_an_evaluation_are_compared_prompt_by_prompt(tmp_path):
    folder = arms(tmp_path / "eval", "base", "mine", "other")
    found = find(tmp_path / "votes", Shown(str(folder)))
    pairs = (("base", "mine"), ("base", "other"), ("mine", "other"))
    assert named(found) == sorted((f"prompt {k}", *pair) for k in range(3) for pair in pairs)
    sets = find(tmp_path / "votes", Shown(str(folder), show="sets", ask="ranking"))
    assert named(sets) == [(f"prompt {k}", "base", "mine", "other") for k in range(3)] and sets.ask == "ranking"


def test_arms_that_are_folders_are_named_as_in_eval(tmp_path):
    folder = arms(tmp_path / "eval", "base", "mine")
    specs = tuple(f"{name}={folder / 'images' / arm}" for name, arm in (("a", "base"), ("b", "mine")))
    found = find(tmp_path / "votes", Shown(arms=specs))
    assert named(found) == [(f"prompt {k}", "a", "b") for k in range(3)]


def test_pictures_of_one_folder_are_grouped_by_their_text(tmp_path):
    for k, text in enumerate(("a cat", "a cat", "a dog", "a cat")):
        picture(k).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(text)
    found = find(tmp_path / "votes", Shown(str(tmp_path)))
    assert [task.prompt for task in found.all] == ["a cat"] * 3 and found.left == ["1 prompts with one picture"]


def test_edits_are_shown_with_what_they_are_of_and_written_for_training(tmp_path):
    """From the manifest of a folder: one picture each, of another size, or two; and from rows by --source."""
    folder = arms(tmp_path / "eval", "base", "mine")
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    (folder / "sources").mkdir()
    for k in range(3):
        picture(500 + k, (48, 40)).save(folder / "sources" / f"{k}.png")

    def written(*sources):
        for row in rows:
            own = sources[row["index"]]
            row |= {"source": own, "source_hash": "+".join(own) if isinstance(own, list) else own}
        (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        out = tmp_path / f"votes-{type(sources[0]).__name__}"
        tasks = find(out, Shown(str(folder)))
        session = Session(out, tasks, Plan(repeat=0.0))
        tasks.save(out)
        for k, given in enumerate(session.next("ada", 3, [])["tasks"]):
            named = sources[int(given["prompt"][-1])]
            names = named if isinstance(named, list) else [named]
            assert [session.picture(key)[1] for key in given["sources"]] == [
                (folder / each).read_bytes() for each in names
            ]
            cast(session, given, 0, f"vote{k:08d}")
        export.run(out, out.with_suffix(".parquet"))
        data = Data(train=str(out.with_suffix(".parquet")), resolution=16, columns={"source": "source"})
        return load_groups(data, str(data.train), "train")

    one = written("sources/0.png", "sources/1.png", "sources/2.png")
    for index, group in enumerate(one.groups):  # cut to the size of the results
        k = int(group.captions[0][-1])
        wanted = picture(500 + k, (48, 40)).resize((24, 20), Image.Resampling.LANCZOS).crop((0, 2, 24, 18))
        assert ImageChops.difference(one.image(index, -1), wanted).getbbox() is None
    two = written(*[[f"sources/{k}.png", "sources/1.png"] for k in range(3)])
    assert len(two) == 3 and {len(group.sources) for group in two.groups} == {2}
    table = two.source
    tasks = find(tmp_path / "rows", Shown(table, before="source"))
    assert {task.sources[1].key for task in tasks.all} == {digest((folder / "sources" / "1.png").read_bytes())}
    assert Tasks.load(tmp_path / "votes-list").all[0].sources
    for shown, said in (
        (Shown(table, before="befor"), "befor"),
        (Shown(str(folder), before="source"), r"manifest\.jsonl"),
    ):
        with pytest.raises(DiffpoError, match=said):
            find(tmp_path / "refused", shown)


def test_a_model_makes_the_pictures_first_and_once(tiny_sd, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    making = {"model": str(tiny_sd), "steps": 2, "height": 16, "width": 16, "guidance": 1.0}
    shown = Shown(making=making, prompts=str(tmp_path / "prompts.txt"))
    found = find(tmp_path / "votes", shown)
    assert [(task.prompt, len(task.pictures)) for task in found.all] == [("a cat", 2), ("a dog", 2)]
    monkeypatch.setattr("diffpo.evaluation.generate.load", lambda *_: pytest.fail("made again"))
    assert find(tmp_path / "votes", shown).all == found.all


def test_what_cannot_be_shown_is_refused(tmp_path):
    folder = str(arms(tmp_path / "eval", "base", "mine"))
    (tmp_path / "empty").mkdir()
    wrong = [
        (Shown(), "--arm"),
        (Shown(folder, arms=("a=base",)), "--arm"),
        (Shown(arms=("a=base", "b=base"), making={"model": "x"}), "--prompts"),
        (Shown(str(tmp_path / "empty")), "empty"),
        (Shown(str(tmp_path / "none")), "none"),
    ]
    for shown, words in wrong:
        with pytest.raises(DiffpoError, match=words):
            find(tmp_path / "votes", shown)


def test_a_missing_extra_is_one_sentence_with_the_command(tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else there(name))
    with pytest.raises(DiffpoError, match=r"pip install 'diffpo\[annotate\]'"):
        run(tmp_path / "votes", Shown(), Plan(), Address())
    assert not (tmp_path / "votes").exists()


def test_export_votes_says_what_became_of_each_vote_and_how_far_people_agree(tmp_path):
    session = make_session(tmp_path / "votes", write_pairs(tmp_path / "pairs", 8), Plan(per_task=2, repeat=0.0))
    number = {task.id: k for k, task in enumerate(session.tasks.all)}
    for name in ("ada", "bob"):
        for given in session.next(name, 9, [])["tasks"]:
            k, uid = number[given["task"]], f"{name}-{given['task']}"
            if k == 7:
                session.record(vote(given["task"], None, uid, name))
            else:
                cast(session, given, int(name == "bob" and k == 0), uid, name, bad=False)
    found = CliRunner().invoke(app, ["export-votes", str(tmp_path / "votes"), "--out", str(tmp_path / "v.parquet")])
    assert found.exit_code == 0, found.output
    assert "7 rows of 16 votes" in found.output and "1 ties" in found.output and "2 skipped" in found.output
    # of 7 tasks both voted on they agree on 6; ada always says the first, so that chance alone gives as much
    assert "on 7 tasks" in found.output and "kappa 0.000" in found.output
    assert any("alpha" in line for line in summary(tmp_path / "votes"))
