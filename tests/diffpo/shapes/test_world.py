"""The embedded world: captions, the compositional split, and an oracle that must recognise rendered scenes."""

from itertools import product

import numpy as np
import pytest
from PIL import Image

from diffpo.shapes import ATTRIBUTES, SIZE, heldout_captions, parse, render, sample_scene, score, train_captions
from diffpo.shapes.oracle import FOLLOWING_WEIGHT, read
from diffpo.shapes.scenes import ALL_SCENES, BACKGROUNDS, COLOURS, HELD_OUT_OBJECTS, RELATIONS, Scene, draw


def test_captions_are_distinct_and_parse_back():
    captions = [scene.caption for scene in ALL_SCENES]
    assert len(set(captions)) == len(captions)
    assert all(parse(scene.caption) == scene for scene in ALL_SCENES)


def test_unknown_caption_is_named():
    with pytest.raises(ValueError, match="a red elephant"):
        parse("a red elephant on a white background")


def test_split_is_compositional():
    train, held = set(train_captions()), set(heldout_captions())
    assert not train & held
    assert len(held) >= 1024
    seen = {kind for caption in train for kind in parse(caption).objects}
    assert seen.isdisjoint(HELD_OUT_OBJECTS)
    # the colour and the shape of a held-out object both occur in training, but not together
    for colour, shape in HELD_OUT_OBJECTS:
        assert any(c == colour for c, _ in seen) and any(s == shape for _, s in seen)
    # some pairs of objects are held out although both objects occur in training
    train_pairs = {frozenset(parse(c).objects) for c in train}
    known = [parse(c) for c in held if seen.issuperset(parse(c).objects)]
    assert known and all(frozenset(s.objects) not in train_pairs for s in known)


def test_training_scenes_never_leave_the_split():
    rng = np.random.default_rng(0)
    assert not any(sample_scene(rng).held_out for _ in range(2000))


def test_oracle_is_exact_on_rendered_scenes():
    # every scene of equal objects, and 10 relational ones for each background and relation, so that every colour, shape
    # and count occurs on every background; scripts/check_oracle.py checks 10,000 random scenes
    rng = np.random.default_rng(1)
    scenes = [scene for scene in ALL_SCENES if scene.relation is None]
    for background, relation in product(BACKGROUNDS, RELATIONS):
        pool = [scene for scene in ALL_SCENES if (scene.background, scene.relation) == (background, relation)]
        scenes += [pool[i] for i in rng.choice(len(pool), 10, replace=False)]
    right = []
    for scene in scenes:
        result = score(render(scene, rng), scene.caption)
        right.append(result["all_right"])
        assert result["following"] > 0.97 and result["appearance"] > 0.85
    assert np.mean(right) >= 0.995


@pytest.mark.parametrize(
    ("attribute", "change"),
    [
        ("background", "a red circle left of a green square on a black background"),
        ("colour", "a purple circle left of a green square on a white background"),
        ("shape", "a red triangle left of a green square on a white background"),
        ("relation", "a red circle right of a green square on a white background"),
    ],
)
def test_only_the_changed_attribute_is_wrong(attribute, change):
    rng = np.random.default_rng(2)
    for _ in range(20):
        image = render(parse("a red circle left of a green square on a white background"), rng)
        result = score(image, change)
        wrong = {a for a in ATTRIBUTES if result[f"right_{a}"] == 0}
        assert wrong == {attribute} and result["all_right"] == 0
        assert result[attribute] < 0.6


def test_wrong_count():
    rng = np.random.default_rng(3)
    image = render(parse("three red circles on a black background"), rng)
    result = score(image, "two red circles on a black background")
    assert result["right_count"] == 0 and result["right_colour"] == 1 and result["right_shape"] == 1
    assert result["count"] == pytest.approx(2 / 3)
    assert np.isnan(result["relation"])


def test_total_is_the_weighted_mean():
    rng = np.random.default_rng(4)
    image = np.clip(render(sample_scene(rng), rng) + rng.normal(0, 10, (SIZE, SIZE, 3)), 0, 255)
    result = score(image, "a red circle on a gray background")
    assert result["total"] == FOLLOWING_WEIGHT * result["following"] + (1 - FOLLOWING_WEIGHT) * result["appearance"]


def test_scores_fall_smoothly_with_noise():
    rng = np.random.default_rng(5)
    scenes = [sample_scene(rng) for _ in range(60)]
    images = [render(s, rng).astype(float) for s in scenes]
    noise = [rng.normal(0, 1, (SIZE, SIZE, 3)) for _ in scenes]
    levels = (0, 3, 6, 10, 15, 20, 30, 40, 50, 60, 80)
    means = []
    for sigma in levels:
        each = [score(np.clip(i + sigma * e, 0, 255), s) for i, e, s in zip(images, noise, scenes, strict=True)]
        means.append([np.mean([r[k] for r in each]) for k in ("appearance", "following")])
    appearance, following = np.array(means).T
    assert (np.diff(appearance) < 0).all()
    assert (np.diff(following) < 1e-3).all()
    assert following[levels.index(20)] > 0.95 and following[-1] < 0.5


def test_stray_paint_and_soft_edges_lower_the_appearance():
    scene = [("red", "circle", 10.0, 16.0, 5.5), ("green", "square", 23.0, 16.0, 5.5)]
    clean = draw(scene, "white")
    stray = clean.copy()
    stray[2:4, 14:17] = COLOURS["blue"]
    blurred = np.asarray(Image.fromarray(clean.round().astype(np.uint8)).resize((16, 16)).resize((32, 32)), float)
    clean_score, stray_score, blurred_score = (read(x).appearance for x in (clean, stray, blurred))
    assert clean_score > 0.9
    assert stray_score < clean_score - 0.2 and blurred_score < clean_score - 0.2
    assert len(read(stray).objects) == 2  # a speck is not an object


def test_larger_images_are_reduced_and_other_shapes_refused():
    rng = np.random.default_rng(6)
    scene = Scene((("cyan", "square"),), None, "brown")
    image = Image.fromarray(render(scene, rng))
    assert score(image.resize((128, 128), Image.Resampling.NEAREST), scene)["all_right"] == 1
    with pytest.raises(ValueError, match="16, 16"):
        score(np.zeros((16, 16, 3)), scene)
