"""What becomes a task: pairs, lists, single pictures, and what is refused."""

import json

import pytest
from annotated import picture, png, write_pairs, write_table

from diffpo.annotate import rows
from diffpo.annotate.tasks import Group, Picture, Tasks, make
from diffpo.common.errors import DiffpoError
from diffpo.common.images import BadRow


def of(source, show=None):
    return rows.of_rows(str(source), "train", show)


def bytes_of(tasks):
    return [[tasks.content(picture) for picture in task.pictures] for task in tasks.all]


def test_pairs_of_files_parquet_and_folders_hold_the_bytes_of_their_pictures(tmp_path):
    files = of(write_pairs(tmp_path / "a", 3))
    expected = [[(tmp_path / "a" / f"{k}-{side}.png").read_bytes() for side in (0, 1)] for k in range(3)]
    assert bytes_of(files) == expected and [task.prompt for task in files.all] == ["prompt 0", "prompt 1", "prompt 2"]
    table = [{"caption": f"prompt {k}", "jpg_0": a, "jpg_1": b} for k, (a, b) in enumerate(expected)]
    parquet = of(write_table(tmp_path / "b.parquet", table))
    assert bytes_of(parquet) == expected and [t.id for t in parquet.all] == [t.id for t in files.all]  # of the content
    for side, name in enumerate(("chosen", "rejected")):
        (tmp_path / "c" / name).mkdir(parents=True)
        for k in range(3):
            (tmp_path / "c" / name / f"{k}.png").write_bytes(expected[k][side])
            (tmp_path / "c" / name / f"{k}.txt").write_text(f"prompt {k}")
    assert bytes_of(of(tmp_path / "c")) == expected


def test_lists_are_shown_at_once_or_as_all_their_pairs(tmp_path):
    images = [png(picture(k)) for k in range(4)]
    source = write_table(tmp_path / "lists.parquet", [{"prompt": "x", "images": images, "ranks": [1.0, 2.0, 3.0, 4.0]}])
    assert bytes_of(of(source)) == [images] and of(source).show == "sets"
    pairs = bytes_of(of(source, "pairs"))
    assert sorted(map(tuple, pairs)) == sorted((images[a], images[b]) for a in range(4) for b in range(a + 1, 4))


def test_single_pictures_of_one_prompt_belong_together(tmp_path):
    table = [{"prompt": prompt, "image": png(picture(k))} for k, prompt in enumerate("ababcb")]
    tasks = of(write_table(tmp_path / "singles.parquet", table))
    assert sorted(task.prompt for task in tasks.all) == ["a", "b", "b", "b"]  # 1 pair of two, 3 of three
    assert tasks.left == ["1 prompts with one picture"]


def test_labels_and_scores_say_what_is_uncertain(tmp_path):
    images = [png(picture(k)) for k in range(8)]
    table = [{"prompt": f"{k}", "jpg_0": images[2 * k], "jpg_1": images[2 * k + 1]} for k in range(4)]
    labels = [1.0, 0.5, 0.3, 0.0]
    labelled = [row | {"label_0": label} for row, label in zip(table, labels, strict=True)]
    found = of(write_table(tmp_path / "labels.parquet", labelled))
    assert [task.prior for task in found.all] == pytest.approx([0.95, 0.5, 0.3, 0.05])
    scores = [(3.0, 1.0), (5.0, 5.0), (0.0, 2.0), (1.0, 7.0)]  # the median difference is 2
    scored = [row | {"score_0": a, "score_1": b} for row, (a, b) in zip(table, scores, strict=True)]
    found = of(write_table(tmp_path / "scores.parquet", scored))
    assert [task.prior for task in found.all] == pytest.approx([0.731059, 0.5, 0.268941, 0.047426], abs=1e-6)


def test_equal_pictures_and_tasks_that_are_there_twice_are_counted():
    a, b, c = (Picture(name, name) for name in "abc")
    tasks, left = make([Group("x", (a, a)), Group("x", (a, b)), Group("x", (a, b)), Group("y", (a, b, c))], "pairs")
    assert len(tasks) == 4 and left == ["1 of identical pictures", "1 that are there twice"]
    with pytest.raises(DiffpoError, match="10 pictures"):
        make([Group("many", tuple(Picture(str(k), "") for k in range(10)))], "sets")


def test_a_picture_outside_the_folder_is_refused_by_name_link_or_dots(tmp_path):
    source = write_pairs(tmp_path / "a", 1)
    picture(50).save(tmp_path / "secret.png")
    (tmp_path / "a" / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "/etc/passwd", "file:///etc/passwd"):
        source.write_text(json.dumps({"prompt": "x", "image_0": "0-0.png", "image_1": name}))
        with pytest.raises(DiffpoError, match="row 0"):
            of(source)


def test_a_link_that_appears_later_is_not_followed(tmp_path):
    tasks = of(write_pairs(tmp_path / "a", 1))
    picture(50).save(tmp_path / "secret.png")
    (tmp_path / "a" / "0-1.png").unlink()
    (tmp_path / "a" / "0-1.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadRow, match="outside"):
        tasks.content(tasks.all[0].pictures[1])


def test_a_row_without_prompt_or_picture_is_named(tmp_path):
    source = write_pairs(tmp_path / "a", 2)
    good = source.read_text()
    row = {"prompt": "x", "image_0": "0-0.png", "image_1": "0-1.png"}
    for wrong in ({"prompt": ""}, {"prompt": 5}, {"image_0": "none.png"}, {"image_1": None}):
        source.write_text(good + json.dumps(row | wrong))
        with pytest.raises(DiffpoError, match="row 2"):
            of(source)
    source.write_text('{"text": "x", "image_0": "0-0.png", "image_1": "0-1.png"}')
    with pytest.raises(DiffpoError, match="prompts"):
        of(source)


def test_tasks_are_read_again_as_they_were_written(tmp_path):
    tasks = of(write_pairs(tmp_path / "a", 2, prompt="\u2028 <b>{}</b> \U0001f600"))
    tasks.save(tmp_path)
    again = Tasks.load(tmp_path)
    assert (again.all, again.source, again.show, again.ask) == (tasks.all, tasks.source, tasks.show, tasks.ask)
    assert bytes_of(again) == bytes_of(tasks)
    (tmp_path / "tasks.jsonl").write_text(
        '{"source": null, "split": "train", "show": "pairs", "ask": "best"}\n{"id": 5'
    )
    with pytest.raises(DiffpoError, match="line 2"):
        Tasks.load(tmp_path)
    with pytest.raises(DiffpoError, match="none"):
        Tasks.load(tmp_path / "none")
