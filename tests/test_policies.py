"""Which candidate a policy takes: by weight, in turn, by what is in use and by how fast it is."""

from __future__ import annotations

import collections
import dataclasses
import random
import typing as t

import pytest

from flask_commondb.policies import NOISE
from flask_commondb.policies import POLICIES
from flask_commondb.policies import Policy
from flask_commondb.policies import fastest_of_two
from flask_commondb.policies import least_checked_out
from flask_commondb.policies import random_of_two
from flask_commondb.policies import round_robin

CHOICES = 6000


@dataclasses.dataclass(eq=False)
class Server:
    """A candidate with figures that are set by hand."""

    name: str
    weight: float = 1
    in_use: int = 0
    latency: float = 0
    credit: float = 0


@pytest.fixture(autouse=True)
def _seeded() -> t.Iterator[None]:
    """The random numbers of a fixed seed; the ones of before are put back."""
    state = random.getstate()
    random.seed(20)
    yield
    random.setstate(state)


each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@each_policy
def test_only_one(policy: Policy) -> None:
    """A single candidate is always the one, however slow or busy it is."""
    server = Server("a", in_use=99, latency=9)
    assert {policy([server]) for _ in range(10)} == {server}


@each_policy
@pytest.mark.parametrize(
    "weights", [(1, 1), (1, 2), (1, 1, 1), (0.5, 1.5, 3), (1, 99), (2, 2, 4, 8)]
)
def test_weights(policy: Policy, weights: tuple[float, ...]) -> None:
    """Among those that are as fast and as busy, each has the share that its weight says."""
    servers = [Server(str(index), weight) for index, weight in enumerate(weights)]
    counts = shares(policy, servers)
    for server, weight in zip(servers, weights, strict=True):
        share = weight / sum(weights)
        # Five standard deviations of so many draws.
        tolerance = 5 * (share * (1 - share) / CHOICES) ** 0.5
        assert counts[server.name] == pytest.approx(share, abs=tolerance)


def test_round_robin() -> None:
    """Each comes in its turn, evenly mixed, and one that was left out does not catch up at once."""
    a, b, c = Server("a", 2), Server("b"), Server("c")
    assert "".join(round_robin([a, b, c]).name for _ in range(8)) == "abcaabca"
    assert {round_robin([a, c]).name for _ in range(6)} == {"a", "c"}
    assert [round_robin([a, b, c]).name for _ in range(8)].count("b") <= 3


def test_random_of_two() -> None:
    """Of two the less busy one for its weight serves."""
    busy, idle, strong = Server("busy", in_use=3), Server("idle"), Server("strong", 4, in_use=8)
    assert shares(random_of_two, [busy, idle]) == {"idle": 1}
    assert shares(random_of_two, [busy, strong]) == {"strong": 1}
    # Of three the busiest is taken only if it meets nobody else, which is never.
    assert "busy" not in shares(random_of_two, [busy, idle, strong])


def test_least_checked_out() -> None:
    """The one with the fewest connections in use for its weight; among equals by weight."""
    servers = [Server("a", in_use=2), Server("b", 3, in_use=3), Server("c", in_use=1)]
    counts = shares(least_checked_out, servers)
    assert counts.keys() == {"b", "c"}
    assert counts["b"] == pytest.approx(0.75, abs=0.03)


def test_a_slow_one() -> None:
    """One that is slow is left alone, as long as the other is not busier by as much."""
    slow, fast = Server("slow", latency=0.3), Server("fast", latency=0.0005)
    assert shares(fastest_of_two, [slow, fast]) == {"fast": 1}
    fast.in_use = 500  # now it is expected to take as long
    assert shares(fastest_of_two, [slow, fast])["slow"] == pytest.approx(0.5, abs=0.04)


def test_noise() -> None:
    """What is less than twice as slow, or slower by a few milliseconds, is as fast."""
    a, b = Server("a", latency=0.0002 + NOISE), Server("b", latency=0.0002)
    assert shares(fastest_of_two, [a, b])["a"] == pytest.approx(0.5, abs=0.04)
    a.latency, b.latency = 0.019, 0.010
    assert shares(fastest_of_two, [a, b])["a"] == pytest.approx(0.5, abs=0.04)
    a.latency = 0.026
    assert shares(fastest_of_two, [a, b]) == {"b": 1}


def test_a_busy_one() -> None:
    """When statements take long, it counts how many are under way already."""
    busy = Server("busy", in_use=5, latency=0.05)
    idle = Server("idle", in_use=1, latency=0.05)
    assert shares(fastest_of_two, [busy, idle]) == {"idle": 1}


def shares(policy: Policy, servers: t.Sequence[Server]) -> dict[str, float]:
    counts = collections.Counter(policy(servers).name for _ in range(CHOICES))
    return {name: count / CHOICES for name, count in counts.items()}
