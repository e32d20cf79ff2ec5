"""What every section of a config shares: unknown keys are refused, and values are what YAML means by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    # plain YAML reads `1e-4` as text: pydantic's lax mode turns it into the float that the field asks for
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        if value is False and "no" in get_args(annotation):
            return "no"  # YAML reads the bare word as false
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("expected a number or text, not true or false")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("expected a number below 2**63")
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and (reason := _no_name(text)):
                raise ValueError(reason)
        return value


def _no_name(text: str) -> str | None:
    """Why ``text`` can name nothing: all text of a config names something, mostly files."""
    try:
        too_long = any(len(part) > 255 for part in text.encode().split(b"/"))
        if too_long or len(text) > 4000:
            return "longer than any file's name"
        Path(text).expanduser()
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate)"
    except RuntimeError:
        if text.partition("/")[0] == "~":
            return "the home folder is not known: set HOME, or write the whole path"
        return f"there is no user {text.partition('/')[0][1:]} here whose folder ~ could mean"
    return "holds the character NUL" if "\0" in text else None
