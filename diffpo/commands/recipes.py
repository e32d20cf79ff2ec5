"""The verb `recipes`: the configs that come with diffpo."""

from pathlib import Path

import typer

from ..common import carried


def add_to(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command()(recipes)


def recipes() -> None:
    """List the recipes that come with diffpo; train and check take them by these names from any folder."""
    for name, about in listed(carried.HOME).items():
        print(f"{name:36}  {about}")
    print(f"\nThey are in {carried.HOME / 'configs'}. A file here of the same name comes first.")


def listed(home: Path) -> dict[str, str]:
    """Name -> first line of its header."""
    files = sorted((home / "configs").glob("*.yaml"))
    return {f"configs/{file.name}": file.read_text("utf-8").split("\n", 1)[0].lstrip("# ") for file in files}
