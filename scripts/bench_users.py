"""PPD on the embedded world: users with opposite tastes, learnt together; pictures for users that were not in training.

python scripts/bench_users.py [--taste light] [--out runs/bench-users] [--seeds 0] [--lr 1e-4] [--n 128]

Half the users like bright pictures, half dark ones, so that on average there is nothing to learn; or shapes on the
right against the left, or large against small ones, as the oracle reads them. Pairs are of pictures of one caption in
assets/shapes-preferences; the new users' captions are not in training. PPD and plain Diffusion-DPO train on the same
pairs for as many updates. Prints the rows of the tables in docs/users.md; finished trainings and pictures in OUT are
kept.
"""

import argparse
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffpo.common import tables
from diffpo.common.carried import HOME as ROOT
from diffpo.config import load_config
from diffpo.evaluation import generate, statistics
from diffpo.evaluation.generation import ARMS, Generation
from diffpo.shapes import oracle
from diffpo.train.loop import train

USERS, NEW_USERS = 40, 20  # half of them of either taste
MODEL = ROOT / "assets" / "tiny-sdxl"


@dataclass(frozen=True)
class Taste:
    """What users disagree about: ``names`` of those who want much and little of what ``read`` sees in a picture (NaN:
    cannot say), and ``pairs`` of pictures, much and little, made of those of one caption."""

    names: tuple[str, str]
    read: Callable[[Image.Image], float]
    pairs: Callable[[list[Image.Image]], list[tuple[Image.Image, Image.Image]]]


def of_shapes(read: Callable[[oracle.Seen], float]) -> Callable[[Image.Image], float]:
    """Mean over the shapes that the oracle sees, in pixels."""

    def mean_of(picture: Image.Image) -> float:
        seen = oracle.read(picture).objects
        return mean(read(one) for one in seen) if seen else float("nan")

    return mean_of


def ranked(read: Callable[[Image.Image], float], gap: float) -> Callable:
    """Most against least, second against second, ..., as long as they differ by ``gap``."""

    def pairs(pictures: list[Image.Image]) -> list[tuple[Image.Image, Image.Image]]:
        values = [(read(picture), i) for i, picture in enumerate(pictures)]
        order = sorted(each for each in values if not np.isnan(each[0]))
        best = zip(order[: len(order) // 2], order[::-1], strict=False)
        return [(pictures[much[1]], pictures[little[1]]) for little, much in best if much[0] - little[0] >= gap]

    return pairs


def light(picture: Image.Image) -> float:
    """Mean grey value, 0..255."""
    return float(np.asarray(picture.convert("L"), float).mean())


def exposed(pictures: list[Image.Image]) -> list[tuple[Image.Image, Image.Image]]:
    """A twentieth of white, and one of black, mixed into two pictures."""
    white, black = (Image.new("RGB", pictures[0].size, colour) for colour in ("white", "black"))
    return [(Image.blend(one, white, 0.05), Image.blend(one, black, 0.05)) for one in pictures[:2]]


size, place = of_shapes(lambda seen: seen.radius), of_shapes(lambda seen: seen.cx)
TASTES = {
    "light": Taste(("bright", "dark"), light, exposed),
    "place": Taste(("right", "left"), place, ranked(place, 1.5)),
    "size": Taste(("large", "small"), size, ranked(size, 0.15)),
}


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def pairs(split: str, taste: Taste) -> list[tuple[str, bytes, bytes]]:
    """(caption, picture with much, one with little), in random order."""
    by_caption: dict[str, dict[bytes, None]] = {}
    for row in pq.read_table(ROOT / "assets" / "shapes-preferences" / f"{split}.parquet").to_pylist():
        by_caption.setdefault(row["caption"], {}).update({row["jpg_0"]: None, row["jpg_1"]: None})
    found = []
    for caption, encoded in by_caption.items():
        pictures = [Image.open(io.BytesIO(one)).convert("RGB") for one in encoded]
        found += [(caption, png(much), png(little)) for much, little in taste.pairs(pictures)]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def make_data(folder: Path, taste: Taste) -> None:
    """train.parquet and new.parquet with a column of users, and the first pairs of one new user of either taste."""
    folder.mkdir(parents=True)
    for split, name, users in (("train", "train", USERS), ("validation", "new", NEW_USERS)):
        rows = []
        for i, (caption, much, little) in enumerate(pairs(split, taste)):
            user = i % users
            chosen, rejected = (much, little) if user % 2 == 0 else (little, much)
            name_of_user = f"{taste.names[user % 2]} {user}"
            rows.append({"prompt": caption, "chosen": chosen, "rejected": rejected, "user_id": name_of_user})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        print(f"{name}: {len(rows)} pairs of {users} users", flush=True)
    for number, one in enumerate(taste.names):
        own = [row for row in rows if row["user_id"] == f"{one} {number}"]
        pq.write_table(pa.Table.from_pylist(own), folder / f"{one}.parquet")


def run(method: str, seed: int, lr: float, folder: Path) -> Path:
    """Train ``method`` as configs/quickstart.yaml has it, or take up what is there."""
    output = folder / f"{method}-{seed}"
    overrides = [
        f"model.path={MODEL}",
        f"data.train={folder / 'data' / 'train.parquet'}",
        f"data.validation={folder / 'data' / 'new.parquet'}",
        "data.columns.user=user_id",
        f"data.cache={folder / 'cache'}",
        f"objective.name={method}",
        f"train.lr={lr}",
        "train.eval_every=1000",
        "train.eval_pairs=1000",
        f"train.seed={seed}",
        f"output={output}",
    ]
    train(load_config(ROOT / "configs" / "quickstart.yaml", overrides))
    return output


def percent(found: statistics.Estimate) -> str:
    return f"{found.value:.1%} [{found.low:.1%}, {found.high:.1%}]"


def accuracy(output: Path) -> str:
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    value, n = last["eval/accuracy"], last["eval/pairs"]
    return f"{percent(statistics.Estimate(value, *statistics.wilson(value * n, n)))} of {n:.0f}"


def measure(output: Path, user_pairs: Path | None, n: int, taste: Taste) -> dict[str, np.ndarray]:
    """What the taste reads in the pictures of ``n`` held-out prompts, by arm."""
    out = output / f"pictures-{user_pairs.stem if user_pairs else 'none'}"
    # the solver that the tables in docs/users.md were made with
    options = {"steps": 10, "solver": "dpmpp", "guidance": 3.0, "batch_size": 64}
    pictures = Generation(MODEL, lora=output, user_pairs=user_pairs, **options)
    rows = generate.run(pictures.arms(), "shapes:heldout", out, n)
    found = {arm: [taste.read(Image.open(out / row["file"])) for row in rows if row["arm"] == arm] for arm in ARMS}
    return {arm: np.array(values) for arm, values in found.items()}


def line(name: str, found: dict[str, np.ndarray]) -> str:
    """Against the base model: the mean, and how often it is more; pictures without shapes are left out."""
    seen = ~(np.isnan(found["base"]) | np.isnan(found["tuned"]))
    base, tuned, prompts = found["base"][seen], found["tuned"][seen], np.arange(seen.sum())
    difference, more = statistics.mean_difference(base, tuned, prompts), statistics.win_rate(base, tuned, prompts)
    change = f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"
    return tables.row([name, f"{base.mean():.2f}", f"{tuned.mean():.2f}", change, percent(more), seen.sum()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--taste", choices=TASTES, default="light")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-users"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--lr", type=float, default=1e-4, help="learning rate; the recipe's 5e-4 diverges with the taste light"
    )
    parser.add_argument("--n", type=int, default=128, help="held-out prompts")
    args = parser.parse_args()
    folder, taste = args.out.resolve() / args.taste, TASTES[args.taste]
    if not (folder / "data" / f"{taste.names[1]}.parquet").exists():
        make_data(folder / "data", taste)
    lines = []
    for seed in args.seeds:
        for method in ("ppd", "diffusion_dpo"):
            started = time.perf_counter()
            output = run(method, seed, args.lr, folder)
            print(f"{method}, seed {seed}: accuracy {accuracy(output)}, {time.perf_counter() - started:.0f} s")
            for name in taste.names if method == "ppd" else (None,):
                found = measure(output, folder / "data" / f"{name}.parquet" if name else None, args.n, taste)
                lines.append(line(f"{method}, seed {seed}" + (f", for one who likes {name}" if name else ""), found))
                print(lines[-1], flush=True)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
