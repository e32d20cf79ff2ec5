"""CFG++ (Chung et al. 2024, arXiv 2406.08070): denoise with the guided x_0, add the noise of the unconditional output.

DDIM with guidance takes both x_0 and eps from the guided output. CFG++ takes eps from the unconditional one:

    x_t = alpha_t x_0(guided) + sigma_t eps(uncond)

Written for any plan, the solver steps from the state x~ = alpha_s x_0(guided) + sigma_s eps(uncond), as if the network
had said exactly that there. For a first-order plan it is the paper's formula. A multistep plan also keeps these
outputs as its history: x_0 of the guided output with target='sample', eps of the unconditional one with 'epsilon'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ._table import State, Table
from .prediction import PREDICTIONS, conversion, fitting


@dataclass(frozen=True)
class CFGPlusPlus:
    """CFG++ guidance in `sample` and `Plan.run`, in place of a `Guidance`.

    The state is changed at every call, so a guidance of the same scale is stronger with more steps, and there is no ODE
    that the result converges to.

    Args:
        scale: lambda of the paper, usually 0 to 1 (0.6 is about CFG 7.5 at 50 steps): 0 is the unconditional model,
            1 denoises with the conditional one.
        uncond: the unconditional model, called as `uncond(x, t)`. A guided pair counts as one model call.
    """

    scale: float
    uncond: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def __call__(
        self, plan: Table, k: int, state: State, inputs: tuple[torch.Tensor, torch.Tensor], cond: torch.Tensor
    ) -> tuple[State, torch.Tensor]:
        """The state and the output that call k goes on with.

        Args:
            plan, k, state: before the call. The plan must have passed `check`.
            inputs: (x, t) as the model got them. cond: what it returned.
        """
        uncond = fitting(state.input, self.uncond(*inputs), "the unconditional model returned")
        return renoised(plan, k, state, uncond + self.scale * (cond - uncond), uncond)

    @staticmethod
    def check(plan: Table, threshold: Callable | None = None) -> None:
        """That CFG++ is defined for the plan.

        Raises:
            ValueError: a step makes several calls, so that its calls do not all see the state that is stepped from. Or
                a threshold is asked for, which would have to act on two outputs.
        """
        if threshold is not None:
            raise ValueError("CFG++ and threshold= cannot be combined: leave out threshold=")
        starts = bool((plan.start[0] == plan.start[1]).all())
        if not (starts and (plan.rows[:, 0] == plan.rows[:, 1]).all()):
            raise ValueError(
                f"CFG++ needs a plan whose steps make one call each, such as dpmpp, euler or er_sde, not {plan.name!r}"
            )


def renoised(
    plan: Table, k: int, state: State, guided: torch.Tensor, uncond: torch.Tensor
) -> tuple[State, torch.Tensor]:
    """The state x~ before call k of a plan, and the output that has x_0 of `guided` and eps of `uncond`.

    Both are outputs at `state.input`, of the plan's kind of prediction.
    """
    alpha, sigma = float(plan.alpha[k]), float(plan.sigma[k])
    of_x0, _ = PREDICTIONS[plan.prediction](alpha, sigma)
    _, scale = conversion(plan.prediction, "sample", alpha, sigma)
    change = scale * (guided - uncond)  # of x_0
    following = state.input + alpha * change
    return state._replace(input=following, anchor=following), uncond + of_x0 * change
