"""HPS v3 (Ma et al. 2025, arXiv 2508.03789): Qwen2-VL reads picture and prompt, and a head gives mean and spread.

The score is the mean mu, about 0 to 15. The text that the model was trained with is not part of this package: it is
read from a file, which docs/score.md says how to write. As in the published code, the tokens of a picture are numbered
one by one like words, not by Qwen2-VL's rows and columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..common.errors import DiffpoError
from ..common.images import rgb
from ..common.text import read_text
from .careful import CannotScore
from .missing import missing
from .weights import read_state

WEIGHTS, INSTRUCTION = "HPSv3.safetensors", "instruction.txt"
REWARD, PROMPT = "<|Reward|>", "{text_prompt}"  # in the instruction
FACTOR = 28  # pixels of a token's side: two patches of 14
PIXELS = 256 * FACTOR * FACTOR  # to which every picture is resized, whatever its shape
PAD = "<|image_pad|>"
# Qwen2-VL's chat with one question about one picture
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{picture}"
    "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
)
ADVICE = (
    "Fill a folder once with `hf download MizzenAI/HPSv3 HPSv3.safetensors --local-dir hpsv3` and `hf download "
    'Qwen/Qwen2-VL-7B-Instruct --include "*.json" "*.txt" --local-dir hpsv3`, write its instruction.txt as '
    "docs/score.md says, then use --scorers hpsv3=hpsv3"
)


class Network(nn.Module):
    """``model``: a transformers Qwen2VLModel. The head has 1024 and 16 hidden units, and gives mu and sigma."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        width = model.config.text_config.hidden_size
        layers = (nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))
        self.head = nn.Sequential(*layers)

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take the published state dict, with the names of transformers before or after 4.52. RuntimeError if a tensor
        is missing or of another shape."""
        found = {_renamed(key): value for key, value in state.items()}
        head = {key.removeprefix("rm_head."): value.float() for key, value in found.items() if key[:8] == "rm_head."}
        needed = self.model.state_dict().keys()
        self.model.load_state_dict({key: value for key, value in found.items() if key in needed}, assign=True)
        self.head.load_state_dict(head)

    def forward(self, inputs: dict[str, torch.Tensor], reward: int) -> torch.Tensor:
        """(n, 2) of n conversations. ``reward``: the token whose state the head reads, once in each."""
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        seen = self.model(**inputs, position_ids=positions.expand(3, *positions.shape), use_cache=False)
        return self.head(seen.last_hidden_state[inputs["input_ids"] == reward].float())


def _renamed(key: str) -> str:
    """Old: visual.*, model.layers.*; new: model.visual.*, model.language_model.*."""
    if key.startswith(("visual.", "rm_head.")):
        return key
    key = key.removeprefix("model.")
    return key if key.startswith(("visual.", "language_model.")) else f"language_model.{key}"


class HPSv3:
    """``network``: a `Network`; ``tokenizer``: Qwen2-VL's, with the token `REWARD`; ``instruction``: what is said of a
    picture, with `PROMPT` and `REWARD` once each."""

    names: tuple[str, ...] = ("hpsv3",)
    optional: frozenset[str] = frozenset()

    def __init__(self, network: Network, tokenizer: Any, instruction: str, device: str = "cpu") -> None:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        self.network, self.device = network.to(device).eval().requires_grad_(False), device
        self.tokenizer, self.instruction = tokenizer, instruction
        self.patches = Qwen2VLImageProcessor()

    @classmethod
    def load(cls, source: str | None, device: str) -> HPSv3:
        """``source``: a folder with HPSv3.safetensors, instruction.txt, and config and tokenizer of Qwen2-VL."""
        from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel

        if source is None:
            raise DiffpoError(f"the scorer hpsv3 needs a folder: hpsv3=FOLDER. {ADVICE}")
        folder = Path(source).expanduser()
        try:
            instruction = read_text(folder / INSTRUCTION)
            state = read_state(folder / WEIGHTS)
            tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
            tokenizer.add_special_tokens({"additional_special_tokens": [REWARD]})
            config = AutoConfig.from_pretrained(folder)
            config.text_config.vocab_size = len(tokenizer)  # as the published weights were cut
            with torch.device("meta"):
                network = Network(Qwen2VLModel(config))
            network.head.to_empty(device="cpu")
            network.load(state)
            _fill_buffers(network.model, config)
        except Exception as error:  # missing, truncated, or another model's: all mean no HPS v3
            raise missing(f"HPS v3 from {folder}", error, ADVICE) from None
        if instruction.count(PROMPT) != 1 or instruction.count(REWARD) != 1:
            raise DiffpoError(f"{folder / INSTRUCTION} must hold {PROMPT} and {REWARD} once each. {ADVICE}")
        return cls(network, tokenizer, instruction, device)

    @torch.inference_mode()
    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        pictures = [resized(rgb(image)) for image in images]
        patches = self.patches(images=pictures, do_resize=False, return_tensors="pt")
        grids = patches["image_grid_thw"]
        texts = [
            CHAT.format(picture=PAD * (int(grid.prod()) // 4), text=self.instruction.replace(PROMPT, _safe(prompt)))
            for grid, prompt in zip(grids, prompts, strict=True)
        ]
        inputs = self.tokenizer(texts, padding=True, return_tensors="pt")
        kind = next(self.network.model.parameters()).dtype
        given = {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "pixel_values": patches["pixel_values"].to(kind),
            "image_grid_thw": grids,
        }
        reward = self.tokenizer.convert_tokens_to_ids(REWARD)
        found = self.network({key: value.to(self.device) for key, value in given.items()}, reward)
        return {"hpsv3": found[:, 0].cpu().double().numpy()}


def resized(image: Image.Image) -> Image.Image:
    """Bicubic to whole tokens of `FACTOR` pixels, `PIXELS` at most. CannotScore for a picture more than 200 times as
    long as wide, which Qwen2-VL does not take."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    try:
        height, width = smart_resize(image.height, image.width, FACTOR, PIXELS, PIXELS)
    except ValueError as error:
        raise CannotScore(f"HPS v3 does not take a picture of {image.width} x {image.height}: {error}") from None
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _safe(prompt: str) -> str:
    """A prompt without the tokens that the model gives a meaning of its own."""
    return prompt.replace("<|", "< |")


def _fill_buffers(model: nn.Module, config: Any) -> None:
    """Compute what a model made on the device "meta" lacks, and no file has: the frequencies of its positions."""
    from transformers import Qwen2VLModel

    tiny = config.__class__.from_dict(config.to_dict())
    tiny.text_config.num_hidden_layers, tiny.vision_config.depth, tiny.text_config.vocab_size = 1, 1, 8
    source = dict(Qwen2VLModel(tiny).named_buffers())
    for name, _ in list(model.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, source[name].clone())
