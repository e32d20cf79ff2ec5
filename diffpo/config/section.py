"""The base of all sections of a config: unknown keys are refused, and values are checked as YAML writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    # plain YAML reads `1e-4` as text: pydantic's lax mode turns it into the float of the field. The text below a field
    # is its description.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None  # noqa: S101 (a validator of fields gets the field's name)
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

    def to_yaml(self) -> str:
        """The settings as YAML. The text of a whole config is a config file of its own."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def may_import(info: ValidationInfo) -> bool:
    """Whether modules that the settings name may be imported. It is false for settings from a file that somebody else
    may have written, see `settings.stored_identity`."""
    return (info.context or {}).get("imports", True)


def _no_name(text: str) -> str | None:
    """Why ``text`` cannot be a name; None if it can. All texts of a config are names, mostly of files."""
    try:
        too_long = any(len(part) > 255 for part in text.encode().split(b"/"))
        if too_long or len(text) > 4000:
            return "longer than a file's name can be"
        Path(text).expanduser()
    except UnicodeEncodeError:
        return "holds half a character (a lone surrogate)"
    except RuntimeError:
        if text.partition("/")[0] == "~":
            return "the home folder is not known: set HOME, or write the whole path"
        return f"there is no user {text.partition('/')[0][1:]} on this machine, so ~ has no folder"
    return "holds the character NUL" if "\0" in text else None
