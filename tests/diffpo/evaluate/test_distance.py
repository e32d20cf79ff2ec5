"""`diffpo distance`: sets of pictures in every form, kept features, and what is printed and written."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from tiny import write_parquet

from diffpo.cli import app
from diffpo.common.errors import DiffpoError
from diffpo.evaluate import distributions
from diffpo.evaluate.distributions import features, frechet, pictures


class Means:
    """Mean and deviation of each channel; counts the pictures that it sees."""

    name = "means"
    seen = 0

    def embed(self, images):
        Means.seen += len(images)
        pixels = [np.asarray(image, np.float32).reshape(-1, 3) / 255 for image in images]
        return np.array([[*each.mean(0), *each.std(0)] for each in pixels])


class Broken(Means):
    def embed(self, images):
        return np.full((len(images), 2), np.nan)


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Eight pictures of four prompts."""
    (tmp_path / "arm").mkdir()
    for number in range(8):
        (tmp_path / "arm" / f"{number // 2:05d}_{number % 2}.png").write_bytes(png(number))
    return tmp_path / "arm"


def embedded(source, cache):
    return features.embed(pictures.read(source), Means(), cache)


def test_one_set_in_every_form(tmp_path, folder):
    rows = [{"prompt": f"prompt {k // 2}", "image": {"bytes": png(k), "path": None}} for k in range(8)]
    write_parquet(tmp_path / "set.parquet", rows)
    write_parquet(tmp_path / "other.parquet", [{"jpg_0": row["image"]["bytes"]} for row in rows])
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for number in range(8):
            for suffix, content in (("png", png(number)), ("txt", f"prompt {number // 2}".encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    wanted = embedded(folder, tmp_path / "cache")
    assert wanted.vectors.shape == (8, 6)
    for name in ("set.parquet", "other.parquet:jpg_0", "set.tar"):
        found = embedded(tmp_path / name, tmp_path / "cache")
        assert np.array_equal(found.vectors, wanted.vectors), name
        groups = found.groups(pictures.read(tmp_path / name))
        if "jpg_0" in name:
            assert groups is None
        else:
            assert groups == [f"prompt {number // 2}" for number in range(8)]
    assert wanted.groups(pictures.read(folder)) == [f"{number // 2:05d}" for number in range(8)]


def test_features_are_kept_and_an_interrupted_run_continues(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(features, "BATCH", 2)
    monkeypatch.setattr(Means, "seen", 0)
    before, calls = Means.embed, []

    def interrupted(self, images):
        calls.append(len(images))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return before(self, images)

    monkeypatch.setattr(Means, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded(folder, tmp_path / "cache")
    monkeypatch.setattr(Means, "embed", before)
    whole = embedded(folder, tmp_path / "cache")
    assert Means.seen == 8 and np.array_equal(whole.vectors, embedded(folder, tmp_path / "new").vectors)
    assert np.array_equal(embedded(folder, tmp_path / "cache").vectors, whole.vectors) and Means.seen == 16
    (folder / "00000_0.png").write_bytes(png(99))  # another picture: all features are computed again
    assert not np.array_equal(embedded(folder, tmp_path / "cache").vectors, whole.vectors) and Means.seen == 24


def test_a_damaged_cache_is_computed_again(tmp_path, folder):
    wanted = embedded(folder, tmp_path / "cache").vectors
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(b"no")
    assert np.array_equal(embedded(folder, tmp_path / "cache").vectors, wanted)


def test_unreadable_pictures_are_left_out_and_named(tmp_path, folder, capsys):
    (folder / "00001_0.png").write_bytes(b"no picture")
    app(
        ["distance", str(folder), str(folder), "--features", f"{__name__}:Means", "--cache", str(tmp_path / "cache")],
        standalone_mode=False,
    )
    printed = capsys.readouterr().out
    assert "00001_0.png" in printed and "precision" in printed and "fid" in printed
    found = embedded(folder, tmp_path / "cache")
    assert found.bad.keys() == {"00001_0.png"} and list(found.rows) == [0, 1, 3, 4, 5, 6, 7]
    groups = found.groups(pictures.read(folder))
    assert groups == ["00000", "00000", "00001", "00002", "00002", "00003", "00003"]
    for path in folder.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(DiffpoError, match="can be read"):
        embedded(folder, tmp_path / "cache")


def test_statistics_as_the_reference_and_the_written_file(tmp_path, folder):
    vectors = embedded(folder, tmp_path / "cache").vectors.astype(float)
    real = np.random.default_rng(0).normal(size=(50, 6))
    np.savez(tmp_path / "real.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))
    (found,) = distributions.run(
        folder, tmp_path / "real.npz", [f"{__name__}:Means"], tmp_path / "out.json", tmp_path / "cache"
    )
    assert found.numbers["fid"].value == pytest.approx(frechet.fid(vectors, real).value)
    assert found.rows()[0]["distance"] == "fid" and found.rows()[0]["reference"] is None
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["distances"][0]["numbers"]["fid"]["value"] == found.numbers["fid"].value


def test_what_cannot_be_measured(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "manifest.jsonl").write_text("")
    for arm in ("base", "tuned"):
        (tmp_path / "eval" / "images" / arm).mkdir(parents=True)
        (tmp_path / "eval" / "images" / arm / "00000_0.png").write_bytes(png(0))
    write_parquet(tmp_path / "texts.parquet", [{"prompt": "a"}])
    for source, words in {
        "empty": "no pictures",
        "missing": "no folder or file",
        "eval": "images/base",
        "texts.parquet": "FILE.parquet:COLUMN",
        "arm/00000_0.png": "one picture",
    }.items():
        with pytest.raises(DiffpoError, match=words):
            pictures.read(tmp_path / source)
    with pytest.raises(DiffpoError, match=r"00000_0\.png"):
        features.embed(pictures.read(folder), Broken(), tmp_path / "cache")
    with pytest.raises(DiffpoError, match="--features"):
        distributions.run(folder, folder, [])
