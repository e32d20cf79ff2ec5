import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from diffpo.evaluate.signals import distance, diversity, features, signals


def picture(seed=0, side=64):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(60, 190, (side, side, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1))


def test_each_signal_follows_what_it_is_named_after():
    plain = picture()
    changed = {
        "sharpness": plain.filter(ImageFilter.GaussianBlur(2)),
        "saturation": ImageEnhance.Color(plain).enhance(0.3),
        "contrast": ImageEnhance.Contrast(plain).enhance(0.3),
    }
    for name, lower in changed.items():
        before, after = signals([plain, lower])[name]
        assert after < 0.6 * before
    before, after = signals([plain, ImageEnhance.Contrast(plain).enhance(20)])["clipping"]
    assert before == 0 and after > 0.5


def test_signals_of_pictures_that_one_can_work_out():
    half = np.zeros((10, 10, 3), np.uint8)
    half[:, 5:] = (255, 0, 0)
    found = {name: values[0] for name, values in signals([Image.fromarray(half)]).items()}
    assert found["saturation"] == pytest.approx(0.5) and found["clipping"] == 1
    assert found["contrast"] == pytest.approx(0.299 / 2)
    # at the edge the Laplacian is +0.299 in one column of ten, -0.299 in another, else 0
    assert found["sharpness"] == pytest.approx(0.299 * np.sqrt(0.2))


def test_signals_do_not_depend_on_the_resolution_above_the_common_one():
    small = picture(side=256)
    large = small.resize((1024, 1024), Image.Resampling.NEAREST)
    one, other = signals([small]), signals([large])
    assert all(one[name] == pytest.approx(other[name], abs=1e-9) for name in one)


def test_pixel_features_give_the_root_mean_square_distance():
    black, grey = (Image.new("RGB", (32, 48), (v, v, v)) for v in (0, 51))
    assert distance(features([black]), features([grey])) == pytest.approx([0.2])


def test_diversity_of_seeds_is_the_mean_distance_within_each_prompt():
    f = np.random.default_rng(0).random((6, 5))
    d = [[np.linalg.norm(a - b) for b in f] for a in f]
    found = diversity(f, [1, 0, 1, 0, 1, 2])
    assert found[0] == pytest.approx(d[1][3]) and np.isnan(found[2])
    assert found[1] == pytest.approx((d[0][2] + d[0][4] + d[2][4]) / 3)


def test_with_one_seed_the_mean_and_standard_error_are_those_of_the_distance_between_prompts():
    rng = np.random.default_rng(1)
    f = rng.random((40, 3))
    d = [np.linalg.norm(f[i] - f[j]) for i in range(40) for j in range(i)]
    assert diversity(f, rng.permutation(40)).mean() == pytest.approx(np.mean(d))
    draws = rng.random((400, 40, 3))
    values = np.array([diversity(each, range(40)) for each in draws])
    # the standard error says how much the mean varies from one set of prompts to another
    stated = np.sqrt(np.mean(values.var(1, ddof=1)) / 40)
    assert stated == pytest.approx(values.mean(1).std(), rel=0.12)


def test_diversity_without_two_pictures_to_compare_is_unknown():
    assert np.isnan(diversity(np.ones((2, 3)), [0, 1])).all()
