"""Data of the comparison in three regimes: the model's own samples, other models' samples, and real pictures.

own: assets/shapes-preferences. others: pictures of the same captions by other models. real: the scenes themselves,
rendered, against the model's own samples. Each regime has the same images in several formats.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffpo.common.carried import HOME as ROOT
from diffpo.evaluation.generation import Generation

if TYPE_CHECKING:
    from PIL import Image

REGIMES = ("own", "others", "real")
ASSETS = ROOT / "assets"
MODEL = ASSETS / "tiny-sdxl"
PAIRS = ASSETS / "shapes-preferences" / "train.parquet"
VALIDATION = ASSETS / "shapes-preferences" / "validation.parquet"
FLIPS = (20, 40)  # per cent of the labels
SEED = 20_260  # of the pictures of others and of real
CAPTIONS = 350  # of others
TIE = 0.02  # a smaller difference of totals is a tie, as in assets/shapes-preferences
PLANS = Path(__file__).resolve().parent / "plans"


def drawing(model: str, steps: int, guidance: float, lora: str | None = None) -> Generation:
    """How pictures of ``model`` are made. The plan is that of the default solver when results were first kept, in a
    file, so that a new default does not change what is measured."""
    plan = PLANS / f"{model}-{steps}-{guidance:g}.safetensors"
    found = Generation(ASSETS / model, steps=steps, guidance=guidance, plan=plan, batch_size=64, device="cpu")
    return found if lora is None else replace(found, lora=str(ASSETS / lora))


# the models that draw for `others`, two pictures of a caption each: weaker and stronger guidance, distilled, a DiT
OTHERS = (
    drawing("tiny-sdxl", 10, 1.0),
    drawing("tiny-sdxl", 10, 7.0),
    drawing("tiny-sdxl", 4, 1.0, lora="tiny-turbo"),
    drawing("tiny-dit", 10, 3.0),
)
EACH = 2


def make(folder: Path, regime: str = "own") -> None:
    """Write pairs.parquet, lists.parquet, flipped-20/40.parquet and captions.parquet of ``regime`` into ``folder``.

    lists: the images of a caption with their scores (the oracle's total). flipped: the labels of so many per cent of
    the pairs that are no ties are turned round. captions: the rejected image has a caption of its own, the prompt with
    one word changed (DCPO's perturbed prompt).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    rows = {"own": lambda: pq.read_table(PAIRS).to_pylist(), "others": others, "real": real}[regime]()

    def write(name: str, content: list[dict[str, Any]]) -> None:
        pq.write_table(pa.Table.from_pylist(content), folder / f"{name}.parquet")

    write("pairs", rows)
    write("lists", as_lists(rows))
    for share in FLIPS:
        write(f"flipped-{share}", flipped(rows, share / 100))
    write("captions", [own_captions(row, i) for i, row in enumerate(rows) if row["label_0"] != 0.5])


def scorers(folder: Path, cache: Path) -> None:
    """The step-aware scorers of configs/, trained once: ``folder``/pixel, from the time-blind ``folder``/blind, and
    ``folder``/latent."""
    from diffpo.config import ScorerConfig, load_config
    from diffpo.train.step_scorer import train_scorer

    own = {
        "blind": ("pixel", ["scorer.times=clean", f"scorer.clip={ROOT / 'assets' / 'tiny-clip'}"]),
        "pixel": ("pixel", [f"scorer.clip={folder / 'blind'}"]),
        "latent": ("latent", []),
    }
    for name, (kind, settings) in own.items():
        settings += [f"output={folder / name}", f"data.cache={cache}"]
        settings += [f"model.path={MODEL}", f"data.train={PAIRS}", f"data.validation={VALIDATION}"]
        if not (folder / name / "scorer.json").exists():
            train_scorer(load_config(ROOT / "configs" / f"train_scorer_{kind}.yaml", settings, kind=ScorerConfig))


def others(captions: int = CAPTIONS, models: Sequence[Generation] = OTHERS) -> list[dict[str, Any]]:
    """Pairs of pictures by ``models``, in the columns of assets/shapes-preferences: best with worst of a caption,
    second with last but one, and so on."""
    from diffpo.scorers.shapes import ShapesScorer

    drawn: dict[str, list[Image.Image]] = {}
    texts = train_captions_of_pairs()[:captions]
    for place, generation in enumerate(models):
        for caption, images in zip(texts, _pictures(generation, texts, SEED + place), strict=True):
            drawn.setdefault(caption, []).extend(images)
    scorer, rows = ShapesScorer(), []
    for caption, images in drawn.items():
        scores = scorer.score(images, [caption] * len(images))["shapes.total"].tolist()
        order = sorted(range(len(images)), key=lambda i: -scores[i])
        for better, worse in zip(order[: len(order) // 2], reversed(order[len(order) // 2 :]), strict=True):
            rows.append(pair(caption, (images[better], images[worse]), (scores[better], scores[worse])))
    return rows


def real(captions: int | None = None) -> list[dict[str, Any]]:
    """The pairs of assets/shapes-preferences with a rendered scene of the caption in place of the better picture."""
    import pyarrow.parquet as pq
    from PIL import Image

    from diffpo.scorers.shapes import ShapesScorer
    from diffpo.shapes import parse, render

    rng, scorer, rows = np.random.default_rng(SEED), ShapesScorer(), []
    texts = set(train_captions_of_pairs()[:captions])
    for row in (one for one in pq.read_table(PAIRS).to_pylist() if one["caption"] in texts):
        caption, worse = row["caption"], int(row["score_0"] > row["score_1"])
        scene = Image.fromarray(render(parse(caption), rng))
        score = float(scorer.score([scene], [caption])["shapes.total"][0])
        rows.append(pair(caption, (scene, row[f"jpg_{worse}"]), (score, row[f"score_{worse}"])))
    return rows


def pair(caption: str, images: tuple[Any, Any], scores: tuple[float, float]) -> dict[str, Any]:
    """A row of Pick-a-Pic's columns, the better image first; a small difference of the scores is a tie."""
    label = 0.5 if abs(scores[0] - scores[1]) < TIE else float(scores[0] > scores[1])
    row: dict[str, Any] = {"caption": caption, "label_0": label, "label_1": 1 - label}
    for i in range(2):
        row |= {f"jpg_{i}": images[i] if isinstance(images[i], bytes) else lossless(images[i]), f"score_{i}": scores[i]}
    return row


def lossless(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def train_captions_of_pairs() -> list[str]:
    """The captions of assets/shapes-preferences, in their order there."""
    import pyarrow.parquet as pq

    return list(dict.fromkeys(pq.read_table(PAIRS, columns=["caption"])["caption"].to_pylist()))


def _pictures(generation: Generation, captions: list[str], seed: int) -> list[list[Image.Image]]:
    """`EACH` pictures of every caption."""
    from diffpo.evaluation import generate
    from diffpo.weights import trained

    pipe = generate.load(generation.base())
    if generation.lora is not None:
        trained.load_into(pipe, Path(generation.lora))
    wanted = [generate.Picture(i, seed + j * len(OTHERS), text) for i, text in enumerate(captions) for j in range(EACH)]
    found: list[Image.Image] = []
    for start in range(0, len(wanted), generation.batch_size):
        found += generate.paint(pipe, generation, wanted[start : start + generation.batch_size])
    return [found[i : i + EACH] for i in range(0, len(found), EACH)]


def as_lists(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for a caption: its images and their scores."""
    lists: dict[str, dict[str, Any]] = {}
    for row in rows:
        one = lists.setdefault(row["caption"], {"prompt": row["caption"], "images": [], "scores": []})
        for i in "01":
            one["images"].append(row[f"jpg_{i}"])
            one["scores"].append(row[f"score_{i}"])
    return list(lists.values())


def flipped(rows: list[dict[str, Any]], share: float, seed: int = 0) -> list[dict[str, Any]]:
    """The pairs with ``share`` of the oracle's own preferences turned round (the few flips of the data set undone)."""
    clear = [row for row in rows if row["label_0"] != 0.5]
    turned = set(np.random.default_rng(seed).permutation(len(clear))[: round(share * len(clear))].tolist())
    result = []
    for i, row in enumerate(clear):
        label = float((row["score_0"] > row["score_1"]) != (i in turned))
        result.append({**row, "label_0": label, "label_1": 1 - label})
    return result


def own_captions(row: dict[str, Any], seed: int) -> dict[str, Any]:
    """The prompt for the chosen image, the prompt with another colour, shape or relation for the rejected one."""
    from diffpo.shapes.scenes import COLOURS, SHAPES

    words = row["caption"].split()
    families = [list(COLOURS), list(SHAPES)]
    rng = np.random.default_rng(seed)
    at = [(i, family) for i, word in enumerate(words) for family in families if word in family]
    place, family = at[int(rng.integers(len(at)))]
    other = [word for word in family if word != words[place]]
    words[place] = other[int(rng.integers(len(other)))]
    perturbed = " ".join(words)
    chosen, rejected = ("jpg_0", "jpg_1") if row["label_0"] > 0.5 else ("jpg_1", "jpg_0")
    return {
        "chosen": row[chosen],
        "rejected": row[rejected],
        "caption_chosen": row["caption"],
        "caption_rejected": perturbed,
    }
