"""A scorer behind `diffpo serve-scorer`, in another environment or on another machine. The protocol: the folder server.

Pictures travel as PNG and numbers with all their digits, so a remote scorer gives what it would give here.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from http.client import HTTPException, IncompleteRead

import numpy as np
from PIL import Image

from ..common.errors import DiffpoError
from ..common.instruction import Instruction
from ..common.names import hint
from ..common.text import plain
from .careful import CannotScore
from .exchange import as_line, exchange, png, read_object
from .server.protocol import NAME, PROTOCOL

TIMEOUT = 300.0  # s for a request and its answer; requests of other processes go first
WAITS = (1.0, 3.0, 9.0)  # s before the second, third and last attempt
NUMBERS = 256  # different numbers that a server may give
LARGEST = 3.4e38  # of a number: training computes with float32
EMPTY = len(json.dumps({"images": [], "prompts": [], "sources": []}))


class HttpScorer:
    """The numbers of the server at ``url``, or ``number`` alone.

    Asks the server what it is. Raises DiffpoError, here and from ``score``, that names the URL, the reason and the next
    step: unreachable (after four attempts), refused, no finite number for an image. The last two are `CannotScore`.
    """

    def __init__(self, url: str, number: str | None = None) -> None:
        self.url = url
        about = self._ask("/")
        try:
            names, optional, limits = about["names"], about["optional"], (about["max_images"], about["max_bytes"])
            good = about["protocol"] == PROTOCOL and names and isinstance(names, list) and isinstance(optional, list)
            good = good and max(len(names), len(optional)) <= NUMBERS
            good = good and all(isinstance(name, str) and NAME.fullmatch(name) for name in names + optional)
            good = good and len(set(names)) == len(names)
            good = good and all(type(limit) is int and limit > 0 for limit in limits)
        except (KeyError, TypeError):
            good = False
        if not good:
            raise DiffpoError(
                f"the server at {url} is not a scorer of protocol {PROTOCOL}; run the same version of "
                "`diffpo serve-scorer` there, or correct the address"
            )
        if number and number not in names:
            raise DiffpoError(f"the scorer at {url} gives no number {number!r}: {hint(number, names)}")
        self.names: tuple[str, ...] = (number,) if number else tuple(names)
        self.optional = frozenset(optional)
        self.max_images, self.max_bytes = limits
        self.sources = about.get("sources") is True

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        found: dict[str, list[float]] = {name: [] for name in self.names}
        for pictures, texts, sources in self._requests(images, prompts):
            edits = {"sources": sources} if any(sources) else {}
            answer = self._ask("/score", {"images": pictures, "prompts": texts, **edits})
            for name, values in found.items():
                values += self._numbers(answer, name, texts)
        return {name: np.array(values, np.float64) for name, values in found.items()}

    def _requests(
        self, images: list[Image.Image], prompts: list[str]
    ) -> Iterator[tuple[list[str], list[str], list[str]]]:
        """The batch in parts that the server takes: images, prompts, and of each what it is an edit of."""
        pictures: list[str] = []
        texts: list[str] = []
        sources: list[str] = []
        size, most = EMPTY, 0  # of sources in a request
        for image, prompt in zip(images, prompts, strict=True):
            picture = png(image)
            edits = [png(each) for each in prompt.pictures()] if isinstance(prompt, Instruction) else []
            if edits and not self.sources:
                raise DiffpoError(
                    f"the server at {self.url} takes no pictures that prompts are about, as {plain(prompt, 80)!r} is: "
                    f"run this version of `diffpo serve-scorer` there"
                )
            source = ",".join(edits)
            more = len(picture) + len(json.dumps(prompt)) + len(source) + 10  # quotes and commas
            if EMPTY + more > self.max_bytes:
                raise DiffpoError(
                    f"an image of the prompt {prompt[:80]!r} makes a request of {EMPTY + more} bytes, but the scorer "
                    f"at {self.url} takes {self.max_bytes}. Start it with a larger --max-bytes"
                )
            full = len(pictures) == self.max_images or most + len(edits) > self.max_images
            if pictures and (full or size + more > self.max_bytes):
                yield pictures, texts, sources
                pictures, texts, sources, size, most = [], [], [], EMPTY, 0
            pictures.append(picture)
            texts.append(prompt)
            sources.append(source)
            size, most = size + more, most + len(edits)
        if pictures:
            yield pictures, texts, sources

    def _numbers(self, answer: dict, name: str, prompts: list[str]) -> list[float]:
        scores = answer.get("scores")
        values = scores.get(name) if isinstance(scores, dict) else None
        if not isinstance(values, list) or len(values) != len(prompts):
            count = len(values) if isinstance(values, list) else "no"
            raise DiffpoError(
                f"the scorer at {self.url} gave {count} numbers {name!r} for {len(prompts)} images, not one each"
            )
        found = []
        for value, prompt in zip(values, prompts, strict=True):
            if value is None and name in self.optional:
                value = math.nan
            elif type(value) not in (int, float) or not abs(value) <= LARGEST:
                raise CannotScore(
                    f"the scorer at {self.url} gave {name} = {_shown(value)} for an image of the prompt "
                    f"{plain(prompt, 200)!r}; leave out the prompt or the scorer"
                )
            found.append(float(value))
        return found

    def _ask(self, path: str, content: dict | None = None) -> dict:
        """The server's answer. Temporary failures (a restart, a busy server) are tried again, refusals are not."""
        waits = iter(WAITS)
        while True:
            try:
                status, data = self._send(path, content)
                if status != 503:
                    return self._understood(status, data)
                again, reason = True, _sentence(data) or "status 503"
            except (OSError, HTTPException, ValueError) as error:  # ValueError: of chunks with a negative length
                again = isinstance(error, (ConnectionError, TimeoutError, IncompleteRead))
                reason = f"no answer within {TIMEOUT:g} s" if isinstance(error, TimeoutError) else as_line(error)
            wait = next(waits, None)
            if wait is None or not again:
                attempts = f" ({len(WAITS) + 1} attempts)" if again else ""
                raise DiffpoError(
                    f"cannot reach the scorer at {self.url}: {reason}{attempts}. Start it there with `diffpo "
                    "serve-scorer SCORER --host HOST --port PORT` (with a smaller --max-images if it is slow), or "
                    "correct the address"
                ) from None
            print(f"the scorer at {self.url}: {reason}; trying again in {wait:g} s", file=sys.stderr, flush=True)
            time.sleep(wait)

    def _send(self, path: str, content: dict | None) -> tuple[int, bytes]:
        """Status and content of the answer."""
        data = None if content is None else json.dumps(content).encode()
        status, _, answer = exchange(self.url, path, data, {}, TIMEOUT)
        return status, answer

    def _understood(self, status: int, data: bytes) -> dict:
        answer = read_object(data)
        if status != 200 and (sentence := _sentence(data)):
            raise CannotScore(f"the scorer at {self.url} refused the request (status {status}): {sentence}")
        if status != 200 or answer is None:
            raise DiffpoError(
                f"the server at {self.url} (status {status}) is not a scorer. Start `diffpo serve-scorer SCORER` "
                "there, or correct the address"
            )
        return answer


def _sentence(data: bytes) -> str:
    """The server's own sentence on what is wrong, if its answer has one."""
    said = (read_object(data) or {}).get("error")
    return as_line(said) if isinstance(said, str) else ""


def _shown(value: object) -> str:
    """The beginning of a JSON value that is no number; str() of a large integer is an error."""
    return "a very large number" if type(value) is int else plain(repr(value), 40)
