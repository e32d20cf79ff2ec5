"""Published sets of prompts by name: where their files are, how they are read, and what is known of each prompt.

The files of a set come from the hub or from GitHub on first use and are kept. ``NAME=PATH`` takes a local copy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import DiffpoError
from ..common.files import write_atomic, writing
from ..common.hub import SILENCE, limit_waiting
from ..common.text import LIMIT, plain, read_text
from . import text_tables
from .bundled_prompts import COMPOSITION, EVERYDAY

CACHE = Path("~/.cache/diffpo/prompts")  # of files from GitHub; huggingface_hub has a cache of its own


@dataclass(frozen=True)
class Entry:
    """A prompt of a set. ``id``: what the benchmark calls it; ``record``: all that the file says of it."""

    prompt: str
    id: str
    category: str | None = None
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """Where a published set is. ``place``: ``hub:OWNER/NAME`` or ``github:OWNER/NAME``. ``prompt``, ``id`` and
    ``category``: the keys or columns of its files; without an id prompts are numbered, and without a category the name
    of the file is it, if there are several files."""

    about: str
    place: str
    files: tuple[str, ...]
    prompt: str | None = None
    id: str | None = None
    category: str | None = None


_HPD, _PICK = "hub:zhwang/HPDv2", "hub:yuvalkirstain/pickapic_v1_no_images"
_COMPBENCH = ("color", "shape", "texture", "spatial", "3d_spatial", "non_spatial", "numeracy", "complex")
SETS = {
    "parti": PromptSet(
        "PartiPrompts (Yu et al. 2022)",
        "hub:nateraw/parti-prompts",
        ("PartiPrompts.tsv",),
        prompt="Prompt",
        category="Category",
    ),
    "hpdv2": PromptSet(
        "the benchmark of HPS v2 (Wu et al. 2023), four styles",
        _HPD,
        tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")),
    ),
    "drawbench": PromptSet("DrawBench (Saharia et al. 2022), as HPS v2 has it", _HPD, ("benchmark/drawbench.json",)),
    "pickapic-unique": PromptSet(
        "Pick-a-Pic v1 (Kirstain et al. 2023), validation_unique",
        _PICK,
        ("data/validation_unique-00000-of-00001-847ed34b90bbafc3.parquet",),
        prompt="caption",
    ),
    "pickapic-test-unique": PromptSet(
        "Pick-a-Pic v1 (Kirstain et al. 2023), test_unique",
        _PICK,
        ("data/test_unique-00000-of-00001-73a51cbb6488571d.parquet",),
        prompt="caption",
    ),
    "geneval": PromptSet(
        "GenEval (Ghosh et al. 2023)",
        "github:djghosh13/geneval",
        ("prompts/evaluation_metadata.jsonl",),
        prompt="prompt",
        category="tag",
    ),
    "dpg": PromptSet(
        "DPG-Bench (Hu et al. 2024, ELLA)",
        "github:TencentQQGYLab/ELLA",
        ("dpg_bench/dpg_bench.csv",),
        prompt="text",
        id="item_id",
    ),
    "t2i-compbench": PromptSet(
        "T2I-CompBench++ (Huang et al. 2023, 2025), the validation prompts of eight categories",
        "github:Karine-Huang/T2I-CompBench",
        tuple(f"examples/dataset/{category}_val.txt" for category in _COMPBENCH),
    ),
    "genai-bench": PromptSet(
        "GenAI-Bench (Li et al. 2024), the 1600 prompts for images",
        "hub:BaiqiL/GenAI-Bench-1600",
        ("genai_image.json",),
        prompt="prompt",
    ),
}
BUNDLED = {"everyday": EVERYDAY, "composition": COMPOSITION}
NAMES = (*BUNDLED, *SETS)


def named(source: str) -> bool:
    """Whether ``source`` is the name of a set, or NAME=PATH."""
    return source.partition("=")[0] in NAMES


def entries(source: str) -> list[Entry]:
    """The prompts of a set, ``NAME`` or ``NAME=PATH`` with the path of its file, or of a folder that has its files.

    DiffpoError if the files cannot be had, with the command that fetches them, or are of another format.
    """
    name, _, path = source.partition("=")
    if name in BUNDLED:
        return [Entry(prompt, f"{number:05d}") for number, prompt in enumerate(BUNDLED[name])]
    wanted = SETS[name]
    paths = _local(name, wanted, Path(path).expanduser()) if path else _fetched(name, wanted)
    try:
        found = [entry for file in paths for entry in _read(wanted, file)]
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or plain(error, 300)
        raise DiffpoError(f"cannot read the prompts of {name} from {paths[0].parent}: {reason}") from None
    if not found:
        raise DiffpoError(f"{paths[0]} has no prompts of {name}")
    if wanted.id:  # the file has a line for each question; the first says what the prompt is
        found = list({entry.id: entry for entry in reversed(found)}.values())[::-1]
    return found


def fetch_file(name: str, file: str) -> Path:
    """Another file of the place of a set on the hub. DiffpoError with the command that fetches it if it cannot be
    had."""
    repository = SETS[name].place.partition(":")[2]
    try:
        return _from_hub(repository, file)
    except Exception as error:  # as in `_fetched`
        command = f"hf download --repo-type dataset {repository} {file}"
        raise DiffpoError(f"cannot fetch {file} of {repository}: {_reason(error)}. Run `{command}`") from None


def fetch_command(name: str) -> str:
    """The command that fetches the files of a set, for a machine with network."""
    wanted = SETS[name]
    kind, _, repository = wanted.place.partition(":")
    if kind == "hub":
        return f"hf download --repo-type dataset {repository} {' '.join(wanted.files)}"
    return f"git clone https://github.com/{repository}"


def _advice(name: str) -> str:
    wanted = SETS[name]
    copy = wanted.files[0] if len(wanted.files) == 1 else str(Path(wanted.files[0]).parent)
    return (
        f"Run `{fetch_command(name)}` where there is a network. A local copy works too: give {name}=PATH, the path of "
        f"its {copy}"
    )


def _local(name: str, wanted: PromptSet, path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DiffpoError(f"{name}={path}: there is no such file or folder. {_advice(name)}")
    found = []
    for file in wanted.files:
        places = [path / file, path / Path(file).name]
        there = next((each for each in places if each.is_file()), None)
        if there is None:
            raise DiffpoError(f"{name}={path}: the folder holds neither {file} nor {Path(file).name}. {_advice(name)}")
        found.append(there)
    return found


def _fetched(name: str, wanted: PromptSet) -> list[Path]:
    kind, _, repository = wanted.place.partition(":")
    try:
        return [(_from_hub if kind == "hub" else _from_github)(repository, file) for file in wanted.files]
    except DiffpoError:
        raise
    except Exception as error:  # the HTTP client and its exceptions depend on the version of huggingface_hub
        what = f"cannot fetch the prompts of {name} from {repository}: {_reason(error)}"
        raise DiffpoError(f"{what}. {_advice(name)}") from None


def _reason(error: Exception) -> str:
    return plain(" ".join(str(error).split()), 200).rstrip(".") or type(error).__name__


def _from_hub(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    limit_waiting()
    return Path(hf_hub_download(repository, file, repo_type="dataset"))


def _from_github(repository: str, file: str) -> Path:
    from urllib.request import urlopen

    from huggingface_hub import constants

    path = CACHE.expanduser() / repository / file
    if not path.is_file():
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        with urlopen(f"https://raw.githubusercontent.com/{repository}/HEAD/{file}", timeout=SILENCE) as answer:
            content = answer.read(LIMIT)
        with writing(path):
            write_atomic(path, content, shared=True)
    return path


def _read(wanted: PromptSet, path: Path) -> Iterator[Entry]:
    """The entries of one file. ValueError if it is not in the set's format."""
    from ..common.images import BadRow

    several = re.sub(r"_val$", "", path.stem) if len(wanted.files) > 1 else None
    for number, record in enumerate(_records(path)):
        if isinstance(record, BadRow):
            raise ValueError(str(record))
        row = record if isinstance(record, dict) else {}
        prompt = row.get(_key(row, wanted, path)) if isinstance(record, dict) else record
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{path.name}, entry {number + 1}: expected a prompt, not {plain(repr(prompt), 100)}")
        own = row.get(wanted.id or "id")
        category = row.get(wanted.category) if wanted.category else several
        yield Entry(prompt.strip(), f"{number:05d}" if own is None else str(own), category, row)


def _key(row: dict[str, Any], wanted: PromptSet, path: Path) -> str:
    keys = [wanted.prompt] if wanted.prompt else ["prompt", "Prompts", "text"]
    found = next((key for key in keys if key in row), None)
    if found is None:
        raise ValueError(f"{path.name} has no {' or '.join(keys)}; it has {plain(', '.join(map(str, row)), 200)}")
    return found


def _records(path: Path) -> Iterator[Any]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            names = [name for name in pq.ParquetFile(path).schema_arrow.names if name in ("caption", "prompt")]
            yield from pq.read_table(path, columns=names).to_pylist()
        except pa.ArrowException as error:
            raise ValueError(str(error)) from None
    elif suffix == ".txt":
        # the official program reads up to the first tab
        lines = [line.split("\t")[0].strip() for line in read_text(path).split("\n")]
        yield from filter(None, lines)
    elif suffix == ".json":
        whole = json.loads(read_text(path))
        if isinstance(whole, dict):  # GenAI-Bench: {"00000": {"prompt": ...}, ...}
            yield from ({"id": key} | value if isinstance(value, dict) else value for key, value in whole.items())
        else:
            yield from whole
    else:
        for _, record in text_tables.records(path.read_bytes(), suffix, path.name):
            yield record


def prompts(source: str) -> Sequence[str]:
    """The texts of `entries`."""
    return [entry.prompt for entry in entries(source)]
