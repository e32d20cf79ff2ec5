"""The verbs that measure sets of pictures: `distance`, `benchmark` and `read-benchmark`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import MODEL, Count, Device, Out, makes_pictures

Benchmark = Literal["geneval", "dpg", "t2i-compbench", "genai-bench"]


def add_to(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    app.command()(distance)
    app.command()(makes_pictures(benchmark, images_per_prompt=None))
    app.command("read-benchmark")(read_benchmark)


def distance(
    pictures: Annotated[
        str,
        typer.Argument(
            metavar="PICTURES",
            help="A folder of pictures, a table (.parquet, .jsonl), a .tar shard, a folder of these; OUT/images/ARM.",
        ),
    ],
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="The same of real pictures; or statistics for FID, FILE.npz.")
    ],
    features: Annotated[
        list[str] | None,
        typer.Option(
            help="inception (the default), clip, dinov2 or shapes; NAME=SOURCE for local weights; module:Class of your "
            "own. CMMD is that of clip=ViT-L-14-336:openai. Repeatable."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the numbers.")] = None,
    cache: Annotated[Path, typer.Option(help="Folder where features are kept, for the next time.")] = Path(
        "~/.cache/diffpo/features"
    ),
    device: Device = None,
) -> None:
    """Distance of two sets of pictures: FID, KID, CMMD, precision and recall, with intervals."""
    from ..evaluation import distributions
    from ..evaluation.distributions import table

    table.show(distributions.run(pictures, reference, features or ["inception"], out, cache, device))
    if out:
        print(f"numbers: {out}")


def benchmark(
    name: Annotated[Benchmark, typer.Argument(metavar="BENCHMARK", help="geneval, dpg, t2i-compbench or genai-bench.")],
    model: Annotated[str, MODEL],
    out: Out,
    prompts: Annotated[
        str | None, typer.Option(help="Local copy of the benchmark's prompts; by default they are downloaded.")
    ] = None,
    n: Count = None,
    **making: Any,
) -> None:
    """Make pictures in the folder layout of a benchmark, for its official scorer. By default as many for each prompt as
    the benchmark asks for."""
    from ..evaluation import benchmarks
    from ..evaluation.generation import Generation

    if making["images_per_prompt"] is None:
        making["images_per_prompt"] = benchmarks.LAYOUTS[name].images
    for line in benchmarks.make(name, Generation(model=model, **making), out, prompts, n):
        print(line)


def read_benchmark(
    name: Annotated[Benchmark, typer.Argument(metavar="BENCHMARK", help="geneval, dpg, t2i-compbench or genai-bench.")],
    results: Annotated[
        Path, typer.Argument(metavar="RESULTS", help="What the official scorer wrote: a file, or the folder of it.")
    ],
    skills: Annotated[
        Path | None, typer.Option(help="genai_skills.json, for the skills of genai-bench; by default downloaded.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the numbers.")] = None,
) -> None:
    """Read the official scorer's results of a benchmark into a table with intervals."""
    from ..evaluation import benchmark_results as results_of

    found = results_of.read(name, results, skills)
    results_of.show(found)
    if out:
        results_of.write(found, out)
        print(f"numbers: {out}")
