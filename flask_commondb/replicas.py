"""The replicas of one bind, and which of them serves next.

Owns: :class:`Replica` with all that is known of it, :class:`ReplicaSet`, the order of zones, and
the limit of reads that fall back to the primary.

Must not: connect, know Flask, or look at the real clock: one is injected.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import time
import typing as t

import sqlalchemy as sa

from .breakers import Breaker
from .holders import has_room
from .policies import Policy
from .policies import fastest_of_two
from .positions import Positions

#: Of so many statements the fastest is what a replica's latency is taken for: one that is slow by
#: itself says nothing of the server.
SAMPLES = 3

#: Seconds after which an old latency counts half, so that a replica that was slow is tried again.
HALF_LIFE = 0.75

#: Seconds; no latency counts for more.
SLOWEST = 2.0

#: Seconds: a replica that was found behind is not asked again before, or before a quarter of what
#: it may be behind.
LOOK_AGAIN = 1.0


@dataclasses.dataclass(eq=False)
class Replica:
    """One server that reads can go to.

    :param bind_key: the bind that it is a replica of.
    :param name: what it is called in logs and pages; never with a user or a password.
    :param engine: its engine, whose connections are read-only.
    :param weight: its share of the reads, relative to the others.
    :param zone: where it stands, for ``COMMONDB_ZONES``.
    :param url: as it was given, by which it is known when it is given once more.
    :param streaming: its engine for results that are read while they arrive, if that is another.
    :param clock: returns seconds that only ever grow.
    """

    bind_key: str | None
    name: str
    engine: sa.Engine
    weight: float = 1
    zone: str | None = None
    url: sa.URL | None = dataclasses.field(default=None, repr=False)
    streaming: sa.Engine | None = None
    clock: t.Callable[[], float] = dataclasses.field(default=time.monotonic, repr=False)
    breaker: Breaker = dataclasses.field(init=False, repr=False)
    #: Whether no further unit of work is to begin there.
    is_draining: bool = False
    #: Whether nothing is to go there any more.
    is_removed: bool = False
    #: Whether its server is the bind's primary at present.
    is_primary: bool = False
    #: Where the policy :func:`.round_robin` stands.
    credit: float = dataclasses.field(default=0, repr=False)
    #: For each server that its URL has led to: up to which time that is known to have all that was
    #: committed, on the clock.
    proofs: dict[str, float] = dataclasses.field(default_factory=dict, repr=False)
    #: When it was last found to be behind.
    _behind_at: float = dataclasses.field(default=float("-inf"), repr=False)
    #: The trials of its breaker that are under way: see :mod:`.probing`.
    knocks: list[t.Any] = dataclasses.field(default_factory=list, repr=False)
    _timed_at: float = dataclasses.field(default=float("-inf"), repr=False)
    #: The process that renews the proof of its position.
    _renewing: dict[int, object] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.breaker = Breaker(self.clock)
        self._samples: collections.deque[float] = collections.deque(maxlen=SAMPLES)

    @property
    def in_use(self) -> int:
        """How many of its connections are checked out in this process."""
        pool = self.engine.pool
        return pool.checkedout() if isinstance(pool, sa.QueuePool) else 0

    @property
    def has_room(self) -> bool:
        """Whether its pool has a connection, or may open one."""
        return has_room(self.engine.pool)

    @property
    def latency(self) -> float:
        """How many seconds a statement takes there, as it looks at present; 0 if not known."""
        samples = self._samples.copy()
        if len(samples) < SAMPLES:
            return 0.0
        age = max(0.0, self.clock() - self._timed_at)
        return float(min(*samples, SLOWEST) * 0.5 ** (age / HALF_LIFE))

    def time(self, seconds: float) -> None:
        """A statement has taken so long there."""
        self._samples.append(seconds)
        self._timed_at = self.clock()

    def behind(self, server: str | None = None) -> float:
        """How many seconds it is behind at most, as far as that is proved; else infinity.

        :param server: one of those that its URL leads to; ``None``: the most current one.
        """
        nothing = float("-inf")
        proofs = self.proofs.copy()
        proof = max(proofs.values(), default=nothing)
        return self.clock() - (proof if server is None else proofs.get(server, nothing))

    def is_behind(self, max_lag: float) -> bool:
        """Whether it was found to be further behind, just now."""
        pause = min(max_lag / 4, LOOK_AGAIN)
        return self.behind() > max_lag and self.clock() - self._behind_at < pause

    def found_behind(self) -> None:
        """It could not be proved to be current enough."""
        self._behind_at = self.clock()

    def claim_renewal(self) -> bool:
        """Whether the caller is to renew a proof before it grows too old.

        He then calls :meth:`end_renewal`.
        """
        mine = object()
        return self._renewing.setdefault(os.getpid(), mine) is mine

    def end_renewal(self) -> None:
        """Others may renew it, when it is time."""
        self._renewing.clear()


class ReplicaSet:
    """All replicas of one bind.

    :param replicas: in the order of the configuration.
    :param policy: picks among those that can be used.
    :param zones: in the order of preference; a replica in none of them comes last.
    :param max_lag: how many seconds a replica may be behind; ``None``: any.
    :param fallback: where reads go when no replica serves: ``"primary"``, ``"stale"`` or
        ``"error"``.
    :param fallback_limit: how many units of work may read from the primary at once for want of a
        replica; ``None``: as many as its pool has connections.
    """

    def __init__(
        self,
        replicas: t.Iterable[Replica] = (),
        policy: Policy = fastest_of_two,
        zones: t.Sequence[str] = (),
        max_lag: float | None = None,
        fallback: str = "primary",
        fallback_limit: int | None = None,
    ) -> None:
        #: Replaced, never changed: others may be looking through it.
        self.replicas = tuple(replicas)
        self.max_lag = max_lag
        self.fallback = fallback
        self.slots = Slots(fallback_limit)
        self.positions = Positions()
        #: While it is open the primary is not asked how far it is.
        self.primary_breaker = Breaker(time.monotonic)
        self._policy = policy
        self._zones = {zone: rank for rank, zone in enumerate(zones)}

    def choose(
        self, max_lag: float | None = None, tried: t.Container[Replica] = ()
    ) -> Replica | None:
        """A replica for one unit of work, ``None`` when none can be used. No I/O.

        Parameters as for :meth:`candidates`.
        """
        candidates = self.candidates(max_lag, tried)
        if not candidates:
            return None
        chosen = self._policy(candidates)
        if chosen not in candidates:
            raise TypeError(
                f"The policy {getattr(self._policy, '__name__', self._policy)!r} must return one of"
                f" the replicas that it is given, not {chosen!r}."
            )
        return t.cast(Replica, chosen)

    def candidates(
        self, max_lag: float | None = None, tried: t.Container[Replica] = ()
    ) -> list[Replica]:
        """The replicas among which the policy chooses.

        Those of the first zone are used as long as one of them can be, and has connections left.

        :param max_lag: leave out those that were found further behind.
        :param tried: leave these out as well.
        """
        candidates = [
            replica
            for replica in self.replicas
            if self.is_up(replica)
            and replica not in tried
            and not (max_lag is not None and replica.is_behind(max_lag))
        ]
        if len(candidates) > 1:
            candidates = self._nearest([each for each in candidates if each.has_room] or candidates)
        return candidates

    def is_up(self, replica: Replica) -> bool:
        """Whether a unit of work may begin there."""
        is_out = replica.is_draining or replica.is_removed or replica.is_primary
        return replica.breaker.is_closed and not is_out

    def why_none(self) -> str:
        """Why :meth:`choose` has found none: ``"replica_down"``, or ``"lag"`` if one is up."""
        return "lag" if any(map(self.is_up, self.replicas)) else "replica_down"

    def add(self, replica: Replica) -> None:
        """Use one more."""
        self.replicas = (*self.replicas, replica)

    def remove(self, replica: Replica) -> None:
        """Use one no more, not even for the units of work that read from it now."""
        replica.is_removed = True
        self.replicas = tuple(each for each in self.replicas if each is not replica)

    def _nearest(self, candidates: list[Replica]) -> list[Replica]:
        last = len(self._zones)
        ranks = [self._zones.get(replica.zone or "", last) for replica in candidates]
        nearest = min(ranks)
        return [each for each, rank in zip(candidates, ranks, strict=True) if rank == nearest]


class Slots:
    """How many units of work may do something at once, in one process.

    :param limit: ``None`` for any number.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        #: Those that are free, by process: what a fork's parent has taken is not the child's.
        self._free: dict[int, collections.deque[None]] = {}

    def take(self) -> Slot | None:
        """A slot, or ``None`` if there is none left."""
        if self.limit is None:
            return Slot(collections.deque())
        free = self._of_process(self.limit)
        try:
            free.pop()
        except IndexError:
            return None
        return Slot(free)

    def _of_process(self, limit: int) -> collections.deque[None]:
        free = self._free.get(os.getpid())
        if free is None:
            free = self._free.setdefault(os.getpid(), collections.deque([None] * limit))
        return free


class Slot:
    """One that is taken. It is given back when it is dropped, too, as by a session never closed.

    :param free: where it comes from.
    """

    def __init__(self, free: collections.deque[None]) -> None:
        #: How many sessions of its unit of work are in a transaction.
        self.holders = 0
        self._free: collections.deque[None] | None = free

    def give_back(self) -> None:
        """It is free again."""
        free, self._free = self._free, None
        if free is not None:
            free.append(None)

    def __del__(self) -> None:
        self.give_back()
