"""Which compositions of source, error, reference, link, ... make sense; the others are refused with the reason.

Without torch: the config asks while it is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import Config, ObjectiveSettings

REWARDS = {"chosen", "rejected", "reward", "rewards"}  # what links call rewards
OF_REFERENCE = {"chosen_reference_error", "rejected_reference_error", "chosen_drift", "rejected_drift"}
OF_REFERENCE |= {"reference_error", "drift"}
TRANSITIONS = ("trajectory", "pool")  # sources whose problems are steps of a sampler


def problem(objective: ObjectiveSettings) -> str | None:
    """Why the settings of `objective:` make no sense together; None if they do."""
    return _link(objective) or _reference(objective) or _terms(objective) or _source(objective)


def run_problem(config: Config) -> str | None:
    """Why the objective and the rest of the config make no sense together; None if they do."""
    objective, data = config.objective, config.data
    from_data = not objective.on_policy or objective.source == "self_play"
    if from_data and data.train is None:
        return f"objective {objective.name} learns from data: set data.train"
    if not from_data and data.prompts is None and objective.rollout.labels is None:
        return (
            f"objective {objective.name} (source {objective.source}) samples for prompts of its own: set data.prompts, "
            f"e.g. to a text file with one prompt in a line"
        )
    if config.lora is None and config.model.base_weights != "full":
        return f"model.base_weights={config.model.base_weights} cannot be trained, only a LoRA on them: set lora.rank=8"
    if config.lora is not None and config.lora.kind != "lora" and config.model.base_weights != "full":
        return (
            f"lora.kind={config.lora.kind} needs the base's weights as they are: set model.base_weights=full, or "
            f"lora.kind=lora"
        )
    if config.train.compile and config.model.base_weights == "fp8":
        return "train.compile would break off at each layer that is kept as fp8: set train.compile=false"
    if objective.users and config.lora is None:
        return "objective.users trains tokens beside a LoRA, and lora=null trains the whole network: set lora.rank=8"
    if objective.users and data.columns.user is None:
        return "objective.users needs to know whose preference a pair is: name the column with data.columns.user=NAME"
    if objective.users and not (data.cache_latents and data.crop == "center" and not data.flip):
        return (
            "objective.users reads tastes from cached latents: set data.cache_latents=true, data.crop=center and "
            "data.flip=false"
        )
    if data.buckets and (data.curriculum > 1 or objective.on_policy or objective.users):
        other = "data.curriculum" if data.curriculum > 1 else "objective.users" if objective.users else objective.name
        return f"data.buckets gives each update pictures of one size, which {other} does not go with"
    if data.buckets and (
        objective.weighting == "measured" or (objective.source == "inversion" and objective.inversion.cache)
    ):
        other = "objective.weighting=measured" if objective.weighting == "measured" else "objective.inversion.cache"
        return f"data.buckets gives pictures of several sizes, and {other} mixes them in a batch"
    if data.curriculum > 1 and objective.on_policy:
        return "data.curriculum orders the pairs of data.train, and this objective samples its own"
    return None


def _link(objective: ObjectiveSettings) -> str | None:
    from . import links

    try:
        links.check(objective.link, objective.link_options)
    except ValueError as error:
        return str(error)
    return None


def _reference(objective: ObjectiveSettings) -> str | None:
    from . import links

    needs, free = set(links.needs(objective.link)), objective.reference.policy == "none"
    if free and needs & OF_REFERENCE:
        return f"link {objective.link} compares with the reference, and reference.policy is none"
    if free and objective.source in TRANSITIONS:
        return (
            f"source {objective.source} compares likelihoods of transitions with the reference's, and reference.policy "
            f"is none"
        )
    if free and objective.divergence != "reverse_kl":
        return f"divergence {objective.divergence} is one between policy and reference, and reference.policy is none"
    if not free and not needs & (REWARDS | OF_REFERENCE):
        return (
            f"link {objective.link} reads no reference, which would be evaluated for nothing: set reference.policy=none"
        )
    return None


def _terms(objective: ObjectiveSettings) -> str | None:
    from . import links

    kind, needs = links.kind(objective.link), set(links.needs(objective.link))
    if objective.users and objective.on_policy:
        return "users are known by their pairs in the data, and this objective samples its own: set users=false"
    if objective.users and kind != "pair":
        return f"users are known by pairs, and link {objective.link} takes no pairs: set users=false"
    if not needs & REWARDS:
        for key, default in {"clip": None, "divergence": "reverse_kl", "weighting": "uniform"}.items():
            if getattr(objective, key) != default:
                return f"{key} changes rewards, and link {objective.link} reads errors"
    if objective.clip is not None and objective.source not in TRANSITIONS:
        return (
            f"clip bounds the likelihood ratio of a transition, and source {objective.source} has none (only "
            f"{' and '.join(TRANSITIONS)} do)"
        )
    if objective.weighting == "measured" and objective.on_policy:
        return "weighting=measured is measured on data, and this objective samples its own; use uniform or min_snr"
    if objective.winner_safeguard is not None:
        if kind != "pair":
            return f"winner_safeguard protects the chosen image of a pair, and link {objective.link} takes no pairs"
        if objective.error != "squared":
            return "winner_safeguard uses the gradient of the squared error; set error=squared"
    if objective.error == "perceptual" and objective.source in TRANSITIONS:
        return f"source {objective.source} needs error=squared: the log-likelihood of a transition is a squared error"
    if objective.error == "perceptual" and needs & {"drift", "chosen_drift", "rejected_drift"}:
        return f"link {objective.link} needs error=squared: it sets errors against distances of predictions"
    return None


def _source(objective: ObjectiveSettings) -> str | None:
    from . import links

    kind, needs, rollout = links.kind(objective.link), set(links.needs(objective.link)), objective.rollout
    source = objective.source
    policy = objective.reference.policy
    if source == "inversion" and objective.inversion.cache and policy not in ("adapter_off", "none"):
        return f"inversion.cache keeps what the base inverted, and reference {policy} moves: set inversion.cache=false"
    if not objective.on_policy:
        return None
    if kind == "list" and source != "samples":
        return f"source {source} makes pairs, and link {objective.link} takes ranked lists (source samples makes those)"
    if source == "self_play":
        if needs & {"gap", "scores"}:
            return f"link {objective.link} needs scores, and self_play has none: the data's image is chosen"
        return None
    if source in TRANSITIONS and rollout.step == "ddim" and rollout.eta == 0:
        return "rollout.eta=0 leaves no noise in a DDIM step, so that a transition has no likelihood; the papers use 1"
    if source == "pool":
        if rollout.step_scorer is None:
            return (
                "source pool needs rollout.step_scorer: a folder of `diffpo train-scorer`, or the number of a scorer "
                "such as shapes.total"
            )
        if rollout.start >= rollout.steps - 1:
            return f"rollout.start={rollout.start} leaves no step for a pool: rollout.steps is {rollout.steps}"
        return None
    if rollout.labels is not None and source != "trajectory":
        return "rollout.labels are preferences between whole trajectories: set source=trajectory"
    if not rollout.scorers and rollout.labels is None:
        return "rollout.scorers names no score that judges the images, e.g. [pickscore], or [shapes.total] (embedded)"
    if needs & {"gap", "scores"} and len(rollout.scorers) != 1:
        return f"link {objective.link} needs one score, and rollout.scorers names {len(rollout.scorers)}"
    return None
