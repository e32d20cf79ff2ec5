"""The number of torch's threads on machines of different load, and the settings that keep it."""

import time

import pytest
import torch

from diffpo.common import threads
from diffpo.common.threads import Threads


class Machine:
    """``cores`` cores, shared fairly between ``others`` busy programs and our threads, which are all runnable."""

    def __init__(self, cores: int, others: int) -> None:
        self.cores, self.others = cores, others

    def waiting(self, ours: int) -> float:
        runnable = ours + self.others
        return ours * max(0.0, 1 - self.cores / runnable)


def settle(most: int, machine: Machine, windows: int, now: int | None = None) -> list[int]:
    """The numbers of threads in each of ``windows`` windows."""
    chosen = Threads()
    chosen.most = chosen.now = most
    chosen.now = now or most
    seen = []
    for _ in range(windows):
        chosen.now = chosen.next(machine.waiting(chosen.now))
        seen.append(chosen.now)
    return seen


def test_an_idle_machine_keeps_all_threads():
    assert settle(8, Machine(8, 0), 20) == [8] * 20


def test_two_busy_programs_on_two_cores_leave_one_thread():
    assert settle(2, Machine(2, 2), 20) == [1] * 20


@pytest.mark.parametrize(("cores", "others", "fits"), [(8, 4, 4), (16, 8, 8), (8, 7, 2), (4, 2, 2)])
def test_threads_settle_at_the_number_of_free_cores(cores, others, fits):
    # (8, 7): each of two threads waits a ninth of its time, less than the 15 % that count as crowded
    seen = settle(cores, Machine(cores, others), 1000)
    assert seen[10:].count(fits) > 0.9 * len(seen[10:])  # the others are trials, which become rarer


def test_all_threads_come_back_when_the_machine_is_free():
    assert settle(8, Machine(8, 0), 3, now=1) == [2, 4, 8]


def test_the_number_is_put_back(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        looks = iter([(0.0, 0.0), (time.perf_counter(), 1e6)])
        monkeypatch.setattr(Threads, "_look", staticmethod(lambda: next(looks)))
        with Threads() as chosen:
            chosen.adapt()
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("fixed", ["user", "gpu", "long sums"])
def test_the_number_stays(fixed, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    if fixed == "user":
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
    chosen = Threads("cuda" if fixed == "gpu" else "cpu", [threads.EXACT + 1] if fixed == "long sums" else [8])
    chosen.last = (0.0, -1e9)  # as if a thousand threads had waited all the time
    chosen.adapt()
    assert chosen.now == 4


def test_time_spent_waiting_for_a_core_is_read():
    seconds, waited = Threads._look()
    assert waited >= 0
    assert Threads._look()[0] >= seconds


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_has_set_is_kept(name, monkeypatch):
    import os

    for other in list(os.environ):
        if other.startswith(("OMP_", "GOMP_", "KMP_")):
            monkeypatch.delenv(other)
    monkeypatch.setenv(name, "7")
    threads.set_waiting()
    assert os.environ.get("GOMP_SPINCOUNT") == ("7" if name == "GOMP_SPINCOUNT" else None)
    monkeypatch.delenv(name)
    threads.set_waiting()
    assert os.environ.pop("GOMP_SPINCOUNT") == threads.SPINS
