"""Aspect-ratio buckets: the sizes, the order of the groups, batches against values computed here, and updates that are
split in different ways."""

import math
import shutil
from collections import Counter

import pytest
import torch
from PIL import Image
from test_batches import Family
from tiny import metrics_of, pick_a_pic_rows, picture, png, write_parquet
from tiny_transformers import make_alpha, make_dit, make_flux, make_pixart, make_sd3

from diffpo import models
from diffpo.common.errors import DiffpoError
from diffpo.common.rng import generator
from diffpo.config import Data, Model
from diffpo.data.batches import Batches
from diffpo.data.buckets import Buckets
from diffpo.data.groups import load_groups
from diffpo.data.sizes import nearest, sizes
from diffpo.train.build import load_data, make_accelerator


def test_the_sizes_are_sdxls():
    for resolution, step in ((1024, 64), (512, 64), (768, 64), (256, 16), (64, 16), (16, 8)):
        found = sizes(resolution)
        assert (resolution, resolution) in found and set(found) == {(h, w) for w, h in found}
        for width, height in found:
            assert width % step == height % step == 0 and 1 / 4 <= width / height <= 4
            assert width * (height + step) > resolution**2 >= width * height or width < height
    # of the table in the paper
    assert {(1344, 768), (1152, 896), (832, 1216), (640, 1536), (512, 2048)} <= set(sizes(1024))


def test_the_nearest_aspect_ratio_is_taken():
    assert [nearest(size, 1024) for size in ((500, 500), (1920, 1080), (1080, 1920), (9000, 100), (1216, 832))] == [
        *((1024, 1024), (1344, 768), (768, 1344), (2048, 512), (1216, 832))
    ]
    for width, height in ((640, 480), (333, 777), (1000, 999)):
        chosen = nearest((width, height), 512)
        distances = {size: abs(math.log(size[0] / size[1] * height / width)) for size in sizes(512)}
        assert distances[chosen] == pytest.approx(min(distances.values()))


def test_every_update_has_one_size_and_every_group_its_share():
    targets = [(16, 16)] * 5 + [(24, 8)] * 2 + [(8, 24)]
    per_update, buckets = 3, Buckets(targets, seed=1)
    # a round is 8 updates, in which a size comes as often as it has groups
    for number in range(3):
        drawn = [[buckets.index(24 * number + 3 * u + i, per_update) for i in range(3)] for u in range(8)]
        assert [len({targets[index] for index in update}) for update in drawn] == [1] * 8
        assert Counter(index for update in drawn for index in update) == dict.fromkeys(range(8), per_update)
    order = [buckets.index(position, per_update) for position in range(72)]
    squares = [index for index in order if index < 5]
    for start in range(0, 45, 5):  # every size epoch after epoch, each in another order
        assert set(squares[start : start + 5]) == set(range(5))
    assert len({tuple(squares[start : start + 5]) for start in range(0, 45, 5)}) > 5
    again = Buckets(targets, seed=1)  # independent of earlier calls
    assert [again.index(position, per_update) for position in reversed(range(72))] == order[::-1]
    assert [Buckets(targets, seed=2).index(position, per_update) for position in range(72)] != order


SIZES = [((32, 16), (32, 16)), ((16, 40), (24, 24)), ((16, 16), (48, 16)), ((32, 16), (16, 16))]
TARGETS = [(24, 8), (8, 24), (16, 16), (24, 8)]  # by the first image; the second one wins in odd rows


def mixed_rows():
    rows = pick_a_pic_rows(len(SIZES))
    for i, (row, pair) in enumerate(zip(rows, SIZES, strict=True)):
        row |= {f"jpg_{j}": png(picture(2 * i + j, size)) for j, size in enumerate(pair)}
    return rows


def seen(seed, size, target):
    """picture(seed) as it should be shown, the middle of what covers the target; and its micro-conditioning."""
    (width, height), (wanted_width, wanted_height) = size, target
    scale = max(wanted_width / width, wanted_height / height)
    resized = (max(wanted_width, round(width * scale)), max(wanted_height, round(height * scale)))
    left, top = (resized[0] - wanted_width) // 2, (resized[1] - wanted_height) // 2
    image = picture(seed, size)
    if resized != size:
        image = image.resize(resized, Image.Resampling.LANCZOS)
    image = image.crop((left, top, left + wanted_width, top + wanted_height))
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(wanted_height, wanted_width, 3)
    return raw.permute(2, 0, 1).float().div(127.5).sub(1), [height, width, top, left, wanted_height, wanted_width]


@pytest.mark.parametrize("cached", [True, False])
def test_both_images_of_a_pair_are_in_the_bucket_of_the_first(tmp_path, cached):
    source = write_parquet(tmp_path / "a.parquet", mixed_rows())
    data = Data(train=str(source), resolution=16, buckets=True, cache=str(tmp_path / "cache"), cache_latents=cached)
    groups = load_groups(data, str(source), "train")
    assert [group.target for group in groups.groups] == TARGETS
    batches = Batches(groups, data, Family(), 5)
    for indices in ([0, 3], [3, 0], [1], [2]):
        positions = [7 * index + 1 for index in indices]
        batch = batches.batch(indices, positions)
        target = TARGETS[indices[0]]
        for i, (index, position) in enumerate(zip(indices, positions, strict=True)):
            noise = posterior_noise(position, target)
            images = (0, 1) if index % 2 == 0 else (1, 0)
            for member, image in enumerate(images):
                shown, sizes_of_view = seen(2 * index + image, SIZES[index][image], target)
                mean = torch.nn.functional.avg_pool2d(shown, 8)
                expected = 0.5 * (mean + (0.5 * (mean - 1)).exp() * noise[member])
                torch.testing.assert_close(batch.x_0[member * len(indices) + i], expected, rtol=0, atol=0)
                assert batch.cond["time_ids"][member * len(indices) + i].tolist() == sizes_of_view
    if cached:
        assert len(list((tmp_path / "cache").glob("latents-*"))) == 3  # one for each size
        again = Batches(groups, data, Family(), 5)
        assert again.family.encoded == 0


def posterior_noise(position, target):
    """What follows caption dropout's number and the view's three at an address."""
    numbers = generator(5, "train data", position)
    torch.rand((), generator=numbers)
    torch.rand(3, generator=numbers, dtype=torch.float64)
    return torch.randn((2, 3, target[1] // 8, target[0] // 8), generator=numbers)


def test_without_buckets_sizes_must_agree(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", mixed_rows())
    with pytest.raises(DiffpoError, match=r"3 of 4 rows .*data\.buckets=true"):
        load_groups(Data(train=str(source), resolution=16), str(source), "train")


def test_portions_are_of_one_size_and_leave_nothing_out(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", mixed_rows())
    data = Data(train=str(source), resolution=16, buckets=True, cache=str(tmp_path / "cache"))
    batches = Batches(load_groups(data, str(source), "train"), data, Family(), 5)
    assert list(batches.portions(range(8), lambda item: item // 2, 3)) == [[0, 1, 6], [7], [2, 3], [4, 5]]
    square = Data(train=str(source), resolution=16, bad_rows="skip", cache=str(tmp_path / "cache"))
    plain = Batches(load_groups(square, str(source), "train"), square, Family(), 5)
    assert list(plain.portions([5, 3, 4], lambda item: 0, 2)) == [[5, 3], [4]]


def test_how_an_update_is_cut_changes_nothing(tiny_sdxl, make_config, tmp_path):
    from safetensors.torch import load_file

    from diffpo.train.loop import train

    source = write_parquet(tmp_path / "a.parquet", mixed_rows())
    # as in test_train: Adam's first steps would turn rounding into differences of 2 lr
    common = ("data.buckets=true", "train.optimizer=torch.optim.SGD", "train.lr=0.3", "train.steps=3")
    rows, loras = [], []
    for name, cut in (("whole", ("train.batch_size=4",)), ("cut", ("train.batch_size=1", "train.accumulation=4"))):
        held_out = (f"data.validation={source}", "train.eval_every=3", f"output={tmp_path / name}")
        loras.append(load_file(train(make_config(tiny_sdxl, *common, *cut, *held_out, data=source))))
        rows.append(metrics_of(tmp_path / name))
    for ours, theirs in zip(*rows, strict=True):
        for key in ("loss", "rewards/margins", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3, abs=2e-6)
    assert rows[0][-1]["eval/pairs"] == 4
    assert rows[0][-1]["eval/margin"] == pytest.approx(rows[1][-1]["eval/margin"], rel=2e-3, abs=2e-6)
    for name, weight in loras[0].items():
        torch.testing.assert_close(weight, loras[1][name], rtol=1e-3, atol=1e-6)


def test_stopped_and_resumed_equals_straight_bit_for_bit(tiny_sdxl, make_config, tmp_path):
    """As after a kill between two checkpoints: what was done since the last one is done again."""
    from safetensors.torch import load_file

    from diffpo.train.loop import train

    source = write_parquet(tmp_path / "a.parquet", mixed_rows())
    config = make_config(tiny_sdxl, "data.buckets=true", "train.steps=5", "train.batch_size=2", data=source)
    straight, rows = load_file(train(config)), metrics_of(config.output)
    shutil.rmtree(config.output / "checkpoint-000005")
    (config.output / "pytorch_lora_weights.safetensors").unlink()
    resumed = load_file(train(config))
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)
    again = metrics_of(config.output)
    for one, other in zip(rows, again, strict=True):
        assert all(one[key] == other[key] for key in one.keys() - {"time", "pairs_per_second"})


@pytest.mark.parametrize("make", [make_sd3, make_pixart, make_alpha, make_flux])
def test_transformers_train_on_buckets(make, make_config, tmp_path):
    """Latents of 12 x 4, 4 x 12 and 8 x 8; the same however an update is cut."""
    from safetensors.torch import load_file

    from diffpo.train.loop import train

    path, source = make(tmp_path / "model"), write_parquet(tmp_path / "a.parquet", mixed_rows())
    common = ("data.buckets=true", "train.optimizer=torch.optim.SGD", "train.lr=0.3", "train.steps=3")
    loras, rows = [], []
    for name, cut in (("whole", ("train.batch_size=2",)), ("cut", ("train.batch_size=1", "train.accumulation=2"))):
        loras.append(load_file(train(make_config(path, *common, *cut, f"output={tmp_path / name}", data=source))))
        rows.append(metrics_of(tmp_path / name))
    assert rows[0][0]["loss"] == pytest.approx(math.log(2)) and rows[0][0]["grad_norm"] > 0
    for ours, theirs in zip(*rows, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    for name, weight in loras[0].items():
        torch.testing.assert_close(weight, loras[1][name], rtol=1e-3, atol=1e-6)


def test_images_that_are_not_a_whole_number_of_tokens_are_refused(make_config, tmp_path):
    """Real VAEs have 8 px per latent and transformers 2 latents per token; `sizes` has only multiples of that."""
    for resolution in (64, 128, 256, 384, 496, 512, 768, 1024):
        assert all(width % 16 == height % 16 == 0 for width, height in sizes(resolution))
    family = models.load(Model(path=str(make_sd3(tmp_path / "sd3"))), resolution=16)
    family.require_sizes([(24, 8), (16, 12)])
    with pytest.raises(DiffpoError, match=r"14x16 px.* 4 px"):
        family.require_sizes([(24, 8), (14, 16)])
    config = make_config(make_dit(tmp_path / "dit"), "data.buckets=true", data=str(tmp_path / "a.parquet"))
    write_parquet(tmp_path / "a.parquet", mixed_rows())
    with pytest.raises(DiffpoError, match=r"data\.buckets"):
        load_data(config, models.load(config.model, resolution=16), make_accelerator(config.train))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.curriculum=2", r"data\.buckets.*data\.curriculum"),
        ("objective.weighting=measured", r"data\.buckets.*objective\.weighting"),
    ],
)
def test_what_does_not_go_with_buckets_is_refused(make_config, tmp_path, override, words):
    with pytest.raises(DiffpoError, match=words):
        make_config(tmp_path, "data.buckets=true", override)
