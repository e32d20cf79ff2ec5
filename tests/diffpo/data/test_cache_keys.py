"""What a cache is keyed by: whatever changes a latent or an embedding gives another key, or is refused."""

import json
import os
import shutil
import weakref

import pytest
import torch
from test_batches import Family as Fake
from tiny import picture, write_folder

from diffpo import models
from diffpo.commands import disk
from diffpo.common.errors import DiffpoError
from diffpo.config import Data, Model
from diffpo.data.batches import Batches
from diffpo.data.cache import module_key
from diffpo.data.groups import load_groups
from diffpo.train.build import load_data, make_accelerator

FAMILIES = ("sd", "sdxl", "sd3", "pixart", "pixart_alpha", "flux", "dit")


def family_of(path, precision="no", **options):
    family = models.load(Model(path=str(path), **options), precision, 16)
    family.load_encoders()
    return family


@pytest.fixture
def pairs(tmp_path):
    """pairs(**options) -> the keys of text and latents, and how many images were encoded, for a folder of images."""
    write_folder(tmp_path / "pairs", 3)

    def make(**options):
        source, family = str(tmp_path / "pairs"), Fake()
        data = Data(train=source, **{"resolution": 16, "cache": str(tmp_path / "cache"), **options})
        batches = Batches(load_groups(data, source, "train"), data, family)
        return batches.text.key, batches.latents.key if batches.cached else None, family.encoded

    return make


def test_latents_are_keyed_by_what_is_in_the_files(pairs, tmp_path):
    text, latents, encoded = pairs()
    assert encoded == 6 and pairs() == (text, latents, 0)
    changed = tmp_path / "pairs" / "images" / "1-rejected.png"
    before = changed.stat()
    picture(99).save(changed)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))  # same path, same time
    new = pairs()
    assert new[0] == text and new[1] != latents and new[2] == 6
    os.rename(changed, changed.with_name("moved.png"))  # other path, same content
    metadata = tmp_path / "pairs" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("1-rejected", "moved"))
    assert pairs() == (*new[:2], 0)


def test_text_is_keyed_by_the_captions(pairs, tmp_path):
    text, latents, _ = pairs()
    metadata = tmp_path / "pairs" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("dog 1", "dog one"))
    new = pairs()
    assert new[0] != text and new[1:] == (latents, 0)


def test_views_have_their_own_latents_or_none(pairs):
    keys = [pairs(resolution=size)[1] for size in (8, 16, 24)]
    assert len(set(keys)) == 3
    assert pairs(buckets=True)[1] == keys[1]  # square pictures in the square bucket
    for option in ({"crop": "random"}, {"flip": True}, {"cache_latents": False}):
        assert pairs(**option)[1:] == (None, 0)


def test_an_image_that_changes_while_the_run_starts_is_not_cached_under_the_old_key(tmp_path):
    source = str(write_folder(tmp_path / "pairs", 3))
    data = Data(train=source, resolution=16, cache=str(tmp_path / "cache"))
    groups = load_groups(data, source, "train")
    picture(99).save(tmp_path / "pairs" / "images" / "2-chosen.png")
    with pytest.raises(DiffpoError, match=r"row 2 .*2-chosen\.png"):
        Batches(groups, data, Fake())
    assert not list((tmp_path / "cache").glob("latents-*/*"))


@pytest.mark.parametrize("name", FAMILIES)
def test_any_weight_of_any_encoder_changes_its_key_alone(tiny_folder, name):
    family = family_of(tiny_folder(name))
    same = family_of(tiny_folder(name))
    keys = family.text_hash(), family.vae_hash()
    assert keys == (same.text_hash(), same.vae_hash())
    for part in (*family.encoders, "vae"):
        weights = max(getattr(family.pipe, part).parameters(), key=torch.numel).data.flatten()
        place = weights.numel() - 2  # one of thousands, and by one bit
        old = weights[place].item()
        weights[place] = torch.nextafter(weights[place], torch.tensor(9.0))
        assert (family.text_hash() == keys[0], family.vae_hash() == keys[1]) == (part == "vae", part != "vae")
        weights[place] = old
        assert (family.text_hash(), family.vae_hash()) == keys


def test_the_same_encoder_read_otherwise_has_another_key(tiny_folder, tmp_path):
    """Precision, activation, the unconditional embedding, the number of tokens: all with the same weights."""
    base = family_of(tiny_folder("sdxl")).text_hash()
    halves = {family_of(tiny_folder("sdxl"), precision).text_hash() for precision in ("bf16", "fp16")}
    assert len({base, *halves}) == 3
    for file, key, value in (
        ("model_index.json", "force_zeros_for_empty_prompt", False),
        ("text_encoder/config.json", "hidden_act", "gelu"),
        ("tokenizer_2/tokenizer_config.json", "model_max_length", 12),
    ):
        other = tmp_path / key
        shutil.copytree(tiny_folder("sdxl"), other)
        settings = json.loads((other / file).read_text())
        (other / file).write_text(json.dumps({**settings, key: value}))
        assert family_of(other).text_hash() != base, key
    sigma, alpha = family_of(tiny_folder("pixart")), family_of(tiny_folder("pixart_alpha"))
    assert module_key(sigma.pipe.text_encoder) == module_key(alpha.pipe.text_encoder)
    lengths = [family.encode_text(["a cat"])["prompt_embeds"].shape[1] for family in (sigma, alpha)]
    assert lengths == [300, 120] and sigma.text_hash() != alpha.text_hash()


@pytest.mark.parametrize("name", FAMILIES)
def test_caches_are_as_large_as_check_says_and_nothing_holds_the_encoders(tiny_folder, name, tmp_path, make_config):
    config = make_config(tiny_folder(name), f"data.cache={tmp_path}")
    groups = load_groups(config.data, config.data.train, "train")
    for group in groups.groups:
        object.__setattr__(group, "captions", ("3",))  # a class, for DiT
    family = family_of(tiny_folder(name), "bf16")
    batches = Batches(groups, config.data, family)

    watched = {part: watch(getattr(family.pipe, part)) for part in (*family.encoders, "vae")}
    for keep in (True, False):
        family.free_encoders(keep_vae=keep)
        assert alive(watched) == ({"vae"} if keep else set())
    assert len(batches.batch([0, 1], [0, 1]).x_0) == 4  # from the caches

    pictures = len({picture for group in groups.groups for picture in group.hashes})
    text, latents = disk.size(family, family.meta_network(), groups, cached=True)
    assert disk.size(family, family.meta_network(), groups, cached=False) == (text, 0)
    assert stored(batches.latents) == latents == pictures * 2 * 4 * 4 * 8 * 8
    # the tiny CLIP tokenizers read 16 tokens where the real ones read 77, and alpha reads fewer than Sigma
    exact = name in ("pixart", "flux", "dit")
    assert stored(batches.text) == text if exact else text / 6 < stored(batches.text) < text


def watch(module):
    return [weakref.ref(module), *map(weakref.ref, module.parameters())]


def alive(watched):
    return {part for part, found in watched.items() if any(each() is not None for each in found)}


def stored(cache):
    """Bytes in its one file, without the header."""
    held = sum(value.numel() * value.itemsize for value in cache.read(range(cache.rows)).values())
    assert held < cache.path(0).stat().st_size <= held + 400
    return held


@pytest.mark.parametrize(("options", "left"), [((), set()), (("data.cache_latents=false",), {"vae"})])
def test_they_have_left_when_training_starts(tiny_sdxl, make_config, tmp_path, options, left):
    config = make_config(tiny_sdxl, f"data.cache={tmp_path / 'empty'}", *options)
    family = models.load(config.model, "no", 16)
    load, watched = family.load_encoders, {}

    def watched_load(device):
        load(device)
        watched.update({part: watch(getattr(family.pipe, part)) for part in (*family.encoders, "vae")})

    family.load_encoders = watched_load
    sources = load_data(config, family, make_accelerator(config.train))
    assert alive(watched) == left
    assert len(watched) == 3 and len(sources.batches.batch([0], [0]).x_0) == 2
