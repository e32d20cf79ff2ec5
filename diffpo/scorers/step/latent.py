"""A step-aware scorer of noisy latents: the frozen base UNet's own features, a small head, no VAE.

After LPO (Zhang et al. 2025, arXiv 2502.01051, section 4.1): the outputs of the down blocks and the mid block at
(x_t, t, caption), each averaged over its positions (4,800 numbers for SD1.5), a projection, and the scaled cosine with
the projected text. There, the UNet is trained as well and the mid block's output is guided (weight 7.5); here the UNet
is the run's own, frozen, so that a scorer costs half a forward pass and no memory. Added: the spread over the positions
beside the mean, and the time as an input of the head.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...common.errors import DiffpoError
from ...common.files import write_atomic
from ...models.identity import base_identity, same_base
from ...weights import trained
from . import base as steps

WEIGHTS = "head.safetensors"
TIME = 64  # numbers that encode t


class _Enough(Exception):
    """Ends a forward pass after the last stage: the rest is half the work."""


def features(family: Any, network: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """Mean and standard deviation over the positions of what each stage of the base model returns (a UNet's down blocks
    and mid block; of a transformer, two blocks of its first half), (n, 2 x channels) float32. With gradients by x_t if
    it requires them."""
    follow = torch.is_grad_enabled() and x_t.requires_grad
    # what is computed again in the backward pass would be computed with the adapters on
    again = follow and getattr(network, "is_gradient_checkpointing", False)
    seen: list[Tensor] = []

    def keep(module: nn.Module, _args: Any, output: Any) -> None:
        hidden = family.hidden(output).float()
        seen.extend((hidden.mean(2), hidden.std(2)))
        if module is stages[-1]:
            raise _Enough

    stages = family.stages(network)
    handles = [block.register_forward_hook(keep) for block in stages]
    if again:
        network.disable_gradient_checkpointing()
    try:
        with trained.of(network).switched(None), torch.set_grad_enabled(follow), contextlib.suppress(_Enough):
            family.predict(network, x_t, t, cond)
    finally:
        for handle in handles:
            handle.remove()
        if again:
            network.enable_gradient_checkpointing()
    return torch.cat(seen, 1)


class Head(nn.Module):
    """(n, ``image``) features, conditions of the widths ``texts`` and t -> exp(logit_scale) * cosine, (n,)."""

    def __init__(self, image: int, texts: list[int], width: int = 256) -> None:
        from diffusers.models.embeddings import Timesteps

        super().__init__()
        self.sizes = {"image": image, "texts": texts, "width": width}
        self.time = Timesteps(TIME, flip_sin_to_cos=True, downscale_freq_shift=0)
        # the features' mean and spread over data and times: differences between images are small beside what all share
        self.register_buffer("center", torch.zeros(image))
        self.register_buffer("spread", torch.ones(image))
        self.image = nn.Sequential(nn.Linear(image + TIME, width), nn.SiLU(), nn.Linear(width, width))
        # each has a scale of its own: embeddings are about 1, SDXL's sizes are about 1000
        self.text_norms = nn.ModuleList(nn.LayerNorm(each) for each in texts)
        self.text = nn.Linear(sum(texts), width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's own start

    def forward(self, seen: Tensor, texts: list[Tensor], t: Tensor) -> Tensor:
        image = self.image(torch.cat([(seen - self.center) / self.spread, self.time(t)], 1))
        normed = [norm(each) for norm, each in zip(self.text_norms, texts, strict=True)]
        return self.logit_scale.exp() * F.cosine_similarity(image, self.text(torch.cat(normed, 1)))


class LatentScorer:
    """A `steps.StepScorer`; ``module`` is what is trained."""

    needs_vae = False

    def __init__(self, family: Any, network: nn.Module, head: Head, name: str = "latent") -> None:
        self.family, self.network, self.name, self.module = family, network, name, head

    @classmethod
    def fresh(
        cls, family: Any, network: nn.Module, x_t: Tensor, t: Tensor, cond: dict[str, Tensor], seed: int
    ) -> LatentScorer:
        """An untrained one; ``x_t``, ``t`` and ``cond`` are some of the inputs it will get."""
        seen = features(family, network, x_t, t, cond)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = Head(seen.shape[1], [each.shape[1] for each in family.text_features(cond)]).to(x_t.device)
        head.center.copy_(seen.mean(0))
        head.spread.copy_(seen.std(0).clamp(min=1e-6))
        return cls(family, network, head)

    @classmethod
    def load(cls, folder: Path, family: Any, network: nn.Module) -> LatentScorer:
        about = steps.read_about(folder)
        if not same_base(about["base"], base_identity(network)):
            raise DiffpoError(
                f"the latent scorer in {folder} reads the features of another base model "
                f"({about['base'].get('name', 'unknown')}); train one on {family.settings.path} with `diffpo "
                "train-scorer`"
            )
        head = Head(**about["head"])
        steps.read_weights(head, folder / WEIGHTS)
        return cls(
            family, network, head.eval().requires_grad_(False).to(next(network.parameters()).device), str(folder)
        )

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Head and description; ``about`` goes into the latter."""
        from safetensors.torch import save

        write_atomic(folder / WEIGHTS, save(self.module.state_dict()))
        base = base_identity(self.network, self.family.settings.path)
        text = json.dumps({"kind": "latent", "base": base, "head": self.module.sizes, **about}, indent=1)
        write_atomic(folder / steps.ABOUT, f"{text}\n".encode())

    def rate(self, x_t: Tensor, x_0: Tensor, t: Tensor, captions: Sequence[str], cond: dict[str, Tensor]) -> Tensor:
        """`score` with gradients, for the head and by x_t."""
        return self.module(features(self.family, self.network, x_t, t, cond), self.family.text_features(cond), t)

    @torch.no_grad()
    def score(self, x_t: Tensor, x_0: Tensor, t: Tensor, captions: Sequence[str], cond: dict[str, Tensor]) -> Tensor:
        return steps.finite(self.rate(x_t, x_0, t, captions, cond), self.name, captions)
