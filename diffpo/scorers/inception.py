"""The Inception-v3 of FID (Heusel et al. 2017): 2048 features of the network that TensorFlow published on 2015-12-05.

It differs from torchvision's Inception-v3: average pools do not count their padding, the last block pools by maximum,
and pictures are resized as TensorFlow 1 did. The names of the weights are those of the files of torch-fidelity and
pytorch-fid.
"""

from __future__ import annotations

from hashlib import file_digest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

from ..common.errors import DiffpoError
from ..common.images import rgb
from ..common.text import plain

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SIDE = 299  # pixels that the network takes
ADVICE = (
    f"Download {URL} (or weights-inception-2015-12-05-6726825d.pth of torch-fidelity; 91 MB) and name the file: "
    "inception=FILE"
)


class Conv(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(self, into: int, out: int, size, stride: int = 1, padding=0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(into, out, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class BlockA(nn.Module):
    """Four branches at 35 x 35: 1x1, 5x5, twice 3x3, pool."""

    def __init__(self, into: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(into, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(into, 48, 1), Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(into, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(into, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, twice, self.branch_pool(_average(x))], 1)


class BlockB(nn.Module):
    """From 35 x 35 to 17 x 17."""

    def __init__(self, into: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(into, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(into, 64, 1), Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), twice, max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """Four branches at 17 x 17, with rows and columns of 7."""

    def __init__(self, width: int) -> None:
        super().__init__()
        row: dict[str, Any] = {"size": (1, 7), "padding": (0, 3)}
        column: dict[str, Any] = {"size": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(768, width, 1), Conv(width, width, **row)
        self.branch7x7_3 = Conv(width, 192, **column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(768, width, 1), Conv(width, width, **column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(width, width, **row), Conv(width, width, **column)
        self.branch7x7dbl_5 = Conv(width, 192, **row)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """From 17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192, 1), Conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192, 1), Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1), padding=(3, 0)), Conv(192, 192, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    """Branches at 8 x 8 that split. ``largest``: the pool takes the maximum, as in the last block of this network."""

    def __init__(self, into: int, largest: bool) -> None:
        super().__init__()
        row: dict[str, Any] = {"size": (1, 3), "padding": (0, 1)}
        column: dict[str, Any] = {"size": (3, 1), "padding": (1, 0)}
        self.largest = largest
        self.branch1x1 = Conv(into, 320, 1)
        self.branch3x3_1 = Conv(into, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, **row), Conv(384, 384, **column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(into, 448, 1), Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, **row), Conv(384, 384, **column)
        self.branch_pool = Conv(into, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        split = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        split += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        pooled = max_pool2d(x, 3, 1, 1) if self.largest else _average(x)
        return torch.cat([self.branch1x1(x), *split, self.branch_pool(pooled)], 1)


class InceptionV3(nn.Module):
    """(n, 3, 299, 299) in [-1, 1) -> (n, 2048), the average over the last map."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = BlockB(288), BlockC(128), BlockC(160)
        self.Mixed_6d, self.Mixed_6e = BlockC(160), BlockC(192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = BlockD(), BlockE(1280, False), BlockE(2048, True)

    def forward(self, x: Tensor) -> Tensor:
        x = max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


def resized(pixels: Tensor, side: int = SIDE) -> Tensor:
    """(n, c, H, W) -> (n, c, side, side) as TensorFlow 1 resized: output pixel i is the linear interpolation at
    i * H / side, without antialiasing."""
    for dimension in (2, 3):
        size = pixels.shape[dimension]
        at = torch.arange(side, dtype=torch.float32, device=pixels.device) * (size / side)
        low = at.long()
        weight = (at - low).to(pixels.dtype)
        weight = weight[:, None] if dimension == 2 else weight
        first = pixels.index_select(dimension, low)
        second = pixels.index_select(dimension, (low + 1).clamp_max(size - 1))
        pixels = first + (second - first) * weight
    return pixels


class Inception:
    """`Features` of the FID network; (n, 2048)."""

    def __init__(self, model: InceptionV3, device: str = "cpu", name: str = "inception") -> None:
        self.model, self.device, self.name = model.to(device).eval().requires_grad_(False), device, name

    @classmethod
    def load(cls, source: str | None, device: str) -> Inception:
        """``source``: the file with the weights, .pth or .safetensors; None looks where torch.hub keeps downloads."""
        path = Path(source).expanduser() if source else Path(torch.hub.get_dir()) / "checkpoints" / Path(URL).name
        if not path.is_file():
            raise DiffpoError(f"the Inception network of FID is not at {path}. {ADVICE}")
        with open(path, "rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        # the published file's name ends in the start of its own hash
        name = "inception" if digest.startswith(Path(URL).stem[-8:]) else f"inception={digest[:8]}"
        return cls(load_weights(path), device, name)

    @torch.inference_mode()
    def embed(self, images: list[Image.Image]) -> np.ndarray:
        parts = []
        for image in images:  # one by one: their sizes differ
            pixels = torch.from_numpy(np.array(rgb(image))).permute(2, 0, 1)[None].float()
            parts.append(resized(pixels))
        pixels = (torch.cat(parts).to(self.device) - 128) / 128
        return self.model(pixels).float().cpu().numpy()


def load_weights(path: Path) -> InceptionV3:
    """The network with the weights of a file. Classification layers in it are left out. DiffpoError if the file is
    damaged or of another network, such as torchvision's."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        if "fc.weight" in state and len(state["fc.weight"]) != 1008:
            raise ValueError("it is torchvision's network of 1000 classes; FID is defined with that of 2015-12-05")
        with torch.device("meta"):  # without drawing weights that are replaced at once
            model = InceptionV3()
        wanted = model.state_dict()
        if lacking := sorted(set(wanted) - set(state)):
            raise ValueError(f"it has no {lacking[0]}, {len(lacking)} missing in all")
        model.load_state_dict({name: state[name].to(wanted[name].dtype) for name in wanted}, assign=True)
    except Exception as error:  # torch and safetensors raise a dozen types for damaged files
        reason = plain(error, 200)
        raise DiffpoError(f"cannot load {path} as the Inception network of FID: {reason}. {ADVICE}") from None
    return model
