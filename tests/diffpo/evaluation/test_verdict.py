import numpy as np
import pytest

from diffpo.evaluation.hacking import hacking
from diffpo.evaluation.measured import Measured
from diffpo.evaluation.statistics import needed
from diffpo.evaluation.verdict import deciding, judge

PROMPTS = np.arange(300)


def arms(seed=0, n=300, **shifts):
    """Scores of arms that are better than the base by these many standard deviations of the difference."""
    rng = np.random.default_rng(seed)
    return {"base": rng.normal(size=n)} | {arm: rng.normal(shift * 1.4, 1, n) for arm, shift in shifts.items()}


def measured(scores, n=300, **options):
    return Measured(scores, np.arange(n), "base", **options)


def test_the_arm_that_beats_the_base_and_the_other_arms_is_to_be_used():
    verdict = judge(measured({"clip": arms(good=0.6, weak=0.0)}))
    assert (verdict.arm, verdict.needed, verdict.score, verdict.findings) == ("good", 0, "clip", [])
    assert "good" in verdict.sentence and "weak" not in verdict.sentence
    assert verdict.adjusted[("base", "good")] < 0.05 < verdict.adjusted[("base", "weak")]


def test_equally_good_arms_are_both_named_and_one_is_chosen():
    verdict = judge(measured({"clip": arms(one=0.6, other=0.6)}))
    assert verdict.arm in ("one", "other") and "one" in verdict.sentence and "other" in verdict.sentence


def test_the_base_is_kept_if_it_beats_all():
    assert judge(measured({"clip": arms(worse=-0.5, bad=-0.6)})).arm == "base"


def test_prompts_are_missing_until_55_percent_would_have_shown():
    few = judge(measured({"clip": arms(same=0.0)}))
    assert (
        few.arm is None and few.needed == pytest.approx(needed(0.55) - 300, abs=30) and str(few.needed) in few.sentence
    )
    n = 3000
    many = judge(measured({"clip": arms(n=n, same=0.0)}, n))
    assert (many.arm, many.needed) == (None, 0)


def test_the_first_score_that_was_not_trained_on_decides():
    scores = {name: arms(a=0.1) for name in ("shapes.total", "shapes.following", "clip", "pickscore")}
    related = frozenset({"shapes.following"})
    assert deciding(measured(scores, trained="shapes.total", related=related)) == "clip"
    ours = {name: scores[name] for name in ("shapes.total", "shapes.following")}
    assert deciding(measured(ours, trained="shapes.total", related=related)) == "shapes.following"
    alone = measured({"shapes.total": arms(a=0.6)}, trained="shapes.total")
    assert judge(alone).score == "shapes.total" and "trained on" in judge(alone).sentence


def test_an_arm_whose_trained_score_rises_while_another_falls_is_flagged_and_left_out():
    scores = {"trained": arms(good=0.5, hack=1.5), "unseen": arms(1, good=0.5, hack=-0.5)}
    verdict = judge(measured(scores, trained="trained"))
    assert verdict.flagged == ["hack"] and verdict.arm == "good" and "hack" in verdict.sentence
    assert len(verdict.findings) == 1 and "unseen" in verdict.findings[0]
    # without knowing what was trained on there is nothing to say, and the unseen score alone decides
    assert hacking(measured(scores)) == {}


def test_signs_of_hacking_are_stated_but_decide_nothing_against_a_gain_on_another_scorer():
    scores = {"clip": arms(1, a=0.6), "pick": arms(a=0.6), "aesthetic": arms(2, a=-0.5)}
    verdict = judge(measured(scores, trained="pick"))
    assert (verdict.arm, verdict.flagged) == ("a", ["a"]) and "signs of hacking" in verdict.sentence
    # another number of the scorer that was trained on is no such witness
    verdict = judge(measured(scores, trained="pick", related=frozenset({"clip", "aesthetic"})))
    assert (verdict.arm, verdict.flagged) == ("base", ["a"])


def test_a_worse_arm_is_no_hack_unless_its_trained_score_is_up():
    scores = {"trained": arms(worse=-0.5), "unseen": arms(1, worse=-0.5)}
    assert hacking(measured(scores, trained="trained")) == {}


def test_the_numbers_of_one_scorer_share_a_sentence():
    names = [*(f"clip.{k}" for k in range(5)), "aesthetic"]
    scores = {"trained": arms(a=0.6)} | {name: arms(k + 1, a=-0.5) for k, name in enumerate(names)}
    clip, aesthetic = hacking(measured(scores, trained="trained"))["a"]
    assert all(f"on clip.{k}" in clip for k in range(3)) and "on clip.3" not in clip
    assert clip.endswith("and 2 more numbers of clip, which are down.")
    assert "on aesthetic, which is down." in aesthetic and "clip" not in aesthetic


def test_arms_that_lose_are_named_beside_a_question_that_is_open():
    verdict = judge(measured({"clip": arms(a=0.05, bad=-0.6)}))
    assert verdict.arm is None and verdict.sentence.endswith("Shown to be worse than base: bad.")


def test_lost_diversity_is_an_alarm_beyond_a_tenth():
    rng = np.random.default_rng(2)
    scores = {"trained": arms(a=0.6, b=0.6), "unseen": arms(1, a=0.6, b=0.6)}
    base = rng.normal(1, 0.1, 300)
    diversity = {"base": base, "a": base * 0.95, "b": base * 0.7 + rng.normal(0, 0.05, 300)}
    found = hacking(measured(scores, trained="trained", diversity=diversity))
    assert list(found) == ["b"] and "diverse" in found["b"][0]


@pytest.mark.parametrize("way", [-1, 1])
def test_signals_and_distance_are_alarms_only_while_no_other_score_confirms(way):
    rng = np.random.default_rng(3)
    base = rng.normal(0.3, 0.05, 300)
    looks = {
        "signals": {"saturation": {"base": base, "a": base + way * rng.normal(0.1, 0.05, 300)}},
        "diversity": {"base": rng.normal(1, 0.1, 300)},
        "distance": {"a": rng.normal(1.5, 0.1, 300)},
    }
    unconfirmed = {"trained": arms(a=0.6), "unseen": arms(1, a=0.0)}
    found = hacking(measured(unconfirmed, trained="trained", **looks))["a"]
    assert len(found) == 2 and f"saturation is {'up' if way > 0 else 'down'}" in found[0] and "farther" in found[1]
    confirmed = {"trained": arms(a=0.6), "unseen": arms(1, a=0.6)}
    assert hacking(measured(confirmed, trained="trained", **looks)) == {}
    small = looks | {"signals": {"saturation": {"base": base, "a": base + way * 0.02}}, "distance": {}}
    assert hacking(measured(unconfirmed, trained="trained", **small)) == {}


def test_gaps_are_left_out_pair_by_pair():
    scores = arms(good=0.6, rare=0.0)
    scores["rare"][5:] = np.nan
    assert judge(measured({"clip": scores})).arm == "good"
    scores["rare"][:] = np.nan
    assert judge(measured({"clip": scores})).arm == "good"
    with pytest.raises(ValueError, match="no two arms"):
        judge(measured({"clip": {arm: np.full(300, np.nan) for arm in scores}}))
    with pytest.raises(ValueError, match="another arm"):
        judge(measured({"clip": {"base": scores["base"]}}))


def test_false_differences_among_equal_arms_are_as_rare_as_promised():
    rng, wrong = np.random.default_rng(4), 0
    for _ in range(150):
        scores = {arm: rng.normal(size=60) for arm in ("base", "a", "b", "c")}
        wrong += min(judge(measured({"clip": scores}, 60)).adjusted.values()) < 0.05
    assert wrong <= 150 * 0.05 + 3 * np.sqrt(150 * 0.05 * 0.95)  # without correction it is about 20 %
