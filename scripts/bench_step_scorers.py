"""Does a scorer that gets the time judge noisy steps better than one without it? Held-out accuracy by time.

python scripts/bench_step_scorers.py [--out runs/bench-step-scorers] [--captions 0] [--seeds 0]

Trains, with `diffpo train-scorer`, the pixel scorer three times: on finished pictures alone (time-blind, as PickScore
is), and from that one on noisy ones, without the time and step-aware; and the latent scorer. All are measured on the
validation pairs of assets/shapes-preferences. With --captions N they learn from more pairs than the repository ships:
eight fresh samples of the base model for each of N other training captions, judged by the oracle, all pairs of
different score.
"""

import argparse
import sys
from pathlib import Path

from diffpo.common.carried import HOME as ROOT
from diffpo.config import ScorerConfig, load_config
from diffpo.train.step_scorer import train_scorer

KINDS = {  # name -> recipe and overrides
    "blind": ("train_scorer_pixel", ["scorer.times=clean"]),
    "timeless": ("train_scorer_pixel", ["scorer.time_aware=false"]),
    "aware": ("train_scorer_pixel", []),
    "latent": ("train_scorer_latent", []),
}
SHIPPED = 780  # training captions that the shipped pairs, validation included, were drawn for
SAMPLES = 8


def more_pairs(file: Path, captions: int) -> None:
    """Ranked lists of fresh samples for ``captions`` training captions that the shipped pairs do not have."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from diffusers import StableDiffusionXLPipeline
    from tiny_models.card import generate
    from tiny_models.common import SEED
    from tiny_models.pairs import lossless

    from diffpo.shapes import score, train_captions

    pipe = StableDiffusionXLPipeline.from_pretrained(ROOT / "assets" / "tiny-sdxl")
    own = train_captions(SHIPPED + captions, seed=SEED)[SHIPPED:]
    prompts = [caption for caption in own for _ in range(SAMPLES)]
    images = generate(pipe, prompts, [SEED * 30_000 + i for i in range(len(prompts))], 10)
    rows = []
    for i, caption in enumerate(own):
        mine = images[i * SAMPLES : (i + 1) * SAMPLES]
        scores = [round(score(image, caption)["total"], 4) for image in mine]
        rows.append({"prompt": caption, "images": [lossless(image) for image in mine], "scores": scores})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-step-scorers"))
    parser.add_argument("--captions", type=int, default=0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--set", nargs="+", default=[], help="settings for all, e.g. train.steps=1000")
    args = parser.parse_args()
    common = list(args.set)
    if args.captions:
        file = args.out / f"lists-{args.captions}.parquet"
        if not file.exists():
            more_pairs(file, args.captions)
        common.append(f"data.train={file}")
    for seed in args.seeds:
        blind = args.out / f"blind-{seed}"
        for name in args.only:
            recipe, own = KINDS[name]
            output = args.out / f"{name}-{seed}"
            if (output / "accuracy.md").exists():
                continue
            if name != "blind" and blind.exists():
                own = [*own, f"scorer.compare=[{blind}]"]
                own += [] if name == "latent" else [f"scorer.clip={blind}"]  # as the paper starts from PickScore
            settings = [*own, *common, f"train.seed={seed}", f"output={output}"]
            print(f"\n## {name}, seed {seed}", flush=True)
            train_scorer(load_config(ROOT / "configs" / f"{recipe}.yaml", settings, kind=ScorerConfig))


if __name__ == "__main__":
    sys.exit(main())
