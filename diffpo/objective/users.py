"""Personalised preferences (PPD; Dang et al. 2025, arXiv 2501.06655): a policy that is also conditioned on a user.

A user is described by a few pairs that the user judged. The user's taste is the mean over them of features(chosen) -
features(rejected), so a new user needs pairs and no training. A small network turns a taste into tokens for the
policy's cross-attention (user_attention.py). It is trained with the LoRA on the pairs of all users. The reference does
not read it.

Features are pooled VAE latents: they describe colour, brightness and position, but not content. The paper takes them
from a vision-language model.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import models
from ..common.errors import DiffpoError
from ..common.files import write_atomic
from ..common.rng import Draws
from ..common.text import plain
from ..config import Data, Model
from ..data.batches import Batches
from ..data.columns import NOUN
from ..data.groups import Groups, load_groups
from ..data.transforms import pixels, view
from ..weights.lora import network_of
from ..weights.lora_file import sorted_header, users_file
from . import steering
from .user_attention import attach

SHOTS = 4  # pairs that describe a user, as in the paper
SIDE = 4  # of the pooled latents


def features(x_0: Tensor) -> Tensor:
    """(n, C, h, w) latents -> (n, C (SIDE^2 + 1)) float32: means over a coarse grid, and each channel's deviation."""
    x_0 = x_0.float()
    pooled = torch.nn.functional.adaptive_avg_pool2d(x_0, SIDE).flatten(1)
    return torch.cat([pooled, x_0.flatten(2).std(2)], 1)


def taste(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The taste (F,) in k pairs of one user, (k, C, h, w) latents each."""
    return (features(chosen) - features(rejected)).mean(0)


class Tastes:
    """The pairs of a data set as evidence on its users: ``differences`` (G, F) of features, ``users`` of the G pairs
    (None: unknown). ``name`` of the features; None for pooled latents."""

    def __init__(self, differences: Tensor, users: Sequence[str | None], name: str | None = None) -> None:
        self.differences, self.users, self.name = differences.float(), list(users), name
        self._pairs: dict[str, list[int]] = defaultdict(list)
        for index, user in enumerate(self.users):
            if user is not None:
                self._pairs[user].append(index)

    @property
    def header(self) -> dict[str, str]:
        """What a file of the tokens says of them."""
        return {} if self.name is None else {"taste": self.name}

    @property
    def scale(self) -> Tensor:
        """Root mean square of each feature's difference, (F,)."""
        return self.differences.square().mean(0).sqrt().clamp(min=1e-6)

    def rows(self, indices: Sequence[int], draws: Draws) -> Tensor:
        """Tastes (n, F) for the pairs ``indices``: each from up to `SHOTS` others of the same user, drawn anew at each
        position. The pair itself is left out, because it would give away its answer. 0 for a user without others."""
        found = torch.zeros(len(indices), self.differences.shape[1])
        for row, (index, draw) in enumerate(zip(indices, draws.generators("shots"), strict=True)):
            user = self.users[index]
            others = [other for other in self._pairs.get(user, []) if other != index] if user is not None else []
            if others:
                order = torch.randperm(len(others), generator=draw)
                found[row] = self.differences[[others[i] for i in order[:SHOTS].tolist()]].mean(0)
        return found

    def condition(self, indices: Sequence[int], draws: Draws) -> dict[str, Tensor]:
        """`rows`, as `Batches.further` takes them."""
        return {"user": self.rows(indices, draws)}


def require_users(groups: Groups) -> None:
    """DiffpoError unless a user in the data has two pairs: one that describes the user, and one to learn from."""
    if groups.kind != "pair":
        raise DiffpoError(f"{groups.source} holds {NOUN[groups.kind]}, and users need pairs: set objective.users=false")
    if max(Counter(group.user for group in groups.groups if group.user is not None).values(), default=0) < 2:
        raise DiffpoError(
            f"{groups.source}: no user has two pairs, and objective.users=true needs two of at least one user. Name "
            f"the column that identifies users with data.columns.user=NAME"
        )


class Pictures(Protocol):
    """Features of pictures (scorers/features.py): `embed` gives a vector (n, F) for each of n; ``name`` says which."""

    name: str

    def embed(self, images: list[Any]) -> Any: ...


def read_tastes(batches: Batches, seen: Pictures | None = None) -> Tastes:
    """The tastes of the users of ``batches``, from its latent cache or from its pictures as ``seen`` sees them."""
    groups, differences = batches.groups, []
    for start in range(0, len(groups), 256):
        part = range(start, min(start + 256, len(groups)))
        if seen is None:
            chosen, rejected = batches.means(part).chunk(2)
            differences.append((features(chosen) - features(rejected)).cpu())
        else:
            differences.append(_differences([groups.images(index) for index in part], seen))
    return Tastes(torch.cat(differences), [pair.user for pair in groups.groups], None if seen is None else seen.name)


def _differences(pairs: Sequence[Sequence[Any]], seen: Pictures) -> Tensor:
    """(k, F): unit vectors of the chosen pictures less those of the rejected."""
    vectors = torch.as_tensor(seen.embed([image for pair in pairs for image in pair[:2]])).float()
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    return vectors[::2] - vectors[1::2]


def save(path: Path, network: torch.nn.Module, resolution: int, header: Mapping[str, str] | None = None) -> None:
    """Write the user tokens of ``network`` as safetensors, with the ``resolution`` that tastes were read at and the
    ``header`` of what they are tokens of."""
    from safetensors.torch import save as serialize

    state = {name: value.detach().cpu().contiguous() for name, value in network.user_tokens.state_dict().items()}
    state["resolution"] = torch.tensor(resolution)
    write_atomic(path, sorted_header(serialize(state, {"format": "pt", **(header or {})})))


@dataclass(frozen=True)
class Person:
    """Who pictures are made for: the first `SHOTS` pairs of one user or several, with their weights; or the ``weights``
    of rewards of a LoRA that was trained with these."""

    pairs: tuple[tuple[Groups, float], ...] = ()
    weights: Tensor | None = None


def read_person(lora: str | Path, user_pairs: str | None, steer: str | None) -> tuple[Person, str]:
    """The person that the options name, and a hash of all that the tokens depend on.

    ``user_pairs``: a source of pairs, or FILE@WEIGHT+FILE@WEIGHT between users. DiffpoError if there are no pairs, no
    tokens beside the LoRA, or tokens of the other kind.
    """
    tokens = users_file(lora)
    option = "--user-pairs" if steer is None else "--steer"
    if not tokens.is_file():
        raise DiffpoError(f"the LoRA {lora} was trained without users: there is no {tokens}; leave out {option}")
    rewards, _ = header_of(tokens)
    if (steer is None) == bool(rewards):
        other = "--steer" if rewards else "--user-pairs"
        kind = "weights of rewards" if rewards else "users"
        raise DiffpoError(f"the LoRA {lora} was trained with {kind}: use {other}, not {option}")
    digest = sha256(tokens.read_bytes())
    if steer is not None:
        weights = steering.parse(steer, rewards)
        digest.update(repr(weights.tolist()).encode())
        return Person(weights=weights), digest.hexdigest()
    data, found = Data(resolution=8), []  # no image is decoded yet
    for source, weight in shares(user_pairs or ""):
        pairs = load_groups(data, source, data.train_split)
        del pairs.groups[SHOTS:]
        found.append((pairs, weight))
        digest.update(pairs.data_hash.encode() + (b"" if weight == 1 else repr(weight).encode()))
    return Person(tuple(found)), digest.hexdigest()


def shares(text: str) -> list[tuple[str, float]]:
    """The sources of pairs in FILE or FILE@WEIGHT+FILE@WEIGHT, and their weights."""
    if "@" not in text or Path(text).expanduser().exists():
        return [(text, 1.0)]
    parts = re.findall(r"(.+?)@([0-9]*\.?[0-9]+)(?:\+|$)", text)
    if "+".join(f"{source}@{weight}" for source, weight in parts) != text:
        raise DiffpoError(f"--user-pairs {plain(text, 200)}: write FILE, or FILE@WEIGHT+FILE@WEIGHT between users")
    return [(source, float(weight)) for source, weight in parts]


def welcome(person: Person, lora: str | Path, model: Model, pipe: Any, seen: Pictures | None = None) -> Tensor:
    """Attach the user tokens to the pipeline's network; returns the vector (F,) of ``person``, as in training.

    ``seen``: the features that tastes were read from; DiffpoError if they are others.
    """
    resolution = load(users_file(lora), network_of(pipe))
    if person.weights is not None:
        return steering.centred(person.weights)
    _, name = header_of(users_file(lora))
    if name != (None if seen is None else seen.name):
        given = "none" if seen is None else plain(seen.name, 100)
        raise DiffpoError(
            f"the LoRA {lora} knows users by {name or 'pooled latents'}, not by {given}: "
            + (f"name these features with --user-features ({name})" if name else "leave out --user-features")
        )
    if seen is not None:
        tastes = [
            weight * _differences([pairs.images(i) for i in range(len(pairs))], seen).mean(0)
            for pairs, weight in person.pairs
        ]
        return torch.stack(tastes).sum(0)
    family = models.load(model)
    family.pipe, family.vae_config = pipe, dict(pipe.vae.config)
    dtype = pipe.vae.dtype
    pipe.vae.float()  # SDXL's overflows in half precision
    found = [weight * _taste_of(pairs, family, resolution) for pairs, weight in person.pairs]
    pipe.vae.to(dtype)
    return torch.stack(found).sum(0)


def _taste_of(pairs: Groups, family: Any, resolution: int) -> Tensor:
    views = [view(pair.size, resolution, "center", False, torch.Generator()) for pair in pairs.groups]
    images = [pairs.images(i) for i in range(len(pairs))]
    flat = torch.stack([pixels(image[k], view) for k in (0, 1) for image, view in zip(images, views, strict=True)])
    means = torch.cat([family.encode_image(one)["mean"] for one in flat.split(1)])
    chosen, rejected = family.scale_latents(means).chunk(2)
    return taste(chosen, rejected)


def header_of(path: Path) -> tuple[list[str], str | None]:
    """What the header of a file of user tokens says: the names of the rewards (none if it is of users), and the name of
    the features that tastes are read from (None: pooled latents)."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        names, taste = json.loads(header.get("rewards", "[]")), header.get("taste")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("the names of its rewards are no list of texts")
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise DiffpoError(f"cannot read the user tokens {path}: {plain(error, 200)}") from None
    return [plain(name, 100) for name in names], None if taste is None else plain(taste, 100)


def load(path: Path, network: torch.nn.Module) -> int:
    """Attach the user tokens in the file ``path``; returns the resolution that tastes are read at. DiffpoError if they
    do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        resolution = int(state.pop("resolution"))
        if not 8 <= resolution <= 2**14:
            raise ValueError(f"their resolution is {resolution} pixels, not 8 to {2**14}")
        prototypes = len(state["mixture.weight"]) if "mixture.weight" in state else 0
        attach(network, state["scale"], prototypes=prototypes).load_state_dict(state)
        if not all(value.isfinite().all() for value in state.values()):
            raise ValueError("they are not finite")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DiffpoError(
            f"cannot use the user tokens {path}: {reason}; give the LoRA of a finished run that trained with users, "
            f"and its base model"
        ) from None
    return resolution
