"""PickScore v1 (Kirstain et al. 2023, "Pick-a-Pic", section 4): CLIP-H trained on human choices.

The score is ``exp(logit_scale) * cos(image, text)``, about 15 to 25: the scale of the paper's model card. Other tools
print the bare cosine or divide by 26; the ranking is the same.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ..common.images import rgb
from .missing import missing
from .tensors import by_processor

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class PickScore:
    """``model``: a transformers CLIPModel; ``processor``: its CLIPProcessor."""

    names: tuple[str, ...] = ("pickscore",)
    optional: frozenset[str] = frozenset()

    def __init__(self, model, processor, device: str = "cpu"):
        self.model, self.processor, self.device = model.to(device).eval().requires_grad_(False), processor, device

    @classmethod
    def load(cls, source: str | None, device: str) -> PickScore:
        """``source``: a folder with the model and its processor; by default both come from the hub."""
        from transformers import CLIPModel, CLIPProcessor

        try:
            model = CLIPModel.from_pretrained(source or MODEL, dtype=torch.float32)
            processor = CLIPProcessor.from_pretrained(source or PROCESSOR)
        except (OSError, ValueError) as error:
            raise missing(
                f"PickScore from {source or f'{MODEL} with the processor of {PROCESSOR}'}",
                error,
                f"Fetch them once with `hf download {MODEL}` and `hf download {PROCESSOR}`, or give a folder that "
                "holds model and processor: --scorers pickscore=FOLDER",
            ) from None
        return cls(model, processor, device)

    @torch.inference_mode()
    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        pixels = self.processor(images=[rgb(image) for image in images], return_tensors="pt").pixel_values
        return {"pickscore": self._cosine(pixels, prompts).cpu().double().numpy()}

    def rate(self, pixels: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        """`score` of (n, 3, H, W) in [0, 1], with gradients."""
        return {"pickscore": self._cosine(by_processor(pixels, self.processor.image_processor), prompts)}

    def _cosine(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        text = self.processor(text=prompts, padding=True, truncation=True, max_length=77, return_tensors="pt")
        image_features = projected(self.model.get_image_features(pixel_values=pixels.to(self.device)))
        text_features = projected(self.model.get_text_features(**text.to(self.device)))
        cosine = torch.nn.functional.cosine_similarity(image_features, text_features)
        return self.model.logit_scale.exp() * cosine


def projected(output) -> torch.Tensor:
    """The projected features (n, d): transformers 4 returns them, transformers 5 wraps them as ``pooler_output``."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
