"""The bench of votes: which pairs are voted on, which clicks are wrong, and what is kept."""

import json

import bench_votes
import pytest
from bench_votes import cell, chosen, voted


def test_more_votes_hold_the_fewer_and_so_many_are_wrong(tmp_path):
    pool = {row["jpg_0"] + row["jpg_1"]: row["label_0"] for row in bench_votes.pool()}
    hundred, more = (chosen(cell(n, "random", 0.0, 5), tmp_path) for n in (100, 300))
    assert more[:100] == hundred and len({row["jpg_0"] + row["jpg_1"] for row in more}) == 300
    assert all(pool[row["jpg_0"] + row["jpg_1"]] == row["label_0"] == (row["score_0"] > row["score_1"]) for row in more)
    wrong = chosen(cell(100, "random", 0.25, 5), tmp_path)
    assert sum(one["label_0"] != other["label_0"] for one, other in zip(hundred, wrong, strict=True)) == 25
    assert voted(hundred, 0.1, 0) != voted(hundred, 0.1, 1)


def test_active_votes_are_half_random_and_half_the_least_sure(tmp_path, monkeypatch):
    """With a model whose margin is the score of the first picture minus a half, in place of a trained one."""
    rest = []

    def margins(config, run, data):
        import pyarrow.parquet as pq

        places = {row["jpg_0"]: row["score_0"] - 0.7 for row in bench_votes.pool()}
        rest.extend(places[each] for each in pq.read_table(data)["jpg_0"].to_pylist())
        return bench_votes.np.array(rest)

    monkeypatch.setattr(bench_votes, "train", lambda config: config.output)
    monkeypatch.setattr(bench_votes, "sureness", margins)
    found = chosen(cell(100, "active", 0.0, 5), tmp_path)
    assert found[:50] == chosen(cell(100, "random", 0.0, 5), tmp_path)[:50]
    asked = sorted(abs(row["score_0"] - 0.7) for row in found[50:])
    assert asked == pytest.approx(sorted(map(abs, rest))[:50])


def test_the_table_has_the_means_of_what_is_kept(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    for seed, win in ((0, 0.6), (1, 0.7), (9, 0.1)):
        one = cell(100, "random", 0.25, seed)
        result = {**bench_votes.asdict(one), "seconds": 1, "compared": {"total": {"win": [win, win - 0.1, win + 0.1]}}}
        (folder / f"{one.key}.json").write_text(json.dumps(result))
    line = bench_votes.report(tmp_path, [0, 1, 2]).splitlines()[-1]
    assert line == "| 100 | random | 25% | 60 [50, 70], 70 [60, 80] | 65.0% (n=2) |"
    assert cell(100, "random", 0.25, 0).key != cell(100, "random", 0.25, 0, {"train.lr": "1e-4"}).key
