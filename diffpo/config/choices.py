"""Which choices of the section `objective:` go together, and what to set where they do not."""

from __future__ import annotations

from typing import Any

from .. import links
from ..common.errors import DiffpoError

REWARDS = {"chosen", "rejected", "reward", "rewards"}  # what links call rewards
OF_REFERENCE = {"chosen_reference_error", "rejected_reference_error", "chosen_drift", "rejected_drift"}
OF_REFERENCE |= {"reference_error", "drift"}
OF_BEHAVIOUR = {"log_ratio", "log_ratios", "behaviour_error", "behaviour_drift", "behaviour_kl", "behaviour_prediction"}
OF_STEPS = {"step_weight", "step_std"}
ADVANTAGES = {"advantage", "advantages"}
TRANSITIONS = ("trajectory", "pool")  # sources whose problems are steps of a sampler
ROUNDS = (*TRANSITIONS, "samples")  # sources whose images the policy samples in rounds


def problem(objective: Any) -> str | None:
    """Why the settings of `objective:` make no sense together; None if they do."""
    rules = (_auto, _link, _behaviour, _reference, _draws, _terms, _source)
    return next((reason for rule in rules if (reason := rule(objective))), None)


def _auto(objective: Any) -> str | None:
    """Of beta: auto."""
    if objective.beta != "auto":
        return None
    if objective.on_policy:
        return f"beta=auto needs pairs to train on, but source {objective.source} samples its own: write a number"
    if objective.steered:
        return "beta=auto compares pairs with one preference, and steered=true weighs several rewards: write a number"
    if objective.reference.policy == "none" or not REWARDS & set(links.needs(objective.link)):
        return f"beta=auto: {objective.name} compares no rewards with a reference: leave beta out, or write a number"
    return None


def _link(objective: Any) -> str | None:
    try:
        links.check(objective.link, objective.link_options)
    except DiffpoError as error:
        return str(error)
    return None


def _reference(objective: Any) -> str | None:
    needs, free = set(links.needs(objective.link)), objective.reference.policy == "none"
    if free and needs & OF_REFERENCE:
        return f"link {objective.link} compares with the reference: set reference.policy=adapter_off, not none"
    if free and objective.kl:
        return "kl is the divergence from the reference: set reference.policy=adapter_off, not none"
    if free and objective.source in TRANSITIONS and needs & REWARDS:
        return (
            f"source {objective.source} compares likelihoods of transitions with the reference's: set "
            f"reference.policy=adapter_off, not none"
        )
    if free and objective.divergence != "reverse_kl":
        return (
            f"divergence {objective.divergence} is measured between policy and reference: set "
            f"reference.policy=adapter_off, not none"
        )
    used = needs & (REWARDS | OF_REFERENCE | {"reference_margin"}) or objective.kl
    if not free and not used and objective.rollout.sampler != "reference":
        return (
            f"link {objective.link} does not use the reference, which would cost time for nothing: set "
            f"reference.policy=none"
        )
    return None


def _draws(objective: Any) -> str | None:
    """Of draws that come again, of which the reference's errors are kept and nothing else."""
    if objective.forward.draws is None:
        return None
    policy, needs = objective.reference.policy, set(links.needs(objective.link))
    if objective.source != "forward":
        return f"forward.draws is of source forward, and source is {objective.source}: leave it out"
    if policy != "adapter_off":
        what = "there is none" if policy == "none" else f"that of reference.policy={policy} moves"
        return f"forward.draws keeps the errors of the reference, but {what}: leave it out, or use adapter_off"
    if objective.kl or needs & {"drift", "chosen_drift", "rejected_drift"}:
        what = f"link {objective.link}" if not objective.kl else "kl"
        return f"{what} needs the reference's predictions, and forward.draws keeps its errors alone: leave it out"
    return None


def _behaviour(objective: Any) -> str | None:
    """Of the behaviour policy, and of advantages and steps, which only some sources have."""
    needs, rollout, link = set(links.needs(objective.link)), objective.rollout, objective.link
    policy, source = objective.behaviour.policy, objective.source
    if source == "reward":
        return None
    if needs & OF_BEHAVIOUR and policy == "none":
        return f"link {link} compares with the policy that sampled the round: set behaviour.policy=sync"
    if policy != "none" and (source not in ROUNDS or rollout.labels is not None):
        where = "rollout.labels" if rollout.labels is not None else f"source {source}"
        return f"behaviour is the policy that samples rounds, and {where} has none: set behaviour.policy=none"
    if policy != "none" and not needs & OF_BEHAVIOUR and not objective.behaviour.kl and rollout.sampler != "behaviour":
        return f"link {link} does not use the behaviour policy, which would cost time: set behaviour.policy=none"
    if rollout.sampler == "behaviour" and policy != "ema":
        return "rollout.sampler=behaviour needs a behaviour policy of its own: set behaviour.policy=ema"
    if rollout.sampler == "reference" and policy != "none":
        return "likelihood ratios are taken to what samples: set rollout.sampler=policy or behaviour, not reference"
    if needs & ADVANTAGES and (source not in ("trajectory", "samples") or rollout.labels is not None):
        return f"link {link} takes advantages, which source samples or trajectory with rollout.scorers has"
    if needs & OF_STEPS and source not in TRANSITIONS:
        return f"link {link} is of steps of the sampler, but source {source} has none: set source=trajectory"
    return None


def _terms(objective: Any) -> str | None:
    kind, needs = links.kind(objective.link), set(links.needs(objective.link))
    if objective.flipped and objective.on_policy:
        return "flipped turns the labels of the data, but this objective judges its own samples: set flipped=false"
    if objective.steered and (objective.on_policy or kind != "pair" or objective.users):
        return (
            "steered=true weighs the rewards of pairs of data: use a source and a link of such pairs, and users=false, "
            "or set steered=false"
        )
    if not objective.users and (objective.taste != "latents" or objective.prototypes):
        return "taste and prototypes describe users: set users=true, or leave them out"
    if objective.steered and needs & {"gap", "scores"}:
        return f"link {objective.link} needs one score, but steered=true judges by weighted rewards: use another link"
    if objective.users and objective.on_policy:
        return "users=true takes users' pairs from the data, but this objective samples its own: set users=false"
    if objective.users and kind != "pair":
        return f"users=true describes users by pairs, but link {objective.link} takes no pairs: set users=false"
    if not needs & REWARDS:
        ratios = bool(needs & {"log_ratio", "log_ratios"})
        for key, default in {"clip": None, "divergence": "reverse_kl", "weighting": "uniform"}.items():
            if getattr(objective, key) != default and not (ratios and key == "weighting"):
                return f"{key} changes rewards, but link {objective.link} uses errors: leave {key} out"
    if objective.clip is not None and objective.source not in TRANSITIONS:
        return (
            f"clip bounds the likelihood ratio of a transition, but source {objective.source} has no transitions (only "
            f"{' and '.join(TRANSITIONS)} have): set clip=null"
        )
    if objective.weighting == "measured" and objective.on_policy:
        return "weighting=measured is measured on data, but this objective samples its own: use uniform or min_snr"
    if objective.winner_safeguard is not None:
        if kind != "pair":
            return (
                f"winner_safeguard protects the chosen image of a pair, but link {objective.link} takes no pairs: set "
                f"winner_safeguard=null"
            )
        if objective.error != "squared":
            return "winner_safeguard uses the gradient of the squared error: set error=squared"
    if objective.error == "squared" and objective.features != "encoder":
        return "features are those of error perceptual: set error=perceptual, or leave features out"
    if objective.error == "perceptual" and objective.source in TRANSITIONS:
        return f"source {objective.source} needs error=squared: the log-likelihood of a transition is a squared error"
    if objective.error == "perceptual" and needs & {
        *("drift", "chosen_drift", "rejected_drift", "behaviour_drift", "behaviour_prediction"),
    }:
        return f"link {objective.link} needs error=squared: it compares errors with distances between predictions"
    return None


def _source(objective: Any) -> str | None:
    kind, needs, rollout = links.kind(objective.link), set(links.needs(objective.link)), objective.rollout
    source = objective.source
    policy = objective.reference.policy
    if source == "inversion" and objective.inversion.cache and policy not in ("adapter_off", "none"):
        return (
            f"inversion.cache keeps inversions by the base model, but reference {policy} moves: set "
            f"inversion.cache=false"
        )
    if not objective.on_policy:
        return None
    if source == "reward":
        return _direct(objective)
    if rollout.step_options and rollout.step in ("ddim", "renoise"):
        return (
            f"rollout.step_options are of other solvers; the noise is rollout.eta with {rollout.step}: leave them out"
        )
    if rollout.window is not None and source != "trajectory":
        return f"rollout.window is of steps that are trained on, and source {source} trains on none: leave it out"
    if rollout.window is not None and rollout.labels is not None:
        return "rollout.labels are of trajectories with noise in all steps: leave rollout.window out"
    if rollout.window is not None and rollout.window > rollout.steps:
        return f"rollout.window={rollout.window} is more than rollout.steps={rollout.steps}"
    if rollout.keep is not None and rollout.keep > rollout.samples:
        return f"rollout.keep={rollout.keep} is more than rollout.samples={rollout.samples}"
    if kind == "list" and source != "samples":
        return f"source {source} makes pairs, but link {objective.link} takes ranked lists: set source=samples"
    if source == "self_play":
        if needs & {"gap", "scores"}:
            return (
                f"link {objective.link} needs scores, but source self_play has none (the data's image is chosen): use "
                f"another link, such as sigmoid"
            )
        return None
    if source in TRANSITIONS and rollout.step == "ddim" and rollout.eta == 0:
        return "rollout.eta=0 leaves no noise in a DDIM step, so transitions have no likelihood: set rollout.eta=1"
    if source == "pool":
        if rollout.step_scorer is None:
            return (
                "source pool needs rollout.step_scorer: a folder of `diffpo train-scorer`, or the number of a scorer "
                "such as shapes.total"
            )
        if rollout.start >= (noisy := rollout.steps - (rollout.end == "clean")):
            return (
                f"rollout.start={rollout.start} leaves no step for a pool: choose less than {noisy} with "
                f"rollout.steps={rollout.steps}"
            )
        return None
    if rollout.labels is not None and source != "trajectory":
        return "rollout.labels are preferences between whole trajectories: set source=trajectory"
    if not rollout.scorers and rollout.labels is None:
        return (
            "rollout.scorers is empty: name a score that judges the images, e.g. [pickscore], or [shapes.total] for "
            "the embedded model"
        )
    if needs & {"gap", "scores"} and len(rollout.scorers) != 1:
        return f"link {objective.link} needs one score, but rollout.scorers names {len(rollout.scorers)}: keep one"
    return None


def _direct(objective: Any) -> str | None:
    """Of source reward, which has neither a link nor a reference."""
    rollout, direct = objective.rollout, objective.direct
    for key, default in {"link": "sigmoid", "clip": None, "divergence": "reverse_kl", "weighting": "uniform"}.items():
        if getattr(objective, key) != default:
            return f"{key} belongs to losses of errors, and source reward has none: leave {key} out"
    if objective.kl or objective.behaviour.policy != "none":
        return "kl and behaviour belong to losses of errors, and source reward has none: leave them out"
    if objective.winner_safeguard is not None or objective.error != "squared":
        return "winner_safeguard and error belong to losses of errors, and source reward has none: leave them out"
    if objective.reference.policy != "none":
        return "source reward compares with no reference, which would be kept for nothing: set reference.policy=none"
    if len(rollout.scorers) + (rollout.step_scorer is not None) != 1:
        return (
            "source reward follows one score: name it in rollout.scorers, e.g. [pickscore], or name a folder of "
            "`diffpo train-scorer` in rollout.step_scorer"
        )
    if rollout.labels is not None:
        return "rollout.labels are preferences between whole trajectories: set source=trajectory"
    if direct.calls is not None and direct.calls > rollout.steps:
        return f"direct.calls={direct.calls} is more than rollout.steps={rollout.steps}"
    if direct.copies > 1 and (direct.truncation != "fixed" or direct.calls != 1):
        return "direct.copies are noised to the level of the last call: set direct.calls=1 and direct.truncation=fixed"
    return None
