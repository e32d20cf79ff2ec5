"""LPIPS v0.1 (Zhang et al. 2018, arXiv 1801.03924) as features: the squared distance of two vectors is LPIPS.

LPIPS is a sum over layers of mean over places of sum over channels of w (f - g)^2, for normalised features f and g. So
the vector of a picture holds sqrt(w / places) f of every layer. Pictures are resized to `SIDE`, the size of the patches
that the weights w were fitted to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..common.errors import DiffpoError
from ..common.text import plain
from .features import Batched
from .missing import missing
from .weights import read_state

SIDE = 64
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in -1..1
TINY = 1e-10
# by the heads' channels: torchvision's name, its file, and after which layers of `features` a head reads
NETWORKS = {
    (64, 192, 384, 256, 256): ("alexnet", "alexnet-owt-7be5be79.pth", (1, 4, 7, 9, 11)),
    (64, 128, 256, 512, 512): ("vgg16", "vgg16-397923af.pth", (3, 8, 15, 22, 29)),
}
HUB = "https://download.pytorch.org/models/"
HEADS = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/alex.pth"


class Lpips(Batched):
    """``layers``: the convolutional part of AlexNet or VGG16; ``taps``: after which of its layers a head reads;
    ``heads``: the weights w of each, (C,), none negative."""

    def __init__(
        self, layers: nn.Sequential, taps: tuple[int, ...], heads: list[torch.Tensor], device: str, name: str = "lpips"
    ) -> None:
        self.layers, self.taps = layers.to(device).eval().requires_grad_(False), taps
        self.heads, self.device, self.name = [each.to(device) for each in heads], device, name

    @classmethod
    def load(cls, source: str | None, device: str) -> Lpips:
        """``source``: the heads, alex.pth or vgg.pth. torchvision's weights are looked for beside them, then where
        torch.hub keeps downloads. DiffpoError that says what to download."""
        import torchvision

        if source is None:
            raise DiffpoError(f"the features lpips need their heads: lpips=FILE. Download {HEADS}")
        path = Path(source).expanduser()
        try:
            state = read_state(path)
            heads = [state[f"lin{k}.model.1.weight"].float().flatten() for k in range(5)]
        except Exception as error:  # missing, truncated, or something else
            raise missing(f"the heads of LPIPS from {path}", error, f"Download {HEADS}, or vgg.pth there.") from None
        channels = tuple(len(each) for each in heads)
        if channels not in NETWORKS or any(bool((each < 0).any()) for each in heads):
            raise DiffpoError(f"{path} holds no heads of LPIPS for AlexNet or VGG16 (channels {channels})")
        name, file, taps = NETWORKS[channels]
        place = next(
            (each for each in (path.parent / file, Path(torch.hub.get_dir()) / "checkpoints" / file) if each.is_file()),
            None,
        )
        if place is None:
            raise DiffpoError(f"LPIPS needs torchvision's {name}: download {HUB}{file} to {path.parent / file}")
        with torch.device("meta"):
            layers = getattr(torchvision.models, name)(weights=None).features[: taps[-1] + 1]
        try:
            weights = {key.removeprefix("features."): value.float() for key, value in read_state(place).items()}
            layers.load_state_dict({key: weights[key] for key in layers.state_dict()}, assign=True)
        except Exception as error:
            raise missing(f"torchvision's {name} from {place}", error, f"Download {HUB}{file} again.") from None
        return cls(layers, taps, heads, device, f"lpips={plain(path.name, 60)}")

    def _prepared(self, image: Image.Image) -> torch.Tensor:
        import numpy as np

        small = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(small, np.float32) / 127.5 - 1).permute(2, 0, 1)
        shift, scale = (torch.tensor(each)[:, None, None] for each in (SHIFT, SCALE))
        return ((pixels - shift) / scale)[None]

    def _vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        parts: list[Any] = []
        x = pixels
        for k, layer in enumerate(self.layers):
            x = layer(x)
            if k in self.taps:
                unit = x / (x.square().sum(1, keepdim=True).sqrt() + TINY)
                weight = (self.heads[len(parts)] / unit[0, 0].numel()).sqrt()
                parts.append((unit * weight[:, None, None]).flatten(1))
        return torch.cat(parts, 1)
