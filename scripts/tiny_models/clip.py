"""A tiny CLIP of this world: what step-aware preference models start from (stage clip)."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from diffpo.common.tables import Table
from diffpo.shapes import SIZE, Scene, heldout_captions, parse, render
from diffpo.shapes.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES

from .common import SEED, load_scenes, log

WIDTH, PATCH, NEGATIVES = 96, 4, 4
BIND, BIND_NEGATIVES = 900, 6
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
CARD = """# tiny-clip

A real `CLIPModel` of {parameters:.2f} M parameters ({megabytes:.1f} MB, float32) with its tokenizer and image
processor: pictures of {size} px in patches of {patch}, captions of `diffpo.shapes`. The text tower starts from the
second text encoder of `assets/tiny-sdxl` and has its tokenizer. The vision tower starts from random weights.

Trained by `scripts/build_tiny_models.py clip` (seed {seed}) on rendered scenes of the training split. For {steps} steps
the wrong captions are those of the batch, and copies of the right one with one thing changed. In {bind_steps} further
steps half of these changes concern which object is where. It was trained on clean pictures only, without preferences.

The table has {n} pictures of held-out captions (combinations of objects never seen in training). It shows how often the
right caption scores above the same caption with one thing changed (chance 50 %), and how often it is the best of 64.
Intervals are 95 % Wilson intervals.

{table}
"""


def variants(scene: Scene) -> dict[str, list[Scene]]:
    """Scenes that differ from ``scene`` in one thing, by what that is. Equal objects change together."""
    found: dict[str, list[Scene]] = {"colour": [], "shape": [], "relation": [], "swapped": [], "count": []}
    equal = scene.relation is None
    for place in [None] if equal else [0, 1]:
        for name, values, part in (("colour", COLOURS, 0), ("shape", SHAPES, 1)):
            for value in values:
                objects = [list(kind) for kind in scene.objects]
                for kind in objects if place is None else [objects[place]]:
                    kind[part] = value
                found[name].append(dataclasses.replace(scene, objects=tuple(map(tuple, objects))))
    if equal:
        found["count"] = [dataclasses.replace(scene, objects=scene.objects[:1] * n) for n in (1, 2, 3)]
    else:
        found["relation"] = [dataclasses.replace(scene, relation=relation) for relation in RELATIONS]
        found["swapped"] = [dataclasses.replace(scene, objects=scene.objects[::-1])]
    found["background"] = [dataclasses.replace(scene, background=name) for name in BACKGROUNDS]
    # two objects that became equal have no caption in this world
    allowed = {
        name: [each for each in scenes if each != scene and (equal or len(set(each.objects)) == 2)]
        for name, scenes in found.items()
    }
    return {name: scenes for name, scenes in allowed.items() if scenes}


def make_clip(assets: Path):
    """The untrained model and its processor."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    text = CLIPTextModelWithProjection.from_pretrained(assets / "tiny-sdxl" / "text_encoder_2")
    vision = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=text.config.to_dict(),
        vision_config={**vision, "image_size": SIZE, "patch_size": PATCH},
        projection_dim=text.config.projection_dim,
    )
    model = CLIPModel(config)
    model.text_model.load_state_dict(text.text_model.state_dict())
    model.text_projection.load_state_dict(text.text_projection.state_dict())
    tokenizer = CLIPTokenizer.from_pretrained(assets / "tiny-sdxl" / "tokenizer_2")
    return model, CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE), tokenizer)


def train_clip(work: Path, assets: Path, steps: int = 1100, bind_steps: int = BIND) -> None:
    """CLIP's symmetric loss (Radford et al. 2021), with captions of hard negatives beside those of the batch.

    Against any caption that differs in one thing it learns what there is and stays blind to which object is where. So
    a second part draws what differs evenly, the inverse relation among it.
    """
    torch.manual_seed(SEED + 3)
    images, captions = load_scenes(work)
    model, processor = make_clip(assets)
    prepare, distinct = _prepare(processor.image_processor), sorted(set(captions))
    # held-out captions stay out of the negatives too: they would only ever be seen as wrong
    others = {c: [[v.caption for v in e if not v.held_out] for e in variants(parse(c)).values()] for c in distinct}
    vocabulary = sorted({*distinct, *(caption for each in others.values() for kind in each for caption in kind)})
    row = {caption: i for i, caption in enumerate(vocabulary)}
    ids = processor.tokenizer(vocabulary, padding=True, return_tensors="pt").input_ids
    kinds = {c: [np.array([row[caption] for caption in kind]) for kind in each if kind] for c, each in others.items()}
    flat = {caption: np.concatenate(each) for caption, each in kinds.items()}
    for caption in distinct:
        if (scene := parse(caption)).relation:
            inverse = dataclasses.replace(scene, relation=INVERSE[scene.relation])
            kinds[caption].append(np.array([row[inverse.caption]]))

    def any_of(rng: np.random.Generator, caption: str) -> list[int]:
        return rng.choice(flat[caption], NEGATIVES)

    def evenly(rng: np.random.Generator, caption: str) -> list[int]:
        each = kinds[caption]
        return [rng.choice(each[rng.integers(len(each))]) for _ in range(BIND_NEGATIVES)]

    def fit(part: str, negatives, seed: int, batch: int, steps: int, rate) -> None:
        rng, started, running = np.random.default_rng(seed), time.time(), None
        optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.05)
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = rate(step)
            pick = rng.integers(0, len(images) - 1000, batch)
            own = torch.tensor([row[captions[i]] for i in pick])
            hard = torch.tensor(np.stack([negatives(rng, captions[i]) for i in pick]))
            loss, right = _loss(model, prepare(images[pick]), ids, own, hard)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=np.log(100))
            running = right if running is None else 0.98 * running + 0.02 * right
            if (step + 1) % 100 == 0:
                seconds = time.time() - started
                log(work, "clip", part=part, step=step + 1, of=steps, loss=loss.item(), right=running, seconds=seconds)

    fit("things", any_of, SEED + 3, 128, steps, lambda step: 1e-3 * min(1, (step + 1) / 100, (steps - step) / 200))
    fit("places", evenly, 7, 96, bind_steps, lambda step: 6e-4 * min(1, (step + 1) / 50))
    folder = assets / "tiny-clip"
    model.config.text_config._name_or_path = ""  # it would say where this machine keeps the encoder
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    card(folder, model, processor, steps, bind_steps)


def _loss(model, pixels: torch.Tensor, ids: torch.Tensor, own: torch.Tensor, hard: torch.Tensor):
    """pixels (B, 3, H, W), rows of ``ids``: own (B,) and hard negatives (B, k) -> loss, share of pictures whose own
    caption is the best."""
    seen, place = torch.cat([own[:, None], hard], 1).unique(return_inverse=True)
    text = F.normalize(model.get_text_features(input_ids=ids[seen]).pooler_output)[place]
    image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output)
    scale = model.logit_scale.exp()
    logits = scale * image @ text[:, 0].T
    same = (own[:, None] == own) & ~torch.eye(len(own), dtype=torch.bool)
    logits = logits.masked_fill(same, float("-inf"))  # another picture of the same caption is no negative
    with_hard = torch.cat([logits, scale * torch.einsum("bd,bkd->bk", image, text[:, 1:])], 1)
    target = torch.arange(len(own))
    loss = (F.cross_entropy(with_hard, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (with_hard.argmax(1) == target).double().mean().item()


def _prepare(image_processor):
    """(n, SIZE, SIZE, 3) uint8 -> normalised pixels (n, 3, SIZE, SIZE)."""
    mean, std = torch.tensor(image_processor.image_mean), torch.tensor(image_processor.image_std)
    return lambda images: (
        (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean[:, None, None]) / std[:, None, None]
    )


@torch.no_grad()
def card(folder: Path, model, processor, steps: int, bind_steps: int, n: int = 1000) -> None:
    from diffpo.evaluation.statistics import wilson

    rng = np.random.default_rng(SEED + 4)
    scenes = [parse(caption) for caption in heldout_captions(n)]
    pixels = _prepare(processor.image_processor)(np.stack([render(scene, rng) for scene in scenes]))
    image = F.normalize(model.get_image_features(pixel_values=pixels).pooler_output)

    def encode(texts: list[str]) -> torch.Tensor:
        ids = processor.tokenizer(texts, padding=True, return_tensors="pt").input_ids
        return F.normalize(model.get_text_features(input_ids=ids).pooler_output)

    own = encode([scene.caption for scene in scenes])
    score, results = (image * own).sum(1), {}
    for kind in ("colour", "shape", "relation", "swapped", "count", "background"):
        rows = [i for i, scene in enumerate(scenes) if kind in variants(scene)]
        changed = [variants(scenes[i])[kind] for i in rows]
        texts = [each[rng.integers(len(each))].caption for each in changed]
        results[kind] = (score[rows] > (image[rows] * encode(texts)).sum(1)).double()
    groups = torch.arange(len(scenes) // 64 * 64).view(-1, 64)
    results["best of 64"] = torch.cat([((image[g] @ own[g].T).argmax(1) == torch.arange(64)).double() for g in groups])
    table = Table(["changed", "right", "95 % interval", "n"])
    for kind, right in results.items():
        low, high = wilson(right.sum().item(), len(right))
        table.rows.append((kind, f"{right.mean().item():.1%}", f"{low:.1%} to {high:.1%}", len(right)))
    text = CARD.format(
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        size=SIZE,
        patch=PATCH,
        seed=SEED,
        steps=steps,
        bind_steps=bind_steps,
        n=n,
        table=table.markdown(),
    )
    (folder / "README.md").write_text(text)
    print(json.dumps({kind: right.mean().item() for kind, right in results.items()}))
