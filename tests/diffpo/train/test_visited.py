"""What a run encodes: the pictures and captions that its updates draw, and nothing else."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import pick_a_pic_rows, write_parquet

from diffpo.data.batches import Batches
from diffpo.data.cache import Cache
from diffpo.data.groups import load_groups
from diffpo.train import build
from diffpo.train.loop import train

PAIRS = 60


@pytest.fixture
def data(tmp_path):
    return write_parquet(tmp_path / "many.parquet", pick_a_pic_rows(PAIRS))


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ((), 12),
        (("train.accumulation=2",), 24),
        (("train.steps=15",), PAIRS),
        (("train.steps=10000000",), PAIRS),
        (("objective.weighting=measured",), PAIRS),
        (("objective.source=inversion", "objective.inversion.cache=true"), PAIRS),
        (("objective.source=inversion",), 12),
    ],
)
def test_the_groups_of_a_run(tiny_sd, make_config, data, options, count):
    config = make_config(tiny_sd, "train.steps=3", *options, data=data)
    groups = load_groups(config.data, str(data), "train")
    per_update = 4 * config.train.accumulation
    found = build.visited(config, groups, per_update)
    assert len(found) == count
    order = build.training_order(config, groups)
    drawn = {order.index(position, per_update) for position in range(min(config.train.steps, 100) * per_update)}
    assert drawn <= found


def test_a_stage_of_a_curriculum_draws_from_its_part(tiny_sd, make_config, data, monkeypatch):
    gaps = SimpleNamespace(by_gap=lambda parts: list(range(PAIRS))[::-1], __len__=None)
    config = make_config(tiny_sd, "train.steps=9", "data.curriculum=3", "data.curriculum_updates=10", data=data)
    groups = load_groups(config.data.model_copy(update={"curriculum": 1}), str(data), "train")
    monkeypatch.setattr(groups, "by_gap", gaps.by_gap, raising=False)
    assert build.visited(config, groups, 4) == set(range(40, PAIRS))  # nine updates of four: all of the first third


def test_only_what_is_drawn_is_encoded_and_a_longer_run_adds_the_rest(tiny_sd, make_config, data, tmp_path):
    def trained(cache, *options):
        config = make_config(tiny_sd, f"data.cache={tmp_path / cache}", *options, data=data)
        return load_file(train(config))

    def missing(cache):
        config = make_config(tiny_sd, f"data.cache={tmp_path / cache}", data=data)
        (folder,) = (tmp_path / cache).glob("latents-*")
        groups = load_groups(config.data, str(data), "train")
        kept = Cache(tmp_path / cache, "latents", "", sum(map(len, map(groups.places, groups.targets))))
        header = next(folder.glob("*.safetensors")).read_bytes()[:200].decode("latin-1")
        kept.key, kept.folder = header.partition('"made_from":"')[2].partition(" shard")[0], folder
        return sum(map(len, kept.missing().values()))

    trained("twice", "train.steps=2")
    assert missing("twice") == 2 * (PAIRS - 8)
    longer = trained("twice", "train.steps=5", f"output={tmp_path / 'longer'}")
    assert missing("twice") == 2 * (PAIRS - 20)
    straight = trained("once", "train.steps=5", f"output={tmp_path / 'straight'}")
    assert all(torch.equal(value, straight[name]) for name, value in longer.items())


def test_a_group_that_was_not_encoded_is_an_error(tiny_sd, make_config, data):
    from diffpo import models

    config = make_config(tiny_sd, data=data)
    family = models.load(config.model, "no", 16)
    family.load_encoders()
    batches = Batches(load_groups(config.data, str(data), "train"), config.data, family, needed=[3, 7])
    assert batches.batch([7, 3], [0, 1]).x_0.shape[0] == 4
    with pytest.raises(KeyError):
        batches.batch([4], [0])
