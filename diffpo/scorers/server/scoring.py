"""The queue of complete requests: two threads decode them and score them, one at a time."""

from __future__ import annotations

import asyncio
import base64
import math
import queue
import threading
import traceback
from typing import Any

from ...common.errors import DiffpoError
from ...common.instruction import Instruction
from .body import decode, parse
from .protocol import Limits, Refused

THREADS = 2


class ScoringQueue:
    """Bodies of requests, and their answers by ``scorer`` (`diffpo.scorers.Scorer`), which one thread at a time calls.

    Two threads work between `start` and `stop`, so that one request is decoded while another is scored.
    """

    def __init__(self, scorer: Any, limits: Limits) -> None:
        self.scorer, self.limits, self.lock = scorer, limits, threading.Lock()
        self.work: queue.SimpleQueue = queue.SimpleQueue()

    def start(self) -> None:
        for _ in range(THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def stop(self) -> None:
        """Let the threads end after what they have begun."""
        for _ in range(THREADS):
            self.work.put(None)

    def put(self, body: bytes | bytearray, done: asyncio.Future) -> None:
        """Score ``body``; ``done`` gets status and content, in its own loop."""
        self.work.put((body, done))

    def _work(self) -> None:
        for body, done in iter(self.work.get, None):
            try:
                answer = 200, self.score(body)
            except Refused as refused:
                answer = refused.status, {"error": refused.sentence}
            except Exception as error:  # unforeseen; the server goes on
                traceback.print_exc()
                answer = 500, {"error": f"the server failed: {type(error).__name__}"}
            try:
                done.get_loop().call_soon_threadsafe(_settle, done, answer)
            except RuntimeError:  # the server has stopped
                return
            del body, done  # not kept until the next request

    def score(self, body: bytes) -> dict:
        """The answer to a request's body. Raises Refused."""
        pictures, prompts, sources = parse(body, self.limits.max_images)
        images = [decode(f"image {k}", picture, self.limits.max_pixels) for k, picture in enumerate(pictures)]
        prompts = [self.instruction(k, prompt, sources[k]) for k, prompt in enumerate(prompts)]
        try:
            with self.lock:
                scores = self.scorer.score(images, prompts)
        except DiffpoError as error:
            raise Refused(422, str(error)) from None
        except Exception as error:  # whatever a model raises; the server goes on
            traceback.print_exc()
            raise Refused(500, f"the scorer failed: {type(error).__name__}: {error}") from None
        return {"scores": {name: self.numbers(name, scores, prompts) for name in self.scorer.names}}

    def instruction(self, k: int, prompt: str, sources: list[str]) -> str:
        """The prompt of image ``k``, with the pictures that it is about if there are any. Raises Refused."""
        if not sources:
            return prompt
        for number, each in enumerate(sources):
            decode(f"source {number} of image {k}", each, self.limits.max_pixels)
        return Instruction(prompt, [base64.b64decode(each) for each in sources])

    def numbers(self, name: str, scores: Any, prompts: list[str]) -> list[float | None]:
        """The scorer's numbers ``name``, None for NaN where the scorer calls that optional. Raises Refused."""
        try:
            found = [float(value) for value in scores[name]]
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(500, f"the scorer gave no numbers {name!r} ({type(error).__name__}: {error})") from None
        if len(found) != len(prompts):
            raise Refused(500, f"the scorer gave {len(found)} numbers {name!r} for {len(prompts)} images")
        for k, value in enumerate(found):
            if not math.isfinite(value) and not (math.isnan(value) and name in self.scorer.optional):
                raise Refused(500, f"the scorer gave {name} = {value} for image {k} of the prompt {prompts[k]!r}")
        return [None if math.isnan(value) else value for value in found]


def _settle(done: asyncio.Future, answer: tuple[int, dict]) -> None:
    if not done.done():  # its client may be gone
        done.set_result(answer)
