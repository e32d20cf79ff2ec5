"""`diffpo check` on ranked lists, single images, scores and on-policy objectives."""

import re

import pytest
from PIL import Image
from tiny import pick_a_pic_rows, picture, png, write_parquet

from diffpo.commands.check import check, describe
from diffpo.commands.picture import draw
from diffpo.common.errors import DiffpoError
from diffpo.config import Data
from diffpo.data.groups import load_groups, scan


def lists(path, lengths):
    return write_parquet(
        path,
        [
            {
                "prompt": f"cat {row}",
                "images": [png(picture(10 * row + i)) for i in range(n)],
                "scores": [float(i) for i in range(n)],
            }
            for row, n in enumerate(lengths)
        ],
    )


def said(capsys, *wanted):
    """Each of ``wanted`` is a label and words that its line contains, in this order."""
    lines = capsys.readouterr().out.splitlines()
    for label, *words in wanted:
        found = [line.strip()[len(label) :] for line in lines if line.strip().startswith(label + " ")]
        assert any(re.search(".*".join(map(re.escape, words)), line) for line in found), (label, words, found)


def test_lists_become_pairs_and_a_curriculum_of_them(tiny_sd, make_config, tmp_path, capsys):
    source = lists(tmp_path / "a.parquet", [4, 4, 3])
    check(make_config(tiny_sd, "data.curriculum=5", "data.curriculum_updates=9", data=source))
    said(
        capsys,
        ("pairs", "15", "3 captions"),
        ("converted", "15 pairs from 3 ranked lists of 3 to 4"),
        ("score gaps", "1 to 3", "median 1", "0 pairs"),  # 3 + 3 + 2 of 1, 2 + 2 + 1 of 2, 2 of 3
        ("curriculum", "5 parts", "9 updates"),
        ("caches", "latents of 11 images"),
    )


def test_pairs_become_liked_and_disliked_images(tiny_sd, make_config, capsys):
    check(make_config(tiny_sd, "objective.link=kto"))
    said(
        capsys,
        ("pairs", "10", "3 captions"),
        ("converted", "link kto"),
    )


def test_single_images(tiny_sd, make_config, tmp_path, capsys):
    rows = [{"prompt": "x", "image": png(picture(i)), "liked": i > 0, "who": "ann" if i else None} for i in range(3)]
    source = write_parquet(tmp_path / "a.parquet", rows)
    check(make_config(tiny_sd, "objective.link=kto", "data.columns.user=who", data=source))
    said(capsys, ("images", "3", "1 captions"), ("liked", "2, disliked 1"), ("users", "1; 1 images"))
    with pytest.raises(DiffpoError, match=r"a\.parquet has single images"):
        check(make_config(tiny_sd, data=source))


def test_missing_scores_are_a_problem(tiny_sd, make_config):
    with pytest.raises(DiffpoError, match=r"data\.curriculum .*train\.parquet .*data\.columns\.score_0=NAME"):
        check(make_config(tiny_sd, "data.curriculum=2"))
    with pytest.raises(DiffpoError, match=r"link margin .*train\.parquet .*data\.columns\.score_0=NAME"):
        check(make_config(tiny_sd, "objective.link=margin"))


def test_prompts_and_sampling_of_an_on_policy_objective_are_shown(tiny_sd, make_config, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cat\n")
    options = ("objective.source=trajectory", "objective.rollout.scorers=[shapes.total]", "data.train=null")
    check(make_config(tiny_sd, *options, f"data.prompts={tmp_path / 'prompts.txt'}"))
    said(capsys, ("prompts", "3, 2 of them"), ("sampling", "8 prompts", "20 model calls", "1 update"))
    with pytest.raises(DiffpoError, match=r"nowhere\.txt"):
        check(make_config(tiny_sd, *options, "data.prompts=nowhere.txt"))


def test_scores_that_disagree_with_labels_are_counted(tiny_sd, make_config, tmp_path, capsys):
    rows = pick_a_pic_rows(4)  # the second image is chosen in two of them
    source = write_parquet(tmp_path / "a.parquet", [{**row, "score_0": 2.0, "score_1": 1.0} for row in rows])
    check(make_config(tiny_sd, data=source))
    said(capsys, ("score gaps", "-1 to 1", "median 0", "2 pairs"))


def test_some_pairs_are_drawn_as_training_uses_them(tiny_sd, make_config, tmp_path, capsys):
    rows = [{"prompt": "a lighthouse", "chosen": png(picture(1, (24, 16))), "rejected": png(picture(0, (24, 16)))}]
    config = make_config(tiny_sd, data=write_parquet(tmp_path / "a.parquet", rows))
    check(config)
    said(capsys, ("picture", str(tmp_path / "run-data.png")))
    assert not config.output.exists()  # training refuses a folder that is not empty
    with Image.open(tmp_path / "run-data.png") as drawn:
        for place, seed in enumerate((1, 0)):  # chosen on the left; the middle 16 px, each 16 x 16
            cropped = picture(seed, (24, 16)).crop((4, 0, 20, 16)).resize((256, 256), Image.Resampling.NEAREST)
            left = 8 + place * 264
            assert drawn.crop((left, 8, left + 256, 264)).tobytes() == cropped.tobytes()
        assert min(drawn.crop((8, 264, 300, drawn.height)).convert("L").tobytes()) < 100  # the caption
    check(config, tmp_path / "deep" / "mine.png")
    assert (tmp_path / "deep" / "mine.png").read_bytes() == (tmp_path / "run-data.png").read_bytes()


def test_few_of_many_groups_are_drawn_evenly_spaced(tmp_path):
    rows = pick_a_pic_rows(12)
    source = write_parquet(tmp_path / "a.parquet", rows)
    data = Data(train=str(source), resolution=16)
    groups = load_groups(data, str(source), "train")
    draw(groups, data, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as drawn:
        height = (drawn.height - 8) // 6
        for row, index in enumerate((0, 2, 4, 7, 9, 11)):
            corner = drawn.crop((8, 8 + row * height, 264, 264 + row * height)).resize(
                (16, 16), Image.Resampling.NEAREST
            )
            assert corner.tobytes() == groups.image(index, 0).tobytes()
    with pytest.raises(DiffpoError, match=r"x\.png.*--picture=FILE"):
        draw(groups, data, tmp_path / "a.parquet" / "x.png")


def test_sizes_of_buckets_and_rows_without_a_label_are_shown(tmp_path):
    rows = [{**row, "has_label": i != 2} for i, row in enumerate(pick_a_pic_rows(4))]
    rows[0] |= {"jpg_0": png(picture(0, (48, 16))), "jpg_1": png(picture(1, (16, 16)))}
    source = write_parquet(tmp_path / "a.parquet", rows)
    data = Data(train=str(source), resolution=16, buckets=True)
    lines, problems = [], []
    describe(scan(data, str(source), "train"), data, lines.append, problems)
    assert "  trained at  16x16 (2), 24x8 (1)" in lines and not problems
    assert [line.split()[2] for line in lines if line.startswith("  no label")] == ["1"]


def test_captions_that_are_too_long_are_counted_as_in_training(tiny_sd, make_config, tmp_path, capsys):
    rows = pick_a_pic_rows(3)
    rows[1]["caption"] = "very " * 40
    check(make_config(tiny_sd, data=write_parquet(tmp_path / "a.parquet", rows)))
    said(capsys, ("captions", "1 of 3 texts", "16 tokens"))
    (tmp_path / "prompts.txt").write_text("a cat\n" + "very " * 40)
    options = ("objective.source=trajectory", "objective.rollout.scorers=[shapes.total]", "data.train=null")
    check(make_config(tiny_sd, *options, f"data.prompts={tmp_path / 'prompts.txt'}"))
    said(capsys, ("captions", "1 of 2 texts", "16 tokens"))


def test_dropped_rows_and_ignored_files_are_counted(tmp_path):
    rows = pick_a_pic_rows(3)
    rows[1]["jpg_1"] = rows[1]["jpg_0"]
    for name in ("train", "test"):
        write_parquet(tmp_path / f"{name}-00000-of-00001.parquet", rows)
    (tmp_path / "more.jsonl").write_text("{}")
    lines, problems = [], []
    data = Data(resolution=16)
    describe(scan(data, str(tmp_path), "train"), data, lines.append, problems)
    about = {line.split()[0]: line for line in lines}
    assert not problems and about["identical"].split()[1] == "1" and about["ignored"].endswith("1 file: more.jsonl")
    assert about["split"].split()[1] == "train;" and about["split"].endswith("test (1 file)")


@pytest.mark.parametrize(
    ("step", "reason"),
    [("flow_sdf", "flow_sde"), ("unipc", "no noise"), ("dpmpp_sde", "between the timesteps")],
)
def test_a_solver_without_likelihoods_is_refused_before_training(tiny_sd, make_config, step, reason):
    options = ["objective.name=ddpo", "objective.rollout.scorers=[shapes.total]", "data.prompts=shapes:train:4"]
    config = make_config(tiny_sd, *options, "data.train=null", "data.validation=null", f"objective.rollout.step={step}")
    with pytest.raises(DiffpoError, match=rf"objective\.rollout\.step={step}.*{reason}"):
        check(config)
