"""Options that several verbs of the command line share, and the options of pictures."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..common.errors import DiffpoError
from ..evaluation.generation import Generation

MODEL = typer.Option(help="A pipeline folder, a hub id, or one .safetensors file.")
ModelConfig = Annotated[
    str | None,
    typer.Option(
        help="Where the configs come from if MODEL is one file: a folder, a hub id, sd1, sd2, sd2-v, sdxl or sdxl-v. "
        "By default chosen from the weights."
    ),
]
Family = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:CLASS",
        help="A model family of your own, for models that diffpo does not support; same as model.family.",
    ),
]
PROMPTS = typer.Option(
    help="A text file with one prompt per line; .json, .jsonl, .csv, .tsv or .parquet with a column prompt, caption or "
    "text, or FILE:COLUMN; or shapes:heldout[:N]. Sets by name, or NAME=FILE for a local copy: everyday, composition, "
    "parti, hpdv2, drawbench, pickapic-unique, geneval, dpg, t2i-compbench, genai-bench."
)
Source = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN",
        help="For models that edit: the column of PROMPTS, a table, with their pictures, one or a list in a cell.",
    ),
]
Out = Annotated[Path, typer.Option(help="Output folder; run the same command again to continue.")]
Count = Annotated[int | None, typer.Option("--n", min=1, help="Use only the first N prompts.")]
Side = Annotated[int | None, typer.Option(min=8, help="Size in pixels; by default the model's own.")]
Device = Annotated[
    str | None, typer.Option(help="cuda, mps, cpu or another torch device; by default the first of them.")
]
Lora = Annotated[str | None, typer.Option(help="A LoRA file, or the folder of a training run.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance scale.")]
Dtype = Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of the model.")]
SCORERS_HELP = (
    "pickscore, hps, hps2.0, hpsv3, imagereward, mps, clip, aesthetic or shapes; NAME=SOURCE for local weights; "
    "judge=FILE.yaml; sum=A*0.5+B; votes=FOLDER of `diffpo annotate`; http://HOST:PORT of `diffpo serve-scorer`; "
    "module:Class of your own. Repeatable."
)
SOURCE_HELP = "A folder of pictures, a table (.parquet, .jsonl, .csv), a .tar shard, a folder of these, or a hub id."
# for the fields of `Generation`, except the model: generate requires it, and eval does not
GENERATION: dict[str, Any] = {
    "model_config": ModelConfig,
    "family": Family,
    "lora": Lora,
    "lora_weight": Annotated[float | None, typer.Option(help="Strength of the LoRA.", show_default="1")],
    "negative_lora": Annotated[
        str | None,
        typer.Option(
            help="A LoRA of what people reject (objective diffusion_npo), for the unconditional half of guidance."
        ),
    ],
    "negative_lora_weight": Annotated[
        float | None, typer.Option(help="Strength of the negative LoRA.", show_default="1")
    ],
    "user_pairs": Annotated[
        str | None,
        typer.Option(
            help="Pairs by the user to personalise for (the first 4 are used); any format of data.train. "
            "FILE@0.5+FILE@0.5 is between two users. Only for a LoRA that was trained with users."
        ),
    ],
    "user_features": Annotated[
        str | None,
        typer.Option(help="The features that the LoRA's users are known by, if it was trained with objective.taste."),
    ],
    "steer": Annotated[
        str | None,
        typer.Option(
            help="Weights of the rewards that the LoRA was trained with (objective.steered), e.g. "
            "'following:0.7 appearance:0.3'."
        ),
    ],
    "base_calls": Annotated[
        int | None,
        typer.Option(min=0, help="How many of the first calls are made without the LoRA.", show_default="0"),
    ],
    "seed": Annotated[int, typer.Option(help="First seed of every prompt.")],
    "images_per_prompt": Annotated[int, typer.Option(min=1, help="Images (seeds) per prompt.")],
    "steps": Annotated[
        int | None, typer.Option(min=1, help="Model calls per image.", show_default="20, or the plan's")
    ],
    "solver": Annotated[
        str | None,
        typer.Option(
            help="A solver of the package samplers, e.g. dpmpp or unipc, or module:attribute of your own. By default "
            "it is chosen from the number of calls and the guidance scale."
        ),
    ],
    "plan": Annotated[
        str | None,
        typer.Option(help="A sampling plan of `diffpo calibrate`, in place of a solver. It fixes the number of calls."),
    ],
    "any_model": Annotated[bool, typer.Option("--any-model", help="Take a plan that was fitted to another model too.")],
    "guidance": Guidance,
    "negative_prompt": Annotated[str | None, typer.Option(help="Negative prompt.")],
    "height": Side,
    "width": Side,
    "batch_size": Annotated[int, typer.Option(min=1, help="Images per batch; it does not change the images.")],
    "dtype": Dtype,
    "device": Device,
    "paths": Annotated[
        int, typer.Option(min=0, help="Keep the denoising path of the first N prompts: x_0 at every model call.")
    ],
}


def makes_pictures(verb: Callable[..., None], **defaults: Any) -> Callable[..., None]:
    """``verb`` with the options of `GENERATION` in place of its ``**making``, with the defaults of `Generation` unless
    ``defaults`` has others.

    typer reads a verb's options from its signature, so the signature is replaced.
    """
    *own, _ = inspect.signature(verb).parameters.values()
    values = {name: getattr(Generation, name) for name in GENERATION} | defaults
    options = [
        inspect.Parameter(name, own[0].kind, default=values[name], annotation=annotation)
        for name, annotation in GENERATION.items()
    ]
    vars(verb)["__signature__"] = inspect.Signature([*own, *options])
    verb.__annotations__ = {each.name: each.annotation for each in (*own, *options)}
    return verb


def read_prompts(prompts: str | None, source: str | None) -> Any:
    """``--prompts`` with the pictures of ``--source``; without it, as it is."""
    if source is None:
        return prompts
    if prompts is None:
        raise DiffpoError("--source names a column of --prompts: give these too")
    from ..data.prompts import load_prompts

    return load_prompts(prompts, pictures=source)
