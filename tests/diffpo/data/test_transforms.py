import numpy as np
import pytest
import torch
from tiny import picture

from diffpo.common.rng import generator
from diffpo.data.transforms import pixels, view


def test_center_crop_and_sdxl_micro_conditioning():
    draw = torch.Generator()
    assert view((24, 16), 16, "center", False, draw).micro_conditioning == (16, 24, 0, 4, 16, 16)
    assert view((32, 96), 16, "center", False, draw).micro_conditioning == (96, 32, 16, 0, 16, 16)
    image = picture(0, (24, 16))
    expected = np.asarray(image)[:, 4:20].transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(pixels(image, view(image.size, 16, "center", False, draw)), expected, atol=1e-6)


@pytest.mark.parametrize("position", range(8))
def test_random_crop_and_flip_say_where_they_cut(position):
    image = picture(1, (40, 24))
    seen = view(image.size, 24, "random", True, generator(0, "data", position))
    array = np.asarray(image)[:, ::-1] if seen.flip else np.asarray(image)
    _, _, top, left, _, _ = seen.micro_conditioning
    expected = array[top : top + 24, left : left + 24].transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(pixels(image, seen), expected, atol=1e-6)


def test_random_views_reach_every_place_and_are_stateless():
    views = [view((40, 24), 24, "random", True, generator(0, "data", i)) for i in range(400)]
    assert {seen.left for seen in views} == set(range(17))
    assert 150 < sum(seen.flip for seen in views) < 250
    assert view((40, 24), 24, "random", True, generator(0, "data", 7)) == views[7]
    assert len({tuple(torch.rand(1, generator=generator(s, p, i))) for s in (0, 1) for p in "ab" for i in (0, 1)}) == 8


def test_small_images_are_enlarged_and_the_truth_is_told():
    seen = view((8, 8), 16, "center", False, torch.Generator())
    assert seen.micro_conditioning == (8, 8, 0, 0, 16, 16)
    assert pixels(picture(0, (8, 8)), seen).shape == (3, 16, 16)
