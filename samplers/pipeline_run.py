"""Where a run through a pipeline stands between two steps of `SolverScheduler`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ._table import ANCHOR
from .plan import Plan, State, randn


@dataclass(frozen=True, eq=False)
class Run:
    """A value, replaced at each step."""

    plan: Plan  # its calls, from the one that it began with
    first: int  # the entry of `timesteps` that it began with
    k: int = 0  # the plan's next call
    state: State | None = None  # None before the first call
    returned: torch.Tensor | None = None  # what the pipeline got of the state
    version: int = 0  # of that tensor then

    @property
    def index(self) -> int:
        """The entry of `timesteps` of the next call."""
        return self.first + self.k

    def beside(self, sample: torch.Tensor) -> Run:
        """The run with coefficients that vary over the sample on the sample's device, in the state's dtype."""
        plan = self.plan.to(sample.device, torch.promote_types(sample.dtype, torch.float32))
        return self if plan is self.plan else replace(self, plan=plan)

    def then(self, state: State, dtype: torch.dtype) -> Run:
        """The run after its next call led to `state`; the pipeline gets it in `dtype`."""
        returned = state.input.to(dtype)
        if returned is state.input is not state.anchor:
            returned = returned.clone()  # so that an edit in place leaves the state alone
        return replace(self, k=self.k + 1, state=state, returned=returned, version=_version(returned))

    def noise(self, state: State, generator, given: torch.Tensor | None) -> torch.Tensor | None:
        """The noise of the next call, in the state's dtype; None if it adds none."""
        if not self.plan.needs_noise(self.k):
            return None
        x = state.input
        return (randn(x.shape, generator, x.device, x.dtype) if given is None else given).to(x.dtype)

    def state_at(self, sample: torch.Tensor) -> State:
        """The state to step from: this run's, in full precision, if the pipeline left the sample alone; else one at
        the pipeline's sample."""
        state = self.state
        if state is None:
            if not self.plan.start[:, 1].any():
                return self.plan.begin(sample)
            # Noise before the first call is already in the pipeline's latents (init_noise_sigma, add_noise): they are
            # at the level of the first label.
            x = sample.to(torch.promote_types(sample.dtype, torch.float32))
            return State(x, x, ())
        if sample is self.returned and _version(sample) == self.version:
            return state
        given = sample.to(state.input.dtype)
        if state.anchor is state.input:
            return state._replace(input=given, anchor=given)
        # Move the anchor so that it would have led to this input: both came from the last anchor with these slopes.
        of_input, of_anchor = self.plan.rows[self.k - 1, :, ANCHOR]
        slope = float(of_anchor / of_input) if of_input and of_anchor else 1.0
        return state._replace(input=given, anchor=state.anchor + (given - state.input) * slope)


def _version(x: torch.Tensor) -> int:
    """Changes when a tensor is written in place (not tracked in inference mode)."""
    return -1 if x.is_inference() else x._version
