"""A client of servers that speak OpenAI's chat completions with pictures: vLLM, sglang, and paid services.

The key comes from an environment variable. It is sent in the header only, and taken out of every message.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException, IncompleteRead
from threading import Event
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ..common.errors import DiffpoError
from ..common.text import plain
from .exchange import as_line, exchange, read_object

WAITS = (1.0, 3.0, 9.0, 27.0)  # s before the second to the last attempt
LONGEST = 60.0  # s that a server may ask to wait
BUSY = (408, 409, 425, 429, 500, 502, 503, 504)  # statuses that may pass
TOP = 20  # likeliest tokens that are asked for: the most that OpenAI and vLLM give by default
ADDRESS = re.compile(r"https?://(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:/[A-Za-z0-9_.~/-]*)?")


class Reply(NamedTuple):
    """``text``: the answer. ``top``: the probabilities of the likeliest first tokens, as they are written."""

    text: str
    top: list[tuple[str, float]]


@dataclass(frozen=True)
class Chat:
    """A model behind ``url`` (``http://HOST:PORT/v1``).

    Attributes:
        key_from: the environment variable that holds the key; None: no key is sent.
        extra: further entries of every request, e.g. {"chat_template_kwargs": {"enable_thinking": False}}.
        timeout: s for a request and its answer.

    Raises DiffpoError for an address that is none, and if ``key_from`` names no variable that is set.
    """

    url: str
    model: str
    key_from: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 120.0

    def __post_init__(self) -> None:
        if not ADDRESS.fullmatch(self.url):
            raise DiffpoError(f"{plain(self.url, 200)!r} is not the address of a judge: write http://HOST:PORT/v1")
        if self.key_from and not self._key():
            raise DiffpoError(
                f"the judge at {self.url} needs a key: set the environment variable {plain(self.key_from, 100)}, which "
                "the settings name as key_from"
            )

    def ask(self, pictures: Sequence[str], question: str, tokens: int, top: bool, stop: Event) -> Reply:
        """The model's most likely answer of at most ``tokens`` tokens to a question about ``pictures`` (PNG in base64,
        which come before the text). Without pictures the question is plain text, as every server takes it. ``top``:
        with the probabilities of the first token. Once another thread sets ``stop``, nothing is tried again.

        Temporary failures are tried again with growing pauses. DiffpoError that names the address and the next step.
        """
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}} for picture in pictures
        ]
        content.append({"type": "text", "text": question})
        said = content if pictures else question
        request: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": said}]}
        request |= {"max_tokens": tokens, "temperature": 0.0}
        request |= {"logprobs": True, "top_logprobs": TOP} if top else {}
        return self._reply(self._send({**request, **self.extra}, stop), top)

    def _key(self) -> str:
        return os.environ.get(self.key_from, "").strip() if self.key_from else ""

    def _send(self, request: dict[str, Any], stop: Event) -> dict[str, Any]:
        data, key = json.dumps(request).encode(), self._key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        path = urlsplit(self.url).path.rstrip("/") + "/chat/completions"
        waits = iter(WAITS)
        while True:
            asked = None
            try:
                status, said, answer = exchange(self.url, path, data, headers, self.timeout)
                if status not in BUSY:
                    return self._understood(status, answer)
                again, reason = True, f"status {status} {self._sentence(answer)}".strip()
                asked = _seconds(said.get("retry-after"))
            except (OSError, HTTPException, ValueError) as error:
                again = isinstance(error, (ConnectionError, TimeoutError, IncompleteRead))
                reason = f"no answer within {self.timeout:g} s" if isinstance(error, TimeoutError) else as_line(error)
            wait = next(waits, None)
            if wait is None or not again or stop.is_set():
                attempts = f" ({len(WAITS) + 1} attempts)" if again else ""
                raise DiffpoError(
                    f"the judge at {self.url} cannot be asked: {self._clean(reason)}{attempts}. Check that the server "
                    "runs, that url ends in /v1 if it has one, and lower parallel or raise timeout if it is slow"
                ) from None
            wait = max(wait * random.uniform(0.8, 1.2), min(asked or 0.0, LONGEST))  # noqa: S311 (spreads the load)
            line = f"the judge at {self.url}: {self._clean(reason)}; trying again in {wait:.1f} s"
            print(line, file=sys.stderr, flush=True)
            stop.wait(wait)

    def _understood(self, status: int, data: bytes) -> dict[str, Any]:
        if status == 200 and (answer := read_object(data)) is not None:
            return answer
        advice = {
            401: f"Check the key in the environment variable {self.key_from or 'that key_from names'}",
            403: f"Check the key in the environment variable {self.key_from or 'that key_from names'}",
            404: f"Check url and model ({plain(self.model, 200)})",
        }.get(status, "Check url, model and extra in the settings; a server that gives no logprobs needs numbers")
        what = f"refused (status {status}): {self._sentence(data)}" if status != 200 else "does not answer with JSON"
        raise DiffpoError(f"the judge at {self.url} {what}. {advice}")

    def _reply(self, answer: dict[str, Any], top: bool) -> Reply:
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
            first = choice["logprobs"]["content"][0]["top_logprobs"] if top else []
            found = [(str(each["token"]), math.exp(min(float(each["logprob"]), 0.0))) for each in first]
        except (KeyError, IndexError, TypeError, ValueError):
            found, text = [], None if top else ""
            text = _text_of(answer)
        if text is not None and not isinstance(text, str):
            text = None
        if text is None and not found:
            raise DiffpoError(
                f"the judge at {self.url} answers in another form than that of chat completions: "
                f"{self._clean(plain(json.dumps(answer), 200))}"
            )
        if top and not found:
            raise DiffpoError(
                f"the judge at {self.url} gives no log-probabilities (logprobs). Serve the model with vLLM or sglang, "
                "or read a number from its text with numbers instead of answers"
            )
        return Reply(text or "", found)

    def _sentence(self, data: bytes) -> str:
        """The server's own sentence on what is wrong."""
        said = (read_object(data) or {}).get("error") or (read_object(data) or {}).get("message")
        said = said.get("message") if isinstance(said, dict) else said
        return self._clean(plain(said, 300)) if isinstance(said, str) else ""

    def _clean(self, text: str) -> str:
        key = self._key()
        return text.replace(key, "***") if key else text


def _text_of(answer: dict[str, Any]) -> Any:
    try:
        return answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None


def _seconds(value: str | None) -> float | None:
    """Of the header Retry-After, if it is a number."""
    return float(value) if value and re.fullmatch(r"[0-9]{1,6}(\.[0-9]+)?", value.strip()) else None
