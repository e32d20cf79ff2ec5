"""The command line: verbs only. Each verb imports what it needs when it is called: `diffpo --help` stays instant."""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

from .common.errors import DiffpoError
from .common.text import plain
from .common.threads import set_waiting

INTERRUPTED = "\ninterrupted; the same command goes on from what is finished"

try:
    import typer
except KeyboardInterrupt:
    print(INTERRUPTED, file=sys.stderr)
    sys.exit(130)

set_waiting()
app = typer.Typer(
    help="Align image diffusion models with preferences.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; configs/ holds recipes.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Settings that replace the file's, e.g. train.lr=1e-5.")
]


@app.command()
def train(config: Config, overrides: Overrides = None) -> None:
    """Train a preference LoRA; run the same command again to resume."""
    from .config import load_config

    settings = load_config(config, overrides or [])  # a typing error is reported before the slow imports

    from .train.loop import train

    train(settings)


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    picture: Annotated[
        Path | None, typer.Option(help="Where to draw some of the data as trained on; OUTPUT-data.png by default.")
    ] = None,
) -> None:
    """Dry run: what the config says, what the data holds, what training would need."""
    from .commands.check import check
    from .config import load_config

    check(load_config(config, overrides or []), picture)


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
    out: Annotated[Path | None, typer.Option(help="Where to write; the folder of rollout.labels by default.")] = None,
) -> None:
    """Sample pictures for people to compare; train with objective.rollout.labels=OUT/labels.jsonl afterwards."""
    from .config import load_config

    settings = load_config(config, overrides or [])

    from .commands.collect import collect

    labels = collect(settings, out)
    print(f"the pictures are in {labels.parent / 'images'}; fill in label_0 in {labels}: 1, 0, 0.5 (a tie) or null")


MODEL = typer.Option(help="A pipeline folder, a hub id, or one .safetensors file.")
ModelConfig = Annotated[
    str | None,
    typer.Option(
        help="Whose configs a MODEL of one file has: a folder, a hub id, sd1, sd2, sd2-v, sdxl or sdxl-v. By default "
        "what the file tells."
    ),
]
Lora = Annotated[str | None, typer.Option(help="A LoRA file, or the folder of a training run.")]
UserPairs = Annotated[
    str | None,
    typer.Option(help="Whom to paint for, if the LoRA knows users: his pairs, as for data.train; the first 4 count."),
]
PROMPTS = typer.Option(
    help="A text file (one per line); .json, .jsonl, .csv, .tsv or .parquet with a column prompt, caption or text, or "
    "FILE:COLUMN; or shapes:heldout[:N]."
)
Out = Annotated[Path, typer.Option(help="Where to write; the same command again continues.")]
Count = Annotated[int | None, typer.Option("--n", min=1, help="Only the first N prompts.")]
Seed = Annotated[int, typer.Option(help="First seed of every prompt.")]
PerPrompt = Annotated[int, typer.Option(min=1, help="Images (seeds) per prompt.")]
Steps = Annotated[int, typer.Option(min=1, help="Model calls per image.")]
Solver = Annotated[str, typer.Option(help="A solver of the package samplers.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale.")]
Negative = Annotated[str | None, typer.Option(help="Negative prompt.")]
Side = Annotated[int | None, typer.Option(min=8, help="Pixels; the model's own size by default.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time; does not change them.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of the model.")]
Device = Annotated[str | None, typer.Option(help="cuda, cpu, ...; CUDA where there is one by default.")]


@app.command()
def generate(
    model: Annotated[str, MODEL],
    prompts: Annotated[str, PROMPTS],
    out: Out,
    model_config: ModelConfig = None,
    lora: Lora = None,
    user_pairs: UserPairs = None,
    n: Count = None,
    seed: Seed = 0,
    images_per_prompt: PerPrompt = 1,
    steps: Steps = 20,
    solver: Solver = "dpmpp",
    guidance: Guidance = 5.0,
    negative_prompt: Negative = None,
    height: Side = None,
    width: Side = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "float32",
    device: Device = None,
) -> None:
    """Make images with the base model and, with --lora, the tuned one: same prompts, same noise."""
    options = dict(locals())
    from .evaluate.generate import run

    rows = run(**options)
    print(f"{len(rows)} images in {out / 'images'}, described by {out / 'manifest.jsonl'}")


@app.command("eval")
def evaluate(
    out: Out,
    model: Annotated[str | None, MODEL] = None,
    model_config: ModelConfig = None,
    lora: Lora = None,
    user_pairs: UserPairs = None,
    prompts: Annotated[str | None, PROMPTS] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Compare these instead of making them: a folder with images/base and images/tuned."),
    ] = None,
    scorers: Annotated[
        list[str] | None,
        typer.Option(
            help="shapes (the default), pickscore, hps, clip or aesthetic; NAME=SOURCE for local weights; "
            "http://HOST:PORT for one of serve-scorer. Repeatable."
        ),
    ] = None,
    train_scorer: Annotated[
        str | None, typer.Option(help="The score that labelled the training pairs, such as shapes.total.")
    ] = None,
    run_folder: Annotated[
        Path | None, typer.Option("--run", help="Training run whose curves to show; the LoRA's folder by default.")
    ] = None,
    n: Count = None,
    seed: Seed = 0,
    images_per_prompt: PerPrompt = 1,
    steps: Steps = 20,
    solver: Solver = "dpmpp",
    guidance: Guidance = 5.0,
    negative_prompt: Negative = None,
    height: Side = None,
    width: Side = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "float32",
    device: Device = None,
) -> None:
    """Compare base and tuned images: a table with intervals, a before/after picture and an HTML report."""
    options = dict(locals())
    options["scorer_names"] = options.pop("scorers") or ["shapes"]
    from .evaluate.evaluate import run

    run(**options)


@app.command()
def export(
    lora: Annotated[str, typer.Option(help="A LoRA file, or the folder of a training run or checkpoint.")],
    to: Annotated[
        Literal["diffusers", "kohya", "merged", "single"],
        typer.Option(
            help="kohya: a LoRA for ComfyUI, A1111 and Forge; merged: a pipeline with the LoRA in it; single: the same "
            "as one file, for these programs."
        ),
    ],
    model: Annotated[str, MODEL],
    out: Annotated[Path, typer.Option(help="A new folder, for the export and its model card.")],
    model_config: ModelConfig = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Precision; as it is stored by default.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Strength of the LoRA that is merged (single too).")] = 1.0,
    results: Annotated[Path | None, typer.Option(help="A folder of eval, whose numbers the card is to show.")] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload the folder to the hub; a new repository is private."),
    ] = None,
) -> None:
    """Write the LoRA as other programs read it, with a model card."""
    options = dict(locals())
    from .export.export import run

    run(**options)


@app.command("serve-scorer")
def serve_scorer(
    scorer: Annotated[str, typer.Argument(metavar="SCORER", help="As for eval, e.g. pickscore or hps=FILE.")],
    host: Annotated[str, typer.Option(help="Where to listen; by default this machine alone can reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    max_images: Annotated[int, typer.Option(min=1, help="Images scored at a time; clients split larger batches.")] = 32,
    max_bytes: Annotated[int, typer.Option(min=1, help="Size of a request.")] = 2**26,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of an image.")] = 2**23,
    device: Device = None,
) -> None:
    """Answer for a scorer over HTTP: eval and training name it http://HOST:PORT."""
    from . import scorers
    from .scorers.server import Limits, serve

    loaded = scorers.load(scorer, device or scorers.default_device(scorer))
    serve(loaded, host, port, Limits(max_images, max_bytes, max_pixels))


@app.command()
def quickstart(
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write; the same command again continues.", show_default="runs/quickstart[-dit]"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Training seed.")] = 0,
    n: Annotated[int, typer.Option("--n", min=2, help="Held-out prompts to measure on.")] = 512,
    dit: Annotated[bool, typer.Option("--dit", help="On the embedded DiT (flow matching), not the SDXL.")] = False,
) -> None:
    """The main job on the embedded model, in minutes on a CPU: check, train, eval, report."""
    from .commands.quickstart import run

    model = "tiny-dit" if dit else "tiny-sdxl"
    run(out or Path("runs/quickstart-dit" if dit else "runs/quickstart"), seed, n, model=model)


def main() -> None:
    """Entry point. A DiffpoError is printed as one message; its exit status is 2 (130 after an interruption)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # prompts and names are shown in any encoding of the terminal or log
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
    if getattr(error, "exit_code", None) == 130:  # the run says where it stopped
        return f"{rank}{error}", 130
    # typer exits without a word, and a library that is being imported makes another error of Ctrl-C
    finished = isinstance(error, SystemExit) and not error.code
    if isinstance(error, KeyboardInterrupt) or getattr(error, "code", None) == 130 or (interrupted and not finished):
        return INTERRUPTED, 130
    if isinstance(error, DiffpoError):
        text = "\n".join(plain(line, 10_000) for line in str(error).split("\n"))
        return f"{rank}error: {text}", 2
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not even be imported
        return (
            f"error: the accelerator's memory is full ({str(error).split('. ')[0]}). Lower train.batch_size and raise "
            "train.accumulation, set train.gradient_checkpointing=true and train.precision=bf16; or lower --batch-size"
        ), 2
    return None


if __name__ == "__main__":
    main()
