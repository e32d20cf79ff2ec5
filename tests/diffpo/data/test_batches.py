"""Batches of groups against values computed here from the addresses of the draws; and the curriculum."""

from hashlib import blake2b

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import pick_a_pic_rows, picture, png, write_parquet

from diffpo.common.errors import DiffpoError
from diffpo.common.rng import Draws
from diffpo.config import Columns, Data
from diffpo.data.batches import Batches
from diffpo.data.curriculum import Curriculum
from diffpo.data.groups import load_groups
from diffpo.data.order import order


class Family:
    """Encoders that can be written down: a latent is a mean of 8 x 8 pixels, an embedding the caption's characters."""

    train_timesteps = 1000
    reads_source = needs_source = False

    def __init__(self) -> None:
        self.encoded = 0

    def text_hash(self) -> str:
        return "text"

    def vae_hash(self) -> str:
        return "vae"

    def encode_text(self, captions):
        return {"prompt_embeds": torch.stack([spelt(caption) for caption in captions])}

    def encode_image(self, pixels):
        self.encoded += len(torch.unique(pixels, dim=0))  # the last batch is filled up with repetitions
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return {"mean": mean, "logvar": mean - 1}

    def scale_latents(self, latents):
        return 0.5 * latents

    def require_sizes(self, sizes):
        pass

    def condition(self, text, sizes):
        return {**text, "time_ids": sizes}


def spelt(caption: str | None) -> torch.Tensor:
    return torch.tensor([float(ord(letter)) for letter in (caption or "").ljust(12)[:12]]).view(3, 4)


def make(tmp_path, rows, want="pair", **options):
    source = write_parquet(tmp_path / "rows.parquet", rows)
    data = Data(train=str(source), resolution=16, cache=str(tmp_path / "cache"), **options)
    groups = load_groups(data, str(source), "train", want)
    return Batches(groups, data, Family(), 5)


def draw(position: int, members: int) -> tuple[float, torch.Tensor]:
    """The numbers at an address: caption dropout's, then three of the view, then the posterior noise."""
    seed = int.from_bytes(blake2b(f"5/train data/{position}".encode(), digest_size=8).digest(), "little") >> 1
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand((), generator=generator).item()
    torch.rand(3, generator=generator, dtype=torch.float64)
    return chance, torch.randn((members, 3, 2, 2), generator=generator)


def latent(seed: int, noise: torch.Tensor) -> torch.Tensor:
    """Of picture(seed), 16 px."""
    raw = torch.frombuffer(bytearray(picture(seed).tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1)
    mean = torch.nn.functional.avg_pool2d(raw.float().div(127.5).sub(1), 8)
    return 0.5 * (mean + (0.5 * (mean - 1)).exp() * noise)


@pytest.mark.parametrize("cached", [True, False])
def test_pairs_to_the_bit(tmp_path, cached):
    batches = make(tmp_path, pick_a_pic_rows(6, ties=1), cache_latents=cached, caption_dropout=0.5)
    indices, positions = [4, 1, 2], [103, 7, 31]
    batch = batches.batch(indices, positions)
    assert (batch.judgement.members, batch.indices, batch.draws) == (2, indices, Draws(5, "train", positions))
    dropped = 0
    for i, (index, position) in enumerate(zip(indices, positions, strict=True)):
        chance, noise = draw(position, 2)
        dropped += chance < 0.5
        caption = None if chance < 0.5 else f"cat {index % 3}"
        chosen, rejected = (2 * index, 2 * index + 1) if index % 2 == 0 else (2 * index + 1, 2 * index)
        for row, seed, member in ((i, chosen, 0), (3 + i, rejected, 1)):
            assert torch.equal(batch.x_0[row], latent(seed, noise[member]))
            assert torch.equal(batch.cond["prompt_embeds"][row], spelt(caption))
            assert batch.cond["time_ids"][row].tolist() == [16, 16, 0, 0, 16, 16]
    assert 0 < dropped < 3
    assert batch.judgement.preference.tolist() == [1, 1, 1] and batch.judgement.scores is None


def list_rows(scores, wider: int = 0) -> list[dict]:
    """Image i of row r is picture(10 r + i), (16 + r * wider) x 16."""
    return [
        {
            "prompt": f"cat {r}",
            "images": [png(picture(10 * r + i, (16 + r * wider, 16))) for i in range(len(values))],
            "scores": values,
        }
        for r, values in enumerate(scores)
    ]


def test_lists_are_laid_out_by_member_best_first(tmp_path):
    rows = list_rows([[1.0, 3.0, 2.0], [9.0, 8.0, 7.0]])
    batches = make(tmp_path, rows, "list", list_size=3)
    batch = batches.batch([1, 0], [0, 1])
    best_first = [[10, 11, 12], [1, 2, 0]]
    means = batches.means([1, 0])
    for i, seeds in enumerate(best_first):
        _, noise = draw(i, 3)
        for member, seed in enumerate(seeds):
            assert torch.equal(batch.x_0[2 * member + i], latent(seed, noise[member]))
            assert torch.equal(means[2 * member + i], latent(seed, torch.zeros(3, 2, 2)))
    assert batch.judgement.scores.tolist() == [[9, 3], [8, 2], [7, 1]] and batch.judgement.members == 3
    assert [row[0, 0].item() for row in batch.cond["prompt_embeds"]] == [ord("c")] * 6
    assert [chr(int(row.flatten()[4])) for row in batch.cond["prompt_embeds"]] == ["1", "0"] * 3


def test_single_images_have_one_row_each(tmp_path):
    rows = [{"prompt": "x", "image": png(picture(i)), "liked": like} for i, like in enumerate([1.0, 0.25])]
    batch = make(tmp_path, rows, "single", ties="soft").batch([1, 0], [3, 4])
    for row, seed in ((0, 1), (1, 0)):
        assert torch.equal(batch.x_0[row], latent(seed, draw(3 + row, 1)[1][0]))
    assert batch.judgement.preference.tolist() == [0.25, 1] and len(batch.cond["time_ids"]) == 2


def test_each_image_has_its_own_caption_and_both_are_dropped_together(tmp_path):
    rows = pick_a_pic_rows(2)
    for i, row in enumerate(rows):
        row |= {"g": f"good {i}", "b": f"bad {i}"}
    columns = Columns(caption_chosen="g", caption_rejected="b")
    batches = make(tmp_path, rows, columns=columns, caption_dropout=0.5)
    positions = list(range(8))
    batch = batches.batch([0, 1] * 4, positions)
    dropped = [draw(position, 2)[0] < 0.5 for position in positions]
    assert 0 < sum(dropped) < 8
    for i, drop in enumerate(dropped):
        for row, word in ((i, "good"), (8 + i, "bad")):
            expected = spelt(None if drop else f"{word} {i % 2}")
            assert torch.equal(batch.cond["prompt_embeds"][row], expected)


def test_an_image_is_encoded_once_whatever_pairs_it_is_in(tmp_path):
    rows = list_rows([[1.0, 3.0, 2.0, 4.0]] * 2, wider=8)
    pairs = make(tmp_path, rows)
    assert len(pairs.groups) == 12 and pairs.family.encoded == 8
    lists = make(tmp_path, rows, "list", list_size=4)
    assert lists.family.encoded == 0 and lists.latents.folder == pairs.latents.folder  # found in the cache
    other = make(tmp_path, rows, cache_latents=False)
    for indices in ([0, 5, 11], [7]):
        torch.testing.assert_close(pairs.batch(indices, indices).x_0, other.batch(indices, indices).x_0, rtol=0, atol=0)


def scored(n: int) -> list[dict]:
    """Pairs with gaps 0, 7, 14, ... modulo n, all different for n prime to 7."""
    rows = pick_a_pic_rows(n)
    for i, row in enumerate(rows):
        row |= {"label_0": 1.0, "label_1": 0.0, "score_0": float(7 * i % n), "score_1": 0.0}
    return rows


def test_curriculum_starts_with_the_largest_gaps_and_adds_the_others(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", scored(10))
    data = Data(train=str(source), resolution=16, curriculum=3, curriculum_updates=5)
    groups = load_groups(data, str(source), "train")
    curriculum, per_update = Curriculum(groups, data, seed=1), 7
    gaps = [7 * curriculum.index(position, per_update) % 10 for position in range(20 * per_update)]
    stages = [gaps[:35], gaps[35:70], gaps[70:]]
    for stage, parts in zip(stages, ({9, 8, 7}, {9, 8, 7, 6, 5, 4}, set(range(10))), strict=True):
        assert set(stage) == parts
        for start in range(0, len(stage), len(parts)):  # every epoch holds each once
            assert len(set(stage[start : start + len(parts)])) == len(stage[start : start + len(parts)])
    # a fresh one that is asked in another order gives the same
    again = Curriculum(groups, data, seed=1)
    assert [7 * again.index(position, per_update) % 10 for position in reversed(range(140))] == gaps[::-1]
    assert [Curriculum(groups, data, 2).index(p, 7) for p in range(30)] != [curriculum.index(p, 7) for p in range(30)]


def test_stages_of_their_own_part_alone_see_every_pair_once_an_epoch(tmp_path):
    """Curry-DPO's: easy, medium and hard pairs, one after the other."""
    source = write_parquet(tmp_path / "a.parquet", scored(10))
    data = Data(train=str(source), resolution=16, curriculum=3, curriculum_updates=5, curriculum_keeps=False)
    curriculum, per_update = Curriculum(load_groups(data, str(source), "train"), data, seed=1), 7
    gaps = [7 * curriculum.index(position, per_update) % 10 for position in range(20 * per_update)]
    for stage, part in zip((gaps[:35], gaps[35:70], gaps[70:]), ({9, 8, 7}, {6, 5, 4}, {3, 2, 1, 0}), strict=True):
        for start in range(0, len(stage) - len(part), len(part)):
            assert set(stage[start : start + len(part)]) == part


def test_one_part_is_the_plain_order_and_needs_no_scores(tmp_path):
    source = write_parquet(tmp_path / "a.parquet", pick_a_pic_rows(7))
    data = Data(train=str(source), resolution=16)
    groups = load_groups(data, str(source), "train")
    curriculum = Curriculum(groups, data, seed=3)
    assert [curriculum.index(p, 4) for p in range(50)] == [order(3, 7, p) for p in range(50)]
    with pytest.raises(DiffpoError, match=r"data\.curriculum .*data\.columns\.score_0=NAME"):
        Curriculum(groups, data.model_copy(update={"curriculum": 2}), seed=3)


def test_captions_of_their_own_follow_their_images_whatever_the_label(tmp_path):
    rows = pick_a_pic_rows(6)
    for i, row in enumerate(rows):
        row |= {"caption_0": f"first {i}", "caption_1": f"second {i}", "label_0": float(i % 2), "label_1": 1.0 - i % 2}
        del row["caption"]
    batches = make(tmp_path, rows)
    for i, group in enumerate(batches.groups.groups):
        assert group.captions == ((f"first {i}", f"second {i}") if i % 2 else (f"second {i}", f"first {i}"))
        assert group.images == ((0, 1) if i % 2 else (1, 0))
    cond = batches.batch([2, 3], [0, 1]).cond["prompt_embeds"]
    expected = [spelt(text) for text in ("second 2", "first 3", "first 2", "second 3")]
    assert torch.equal(cond, torch.stack(expected))


def grey(values) -> bytes:
    """A picture of 16 x 16 whose quarters have these grey values."""
    cells = np.array(values, np.uint8).repeat(8, 0).repeat(8, 1)
    return png(Image.fromarray(cells).convert("RGB"))


def test_a_mask_weighs_the_latents_under_its_white_parts_with_mean_1(tmp_path):
    rows = pick_a_pic_rows(3)
    for row, mask in zip(rows, ([[255, 0], [0, 0]], [[255, 0], [0, 51]], None), strict=True):
        row["mask"] = None if mask is None else grey(mask)
    batches = make(tmp_path, rows, columns=Columns(mask="mask"))
    mask = batches.batch([0, 1, 2], [0, 1, 2]).mask
    assert mask.shape == (6, 1, 2, 2) and torch.equal(mask[:3], mask[3:])
    torch.testing.assert_close(mask[0, 0], torch.tensor([[4.0, 0], [0, 0]]))
    torch.testing.assert_close(mask[1, 0], torch.tensor([[4 / 1.2, 0], [0, 0.8 / 1.2]]))
    assert torch.equal(mask[2], torch.ones(1, 2, 2)), "a row without a mask"
    assert batches.batch([2], [2]).mask is None
    plain = make(tmp_path, [{**row, "mask": None} for row in rows], columns=Columns(mask="mask"))
    assert plain.groups.data_hash != batches.groups.data_hash
    assert plain.groups.data_hash == make(tmp_path, pick_a_pic_rows(3)).groups.data_hash, "as before there were masks"


@pytest.mark.parametrize(
    ("mask", "reason"),
    [(np.zeros((16, 16, 3), np.uint8), "black"), (np.full((8, 16, 3), 255, np.uint8), "16x8 and 16x16")],
)
def test_a_mask_that_cannot_be_used_is_a_bad_row(tmp_path, mask, reason):
    rows = [{**row, "mask": png(Image.fromarray(mask))} for row in pick_a_pic_rows(2)]
    with pytest.raises(DiffpoError, match=reason):
        make(tmp_path, rows, columns=Columns(mask="mask"))


def test_a_preference_of_some_timesteps_is_drawn_from_these_alone(tmp_path):
    rows = [
        {**row, "low": low, "high": high}
        for row, low, high in zip(pick_a_pic_rows(3), (None, 700, 5), (99, None, 5), strict=True)
    ]
    batches = make(tmp_path, rows, columns=Columns(t_low="low", t_high="high"))
    for position in range(20):
        assert batches.batch([0, 1, 2], [position] * 3).draws.timesteps == [(0, 100), (700, 1000), (5, 6)]
    with pytest.raises(DiffpoError, match="9 to 4"):
        make(tmp_path, [{**rows[0], "low": 9, "high": 4}], columns=Columns(t_low="low", t_high="high"))
    beyond = make(tmp_path, [{**rows[0], "low": 1000, "high": 2000}], columns=Columns(t_low="low", t_high="high"))
    with pytest.raises(DiffpoError, match="highest is 999"):
        beyond.batch([0], [0])
