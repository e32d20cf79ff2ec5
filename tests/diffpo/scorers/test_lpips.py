"""LPIPS of random weights of the published names against its formula, written out here with convolutions alone."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F

from diffpo.common.errors import DiffpoError
from diffpo.scorers import features, lpips

# stride, padding and pooling before each convolution; a head reads after each group
ALEX = [[(4, 2, None)], [(1, 2, (3, 2))], [(1, 1, (3, 2))], [(1, 1, None)], [(1, 1, None)]]
VGG = [
    [(1, 1, None)] * 2,
    [(1, 1, (2, 2)), (1, 1, None)],
    *[[(1, 1, (2, 2)), (1, 1, None), (1, 1, None)] for _ in range(3)],
]


def random_state(name):
    """Weights of torchvision's convolutions, and heads."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in getattr(torchvision.models, name)().features.state_dict().items()}
    state = {}
    for key, shape in shapes.items():
        spread = (2 / max(1, shape[1:].numel())) ** 0.5 if len(shape) > 1 else 0.1
        state[f"features.{key}"] = spread * torch.randn(shape, generator=generator)
    channels = next(each for each, (network, *_) in lpips.NETWORKS.items() if network == name)
    heads = {f"lin{k}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for k, c in enumerate(channels)}
    return state, heads


def published(state, heads, groups, one, other):
    """Of two pictures, in float64."""
    weights = [state[key].double() for key in state if key.endswith("weight")]
    biases = [state[key].double() for key in state if key.endswith("bias")]
    pair = []
    for image in (one, other):
        small = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC), np.float64) / 127.5 - 1
        pair.append(torch.tensor((small - lpips.SHIFT) / lpips.SCALE).permute(2, 0, 1))
    x, k, total = torch.stack(pair), 0, 0.0
    for number, group in enumerate(groups):
        for stride, padding, pool in group:
            x = F.max_pool2d(x, *pool) if pool else x
            x = F.conv2d(x, weights[k], biases[k], stride, padding).relu()
            k += 1
        unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
        w = heads[f"lin{number}.model.1.weight"].double()
        total += float(F.conv2d((unit[:1] - unit[1:]).square(), w).mean())
    return total


@pytest.mark.parametrize(("name", "groups"), [("alexnet", ALEX), ("vgg16", VGG)])
def test_squared_distance_is_lpips(tmp_path, name, groups):
    state, heads = random_state(name)
    file = next(file for network, file, _ in lpips.NETWORKS.values() if network == name)
    torch.save(state | {"classifier.6.bias": torch.zeros(3)}, tmp_path / file)
    torch.save(heads, tmp_path / "heads.pth")
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in ((80, 60), (64, 64))]
    found = features.load(f"lpips={tmp_path / 'heads.pth'}").embed([*images, images[0]])
    value = published(state, heads, groups, *images)
    assert float(((found[0] - found[1]) ** 2).sum()) == pytest.approx(value, rel=1e-4) and value > 0.01
    np.testing.assert_array_equal(found[0], found[2])


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    with pytest.raises(DiffpoError, match=r"lpips=FILE.*alex\.pth"):
        features.load("lpips")
    with pytest.raises(DiffpoError, match=r"heads of LPIPS from .*nowhere\.pth"):
        features.load("lpips=nowhere.pth")
    torch.save(random_state("alexnet")[1], tmp_path / "alex.pth")
    with pytest.raises(DiffpoError, match=r"torchvision's alexnet: download https://.*alexnet-owt-7be5be79\.pth to"):
        features.load(f"lpips={tmp_path / 'alex.pth'}")
    torch.save({f"lin{k}.model.1.weight": torch.ones(1, 3, 1, 1) for k in range(5)}, tmp_path / "other.pth")
    with pytest.raises(DiffpoError, match="holds no heads of LPIPS"):
        features.load(f"lpips={tmp_path / 'other.pth'}")
