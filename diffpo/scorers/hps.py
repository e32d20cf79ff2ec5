"""HPS v2.1 and v2.0 (Wu et al. 2023, "Human Preference Score v2"): open_clip ViT-H-14 trained on human rankings.

The score is the bare cosine, about 0.2 to 0.35 (the benchmark prints it times 100), in float32 where the published code
uses half precision. Numbers of v2.0 and v2.1 cannot be compared, so they have different names.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import normalize, to_tensor

from ..common.images import rgb
from .missing import missing
from .tensors import whole
from .weights import read_state

ARCHITECTURE = "ViT-H-14"
# of OpenAI's CLIP, as published
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
REPOSITORY = "xswu/HPSv2"


def preprocess(image: Image.Image, size: int) -> torch.Tensor:
    """The published preprocessing: (3, size, size), the whole picture kept and its shorter side padded with black.

    Not open_clip's own transform, which cuts the sides of a non-square picture off; and the tensor is resized, not the
    PIL picture (HPSv2, src/open_clip/transform.py).
    """
    return normalize(whole(to_tensor(rgb(image)), size), MEAN, STD)


class HPS:
    """``model``: an open_clip model; ``tokenizer``: its tokenizer."""

    names: tuple[str, ...] = ("hps",)
    optional: frozenset[str] = frozenset()
    version, file = "v2.1", "HPS_v2.1_compressed.pt"

    def __init__(self, model, tokenizer, device: str = "cpu"):
        self.model, self.tokenizer, self.device = model.to(device).eval().requires_grad_(False), tokenizer, device

    @classmethod
    def load(cls, source: str | None, device: str) -> HPS:
        """``source``: the published file (``HPS.file``), or a .safetensors of the same state."""
        import open_clip

        try:
            if source is None:
                from huggingface_hub import hf_hub_download

                source = hf_hub_download(REPOSITORY, cls.file)
            state = read_state(source)  # first: the network takes seconds to make
            model = open_clip.create_model(ARCHITECTURE, pretrained=None)
            model.load_state_dict(state)
        except Exception as error:  # missing, truncated, pickled, or another model's: all mean no HPS
            raise missing(
                f"HPS {cls.version} from {source or f'{REPOSITORY}/{cls.file}'}",
                error,
                f"Fetch it once with `hf download {REPOSITORY} {cls.file}`, or give the file: "
                f"--scorers {cls.names[0]}=FILE",
            ) from None
        return cls(model, open_clip.get_tokenizer(ARCHITECTURE), device)

    @torch.inference_mode()
    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        size = self.model.visual.image_size[0]
        pixels = torch.stack([preprocess(image, size) for image in images])
        return {self.names[0]: self._cosine(pixels, prompts).cpu().double().numpy()}

    def rate(self, pixels: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        """`score` of (n, 3, H, W) in [0, 1], with gradients."""
        return {
            self.names[0]: self._cosine(normalize(whole(pixels, self.model.visual.image_size[0]), MEAN, STD), prompts)
        }

    def _cosine(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        image_features = self.model.encode_image(pixels.to(self.device), normalize=True)
        text_features = self.model.encode_text(self.tokenizer(prompts).to(self.device), normalize=True)
        return (image_features * text_features).sum(1)


class HPS20(HPS):
    """Version 2.0: the same network and preprocessing with other weights."""

    names = ("hps2.0",)
    version, file = "v2.0", "HPS_v2_compressed.pt"
