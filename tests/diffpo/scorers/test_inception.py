"""The FID network against torch-fidelity's numbers, its resizing against a loop, and its files."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffpo.common.errors import DiffpoError
from diffpo.scorers import features
from diffpo.scorers.inception import Inception, InceptionV3, resized

# every 256th feature, their mean and standard deviation
GOLDEN = [
    [0.0, 0.0, 0.025589, 0.0, 0.169906, 0.030122, 0.010252, 0.00026, 0.514674, 1.384137],
    [0.0, 0.0, 0.019818, 0.0, 0.161388, 0.026404, 0.008985, 0.000203, 0.480319, 1.285884],
]


def weights():
    """Weights from cosines, the same everywhere, which keep the size of the signal."""
    with torch.device("meta"):
        state = InceptionV3().state_dict()
    found = {}
    for number, (name, each) in enumerate(state.items()):
        wave = torch.cos(torch.arange(each.numel()) * 1.7 + number).reshape(each.shape)
        if each.dim() == 4:
            found[name] = wave * (4 / each[0].numel()) ** 0.5
        elif name.endswith(("bn.weight", "running_var")):
            found[name] = 1 + 0.3 * wave
        else:
            found[name] = 0.1 * wave if each.dim() else torch.tensor(0)
    return found


@pytest.fixture(scope="module")
def network():
    with torch.device("meta"):
        model = InceptionV3()
    model.load_state_dict(weights(), assign=True)
    return Inception(model)


def picture(height, width):
    rows, columns = np.indices((height, width))
    return np.stack([(rows * 7 + columns * 13 + c * 50) % 256 for c in range(3)], 2).astype(np.uint8)


def test_features_of_torch_fidelity(network):
    """torch_fidelity 0.4.0's FeatureExtractorInceptionV3, feature "2048", with these weights on these pictures."""
    found = network.embed([Image.fromarray(picture(40, 56)), Image.fromarray(picture(32, 32))])
    assert found.shape == (2, 2048) and found.dtype == np.float32
    for row, numbers in zip(found, GOLDEN, strict=True):
        assert row[::256] == pytest.approx(numbers[:8], rel=1e-3, abs=1e-4)
        assert [row.mean(), row.std()] == pytest.approx(numbers[8:], rel=1e-4)


@pytest.mark.parametrize("size", [(5, 7), (9, 4), (6, 6)])
def test_resizing_as_tensorflow_1_did(size):
    pixels = torch.rand(1, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, side = resized(pixels, 6), 6
    for i in range(side):
        for j in range(side):
            y, x = i * size[0] / side, j * size[1] / side
            low = int(y), int(x)
            high = min(low[0] + 1, size[0] - 1), min(low[1] + 1, size[1] - 1)
            dy, dx = y - low[0], x - low[1]
            expected = (
                pixels[0, :, low[0], low[1]] * (1 - dy) * (1 - dx)
                + pixels[0, :, high[0], low[1]] * dy * (1 - dx)
                + pixels[0, :, low[0], high[1]] * (1 - dy) * dx
                + pixels[0, :, high[0], high[1]] * dy * dx
            )
            assert found[0, :, i, j].numpy() == pytest.approx(expected.numpy(), abs=1e-6)


def test_weights_in_files(tmp_path, network, monkeypatch):
    state = weights()
    half = {name: each.bfloat16() for name, each in state.items()}
    torch.save(half | {"fc.weight": torch.zeros(1008, 1)}, tmp_path / "theirs.pth")
    save_file(half, tmp_path / "ours.safetensors")
    torch.save({"fc.weight": torch.zeros(1000, 1)}, tmp_path / "torchvision.pth")
    torch.save({name: state[name] for name in list(state)[:9]}, tmp_path / "part.pth")
    (tmp_path / "damaged.pth").write_bytes(b"PK\3\4")
    loaded = features.load(f"inception={tmp_path / 'ours.safetensors'}")
    conv = loaded.model.Mixed_7c.branch_pool.conv.weight
    assert torch.allclose(conv, network.model.Mixed_7c.branch_pool.conv.weight, rtol=0.01)
    assert conv.dtype == torch.float32
    other = features.load(f"inception={tmp_path / 'theirs.pth'}")
    assert loaded.name.startswith("inception=") and loaded.name != other.name  # the cache tells them apart
    for name in ("torchvision.pth", "part.pth", "damaged.pth", "missing.pth"):
        with pytest.raises(DiffpoError, match=rf"{name}.*inception-2015-12-05"):
            features.load(f"inception={tmp_path / name}")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DiffpoError, match="mseitzer/pytorch-fid"):
        features.load("inception")
