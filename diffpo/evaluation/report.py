"""What an evaluation looks like as a page: one self-contained HTML file.

It loads nothing, and its Content-Security-Policy allows only inline styles, pictures in data URIs and its own script.
"""

from __future__ import annotations

import base64
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..common.instruction import key_of
from ..common.text import plain
from . import charts, people, report_curves, report_pictures, report_tables
from .table import SHOWN, diversity_text, title

if TYPE_CHECKING:
    from .compare import Evaluation


def html(evaluation: Evaluation, manifest: list[dict], metrics: list[dict]) -> str:
    """The whole report.

    Args:
        manifest: rows that say how the pictures were made, of as many arms as it is known of.
        metrics: of `charts.read_metrics`.
    """
    pages = Environment(loader=PackageLoader(__package__), autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    pages.filters |= {"plain": _plain}
    folder = files(__package__) / "templates"
    script, style = ((folder / name).read_text("utf-8") for name in ("report.js", "report.css"))
    edited = {item.index for item in evaluation.items if key_of(item.prompt)}
    thumbnails = report_pictures.Thumbnails(sum(len(item.pictures) for item in evaluation.items) + len(edited))
    arms, settings = report_tables.settings(manifest)
    return pages.get_template("report.html").render(
        e=evaluation,
        title=title(evaluation),
        verdict=evaluation.verdict,
        diversity=diversity_text(evaluation),
        people=people.lines(evaluation),
        scores=report_tables.scores(evaluation, evaluation.strengths),
        checkpoints=Markup(report_curves.over_checkpoints(evaluation, manifest)),  # noqa: S704, escaped there
        calls=Markup(report_curves.over_calls(evaluation, manifest)),  # noqa: S704, escaped there
        training=Markup(charts.curves(metrics)),  # noqa: S704, escaped there
        edits=bool(edited),
        denoising=report_pictures.denoising(evaluation, thumbnails),
        settings_of=arms,
        settings=settings,
        static=report_pictures.static_cards(evaluation, thumbnails),
        data=report_pictures.data(evaluation, thumbnails),
        side=thumbnails.side,
        small=report_pictures.SMALL,
        script=Markup(script),  # noqa: S704, a file of the package
        style=Markup(style),  # noqa: S704, a file of the package
        policy=policy(script),
    )


def policy(script: str) -> str:
    """The Content-Security-Policy of a page whose only script is this one."""
    digest = base64.b64encode(sha256(script.encode()).digest()).decode()
    allowed = f"img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def _plain(value: Any, length: int = SHOWN) -> str:
    return plain(value, length)
