"""The verbs that make a file from a model or its LoRA: `calibrate`, `export`, `combine`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..evaluation.generation import Generation
from . import options as given


def add_to(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (calibrate, export, combine):
        app.command()(verb)


def calibrate(
    model: Annotated[str, given.MODEL],
    prompts: Annotated[str, given.PROMPTS],
    out: Annotated[Path, typer.Option(help="A new file for the plan, e.g. plan.safetensors.")],
    model_config: given.ModelConfig = None,
    family: given.Family = None,
    lora: given.Lora = None,
    guidance: given.Guidance = Generation.guidance,
    calls: Annotated[int, typer.Option(min=1, help="Model calls per image that the plan is for.")] = 5,
    method: Annotated[
        str, typer.Option(help="learned, compensated, searched, v3 or classical (docs/calibrate.md).")
    ] = "learned",
    n: Annotated[int, typer.Option("--n", min=1, help="Noises that the plan is fitted to.")] = 256,
    heldout: Annotated[int, typer.Option(min=1, help="Noises that it is measured on, with other prompts.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the noises.")] = 0,
    resolution: Annotated[
        int | None, typer.Option(min=8, help="Side of the images in pixels; by default the model's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Noises at a time; lower it if the memory is full.")] = 32,
    dtype: given.Dtype = Generation.dtype,
    device: given.Device = None,
) -> None:
    """Fit a sampling plan, a solver of a few calls, to one model. Use it with --plan in generate and eval."""
    from .calibrate import Calibration, run

    run(
        Calibration(
            model=model,
            prompts=prompts,
            out=out,
            model_config=model_config,
            family=family,
            lora=lora,
            guidance=guidance,
            calls=calls,
            method=method,
            n=n,
            heldout=heldout,
            seed=seed,
            resolution=resolution,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
        )
    )


def export(
    lora: Annotated[str, typer.Option(help="A LoRA file, or the folder of a training run or checkpoint.")],
    to: Annotated[
        Literal["diffusers", "kohya", "comfyui", "merged", "single"],
        typer.Option(
            help="kohya: a LoRA for ComfyUI, A1111 and Forge; comfyui: of any kind, for ComfyUI and Forge; merged: a "
            "pipeline with the LoRA in it; single: the merged model as one file, for the same programs."
        ),
    ],
    model: Annotated[str, given.MODEL],
    out: Annotated[Path, typer.Option(help="A new folder for the export and its model card.")],
    model_config: given.ModelConfig = None,
    family: given.Family = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Precision; by default that of the stored file."),
    ] = None,
    scale: Annotated[float, typer.Option(help="Strength of the LoRA, for merged and single.")] = 1.0,
    results: Annotated[
        Path | None,
        typer.Option(help="Output folder of `diffpo eval`: its numbers and pictures for the model card."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload the folder to the hub; a new repository is private."),
    ] = None,
) -> None:
    """Write the LoRA in a format for other programs, with a model card."""
    options = dict(locals())
    from ..export.export import Export, run

    run(Export(**options))


def combine(
    loras: Annotated[
        list[str],
        typer.Argument(metavar="LORA@WEIGHT", help="A LoRA file or the folder of a run, and its weight (1 without)."),
    ],
    model: Annotated[str, given.MODEL],
    out: Annotated[Path, typer.Option(help="A new folder for the combined LoRA.")],
    model_config: given.ModelConfig = None,
    family: given.Family = None,
) -> None:
    """Combine LoRAs of one model linearly into one, exactly; the ranks add up."""
    from .combine import run

    print(f"the LoRA is in {run(loras, out, model, model_config, family)}")
