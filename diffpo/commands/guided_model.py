"""A model with prompts as a function of the state and the label, guidance inside: what samplers are fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import models
from ..common.errors import DiffpoError
from ..common.text import plain
from ..evaluation import generate
from ..evaluation.generation import Generation
from ..problems.policy import Policy
from ..problems.regression import Conditioning
from ..weights import lora as lora_module
from ..weights import trained

if TYPE_CHECKING:
    from ..models.family import Family

PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
ENCODED = 16  # prompts at a time


class PromptedModel:
    """A model that is loaded once, with its prompts encoded once.

    Attributes:
        family, network, device: of the model.
        shape: (C, h, w) of its latents.
        model_hash, lora_hash: what it is made of; the second is None without a LoRA.
        guidance: the scale of its functions.
        encoded: of the prompts.
    """

    def __init__(self, generation: Generation, prompts: Sequence[str], pixels: int | None = None) -> None:
        """``pixels``: the side of the pictures; None is the model's own. DiffpoError: a model or LoRA cannot be
        loaded."""
        settings = models.named(generation.model, generation.model_config, generation.family)
        self.guidance = generation.guidance
        settings = settings.model_copy(update={"guidance": self.guidance})  # for networks that take it as an input
        self.model_hash = models.source_of(settings).fingerprint()
        pipe = generate.load(generation.base())
        self.lora_hash = None
        if generation.lora is not None:
            self.lora_hash = trained.file_hash(generation.lora)
            trained.check(pipe, generation.lora)
            trained.load_into(pipe, generation.lora)
        if long := models.too_long(pipe, list(dict.fromkeys(prompts))):
            print(long)
        own = models.family_class(settings, type(pipe).__name__).sample_size(pipe)
        pixels = pixels or own * models.vae_factor(pipe)
        self.family = models.load(settings, PRECISIONS[generation.dtype], pixels)
        self.family.pipe = pipe
        self.device = pipe.device
        self.network = lora_module.network_of(pipe).requires_grad_(False).eval()
        self.shape = self.family.latent_shape(self.network, pixels)
        self.encoded = Prompts(self.family, prompts, pixels)
        self.family.free_encoders()

    def at(self, prompts: Sequence[str]) -> Guided:
        """The model at some of its prompts, a sample for each."""
        uncond = None
        if self.guidance > 1 and not self.family.guidance_is_input:  # as the pipelines decide
            uncond = self.encoded.conditions([None] * len(prompts), self.device)
        given = Conditioning(self.encoded.conditions(prompts, self.device), uncond, self.guidance)
        return Guided(Policy(self.family, self.network), given, prompts)


class Guided:
    """The model at some prompts as a function ``(x, label)``, with guidance.

    ``stage`` is what the calls are made for, and ``calls`` counts them in it. ``counted`` is called after each.
    """

    def __init__(self, policy: Policy, given: Conditioning, prompts: Sequence[str]) -> None:
        self.policy, self.given, self.prompts = policy, given, list(prompts)
        self.counted: Callable[[], Any] = lambda: None
        self.stage, self.calls = "the reference", 0

    def __call__(self, x: Tensor, label: Tensor) -> Tensor:
        t = torch.as_tensor(label, dtype=torch.float32, device=x.device).expand(len(x))
        output = self.policy.output(x, t, self.given).to(x.dtype)
        self.calls += 1
        self.counted()
        finite = output.detach().isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            prompt = self.prompts[int(finite.int().argmin())]
            raise DiffpoError(
                f"the model's output for the prompt {plain(prompt, 200)!r} is not finite in call {self.calls} of "
                f"{self.stage} (timestep {float(t[0]):.5g}). In float16 use --dtype bfloat16 or float32; else leave "
                "this prompt out"
            )
        return output


class Prompts:
    """The embeddings of prompts and of the empty one, made once. ``pixels``: the side of the pictures."""

    @torch.no_grad()
    def __init__(self, family: Family, prompts: Sequence[str], pixels: int) -> None:
        texts: list[str | None] = [*dict.fromkeys(prompts), None]
        self.family, self.rows = family, dict[str | None, dict[str, Tensor]]()
        for first in range(0, len(texts), ENCODED):
            part = texts[first : first + ENCODED]
            found = family.encode_text(part)
            self.rows |= {text: {name: value[i] for name, value in found.items()} for i, text in enumerate(part)}
        if "prompt_attention_mask" in self.rows[None]:  # padding that is masked in every text is left out
            used = max(int(row["prompt_attention_mask"].sum()) for row in self.rows.values())
            self.rows = {text: {name: value[:used] for name, value in row.items()} for text, row in self.rows.items()}
        self._sizes = torch.tensor([pixels, pixels, 0, 0, pixels, pixels], dtype=torch.float32)

    def conditions(self, texts: Sequence[str | None], device: Any) -> dict[str, Tensor]:
        """What `Family.predict` takes for these texts."""
        names = self.rows[None]
        text = {name: torch.stack([self.rows[each][name] for each in texts]).to(device) for name in names}
        return self.family.condition(text, self._sizes.to(device).repeat(len(texts), 1))
