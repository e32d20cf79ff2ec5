"""A vision-language model as a judge: the probability of its answer to a question about the picture.

With the settings that are not named it is VQAScore (Lin et al. 2024, "Evaluating Text-to-Visual Generation with
Image-to-Text Generation", equation 1): the probability of the token "Yes". Answers in other cases ("yes") count too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..common.errors import DiffpoError
from ..common.instruction import Instruction
from ..common.text import plain
from ..config.reader import read
from .chat import Chat, Reply
from .exchange import png
from .server.protocol import NAME

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
EDIT = (
    'The second image was made from the first by the instruction "{prompt}". How well is the instruction carried out, '
    "and how well is everything kept that it does not name? Answer with one number, from 0 (not at all) to 5 (fully)."
)
EDITS = EDIT.replace("The second image was made from the first", "The last image was made from the ones before it")
MARKS = {str(mark): mark / 5 for mark in range(6)}  # what the answers to it are worth
WHICH = (
    'The first and the second image were made for the text "{prompt}". Which of them is better, if you judge how well '
    "it shows the text and how well it is made? Answer with one word: first or second."
)
CAPTION = "Describe this image in one sentence of at most 40 words. Answer with the sentence alone."
PARAPHRASE = (
    "Rewrite this caption of an image so that about {share} % of its words are other ones, with a meaning as near as "
    'that allows: "{prompt}". Answer with the new caption alone.'
)
QUOTES = "\"'\u201c\u201d\u2018\u2019 "  # around an answer
SPACE = " \t\r\n▁Ġ"  # around a token, the last two as some tokenizers write a space
MANY, SHARE = 4, 0.25  # from how many questions on, and which share of nonsense, a judge is refused


class JudgeSettings(BaseModel):
    """The settings of a judge, in the file of ``judge=FILE.yaml``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    url: str
    """Address of the server, e.g. http://localhost:8000/v1."""

    model: str
    """Name of the model there."""

    key_from: str | None = None
    """Environment variable that holds the key. null: no key."""

    name: str = "judge"
    """Name of the number; two judges that are compared need two names."""

    edits: bool = False
    """Judge edits: the pictures that the prompt is about are shown before the result. The question is then one about
    edits, and its answers are marks from 0 to 5, worth 0 to 1, unless they are set."""

    question: str = QUESTION
    """What is asked of a picture; {prompt} stands for its prompt."""

    answers: dict[str, float] | None = None
    """What each answer is worth: the score is the sum of worth x probability of the answer's token, which must be the
    first. null: {Yes: 1, No: 0}, or no answers if numbers is set."""

    normalise: bool = False
    """Divide the score by the probability of all answers together. It is needed for marks, e.g. 1 to 5."""

    numbers: dict[str, str] = Field(default_factory=dict)
    """Instead of answers: names of numbers, and for each a regular expression whose group is the number in the text."""

    better: str = WHICH
    """What is asked of two pictures, for `VlmJudge.compare`."""

    first: str = "first"
    """The answer to it that prefers the first picture."""

    second: str = "second"
    """The answer to it that prefers the second picture."""

    caption: str = CAPTION
    """What is asked for a caption of a picture, for `VlmJudge.describe`; {prompt} stands for its prompt."""

    paraphrase: str = PARAPHRASE
    """What is asked for other words of a caption, for `VlmJudge.paraphrase`, without a picture; {prompt} stands for the
    caption and {share} for the percentage of the words to change."""

    tokens: int = Field(1024, gt=0)
    """The longest answer, in tokens, if numbers is set or a caption is asked for."""

    parallel: int = Field(8, gt=0, le=256)
    """Questions asked at the same time."""

    timeout: float = Field(120.0, gt=0)
    """Seconds for a question and its answer."""

    extra: dict[str, Any] = Field(default_factory=dict)
    """Further entries of every request, e.g. {chat_template_kwargs: {enable_thinking: false}}."""

    @field_validator("answers", mode="before")
    @classmethod
    def _yes_and_no(cls, value: Any) -> Any:
        """YAML reads the bare words Yes and No as truth values."""
        if not isinstance(value, dict):
            return value
        words = {True: "Yes", False: "No"}
        return {words[key] if isinstance(key, bool) else str(key): worth for key, worth in value.items()}

    @model_validator(mode="before")
    @classmethod
    def _of_edits(cls, given: Any) -> Any:
        """The defaults of a judge of edits."""
        if not isinstance(given, dict) or given.get("edits") is not True:
            return given
        asked = {"question", "answers", "numbers"} & given.keys()
        return given if asked else {"question": EDIT, "answers": MARKS, "normalise": True} | given

    @model_validator(mode="after")
    def _parts_fit(self) -> JudgeSettings:
        if self.numbers and self.answers:
            raise ValueError("answers and numbers are two ways to read an answer: set one of them")
        if self.answers is not None and len({_word(each) for each in self.answers} - {""}) != len(self.answers):
            raise ValueError("answers must be different words, upper and lower case being the same")
        for name, pattern in self.numbers.items():
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"numbers.{name} is not a regular expression: {error}") from None
            if groups != 1:
                raise ValueError(f"numbers.{name} needs one group in brackets, which is the number; it has {groups}")
        for name in self.names:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a number: use letters, digits, '.', '_' and '-'")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.name}.{each}" for each in self.numbers) or (self.name,)

    @property
    def worth(self) -> dict[str, float]:
        return {"Yes": 1.0, "No": 0.0} if self.answers is None else self.answers


class Comparison(NamedTuple):
    """``value`` (n,): probability that the first picture of a pair is better, the mean of both orders. ``by_order``
    (n, 2): the same with the pair shown as it is, and swapped; a judge without a liking for a place has equal ones."""

    value: np.ndarray
    by_order: np.ndarray


class VlmJudge:
    """The judge of `JudgeSettings`. ``nonsense`` of ``asked`` answers could not be read; those scores are NaN.

    Raises DiffpoError from `score` and `compare` if the server fails, or if a quarter of the answers is nonsense.
    """

    optional: frozenset[str] = frozenset()

    def __init__(self, settings: JudgeSettings) -> None:
        self.settings, self.names = settings, settings.names
        self.chat = Chat(settings.url, settings.model, settings.key_from, settings.extra, settings.timeout)
        self.reads_prompt = "{prompt}" in settings.question
        self.asked = self.nonsense = 0

    @classmethod
    def load(cls, source: str | None, device: str) -> VlmJudge:
        """``source``: the YAML file of the settings. The server is not asked."""
        if source is None:
            raise DiffpoError("the scorer judge needs its settings: judge=FILE.yaml with url and model (docs/score.md)")
        if not Path(source).is_file():
            raise DiffpoError(f"there is no file {plain(source, 300)} with the settings of a judge (docs/score.md)")
        return cls(read(source, [], JudgeSettings))

    def score(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        settings, before = self.settings, [self._before(prompt) for prompt in prompts]
        asked = [[*shown, image] for shown, image in zip(before, images, strict=True)]
        own = settings.question != EDIT  # which is about one picture
        questions = [settings.question if own or len(shown) == 1 else EDITS for shown in before]
        if settings.numbers:
            replies = self._ask(asked, questions, prompts, settings.tokens, False)
            rows = [[_number(pattern, reply.text) for pattern in settings.numbers.values()] for reply in replies]
        else:
            replies = self._ask(asked, questions, prompts, 1, True)
            rows = [[_expected(reply, settings.worth, settings.normalise)] for reply in replies]
        values = np.array(rows, np.float64).reshape(len(images), len(self.names))
        expected = f"one of {', '.join(settings.worth)}" if not settings.numbers else "text with the numbers"
        self._count(np.isnan(values.sum(1)), replies, expected)
        return {name: values[:, number] for number, name in enumerate(self.names)}

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """DiffpoError if edits are judged and a prompt has no picture that it is about."""
        for prompt in prompts if self.settings.edits else ():
            self._before(prompt)

    def _before(self, prompt: str) -> list[Image.Image]:
        """The pictures that are shown before the result of a prompt, of a judge of edits."""
        if not self.settings.edits:
            return []
        if not isinstance(prompt, Instruction):
            raise DiffpoError(
                f"the judge {self.settings.name} judges edits, and no picture is known that {plain(prompt, 100)!r} is "
                f"about: name their column with --source or data.columns.source"
            )
        return prompt.pictures()

    def compare(self, images: list[Image.Image], others: list[Image.Image], prompts: list[str]) -> Comparison:
        """How probably each of n ``images`` is better than the one of ``others`` at its place, asked in both orders, so
        that a liking for the first or the second place cancels."""
        settings, orders = self.settings, []
        for pairs, first in (
            (zip(images, others, strict=True), settings.first),
            (zip(others, images, strict=True), settings.second),
        ):
            replies = self._ask([list(pair) for pair in pairs], settings.better, prompts, 1, True)
            worth = {settings.first: 0.0, settings.second: 0.0, first: 1.0}
            orders.append(np.array([_expected(reply, worth, True) for reply in replies], np.float64))
            self._count(np.isnan(orders[-1]), replies, f"{settings.first} or {settings.second}")
        by_order = np.stack(orders, 1)
        return Comparison(by_order.mean(1), by_order)

    def describe(self, images: list[Image.Image], prompts: list[str]) -> list[str]:
        """What the model says of each of n pictures; empty where it says nothing."""
        settings = self.settings
        replies = self._ask([[image] for image in images], settings.caption, prompts, settings.tokens, False)
        return [reply.text.strip() for reply in replies]

    def paraphrase(self, captions: list[str], share: float) -> list[str]:
        """Each of n captions with about a ``share`` of its words changed, from 0 to 1; empty where the model says
        nothing. A language model without eyes is enough."""
        question = self.settings.paraphrase.replace("{share}", f"{100 * share:.0f}")
        replies = self._ask([[]] * len(captions), question, captions, self.settings.tokens, False)
        return [reply.text.strip().strip(QUOTES) for reply in replies]

    def _ask(
        self,
        pictures: Sequence[Sequence[Image.Image]],
        questions: str | Sequence[str],
        prompts: Sequence[str],
        tokens: int,
        top: bool,
    ) -> list[Reply]:
        """``questions``: one for all, or one for each."""
        each = [questions] * len(prompts) if isinstance(questions, str) else questions
        stop = Event()  # a question failed: the others need no further attempts

        def ask(item: tuple[Sequence[Image.Image], str, str]) -> Reply:
            shown, question, prompt = item
            text = question.replace("{prompt}", prompt)
            return self.chat.ask([png(each) for each in shown], text, tokens, top, stop)

        pool = ThreadPoolExecutor(self.settings.parallel)
        try:
            return list(pool.map(ask, list(zip(pictures, each, prompts, strict=True))))
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _count(self, bad: np.ndarray, replies: Sequence[Reply], expected: str) -> None:
        self.asked += len(bad)
        self.nonsense += int(bad.sum())
        if self.asked >= MANY and self.nonsense > SHARE * self.asked:
            reply = replies[int(bad.argmax())]
            example = reply.text or (max(reply.top, key=lambda each: each[1])[0] if reply.top else "")
            raise DiffpoError(
                f"the judge {plain(self.settings.model, 200)} at {self.settings.url} gave {self.nonsense} answers of "
                f"{self.asked} that cannot be read, e.g. {plain(repr(example), 120)}, where {expected} is expected. "
                "Correct question and answers (or numbers) in its settings. A model that thinks first needs, for "
                "example, extra: {chat_template_kwargs: {enable_thinking: false}}"
            )


def _word(token: str) -> str:
    return token.strip(SPACE).casefold()


def _expected(reply: Reply, worth: dict[str, float], normalise: bool) -> float:
    """The answers' worth, weighted by their probabilities; NaN if the likeliest token is none of them."""
    known = {_word(answer): value for answer, value in worth.items()}
    if not reply.top or _word(max(reply.top, key=lambda each: each[1])[0]) not in known:
        return float("nan")
    found = [(known[_word(token)], probability) for token, probability in reply.top if _word(token) in known]
    value, mass = sum(value * each for value, each in found), sum(each for _, each in found)
    return value / mass if normalise else value


def _number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    try:
        value = float(found[1]) if found else float("nan")
    except (TypeError, ValueError):  # the group took no part, or holds no number
        return float("nan")
    return value if abs(value) < float("inf") else float("nan")
