"""Scorers against the published formulas, computed a second time here from weights of the published names and shapes.

The real weights cannot be downloaded here, so the networks are tiny and random.
"""

from copy import deepcopy

import numpy as np
import pytest
import tiny_scorers
import torch
from PIL import Image
from torch.nn import functional as F

from diffpo import scorers
from diffpo.common.errors import DiffpoError
from diffpo.scorers import imagereward, mps

PROMPTS = ["a red circle", "two blue squares on a cat", "a dog"]
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])
SIZES = [(45, 73), (64, 40), (33, 33)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_scorers.make(tmp_path_factory.mktemp("scorers"))


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def images():
    return [noise(*size, seed) for seed, size in enumerate(SIZES)]


def cropped(image, size):
    """Bicubic by PIL to the shorter side, its middle, normalised; (3, size, size)."""
    short = min(image.size)
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    small = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)) / 255
    top, left = round((height - size) / 2), round((width - size) / 2)
    return torch.tensor((small[top : top + size, left : left + size] - MEAN) / STD).permute(2, 0, 1)


def padded(image, size):
    """HPSv2: the tensor resized to the longer side, black around it, normalised."""
    pixels = torch.tensor(np.asarray(image) / 255).permute(2, 0, 1)
    height, width = (round(side * size / max(pixels.shape[1:])) for side in pixels.shape[1:])
    small = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True, align_corners=False)[0]
    canvas = torch.zeros(3, size, size, dtype=torch.float64)
    top, left = (size - height) // 2, (size - width) // 2
    canvas[:, top : top + height, left : left + width] = small
    return (canvas - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def attention(query, key, value, heads, mask=None):
    """Softmax attention, written out: (l, d), (k, d), (k, d) -> (l, d)."""
    parts = []
    for q, k, v in zip(query.chunk(heads, 1), key.chunk(heads, 1), value.chunk(heads, 1), strict=True):
        weight = q @ k.T / q.shape[1] ** 0.5
        if mask is not None:
            weight = weight.masked_fill(~mask, -torch.inf)
        parts.append(weight.softmax(1) @ v)
    return torch.cat(parts, 1)


# ---- ImageReward


def blip(state, pixels, ids):
    """BLIP as published (Li et al. 2022), for one picture (3, H, W) and the tokens of one text, without padding."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def normed(name, x, eps):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def gelu(x):
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    eye, mouth = "blip.visual_encoder.", "blip.text_encoder."
    patches = pixels.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)
    kernel = state[f"{eye}patch_embed.proj.weight"].flatten(1)
    x = torch.cat([state[f"{eye}cls_token"][0], patches @ kernel.T + state[f"{eye}patch_embed.proj.bias"]])
    x = x + state[f"{eye}pos_embed"][0]
    for i in range(2):
        at = f"{eye}blocks.{i}."
        q, k, v = linear(f"{at}attn.qkv", normed(f"{at}norm1", x, 1e-6)).chunk(3, 1)
        x = x + linear(f"{at}attn.proj", attention(q, k, v, 2))
        x = x + linear(f"{at}mlp.fc2", gelu(linear(f"{at}mlp.fc1", normed(f"{at}norm2", x, 1e-6))))
    seen = normed(f"{eye}norm", x, 1e-6)

    y = state[f"{mouth}embeddings.word_embeddings.weight"][ids]
    y = y + state[f"{mouth}embeddings.position_embeddings.weight"][: len(ids)]
    y = normed(f"{mouth}embeddings.LayerNorm", y, 1e-12)
    for i in range(2):
        for which in ("attention", "crossattention"):
            at, source = f"{mouth}encoder.layer.{i}.{which}.", y if which == "attention" else seen
            q, k, v = linear(f"{at}self.query", y), linear(f"{at}self.key", source), linear(f"{at}self.value", source)
            y = normed(f"{at}output.LayerNorm", linear(f"{at}output.dense", attention(q, k, v, 2)) + y, 1e-12)
        at = f"{mouth}encoder.layer.{i}."
        wide = linear(f"{at}output.dense", gelu(linear(f"{at}intermediate.dense", y)))
        y = normed(f"{at}output.LayerNorm", wide + y, 1e-12)
    z = y[0]
    for place in (0, 2, 4, 6, 7):  # no activation in between
        z = linear(f"mlp.layers.{place}", z)
    return (z[0] - 0.16717362830052426) / 1.0333394966054072


def test_imagereward_is_the_published_network(made, images):
    state = tiny_scorers.random_state(tiny_scorers.blip_shapes(tiny_scorers.VISION, tiny_scorers.TEXT))
    state = {key: value.double() for key, value in state.items()}
    prompts = [*PROMPTS[:2], " ".join(["a red cat"] * 20)]
    scorer, words = made["imagereward"], tiny_scorers.WORDS
    found = scorer.score(images, prompts)["imagereward"]
    exact = imagereward.ImageReward(deepcopy(scorer.network).double(), scorer.tokenizer)
    for image, prompt, score in zip(images, prompts, found, strict=True):
        ids = [words.index("[CLS]"), *(words.index(w) for w in prompt.split()[:33]), words.index("[SEP]")]  # 35
        pixels = cropped(image, 32)
        expected = blip(state, pixels, ids).item()
        assert exact._reward(pixels[None], [prompt]).item() == pytest.approx(expected, abs=1e-9)
        assert score == pytest.approx(expected, abs=2e-4)  # with the preprocessing, in float32
    assert np.ptp(found) > 0.05


def test_imagereward_takes_the_published_names_and_shapes():
    shapes = tiny_scorers.blip_shapes(imagereward.VISION, imagereward.TEXT)
    assert shapes["blip.visual_encoder.pos_embed"] == (1, 197, 1024)
    with torch.device("meta"):
        network = imagereward.Network(imagereward.VISION, imagereward.TEXT)
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
    network.load(state | {"blip.text_encoder.embeddings.position_ids": torch.arange(512)[None]})
    wanted = sum(value.numel() for value in network.state_dict().values())
    assert sum(value.numel() for value in state.values()) == wanted
    del state["blip.text_encoder.encoder.layer.3.crossattention.self.key.bias"]
    with pytest.raises(RuntimeError, match="crossattention"):
        network.load(state)


# ---- MPS


def crossed(state, x, context, keep):
    """The published layers: x (l, d), context (k, d), keep (k,)."""
    heads, head = 2, 8

    def normed(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def swiglu(x):
        value, gate = x.chunk(2, 1)
        return value * gate / (1 + (-gate).exp())

    def turned(x):
        """Each pair (x_j, x_{j + w/2}) as a complex number, turned by position / 10000^(2j/w)."""
        number = torch.complex(x[:, : head // 2], x[:, head // 2 :])
        angle = torch.arange(len(x))[:, None] / 10000 ** (2 * torch.arange(head // 2) / head)
        number = number * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([number.real, number.imag], 1)

    def many(x):
        return torch.cat([x] * heads, 1)

    for i in range(2):
        at = f"cross_model.layers.{i}.0.fn."
        y = normed(f"{at}norm", x)
        k, v = (context @ state[f"{at}to_kv.weight"].T).chunk(2, 1)
        attended = attention(y @ state[f"{at}to_q.weight"].T, many(k), many(v), heads, keep)
        wide = swiglu(y @ state[f"{at}ff.0.weight"].T) @ state[f"{at}ff.2.weight"].T
        x = x + attended @ state[f"{at}to_out.weight"].T + wide
        at = f"cross_model.layers.{i}.1.fn."
        y = normed(f"{at}norm", x) @ state[f"{at}fused_attn_ff_proj.weight"].T
        q, k, v, wide = y.split([heads * head, head, head, 8 * x.shape[1]], 1)
        q = torch.cat([turned(each) for each in q.chunk(heads, 1)], 1)
        attended = attention(q, many(turned(k)), many(v), heads)
        x = x + attended @ state[f"{at}attn_out.weight"].T + swiglu(wide) @ state[f"{at}ff_out.1.weight"].T
    return x


def test_mps_is_the_published_network(made, images):
    scorer = made["mps"]
    state = {k: v.double() for k, v in tiny_scorers.random_state(tiny_scorers.cross_shapes(12, 2, 2, 8)).items()}
    found = scorer.score(images, PROMPTS)["mps"]
    exact = mps.MPS(deepcopy(scorer.model).double(), deepcopy(scorer.layers).double(), scorer.processor)
    clip, kept = exact.model, []
    with torch.no_grad():
        for image, prompt, score in zip(images, PROMPTS, found, strict=True):
            texts = scorer.processor(text=[prompt, mps.CONDITION], padding="max_length", truncation=True, max_length=77)
            words = clip.text_model(torch.tensor(texts.input_ids))
            features = clip.text_projection(words.last_hidden_state)
            near = (features[0] @ features[1].T).max(1).values
            kept.append(keep := near / near.max() > 0.3)
            pixels = cropped(image, 16)[None]
            seen = clip.vision_model(pixels).last_hidden_state
            first = crossed(state, clip.visual_projection(seen)[0], features[0], keep)[0]
            text = clip.text_projection(words.pooler_output)[0]
            expected = (clip.logit_scale.exp() * (first @ text) / (first.norm() * text.norm())).item()
            assert exact._cosine(pixels, [prompt]).item() == pytest.approx(expected, abs=1e-6)
            assert score == pytest.approx(expected, abs=2e-2)  # PIL and torchvision round differently
    assert all(0 < keep.sum() < len(keep) for keep in kept)  # some words count, and some do not
    assert np.ptp(found) > 0.1


def test_mps_takes_the_published_shapes():
    shapes = tiny_scorers.cross_shapes(1024, 4, 16, 64)
    assert shapes["cross_model.layers.3.1.fn.fused_attn_ff_proj.weight"] == (9344, 1024)
    with torch.device("meta"):
        layers = mps.Layers()
        mps.load_published(torch.nn.Module(), layers, {name: torch.empty(shape) for name, shape in shapes.items()})


def test_the_words_that_are_far_from_the_condition_do_not_count(made, images):
    """A token that is left out by the mask changes nothing, one that is kept does."""
    layers = made["mps"].layers
    x, context = torch.randn(1, 5, 12), torch.randn(1, 3, 12)
    keep = torch.tensor([[True, False, True]])
    other = context.clone()
    other[:, 1] += 1
    torch.testing.assert_close(layers(x, context, keep), layers(x, other, keep))
    assert (layers(x, context, ~keep) - layers(x, other, ~keep)).abs().max() > 1e-3


# ---- HPS, and what holds for all


def test_hps_is_the_cosine_of_the_padded_picture_in_both_versions(made, images):
    scorer = made["hps"]
    found = {name: made[name].score(images, PROMPTS)[name] for name in ("hps", "hps2.0")}
    with torch.no_grad():
        for i, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
            a = scorer.model.encode_image(padded(image, 32)[None].float())[0]
            b = scorer.model.encode_text(scorer.tokenizer([prompt]))[0]
            expected = (a @ b / (a.norm() * b.norm())).item()
            assert found["hps"][i] == pytest.approx(expected, abs=1e-5) == pytest.approx(found["hps2.0"][i], abs=1e-5)


@pytest.mark.parametrize("name", scorers.DIFFERENTIABLE)
def test_a_score_does_not_depend_on_the_batch(made, images, name):
    whole = made[name].score(images, PROMPTS)[name]
    alone = [made[name].score([image], [prompt])[name][0] for image, prompt in zip(images, PROMPTS, strict=True)]
    np.testing.assert_allclose(whole, alone, atol=2e-4)
    turned = made[name].score(images[::-1], PROMPTS[::-1])[name][::-1]
    np.testing.assert_allclose(whole, turned, atol=2e-4)


@pytest.mark.parametrize("name", scorers.DIFFERENTIABLE)
def test_other_modes_are_the_same_picture(made, name):
    picture = noise(41, 57)
    grey = picture.convert("L")
    clear = picture.convert("RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 57).astype(np.uint8), (41, 1))))
    alpha = np.asarray(clear, np.float64)[..., 3:] / 255
    white = Image.fromarray((np.asarray(picture) * alpha + 255 * (1 - alpha)).round().astype(np.uint8))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256)
    pairs = [(grey, grey.convert("RGB"), 1e-6), (deep, grey.convert("RGB"), 1e-6), (clear, white, 0.02)]
    for one, other, tolerance in pairs:
        a, b = (made[name].score([each], PROMPTS[:1])[name][0] for each in (one, other))
        assert a == pytest.approx(b, abs=tolerance * max(1, abs(b)))


@pytest.mark.parametrize("name", [name for name in scorers.DIFFERENTIABLE if name != "aesthetic"])
def test_long_prompts_are_cut_and_not_refused(made, images, name):
    long = " ".join(["a red circle and two blue squares"] * 40)
    cut = " ".join(long.split()[: 33 if name == "imagereward" else 200])
    one, other = (made[name].score(images[:1], [text])[name][0] for text in (f"{long} dog cat dog", cut))
    assert one == pytest.approx(other, abs=1e-5)


# ---- weights


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("imagereward=/no/such/file.pt", "hf download THUDM/ImageReward ImageReward.pt"),
        ("hps2.0=/no/such/file.pt", "hf download xswu/HPSv2 HPS_v2_compressed.pt"),
        ("mps", r"reading it runs code.*mps=mps\.pt"),
        ("mps=/no/such/file.pt", "MPS from /no/such/file.pt"),
    ],
)
def test_missing_weights_are_one_message_that_says_what_to_do(spec, said):
    with pytest.raises(DiffpoError, match=said):
        scorers.load(spec)


def test_a_pickled_model_is_not_read(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    with pytest.raises(DiffpoError, match=r"whole\.pth.*\n.*state_dict"):
        scorers.load(f"mps={tmp_path / 'whole.pth'}")


def test_the_two_versions_of_hps_have_names_of_their_own():
    assert scorers.parse("hps2.0") == scorers.Spec("hps2.0") and scorers.parse("hps2.0=x.pt").source == "x.pt"
    assert scorers.parse("hps").name == "hps"
