"""The reference policy: what the policy is compared with, and how that follows the policy.

Two references cost no weights: the policy's module with its adapter switched off (`adapter_off`), and none at all. The
moving ones (`ema`, `sync`, `accelerated`, `fast_slow`) are a second LoRA on the same module, equal to the policy's at
the start, so that every implicit reward begins at exactly 0.

What moves are the factors A and B of the LoRA, not their product dW = B A: an average of products has twice the rank.
The two differ in second order. For weights w and 1 - w on (A, B) and (A', B'),

    (w B + (1-w) B')(w A + (1-w) A') = w B A + (1-w) B' A' - w (1-w) (B - B')(A - A'),

which also holds for an extrapolation (w > 1). So with the two factors of a LoKr; a DoRA's magnitudes are averaged too.

The behaviour policy (`Behaviour`) is one more model of this kind: what sampled the round, for likelihood ratios.

Where the whole network is trained (`lora: null`) there is no adapter to switch. One frozen copy of the network then
replaces the adapter that is off, and another one the second adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..common.errors import DiffpoError
from ..config import BehaviourSettings, ReferenceSettings
from ..weights import trained
from ..weights.lora import ADAPTER, BEHAVIOUR, REFERENCE

if TYPE_CHECKING:
    from torch import Tensor

    from ..problems.policy import Policy


class Reference:
    """`adapter_off` and `none`: the base model, which never moves. The others derive from it.

    Attributes:
        policy: the policy that it belongs to, with the bare network.
        free: the objective compares with nothing (`none`): the reference's error counts as 0 and is not computed.
    """

    def __init__(self, policy: Policy, free: bool = False) -> None:
        self.policy, self.free = policy, free

    def on(self) -> contextlib.AbstractContextManager[Policy]:
        """A context whose value is the reference as a policy; no gradients within it."""
        return self.policy.switched(None)

    def after_update(self, step: int) -> None:
        """To be called after each optimiser step, on every process; ``step`` counts the updates so far, this one
        included."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, on the CPU."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put `state()` back; DiffpoError if it is another reference's."""
        if state:
            raise DiffpoError(
                f"the checkpoint holds the weights of a moving reference ({len(state)} tensors), but this run's "
                f"reference does not move. Set objective.reference.policy to its value at the start of the run"
            )


class Moving(Reference):
    """A second adapter that steps every ``settings.every`` updates (theta: the policy's weights, R: the reference's).

    ema          R <- decay R + (1 - decay) theta. TR-DPO's soft update (Gorbatovski et al. 2024, arXiv 2404.09656).
                 With ``ramp`` the decay of the n-th step is min(decay, ramp n), n from 0 (DiffusionNFT).
    sync         R <- theta. TR-DPO's hard update; iterative DPO with one round per ``every`` updates.
    accelerated  theta <- R <- theta + strength (theta - theta'), theta' the policy at the end of the round before: APO
                 (He et al. 2024, arXiv 2410.06293) takes pi_{k+1} ~ pi^ (pi^ / pi^')^strength both as the next
                 reference and as the point to start from, so this moves the policy's own weights too. The optimiser's
                 moments stay. strength 0 is sync.
    fast_slow    R <- R + (1 - decay)(theta - theta'): a slow copy that makes a fraction of every step of the policy.
                 After OFS-DPO (Qi et al. 2024, arXiv 2406.05534), which trains two LoRAs of different speed against
                 each other so that the gradient does not die as the margin to a frozen reference grows. Here the slow
                 adapter is the reference, and moves by the fast one's gradient. Left out: the slow one's own backward
                 pass, the regulariser between the two, the merging over domains (COFS-DPO).
    adapter_off  R stays: the LoRA that training started from.
    """

    def __init__(self, settings: ReferenceSettings, policy: Policy, copy: str = REFERENCE) -> None:
        """``copy``: the name of the adapter that is added."""
        super().__init__(policy)
        self.settings, self.copy, network = settings, copy, policy.network
        trained.of(network).add_copy(copy)
        self.weights, theirs = trained.of(network).parameters(copy), trained.of(network).parameters(ADAPTER)
        # theta', if the rule uses the earlier policy
        looks_back = settings.policy in ("accelerated", "fast_slow")
        self.before = {name: weight.detach().clone() for name, weight in theirs.items()} if looks_back else {}

    def on(self) -> contextlib.AbstractContextManager[Policy]:
        return self.policy.switched(self.copy)

    def after_update(self, step: int) -> None:
        import torch

        if step % self.settings.every:
            return
        decay = self.decay(step)
        with torch.no_grad():
            for name, theta in trained.of(self.policy.network).parameters(ADAPTER).items():
                self._step(name, theta, decay)

    def decay(self, step: int) -> float:
        """Of the step that is made after ``step`` updates."""
        decay, ramp = self.settings.decay, self.settings.ramp
        return min(decay, ramp * (step // self.settings.every - 1)) if ramp else decay

    def _step(self, name: str, theta: Tensor, decay: float) -> None:
        """The step of the weight ``name``, in place."""
        rule, reference = self.settings.policy, self.weights[name]
        if rule == "ema":
            reference.lerp_(theta, 1 - decay)
        elif rule == "sync":
            reference.copy_(theta)
        elif rule == "accelerated":
            before = self.before[name]
            reference.copy_(theta + self.settings.strength * (theta - before))
            before.copy_(theta)
            theta.copy_(reference)
        elif rule == "fast_slow":
            before = self.before[name]
            reference.add_(theta - before, alpha=1 - decay)
            before.copy_(theta)

    def state(self) -> dict[str, Tensor]:
        groups: dict[str, Mapping[str, Tensor]] = {"reference": self.weights, "before": self.before}
        return {f"{group}.{name}": w.detach().cpu().clone() for group, ws in groups.items() for name, w in ws.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        here: dict[str, Tensor] = {f"reference.{name}": w for name, w in self.weights.items()}
        here |= {f"before.{name}": w for name, w in self.before.items()}
        wrong = sorted(here.keys() ^ state.keys()) or [n for n in here if here[n].shape != state[n].shape]
        if wrong:
            raise DiffpoError(
                f"the checkpoint's reference does not fit objective.reference.policy={self.settings.policy} and this "
                f"LoRA, e.g. {wrong[0]}; resume with the settings from the start of the run"
            )
        for name, weight in here.items():
            weight.data.copy_(state[name])


def make(settings: ReferenceSettings, policy: Policy, started: bool = False) -> Reference:
    """The reference of ``settings`` for ``policy``: the bare network, with the policy's adapter as it starts.

    A moving reference adds its adapter, so it is made before the network is wrapped for DDP. The same holds for a
    policy that was ``started`` from another LoRA: the reference is then a second copy of that, in place of the base.
    """
    if settings.policy == "none":
        return Reference(policy, free=True)
    if settings.policy == "adapter_off" and not started:
        return Reference(policy)
    return Moving(settings, policy)


class Behaviour:
    """pi_old, the policy that samples the rounds of ``updates`` updates; it moves at the end of each.

    sync  the policy as it was when the round was sampled.
    ema   a moving average of the policy, which samples if `rollout.sampler` says so (DiffusionNFT).

    Attributes:
        same: it is the policy itself, to the last bit: at the start of a round of sync. Nothing is evaluated then, and
            log-ratios are exactly 0. Rounds of one update of sync need no copy of the weights at all.
    """

    def __init__(self, settings: BehaviourSettings, policy: Policy, updates: int) -> None:
        self.every, self.same = updates, True
        rule = {"policy": settings.policy, "every": updates, "decay": settings.decay, "ramp": settings.ramp}
        copied = settings.policy == "ema" or updates > 1
        self.moving = Moving(ReferenceSettings.model_validate(rule), policy, BEHAVIOUR) if copied else None

    def on(self) -> contextlib.AbstractContextManager[Policy]:
        """A context whose value is it as a policy; not to be called where it has no copy, as it is `same` always."""
        assert self.moving is not None  # noqa: S101 (see `same`)
        return self.moving.on()

    def after_update(self, step: int) -> None:
        """As `Reference.after_update`."""
        if self.moving is None:
            return
        self.moving.after_update(step)
        exact = self.moving.settings.policy == "sync" or self.moving.decay(step) == 0
        self.same = exact and step % self.every == 0

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, on the CPU."""
        import torch

        return {} if self.moving is None else {**self.moving.state(), "same": torch.tensor(self.same)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put `state()` back; DiffpoError if it is another one's."""
        if self.moving is None:
            return
        self.moving.load({name: weight for name, weight in state.items() if name != "same"})
        self.same = bool(state["same"])
