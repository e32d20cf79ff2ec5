"""The command line: verbs only. Each verb imports what it needs when it is called: `diffpo --help` stays instant."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

from .common.errors import DiffpoError
from .common.postponed import postpone
from .common.text import plain
from .common.threads import keep_freed_memory, set_waiting
from .evaluation.generation import Generation

INTERRUPTED = "\ninterrupted; run the same command again to continue from what is finished"

try:
    import typer

    from .commands import annotate_verbs, labels, measures, products, recipes
    from .commands import options as given
except KeyboardInterrupt:
    print(INTERRUPTED, file=sys.stderr)
    sys.exit(130)

set_waiting()
keep_freed_memory()
postpone()
app = typer.Typer(
    help="Align image diffusion models with preferences.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="A YAML file; `diffpo recipes` lists some to start from.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[a.b=c]...", help="Settings that replace those in CONFIG, e.g. train.lr=1e-5."),
]


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train a preference LoRA; run the same command again to resume."""
    from .config import load_config

    settings = load_config(config, overrides or [])  # typing errors are reported before the slow imports

    from .train.loop import train

    train(settings)


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Where to write a picture of some training data; OUTPUT-data.png by default."),
    ] = None,
    vram: Annotated[
        float | None,
        typer.Option(min=1, metavar="GIB", help="Memory of a GPU: also recommend settings that should fit into it."),
    ] = None,
) -> None:
    """Dry run: show the config, a summary of the data and the memory that training needs."""
    from .commands.check import check
    from .config import load_config

    check(load_config(config, overrides or []), picture, vram)


@app.command("train-scorer")
def train_scorer(config: Config, overrides: Overrides = None) -> None:
    """Train a step-aware scorer from pairs, for SPO and LPO; run the same command again to resume."""
    from .config import ScorerConfig, load_config

    settings = load_config(config, overrides or [], ScorerConfig)

    from .train.step_scorer import train_scorer

    train_scorer(settings)


@app.command()
def collect(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Output folder; by default the folder of rollout.labels.")] = None,
    lora: Annotated[
        str | None, typer.Option(help="Sample with this LoRA, a file or the folder of a run; same as lora.start.")
    ] = None,
) -> None:
    """Sample pictures for people to compare. Then train with objective.rollout.labels=OUT/labels.jsonl, and from the
    same LoRA."""
    from .config import load_config

    start = [] if lora is None else [f"lora.start={json.dumps(lora)}"]
    settings = load_config(config, [*(overrides or []), *start])

    from .commands.collect import collect

    labels = collect(settings, out)
    print(f"the pictures are in {labels.parent / 'images'}")
    print(f"fill in label_0 in {labels}: 1 if image_0 is better, 0 if image_1 is, 0.5 for a tie, null if not judged")


@app.command()
@given.makes_pictures
def generate(
    model: Annotated[str, given.MODEL],
    prompts: Annotated[str, given.PROMPTS],
    out: given.Out,
    source: given.Source = None,
    n: given.Count = None,
    **making: Any,
) -> None:
    """Make images with the base model and, with --lora, the tuned one: same prompts, same noise."""
    pictures = Generation(model=model, **making)
    from .evaluation.generate import run

    rows = run(pictures.arms(), given.read_prompts(prompts, source), out, n)
    print(f"{len(rows)} images in {out / 'images'}, described by {out / 'manifest.jsonl'}")


@app.command("eval")
@given.makes_pictures
def evaluate(
    out: given.Out,
    model: Annotated[str | None, given.MODEL] = None,
    prompts: Annotated[str | None, given.PROMPTS] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WHAT",
            help="What to compare, repeatable; the first is compared with. WHAT is base, a LoRA[@WEIGHT], a run, a "
            "folder of pictures, a plan, another model, or key=value,... of the options below. By default base and "
            "--lora.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="A folder with images/ARM/... to compare, instead of making images."),
    ] = None,
    scorers: Annotated[list[str] | None, typer.Option(help=given.SCORERS_HELP, show_default="shapes")] = None,
    train_scorer: Annotated[
        str | None, typer.Option(help="The score that the training pairs were labelled by, such as shapes.total.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="What diversity is measured in: dinov2, clip, lpips=FILE, shapes or module:Class.",
            show_default="pixels",
        ),
    ] = None,
    run_folder: Annotated[
        Path | None,
        typer.Option("--run", help="Folder of the training run whose curves to show; by default that of the LoRA."),
    ] = None,
    source: given.Source = None,
    n: given.Count = None,
    **making: Any,
) -> None:
    """Compare images of two or more arms: a table with intervals, one picture, an HTML report and one sentence."""
    from .common import processes
    from .evaluation import arms, table
    from .evaluation.evaluate import Scoring, run, training_run

    making["model"] = model or ""  # no model is refused with the reason
    pictures = arms.read_arms(arm, making) if arm else images or Generation(**making)
    scoring = Scoring(tuple(scorers or Scoring.scorers), train_scorer, features, making["device"])
    found = run(
        out, pictures, given.read_prompts(prompts, source), n, scoring, training_run(run_folder, making["lora"])
    )
    if processes.here().main:
        table.show(found)


measures.add_to(app)
labels.add_to(app)
annotate_verbs.add_to(app)
products.add_to(app)
recipes.add_to(app)


@app.command()
def score(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=given.SOURCE_HELP)],
    out: given.Out,
    scorers: Annotated[list[str] | None, typer.Option(help=given.SCORERS_HELP)] = None,
    image: Annotated[
        list[str] | None, typer.Option(help="Column with pictures; by default all with a usual name. Repeatable.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Column with prompts, if it has no usual name.")] = None,
    split: Annotated[str, typer.Option(help="The split, where the source has several.")] = "train",
    before: Annotated[
        str | None,
        typer.Option("--source", metavar="COLUMN", help="Of a table: column of what the pictures are edits of."),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="Use only the first N pictures or rows.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at a time; it does not change the numbers.")] = 16,
    device: given.Device = None,
) -> None:
    """Score pictures from anywhere: a folder, parquet or text tables, webdataset shards, a data set of the hub."""
    from .commands.score import ScoreRun, run
    from .commands.score_results import report
    from .scorers.pictures import Where

    where = Where(tuple(image or ()), prompt, split, n, before)
    found = run(ScoreRun(source, out, tuple(scorers or ()), where, batch_size, device))
    if found.rows:  # only the first of several processes has the table
        report(found)


@app.command("serve-scorer")
def serve_scorer(
    scorer: Annotated[str, typer.Argument(metavar="SCORER", help="As for eval --scorers, e.g. pickscore or hps=FILE.")],
    host: Annotated[str, typer.Option(help="Address to listen on; by default only this machine can connect.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 8000,
    max_images: Annotated[
        int, typer.Option(min=1, help="Most images in a request; clients split larger batches.")
    ] = 32,
    max_bytes: Annotated[int, typer.Option(min=1, help="Largest size of a request in bytes.")] = 2**26,
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels in one image.")] = 2**23,
    device: given.Device = None,
) -> None:
    """Serve a scorer over HTTP; pass http://HOST:PORT as the scorer to eval or training."""
    from . import scorers
    from .scorers.server import Limits, serve

    loaded = scorers.load(scorer, device or scorers.default_device(scorer))
    serve(loaded, host, port, Limits(max_images, max_bytes, max_pixels))


@app.command()
def quickstart(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output folder; run the same command again to continue.", show_default="runs/quickstart[-dit][-human]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Training seed.")] = 0,
    n: Annotated[int, typer.Option("--n", min=2, help="Number of held-out prompts to evaluate on.")] = 512,
    dit: Annotated[bool, typer.Option("--dit", help="Use the embedded DiT (flow matching) instead.")] = False,
    human: Annotated[
        bool, typer.Option("--human", help="Vote yourself on pairs of the model's pictures, in a browser, first.")
    ] = False,
    votes: Annotated[int, typer.Option(min=2, help="With --human: how many pairs.")] = 100,
) -> None:
    """Align the embedded model in minutes on a CPU: check, train, evaluate, report."""
    from .commands.quickstart import run

    name = "quickstart" + "-dit" * dit + "-human" * human
    run(out or Path("runs") / name, seed, n, model="tiny-dit" if dit else "tiny-sdxl", votes=votes if human else 0)


def main() -> None:
    """Entry point. A DiffpoError is printed as one message; its exit status is 2 (130 after an interruption)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # any prompt or name can be printed, whatever the encoding
            stream.reconfigure(errors="backslashreplace")
    pressed: list[int] = []

    def interrupt(number: int, _frame: object) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    before = None
    with contextlib.suppress(ValueError):  # signals belong to the main thread
        before = signal.signal(signal.SIGINT, interrupt)
    try:
        app()
    except BaseException as error:
        if message := _last_words(error, bool(pressed)):
            print(message[0], file=sys.stderr)
            sys.exit(message[1])
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def _last_words(error: BaseException, interrupted: bool) -> tuple[str, int] | None:
    """What to print, and the exit status; None if it is to be raised as it is."""
    rank = f"[process {os.environ.get('RANK')}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    if getattr(error, "exit_code", None) == 130:  # its text names the step where it stopped
        return f"{rank}{error}", 130
    # typer's exits have no message; Ctrl-C during an import may surface as another error
    finished = isinstance(error, SystemExit) and not error.code
    if isinstance(error, KeyboardInterrupt) or getattr(error, "code", None) == 130 or (interrupted and not finished):
        return INTERRUPTED, 130
    if isinstance(error, DiffpoError):
        text = "\n".join(plain(line, 10_000) for line in str(error).split("\n"))
        return f"{rank}error: {text}", 2
    if type(error).__name__ == "OutOfMemoryError":  # torch's class; torch may not be imported
        return (
            f"error: the accelerator's memory is full ({str(error).split('. ')[0]}). Lower train.batch_size and raise "
            "train.accumulation, set train.gradient_checkpointing=true and train.precision=bf16; or lower --batch-size"
        ), 2
    return None


if __name__ == "__main__":
    main()
