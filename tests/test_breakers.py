"""A breaker opens once, stays open longer and longer, and lets one try at a time."""

from __future__ import annotations

import itertools
import os
import threading
import typing as t

import pytest

from flask_commondb.breakers import FIRST_PAUSE
from flask_commondb.breakers import LONGEST_PAUSE
from flask_commondb.breakers import LONGEST_TRIAL
from flask_commondb.breakers import Breaker


class Clock:
    """Tells the time that it is set to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    """One without jitter: its pauses are the longest that there can be."""
    return Breaker(clock, lambda low, high: high)


def test_closed_at_first(breaker: Breaker) -> None:
    """A server that has not failed is used, and nobody tries it."""
    assert breaker.is_closed
    assert breaker.retry_in == 0
    assert not breaker.claim()


def test_opens_once(breaker: Breaker) -> None:
    """What many find out at the same time opens it once, and does not make the pause longer."""
    answers = [breaker.trip() for _ in range(5)]
    assert answers == [FIRST_PAUSE, None, None, None, None]
    assert not breaker.is_closed
    assert breaker.retry_in == FIRST_PAUSE


def test_nobody_tries_before_its_time(breaker: Breaker, clock: Clock) -> None:
    """Before the pause is over nobody may try; from then on one may."""
    breaker.trip()
    clock.now += FIRST_PAUSE - 0.001
    assert not breaker.claim()
    clock.now += 0.001
    assert [breaker.claim() for _ in range(3)] == [True, False, False]


def test_backoff(breaker: Breaker, clock: Clock) -> None:
    """Each trial that fails doubles the pause, up to the longest one."""
    pauses = [breaker.trip()]
    for _ in range(7):
        clock.now += breaker.retry_in
        assert breaker.claim()
        pauses.append(breaker.fail())
    assert pauses == [1, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]


def test_closes(breaker: Breaker, clock: Clock) -> None:
    """A trial that succeeds closes it, and the next failure begins with the first pause again."""
    breaker.trip()
    for _ in range(3):
        clock.now += breaker.retry_in
        assert breaker.claim()
        breaker.fail()
    clock.now += breaker.retry_in
    assert breaker.claim()
    breaker.close()
    assert breaker.is_closed
    assert breaker.trip() == FIRST_PAUSE


def test_opened_while_it_is_closed(breaker: Breaker) -> None:
    """Whoever opens it while another one closes it has the last word, and it closes again later."""

    class OpenedMeanwhile(list[bool]):
        def __setitem__(self, index: t.Any, value: t.Any) -> None:
            super().__setitem__(index, value)
            breaker.trip()

    breaker.trip()
    breaker._closed = OpenedMeanwhile()
    breaker.close()
    opened = not breaker.is_closed
    breaker._closed = []
    breaker.close()
    assert opened
    assert breaker.is_closed


def test_an_abandoned_trial(breaker: Breaker, clock: Clock) -> None:
    """When one who tries is never heard of again, another one tries after a minute."""
    breaker.trip()
    clock.now += FIRST_PAUSE
    assert breaker.claim()
    clock.now += LONGEST_TRIAL
    assert not breaker.claim()
    clock.now += 0.1
    assert [breaker.claim() for _ in range(2)] == [True, False]


def test_jitter(clock: Clock) -> None:
    """No two pauses are the same, and each is between half of the longest and the longest."""
    pauses = []
    for _ in range(50):
        breaker = Breaker(clock)
        pauses.append(breaker.trip() or 0)
    assert len(set(pauses)) == 50
    assert all(FIRST_PAUSE / 2 <= pause <= FIRST_PAUSE for pause in pauses)


def test_many_threads(clock: Clock) -> None:
    """Of many threads one opens it, and one is the one to try."""
    for _ in range(50):
        breaker = Breaker(clock)
        opened = in_threads(breaker.trip)
        clock.now += FIRST_PAUSE
        claimed = in_threads(breaker.claim)
        assert len([pause for pause in opened if pause is not None]) == 1
        assert sorted(claimed) == [False] * 7 + [True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_tries_for_itself(breaker: Breaker, clock: Clock) -> None:
    """A trial of the parent is none of the child, which would wait for its end in vain."""
    breaker.trip()
    clock.now += FIRST_PAUSE
    assert breaker.claim()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if [breaker.claim(), breaker.claim()] == [True, False] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not breaker.claim()


def test_any_history(clock: Clock) -> None:
    """Whatever happens in whatever order: closed, or open with somebody who may try in time."""
    for history in itertools.product(["trip", "claim", "wait", "fail", "close"], repeat=5):
        breaker = Breaker(clock, lambda low, high: high)
        is_mine = False
        for event in history:
            if event == "trip":
                breaker.trip()
            elif event == "wait":
                clock.now += LONGEST_PAUSE
            elif event == "claim":
                is_mine = breaker.claim() or is_mine
            elif is_mine:
                getattr(breaker, event)()
                is_mine = False
        clock.now += LONGEST_PAUSE
        assert breaker.is_closed or is_mine or breaker.claim()


def in_threads(work: t.Callable[[], t.Any]) -> list[t.Any]:
    """What eight threads get that do it at the same time."""
    barrier = threading.Barrier(8)
    results: list[t.Any] = []

    def wait_and_work() -> None:
        barrier.wait()
        results.append(work())

    threads = [threading.Thread(target=wait_and_work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
