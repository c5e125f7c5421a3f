"""The choice among a bind's replicas: by weight, without those that could not be reached."""

from __future__ import annotations

import collections
import dataclasses
import random
import typing as t

import pytest
import sqlalchemy as sa

from flask_commondb.replicas import PAUSE
from flask_commondb.replicas import Replica
from flask_commondb.replicas import ReplicaSet
from flask_commondb.replicas import weighted_random

CHOICES = 6000


@dataclasses.dataclass
class Clock:
    """Tells the time that it is set to."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def seeded() -> t.Iterator[None]:
    """The random numbers of a fixed seed; the ones of before are put back."""
    state = random.getstate()
    random.seed(20)
    yield
    random.setstate(state)


@pytest.mark.usefixtures("seeded")
@pytest.mark.parametrize(
    "weights", [(1, 1), (1, 2), (1, 1, 1), (0.5, 1.5, 3), (1, 99), (2, 2, 4, 8)]
)
def test_weights(weights: tuple[float, ...]) -> None:
    """Each replica is chosen as often as its share of all the weights says."""
    replicas = make_replicas(*weights)
    replica_set = ReplicaSet(replicas)
    counts = collections.Counter(chosen(replica_set) for _ in range(CHOICES))
    for replica, weight in zip(replicas, weights, strict=True):
        share = weight / sum(weights)
        # Five standard deviations of so many draws.
        tolerance = 5 * (share * (1 - share) / CHOICES) ** 0.5
        assert counts[replica.name] / CHOICES == pytest.approx(share, abs=tolerance)


@pytest.mark.usefixtures("seeded")
def test_weights_among_those_left() -> None:
    """While one is paused the others share its reads by their weights."""
    first, second, third = make_replicas(5, 1, 3)
    replica_set = ReplicaSet([first, second, third])
    replica_set.pause(first)
    counts = collections.Counter(chosen(replica_set) for _ in range(CHOICES))
    assert counts.keys() == {second.name, third.name}
    assert counts[third.name] / CHOICES == pytest.approx(0.75, abs=0.03)


def test_only_one() -> None:
    """A single replica is always the one."""
    (replica,) = make_replicas(3)
    assert ReplicaSet([replica]).choose() is replica


def test_pause_and_return(clock: Clock) -> None:
    """A paused replica is left alone for exactly the pause, then it may be chosen again."""
    (replica,) = make_replicas(1)
    replica_set = ReplicaSet([replica], clock=clock)
    replica_set.pause(replica)
    answers = []
    for elapsed in (0, PAUSE / 2, PAUSE - 0.001, PAUSE, PAUSE + 1):
        clock.now = 100.0 + elapsed
        answers.append(replica_set.choose())
    assert answers == [None, None, None, replica, replica]


def test_pause_again(clock: Clock) -> None:
    """A pause counts from the last failure, not from the first."""
    (replica,) = make_replicas(1)
    replica_set = ReplicaSet([replica], clock=clock)
    replica_set.pause(replica)
    clock.now += PAUSE - 1
    replica_set.pause(replica)
    clock.now += PAUSE - 1
    assert replica_set.choose() is None
    clock.now += 1
    assert replica_set.choose() is replica


@pytest.mark.parametrize("now", [0.0, -5.0, 1e9])
def test_fresh_replicas_are_available(clock: Clock, now: float) -> None:
    """A replica that never failed can be chosen, wherever the clock starts to count."""
    clock.now = now
    (replica,) = make_replicas(1)
    assert ReplicaSet([replica], clock=clock).choose() is replica


def test_all_paused(clock: Clock) -> None:
    """When every replica is paused there is none, until the first comes back."""
    first, second = make_replicas(1, 1)
    replica_set = ReplicaSet([first, second], clock=clock)
    replica_set.pause(first)
    clock.now += 1
    replica_set.pause(second)
    assert replica_set.choose() is None
    clock.now += PAUSE - 1
    assert replica_set.choose() is first


def test_no_replicas() -> None:
    """A set of none has none to choose."""
    assert ReplicaSet([]).choose() is None


def test_policy(clock: Clock) -> None:
    """The policy is given those that are not paused, in the order of the configuration."""
    first, second, third = make_replicas(1, 1, 1)
    asked: list[t.Sequence[Replica]] = []

    def last(candidates: t.Sequence[Replica]) -> Replica:
        asked.append(list(candidates))
        return candidates[-1]

    replica_set = ReplicaSet([first, second, third], policy=last, clock=clock)
    replica_set.pause(second)
    assert replica_set.choose() is third
    for replica in (first, third):
        replica_set.pause(replica)
    assert replica_set.choose() is None
    assert asked == [[first, third]]


def test_policy_by_default(seeded: None) -> None:
    """Without a policy of one's own the choice is :func:`.weighted_random`'s."""
    replicas = make_replicas(1, 2, 3)
    replica_set = ReplicaSet(replicas)
    random.seed(3)
    by_set = [replica_set.choose() for _ in range(50)]
    random.seed(3)
    assert by_set == [weighted_random(replicas) for _ in range(50)]


def test_a_replica_is_itself() -> None:
    """Two replicas are never equal: what one has run into is not the other's."""
    first, _ = make_replicas(1, 1)
    twin = dataclasses.replace(first)
    assert first != twin
    ReplicaSet([first]).pause(first)
    assert ReplicaSet([first, twin]).choose() is twin


def test_repr_names_no_password() -> None:
    """A replica in a log line shows no password."""
    engine = sa.create_engine("sqlite://", connect_args={"check_same_thread": False})
    engine.url = sa.make_url("mysql+pymysql://user:sesame@replica.example/app")
    shown = repr(Replica("orders", "replica.example", engine))
    assert "replica.example" in shown
    assert "sesame" not in shown


def make_replicas(*weights: float) -> list[Replica]:
    return [
        Replica(None, f"replica-{index}", sa.create_engine("sqlite://"), weight)
        for index, weight in enumerate(weights)
    ]


def chosen(replica_set: ReplicaSet) -> str:
    replica = replica_set.choose()
    assert replica is not None
    return replica.name
