"""`diffpo score`: from where pictures and prompts are read, what is written, and how a run goes on."""

import io
import json
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import own_scorers
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import diffpo
from diffpo.commands import score
from diffpo.commands.score_results import Row, left_out
from diffpo.common.errors import DiffpoError
from diffpo.common.worker import Worker
from diffpo.scorers.pictures import Where

MEAN, LONG = "own_scorers:Mean", "own_scorers:Long"


@pytest.fixture(autouse=True)
def fresh():
    own_scorers.CALLS.clear()
    own_scorers.STOP.clear()


def grey(level, size=(9, 6)):
    return Image.new("RGB", size, (level, level, level))


def encoded(level):
    buffer = io.BytesIO()
    grey(level).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Ten pictures of brightness 0, 10, ... with prompts of length 1, 2, ...; one of them in a folder below."""
    made = tmp_path / "pictures"
    (made / "below").mkdir(parents=True)
    for i in range(10):
        at = made / "below" / f"{i}.png" if i == 9 else made / f"{i}.png"
        grey(10 * i).save(at)
        at.with_suffix(".txt").write_text("x" * (i + 1) + "\n")
    return made


def values(found, scorer):
    table = found.table().to_pydict()
    rows = zip(table["scorer"], table["key"], table["prompt"], table["value"], strict=True)
    return {key: (prompt, value) for name, key, prompt, value in rows if name == scorer}


def scored(source, out, *specs, **options):
    return diffpo.score(source, out, scorers=specs or (MEAN,), **options)


def test_a_folder_with_prompts_beside_the_pictures(folder, tmp_path):
    found = scored(folder, tmp_path / "out", MEAN, LONG, batch_size=3)
    assert found.pictures == 10 and not found.unreadable and not (tmp_path / "out" / "parts").exists()
    assert values(found, "mean")["below/9.png"] == ("x" * 10, 90.0)
    assert values(found, "long.sum")["3.png"] == ("xxxx", 34.0)
    assert np.isnan(values(found, "long.sum")["0.png"][1])
    mean, total, length = found.rows
    assert mean == Row("mean", 45.0, 4.5, 45.0, pytest.approx(85.5), 10, 0)  # the percentiles of 0, 10, ..., 90
    assert (total.scorer, total.n, total.missing) == ("long.sum", 9, 1) and total.mean == np.mean(
        np.arange(1, 10) * 11 + 1
    )
    assert (length.low, length.n) == (pytest.approx(1.45), 10)
    frame = found.table().to_pandas()
    assert list(frame.columns) == ["key", "prompt", "scorer", "value", "state"] and len(frame) == 30


def test_without_prompts_only_scorers_that_need_none_run(folder, tmp_path):
    for text in folder.rglob("*.txt"):
        text.unlink()
    assert values(scored(folder, tmp_path / "out"), "mean")["1.png"] == (None, 10.0)
    with pytest.raises(
        DiffpoError, match=r"own_scorers:Long needs prompts\. Put the prompt of NAME\.png into NAME\.txt"
    ):
        scored(folder, tmp_path / "other", LONG)
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_read_is_counted_and_named_and_the_rest_is_scored(folder, tmp_path):
    (folder / "1.png").write_bytes(b"no picture")
    (folder / "2.png").write_bytes((folder / "3.png").read_bytes()[:40])
    (folder / "4.txt").unlink()
    found = scored(folder, tmp_path / "out", LONG)
    assert set(found.unreadable) == {"1.png", "2.png", "4.png"} and found.unreadable["4.png"] == "no prompt"
    assert len(values(found, "long.prompt")) == 7 and found.rows[1].missing == 3
    said = left_out(found)
    assert len(said) == 3 and said[2] == "long.sum is NaN for 1 pictures"
    assert said[0].startswith("2 left out (unreadable image), the first: 1.png: not an image")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["left_out"] == 3 and summary["pictures"] == 10 and summary["rows"][0]["n"] == 6


def test_a_manifest_gives_files_and_prompts(folder, tmp_path):
    rows = [{"file": "below/9.png", "prompt": "nine"}, {"file": "3.png", "prompt": "three"}]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"file": "4.p')
    found = values(scored(folder, tmp_path / "out"), "mean")
    assert found == {"below/9.png": ("nine", 90.0), "3.png": ("three", 30.0)}


def test_one_picture(folder, tmp_path):
    assert values(scored(folder / "below" / "9.png", tmp_path / "out"), "mean") == {"9.png": ("x" * 10, 90.0)}


def test_a_scorer_must_be_named(folder, tmp_path):
    with pytest.raises(DiffpoError, match="no scorer named; for example --scorers aesthetic"):
        diffpo.score(folder, tmp_path / "out")


def test_a_table_with_two_pictures_in_a_row(tmp_path):
    cells = [{"bytes": encoded(10 * i), "path": None} for i in range(4)]
    table = pa.table({"jpg_0": cells[:2], "jpg_1": cells[2:], "caption": ["a", "bb"], "other": ["", "longer"]})
    pq.write_table(table, tmp_path / "pairs.parquet")
    found = scored(tmp_path / "pairs.parquet", tmp_path / "out", LONG)
    expected = {("0:jpg_1", "a", 21.0), ("1:jpg_0", "bb", 12.0), ("1:jpg_1", "bb", 32.0)}  # 0:jpg_0 is black: NaN
    rows = {(key.removeprefix("pairs.parquet:"), *row) for key, row in values(found, "long.sum").items()}
    assert rows >= expected and len(rows) == 4
    where = Where(images=("jpg_1",), prompt="other")
    other = values(scored(tmp_path / "pairs.parquet", tmp_path / "other", LONG, where=where), "long.sum")
    assert other == {"pairs.parquet:1:jpg_1": ("longer", 36.0)}  # the empty prompt of row 0 is none
    with pytest.raises(DiffpoError, match=r"no column 'jpg': did you mean jpg_"):
        scored(tmp_path / "pairs.parquet", tmp_path / "third", where=Where(images=("jpg",)))


def test_scorers_of_edits_are_given_the_source_of_their_row(folder, tmp_path):
    """Brightness minus the source's: of another row's source it would differ. A source that is missing is counted."""
    levels = [(30, 10), (90, 40), (50, 50), (60, None)]
    rows = {"image": [encoded(after) for after, _ in levels], "prompt": ["brighter"] * 4}
    rows["before"] = [before and encoded(before) for _, before in levels]
    pq.write_table(pa.table(rows), tmp_path / "edits.parquet")
    found = scored(tmp_path / "edits.parquet", tmp_path / "out", "own_scorers:Change", where=Where(source="before"))
    expected = {f"edits.parquet:{k}:image": ("brighter", change) for k, change in enumerate((20.0, 50.0, 0.0))}
    assert values(found, "change") == expected and [*found.unreadable] == ["edits.parquet:3:image"]
    pq.write_table(
        pa.table({"after": rows["image"][:3]} | {k: rows[k][:3] for k in ("prompt", "before")}), tmp_path / "b.parquet"
    )
    found = scored(tmp_path / "b.parquet", tmp_path / "b", "own_scorers:Change", where=Where(source="before"))
    assert [key for key, _ in values(found, "change").items()] == [f"b.parquet:{k}:after" for k in range(3)]
    rows["before"] = [[each, encoded(99)] for each in rows["before"][:3]] + [[]]
    pq.write_table(pa.table(rows), tmp_path / "lists.parquet")
    found = scored(tmp_path / "lists.parquet", tmp_path / "d", "own_scorers:Second", where=Where(source="before"))
    expected = {f"lists.parquet:{k}:image": ("brighter", after - 99.0) for k, after in enumerate((30, 90, 50))}
    assert values(found, "second") == expected and [*found.unreadable] == ["lists.parquet:3:image"]
    for source, said in ((folder, "--source"), (folder / "3.png", "--source"), (tmp_path / "b.parquet", "'befor'")):
        with pytest.raises(DiffpoError, match=said):
            scored(source, tmp_path / "c", where=Where(source="befor"))


def test_a_folder_of_edits_has_its_sources_in_the_manifest(tmp_path):
    """One source, several, and one that is gone; another source makes the picture new."""
    (tmp_path / "sources").mkdir()
    rows = []
    for k, (after, before) in enumerate(((30, 10), (90, 40), (60, None))):
        grey(after).save(tmp_path / f"{k}.png")
        rows.append({"file": f"{k}.png", "prompt": "brighter", "source": f"sources/{k}.png", "source_hash": str(k)})
        if before is not None:
            grey(before).save(tmp_path / "sources" / f"{k}.png")

    def changes():
        (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = scored(tmp_path, tmp_path / "out", "own_scorers:Change")
        return {key: value for key, (_, value) in values(found, "change").items()}, found.unreadable

    found, missing = changes()
    assert found == {"0.png": 20.0, "1.png": 50.0} and [*missing] == ["2.png"] and "picture to edit" in missing["2.png"]
    rows[1] |= {"source": "sources/0.png", "source_hash": "0"}
    rows[2] |= {"source": "../outside.png"}
    grey(0).save(tmp_path.parent / "outside.png")
    found, missing = changes()
    assert found["1.png"] == 80.0 and "outside" in missing["2.png"]
    rows[0] |= {"source": ["sources/0.png", "sources/1.png"], "source_hash": "0+1"}
    with pytest.raises(DiffpoError, match=r"about 2 pictures"):  # this scorer takes one
        changes()
    good = rows[0]
    for wrong in ({"source": 3}, {"source_hash": "0"}):
        rows[0] = good | wrong
        with pytest.raises(DiffpoError, match=r"manifest\.jsonl:1"):
            changes()


def test_webdataset_shards(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in {
            "one.png": encoded(50),
            "one.json": json.dumps({"prompt": "from json", "width": 9}).encode(),
            "two.png": encoded(60),
            "two.json": json.dumps({"prompt": "other"}).encode(),
            "three.png": b"broken",
            "three.json": json.dumps({"prompt": "third"}).encode(),
        }.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    found = scored(tmp_path / "a.tar", tmp_path / "out")
    assert values(found, "mean") == {"a.tar:one.png": ("from json", 50.0), "a.tar:two.png": ("other", 60.0)}
    assert list(found.unreadable) == ["a.tar:three.png"]


def test_a_killed_run_goes_on_and_scores_nothing_twice(folder, tmp_path):
    whole = scored(folder, tmp_path / "whole", batch_size=2).table()
    own_scorers.CALLS.clear()
    own_scorers.STOP.append(5)  # the third batch is lost
    with pytest.raises(KeyboardInterrupt):
        scored(folder, tmp_path / "out", batch_size=2)
    (part,) = (tmp_path / "out" / "parts").iterdir()
    part.write_bytes(part.read_bytes() + b'["mean", "4.png", "half a li')
    assert not (tmp_path / "out" / "scores.parquet").exists()
    found = scored(folder, tmp_path / "out", batch_size=3)
    assert len(own_scorers.CALLS) == 6 + 6  # two of the first six were lost with their batch
    assert found.table().equals(whole)
    scored(folder, tmp_path / "out")
    assert len(own_scorers.CALLS) == 12


def test_only_changed_and_new_pictures_are_scored_again(folder, tmp_path):
    scored(folder, tmp_path / "out")
    own_scorers.CALLS.clear()
    grey(200).save(folder / "3.png")
    grey(210).save(folder / "new.png")
    (folder / "5.txt").write_text("another prompt")
    (folder / "6.png").unlink()
    found = values(scored(folder, tmp_path / "out"), "mean")
    assert sorted(light for _, light in own_scorers.CALLS) == [50.0, 200.0, 210.0]
    assert found["5.png"] == ("another prompt", 50.0) and "6.png" not in found and len(found) == 10


def test_a_second_scorer_and_a_part_of_the_pictures_keep_what_is_there(folder, tmp_path):
    scored(folder, tmp_path / "out")
    found = scored(folder, tmp_path / "out", LONG, where=Where(n=2))
    assert len(own_scorers.CALLS) == 10 and [row.scorer for row in found.rows] == ["long.sum", "long.prompt"]
    assert len(values(found, "mean")) == 10 and len(values(found, "long.prompt")) == 2


def test_two_processes_share_the_pictures(folder, tmp_path, monkeypatch):
    """The second one after the first has checked, one after the other; real ones are started by `accelerate launch`."""
    alone = scored(folder, tmp_path / "alone", MEAN, LONG).table().to_pandas()
    own_scorers.CALLS.clear()
    found = {}
    monkeypatch.setattr(Worker, "gather", lambda self, items: items)
    make = score.ScoreRun(str(folder), tmp_path / "out", (MEAN, LONG), batch_size=2)

    def as_worker(index):
        order = iter([lambda: index == 0 and as_worker(1)])  # the first process waits when it has checked everything
        ours = SimpleNamespace(worker=lambda: Worker(index=index, count=2), wait=lambda: next(order, bool)())
        monkeypatch.setattr(score.processes, "here", lambda: ours)
        found[index] = score.run(make)

    as_worker(0)
    assert found[0].table().to_pandas().equals(alone) and found[1].rows == []
    assert len(own_scorers.CALLS) == 10 and {row.n for row in found[0].rows} == {9, 10}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda source, out: (source.parent / "other", out), r"holds the scores of .*pictures"),
        (lambda source, out: (source, source.parent / "foreign"), r"was not written by `diffpo score`"),
        (lambda source, out: (source.parent / "empty", out.with_name("new")), r"empty has no pictures"),
        (
            lambda source, out: (source.parent / "missing.parquet", out.with_name("new")),
            r"missing\.parquet does not exist",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused(folder, tmp_path, change, said):
    scored(folder, tmp_path / "out")
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "scores.parquet").write_bytes(b"somebody's")
    source, out = change(folder, tmp_path / "out")
    with pytest.raises(DiffpoError, match=said):
        scored(source, out)
    assert (tmp_path / "foreign" / "scores.parquet").read_bytes() == b"somebody's"


def test_numbers_of_other_weights_are_not_mixed(folder, tmp_path):
    settings = tmp_path / "sum.yaml"
    settings.write_text(f"terms: [{{scorer: {MEAN}, weight: 2}}]")
    found = scored(folder, tmp_path / "out", f"sum={settings}")
    assert values(found, "sum")["3.png"] == ("xxxx", 60.0)
    settings.write_text(f"terms: [{{scorer: {MEAN}, weight: 3}}]")
    with pytest.raises(DiffpoError, match=r"holds sum of the scorer .* may give other numbers"):
        scored(folder, tmp_path / "out", f"sum={settings}")


def test_the_command_line(folder, tmp_path, capsys, monkeypatch):
    from diffpo import cli

    monkeypatch.setattr("sys.argv", ["diffpo", "score", str(folder), "--out", str(tmp_path / "out"), "--scorers", MEAN])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert " 45 " in capsys.readouterr().out and (tmp_path / "out" / "scores.parquet").is_file()
