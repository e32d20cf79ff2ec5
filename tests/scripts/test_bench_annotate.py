"""The bench of votes at a small size: a real server process that is killed while annotators vote."""

import bench_annotate


def test_a_killed_server_loses_no_vote_and_stores_none_twice(tmp_path):
    source = bench_annotate.make_source(tmp_path / "pairs", 12)
    found = bench_annotate.measure(source, tmp_path / "votes", annotators=4, votes=12, kills=3, seed=1)
    assert (found["lost"], found["twice"], found["integrity"]) == (0, 0, "ok")
    assert found["votes"] == found["stored"] == 48 and found["kills"] == 3 and found["retries"] > 0
    assert found["posts"] > 48  # some were sent twice on purpose
