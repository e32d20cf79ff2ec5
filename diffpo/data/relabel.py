"""Other labels for the same images: from a score in place of people (pseudo-labels), or turned round."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from PIL import Image
from tqdm.auto import tqdm

from ..common.errors import DiffpoError
from .groups import Groups
from .rows import Group

AT_ONCE = 32  # pairs whose images are scored together


def relabel(groups: Groups, rate: Callable[[list[Image.Image], list[str]], Sequence[float]], margin: float) -> None:
    """Give every pair of ``groups`` the label that a score suggests, in place.

    ``rate(images, captions)`` returns a number for each finished image. With p = softmax of a pair's two numbers, the
    first is better if p_1 - p_2 > ``margin``, the second if p_2 - p_1 is; the others are ties, kept with preference
    1/2 or left out as the data's other ties (SPO's labels for SDXL: PickScore, margin 0.1). Groups keep the numbers as
    their scores. DiffpoError if all pairs are ties.
    """
    found: list[Group] = []
    indices = range(len(groups))
    for start in tqdm(range(0, len(groups), AT_ONCE), desc="labelling pairs", unit="batch", leave=False, delay=5):
        part = indices[start : start + AT_ONCE]
        images = [image for index in part for image in groups.images(index)]
        captions = [caption for index in part for caption in _captions(groups.groups[index])]
        numbers = list(map(float, rate(images, captions)))
        both = zip(numbers[::2], numbers[1::2], strict=True)
        found += [_labelled(groups.groups[i], *each, margin) for i, each in zip(part, both, strict=True)]
    if all(group.preference == 0.5 for group in found):
        raise DiffpoError(
            f"{groups.source}: by the score that labels them all {len(found)} pairs are ties; lower the margin, or "
            "label by another score"
        )
    groups.ties = sum(group.preference == 0.5 for group in found)
    groups.groups = found if groups.soft else [group for group in found if group.preference != 0.5]


def turn(groups: Groups) -> None:
    """Make the worst image of every group of ``groups`` the best one, and the liked the disliked, in place (the data of
    Diffusion-NPO). Scores change their sign."""
    groups.groups = [_turned(group) for group in groups.groups]


def _turned(group: Group) -> Group:
    if len(group.images) == 1:
        return replace(group, preference=1 - group.preference)
    scores = None if group.scores is None else tuple(-score for score in reversed(group.scores))
    return replace(_reversed(group), scores=scores)


def _reversed(group: Group) -> Group:
    turned = {name: getattr(group, name)[::-1] for name in ("images", "hashes", "sizes", "captions")}
    return replace(group, rewards=group.rewards and group.rewards[::-1], **turned)


def _captions(group: Group) -> tuple[str, ...]:
    return group.captions if len(group.captions) > 1 else group.captions * 2


def _labelled(group: Group, first: float, second: float, margin: float) -> Group:
    gap = math.tanh((first - second) / 2)  # p_1 - p_2
    if abs(gap) <= margin:
        return replace(group, preference=0.5, scores=(first, second))
    if gap > 0:
        return replace(group, preference=1.0, scores=(first, second))
    return replace(_reversed(group), preference=1.0, scores=(second, first))
