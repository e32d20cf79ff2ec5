"""Who sees what: balance, repetitions, sides, and which pairs are uncertain."""

from collections import Counter
from math import sqrt

import numpy as np
import pytest
from annotated import made_tasks
from scipy import stats

from diffpo.annotate import assign
from diffpo.annotate.assign import HOLD, Desk, Plan, uncertainty
from diffpo.annotate.store import Vote


def vote(annotator, task, ranks=(1, 2), repeat=0):
    return Vote(f"{annotator}-{task}-{repeat}", annotator, task, ranks, False, repeat, (0, 1), 0, 0.0)


def run(desk, names, seed=0, skip=0.0):
    """All annotators vote in random order until nobody gets anything; [(annotator, task, repeat)] in that order."""
    rng, seen, left = np.random.default_rng(seed), [], list(names)
    while left:
        name = left[rng.integers(len(left))]
        given = desk.next(name, 1, now=0.0)
        if not given:
            left.remove(name)
            continue
        ranks = None if rng.random() < skip else ((1, 2), (2, 1), (1, 1))[rng.integers(3)]
        desk.put(vote(name, given[0].task.id, ranks, given[0].repeat))
        seen.append((name, given[0].task.id, given[0].repeat))
    return seen


def test_every_task_gets_its_votes_from_different_annotators_and_nobody_sees_one_twice():
    desk = Desk(made_tasks(40), Plan(per_task=2, repeat=0))
    seen = run(desk, "abc")
    assert Counter(task for _, task, _ in seen) == {task.id: 2 for task in desk.tasks}
    assert max(Counter((name, task) for name, task, _ in seen).values()) == 1
    assert desk.progress("a") == {"mine": sum(name == "a" for name, *_ in seen), "done": 80, "wanted": 80}


def test_the_least_voted_task_comes_first():
    desk, counts = Desk(made_tasks(30), Plan(per_task=3, repeat=0)), Counter()
    for _, task, _ in run(desk, "abc"):
        fewest = min(counts[each.id] for each in desk.tasks)
        assert counts[task] <= fewest + 1  # one that another has not seen may be left for that one
        counts[task] += 1


def test_a_skipped_task_goes_to_another_annotator_and_never_back():
    desk = Desk(made_tasks(20), Plan(repeat=0))
    seen = run(desk, "ab", skip=0.3)
    assert max(Counter((name, task) for name, task, _ in seen).values()) == 1
    voted = {task for _, task, _ in seen if desk.counts[task]}
    skipped_by_both = {task for task, n in Counter(task for _, task, _ in seen).items() if n == 2 and task not in voted}
    assert voted | skipped_by_both == {task.id for task in desk.tasks} and set(desk.counts.values()) <= {0, 1}


def test_the_chosen_share_of_tasks_is_asked_again_once_and_later():
    desk = Desk(made_tasks(400), Plan(repeat=0.2))
    seen = run(desk, "a")
    again = [task for _, task, repeat in seen if repeat]
    assert abs(len(again) - 80) < 4 * sqrt(400 * 0.2 * 0.8) and len(again) == len(set(again))
    place = {(task, repeat): k for k, (_, task, repeat) in enumerate(seen)}
    gaps = [place[task, 1] - place[task, 0] for task in again]
    assert min(gaps) > 0 and sum(gap < assign.GAP for gap in gaps) <= 10  # the last ones, where nothing else is left
    assert Counter(desk.counts.values())[1] == 400  # a repetition is not a vote


def test_sides_are_fair_coins_that_the_seed_decides():
    tasks = made_tasks(2000)
    first = [assign.order(0, "ada", task, 0) for task in tasks]
    share = sum(order == (0, 1) for order in first)
    assert abs(share - 1000) < 4 * sqrt(500) and first == [assign.order(0, "ada", task, 0) for task in tasks]
    for other in (("bob", 0, 0), ("ada", 1, 0), ("ada", 0, 1)):  # annotator, repetition, seed
        again = [assign.order(other[2], other[0], task, other[1]) for task in tasks]
        assert abs(sum(a == b for a, b in zip(first, again, strict=True)) - 1000) < 4 * sqrt(500)
    five = Counter(assign.order(0, "ada", task, 0)[0] for task in made_tasks(2000, 5))
    assert all(abs(five[k] - 400) < 4 * sqrt(2000 * 0.2 * 0.8) for k in range(5))


@pytest.mark.parametrize(
    ("prior", "won", "lost", "tied"), [(0.5, 0, 0, 0), (0.5, 3, 1, 0), (0.9, 0, 2, 1), (0.2, 5, 0, 2)]
)
def test_uncertainty_of_a_pair_is_the_variance_of_its_beta_posterior(prior, won, lost, tied):
    (task,) = made_tasks(1, prior=prior)
    votes = [vote("a", "x", (1, 2))] * won + [vote("a", "x", (2, 1))] * lost + [vote("a", "x", (1, 1))] * tied
    votes += [vote("a", "x", None), vote("a", "x", (1, 2), 1)]  # skips and repetitions say nothing
    exact = stats.beta(2 * prior + won + tied / 2, 2 * (1 - prior) + lost + tied / 2).var()
    assert uncertainty(task, votes) == pytest.approx(exact)


def test_uncertainty_of_a_set_is_the_summed_variance_of_its_dirichlet_posterior():
    (task,) = made_tasks(1, 4)
    votes = [vote("a", "x", (2, 1, 2, 2)), vote("b", "x", (2, 1, 2, 2)), vote("c", "x", (4, 2, 1, 3))]
    assert uncertainty(task, votes) == pytest.approx(stats.dirichlet([0.5, 2.5, 1.5, 0.5]).var().sum())


def test_active_assignment_asks_the_most_uncertain_first():
    priors = [0.95, 0.5, 0.7, 0.02, 0.6]
    tasks = [made_tasks(k + 1, prior=prior)[k] for k, prior in enumerate(priors)]
    desk = Desk(tasks, Plan(assign="active", repeat=0, per_task=9))
    given = [each.task.id for each in desk.next("a", 5)]
    assert given == [tasks[k].id for k in (1, 4, 2, 0, 3)]
    desk = Desk(made_tasks(3), Plan(assign="active", repeat=0, per_task=9))
    for name, ranks in (("a", (1, 2)), ("b", (1, 2))):
        desk.put(vote(name, "0000", ranks))  # two votes that agree
    for name, ranks in (("a", (1, 2)), ("b", (2, 1))):
        desk.put(vote(name, "0001", ranks))  # two that do not
    assert [each.task.id for each in desk.next("c", 3)] == ["0002", "0001", "0000"]


def test_a_task_that_somebody_holds_is_not_given_to_another_for_a_while():
    desk = Desk(made_tasks(3), Plan(repeat=0))
    mine = {each.task.id for each in desk.next("a", 2, now=0)}
    (other,) = desk.next("b", 3, now=1)
    assert other.task.id not in mine and desk.next("b", 3, ["0000", "0001", "0002"], now=1) == []
    assert {each.task.id for each in desk.next("b", 3, [other.task.id], now=HOLD + 1)} == mine


def test_what_a_browser_has_already_is_not_given_again():
    desk = Desk(made_tasks(4), Plan(repeat=0))
    first = desk.next("a", 2, now=0)
    second = desk.next("a", 4, [each.task.id for each in first], now=0)
    assert len({each.task.id for each in first + second}) == 4


def test_a_restart_goes_on_with_the_same_tasks_and_sides():
    tasks, plan = made_tasks(50), Plan(repeat=0.3)
    desk = Desk(tasks, plan)
    for _ in range(20):
        (given,) = desk.next("a", 1, now=0)
        desk.put(vote("a", given.task.id, repeat=given.repeat))
    again = Desk(tasks, plan)
    for each in desk.votes.values():
        again.put(each)
    assert again.next("a", 5, now=0) == desk.next("a", 5, now=0)


def test_an_undone_task_comes_back():
    desk = Desk(made_tasks(1), Plan(repeat=0))
    desk.put(vote("a", "0000"))
    assert desk.next("a", 1) == [] and desk.progress("a")["done"] == 1
    desk.take_back("a", "0000", 0)
    assert [each.task.id for each in desk.next("a", 1)] == ["0000"] and desk.progress("a")["mine"] == 0
