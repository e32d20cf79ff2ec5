"""`quickstart --human`, with the oracle voting in a real browser in a person's place."""

import chromium
import pyarrow.parquet as pq
import pytest
from annotate_page import DESKTOP, begin, vote_by_oracle
from annotated import served

from diffpo import shapes
from diffpo.annotate import app
from diffpo.commands import quickstart
from diffpo.common.images import decode

pytestmark = pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium on PATH to open the page with")


def test_votes_of_a_browser_become_pairs_a_lora_and_a_report(tmp_path, monkeypatch):
    browser = chromium.Browser(tmp_path / "chromium")

    def served_and_voted(session, *address):
        with served(session) as browser.own:
            begin(browser, browser.own, DESKTOP, "oracle")
            vote_by_oracle(browser, session)

    monkeypatch.setattr(app, "serve", served_and_voted)
    short = ("train.steps=2", "train.batch_size=4", "data.validation=null", f"data.cache={tmp_path / 'cache'}")
    try:
        evaluation = quickstart.run(tmp_path / "run", n=4, overrides=short, votes=6)
    finally:
        browser.close()
    rows = pq.read_table(tmp_path / "run-votes" / "votes.parquet").to_pylist()
    assert len(rows) == 6
    for row in rows:
        totals = [shapes.score(decode(row[name]), row["prompt"])["total"] for name in ("image_0", "image_1")]
        assert row["label_0"] == float(totals[0] > totals[1])
    assert evaluation.row("shapes.total").n == 4 and (tmp_path / "run" / "pytorch_lora_weights.safetensors").exists()
