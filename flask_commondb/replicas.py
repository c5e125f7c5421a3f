"""The replicas of one bind, and which of them serves next.

Owns: :class:`Replica`, :class:`ReplicaSet`, the policy, and the pause after a failed connect.

Must not: connect, know Flask, or look at the real clock: one is injected.
"""

from __future__ import annotations

import dataclasses
import random
import time
import typing as t

import sqlalchemy as sa

#: Seconds for which a replica that could not be reached is left alone.
PAUSE = 5.0


@dataclasses.dataclass(eq=False)
class Replica:
    """One server that reads can go to.

    :param bind_key: the bind that it is a replica of.
    :param name: what it is called in logs and pages; never with a user or a password.
    :param engine: its engine, whose connections are read-only.
    :param weight: its share of the reads, relative to the others.
    :param streaming: its engine for results that are read while they arrive, if that is another.
    """

    bind_key: str | None
    name: str
    engine: sa.Engine
    weight: float = 1
    streaming: sa.Engine | None = None
    #: When it may be tried again, on the set's clock. Written and read as one value: no lock.
    paused_until: float = dataclasses.field(default=float("-inf"), repr=False)


#: A policy takes the candidates, of which there is at least one, and returns the one to use.
Policy = t.Callable[[t.Sequence[Replica]], Replica]


def weighted_random(candidates: t.Sequence[Replica]) -> Replica:
    """A random candidate, each as often as its weight says."""
    return random.choices(candidates, [candidate.weight for candidate in candidates])[0]


class ReplicaSet:
    """All replicas of one bind.

    :param replicas: in the order of the configuration.
    :param policy: picks among those that are not paused.
    :param clock: returns seconds that only ever grow.
    """

    def __init__(
        self,
        replicas: t.Sequence[Replica],
        policy: Policy = weighted_random,
        clock: t.Callable[[], float] = time.monotonic,
    ) -> None:
        self.replicas = tuple(replicas)
        self._policy = policy
        self._clock = clock

    def choose(self) -> Replica | None:
        """A replica for one unit of work, or ``None`` when all are paused. No I/O."""
        now = self._clock()
        candidates = [replica for replica in self.replicas if replica.paused_until <= now]
        return self._policy(candidates) if candidates else None

    def pause(self, replica: Replica) -> None:
        """Leave a replica alone for :data:`PAUSE` seconds: it could not be reached."""
        replica.paused_until = self._clock() + PAUSE
