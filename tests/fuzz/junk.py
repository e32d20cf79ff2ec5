"""Strategies for faulty files: values of every kind, and valid files with changed bytes."""

import json
import math

from hypothesis import strategies as st

ANYTHING = st.characters(exclude_categories=())  # lone surrogates and control characters too

AWKWARD = [
    *(0, -1, 2**31, 2**63, 10**30, -(10**30), math.nan, math.inf, -math.inf, 1e308, 1e-320, True, False, None),
    *("", " ", ".", "..", "/", "~", "~nobody-there/x", "no", "null", "1e5", "1e999", "1_000", "0x1f", "²", "٣", "-0"),
    *("a\0b", "\ud800", "\u2028", "é" * 9, "x" * 300, "a/b", "../../x", ".x", "a.b", "=", "http://", "http://[", "{}"),
]

scalars = st.sampled_from(AWKWARD) | st.integers() | st.floats() | st.text(ANYTHING, max_size=6)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(ANYTHING, max_size=3), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """``content`` truncated, or with bytes changed, removed, inserted or repeated."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(result) - 1)))
        length = draw(st.sampled_from([1, 1, 2, 8, 64]))
        match draw(st.sampled_from(["flip", "flip", "write", "cut", "take", "put", "repeat"])):
            case "flip" if result:
                result[start] ^= 1 << draw(st.integers(0, 7))
            case "write":
                result[start : start + length] = draw(st.binary(min_size=length, max_size=length))
            case "cut":
                del result[start:]
            case "take":
                del result[start : start + length]
            case "put":
                result[start:start] = draw(st.binary(max_size=8))
            case "repeat":
                result[start:start] = result[start : start + length]
    return bytes(result)


def places(tree, prefix=()):
    """The path of every value in nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*prefix, key)
        yield from places(value, (*prefix, key))


@st.composite
def mutated(draw, tree, times: int = 3):
    """A copy of nested dicts and lists with values removed, misspelt, replaced, wrapped or added."""
    import copy

    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, times))):
        found = list(places(tree))
        if not found:
            break
        *way, last = draw(st.sampled_from(found))
        parent = tree
        for key in way:
            parent = parent[key]
        match draw(st.sampled_from(["drop", "misspell", "replace", "replace", "replace", "wrap", "add"])):
            case "drop":
                del parent[last]
            case "misspell" if isinstance(last, str):
                cut = draw(st.integers(0, len(last)))
                parent[last[:cut] + draw(st.sampled_from(["", "x", "_", "É"])) + last[cut + 1 :]] = parent.pop(last)
            case "wrap":
                parent[last] = draw(st.sampled_from([[parent[last]], {"a": parent[last]}, str(parent[last])]))
            case "add" if isinstance(parent, dict):
                parent[draw(st.text(ANYTHING, max_size=4))] = draw(values)
            case _:
                parent[last] = draw(values)
    return tree


def lines(rows) -> bytes:
    """``rows`` as JSON lines."""
    return "\n".join(json.dumps(row) for row in rows).encode()
