"""What `diffpo check` says of pictures to edit."""

from __future__ import annotations

from collections.abc import Sequence

from ..common.errors import DiffpoError
from ..common.instruction import Instruction
from ..config import Config
from ..data.groups import Groups


def most(groups: Groups | None, prompts: Sequence[str]) -> int | None:
    """The largest number of pictures to edit that a group or a prompt has; None if none has any."""
    numbers = [len(group.sources) for group in groups.groups] if groups is not None else []
    numbers += [len(prompt.keys) for prompt in prompts if isinstance(prompt, Instruction)]
    return max(numbers, default=0) or None


def column(config: Config) -> list[str]:
    """What is wrong with the column of pictures to edit: a model that takes none, or that needs them."""
    from .. import models
    from ..data.captions import require_pictures

    try:
        require_pictures(models.family_class(config.model), config.data.columns.source, config.model.path)
    except DiffpoError as error:
        return [str(error)]
    return []


def numbers(config: Config, groups: Groups | None, texts: list[str]) -> list[str]:
    """What is wrong with the number of pictures to edit, if a row or a prompt has several."""
    rows = [(f"row {group.row}", len(group.sources)) for group in groups.groups] if groups is not None else []
    own = [(f"prompt {k}", len(text.keys)) for k, text in enumerate(texts) if isinstance(text, Instruction)]
    if max((number for _, number in [*rows, *own]), default=0) < 2:
        return []
    from .. import models
    from ..data.captions import require_numbers

    found = []
    for counted, where in ((rows, config.data.train), (own, config.data.prompts)):
        try:
            require_numbers(models.family_class(config.model), counted, str(where))
        except DiffpoError as error:
            found.append(str(error))
    return found
