"""Weights cannot be downloaded here: preprocessing and arithmetic are tested on tiny random models of the same kind."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from diffpo import scorers, shapes
from diffpo.common.errors import DiffpoError
from diffpo.scorers import aesthetic, hps
from diffpo.scorers.clip import ClipScore
from diffpo.scorers.pickscore import PickScore

PROMPTS = ["a red circle on a black background", "two cyan squares on a white background"]


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in ((48, 64, 3), (40, 40, 3))]


@pytest.fixture(scope="module")
def tiny_clip():
    """An open_clip CLIP and its own transform and tokenizer, 2 layers wide."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()
    transform = open_clip.image_transform(32, is_train=False)
    return model, transform, open_clip.get_tokenizer("ViT-B-32")


def test_shapes_scores_a_rendered_scene_as_right_and_another_one_as_wrong():
    scene, other = shapes.parse(PROMPTS[1]), shapes.parse("a red circle left of a blue square on a black background")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(shapes.render(s, rng)) for s in (scene, other)]
    scores = scorers.load("shapes").score(pictures, [scene.caption, scene.caption])
    assert scores["shapes.all_right"].tolist() == [1, 0]
    assert scores["shapes.following"][0] > 0.95 > 0.5 > scores["shapes.following"][1]
    assert (
        np.isnan(scores["shapes.right_relation"]).all() and "shapes.right_relation" in scorers.load("shapes").optional
    )
    assert all(values.dtype == np.float64 and values.shape == (2,) for values in scores.values())


def test_shapes_refuses_a_prompt_of_another_world():
    with pytest.raises(DiffpoError, match="astronaut"):
        scorers.load("shapes").score([Image.new("RGB", (32, 32))], ["an astronaut on a horse"])


def test_pickscore_is_the_scaled_cosine_of_the_projected_features(images, tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": vocab["<|startoftext|>"], "eos_token_id": vocab["<|endoftext|>"]}
    config = CLIPConfig(
        text_config={**small, **ids, "vocab_size": len(vocab), "pad_token_id": ids["eos_token_id"]},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    model = CLIPModel(config).eval()
    scores = PickScore(model, processor).score(images, PROMPTS)["pickscore"]

    with torch.no_grad():  # the model's own forward pass computes exp(logit_scale) * cosine by itself, one at a time
        for image, prompt, score in zip(images, PROMPTS, scores, strict=True):
            inputs = processor(text=[prompt], images=[image], return_tensors="pt")
            assert score == pytest.approx(model(**inputs).logits_per_image.item(), abs=1e-4)
    assert abs(scores[0] - scores[1]) > 1e-3  # the two are told apart at all

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = scorers.load(f"pickscore={tmp_path}").score(images, PROMPTS)["pickscore"]
    np.testing.assert_allclose(again, scores, atol=1e-5)


def test_clip_is_the_cosine(images, tiny_clip):
    model, transform, tokenizer = tiny_clip
    scores = ClipScore(model, transform, tokenizer).score(images, PROMPTS)["clip"]
    with torch.no_grad():
        for image, prompt, score in zip(images, PROMPTS, scores, strict=True):
            a, b = model.encode_image(transform(image)[None])[0], model.encode_text(tokenizer([prompt]))[0]
            assert score == pytest.approx((a @ b / (a.norm() * b.norm())).item(), abs=1e-5)


def test_hps_keeps_a_wide_picture_whole_and_pads_black():
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    wide = Image.new("RGB", (64, 32), (255, 0, 0))
    pixels = hps.preprocess(wide, 32)
    assert pixels.shape == (3, 32, 32)
    back = pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    red = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 16, 32)
    torch.testing.assert_close(back[:, 8:24], red, atol=1e-5, rtol=0)  # all columns: nothing was cut off
    assert back[:, :8].abs().max() < 1e-6 and back[:, 24:].abs().max() < 1e-6  # black before normalising, not grey
    # a tall picture is padded left and right, an rest goes to the right
    tall = hps.preprocess(Image.new("RGB", (33, 64), (255, 255, 255)), 32)
    assert (tall[0, 16] > 0).nonzero()[:, 0].tolist() == list(range(8, 24))


def test_hps_preprocessing_of_a_square_is_close_to_the_stock_transform(images):
    stock = open_clip.image_transform(32, is_train=False)(images[1])
    ours = hps.preprocess(images[1], 32)
    assert (ours - stock).abs().mean() < 0.02  # PIL rounds to 8 bits after resizing, a tensor does not


def test_hps_is_the_bare_cosine_of_the_padded_picture(images, tiny_clip):
    model, _, tokenizer = tiny_clip
    scores = hps.HPS(model, tokenizer).score(images, PROMPTS)["hps"]
    with torch.no_grad():
        pixels = hps.preprocess(images[0], 32)
        a, b = model.encode_image(pixels[None])[0], model.encode_text(tokenizer(PROMPTS[:1]))[0]
        assert scores[0] == pytest.approx((a @ b / (a.norm() * b.norm())).item(), abs=1e-5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_is_the_published_head_on_the_normalised_picture(images, tiny_clip, tmp_path, suffix):
    model, transform, _ = tiny_clip
    torch.manual_seed(1)
    head, path = aesthetic.head(24), tmp_path / f"head{suffix}"
    state = {f"layers.{key}": value for key, value in head.state_dict().items()}
    if suffix == ".pth":
        torch.save(state, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    scores = aesthetic.Aesthetic(model, transform, aesthetic.load_head(path)).score(images, PROMPTS)["aesthetic"]
    with torch.no_grad():
        features = model.encode_image(torch.stack([transform(image) for image in images])).double().numpy()
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    for layer in (0, 2, 4, 6, 7):  # no activation in between
        x = x @ state[f"layers.{layer}.weight"].double().numpy().T + state[f"layers.{layer}.bias"].double().numpy()
    np.testing.assert_allclose(scores, x[:, 0], atol=1e-5)


def test_aesthetic_head_has_the_published_shape():
    shapes_ = {key: tuple(value.shape) for key, value in aesthetic.head().state_dict().items() if "weight" in key}
    assert shapes_ == {
        "0.weight": (1024, 768),
        "2.weight": (128, 1024),
        "4.weight": (64, 128),
        "6.weight": (16, 64),
        "7.weight": (1, 16),
    }


def test_unknown_scorer_offers_the_nearest_name():
    with pytest.raises(DiffpoError, match="'pickscor': did you mean pickscore"):
        scorers.load("pickscor")


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("pickscore=/no/such/folder", "/no/such/folder"),
        ("hps=/no/such/file.pt", "/no/such/file.pt"),
        ("clip=ViT-B-32:/no/such/file.pt", "ViT-B-32:/no/such/file.pt"),
        ("clip=ViT-B-32", "no weights named"),
    ],
)
def test_missing_weights_are_one_error_that_names_the_model_and_the_way_out(spec, named):
    with pytest.raises(DiffpoError) as caught:
        scorers.load(spec)
    message = str(caught.value)
    assert named in message and ("hf download" in message or "--scorers clip=" in message)


def test_weights_are_never_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (json.dumps, ("never runs",))

    torch.save({"state_dict": Evil()}, tmp_path / "weights.pt")
    with pytest.raises(DiffpoError, match=r"weights\.pt"):
        scorers.load(f"hps={tmp_path / 'weights.pt'}")
