"""The pages that are made from the code are up to date, and nothing in the code lacks a description."""

import make_reference
import pytest
import typer
import yaml
from pydantic import BaseModel, Field


@pytest.mark.parametrize("name", ["config.md", "cli.md", "papers.md"])
def test_the_page_is_what_the_code_says(name):
    committed = (make_reference.DOCS / name).read_text(encoding="utf-8")
    assert committed == make_reference.pages()[name], "run python scripts/make_reference.py"


def test_a_key_without_a_description_is_named(monkeypatch):
    class Inner(BaseModel):
        rank: int = Field(8, description="Rank.")
        secret: float = 1.0

    class Whole(BaseModel):
        inner: Inner = Field(description="The inner section.")

    monkeypatch.setattr(make_reference, "Config", Whole)
    with pytest.raises(KeyError, match=r"Inner\.secret"):
        make_reference.config_page()


def test_an_option_without_help_is_named(monkeypatch):
    app = typer.Typer()

    @app.command()
    def first(depth: int = 3) -> None:
        """Does something."""

    @app.command()
    def second() -> None:
        """Does something else."""

    monkeypatch.setattr(make_reference, "app", app)
    with pytest.raises(KeyError, match=r"first.*--depth"):
        make_reference.cli_page()


def test_types_limits_and_defaults_are_as_pydantic_checks_them():
    class Section(BaseModel):
        share: float | None = Field(None, ge=0, lt=1, description="A share.")
        names: list[str] = Field(default_factory=list, min_length=1, description="Names.")
        seed: int = Field(gt=0, lt=2**63, description="A seed.")

    rows = {
        name: (make_reference.kind(field), make_reference.default(field))
        for name, field in Section.model_fields.items()
    }
    assert rows["share"] == ("number ≥ 0, < 1 or null", "`null`")
    assert rows["names"] == ("list of text, 1 or more", "`[]`")
    assert rows["seed"] == ("integer > 0, < 2^63", "required")


def test_pre_commit_runs_what_make_lint_runs():
    """Otherwise a commit that its hooks accept could fail `make lint`."""
    root = make_reference.DOCS.parent
    hooks = [
        hook
        for repo in yaml.safe_load((root / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    lint = (root / "Makefile").read_text().split("lint: install\n")[1].split("\n\n")[0]
    tools = [line.split("/")[1].split(" --")[0].removesuffix(" .") for line in lint.splitlines()]
    assert [hook["entry"].removesuffix(" --force-exclude") for hook in hooks] == tools
    assert {hook["language"] for hook in hooks} == {"system"}  # the environment's own version
