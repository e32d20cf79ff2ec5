"""The verbs `label` and `loop`: their options."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import MODEL, PROMPTS, SCORERS_HELP, Count, Out, Source, makes_pictures, read_prompts

# as in labelling/, whose import takes seconds
Form = Literal["pairs", "rankings", "likes"]
Which = Literal["best-worst", "all", "best-random"]
Mode = Literal["captioner", "perturbed", "hybrid"]
Level = Literal["weak", "medium", "strong"]
PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # by --dtype


def add_to(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(makes_pictures(label, images_per_prompt=4))
    app.command()(makes_pictures(loop, images_per_prompt=4))


def label(
    out: Out,
    scorers: Annotated[
        list[str],
        typer.Option(help=f"{SCORERS_HELP} Of a scorer with several numbers, one: shapes.total."),
    ],
    model: Annotated[str | None, MODEL] = None,
    prompts: Annotated[str | None, PROMPTS] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WHAT",
            help="Where pictures come from, repeatable, as in eval: base, a LoRA, a folder of pictures, another model. "
            "By default the model of --model, with --lora if it is given.",
        ),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="A folder with images/ARM/..., instead of making images.")] = None,
    form: Annotated[
        Form, typer.Option("--as", help="pairs; rankings (rankdpo); likes, for single images (diffusion_kto).")
    ] = "pairs",
    rule: Annotated[
        str,
        typer.Option(
            help="How several scorers become one judgement: win-rate, bradley-terry, majority, pareto; score for one "
            "number as it is."
        ),
    ] = "win-rate",
    pairs: Annotated[Which, typer.Option(help="Which pairs of a prompt's pictures: best-worst, all, best-random.")] = (
        "best-worst"
    ),
    margin: Annotated[
        float, typer.Option(min=0, help="What does not differ by more is a tie; in units of the rule (docs/label.md).")
    ] = 0.0,
    drop_ties: Annotated[bool, typer.Option("--drop-ties", help="Leave ties out instead of writing them.")] = False,
    flip: Annotated[
        float, typer.Option(min=0, max=1, help="Turn round this share of the labels, to test robust methods.")
    ] = 0.0,
    captions: Annotated[
        Mode | None,
        typer.Option(help="A caption for each picture (dcpo): captioner, perturbed (other words), or hybrid."),
    ] = None,
    captioner: Annotated[
        str | None, typer.Option(help="A vision-language model for --captions, FILE.yaml as for judge=FILE.yaml.")
    ] = None,
    paraphraser: Annotated[
        str | None,
        typer.Option(help="A language model for the other words, FILE.yaml likewise. Without it, lists of words."),
    ] = None,
    level: Annotated[Level, typer.Option(help="How many words --captions changes: weak, medium, strong.")] = "medium",
    filter: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, help="Leave out this share of the pairs: those that raise the better picture's error most."
        ),
    ] = None,
    source: Source = None,
    n: Count = None,
    **making: Any,
) -> None:
    """Label pictures by scorers: pairs, rankings or likes to train on, from one or several models."""
    from .. import models
    from ..common import processes
    from ..common.errors import DiffpoError
    from ..evaluation import arms, items
    from ..evaluation.generation import Generation
    from ..labelling import label as labelling
    from ..labelling.captions import Captions
    from ..labelling.displacement import Filter
    from ..labelling.rows import Choice

    making["model"] = model or ""
    if arm:
        sources = arms.read_arms(arm, making)
    elif images:
        sources = dict(items.in_folder(images))
    else:
        one = Generation(**making)
        sources = {"base" if one.lora is None else "tuned": one}
    choice = Choice(form, pairs, margin, drop_ties, flip, making["seed"])
    if captions is None and (captioner or paraphraser):
        raise DiffpoError("--captioner and --paraphraser write captions: say which with --captions (docs/label.md)")
    words = None if captions is None else Captions(captions, captioner, level, making["seed"], paraphraser)
    out_of = None
    if filter is not None:
        if model is None:
            raise DiffpoError("--filter sees the pairs with a model: name the one to train with --model")
        seen_by = models.named(model, making["model_config"], making["family"])
        out_of = Filter(filter, seen_by, PRECISIONS[making["dtype"]])
    how = labelling.Labelling(tuple(scorers), rule, choice, words, out_of, making["device"])
    found = labelling.run(out, sources, how, read_prompts(prompts, source), n)
    if processes.here().main:
        labelling.show(found)


def loop(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file; its data.prompts are sampled for.")],
    heldout: Annotated[str, typer.Option(help="Prompts to compare the rounds on, as for eval --prompts.")],
    scorers: Annotated[list[str], typer.Option(help="What labels, as for label. Repeatable.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c]...", help="Settings that replace those in CONFIG.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often to sample, label, train and compare.")] = 3,
    n: Annotated[int, typer.Option("--n", min=1, help="Prompts of a round; each round takes the next ones.")] = 200,
    rule: Annotated[str, typer.Option(help="As for label.")] = "win-rate",
    judges: Annotated[
        list[str] | None,
        typer.Option(help="Scorers that compare the rounds; by default those that label. Repeatable."),
    ] = None,
    **making: Any,
) -> None:
    """Sample from the last LoRA, label, train on from it, compare, again. The same command continues."""
    from ..common.errors import DiffpoError
    from ..evaluation.generation import Generation
    from ..labelling.label import Labelling
    from ..labelling.pictures import loaded_as
    from ..labelling.rows import Choice
    from .loop import Cycle, run

    if making["lora"] is not None:
        raise DiffpoError("--lora: the loop samples with its own LoRAs. To begin with one, set lora.start=FOLDER")
    labelling = Labelling(tuple(scorers), rule, Choice(seed=making["seed"]), device=making["device"])
    compared = tuple(judges or dict.fromkeys(map(loaded_as, scorers)))
    cycle = Cycle(config, tuple(overrides or ()), rounds, n, heldout, labelling, compared)
    model = cycle.settings(1, None).model
    making |= {"model": model.path, "model_config": model.config, "family": model.family}
    run(cycle, Generation(**making))
