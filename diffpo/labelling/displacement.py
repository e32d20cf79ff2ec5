"""Which pairs push the better picture's own error up: a score after CHES, on a network's features of noised latents.

For language models CHES is <h+, h-> - ||h+||^2, with h the sum of the last layer's hidden embeddings over the tokens of
the chosen or the rejected response (Razin et al. 2024, arXiv 2410.08847). Where it is large, training on the pair
lowers the likelihood of the chosen response itself. Here both pictures get the same noise at the same timestep, and
there are two scores, each a mean over `DRAWS` timesteps, one from each quarter:

hidden    the same formula with h the mean over all positions of what enters the network's last layer.
gradient  the same with h the gradient of the picture's denoising error by the weights of that layer. A step of gradient
          descent on -log sigma(u) from the base, of size eta on these weights, changes the chosen error by
          (beta eta / 4) times this score, to first order: above 0 it rises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import models
from ..common import processes
from ..common.errors import DiffpoError
from ..common.parts import Parts
from ..config import Data, Model
from ..data.batches import Batches
from ..data.groups import load_groups
from ..models.identity import base_identity
from ..objective.reward import squared_error
from ..problems.forward import Forward
from . import files
from .rows import Row

if TYPE_CHECKING:
    from ..models.family import Family
    from ..problems.regression import Regression

DRAWS = 4  # timesteps of each pair
AT_ONCE = 8  # pairs of a forward pass
FOLDER = ".displacement"
LAST = (
    "conv_out",
    "proj_out_2",
    "proj_out",
)  # the last layer in diffusers' networks; a DiT has two of them


@dataclass(frozen=True)
class Filter:
    """``share`` of the pairs is left out, seen by ``model`` (the one to train) in ``precision`` (of `Train`)."""

    share: float
    model: Model
    precision: str = "no"

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise DiffpoError(f"--filter {self.share:g}: a share is at least 0 and less than 1")


def scores(family: Family, network: torch.nn.Module, regression: Regression) -> tuple[Tensor, Tensor]:
    """``hidden`` and ``gradient`` (n,) float32 of n pairs, the better pictures first, by the base ``network``."""
    layer: Any = next((getattr(network, name) for name in LAST if hasattr(network, name)), None)
    if layer is None:
        raise DiffpoError(f"the last layer of a {type(network).__name__} is not known, which --filter needs")
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _module, given: seen.append(given[0].detach()))
    layer.weight.requires_grad_(True)
    try:
        half = torch.autocast(regression.x_t.device.type, family.dtype, enabled=family.dtype != torch.float32)
        with torch.enable_grad(), half:
            prediction = family.predict(network, regression.x_t, regression.t, regression.conditioning.cond)
            errors = squared_error(prediction, regression.target)
            gradients = torch.stack(
                [torch.autograd.grad(error, layer.weight, retain_graph=True)[0].flatten() for error in errors]
            )
    finally:
        hook.remove()
        layer.weight.requires_grad_(False)
    (entered,) = seen
    hidden = entered.float().flatten(2).mean(2) if entered.ndim == 4 else entered.float().mean(1)
    return _ches(hidden), _ches(gradients.float())


def _ches(features: Tensor) -> Tensor:
    """(2 n, d), the better ones first -> <h+, h-> - ||h+||^2, (n,)."""
    better, worse = features.chunk(2)
    return (better * worse).sum(1) - better.square().sum(1)


def score_pairs(data: Data, seen_by: Filter, kept: Parts) -> dict[int, str]:
    """Score the pairs of ``data.train`` that are neither ties nor equal pictures, by the base model of ``seen_by``.
    (hidden, gradient) goes into ``kept``; of several processes each computes a share. Returns {row: key there}."""
    from tqdm.auto import tqdm

    ours = processes.here()
    worker, source = ours.worker(), str(data.train)
    family = models.load(seen_by.model, seen_by.precision, data.resolution)
    family.load_encoders(worker.device)
    groups = load_groups(data, source, data.train_split, quiet=worker.quiet)
    batches = Batches(groups, data, family, worker=worker)
    ours.wait()
    family.free_encoders()
    network = family.load_network(worker.device)
    base, forward, width = base_identity(network)["hash"], Forward(family), family.train_timesteps // DRAWS
    keys = [f"{base} {group.digest}" for group in groups.groups]
    todo = [k for k in ours.share(range(len(groups))) if keys[k] not in kept.rows]
    about = {"desc": "displacement", "unit": "pair", "delay": 1, "disable": not ours.main}
    with tqdm(total=len(todo), **about) as bar:
        for part in batches.portions(todo, lambda k: k, AT_ONCE):
            total = torch.zeros(2, len(part))
            for draw in range(DRAWS):
                ranges = [(draw * width, (draw + 1) * width)] * len(part)
                batch = batches.batch(part, [draw * len(groups) + k for k in part], "displacement", ranges)
                total += torch.stack(scores(family, network, forward(batch))).cpu() / DRAWS
            for k, pair in zip(part, total.T.tolist(), strict=True):
                kept.add(keys[k], pair)
            bar.update(len(part))
    return {group.row: key for key, group in zip(keys, groups.groups, strict=True)}


def add(rows: Sequence[Row], chosen: Filter, out: Path) -> tuple[list[Row], list[str]]:
    """The pairs with their score `gradient`, without the share of them that have the largest, and a sentence on these.
    Ties and pairs of equal pictures have no score, and stay.

    What is finished is kept in ``out``, and all processes work together.
    """
    ours, folder = processes.here(), out / FOLDER
    source = folder / "pairs.parquet"
    if ours.main:
        files.write(source, "pairs", rows, (), {"for": "displacement"})
    sizes = {size for row in rows for size in map(_size, row.files)}
    side = min(min(size) for size in sizes) // 8 * 8
    ours.wait()
    data = Data(train=str(source), resolution=max(8, side), cache=str(folder), buckets=len(sizes) > 1)
    keys = score_pairs(data, chosen, Parts(folder, "scores", ours.rank))
    ours.wait()
    known = Parts(folder, "scores", ours.rank).rows
    found = {row: float(known[key][1]) for row, key in keys.items()}
    scored = [replace(row, displacement=found.get(k)) for k, row in enumerate(rows)]
    dropped = {*sorted(found, key=lambda k: -found[k])[: round(chosen.share * len(found))]}
    said = f"{len(dropped)} of {len(rows)} pairs are left out: those with the largest displacement score (--filter)"
    return [row for k, row in enumerate(scored) if k not in dropped], [said] if dropped else []


def _size(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as image:
        return image.size
