"""What routing knows of one app, and rules 4 to 7: where a statement goes.

Owns: :class:`Router`, which holds an app's engines and replicas, :class:`Unit`, where a unit of
work stands on one bind, and :func:`decide`.

Must not: do any I/O, or keep anything of a unit of work.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import typing as t
import weakref

import sqlalchemy as sa
from flask import Flask

from . import pools
from . import signals
from .commits import Place
from .errors import UnknownReplicaError
from .holders import NoWatch
from .naming import server_name
from .primaries import Candidates
from .replicas import Replica
from .replicas import ReplicaSet
from .replicas import Slot
from .scopes import Said
from .statements import Facts
from .statements import Reader

#: The methods of a request that only reads.
READ_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "QUERY"})


class Route(t.NamedTuple):
    """Where a statement would go: see :meth:`.CommonDB.explain_route`.

    :param bind_key: the bind that owns it.
    :param role: ``"primary"``, ``"replica"``, or ``"refused"`` for a :exc:`.NoReplicaError`.
    :param server: the server's name. When no replica is chosen yet, one that may be.
    :param reason: as in the signal :data:`.signals.routed`.
    :param rule: which of the eight rules has decided.
    """

    bind_key: str | None
    role: str
    server: str
    reason: str
    rule: int


@dataclasses.dataclass
class Unit:
    """Where one unit of work stands on one bind that has replicas.

    :param bind_key: the bind.
    :param replica: the one it reads from, once chosen.
    :param reads: how often it has asked for that one's connection.
    :param pinned: why the unit stays on the primary, ``None`` as long as it may read elsewhere.
    :param is_fallback: whether it does so for want of a replica only.
    :param slot: its place among those who do, as long as one of its sessions is in a transaction.
    """

    bind_key: str | None
    replica: Replica | None = None
    reads: int = 0
    pinned: str | None = None
    is_fallback: bool = False
    slot: Slot | None = None

    def pin(self, reason: str, *, is_fallback: bool = False) -> None:
        """Stay on the primary for the rest of the unit's life. The first reason counts.

        :param reason: in the words of :data:`.signals.routed`.
        """
        if self.pinned is None or (self.is_fallback and not is_fallback):
            self.pinned = reason
            self.is_fallback = is_fallback


class Verdict(t.NamedTuple):
    """What the rules say of a statement.

    :param reason: why the primary answers, ``None`` if a replica may.
    :param rule: the one that has decided.
    :param pins: whether the unit is to stay on the primary.
    :param is_fallback: whether it is a read that only wants a replica.
    """

    reason: str | None
    rule: int
    pins: bool = False
    is_fallback: bool = False


def decide(
    unit: Unit, facts: Facts | None, said: Said, method: str | None, *, is_flush: bool
) -> Verdict:
    """Rules 4 to 7. Changes nothing.

    :param facts: of the statement; ``None``: it is not known.
    :param said: by the scopes that are entered.
    :param method: the request's, ``None`` where it says nothing.
    :param is_flush: whether the session is flushing.
    """
    not_read = "write" if is_flush else None if facts is None else facts.not_read
    if facts is not None and facts.is_text and not is_flush and said.role == "replica":
        not_read = None  # is taken at its word
    if unit.pinned is not None and not (unit.is_fallback and not_read):
        is_fallback = unit.is_fallback and facts is not None
        return Verdict(unit.pinned, 8 if unit.is_fallback else 4, is_fallback=is_fallback)
    if not_read:
        return Verdict(not_read, 7, pins=True)
    if facts is None:
        return Verdict("unknown", 7)
    if said.role is not None:
        return Verdict(None if said.role == "replica" else "scope", 5)
    if method is not None:
        return Verdict(None if method in READ_METHODS else "method", 6)
    return Verdict("default", 6)


#: In the place of the replicas of a bind that has none.
_NONE = ReplicaSet()


@dataclasses.dataclass(frozen=True)
class Router:
    """What routing needs to know of one app. Made by ``init_app``, the same for every request.

    :param app: whose it is.
    :param engines: the engines of all binds.
    :param reader: finds out whether a statement is a read.
    :param by_method: whether rule 6 applies.
    :param watch: who holds the app's connections.
    """

    app: weakref.ref[Flask]
    engines: t.Mapping[str | None, sa.Engine]
    reader: Reader
    by_method: bool
    watch: NoWatch
    #: For each bind that has replicas.
    replica_sets: dict[str | None, ReplicaSet] = dataclasses.field(default_factory=dict)
    #: The same replicas, by their engines; also one that was removed, while somebody reads there.
    replicas: weakref.WeakValueDictionary[t.Any, Replica] = dataclasses.field(
        default_factory=weakref.WeakValueDictionary
    )
    #: What the primaries are called.
    primaries: dict[str | None, str] = dataclasses.field(default_factory=dict)
    #: Of the binds whose primary may be on several servers.
    candidates: dict[str | None, Candidates] = dataclasses.field(default_factory=dict)
    #: By process: a fork's child could find its parent's held.
    _locks: dict[int, threading.Lock] = dataclasses.field(default_factory=dict)

    @property
    def changing(self) -> threading.Lock:
        """For those who change which replicas there are."""
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def add(self, replica: Replica, make_set: t.Callable[[], ReplicaSet]) -> None:
        """Route the reads of a bind to a replica, too.

        :param make_set: makes the set of the bind's replicas, if this is the first.
        """
        self.replicas[replica.engine] = replica
        candidates = self.candidates.get(replica.bind_key)
        if candidates is not None and candidates.has(replica.engine.url):
            replica.is_primary = candidates.is_primary(replica.engine.url)
            pools.refuse_writable(replica.engine)
        replicas = self.replica_sets.get(replica.bind_key) or make_set()
        replicas.add(replica)
        self.replica_sets[replica.bind_key] = replicas

    def remove(self, replica: Replica) -> None:
        """Route no reads there any more."""
        replicas = self.replica_sets.get(replica.bind_key)
        if replicas is not None:
            replicas.remove(replica)
            if not replicas.replicas:
                del self.replica_sets[replica.bind_key]

    def named(self, bind_key: str | None, server: str) -> list[Replica]:
        """The replicas of a bind that have this name: one, unless it is several databases'.

        :raises UnknownReplicaError: if there is none.
        """
        replicas = self.replica_sets.get(bind_key, _NONE).replicas
        found = [replica for replica in replicas if replica.name == server]
        if not found:
            raise UnknownReplicaError(bind_key, server, [replica.name for replica in replicas])
        return found

    def bind_key_of(self, engine: sa.Engine, default: str | None = None) -> str | None:
        """The bind that an engine leads to, also when it has execution options of its own."""
        replica = self.replicas.get(engine)
        if replica is not None:
            return replica.bind_key
        for bind_key, known in self.engines.items():
            if known.engine.pool is engine.pool:
                return bind_key
        return default

    def primary_name(self, bind_key: str | None) -> str:
        """What the primary of a bind is called."""
        name = self.primaries.get(bind_key)
        if name is None:
            name = self.primaries[bind_key] = server_name(self.engines[bind_key].engine.url)
        return name

    def note_move(self, bind_key: str | None, server: str, former: str) -> None:
        """The primary of a bind is another server now."""
        self.primaries[bind_key] = server
        self.replica_sets.get(bind_key, _NONE).positions.forget()
        for replica in self.replica_sets.get(bind_key, _NONE).replicas:
            replica.is_primary = self.candidates[bind_key].is_primary(replica.engine.url)
        app = self.app()
        if app is not None:
            values = {"bind_key": bind_key, "server": server, "former": former}
            signals.send(signals.primary_changed, app, **values)

    def servers(self) -> t.Iterator[tuple[sa.Engine, str | None, str, str]]:
        """For each server its engine, bind key, role and name; a primary before its replicas."""
        for bind_key, engine in self.engines.items():
            yield engine, bind_key, "primary", self.primary_name(bind_key)
            for replica in self.replica_sets.get(bind_key, _NONE).replicas:
                yield replica.engine, bind_key, "replica", replica.name

    def place_of(self, connection: sa.Connection) -> Place:
        """Where a connection stands in a commit: the default bind first, then as configured.

        Last comes an engine of the caller's own, which is called by its server's name.
        """
        bind_key = self.bind_key_of(connection.engine, server_name(connection.engine.url))
        keys = sorted(self.engines, key=lambda key: key is not None)
        return Place(keys.index(bind_key) if bind_key in keys else len(keys), bind_key)
