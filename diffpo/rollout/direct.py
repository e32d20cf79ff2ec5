"""Reward fine-tuning: the policy's own images, with the gradient of their score through the sampler.

DRaFT (Clark et al. 2023, arXiv 2309.17400), AlignProp (Prabhudesai et al. 2023, arXiv 2310.03739) and ReFL (Xu et al.
2023, arXiv 2304.05977) differ in the calls that the gradient goes through. The activations of one call are kept at a
time (`samplers.gradients`), so that memory does not depend on their number.

Draws are addressed by a position, which counts images since the start of training, and what an update draws for all of
its images by the number of the update. So neither resuming, nor the batch size, nor the number of processes matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from samplers import convert, gradients

from ..common.errors import DiffpoError
from ..common.rng import generator, normal
from ..config import ObjectiveSettings
from ..data.order import order
from ..objective.reward import squared_error
from ..problems.policy import Policy
from ..problems.regression import Conditioning, Regression
from ..problems.transitions import sampler_plan
from ..scorers.judge import Judge
from ..scorers.step.base import finite
from ..scorers.step.load import load as load_step_scorer
from .prompts import PromptConditions


class Direct:
    """A feed (train/feeds.py) whose losses need no regression: `losses`.

    ``policy`` holds the bare network. ``data``: the regression problems of data.train at some positions, for `sft`.
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        conditions: PromptConditions,
        policy: Policy,
        seed: int,
        data: Callable[[Sequence[int]], Regression] | None = None,
    ) -> None:
        self.settings, self.conditions, self.seed, self.data = settings, conditions, seed, data
        self.family, self.device = policy.family, policy.device
        self.plan, self.times = sampler_plan(settings.rollout, policy.family.schedule(), policy.family.prediction)
        self.shape = self.family.latent_shape(policy.network, conditions.resolution)
        self.rate = _reward(settings, policy)
        self._step = 0

    # ---- a feed

    def begin(self, step: int) -> dict[str, float]:
        self._step = step
        return {}

    def regression(self, positions: Sequence[int]) -> Regression | None:
        return None

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass

    # ---- the losses

    def losses(self, policy: Policy, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Losses with gradients, and scores, (n,) each, of the images at ``positions``. The policy is the one that is
        trained, perhaps in its DDP wrapper."""
        rows = [order(self.seed, len(self.conditions.prompts), position) for position in positions]
        captions = [self.conditions.prompts[row] for row in rows]
        given = self.conditions(rows, self.settings.rollout.guidance)
        draws = [generator(self.seed, "reward noise", position) for position in positions]
        x = normal(draws, self.shape).to(self.device)
        scores = self._scores(policy, x, draws, given, captions)
        ceiling = self.settings.direct.ceiling
        capped = scores if ceiling is None else scores.clamp(max=ceiling)
        losses = -self.settings.link_weight * capped
        if self.settings.sft and self.data is not None:
            problem = self.data(positions)
            error = squared_error(policy.predict(problem), problem.target)
            losses = losses + self.settings.sft * problem.judgement.by_member(error)[0]
        return losses, scores.detach()

    def _scores(
        self, policy: Policy, x: Tensor, draws: list[torch.Generator], given: Conditioning, captions: list[str]
    ) -> Tensor:
        direct, calls = self.settings.direct, self._drawn()
        model = self._model(policy, given)
        if direct.truncation == "one_step":
            first = len(self.plan) - calls
            with torch.no_grad():
                state = self._begin(x, draws)
                for k in range(first):
                    noise = normal(draws, x.shape[1:]).to(x) if self.plan.needs_noise(k) else None
                    state = self.plan.step(k, state, model(state.input, self._label(k)), noise)
            return self.rate(self._x_0(model, first, state.input), captions, given)
        if direct.copies == 1:
            return self.rate(gradients.sample(self.plan, model, x, noise=draws, last=calls), captions, given)
        x_0 = gradients.sample(self.plan, model, x, noise=draws, last=0)
        k, found = len(self.plan) - 1, []
        for _ in range(direct.copies):
            z = normal(draws, x.shape[1:]).to(x)
            noised = float(self.plan.alpha[k]) * x_0 + float(self.plan.sigma[k]) * z
            found.append(self.rate(self._x_0(model, k, noised), captions, given))
        return torch.stack(found).mean(0)

    def _drawn(self) -> int:
        """The calls that the gradient goes through in this update; one_step: how many are left where sampling stops."""
        direct = self.settings.direct
        most = direct.calls or len(self.plan)
        if direct.truncation == "fixed":
            return most
        draw = generator(self.seed, "reward truncation", self._step)
        return 1 + int(torch.randint(most, (), generator=draw))

    def _model(self, policy: Policy, given: Conditioning) -> Callable[[Tensor, Tensor], Tensor]:
        """The policy, called with the plan's labels."""
        labels = torch.tensor(self.plan.label, dtype=torch.float32, device=self.device)
        times = torch.tensor(self.times, device=self.device)

        def model(x: Tensor, label: Tensor) -> Tensor:
            t = times[(labels - label).abs().argmin()]  # no copy to the CPU
            return policy.output(x, t.expand(len(x)), given).float()

        return model

    def _label(self, k: int) -> Tensor:
        return torch.tensor(float(self.plan.label[k]), device=self.device)

    def _begin(self, x: Tensor, draws: list[torch.Generator]) -> Any:
        return self.plan.begin(x, normal(draws, x.shape[1:]).to(x) if self.plan.start[:, 1].any() else None)

    def _x_0(self, model: Callable[[Tensor, Tensor], Tensor], k: int, x: Tensor) -> Tensor:
        """What the policy takes for x_0 at call k, with the gradient of that call."""
        alpha, sigma = float(self.plan.alpha[k]), float(self.plan.sigma[k])
        return convert(x, model(x, self._label(k)), self.family.prediction, "sample", alpha, sigma)


def _reward(settings: ObjectiveSettings, policy: Policy) -> Callable[[Tensor, list[str], Conditioning], Tensor]:
    """(n, C, h, w) x_0, captions and conditioning -> (n,) scores with gradients by x_0.

    DiffpoError for a scorer without gradients.
    """
    rollout, family = settings.rollout, policy.family
    if rollout.step_scorer is None:
        judge = Judge(rollout.scorers, policy.device)
        judge.require_gradients()

        def of_pictures(x_0: Tensor, captions: list[str], given: Conditioning) -> Tensor:
            return judge.rate((family.decoded(x_0) / 2 + 0.5).clamp(0, 1), captions)[:, 0].float()

        return of_pictures
    scorer = load_step_scorer(rollout.step_scorer, family, policy.network)
    rate, name = getattr(scorer, "rate", None), f"objective.rollout.step_scorer={rollout.step_scorer}"
    if rate is None:
        raise DiffpoError(f"{name} has no gradient, which source reward needs: name a folder of `diffpo train-scorer`")

    def of_latents(x_0: Tensor, captions: list[str], given: Conditioning) -> Tensor:
        t = torch.zeros(len(x_0), dtype=torch.long, device=x_0.device)  # a finished picture
        return finite(rate(x_0, x_0, t, captions, given.cond), name, captions)

    return of_latents
