"""The votes of people as a scorer: `votes=FOLDER` of `diffpo annotate`.

A picture's number is the share of comparisons that it won against the other pictures of its prompt, ties half. So of
two arms the one that most people preferred is higher. Pictures are known by their pixels and prompt, wherever they lie.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image

from ..annotate.store import Store, counted
from ..annotate.tally import summed, tallies
from ..annotate.tasks import Tasks
from ..common.errors import DiffpoError
from ..common.images import BadRow, decode
from ..common.text import plain, whole


class Votes:
    """``votes``: 0 to 1, and NaN for a picture on which nobody voted. Skips and repetitions do not count, and a vote
    that all are bad counts as a tie. ``state`` differs where the votes do."""

    names = ("votes",)
    optional = frozenset(names)
    reads_prompt = True

    def __init__(self, folder: Path) -> None:
        tasks = Tasks.load(folder)
        store = Store(folder, readonly=True)
        events = list(store.events())
        store.close()
        self.state = f" {len(events)}"  # events are only ever added
        won: dict[str, list[float]] = {}
        best_only = tasks.show == "sets" and tasks.ask == "best"
        for tally in tallies(tasks, counted(events)):
            wins = summed(tally, best_only)
            try:
                names = [_name(decode(tasks.content(each)), whole(tally.task.prompt)) for each in tally.task.pictures]
            except BadRow as problem:
                raise DiffpoError(
                    f"{folder}: a picture of {plain(tally.task.prompt, 100)!r} that has votes cannot be read: {problem}"
                ) from None
            for k, name in enumerate(names):
                total = won.setdefault(name, [0.0, 0.0])
                total[0] += float(wins[k].sum())
                total[1] += float(wins[k].sum() + wins[:, k].sum())
        if not won:
            raise DiffpoError(f"{folder} holds no vote that decides: open its page with `diffpo annotate` and vote")
        self.shares = {name: wins / all_of_them for name, (wins, all_of_them) in won.items() if all_of_them}

    @classmethod
    def load(cls, source: str | None, device: str) -> Votes:
        if source is None:
            raise DiffpoError("the scorer votes needs the folder of `diffpo annotate`: write votes=FOLDER")
        return cls(Path(source).expanduser())

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        found = [self.shares.get(_name(image, prompt)) for image, prompt in zip(images, prompts, strict=True)]
        return {"votes": np.array([np.nan if share is None else share for share in found], np.float64)}


def _name(image: Image.Image, prompt: str) -> str:
    rgb = image.convert("RGB")
    about = f"{rgb.size} {prompt.strip()}\0".encode(errors="replace")
    return blake2b(about + rgb.tobytes(), digest_size=16).hexdigest()
