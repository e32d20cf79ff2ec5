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
from diffpo.evaluation import distributions
from diffpo.evaluation.distributions import features, frechet


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


def matrix(found):
    return np.concatenate(found.vectors)


def embedded(source, cache):
    return features.embed(features.find(source), Means(), cache)


def test_one_set_in_every_form(tmp_path, folder):
    rows = [{"prompt": f"prompt {k // 2}", "image": {"bytes": png(k), "path": None}} for k in range(8)]
    write_parquet(tmp_path / "set.parquet", rows)
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for number in range(8):
            for suffix, content in (("png", png(number)), ("txt", f"prompt {number // 2}".encode())):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.png").write_bytes(png(number))
        (tmp_path / "texts" / f"{number}.txt").write_text(f"prompt {number // 2}")
    wanted = embedded(folder, tmp_path / "cache")
    assert matrix(wanted).shape == (8, 6) and wanted.groups == [f"{number // 2:05d}" for number in range(8)]
    for name in ("set.parquet", "set.tar", "texts"):
        found = embedded(tmp_path / name, tmp_path / "cache")
        assert np.array_equal(matrix(found), matrix(wanted)), name
        assert found.groups == [f"prompt {number // 2}" for number in range(8)]
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "a.png").write_bytes(png(0))
    assert embedded(plain, tmp_path / "cache").groups is None


def test_one_arm_of_an_evaluation_has_the_manifests_prompts(tmp_path):
    lines = []
    for arm in ("base", "tuned"):
        (tmp_path / "images" / arm).mkdir(parents=True)
        for number in range(3):
            file = f"images/{arm}/{number:05d}_0.png"
            (tmp_path / file).write_bytes(png(number + 10 * (arm == "tuned")))
            lines.append(json.dumps({"file": file, "prompt": f"prompt {number}"}))
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines))
    found = embedded(tmp_path / "images" / "tuned", tmp_path / "cache")
    assert found.groups == ["prompt 0", "prompt 1", "prompt 2"]
    assert matrix(found).tolist() == Means().embed([Image.open(io.BytesIO(png(k))) for k in (10, 11, 12)]).tolist()
    with pytest.raises(DiffpoError, match=r"base, tuned.*images/base"):
        features.find(tmp_path)


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
    assert Means.seen == 8 and np.array_equal(matrix(whole), matrix(embedded(folder, tmp_path / "new")))
    assert np.array_equal(matrix(embedded(folder, tmp_path / "cache")), matrix(whole)) and Means.seen == 16
    (folder / "00000_0.png").write_bytes(png(99))  # another picture: all features are computed again
    assert not np.array_equal(matrix(embedded(folder, tmp_path / "cache")), matrix(whole)) and Means.seen == 24


def test_a_damaged_cache_is_computed_again(tmp_path, folder):
    wanted = matrix(embedded(folder, tmp_path / "cache"))
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(b"no")
    assert np.array_equal(matrix(embedded(folder, tmp_path / "cache")), wanted)


def test_unreadable_pictures_are_left_out_and_named(tmp_path, folder, capsys):
    (folder / "00001_0.png").write_bytes(b"no picture")
    app(
        ["distance", str(folder), str(folder), "--features", f"{__name__}:Means", "--cache", str(tmp_path / "cache")],
        standalone_mode=False,
    )
    printed = capsys.readouterr().out
    assert "00001_0.png" in printed and "precision" in printed and "fid" in printed
    found = embedded(folder, tmp_path / "cache")
    assert found.bad.keys() == {"00001_0.png"} and len(matrix(found)) == 7
    assert found.groups == ["00000", "00000", "00001", "00002", "00002", "00003", "00003"]
    for path in folder.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(DiffpoError, match="can be read"):
        embedded(folder, tmp_path / "cache")


def test_statistics_as_the_reference_and_the_written_file(tmp_path, folder):
    vectors = matrix(embedded(folder, tmp_path / "cache")).astype(float)
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
    write_parquet(tmp_path / "texts.parquet", [{"prompt": "a"}])
    for source, words in {"empty": "no pictures", "missing": "no folder or file", "texts.parquet": "prompt"}.items():
        with pytest.raises(DiffpoError, match=words):
            features.find(tmp_path / source)
    with pytest.raises(DiffpoError, match=r"00000_0\.png"):
        features.embed(features.find(folder), Broken(), tmp_path / "cache")
    with pytest.raises(DiffpoError, match="--features"):
        distributions.run(folder, folder, [])
