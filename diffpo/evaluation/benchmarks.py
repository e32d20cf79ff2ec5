"""Pictures in the folder layouts of GenEval, DPG-Bench, T2I-CompBench++ and GenAI-Bench, for their official scorers.

OUT/images, manifest.jsonl    the pictures, as `diffpo generate` makes them; an interrupted run continues
OUT/<benchmark>/<arm>/...     the same pictures in the benchmark's layout, as hard links where that is possible

The layouts are those of the official repositories as of autumn 2026 (docs/benchmarks.md).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..common.errors import DiffpoError
from ..common.files import beside, write_atomic, writing
from ..common.text import plain
from ..data import prompt_sets
from ..data.prompt_sets import Entry
from . import generate
from .generation import Generation
from .manifest import json_bytes, open_image


@dataclass(frozen=True)
class Layout:
    """Of a benchmark: ``images`` for each prompt; ``names``: the paths of its files for all prompts and a number of
    images, or why they cannot be named; ``command`` of the official scorer for a folder and the size of a picture."""

    images: int
    names: Callable[[Sequence[Entry], int], dict[str, tuple[int, ...]]]
    command: Callable[[Path, int], str]


def _geneval(entries: Sequence[Entry], images: int) -> dict[str, tuple[int, ...]]:
    for entry in entries:
        if "tag" not in entry.record:
            raise DiffpoError(
                f"GenEval's scorer needs the tag and the objects of each prompt, and {plain(entry.prompt, 100)!r} has "
                "none: give geneval's evaluation_metadata.jsonl with --prompts"
            )
    return {f"{number:05d}/samples/{k:04d}.png": (number, k) for number in range(len(entries)) for k in range(images)}


def _dpg(entries: Sequence[Entry], images: int) -> dict[str, tuple[int, ...]]:
    if images != 4:
        raise DiffpoError(f"DPG-Bench takes 4 pictures of a prompt in one file; leave out --images-per-prompt={images}")
    return {f"{_file_name(entry.id)}.png": (number, 0, 1, 2, 3) for number, entry in enumerate(entries)}


def _compbench(entries: Sequence[Entry], images: int) -> dict[str, tuple[int, ...]]:
    counts: dict[str, int] = {}
    found: dict[str, tuple[int, ...]] = {}
    for number, entry in enumerate(entries):
        folder = f"{entry.category}/samples" if entry.category else "samples"
        if "_" in entry.prompt:
            raise DiffpoError(
                f"T2I-CompBench reads the prompt from the file's name up to the first '_', so it cannot have "
                f"{plain(entry.prompt, 200)!r}"
            )
        for k in range(images):
            count = counts[folder] = counts.get(folder, -1) + 1
            found[f"{folder}/{_file_name(f'{entry.prompt}_{count:06d}')}.png"] = (number, k)
    return found


def _genai(entries: Sequence[Entry], images: int) -> dict[str, tuple[int, ...]]:
    if images != 1:
        raise DiffpoError(f"GenAI-Bench takes one picture of a prompt; leave out --images-per-prompt={images}")
    return {f"{_file_name(entry.id)}.jpeg": (number, 0) for number, entry in enumerate(entries)}


def _file_name(text: str) -> str:
    """``text``, which becomes a file's name. DiffpoError if it cannot."""
    if "/" in text or "\0" in text or text.startswith(".") or len(text.encode()) > 240:
        raise DiffpoError(f"the benchmark names a file after {plain(text, 200)!r}, which cannot be the name of a file")
    return text


LAYOUTS = {
    "geneval": Layout(
        4,
        _geneval,
        lambda folder, side: (
            f'python evaluation/evaluate_images.py "{folder}" --outfile "{folder}-results.jsonl" '
            '--model-path "<OBJECT_DETECTOR_FOLDER>"  # in a clone of djghosh13/geneval'
        ),
    ),
    "dpg": Layout(
        4,
        _dpg,
        lambda folder, side: f'bash dpg_bench/dist_eval.sh "{folder}" {side}  # in a clone of TencentQQGYLab/ELLA',
    ),
    "t2i-compbench": Layout(
        10,
        _compbench,
        lambda folder, side: (
            f'python BLIP_vqa.py --out_dir="{folder}/color/"  # in BLIPvqa_eval of a clone of '
            "Karine-Huang/T2I-CompBench; its README names the scorer of each category"
        ),
    ),
    "genai-bench": Layout(
        1,
        _genai,
        lambda folder, side: (
            f'python genai_bench/evaluate.py --model clip-flant5-xxl --output_dir "{folder.parent}" '
            f'--gen_model "{folder.name}"  # in a clone of linzhiqiu/t2v_metrics'
        ),
    ),
}


def make(
    name: str, pictures: Generation, out: str | Path, prompts: str | None = None, n: int | None = None
) -> list[str]:
    """Make the pictures of the benchmark ``name`` in ``LAYOUTS`` and lay them out. Returns lines to print: where they
    are, and the command of the official scorer.

    ``prompts``: a local copy of the benchmark's prompts; None downloads them. The first ``n`` count. DiffpoError if a
    file cannot have the benchmark's name, before any picture is made; else as for `generate.run`.
    """
    out, layout = Path(out).absolute(), LAYOUTS[name]
    entries = prompt_sets.entries(name if prompts is None else f"{name}={prompts}")[:n]
    names = layout.names(entries, pictures.images_per_prompt)
    arms = pictures.arms()
    rows = generate.run(arms, [entry.prompt for entry in entries], out)
    lines = []
    for arm in arms:
        files = {(row["index"], row["seed"] - pictures.seed): out / row["file"] for row in rows if row["arm"] == arm}
        folder = out / name / arm
        with writing(f"the layout of {name} in {folder}"):
            side = lay_out(entries, names, files, folder)
        lines.append(f"{arm}: {len(names)} files in {folder}")
        lines.append(f"score them with: {layout.command(folder, side)}")
    return lines


def lay_out(
    entries: Sequence[Entry],
    names: Mapping[str, tuple[int, ...]],
    files: Mapping[tuple[int, int], Path],
    folder: Path,
) -> int:
    """Write ``names`` {path: (prompt's number, numbers of its pictures)} into ``folder``, from ``files`` {(prompt's
    number, picture's number): path}. What is there already is kept. Returns the width of a picture."""
    side = 0
    for name, (number, *which) in names.items():
        target, sources = folder / name, [files[number, k] for k in which]
        side = side or open_image(sources[0]).width
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".png" and len(sources) == 1:
            _link(sources[0], target)
        elif not _newer(target, sources):
            write_atomic(target, _joined([open_image(source) for source in sources], target))
        if target.parent.name == "samples" and entries[number].record.get("tag"):
            _metadata(target.parents[1] / "metadata.jsonl", entries[number].record)
    return side


def _metadata(path: Path, record: dict[str, Any]) -> None:
    content = json_bytes(record) + b"\n"
    if not path.is_file() or path.read_bytes() != content:
        write_atomic(path, content)


def _newer(target: Path, sources: Sequence[Path]) -> bool:
    return target.is_file() and all(target.stat().st_mtime_ns >= source.stat().st_mtime_ns for source in sources)


def _joined(images: Sequence[Image.Image], target: Path) -> bytes:
    """One picture as JPEG, with Pillow's default quality as in GenAI-Bench's program; or four as a PNG, two by two."""
    buffer = BytesIO()
    if target.suffix == ".jpeg":
        images[0].save(buffer, "JPEG")
        return buffer.getvalue()
    side = images[0].width
    if any(image.size != (side, side) for image in images):
        raise DiffpoError(f"DPG-Bench cuts its grid into squares, and the pictures of {target.name} are not square")
    grid = Image.new("RGB", (2 * side, 2 * side))
    for k, image in enumerate(images):
        grid.paste(image, (k % 2 * side, k // 2 * side))
    grid.save(buffer, "PNG")
    return buffer.getvalue()


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the disk has none."""
    if target.is_file() and (os.path.samefile(source, target) or _newer(target, [source])):
        return
    part = beside(target)
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
    os.replace(part, target)
