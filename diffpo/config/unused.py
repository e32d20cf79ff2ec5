"""Settings that would have no effect beside the others: they are refused, so that nobody believes that they had one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

from .section import Section

SAMPLED = ("trajectory", "pool", "samples", "self_play", "reward")
# a setting (or a whole section), the setting that turns it on, and the values with which it is used
RULES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("reference.every", "reference.policy", ("ema", "sync", "accelerated", "fast_slow")),
    ("reference.decay", "reference.policy", ("ema", "fast_slow")),
    ("reference.ramp", "reference.policy", ("ema",)),
    ("reference.strength", "reference.policy", ("accelerated",)),
    ("behaviour.decay", "behaviour.policy", ("ema",)),
    ("behaviour.ramp", "behaviour.policy", ("ema",)),
    ("divergence_alpha", "divergence", ("alpha",)),
    ("inversion", "source", ("inversion",)),
    ("direct", "source", ("reward",)),
    ("rollout", "source", SAMPLED),
    ("rollout.pool", "source", ("pool",)),
    ("rollout.threshold", "source", ("pool",)),
    ("rollout.start", "source", ("pool",)),
    ("rollout.inner", "source", ("pool",)),
    ("rollout.step_scorer", "source", ("pool", "reward")),
)


def reason(objective: Section, given: Mapping[str, Any], preset: Mapping[str, Any]) -> str | None:
    """Which setting of ``given``, of the section ``objective:``, would have no effect, and what would use it; None if
    all have one.

    A setting with its default or with the preset's own value is let through: it is in the resolved config of every run.
    """
    for name, switch, values in RULES:
        now = _at(objective, switch)
        if now in values:
            continue
        for key in _given(objective, given, name):
            if _at(objective, key) not in (_default(objective, key), _of(preset, key)):
                own, other = f"objective.{key}", f"objective.{switch}"
                return f"{own} has no effect with {other}={now}: leave it out, or set {other} to {' or '.join(values)}"
    return None


def _given(objective: Section, settings: Mapping[str, Any], name: str) -> Iterator[str]:
    """The settings at or below ``name`` that are written in ``settings``."""
    written = _of(settings, name)
    if isinstance(_at(objective, name), Section):
        for key in written or ():
            yield from _given(objective, settings, f"{name}.{key}")
    elif written is not None:
        yield name


def _of(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def _at(objective: Section, name: str) -> Any:
    return reduce(getattr, name.split("."), objective)


def _default(objective: Section, name: str) -> Any:
    *sections, last = name.split(".")
    section = type(reduce(getattr, sections, objective))
    return section.model_fields[last].get_default(call_default_factory=True)
