"""The connections to replicas that a session holds, and what it does when there is none.

Owns: rule 8: a replica for the unit of work, another one when that cannot be reached or is behind,
and the fall back to the primary with its limit.

Must not: decide whether a statement may be answered by a replica at all.
"""

from __future__ import annotations

import logging
import math
import time
import typing as t

import sqlalchemy as sa

from . import pools
from .errors import NoReplicaError
from .liveness import AT_ONCE
from .probing import look_after
from .probing import report_down
from .replicas import Replica
from .replicas import ReplicaSet
from .router import Unit

_logger = logging.getLogger("flask_commondb")

#: Seconds before each look at a replica that is only just behind.
_MOMENTS = (0.0, 0.001, 0.002, 0.004, 0.008, 0.016)


class Need(t.NamedTuple):
    """What a read asks of the replica that answers it.

    :param max_lag: how many seconds it may be behind; ``None``: any.
    :param fallback: where to read when none serves: ``"primary"``, ``"stale"`` or ``"error"``.
    """

    max_lag: float | None
    fallback: str


class ReplicaReads:
    """The replica connections of one session, and its place among those that fall back.

    They are the session's own, beside its transaction: commit and rollback do not know of them, so
    they cannot change what these report.

    :param is_stream: whether results are read while they arrive: see :mod:`.streams`.
    """

    def __init__(self, is_stream: bool = False) -> None:
        #: By bind key.
        self.connections: dict[str | None, sa.Connection] = {}
        self.is_stream = is_stream
        #: The units of work on each bind whose slot it holds, with others or alone.
        self._held: dict[str | None, Unit] = {}

    def connection(
        self,
        unit: Unit,
        replicas: ReplicaSet,
        need: Need,
        primary: sa.Engine,
        *,
        is_repeated: bool,
    ) -> tuple[sa.Connection | None, bool]:
        """The connection to the unit's replica, made when needed; ``None``: use the primary.

        As long as nothing was read, a replica that cannot be reached, or is too far behind, has the
        next one take its place. After that it is the same replica or the primary, which is never
        behind it.

        :param unit: has a replica, though that may turn out to be of no use.
        :param primary: is asked how far it is, when there is a ``max_lag``.
        :param is_repeated: whether a statement that finds the connection dead will be repeated, so
            that it need not be looked at before.
        :returns: also whether it is further behind than it may.
        :raises NoReplicaError: if there is none, and the primary is not to be used either.
        """
        bind_key = unit.bind_key
        connection = self.connections.get(bind_key)
        if (  # as for most reads after a unit's first
            is_repeated
            and connection is not None
            and need.max_lag is None
            and unit.replica is not None
            and not unit.replica.is_removed
            and not connection.closed
            and not connection.invalidated
        ):
            unit.reads += 1
            return connection, False
        look_after(replicas)
        connection, reason = self._find(unit, replicas, need.max_lag, primary)
        is_stale = connection is None and reason == "lag" and need.fallback == "stale"
        if is_stale:
            unit.replica = unit.replica or replicas.choose()
            connection, reason = self._find(unit, replicas, None, primary)
        if connection is None:
            self._let_go(bind_key)
            self.fall_back(unit, replicas, need, reason)
        else:
            unit.reads += 1
        return connection, is_stale

    def fall_back(self, unit: Unit, replicas: ReplicaSet, need: Need, reason: str) -> None:
        """Have a read go to the primary for want of a replica, and the unit with it.

        :param reason: ``"replica_down"`` or ``"lag"``.
        :raises NoReplicaError: if it may not, or too many do so already.
        """
        if need.fallback != "primary" and unit.pinned is None:
            raise NoReplicaError(unit.bind_key, reason)
        if unit.bind_key not in self._held:
            if unit.slot is None:
                unit.slot = replicas.slots.take()
            if unit.slot is None:
                raise NoReplicaError(unit.bind_key, reason, replicas.slots.limit)
            unit.slot.holders += 1
            self._held[unit.bind_key] = unit
        unit.pin(reason, is_fallback=True)

    def leave(self, unit: Unit) -> None:
        """Give the connection to the unit's replica back."""
        self._let_go(unit.bind_key)

    def lost(self, unit: Unit, started: float) -> bool:
        """Whether a statement may be repeated, because its replica's connection was lost.

        It is given back. Nothing was read by the statement, and a replica writes nothing. But when
        it ran for long and the server lives, the statement itself may be why it was ended.

        :param started: when it was sent, on the replica's clock.
        """
        connection = self.connections.get(unit.bind_key)
        if connection is None or unit.replica is None or pools.is_usable(connection):
            return False
        self._let_go(unit.bind_key)
        replica = unit.replica
        unit.reads = max(0, unit.reads - 1)
        was_short = replica.clock() - started <= AT_ONCE
        return was_short or replica.breaker.tripped_at >= started or self._connect(unit) is None

    def release(self) -> None:
        """Give everything back. No I/O, and raises no Exception."""
        for bind_key in list(self.connections):
            error = self._let_go(bind_key)
            if error is not None:
                _logger.warning(
                    "A replica connection of bind %r was thrown away: %s", bind_key, error
                )
        while self._held:
            _, unit = self._held.popitem()
            slot = unit.slot
            if slot is not None:
                slot.holders -= 1
                if slot.holders == 0:
                    unit.slot = None
                    slot.give_back()

    def _find(
        self, unit: Unit, replicas: ReplicaSet, max_lag: float | None, primary: sa.Engine
    ) -> tuple[sa.Connection | None, str]:
        """A connection for the unit, or why there is none."""
        reason, was_behind = replicas.why_none(), False
        tried: list[Replica] = []
        while unit.replica is not None:
            if max_lag is not None and unit.replica.is_behind(max_lag):
                connection, reason = None, "lag"
            else:
                connection, reason = self._connect(unit), "replica_down"
            if connection is not None:
                if max_lag is None or is_current(
                    unit.replica, connection, replicas, max_lag, primary
                ):
                    return connection, ""
                unit.replica.found_behind()
                reason = "lag"
            if unit.reads:
                return None, reason
            tried.append(unit.replica)
            was_behind = was_behind or reason == "lag"
            self._let_go(unit.bind_key)
            unit.replica = replicas.choose(max_lag, tried)
        return None, "lag" if was_behind else reason

    def _connect(self, unit: Unit) -> sa.Connection | None:
        replica = t.cast(Replica, unit.replica)
        if replica.is_removed:
            return None
        connection = self.connections.get(unit.bind_key)
        if connection is not None:
            if pools.is_usable(connection):
                return connection
            pools.discard(self.connections.pop(unit.bind_key))
        if not replica.breaker.is_closed:
            return None
        if (replica.is_draining or replica.is_primary) and not unit.reads:
            return None
        engine = replica.streaming or replica.engine if self.is_stream else replica.engine
        try:
            connection = engine.connect()
        except (sa.exc.DBAPIError, sa.exc.DisconnectionError) as error:
            report_down(replica, error)
            return None
        if t.cast("bool", replica.is_removed):  # meanwhile
            pools.close(connection)
            return None
        self.connections[unit.bind_key] = connection
        return connection

    def _let_go(self, bind_key: str | None) -> Exception | None:
        connection = self.connections.pop(bind_key, None)
        if connection is None:
            return None
        if pools.is_usable(connection):
            return pools.close(connection)
        pools.discard(connection)
        return None


def is_current(
    replica: Replica,
    connection: sa.Connection,
    replicas: ReplicaSet,
    max_lag: float,
    primary: sa.Engine,
) -> bool:
    """Whether a replica is proved to be no further behind than so many seconds.

    The primary is asked how far it is, then the replica until it is there, too, as long as that is
    a matter of milliseconds. As nothing is asked that was answered lately, most reads ask nothing.

    :param connection: to the replica.
    """
    if pools.is_local(replica.engine):  # the same file
        return True
    # One URL may lead to several servers: a proof is about the one at the end of a connection.
    server = connection.info.get(_SERVER)
    behind = math.inf if server is None else replica.behind(server)
    if behind <= max_lag:
        if behind > max_lag / 2 and replica.claim_renewal():
            try:
                _look(replica, connection, replicas, max_lag, primary)
            finally:
                replica.end_renewal()
        return replica.behind(server) <= max_lag
    for seconds in _MOMENTS:
        time.sleep(seconds)
        server = _look(replica, connection, replicas, max_lag, primary)
        if server is None:
            return False
        if replica.behind(server) <= max_lag:
            return True
    return False


def _ask_primary(replicas: ReplicaSet, primary: sa.Engine) -> bool:
    """Learn how far the primary is. While it does not answer, few try, and less and less often."""
    breaker = replicas.primary_breaker
    is_trial = not breaker.is_closed
    if is_trial and not breaker.claim():
        return False
    asked_at, position = time.monotonic(), None
    try:
        position = pools.primary_position(primary)
    finally:
        if position is not None:
            replicas.positions.add(asked_at, position)
            if is_trial:
                breaker.close()
        elif is_trial:
            breaker.fail()
        else:
            breaker.trip()
    return position is not None


def _look(
    replica: Replica,
    connection: sa.Connection,
    replicas: ReplicaSet,
    max_lag: float,
    primary: sa.Engine,
) -> str | None:
    """Learn how far both are.

    :returns: the replica's server, ``None`` if they do not answer.
    """
    positions = replicas.positions
    if replica.clock() - positions.newest > max_lag / 4 and not _ask_primary(replicas, primary):
        return None
    position = pools.position(connection)
    if position is None:
        return None
    connection.info[_SERVER] = position.server
    # Not the later one of two: a server that was restored has less than it had.
    replica.proofs[position.server] = positions.proved(position)
    return position.server


#: In the ``info`` of a driver's connection: the server at its end, as its positions name it.
_SERVER = "flask_commondb.server"
