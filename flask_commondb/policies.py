"""Which of several replicas serves a unit of work: policies are functions.

Owns: those that come with the package. Each takes the candidates, of which there is at least one,
and returns one of them. One of the user's own is as good.

Must not: know whether a candidate can be reached, or do any I/O.
"""

from __future__ import annotations

import random
import typing as t

#: Seconds of difference that say nothing: the next statement may take as much more or less.
NOISE = 0.005


class Candidate(t.Protocol):
    """What a policy knows of a replica."""

    @property
    def weight(self) -> float:
        """Its share of the reads, relative to the others."""

    @property
    def in_use(self) -> int:
        """How many of its connections are checked out in this process."""

    @property
    def latency(self) -> float:
        """How many seconds a statement takes there, as it looks at present; 0 if not known."""

    #: Kept by :func:`round_robin`.
    credit: float


C = t.TypeVar("C", bound=Candidate)

#: What a policy is.
Policy = t.Callable[[t.Sequence[t.Any]], t.Any]


def fastest_of_two(candidates: t.Sequence[C]) -> C:
    """Of two that are drawn by weight the one that is expected to be done first.

    The first drawn serves, unless it would take more than twice as long: so weights are obeyed
    among those that are about as fast, and one that is slow gets next to nothing.
    """
    first, second = _two(candidates)
    return second if _expected(first) > 2 * _expected(second) + NOISE else first


def random_of_two(candidates: t.Sequence[C]) -> C:
    """Of two that are drawn by weight the one that is less busy for its weight."""
    first, second = _two(candidates)
    return second if first.in_use / first.weight > second.in_use / second.weight else first


def round_robin(candidates: t.Sequence[C]) -> C:
    """Each in its turn, and in turn as often as its weight says, evenly mixed."""
    for candidate in candidates:
        candidate.credit += candidate.weight
    chosen = max(candidates, key=lambda candidate: candidate.credit)
    chosen.credit -= sum(candidate.weight for candidate in candidates)
    return chosen


def least_checked_out(candidates: t.Sequence[C]) -> C:
    """The one with the fewest connections in use for its weight; by weight among equals."""
    fewest = min(candidate.in_use / candidate.weight for candidate in candidates)
    idlest = [each for each in candidates if each.in_use / each.weight <= fewest]
    return _draw(idlest or candidates)


#: By the names that ``COMMONDB_POLICY`` takes.
POLICIES: dict[str, Policy] = {
    "fastest_of_two": fastest_of_two,
    "random_of_two": random_of_two,
    "round_robin": round_robin,
    "least_checked_out": least_checked_out,
}


def _two(candidates: t.Sequence[C]) -> tuple[C, C]:
    """Two of them at random, by weight; twice the same if there is but one."""
    if len(candidates) == 1:
        return candidates[0], candidates[0]
    first = _draw(candidates)
    return first, _draw([each for each in candidates if each is not first])


def _draw(candidates: t.Sequence[C]) -> C:
    if len(candidates) == 1:
        return candidates[0]
    return random.choices(candidates, [candidate.weight for candidate in candidates])[0]


def _expected(candidate: Candidate) -> float:
    """Seconds until a statement would be done that is given to it now."""
    return candidate.latency * (1 + candidate.in_use / candidate.weight)
