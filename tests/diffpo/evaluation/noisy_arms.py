"""Two arms of known quality: noisy scenes against the same scenes without noise."""

from PIL import Image

from diffpo import shapes
from diffpo.evaluation import evaluate, scoring

_RELATION = [c for c in shapes.heldout_captions() if shapes.parse(c).relation]
_EQUAL = [c for c in shapes.heldout_captions() if not shapes.parse(c).relation]
CAPTIONS = [*_RELATION[:8], *_EQUAL[:4]]


def save_arm(folder, arm, pictures, seed=0):
    target = folder / "images" / arm
    target.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(target / f"{index:05d}_{seed}.png")


def compare(folder, n=None, run_folder=None, **how):
    how = scoring.Scoring(**how)
    return evaluate.run(folder / "eval", folder, folder / "prompts.txt", n, how, run_folder)
