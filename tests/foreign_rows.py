"""For tests of data from others: rows of a folder, and what is wrong with them."""

import json

from test_formats import save

from diffpo.config import Data
from diffpo.data.groups import scan

OUTSIDE = "outside the data's folder"


def write_rows(folder, *rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(chosen, rejected="1.png", prompt="x"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def fault(source, **options):
    """The message of the only bad row."""
    groups = scan(Data(resolution=16, **options), str(source), "train")
    ((_, problem),) = groups.bad
    return str(problem)


def siblings(folder, captions=("cat 0", "cat 1")):
    for number, caption in enumerate(captions):
        save(folder / "chosen" / f"{number}.png", 2 * number)
        save(folder / "rejected" / f"{number}.png", 2 * number + 1)
        (folder / "chosen" / f"{number}.txt").write_text(caption)
    return folder
