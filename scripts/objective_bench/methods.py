"""What is compared: each published method on the embedded world, and the claims that need runs of their own.

Offline methods learn from the pairs of a regime (data.py) or the same images in another format. On-policy ones sample
for the captions of assets/shapes-preferences and are judged by the oracle's total. One learning rate and one beta for
all unless a line says otherwise. Lines that do were mostly written after a look at seed 0: a gentler rate where the
common one broke the model, a few settings of the on-policy methods. So nothing was tuned to win, but not all were left
alone alike, and any method may do better than here. What tuning brings is in recipes.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .data import FLIPS


@dataclass(frozen=True)
class Method:
    """``name`` in the report, the ``preset`` it starts from, overrides of the model's quickstart config (``$DATA`` and
    ``$SCORERS``: folders of what `data.make` and `data.scorers` made; ``$BETA``: the quickstart's), and a ``note`` on
    what differs. ``main``: part of the comparison, not only of a claim. ``updates``: as many, whatever they cost,
    instead of the budget. ``budget``: its own, instead of the command's. ``then``: a second method that goes on from
    the first one's LoRA; each gets half of the budget."""

    name: str
    preset: str
    overrides: tuple[str, ...] = ()
    note: str = ""
    main: bool = True
    updates: int | None = None
    budget: int | None = None
    then: Method | None = None


def named(name: str, methods: Iterable[Method]) -> Method:
    """KeyError with all names if there is none of this name."""
    found = {method.name: method for method in methods}
    if name not in found:
        raise KeyError(f"unknown method {name}; there are {', '.join(found)}")
    return found[name]


def offline(name: str, *overrides: str, preset: str | None = None, note: str = "", main: bool = True) -> Method:
    """From the data, with the quickstart's beta."""
    return Method(name, preset or name, ("objective.beta=$BETA", *overrides), note, main)


def sampled(name: str, *overrides: str, preset: str | None = None, note: str = "") -> Method:
    """On-policy: no training data, the quickstart's guidance, ten calls for an image, the oracle as judge."""
    common = (
        "data.train=null",
        "data.prompts=shapes:train:700",
        "objective.rollout.steps=10",
        "objective.rollout.guidance=3.0",
    )
    return Method(name, preset or name, (*common, *overrides), note)


SOFT = "data.ties=soft"
GENTLE = "train.lr=1e-4"  # for those that the common 5e-4 drives out of their model
LISTS = ("data.train=$DATA/lists.parquet", "data.list_size=8", "train.batch_size=4")
CAPTIONS = (
    "data.train=$DATA/captions.parquet",
    "data.columns.caption_chosen=caption_chosen",
    "data.columns.caption_rejected=caption_rejected",
    "data.validation=null",  # which has one caption for both images
)
TOTAL = "objective.rollout.scorers=[shapes.total]"
TRANSITIONS = ("objective.rollout.prompts=16", "objective.rollout.updates=6")

OFFLINE = [
    offline("diffusion_dpo"),
    offline("sdpo"),
    offline("inpo"),
    offline("smpo", "objective.link_options.temperature=0.1", note="gap / 0.1, the oracle's scores lie in 0..1"),
    offline("ncp_dpo", "objective.beta=1e6", note="beta 1e6: errors of these features are smaller by the thousands"),
    offline("dcpo", *CAPTIONS, GENTLE, note="rejected images under a caption with one word changed; lr 1e-4"),
    offline("dspo", "objective.link_options.weight=0.05", note="weight 0.05, the largest of the published search"),
    offline("mapo", GENTLE, note="lr 1e-4"),
    offline("simpo", GENTLE, note="lr 1e-4"),
    offline("cpo", GENTLE, note="lr 1e-4"),
    offline("orpo", GENTLE, note="lr 1e-4"),
    offline("asft", GENTLE, note="lr 1e-4"),
    offline("sft", GENTLE, note="fine-tuning on the chosen images, the baseline without preferences; lr 1e-4"),
    offline("diffusion_kto"),
    offline("bco"),
    offline("cdpo"),
    offline("rdpo"),
    offline("ipo"),
    offline("hinge"),
    offline("exo"),
    offline("nca"),
    offline("apo_zero"),
    offline("apo_down"),
    offline("sppo"),
    offline("f_dpo"),
    offline("dpop"),
    offline("rpo"),
    offline("odpo", "objective.link_options.scale=5", note="margin 5 x gap"),
    offline("capo", "objective.link_options.scale=5", note="target 5 x gap"),
    offline("rao_kupper", SOFT, note="with the 600 ties"),
    offline("davidson", SOFT, note="with the 600 ties"),
    offline("rankdpo", *LISTS, note="lists of the 8 images of a caption, 4 lists an update; scores as they are"),
    offline("plackett_luce", *LISTS, note="the same lists"),
    offline("pairs_of_lists", LISTS[0], preset="diffusion_dpo", note="Diffusion-DPO on all pairs of those lists"),
    offline(
        "curriculum_dpo", "data.curriculum=4", "data.curriculum_updates=50", note="a quarter more every 50 updates"
    ),
    offline("tr_dpo", "objective.reference.every=20", note="every 20 updates, because this run ends before its 512"),
    offline("apo_accelerated", "objective.reference.every=50", note="every 50 updates"),
    offline("ofs_dpo"),
    offline("spin_diffusion", "objective.rollout.steps=10"),
    offline("ddo", "objective.rollout.steps=10"),
]
ON_POLICY = [
    sampled("d3po", "objective.beta=0.2", TOTAL, *TRANSITIONS, "objective.rollout.samples=4", note="4 images a prompt"),
    sampled(
        "spo",
        "objective.beta=20",
        "objective.rollout.step_scorer=shapes.total",
        "objective.rollout.start=4",
        "objective.rollout.threshold=0.01",
        *TRANSITIONS,
        note="judged by the oracle on image estimates; scores lie in 0..1, so the threshold is 0.01",
    ),
    sampled(
        "spo_trained",
        "objective.beta=20",
        "objective.rollout.step_scorer=$SCORERS/pixel",
        "objective.rollout.start=4",
        *TRANSITIONS,
        preset="spo",
        note="judged by the step-aware scorer of configs/train_scorer_pixel.yaml, whose own training is not counted",
    ),
    sampled(
        "lpo",
        "objective.beta=1000",
        "objective.rollout.step_scorer=$SCORERS/latent",
        "objective.rollout.threshold=0.1",
        *TRANSITIONS,
        note="judged by the latent scorer of configs/train_scorer_latent.yaml, whose own training is not counted",
    ),
    sampled(
        "pso",
        "objective.beta=100",
        TOTAL,
        *TRANSITIONS,
        "objective.rollout.samples=4",
        "objective.rollout.transitions=8",
        note="on this model, which is not distilled: ten steps that re-noise",
    ),
    sampled(
        "online_dpo",
        TOTAL,
        "objective.beta=$BETA",
        "objective.rollout.samples=4",
        "objective.rollout.prompts=32",
        "objective.rollout.updates=8",
        note="best and worst of 4 images a prompt, each noised 4 times",
    ),
    sampled(
        "diffusion_nft",
        TOTAL,
        "objective.rollout.samples=6",
        "objective.rollout.prompts=16",
        "objective.rollout.updates=12",
        note="6 images a prompt, each noised twice",
    ),
]
FOLLOWED = ("objective.rollout.step_scorer=$SCORERS/pixel", GENTLE)
OWN = "follows the slope of the step-aware scorer (see spo_trained); lr 1e-4"
ON_POLICY += [
    sampled("draft", *FOLLOWED, note=f"one call; {OWN}"),
    sampled("alignprop", *FOLLOWED, note=OWN),
    sampled("refl", *FOLLOWED, "objective.direct.calls=3", note=f"one of the last 3 of 10 steps; {OWN}"),
]
ROBUST = ("diffusion_dpo", "rdpo", "cdpo", "ipo", "exo")
NOISY = [
    offline(f"{name}_flipped_{share}", f"data.train=$DATA/flipped-{share}.parquet", preset=name, main=False)
    for share in FLIPS
    for name in ROBUST
]
# what the papers count is updates: as many as Diffusion-DPO's budget pays for
LONG = [
    replace(method, name=f"{method.name}_long", main=False, updates=100)
    for method in (*OFFLINE, *ON_POLICY)
    if method.name in ("d3po", "spo", "inpo", "ncp_dpo")
]
TURNED = ("data.columns.label_0=label_1", "data.columns.label_1=label_0")
CONTROL = [offline("sft_rejected", GENTLE, *TURNED, preset="sft", main=False)]  # fine-tuning on what lost
# what RankDPO's gains are made of
GAINS = [
    offline("rankdpo_minmax", *LISTS, "objective.link_options={spread: 1}", preset="rankdpo", main=False),
    offline("rankdpo_win_rates", *LISTS, "objective.link_options={temperature: 0.05}", preset="rankdpo", main=False),
]
METHODS = [*OFFLINE, *ON_POLICY, *NOISY, *LONG, *CONTROL, *GAINS]
