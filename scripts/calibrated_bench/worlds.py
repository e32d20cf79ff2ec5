"""The models of the bench, each at one guidance scale: batches of prompts with their noises, and exact solutions.

Three splits share no prompt. `select`: training prompts on which settings are chosen. `fit`: training prompts that
plans are fitted to. `heldout`: what is reported. Noise i of a split depends on its seed, its name and i alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sampler_bench import problems
from sampler_bench.tiny import ASSETS, Tiny, TinyDiT, TinySDXL

from diffpo import models, shapes
from diffpo.common.rng import generator, normal
from diffpo.data.prompts import load_prompts
from diffpo.problems.policy import Policy
from diffpo.problems.regression import Conditioning
from diffpo.weights import lora as lora_module
from diffpo.weights import trained

EMBEDDED = {"tiny-sdxl": TinySDXL.long_run, "tiny-dit": TinyDiT.long_run}
MODELS = (*EMBEDDED, *problems.MIXTURES)
SELECT = 32  # prompts on which settings are chosen
SCORES = ("total", "all_right")


@dataclass
class Tally:
    """Model calls that were made, and the same times the samples in each; a guided pair counts as one."""

    calls: int = 0
    samples: int = 0

    def add(self, batch: int) -> None:
        self.calls += 1
        self.samples += batch


@dataclass(frozen=True)
class Options:
    """What all worlds of a run share."""

    seed: int = 0
    reference_calls: int = 500
    device: str = "cpu"
    lora: Path | None = None


class World:
    """A model at a guidance scale.

    Attributes:
        name: of the model, with its LoRA. key: differs where any number that is measured may differ.
        tally: of all its model calls.
    """

    images = False  # whether states are latents of images, to the default rule

    def __init__(self, model: str, guidance: float, options: Options):
        self.model_name, self.guidance, self.options, self.tally = model, guidance, options, Tally()
        self.name = model if options.lora is None else f"{model} + {lora_name(options.lora)}"
        self._parts: dict[tuple[str, int, int], object] = {}

    def part(self, split: str, first: int, count: int):
        """A batch as a problem of sampler_bench/compare.py: name, schedule, prediction, z, model, exact."""
        if (split, first, count) not in self._parts:
            self._parts[split, first, count] = self._make(split, first, count)
        return self._parts[split, first, count]

    def _make(self, split: str, first: int, count: int):
        raise NotImplementedError

    def scores(self, split: str, first: int, x: torch.Tensor) -> dict[str, np.ndarray]:
        """The oracle's scores of the pictures of latents x: (len(x),) each. Empty for a model without pictures."""
        return {}

    def prompts(self, split: str, count: int) -> list[str]:
        return [f"{split} {i}" for i in range(count)]


def lora_name(path: Path) -> str:
    """The file's name, or that of its folder where the file is named as everywhere."""
    return path.parent.name if path.stem == "pytorch_lora_weights" and path.parent.name else path.stem or path.name


def world(model: str, guidance: float, options: Options) -> World:
    return (Embedded if model in EMBEDDED else Mixture)(model, guidance, options)


class Mixture(World):
    """A Gaussian mixture of sampler_bench/problems.py. Its reference is exact and costs no model calls.

    Sample i has class i mod 2; guidance 1 is the model without class.
    """

    def __init__(self, model: str, guidance: float, options: Options):
        super().__init__(model, guidance, options)
        self.mixture = problems.MIXTURES[model]()
        self.schedule, self.prediction = problems.STABLE_DIFFUSION, "epsilon"
        self.key = f"{model}-g{guidance:g}-seed{options.seed}"

    def _make(self, split: str, first: int, count: int) -> problems.Problem:
        found = _MixturePart(self.name, self.mixture, self.guidance, batch=count)
        found.first, found.tally = first, self.tally
        noise = [_noise(self.options.seed, split, first + i, self.mixture.shape, torch.float64) for i in range(count)]
        found.z = torch.stack(noise) * self.schedule.init_scale
        return found


class _MixturePart(problems.Problem):
    first: int
    tally: Tally

    @property
    def classes(self) -> torch.Tensor | None:
        return None if self.guidance == 1.0 else torch.arange(self.first, self.first + self.batch) % 2

    def model(self, x: torch.Tensor, label) -> torch.Tensor:
        self.tally.add(len(x))
        return super().model(x, label)


class Embedded(World):
    """A pipeline of assets/, with a LoRA if one is given."""

    images = True

    def __init__(self, model: str, guidance: float, options: Options):
        super().__init__(model, guidance, options)
        settings = models.named(str(ASSETS / model))
        self.family = models.load(settings, "no", 32)
        self.family.pipe = models.load_pipeline(str(ASSETS / model), device=options.device)
        self.family.vae_config = dict(self.family.pipe.vae.config)
        tuned = ""
        if options.lora is not None:
            trained.check(self.family.pipe, options.lora)
            trained.load_into(self.family.pipe, options.lora)
            tuned = f"-lora{trained.file_hash(options.lora)[:8]}"
        for part in ("vae", *self.family.encoders):
            getattr(self.family.pipe, part).requires_grad_(False).eval()
        self.network = lora_module.network_of(self.family.pipe).requires_grad_(False).eval()
        self.schedule, self.prediction = self.family.schedule(), self.family.prediction
        self.pixels = self.family.sample_size(self.family.pipe) * models.vae_factor(self.family.pipe)
        fingerprint = models.source_of(settings).fingerprint().rsplit(":", 1)[-1][:8]
        calls = options.reference_calls
        self.key = f"{model}-{fingerprint}{tuned}-g{guidance:g}-seed{options.seed}-ref{calls}"

    @cached_property
    def _captions(self) -> dict[str, list[str]]:
        train = load_prompts("shapes:train")
        return {"select": train[:SELECT], "fit": train[SELECT:], "heldout": load_prompts("shapes:heldout")}

    def prompts(self, split: str, count: int) -> list[str]:
        found = self._captions[split]
        if count > len(found):
            raise SystemExit(f"{self.name} has {len(found)} {split} prompts: ask for at most so many, not {count}")
        return found[:count]

    def _make(self, split: str, first: int, count: int) -> Tiny:
        texts = self.prompts(split, first + count)[first:]
        shape = self.family.latent_shape(self.network, self.pixels)
        found = _TinyPart()
        found.name, found.guidance, found.tally = self.name, self.guidance, self.tally
        found.schedule, found.prediction = self.schedule, self.prediction
        found.long_run, found.reference_calls = EMBEDDED[self.model_name], self.options.reference_calls
        found.policy = Policy(self.family, self.network)
        found.z = torch.stack([_noise(self.options.seed, split, first + i, shape) for i in range(count)])
        found.z = found.z.to(self.options.device)
        uncond = self._conditions([None] * count) if self.guidance != 1.0 else None
        given = (self._conditions(texts), *([uncond] if uncond else []))
        if "prompt_attention_mask" in given[0]:  # tokens that no prompt uses are masked in every row
            used = max(int(each["prompt_attention_mask"].sum(1).max()) for each in given)
            given = [{name: value[:, :used] for name, value in each.items()} for each in given]
        found.given = Conditioning(*given, **({"guidance": self.guidance} if uncond else {}))
        return found

    @torch.no_grad()
    def _conditions(self, texts: list[str | None]) -> dict[str, torch.Tensor]:
        sizes = torch.tensor([[self.pixels, self.pixels, 0, 0, self.pixels, self.pixels]], dtype=torch.float32)
        found = self.family.condition(self.family.encode_text(texts), sizes.repeat(len(texts), 1))
        return {name: value.to(self.options.device) for name, value in found.items()}

    def pictures(self, x: torch.Tensor) -> list[Image.Image]:
        """The decoded latents."""
        pixels = ((self.family.decode(x).clamp(-1, 1) + 1) * 127.5).round().byte()
        return [Image.fromarray(each) for each in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    def scores(self, split: str, first: int, x: torch.Tensor) -> dict[str, np.ndarray]:
        texts = self.prompts(split, first + len(x))[first:]
        pictures = self.pictures(torch.nan_to_num(x))
        read = [shapes.score(picture, text) for picture, text in zip(pictures, texts, strict=True)]
        return {name: np.array([one[name] for one in read]) for name in SCORES}


class _TinyPart(Tiny):
    """Some prompts of an `Embedded` world, which fills in what `Tiny` would load for itself."""

    policy: Policy
    given: Conditioning
    tally: Tally

    def __init__(self) -> None:
        pass

    def model(self, x: torch.Tensor, label) -> torch.Tensor:
        """The guided output; guidance 1 is the conditional model alone. It has gradients where x has."""
        self.tally.add(len(x))
        t = torch.as_tensor(label, dtype=torch.float32, device=x.device).expand(len(x))
        return self.policy.output(x.float(), t, self.given).to(x.dtype)


def _noise(seed: int, split: str, place: int, shape, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    noise = normal([generator(seed, f"calibrated bench {split}", place)], shape)[0]
    return noise.to(dtype)
