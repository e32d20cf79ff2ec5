"""ImageReward v1.0 (Xu et al. 2023): BLIP whose text encoder attends to the picture, and a head on its first token.

The score is (head - 0.167) / 1.033, about -2.3 to 2 (section 3.2 of the paper; the constants are those of the published
code). The text is cut at 35 tokens, and of a picture that is not square only the middle is seen.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor
from torchvision.transforms.functional import InterpolationMode

from ..common.images import rgb
from .aesthetic import head
from .missing import missing
from .tensors import by_transform
from .weights import read_state

WEIGHTS = ("THUDM/ImageReward", "ImageReward.pt")
TOKENIZER = "google-bert/bert-base-uncased"
TOKENS = 35
CENTRE, SPREAD = 0.16717362830052426, 1.0333394966054072
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION |= {"image_size": 224, "patch_size": 16}
TEXT = {"vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
TEXT |= {"num_attention_heads": 12, "max_position_embeddings": 512, "encoder_hidden_size": 1024}
# from the published names of the vision transformer to those of transformers
NAMES = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.(\d+)\.norm([12])\.": r"encoder.layers.\1.layer_norm\2.",
    r"^blocks\.(\d+)\.attn\.qkv\.": r"encoder.layers.\1.self_attn.qkv.",
    r"^blocks\.(\d+)\.attn\.proj\.": r"encoder.layers.\1.self_attn.projection.",
    r"^blocks\.(\d+)\.mlp\.": r"encoder.layers.\1.mlp.",
}


class Network(nn.Module):
    """BLIP's two encoders and the head. ``vision`` and ``text``: settings as in `VISION` and `TEXT`."""

    def __init__(self, vision: dict[str, int], text: dict[str, int]) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        # the published transformer has another epsilon than that of transformers' conversion of BLIP
        self.vision = BlipVisionModel(BlipVisionConfig(**vision, layer_norm_eps=1e-6, hidden_act="gelu"))
        # transformers makes the layers that attend to the picture only with is_decoder; no causal mask comes with it
        config = BlipTextConfig(**text, layer_norm_eps=1e-12, hidden_act="gelu", is_decoder=True)
        self.text = BlipTextModel(config, add_pooling_layer=False)
        self.head = head(text["hidden_size"])

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take the published state dict (``blip.visual_encoder.*``, ``blip.text_encoder.*``, ``mlp.layers.*``).
        RuntimeError if a tensor is missing or of another shape; tensors that the score does not use are passed over."""
        vision, text = _below(state, "blip.visual_encoder."), _below(state, "blip.text_encoder.")
        found = [(self.vision, {_renamed(key): value for key, value in vision.items()}), (self.text, text)]
        for part, tensors in (*found, (self.head, _below(state, "mlp.layers."))):
            needed = part.state_dict().keys()
            part.load_state_dict({key: value.float() for key, value in tensors.items() if key in needed})

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(n,) for pixels (n, 3, H, W) and tokens (n, l) with their mask."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        everywhere = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        read = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen, encoder_attention_mask=everywhere
        )
        return (self.head(read.last_hidden_state[:, 0])[:, 0] - CENTRE) / SPREAD


def _below(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _renamed(key: str) -> str:
    for pattern, name in NAMES.items():
        if re.search(pattern, key):
            return re.sub(pattern, name, key)
    return key


def transform(size: int = 224) -> Compose:
    """The published preprocessing of a PIL picture."""
    stages = (Resize(size, InterpolationMode.BICUBIC), CenterCrop(size), ToTensor(), Normalize(MEAN, STD))
    return Compose(stages)


class ImageReward:
    """``network``: a `Network`; ``tokenizer``: BERT's."""

    names: tuple[str, ...] = ("imagereward",)
    optional: frozenset[str] = frozenset()

    def __init__(self, network: Network, tokenizer: Any, device: str = "cpu") -> None:
        self.network, self.tokenizer = network.to(device).eval().requires_grad_(False), tokenizer
        self.device, self.transform = device, transform(network.vision.config.image_size)

    @classmethod
    def load(cls, source: str | None, device: str) -> ImageReward:
        """``source``: the file ImageReward.pt, or a .safetensors of the same state."""
        from transformers import BertTokenizer

        try:
            tokenizer = BertTokenizer.from_pretrained(TOKENIZER)
            if source is None:
                from huggingface_hub import hf_hub_download

                source = hf_hub_download(*WEIGHTS)
            state = read_state(source)
            network = Network(VISION, TEXT)
            network.load(state)
        except Exception as error:  # missing, truncated, pickled, or another model's: all mean no ImageReward
            raise missing(
                f"ImageReward from {source or '/'.join(WEIGHTS)} with the tokenizer of {TOKENIZER}",
                error,
                f"Fetch them once with `hf download {' '.join(WEIGHTS)}` and `hf download {TOKENIZER} --include "
                '"*.json" "*.txt"`, or give the file: --scorers imagereward=FILE',
            ) from None
        return cls(network, tokenizer, device)

    @torch.inference_mode()
    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        pixels = torch.stack([self.transform(rgb(image)) for image in images])
        return {"imagereward": self._reward(pixels, prompts).cpu().double().numpy()}

    def rate(self, pixels: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        """`score` of (n, 3, H, W) in [0, 1], with gradients."""
        return {"imagereward": self._reward(by_transform(pixels, self.transform, "imagereward"), prompts)}

    def _reward(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        text = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        return self.network(pixels.to(self.device), text.input_ids, text.attention_mask)
