"""Compositions from YAML: what makes sense is accepted, what does not is refused with the reason."""

import pytest
from pydantic import ValidationError

from diffpo import links
from diffpo.config import ObjectiveSettings
from diffpo.config.choices import OF_BEHAVIOUR


def settings(**given) -> ObjectiveSettings:
    return ObjectiveSettings.model_validate({"name": "diffusion_dpo", **given})


def refusal(**given) -> str:
    with pytest.raises(ValidationError) as error:
        settings(**given)
    return str(error.value)


def test_a_preset_lies_below_the_users_own_settings():
    plain = settings()
    assert (plain.beta, plain.source, plain.link, plain.reference.policy) == (5000, "forward", "sigmoid", "adapter_off")
    own = settings(beta=500, link="ipo", reference={"policy": "ema", "decay": 0.9})
    assert (own.beta, own.link, own.reference.policy, own.reference.decay) == (500, "ipo", "ema", 0.9)


JUDGED, SYNC = {"rollout": {"scorers": ["a"]}}, {"behaviour": {"policy": "sync"}}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": "difusion_dpo"}, "did you mean diffusion_dpo"),
        ({"link": "sigmoyd"}, "did you mean sigmoid"),
        ({"link": "exo", "link_options": {"epsilonn": 0.1}}, "did you mean epsilon"),
        ({"link": "mapo"}, "set reference.policy=none"),
        ({"link": "dspo", "reference": {"policy": "none"}}, "set reference.policy=adapter_off"),
        ({"link": "nft"}, "set behaviour.policy=sync"),
        ({"link": "nft", "behaviour": {"policy": "sync"}}, "behaviour.policy=none"),
        ({"source": "samples", "behaviour": {"policy": "sync"}, **JUDGED}, "set behaviour.policy=none"),
        ({"source": "samples", "rollout": {"sampler": "behaviour", "scorers": ["a"]}}, "set behaviour.policy=ema"),
        ({"source": "samples", "link": "normalised_ratio", **SYNC, **JUDGED}, "set source=trajectory"),
        ({"source": "pool", "link": "clipped_ratio", **SYNC, **JUDGED}, "takes advantages"),
        ({"source": "samples", "kl": 0.1, "reference": {"policy": "none"}, **JUDGED}, "kl is the divergence"),
        ({"source": "samples", "rollout": {"window": 2, "scorers": ["a"]}}, "rollout.window"),
        ({"source": "trajectory", "rollout": {"window": 30, "scorers": ["a"]}}, "rollout.steps=20"),
        ({"source": "trajectory", "rollout": {"window": 1, "labels": "a.jsonl"}}, "leave rollout.window out"),
        ({"source": "samples", "rollout": {"step_options": {"eta": 1}, "scorers": ["a"]}}, "noise is rollout.eta"),
        ({"source": "samples", "rollout": {"keep": 3, "scorers": ["a"]}}, "rollout.samples=2"),
        ({"divergence": "js", "reference": {"policy": "none"}}, "set reference.policy=adapter_off"),
        ({"users": True, "link": "kto"}, "set users=false"),
        ({"users": True, "source": "samples", "rollout": {"scorers": ["a"]}}, "this objective samples its own"),
        ({"clip": 0.1}, "likelihood ratio of a transition"),
        ({"link": "mapo", "reference": {"policy": "none"}, "weighting": "min_snr"}, "weighting changes rewards"),
        ({"link": "kto", "winner_safeguard": 0.9}, "takes no pairs"),
        ({"error": "perceptual", "winner_safeguard": 0.9}, "set error=squared"),
        ({"error": "perceptual", "link": "dspo"}, "needs error=squared"),
        (
            {"source": "inversion", "reference": {"policy": "ema"}, "inversion": {"cache": True}},
            "inversion.cache=false",
        ),
        ({"source": "trajectory"}, "rollout.scorers"),
        (
            {"source": "trajectory", "reference": {"policy": "none"}, "rollout": {"scorers": ["a"]}},
            "compares likelihoods of transitions",
        ),
        ({"source": "trajectory", "error": "perceptual", "rollout": {"scorers": ["a"]}}, "needs error=squared"),
        ({"source": "trajectory", "rollout": {"scorers": ["a"], "eta": 0}}, "leaves no noise"),
        ({"source": "trajectory", "link": "rankdpo", "rollout": {"scorers": ["a"]}}, "takes ranked lists"),
        ({"source": "trajectory", "link": "margin", "rollout": {"scorers": ["a", "b"]}}, "needs one score"),
        ({"source": "pool"}, "needs rollout.step_scorer"),
        ({"source": "pool", "rollout": {"step_scorer": "x", "steps": 5, "start": 4}}, "leaves no step for a pool"),
        ({"source": "samples", "rollout": {"labels": "l.jsonl"}}, "set source=trajectory"),
        ({"source": "self_play", "link": "capo"}, "self_play has none"),
        ({"source": "samples", "weighting": "measured", "rollout": {"scorers": ["a"]}}, "use uniform or min_snr"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(given, words):
    assert words in refusal(**given)


def test_every_link_goes_with_every_source_reference_and_weighting_or_says_why_not():
    """The whole table: nothing but a ValidationError with a sentence, and each link works somewhere."""
    judged = {"scorers": ["shapes.total"]}
    rollouts = dict.fromkeys(("trajectory", "samples", "self_play"), judged) | {"pool": {"step_scorer": "shapes.total"}}
    for link in links.names():
        accepted, compared = 0, {"policy": "sync" if set(links.needs(link)) & OF_BEHAVIOUR else "none"}
        for source in ("forward", "inversion", "trajectory", "pool", "samples", "self_play"):
            for policy in ("adapter_off", "ema", "sync", "accelerated", "fast_slow", "none"):
                for weighting in ("uniform", "min_snr", "measured"):
                    given = {"link": link, "source": source, "reference": {"policy": policy}, "weighting": weighting}
                    given |= {"behaviour": compared, "rollout": rollouts.get(source, {})}
                    try:
                        settings(**given)
                        accepted += 1
                    except ValidationError as error:
                        (problem,) = error.errors()
                        assert any(word in problem["msg"] for word in (link, source, "weighting")), given
        assert accepted, link


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"reference": {"every": 50}}, "objective.reference.policy"),
        ({"reference": {"policy": "sync", "decay": 0.5}}, "set objective.reference.policy to ema or fast_slow"),
        ({"reference": {"policy": "none", "strength": 0.1}}, "objective.reference.policy=none"),
        ({"divergence_alpha": 0.1}, "set objective.divergence to alpha"),
        ({"inversion": {"steps": 3}}, "set objective.source to inversion"),
        ({"rollout": {"advantages": {"limit": 3.0}}}, "objective.rollout.advantages.limit has no effect"),
        ({"source": "samples", "rollout": {"scorers": ["a"], "pool": 8}}, "set objective.source to pool"),
        ({"rollout": {"step": "flow_sde", "step_options": {"amount": 0.1}}}, "objective.rollout.step"),
    ],
)
def test_a_setting_without_effect_is_refused(given, words):
    assert words in refusal(**given)


def test_settings_of_the_preset_and_defaults_may_be_written_out():
    """As the resolved config of a run writes them."""
    moved = settings(name="tr_dpo", reference={"policy": "adapter_off"})
    assert moved.reference.every != 1  # the preset's, without effect now
    assert settings(**moved.model_dump()) == moved
    plain = settings()
    assert settings(**plain.model_dump()) == plain


def test_an_objective_without_its_data_is_refused(make_config, tiny_sd):
    from diffpo.common.errors import DiffpoError

    on_policy = ("objective.source=samples", "objective.rollout.scorers=[shapes.total]")
    with pytest.raises(DiffpoError, match=r"set data\.prompts"):
        make_config(tiny_sd, *on_policy)
    assert make_config(tiny_sd, *on_policy, "data.train=null", "data.prompts=shapes:train:4").data.train is None
    with pytest.raises(DiffpoError, match=r"set data\.train"):
        make_config(tiny_sd, "data.train=null")
