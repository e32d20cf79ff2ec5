"""`diffpo check`: the dry run. It reads the config and the data without torch, and the shapes of the model last."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

from .. import links, scorers
from ..common.errors import DiffpoError
from ..common.text import plain
from ..config import Config, Data
from ..config.choices import TRANSITIONS
from ..data.columns import NOUN, Kind
from ..data.groups import Groups, scan
from ..data.prompts import load_prompts
from ..rollout.labels import read_labels
from ..scorers.step.base import is_folder, read_about
from . import disk, edits, remembered

Say = Callable[[str], None]  # prints lines

LIMIT = 5000  # rows to decode, evenly spaced in a larger source


def check(config: Config, picture: Path | None = None, vram: float | None = None) -> None:
    """Print the complete config, a summary of the data and what training needs. Draw some of the data into the file
    ``picture`` (default: beside the folder of the run). ``vram``: GiB of a GPU, to recommend settings for it.

    DiffpoError, after everything is printed, if training could not start.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def say(text: str) -> None:
        console.print("\n".join(plain(line, 10_000) for line in text.split("\n")))

    say(config.to_yaml())
    problems: list[str] = []
    data, objective, groups = config.data, config.objective, None
    texts = prompts(config, say, problems) if objective.on_policy else []
    if data.train:
        want = links.kind(objective.link)
        groups = scan(data, data.train, data.train_split, want, LIMIT, quiet=False)
        describe(groups, data, say, problems)
        needs(groups, config, say, problems)
        texts += groups.captions
        if groups:
            from .picture import draw

            picture = picture or _picture(config.output)
            draw(groups, data, picture)
            say(f"  picture     {picture}")
    if data.validation:
        found = scan(data, data.validation, data.validation_split, "pair", LIMIT, quiet=False)
        describe(found, data, say, problems)
        texts += found.captions

    train = config.train
    update = train.batch_size * train.accumulation
    noun = _noun(groups.kind if groups is not None else links.kind(objective.link))
    say(
        f"training  {train.steps} steps of {update} {noun} "
        f"({train.batch_size} at a time x {train.accumulation} accumulated)"
    )
    if objective.beta == "auto":
        from ..train.beta import betas  # brings torch

        tried = ", ".join(f"{beta:g}" for beta in betas(config))
        say(f"beta      auto: a run with each of {tried}, compared on data.validation; the best one goes on")
    if groups and not objective.on_policy:
        usable = len(groups) * groups.total / groups.rows
        one = noun.removesuffix("s")
        times = train.steps * update / usable
        say(f"          each {one} is used {times:.3g} times; N processes multiply both numbers by N")
    if groups is not None:
        say(f"caches    {data.cache}: {disk.contents(groups, data)}")
    problems += edits.numbers(config, groups, texts)
    key = remembered.key(config, groups, texts, vram)
    problems += remembered.said_again(key, config, say, lambda say: examine(config, groups, texts, vram, say))
    problems += environment(config)
    if problems:
        raise DiffpoError("training cannot start: " + "; ".join(problems))
    say("training can start: diffpo train")


def examine(config: Config, groups: Groups | None, texts: list[str], vram: float | None, say: Say) -> list[str]:
    """Print what training needs of this model, and return the problems with the model's options and the optimiser."""
    from .footprint import footprint

    sources = edits.most(groups, texts)
    footprint(config, groups, say, sources)
    if vram is not None:
        from .vram import recommend

        recommend(config, groups, vram, say, sources)
    if long := cut(config, texts):
        say(f"captions  {long}")
    return [*edits.column(config), *options(config)]


def _picture(output: Path) -> Path:
    """The default file, beside the folder of the run."""
    output = output if output.name else Path(os.path.abspath(output))  # the folder "." has no name
    if not output.name:
        return Path("run-data.png")  # the folder "/", which `environment` refuses
    name = output.name if len(os.fsencode(output.name)) <= 240 else output.name[:60]
    return output.parent / f"{name}-data.png"


def cut(config: Config, texts: list[str]) -> str:
    """A sentence on captions and prompts that are too long for the model; empty if there are none."""
    if not texts:
        return ""
    from .. import models

    family = models.load(config.model, config.train.precision, config.data.resolution)
    heavy = dict.fromkeys([family.component, "vae", *family.encoders])
    pipe = models.load_pipeline(config.model, "float32", "cpu", **{**family.without, **heavy})
    return models.too_long(pipe, sorted(set(texts)))


def prompts(config: Config, say: Say, problems: list[str]) -> list[str]:
    """Print the prompts and the scorers of an on-policy objective; return the prompts."""
    rollout, source = config.objective.rollout, config.data.prompts
    if rollout.labels:
        try:
            labels = read_labels(rollout.labels)
        except DiffpoError as error:
            problems.append(str(error))
        else:
            say(f"{rollout.labels}\n  labels      {len(labels)} labelled pairs of trajectories; nothing is sampled")
            return [label.prompt for label in labels]
        return []
    judges = [*rollout.scorers, *([rollout.step_scorer] if rollout.step_scorer else [])]
    for spec in judges:
        try:
            found_spec = None if is_folder(spec) else scorers.parse(spec)
            if found_spec is None:
                read_about(Path(spec).expanduser())
            elif config.objective.source == "reward" and not _may_have_gradient(found_spec.name):
                problems.append(
                    f"the scorer {spec} has no gradient, which source reward needs; these have one: "
                    f"{', '.join(scorers.DIFFERENTIABLE)}, and folders of `diffpo train-scorer`"
                )
        except DiffpoError as error:
            problems.append(str(error))
    say(f"scorers   {', '.join(judges) or 'none: the data are compared with samples'}")
    found: list[str] = []
    if source:
        try:
            found = load_prompts(source, pictures=config.data.columns.source)
            say(f"{source}\n  prompts     {len(found)}, {len(set(found))} of them distinct")
        except DiffpoError as error:
            problems.append(str(error))
    if config.objective.source == "reward":
        say(f"sampling  new images in each update, {rollout.steps} model calls per image")
        return found
    updates = "1 update" if rollout.updates == 1 else f"{rollout.updates} updates"
    say(f"sampling  rounds of {rollout.prompts} prompts, {rollout.steps} model calls per image, {updates} per round")
    if config.objective.behaviour.policy != "none":
        which = "a copy that moves" if config.objective.behaviour_moves else "the policy itself"
        say(f"          ratios to the policy that sampled, which is {which}")
    return found


def _may_have_gradient(name: str) -> bool:
    """Whether the scorer is a differentiable one, or a class from outside, which says so when it is loaded."""
    return name in scorers.DIFFERENTIABLE or scorers.is_outside(name)


def describe(groups: Groups, data: Data, say: Say, problems: list[str]) -> None:
    """Print counts, faults and image sizes of one source."""
    part = f" ({groups.rows} of {groups.total} rows read, evenly spaced)" if groups.rows < groups.total else ""
    say(f"{groups.source}{part}")
    names = ", ".join(f"{role}={name}" for role, name in groups.columns.model_dump().items() if name)
    say(f"  columns     {plain(names)}")
    each = ", one per image" if groups.columns.caption_chosen else ""
    noun = _noun(groups.kind)
    say(f"  {noun:<11} {len(groups)} with {len(groups.captions)} captions{each}")
    if groups.data == "list":
        how = "all their pairs" if groups.kind == "pair" else "images evenly spaced over each ranking, best first"
        say(f"  converted   {groups.describe()}: {how}")
    if groups.kind == "single":
        liked = sum(group.preference for group in groups.groups)
        say(f"  liked       {liked:g}, disliked {len(groups) - liked:g}")
    say(f"  ties        {groups.ties} {groups.fate_of_ties}")
    if groups.unlabelled:
        say(f"  no label    {groups.unlabelled} rows left out")
    if groups.identical:
        say(f"  identical   {groups.identical} pairs of identical images left out")
    say(f"  unusable    {groups.describe_bad() if groups.bad else 'none'}")
    for remark in groups.remarks():
        say(f"  {remark}")
    if groups.columns.user:
        users = Counter(group.user for group in groups.groups)
        say(f"  users       {len(users) - (None in users)}; {users[None]} {noun} without a user")
    if groups.scored and groups.kind != "single":
        gaps = sorted(groups.gaps)
        against = sum(gap < 0 for gap in gaps)
        say(
            f"  score gaps  {gaps[0]:.3g} to {gaps[-1]:.3g}, median {median(gaps):.3g}; "
            f"{against} {noun} whose scores contradict the label"
        )
    sizes = Counter(group.size for group in groups.groups)
    for (width, height), count in sizes.most_common(8):
        small = "  will be enlarged" if min(width, height) < data.resolution else ""
        say(f"  {width:>5}x{height:<5} {count:>7}{small}")
    if len(sizes) > 8:
        say(f"  {len(sizes) - 8} other sizes, {sum(sizes.values()) - sum(n for _, n in sizes.most_common(8))} {noun}")
    if data.buckets:
        trained = Counter(group.target for group in groups.groups).most_common()
        say("  trained at  " + ", ".join(f"{width}x{height} ({count})" for (width, height), count in trained))
    if problem := groups.problem(data.bad_rows):
        problems.append(f"{groups.source}: {problem}")


def needs(groups: Groups, config: Config, say: Say, problems: list[str]) -> None:
    """Print how the objective uses the groups; check that they have the scores, users and parts that it needs."""
    data, link = config.data, config.objective.link
    if links.kind(link) == "single" and groups.kind == "pair":
        say(f"  converted   pairs become liked and disliked images, because link {link} uses single images")
    if links.kind(link) == "list" and groups.kind == "pair":
        say(f"  converted   pairs become lists of two, because link {link} uses lists")
    if not groups:
        return
    try:
        if {"gap", "scores"} & set(links.needs(link)) and not config.objective.on_policy:
            groups.require_scores(f"link {link} needs scores")
        if config.objective.users and groups.rows == groups.total:  # a sample may lack a user's other pairs
            from ..objective.users import require_users

            require_users(groups)
        if data.curriculum > 1:
            groups.by_gap(data.curriculum)
            more = f"one more every {data.curriculum_updates} updates"
            say(f"  curriculum  {data.curriculum} parts, easiest first, {more}")
    except DiffpoError as error:
        problems.append(str(error))


def _noun(kind: Kind) -> str:
    return NOUN[kind].split()[-1]


def _sampler(config: Config) -> None:
    """DiffpoError unless the solver of an on-policy objective can be built, with likelihoods where they are needed."""
    from .. import models
    from ..rollout.sampler import Walker

    walker = Walker(config.objective.rollout, models.load(config.model, resolution=config.data.resolution))
    walker.check(likelihoods=config.objective.source in TRANSITIONS)


def options(config: Config) -> list[str]:
    """Problems with the model's options, the optimiser and the device."""
    import torch

    from .. import models
    from ..models import storage
    from ..train.build import make_optimizer

    problems, network = [], models.load(config.model).meta_network()
    tests: list[Callable[[], object]] = [
        lambda: storage.check(network, config.model.base_weights),
        lambda: make_optimizer(config.train, [torch.nn.Parameter(torch.zeros(2, 2))]),
    ]
    if config.objective.on_policy and config.objective.rollout.labels is None:
        tests.append(functools.partial(_sampler, config))
    if config.model.attention is not None:
        tests.append(functools.partial(storage.set_attention, network, config.model.attention))
    for test in tests:
        try:
            test()
        except DiffpoError as error:
            problems.append(str(error))
    if config.train.precision == "fp16" and not torch.accelerator.is_available():
        problems.append("train.precision=fp16 needs a GPU, which this machine lacks; use bf16 or no")
    return problems


def environment(config: Config) -> list[str]:
    """Problems with the folder of the run and the trackers."""
    from ..train import claim
    from ..train.outside import missing

    try:
        claim.check_folder(config)
    except DiffpoError as error:
        return [str(error), *missing(config)]
    return missing(config)
