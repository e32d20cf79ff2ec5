"""Votes as a scorer of an evaluation: their win rate, agreement with other scorers, and how many more are needed."""

import json
import shutil

import numpy as np
import pytest
from annotated import picture
from PIL import Image

from diffpo import scorers
from diffpo.annotate.assign import Plan
from diffpo.annotate.session import Session
from diffpo.commands.annotate import Shown, find
from diffpo.common.errors import DiffpoError
from diffpo.evaluation import evaluate, items, people, statistics
from diffpo.evaluation.scoring import Scoring

N = 12
VOTES = [1] * 7 + [0] * 3 + [None, "skip"]  # of prompt k: the arm that is preferred, a tie, or a skip
ARMS = ("base", "tuned")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two arms of N prompts; the red of a tuned picture is brighter for even prompts."""
    folder = tmp_path_factory.mktemp("people")
    rows = []
    for a, arm in enumerate(ARMS):
        (folder / "images" / arm).mkdir(parents=True)
        for k in range(N):
            pixels = np.asarray(picture(2 * k + a)).copy()
            pixels[..., 0] = 200 if (k % 2 == 0) == (a == 1) else 100
            name = f"images/{arm}/{k:05d}_0.png"
            Image.fromarray(pixels).save(folder / name)
            rows.append({"arm": arm, "index": k, "seed": 0, "prompt": f"prompt {k}", "file": name})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def votes(folder, tmp_path_factory):
    """The folder of the votes `VOTES`, each given twice, and two of them once more the other way as repetitions."""
    out = tmp_path_factory.mktemp("votes")
    tasks = find(out, Shown(str(folder)))
    tasks.save(out)
    session = Session(out, tasks, Plan(per_task=2, repeat=0.3))
    for name in ("ada", "bob"):
        while given := session.next(name, 1, [])["tasks"]:
            (task,) = given
            said = VOTES[int(task["prompt"].split()[1])]
            arms = {each.key: each.name for each in session.tasks.by_id[task["task"]].pictures}
            wanted = None if said in (None, "skip") else ARMS[1 - said if task["repeat"] else said]
            ranks = [1 if wanted is None or arms[key] == wanted else 2 for key in task["pictures"]]
            event = {"kind": "vote", "uid": f"{name}-{task['task']}-{task['repeat']}", "annotator": name}
            event |= {"task": task["task"], "repeat": task["repeat"], "ms": 1, "bad": said is None}
            session.record(event | {"ranks": None if said == "skip" else ranks})
    return out


class Red:
    """Mean red, as a scorer of one's own."""

    names = ("red",)
    optional = frozenset()

    def score(self, images, prompts):
        return {"red": np.array([np.asarray(image)[..., 0].mean() for image in images])}


@pytest.fixture(scope="module")
def found(folder, votes, tmp_path_factory):
    scoring = Scoring((f"votes={votes}", "test_people:Red"))
    return evaluate.run(tmp_path_factory.mktemp("eval"), folder, scoring=scoring)


def test_the_win_rate_is_that_of_the_votes_by_prompt(found):
    row = found.row("votes")
    base = np.array([0.0 if said == 1 else 1.0 if said == 0 else 0.5 for said in VOTES[:-1]])
    exact = statistics.win_rate(base, 1 - base, np.arange(N - 1))
    assert row.n == N - 1 and row.win_rate == exact and exact.value == pytest.approx(7.5 / 11)
    assert found.primary == "votes"


def test_agreement_with_another_scorer(found):
    (agreement,) = people.agreements(found)
    agree = [(k % 2 == 0) == (VOTES[k] == 1) for k in range(10)]  # the tie and the skip name no winner
    assert (agreement.scorer, agreement.n) == ("red", 10) and agreement.rate.value == pytest.approx(np.mean(agree))
    assert (agreement.rate.low, agreement.rate.high) == pytest.approx(statistics.wilson(sum(agree), 10))
    tuned, red = 7 / 10, 5 / 10
    chance = tuned * red + (1 - tuned) * (1 - red)
    assert agreement.kappa == pytest.approx((np.mean(agree) - chance) / (1 - chance))


def test_how_many_more_prompts_are_needed(found):
    (needed,) = people.needed(found)
    base = np.array([0.0 if said == 1 else 1.0 if said == 0 else 0.5 for said in VOTES[:-1]])
    assert needed.more == statistics.needed_more(base, 1 - base, np.arange(N - 1)) > 0 and needed.prompts == N - 1
    summary = json.loads(found.files["summary.json"].read_text())
    assert summary["people"]["needed"][0]["more"] == needed.more
    assert summary["people"]["agreements"][0]["n"] == 10
    assert f"{needed.more} more" in " ".join(people.lines(found))
    assert "agrees with the votes" in found.files["report.html"].read_text()


def test_without_votes_nothing_is_said_of_people(folder, tmp_path):
    found = evaluate.run(tmp_path, folder, scoring=Scoring(("test_people:Red",)))
    assert people.agreements(found) == people.needed(found) == people.lines(found) == []


def test_pictures_are_known_by_their_pixels_and_prompt(folder, votes):
    scorer = scorers.load(f"votes={votes}")
    image = Image.open(folder / "images/tuned/00000_0.png")
    again = Image.open(folder / "images/tuned/00000_0.png").convert("RGBA")  # another file of the same pixels
    values = scorer.score([image, again, image, picture(0)], ["prompt 0", "prompt 0", "prompt 1", "prompt 0"])["votes"]
    assert values[:2].tolist() == [1, 1] and np.isnan(values[2:]).all()


def test_kept_scores_of_fewer_votes_are_not_used_again(folder, votes, tmp_path):
    from diffpo.annotate.store import Event, Store
    from diffpo.evaluation.scoring import score_items

    shutil.copytree(votes, tmp_path / "votes")
    compared = items.joined({arm: items.of_folder(folder / "images" / arm, None, []) for arm in ARMS}, None, None, [])
    scoring = Scoring((f"votes={tmp_path / 'votes'}",))
    before = score_items(compared, ARMS, scoring, tmp_path / "eval").values["votes"]["tuned"]
    store = Store(tmp_path / "votes")
    first = next(vote for vote in store.votes() if vote.ranks and vote.ranks[0] != vote.ranks[1])
    store.add(Event("undo-of-it", first.annotator, "undo", first.task, {"of": first.uid}))
    body = {"ranks": [*first.ranks[::-1]], "bad": False, "repeat": 0, "order": [0, 1], "ms": 1}
    store.add(Event("other-way", first.annotator, "vote", first.task, body))
    store.close()
    after = score_items(compared, ARMS, scoring, tmp_path / "eval").values["votes"]["tuned"]
    assert np.nansum(before != after) - np.isnan(before).sum() == 1 and 0.5 in after  # one of two votes is another


def test_a_folder_without_votes_is_refused(tmp_path):
    with pytest.raises(DiffpoError, match="votes=FOLDER"):
        scorers.load("votes")
    with pytest.raises(DiffpoError, match="none"):
        scorers.load(f"votes={tmp_path / 'none'}")
