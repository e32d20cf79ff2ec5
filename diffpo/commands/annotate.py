"""`diffpo annotate` and `diffpo export-votes`: where the pictures come from, and what the votes say in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..annotate import agreement, rows
from ..annotate.assign import Plan
from ..annotate.store import Store
from ..annotate.tasks import Group, Picture, Show, Tasks, hashed, make
from ..common import lock
from ..common.errors import DiffpoError
from ..common.instruction import Instruction
from ..common.text import plain
from ..data.prompts import load_prompts
from ..evaluation import items, sources
from ..evaluation.generation import Generation
from ..scorers.pictures import holds_rows

if TYPE_CHECKING:
    from ..evaluation.arms import Source

LIVE = 2  # pictures of a prompt, where one model makes them


@dataclass(frozen=True)
class Shown:
    """What people are asked about.

    Attributes:
        source: rows that `diffpo train` reads, a folder of pictures, or one of `diffpo generate` and eval.
        arms: ``NAME=WHAT`` as for `diffpo eval`. making: options of `Generation`, for arms that are made here.
        prompts, n: of arms that are made here, and of pictures without texts.
        split: of rows. show, ask: as `annotate.tasks.Tasks`; None is by the source.
        before: the column of what the pictures are edits of, in rows or in ``prompts``; a folder knows it.
    """

    source: str | None = None
    arms: Sequence[str] = ()
    making: Mapping[str, Any] = field(default_factory=dict)
    prompts: str | None = None
    n: int | None = None
    split: str = "train"
    show: Show | None = None
    ask: Literal["best", "ranking"] = "best"
    before: str | None = None


@dataclass(frozen=True)
class Address:
    """Where the page is served."""

    host: str = "127.0.0.1"
    port: int = 8765
    token: str | None = None


def run(out: Path, shown: Shown, plan: Plan, address: Address) -> None:
    """Serve the page until Ctrl-C; votes are kept in ``out``, and the same command goes on."""
    from ..annotate import app
    from ..annotate.session import Session

    app.needs()
    app.token_for(address.host, address.token)  # a bad one is reported before pictures are made
    with lock.held(out):
        tasks = find(out, shown)
        session = Session(out, tasks, plan)  # refuses a folder of other tasks, whose file must not be replaced
        tasks.save(out)
        for line in tasks.left:
            print(f"left out: {line}")
        progress = session.desk.progress("")
        print(f"{len(tasks.all)} {_noun(tasks)}; {progress['done']} of {progress['wanted']} votes are there")
        app.serve(session, address.host, address.port, address.token)
    print(f"the votes are in {out}: write them with `diffpo export-votes {out} --out FILE.parquet`")


def _noun(tasks: Tasks) -> str:
    return "pairs" if tasks.show == "pairs" else f"sets of pictures ({tasks.ask})"


def find(out: Path, shown: Shown) -> Tasks:
    """The tasks. Pictures of arms that are models are made first, into ``out``. DiffpoError if there are none."""
    source = shown.source
    making = {**shown.making}
    given = making.get("model") or making.get("lora")
    if source is not None and (shown.arms or given):
        raise DiffpoError("name either a source of pictures, or what makes them (--arm, --model), not both")
    if source is None and not shown.arms and not given:
        raise DiffpoError("annotate needs pictures: name a source, or --arm NAME=WHAT, or --model and --prompts")
    if source is not None and not _is_pictures(Path(source).expanduser()):
        found = rows.of_rows(_absolute(source), shown.split, shown.show, quiet=False, before=shown.before)
    else:
        groups, left = _of_pictures(out, shown, making)
        show: Show = shown.show or "pairs"
        tasks, more = make(hashed(groups, quiet=False), show)
        found = Tasks(tasks, show=show, left=left + more)
    found.ask = shown.ask
    if shown.n is not None:
        found.all = found.all[: shown.n] if source is not None else found.all
    if not found.all:
        raise DiffpoError(f"there is nothing to compare: {'; '.join(found.left) or 'no prompt has two pictures'}")
    return found


def _absolute(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


def _is_pictures(path: Path) -> bool:
    return path.is_dir() and not holds_rows(path)


def _of_pictures(out: Path, shown: Shown, making: dict[str, Any]) -> tuple[list[Group], list[str]]:
    """Groups of pictures in files: of arms, or of one folder by prompt."""
    named: dict[str, Source]
    if shown.before is not None and shown.prompts is None:
        raise DiffpoError(
            "--source names a column of rows or of --prompts. A folder of `diffpo generate --source` has the sources "
            "in its manifest.jsonl: leave the option out"
        )
    prompts: Any = shown.prompts
    if shown.before is not None:
        prompts = load_prompts(prompts, pictures=shown.before)
    if shown.source is not None:
        named = _arms_in(Path(shown.source).expanduser())
    else:
        several = len(shown.arms) > 1
        making["images_per_prompt"] = making.get("images_per_prompt") or (1 if several else LIVE)
        making["model"] = making.get("model") or ""
        if shown.arms:
            from ..evaluation import arms

            named = arms.read_arms(shown.arms, making)
        else:
            named = {"tuned" if making.get("lora") else "base": Generation(**making)}
    left: list[str] = []
    texts = items.prompts_of(prompts)
    made = {name: each for name, each in named.items() if isinstance(each, Generation)}
    if made and shown.prompts is None:
        raise DiffpoError("annotate needs --prompts to make the pictures")
    rows_made = _made(made, prompts, out, shown.n) if made else []
    found = {
        name: items.of_folder(each, texts, left)
        if isinstance(each, Path)
        else items.of_rows(out, (row for row in rows_made if row["arm"] == name))
        for name, each in named.items()
    }
    if len(found) > 1:
        compared = items.joined(found, texts, shown.n, left)
        return [
            _group(item.prompt, [_picture(item.pictures[arm], arm) for arm in found if arm in item.pictures], out)
            for item in compared
        ], left
    (arm, pictures), *_ = found.items()
    by_prompt: dict[str, list[Picture]] = {}
    for each in sorted(pictures):
        by_prompt.setdefault(each.prompt, []).append(_picture(each.path, arm))
    alone = sum(len(each) < 2 for each in by_prompt.values())
    if alone:
        left.append(f"{alone} prompts with one picture")
    return [_group(prompt, each, out) for prompt, each in by_prompt.items() if len(each) > 1], left


def _group(prompt: str, pictures: Sequence[Picture], out: Path) -> Group:
    """With what they are edits of; in ``out`` where those are no files yet."""
    if not isinstance(prompt, Instruction):
        return Group(prompt, tuple(pictures))
    files = sources.files(out, prompt)
    if not all(isinstance(each, Path) for each in prompt.encoded):
        sources.write(out, [prompt])
    places = [each if isinstance(each, Path) else file for each, file in zip(prompt.encoded, files, strict=True)]
    return Group(str(prompt), tuple(pictures), None, tuple(_picture(place, "") for place in places))


def _made(made: dict[str, Generation], prompts: Any, out: Path, n: int | None) -> list[dict[str, Any]]:
    """The rows of the pictures that are made for it; those that are there are kept."""
    from ..evaluation import generate  # imports torch

    return generate.run(made, prompts, out, n)


def _arms_in(folder: Path) -> dict[str, Source]:
    if (folder / "manifest.jsonl").is_file() or (folder / "images").is_dir():
        return {**items.in_folder(folder)}
    return {folder.name: folder}


def _picture(path: Path, name: str) -> Picture:
    return Picture("", str(path.absolute()), name)


def summary(folder: Path) -> list[str]:
    """What the votes of a folder say of the annotators, in sentences."""
    votes = Store(folder, readonly=True).votes()
    lines = []
    alpha, kappa = agreement.between(votes)
    if kappa:
        lines.append(f"agreement between annotators: Krippendorff's alpha {alpha:.3f}")
        for (one, other), (value, n) in kappa.items():
            names = f"{plain(one, 60)} and {plain(other, 60)}"
            lines.append(f"  {names}: Cohen's kappa {value:.3f} on {n} tasks")
    for name, (same, n) in agreement.repeated(votes).items():
        lines.append(f"{plain(name, 60)} answered {same} of {n} repeated tasks as before")
    won, n = agreement.first_side(votes)
    if n:
        lines.append(f"the picture that was shown first won {won} of {n} decided pairs ({won / n:.1%})")
    return lines
