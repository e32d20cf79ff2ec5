"""The verbs of votes: `annotate` and `export-votes`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import PROMPTS, Count, makes_pictures


def add_to(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(makes_pictures(annotate, images_per_prompt=None))
    app.command("export-votes")(export_votes)


def annotate(
    out: Annotated[Path, typer.Option(help="Folder of the votes; run the same command again to continue.")],
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[SOURCE]",
            help="Pairs or lists that train reads, a folder of pictures, or a folder of generate or eval. Without it, "
            "--arm or --model make the pictures.",
        ),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=WHAT", help="What to compare blind, as in eval. Repeatable."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model that makes the pictures first, with --prompts.")] = None,
    prompts: Annotated[str | None, PROMPTS] = None,
    before: Annotated[
        str | None,
        typer.Option(
            "--source", metavar="COLUMN", help="Of rows or of --prompts: column of what the pictures are edits of."
        ),
    ] = None,
    n: Count = None,
    split: Annotated[str, typer.Option(help="The split, where the source has several.")] = "train",
    show: Annotated[
        Literal["pairs", "sets"] | None,
        typer.Option(help="Two pictures, or all of a prompt at once.", show_default="pairs; sets for lists"),
    ] = None,
    ask: Annotated[Literal["best", "ranking"], typer.Option(help="Of a set the best picture, or a ranking.")] = "best",
    annotators_per_task: Annotated[int, typer.Option(min=1, help="People who vote on each task.")] = 1,
    repeat: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the tasks that are asked again, for self-agreement.")
    ] = 0.05,
    assign: Annotated[
        Literal["balanced", "active"],
        typer.Option(help="balanced: the least voted task first. active: the most uncertain one first."),
    ] = "balanced",
    shuffle: Annotated[int, typer.Option(metavar="SEED", help="Seed of sides, order and repetitions.")] = 0,
    host: Annotated[
        str, typer.Option(help="Address to listen on; by default only this machine can connect. Others need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 8765,
    token: Annotated[
        str | None, typer.Option(help="Token that browsers need.", show_default="a new one for another --host")
    ] = None,
    **making: Any,
) -> None:
    """Let people compare pictures on a local web page. Then write the votes with export-votes."""
    from ..annotate.assign import Plan
    from .annotate import Address, Shown, run

    shown = Shown(source, tuple(arm or ()), {"model": model, **making}, prompts, n, split, show, ask, before)
    run(out, shown, Plan(annotators_per_task, repeat, assign, shuffle), Address(host, port, token))


def export_votes(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of annotate.")],
    out: Annotated[Path, typer.Option(help="A .parquet file with the pictures, or a .jsonl file with their names.")],
    rows: Annotated[
        Literal["majority", "share", "each"],
        typer.Option(
            help="majority: a row for each task, with what most say. share: with the share of votes (data.ties=soft). "
            "each: a row for each vote."
        ),
    ] = "majority",
    both_bad: Annotated[
        Literal["drop", "tie"], typer.Option(help="Votes that both pictures are bad: left out, or ties.")
    ] = "drop",
) -> None:
    """Write the votes of annotate as pairs or rankings for training, and how far the annotators agree."""
    from ..annotate.export import Export, run
    from .annotate import summary

    counts = run(folder, out, Export(rows, both_bad))
    said = f"{counts['rows']} rows of {counts['votes']} votes in {out}"
    kinds = {"ties": "ties", "both_bad": "votes that all is bad", "skipped": "skipped"}
    kinds |= {"unclear": "sets without one best picture", "unmarked": "rows whose marks only .parquet keeps"}
    print("; ".join([said, *(f"{counts[key]} {words}" for key, words in kinds.items() if counts[key])]))
    for line in summary(folder):
        print(line)
