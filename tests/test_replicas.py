"""Which of a bind's replicas may serve: those that are up, in the nearest zone, and current."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
import typing as t

import pytest
import sqlalchemy as sa

from flask_commondb.policies import random_of_two
from flask_commondb.replicas import HALF_LIFE
from flask_commondb.replicas import LOOK_AGAIN
from flask_commondb.replicas import SLOWEST
from flask_commondb.replicas import Replica
from flask_commondb.replicas import ReplicaSet
from flask_commondb.replicas import Slots


@dataclasses.dataclass
class Clock:
    """Tells the time that it is set to."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_only_one() -> None:
    """A single replica is always the one."""
    (replica,) = make_replicas(1)
    assert ReplicaSet([replica]).choose() is replica


def test_none() -> None:
    """A set of none has none to choose."""
    assert ReplicaSet([]).choose() is None
    assert ReplicaSet([]).why_none() == "replica_down"


def test_down() -> None:
    """One whose breaker is open is not chosen; when all are, there is none."""
    first, second = make_replicas(2)
    replicas = ReplicaSet([first, second])
    first.breaker.trip()
    assert {replicas.choose() for _ in range(20)} == {second}
    second.breaker.trip()
    assert replicas.choose() is None
    assert replicas.why_none() == "replica_down"


def test_draining() -> None:
    """One that is draining is not chosen, and is again when it is not draining any more."""
    first, second = make_replicas(2)
    replicas = ReplicaSet([first, second])
    first.is_draining = True
    assert {replicas.choose() for _ in range(20)} == {second}
    first.is_draining = False
    assert {replicas.choose() for _ in range(40)} == {first, second}


def test_add_and_remove() -> None:
    """What is added is chosen from then on, what is removed is not."""
    first, second = make_replicas(2)
    replicas = ReplicaSet([first])
    replicas.add(second)
    assert {replicas.choose() for _ in range(40)} == {first, second}
    replicas.remove(first)
    assert {replicas.choose() for _ in range(20)} == {second}
    assert first.is_removed


def test_tried() -> None:
    """What has been tried in vain is left out."""
    first, second = make_replicas(2)
    replicas = ReplicaSet([first, second])
    assert replicas.choose(tried=[first]) is second
    assert replicas.choose(tried=[first, second]) is None


def test_policy() -> None:
    """The policy is given those that can be used, in the order of the configuration."""
    first, second, third = make_replicas(3)
    asked: list[list[Replica]] = []

    def last(candidates: t.Sequence[Replica]) -> Replica:
        asked.append(list(candidates))
        return candidates[-1]

    replicas = ReplicaSet([first, second, third], policy=last)
    second.breaker.trip()
    assert replicas.choose() is third
    assert asked == [[first, third]]


@pytest.mark.parametrize("answer", [None, "replica-0", 0])
def test_policy_that_chooses_no_candidate(answer: t.Any) -> None:
    """A policy of the user's own that returns something else is told so."""

    def mistaken(candidates: t.Sequence[Replica]) -> t.Any:
        return answer

    with pytest.raises(TypeError, match=r"'mistaken' must return one of the replicas"):
        ReplicaSet(make_replicas(2), policy=mistaken).choose()


def test_zones() -> None:
    """The nearest zone serves as long as it can; then the next; those in no zone come last."""
    far, near, other, near_too, nowhere = make_replicas(5)
    far.zone, near.zone, near_too.zone, other.zone = "far", "near", "near", "other"
    replicas = ReplicaSet([far, near, other, near_too, nowhere], zones=["near", "far"])
    assert {replicas.choose() for _ in range(40)} == {near, near_too}
    near.breaker.trip()
    assert {replicas.choose() for _ in range(20)} == {near_too}
    near_too.breaker.trip()
    assert {replicas.choose() for _ in range(20)} == {far}
    far.is_draining = True
    assert {replicas.choose() for _ in range(40)} == {other, nowhere}


def test_zones_without_room() -> None:
    """A zone whose connections are all in use spills over, until all zones' are."""
    near, far = make_replicas(2)
    near.zone = "near"
    replicas = ReplicaSet([near, far], zones=["near"])
    taken = [near.engine.connect() for _ in range(2)]
    assert not near.has_room
    assert replicas.choose() is far
    taken += [far.engine.connect() for _ in range(2)]
    assert replicas.choose() is near
    for connection in taken:
        connection.close()
    assert near.has_room


def test_current(clock: Clock) -> None:
    """A replica is current up to the age of its proof; without one it may be, and is looked at."""
    (replica,) = make_replicas(1, clock=clock)
    replicas = ReplicaSet([replica])
    assert replica.behind() == math.inf
    assert replicas.choose(max_lag=5) is replica
    replica.proofs.update(a=clock.now, b=clock.now - 3)
    clock.now += 5
    assert [replica.behind(server) for server in (None, "a", "b", "c")] == [5, 5, 8, math.inf]
    replica.found_behind()
    assert replicas.choose(max_lag=5) is replica
    assert replicas.choose(max_lag=4.9) is None


def test_behind(clock: Clock) -> None:
    """One that was found behind is left out for a moment by who asks for as much, not by others."""
    first, second = make_replicas(2, clock=clock)
    replicas = ReplicaSet([first, second])
    first.found_behind()
    assert {replicas.choose(max_lag=10) for _ in range(20)} == {second}
    assert {replicas.choose() for _ in range(40)} == {first, second}
    second.found_behind()
    assert replicas.choose(max_lag=10) is None
    assert replicas.why_none() == "lag"
    clock.now += LOOK_AGAIN
    assert replicas.choose(max_lag=10) in (first, second)
    first.found_behind()
    first.proofs["a"] = clock.now - 20
    assert replicas.choose(max_lag=30) is not None  # for them it is current
    assert first.is_behind(10)
    assert not first.is_behind(30)
    clock.now += 0.26
    assert not first.is_behind(1)  # those who want more may look again sooner


def test_one_renews() -> None:
    """Of those who see that a proof is to be renewed one does it."""
    (replica,) = make_replicas(1)
    assert [replica.claim_renewal() for _ in range(3)] == [True, False, False]
    replica.end_renewal()
    assert replica.claim_renewal()


def test_latency(clock: Clock) -> None:
    """A latency is that of the fastest of the last few statements, once there are as many."""
    (replica,) = make_replicas(1, clock=clock)
    for seconds in (3, 0.3):
        replica.time(seconds)
        assert replica.latency == 0
    for seconds in (9, 8):  # statements that take long by themselves
        replica.time(seconds)
        assert replica.latency == 0.3
    replica.time(7)
    assert replica.latency == SLOWEST


def test_latency_is_forgotten(clock: Clock) -> None:
    """A latency that is not measured anew is halved again and again, so that one is tried again."""
    (replica,) = make_replicas(1, clock=clock)
    for _ in range(3):
        replica.time(0.4)
    clock.now += HALF_LIFE
    assert replica.latency == pytest.approx(0.2)
    clock.now += 2 * HALF_LIFE
    assert replica.latency == pytest.approx(0.05)
    replica.time(0.4)
    assert replica.latency == pytest.approx(0.4)
    clock.now -= 50  # it only grows, but should not matter
    assert replica.latency == pytest.approx(0.4)


def test_in_use() -> None:
    """What is checked out of a replica's pool is in use there."""
    (replica,) = make_replicas(1)
    assert replica.in_use == 0
    with replica.engine.connect():
        assert replica.in_use == 1
    assert replica.in_use == 0


def test_repr_names_no_password() -> None:
    """A replica in a log line shows no password."""
    engine = sa.create_engine("sqlite://", connect_args={"check_same_thread": False})
    engine.url = sa.make_url("mysql+pymysql://user:sesame@replica.example/app")
    shown = repr(Replica("orders", "replica.example", engine))
    assert "replica.example" in shown
    assert "sesame" not in shown


def test_slots() -> None:
    """So many have a slot at once, and one that is given back can be taken again."""
    slots = Slots(2)
    first, second = slots.take(), slots.take()
    assert first is not None
    assert second is not None
    assert slots.take() is None
    first.give_back()
    first.give_back()  # once more changes nothing
    third = slots.take()
    assert third is not None
    assert slots.take() is None


def test_a_slot_that_is_dropped() -> None:
    """A slot whose owner is collected without having given it back is free again."""
    slots = Slots(1)
    slot = slots.take()
    assert slots.take() is None
    del slot
    assert slots.take() is not None


def test_slots_without_limit() -> None:
    """Without a limit there is always one."""
    slots = Slots(None)
    assert all(slots.take() is not None for _ in range(100))


def test_slots_of_many_threads() -> None:
    """Never more than the limit have one, and never is one lost."""
    slots = Slots(3)
    have: list[object] = []
    most = [0]

    def work() -> None:
        for _ in range(300):
            slot = slots.take()
            if slot is not None:
                have.append(slot)
                most[0] = max(most[0], len(have))
                have.remove(slot)
                slot.give_back()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] <= 3
    taken = [slots.take() for _ in range(4)]
    assert [slot is not None for slot in taken] == [True, True, True, False]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_slots_after_a_fork() -> None:
    """What the parent has taken is not missing in the child."""
    slots = Slots(1)
    taken = slots.take()
    assert taken is not None
    pid = os.fork()
    if pid == 0:
        taken.give_back()  # is the parent's
        childs = [slots.take() for _ in range(2)]
        os._exit(0 if [slot is None for slot in childs] == [False, True] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def make_replicas(count: int, clock: t.Callable[[], float] = lambda: math.pi) -> list[Replica]:
    return [
        Replica(
            None,
            f"replica-{index}",
            sa.create_engine("sqlite://", poolclass=sa.QueuePool, pool_size=2, max_overflow=0),
            clock=clock,
        )
        for index in range(count)
    ]


def test_weights_among_those_left() -> None:
    """While one is down the others share its reads by their weights."""
    first, second, third = make_replicas(3)
    first.weight, third.weight = 5, 3
    replicas = ReplicaSet([first, second, third], policy=random_of_two)
    first.breaker.trip()
    chosen = [replicas.choose() for _ in range(3000)]
    assert first not in chosen
    assert chosen.count(third) / 3000 == pytest.approx(0.75, abs=0.05)
