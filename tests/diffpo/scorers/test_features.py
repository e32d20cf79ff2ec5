"""Feature vectors of pictures: the published preprocessing and network, on tiny random networks of the same kind."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from diffpo import shapes
from diffpo.common.errors import DiffpoError
from diffpo.scorers import features

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A folder with a DINOv2 of 2 layers, and the image processor of the published one at an eighth of its size."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(
        Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(folder)
    processor = BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}, image_mean=MEAN, image_std=STD, resample=3
    )
    processor.save_pretrained(folder)
    return folder


def noise(*size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


def test_dino_is_the_class_token_of_the_cropped_picture(dino):
    from transformers import Dinov2Model

    found = features.load(f"dinov2={dino}")
    pictures = [noise(45, 73, 3), noise(64, 40, 3, seed=1)]
    vectors = found.embed(pictures)
    assert vectors.shape == (2, 24) and vectors.dtype == np.float32 and str(dino) in found.name

    network = Dinov2Model.from_pretrained(dino).eval()
    for picture, vector in zip(pictures, vectors, strict=True):
        scale = 32 / min(picture.size)
        width, height = (int(side * scale) if side > min(picture.size) else 32 for side in picture.size)
        small = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - 28) // 2, (height - 28) // 2
        crop = small.crop((left, top, left + 28, top + 28))
        pixels = (np.asarray(crop) / 255 - MEAN) / STD
        with torch.no_grad():
            hidden = network(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]).last_hidden_state
        # torchvision's resize of the processor and PIL's differ by a level of 255 at some pixels
        np.testing.assert_allclose(vector, hidden[0, 0].numpy(), atol=0.02)
    assert np.abs(vectors[0] - vectors[1]).max() > 0.1


@pytest.mark.parametrize("spec", ["dinov2", "shapes"])
def test_a_vector_does_not_depend_on_the_others_nor_on_the_mode(dino, spec, monkeypatch):
    monkeypatch.setattr(features, "AT_ONCE", 2)
    found = features.load(f"dinov2={dino}" if spec == "dinov2" else spec)
    pictures = [noise(40, 40, 3, seed=seed) for seed in range(3)]
    pictures += [pictures[0].convert("RGBA"), pictures[0].convert("L"), noise(31, 57, 3)]
    vectors = found.embed(pictures)
    for picture, vector in zip(pictures, vectors, strict=True):
        np.testing.assert_allclose(found.embed([picture])[0], vector, atol=1e-5)
    np.testing.assert_allclose(vectors[3], vectors[0], atol=1e-5)
    assert found.embed([]).shape[0] == 0


def test_the_clip_tower_is_open_clips_before_it_is_normalised():
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text).eval()
    picture = noise(48, 64, 3)
    transform = open_clip.image_transform(32, is_train=False)
    vectors = features.ClipTower(model, transform).embed([picture, picture])
    with torch.no_grad():
        expected = model.visual(transform(picture)[None])[0].numpy()
    np.testing.assert_allclose(vectors, np.stack([expected] * 2), atol=1e-5)
    assert abs(np.linalg.norm(expected) - 1) > 0.01


def test_the_tower_of_the_embedded_world_tells_scenes_apart():
    """Two renderings of a scene are nearer than two scenes that differ in colour, shape and background."""
    texts = ("a red circle on a black background", "two cyan squares on a white background")
    scenes = [shapes.parse(text) for text in texts]
    rng = np.random.default_rng(0)
    vectors = features.load("shapes").embed([Image.fromarray(shapes.render(s, rng)) for s in scenes for _ in range(4)])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = (unit @ unit.T).reshape(2, 4, 2, 4)
    same = [cosine[i, a, i, b] for i in range(2) for a in range(4) for b in range(4) if a != b]
    assert vectors.shape == (8, 64) and min(same) > cosine[0, :, 1].max()


class Mean:
    name = "mean colour"

    def embed(self, images):
        return [np.asarray(image).mean((0, 1)) for image in images]


class Flat:
    def embed(self, images):
        return np.zeros(len(images))


def test_a_class_of_your_own_is_checked(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    found = features.load("test_features:Mean")
    assert found.name == "mean colour" and found.embed([Image.new("RGB", (4, 4), (1, 2, 3))]).tolist() == [[1, 2, 3]]
    with pytest.raises(DiffpoError, match=r"test_features:Flat.*\(1,\) for 1 images"):
        features.load("test_features:Flat").embed([Image.new("RGB", (4, 4))])
    with pytest.raises(DiffpoError, match="no source"):
        features.load("test_features:Mean=x")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("dino", "did you mean dinov2"),
        ("dinov2=/no/such/folder", "hf download facebook/dinov2-base"),
        ("clip=ViT-B-32:/no/such/file.pt", "ViT-B-32:/no/such/file.pt"),
        ("shapes=x", "take no source"),
    ],
)
def test_what_cannot_be_loaded_is_one_message(spec, said):
    with pytest.raises(DiffpoError, match=said):
        features.load(spec)
