"""How the pictures of one arm are made: one value, from the command line to the manifest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..common.errors import DiffpoError

ARMS = ("base", "tuned")  # unless they are named
CALLS = 20  # of the model for a picture, unless it is said
# the keys of a manifest row that say how its picture was made, in their order there
RECORDED: tuple[str, ...] = ("lora", "lora_hash", "lora_weight", "user_pairs", "user_hash", "model", "model_hash")
RECORDED += ("user_features", "steer", "negative_lora", "negative_lora_hash", "negative_lora_weight", "base_calls")
RECORDED += ("steps", "solver", "plan", "plan_hash", "guidance", "negative_prompt", "height", "width", "dtype")
# those that two pictures of one folder share: names of files may differ, their content may not
COMPARED = tuple(
    key
    for key in RECORDED
    if key not in ("lora", "negative_lora", "user_pairs", "user_features", "steer", "model", "plan")
)
# what base and tuned pictures differ in
OF_ARM = {"lora_hash", "lora_weight", "user_hash", "negative_lora_hash", "negative_lora_weight", "base_calls"}


Dtype = Literal["float32", "bfloat16", "float16"]  # of the model


@dataclass(frozen=True)
class Generation:
    """How the pictures of one arm are made. The defaults of every verb that makes pictures stand here.

    Attributes:
        model: a pipeline folder, a hub id or one file; ``model_config`` then gives the configs (`Model.config`).
        family: a model family from outside, as `Model.family`.
        lora: a LoRA file or the folder of a run; ``lora_weight``: its strength, None is 1.
        negative_lora: a LoRA for the unconditional half of guidance (weights/unconditional.py), and
            ``negative_lora_weight``, its strength; None is 1.
        user_pairs: pairs of the user to personalise for (objective/users.py), seen by ``user_features`` if the LoRA
            was trained with these (objective.taste); steer: the weights of the rewards that
            a LoRA was trained with (objective/steering.py), e.g. "following:0.7 appearance:0.3".
        base_calls: how many of the first calls are made without the LoRA (base_calls.py); None is 0.
        seed: the first of ``images_per_prompt`` seeds of every prompt.
        steps: model calls per picture; None is 20, or those of the plan.
        solver: a name in `samplers.solvers.SOLVERS`; None is `samplers.default_solver`, or the plan.
        plan: the file of a plan (`diffpo calibrate`), in place of a solver; ``any_model``: also one of another model.
        height, width: pixels; None is the model's own size.
        batch_size, device: of the computation; they do not belong to the picture and are not recorded.
        paths: of how many prompts to keep the denoising path (`diffpo.evaluation.paths`); not recorded either.
        model_hash, lora_hash, negative_lora_hash, user_hash, plan_hash: the content behind the names, which
            `generate.run` fills in.

    Raises DiffpoError if a number is out of range.
    """

    model: str
    model_config: str | None = None
    family: str | None = None
    lora: str | None = None
    lora_weight: float | None = None
    negative_lora: str | None = None
    negative_lora_weight: float | None = None
    user_pairs: str | None = None
    user_features: str | None = None
    steer: str | None = None
    base_calls: int | None = None
    seed: int = 0
    images_per_prompt: int = 1
    steps: int | None = None
    solver: str | None = None
    plan: str | None = None
    any_model: bool = False
    guidance: float = 5.0
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    dtype: Dtype = "float32"
    batch_size: int = 8
    device: str | None = None
    paths: int = 0
    model_hash: str | None = None
    lora_hash: str | None = None
    negative_lora_hash: str | None = None
    user_hash: str | None = None
    plan_hash: str | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise DiffpoError("no model is named: pass --model, or --images with a folder of pictures to compare")
        for name in ("model", "model_config", "lora", "negative_lora", "user_pairs", "plan"):
            if isinstance(value := getattr(self, name), Path):
                object.__setattr__(self, name, str(value))
        object.__setattr__(self, "guidance", float(self.guidance))
        for name in ("lora", "negative_lora"):
            weight = getattr(self, f"{name}_weight")
            if weight is None:
                continue
            if getattr(self, name) is None or not math.isfinite(weight):
                option = name.replace("_", "-")
                raise DiffpoError(f"the strength {weight} of a LoRA: give a number, and the LoRA with --{option}")
            object.__setattr__(self, f"{name}_weight", None if weight == 1 else float(weight))
        if self.steps is None and self.plan is None:
            object.__setattr__(self, "steps", CALLS)
        for name in ("steps", "batch_size", "images_per_prompt"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DiffpoError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.paths < 0:
            raise DiffpoError(f"paths must be at least 0, not {self.paths}")
        self._check_base_calls()
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and (value < 8 or value % 8):
                raise DiffpoError(f"{name} must be a multiple of 8, not {value}")
        if not -(2**63) < self.seed <= 2**63 - self.images_per_prompt:
            raise DiffpoError(f"seed must fit in 64 bits; {self.seed} does not")
        if not math.isfinite(self.guidance):
            raise DiffpoError(f"guidance must be a number, not {self.guidance}")
        if self.negative_lora is not None and self.guidance <= 1:
            raise DiffpoError("--negative-lora is for the unconditional half of guidance: set --guidance above 1")
        for name in ("user_pairs", "steer"):
            if getattr(self, name) is not None and self.lora is None:
                raise DiffpoError(f"--{name.replace('_', '-')} personalises a tuned model: name its LoRA with --lora")
        if self.user_features is not None and self.user_pairs is None:
            raise DiffpoError("--user-features see the pairs of a user: name these with --user-pairs")
        if self.user_pairs is not None and self.steer is not None:
            raise DiffpoError("--user-pairs and --steer are for different LoRAs: leave out one of them")
        if self.plan is not None and self.solver is not None:
            raise DiffpoError("--plan has a solver of its own: leave out --solver, or --plan")

    def _check_base_calls(self) -> None:
        calls = self.base_calls or None
        object.__setattr__(self, "base_calls", calls)
        if calls is None:
            return
        if calls < 0 or (self.steps is not None and calls >= self.steps):
            raise DiffpoError(f"--base-calls {calls} leaves no call to the LoRA: there are {self.steps} calls")
        if self.lora is None or self.negative_lora is not None:
            raise DiffpoError("--base-calls switches off the LoRA of --lora: name it, and leave out --negative-lora")

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.images_per_prompt)

    def base(self) -> Generation:
        """The same without the LoRA, and without the negative one."""
        base = replace(self, user_pairs=None, user_features=None, steer=None, user_hash=None, base_calls=None)
        base = replace(base, lora=None, lora_hash=None, lora_weight=None)
        return replace(base, negative_lora=None, negative_lora_hash=None, negative_lora_weight=None)

    def arms(self) -> dict[str, Generation]:
        """The arms that are compared: without the LoRAs and, if there are any, with them."""
        return {"base": self.base()} | ({} if self.lora is None and self.negative_lora is None else {"tuned": self})

    def recorded(self) -> dict[str, Any]:
        """Its entries in a manifest row."""
        return {key: getattr(self, key) for key in RECORDED}

    @classmethod
    def of(cls, row: dict[str, Any]) -> Generation:
        """The value that a row of `diffpo generate` was made from; the inverse of `recorded`."""
        recorded: dict[str, Any] = {key: row.get(key) for key in RECORDED}
        return cls(seed=row["seed"], **recorded)
