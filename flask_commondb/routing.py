"""Where a statement goes: rules 1 to 8, in :meth:`RoutingSession.get_bind`.

Owns: the session class that routes, and what it knows of the statement and of its transaction.
Rules 4 to 7 are :func:`.router.decide`, rule 8 is :mod:`.reading`.

Must not: parse SQL text, hold a lock, or keep anything that outlives its session, context or scope.

The rules:

1. a bind given by the caller is theirs, untouched;
2. the bind that owns the statement's tables; without any, the session's own, else the default;
3. a bind without replicas has only its primary;
4. a unit of work that is pinned to the primary, by rule 7 or 8, stays there; no scope moves it;
5. an enclosing scope says where reads go;
6. else the request's method does: GET, HEAD, OPTIONS and QUERY read from a replica;
7. what is not provably a read goes to the primary, wherever reads go, and pins the unit to it;
8. the replica is chosen once for each unit and bind; with none to be reached, the unit is pinned.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import math
import time
import typing as t

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import has_request_context
from flask import request
from flask_sqlalchemy.session import Session as UpstreamSession

from . import pools
from . import procedures
from . import signals
from .commits import abandon
from .commits import commit_in_order
from .errors import NoReplicaError
from .errors import UnknownBindError
from .errors import WrongBindError
from .identities import ForeignBind
from .identities import KeepsApart
from .reading import Need
from .reading import ReplicaReads
from .replicas import Replica
from .replicas import ReplicaSet
from .router import Route
from .router import Router
from .router import Unit
from .router import Verdict
from .router import decide
from .scopes import Said
from .scopes import said_of_reads
from .statements import Facts
from .statements import mapper_owners
from .statements import single_owner

if t.TYPE_CHECKING:
    from .extension import CommonDB


class AllBinds(enum.Enum):
    """In the place of a bind key: the session of ``db.session``, which is for every bind."""

    ALL_BINDS = "all binds"


ALL_BINDS: t.Final = AllBinds.ALL_BINDS


class _Reading(t.NamedTuple):
    """A statement that a replica answers.

    :param unit: whose replica.
    :param since: when it was handed over, on the replica's clock.
    :param replicas: how many there are.
    """

    unit: Unit
    since: float
    replicas: int


class RoutingSession(KeepsApart, UpstreamSession):
    """The session of ``db.session`` and of ``db.sessions[key]``.

    What it reads from a replica stands beside its transaction: see :class:`.ReplicaReads`.
    """

    #: The bind that it is for; :data:`ALL_BINDS` for ``db.session``.
    bind_key: str | AllBinds | None = ALL_BINDS

    #: Whether the current transaction has seen anything but a SELECT that locks nothing.
    may_have_written = False

    #: Whether the last transaction was committed, whatever a listener raised after that.
    has_committed = False

    _db: CommonDB

    def __init__(self, db: CommonDB, **kwargs: t.Any) -> None:
        super().__init__(db, **kwargs)
        #: Where the unit of work stands, by bind key; all sessions of a context share that.
        self.units: dict[str | None, Unit] = {}
        #: Its connections to replicas.
        self.replica_reads = ReplicaReads()
        self._flushed: set[str | None] = set()
        #: Whose replica answers the statement that is executed now.
        self._reading: _Reading | None = None
        #: Whether what is executed now will be repeated when its replica turns out to be gone.
        self._is_repeated = False

    @functools.cached_property
    def router(self) -> Router:
        """What is known of the app that the session belongs to."""
        return self._db.router

    def join_context(
        self, bind_key: str | AllBinds | None, router: Router, units: dict[str | None, Unit]
    ) -> None:
        """Make it a session of a context, for one bind or for all."""
        self.bind_key = bind_key
        self.router = router
        self.units = units

    def get_bind(
        self,
        mapper: t.Any | None = None,
        clause: t.Any | None = None,
        bind: sa.Engine | sa.Connection | None = None,
        **kwargs: t.Any,
    ) -> sa.Engine | sa.Connection:
        """The engine for a statement, by rules 1 to 8. No I/O: a replica is connected later.

        Asked without a statement, it names the primary.
        """
        if self._flushing or (clause is not None and not _only_reads(clause)):
            self.may_have_written = True
        return bind if bind is not None else self._find_bind(mapper, clause, kwargs)  # rule 1

    def primary(self, bind_key: str | None) -> sa.Engine:
        """The engine of a bind, wherever it is read.

        :raises UnknownBindError: for a key that the app does not configure.
        """
        engines = self.router.engines
        if bind_key not in engines:
            raise UnknownBindError(bind_key, engines)
        return engines[bind_key]

    def foreign_bind(self, wanted: t.Any, bind: sa.Engine | sa.Connection) -> ForeignBind | None:
        """What tells objects apart that the caller reads from another bind than their own."""
        if isinstance(wanted, sa.ClauseElement):
            owners = self.router.reader.facts(wanted).owners
        elif isinstance(wanted, (type, sa_orm.Mapper)):
            owners = mapper_owners(wanted)
        else:  # a sequence, or a mistake: it loads no objects
            return None
        if len(owners) != 1:  # several: the caller says that one server has them all
            return None
        (owner,) = owners
        bind_key = self.router.bind_key_of(bind.engine, owner)
        return None if bind_key == owner else ForeignBind(bind_key)

    def primary_of(self, statement: t.Any) -> sa.Engine:
        """The engine of the bind that owns a statement's tables, wherever it will be read."""
        return self.primary(self._owner(None, self.router.reader.facts(statement)))

    def unit(self, bind_key: str | None) -> Unit:
        """Where the unit of work stands on a bind."""
        unit = self.units.get(bind_key)
        return self.units.setdefault(bind_key, Unit(bind_key)) if unit is None else unit

    def pin_all(self, reason: str) -> None:
        """:meth:`.Unit.pin` the unit of work on this session's bind, or on all with replicas.

        What was read from a replica is expired, so that no change is computed from old values.
        """
        is_stale = False
        for bind_key in list(self.router.replica_sets):
            if self.bind_key in (ALL_BINDS, bind_key):
                unit = self.unit(bind_key)
                is_stale = is_stale or (unit.reads > 0 and unit.pinned is None)
                unit.pin(reason)
        if is_stale:
            for instance in self.identity_map.values():
                if not self.is_modified(instance) and instance not in self.deleted:
                    self.expire(instance)

    def own_connections(self) -> list[sa.Connection]:
        """The connections of the current transaction that this session has to give back."""
        return [connection for connection, is_own in self._connections_in_use() if is_own]

    @property
    def connections_in_use(self) -> list[sa.Connection]:
        """All connections of the current transaction, in the order of their use."""
        return [connection for connection, _ in self._connections_in_use()]

    def all_connections(self) -> list[sa.Connection]:
        """:meth:`own_connections`, and those to replicas."""
        return [*self.own_connections(), *self.replica_reads.connections.values()]

    def route(self, statement: t.Any) -> Route:
        """Where a statement would go: see :meth:`.CommonDB.explain_route`. Changes nothing."""
        if isinstance(statement, sa_orm.Query):
            statement = statement.statement
        if not isinstance(statement, sa.Executable):
            raise sa.exc.ObjectNotExecutableError(statement)
        facts = self.router.reader.facts(statement)
        bind_key = self._owner(None, facts)
        self.primary(bind_key)  # or there is no such bind
        primary = self.router.primary_name(bind_key)
        replicas = self.router.replica_sets.get(bind_key)
        if replicas is None:
            return Route(bind_key, "primary", primary, "no_replicas", 3)
        unit = self.units.get(bind_key, Unit(bind_key))
        said = said_of_reads(self._db, bind_key)
        verdict = self._decide(unit, facts, said)
        if verdict.reason is not None:
            return Route(bind_key, "primary", primary, verdict.reason, verdict.rule)
        need = _need(replicas, said)
        # Not the policy: to be asked would change where the next unit of work goes.
        replica = unit.replica or next(iter(replicas.candidates(need.max_lag)), None)
        if replica is None and need.fallback == "stale":
            replica = next(iter(replicas.candidates()), None)
        if replica is None:
            role, server = ("primary", primary) if need.fallback == "primary" else ("refused", "")
            return Route(bind_key, role, server, replicas.why_none(), 8)
        reason = "read" if said.role is None else "scope"
        return Route(bind_key, "replica", replica.name, reason, verdict.rule)

    def connection(
        self,
        bind_arguments: t.Any | None = None,
        execution_options: t.Any | None = None,
    ) -> sa.Connection:
        """As in SQLAlchemy. What is done with it is not seen, so it is a connection to the primary.

        Inside ``db.replica()`` it is the replica's, and the server refuses what writes.
        """
        self.may_have_written = True
        arguments = dict(bind_arguments or {})
        if "bind" not in arguments and self.router.replica_sets:
            bind_key = self._owner(arguments.get("mapper"), None)
            if bind_key in self.router.replica_sets:
                arguments["bind"] = self._engine_for_unseen_work(bind_key)
        return super().connection(arguments, execution_options)

    def callproc(
        self, name: str, *args: t.Any, bind_key: str | None = None
    ) -> procedures.ProcedureResult:
        """Call a stored procedure in this session's transaction: see :meth:`.CommonDB.callproc`.

        :param bind_key: for ``db.session`` only; the sessions of ``db.sessions`` know their own.
        """
        bind_key = self._given_or_own(bind_key)
        if self.autoflush:
            self.flush()
        self.may_have_written = True
        self._pin_and_tell(bind_key, "procedure")
        connection = super().connection({"bind": self.primary(bind_key)})
        with procedures.announced(name, bind_key):
            return procedures.call(connection, name, args)

    @contextlib.contextmanager
    def cursor(
        self, *args: t.Any, bind_key: str | None = None, **kwargs: t.Any
    ) -> t.Iterator[t.Any]:
        """A DBAPI cursor in this session's transaction: see :meth:`.CommonDB.cursor`."""
        bind_key = self._given_or_own(bind_key)
        if self.autoflush:
            self.flush()
        self.may_have_written = True
        connection = super().connection({"bind": self._engine_for_unseen_work(bind_key)})
        with pools.raw_cursor(connection, *args, **kwargs) as cursor:
            yield cursor

    def flush(self, objects: t.Sequence[t.Any] | None = None) -> None:
        """As in SQLAlchemy."""
        if self._is_clean() and not self._flushing:  # as before nearly every SELECT
            return
        self.may_have_written = True
        self._flushed.clear()
        if len(self._db.metadatas) > 1:
            self._refuse_foreign_expressions()
        super().flush(objects)
        self._keep_order()

    def commit(self) -> None:
        """As in SQLAlchemy; when it raises it has already rolled back, the session is usable.

        Several binds are committed in order, the default bind first, then as they are configured.

        :raises PartialCommitError: if a commit fails after another has succeeded.
        """
        try:
            super().commit()
        except BaseException:
            abandon(self)
            raise

    def begin(self, nested: bool = False) -> sa_orm.SessionTransaction:
        """As in SQLAlchemy, which takes what a first savepoint stands in for begun by hand."""
        if nested and self.autobegin:
            self._autobegin_t()
        return super().begin(nested)

    def _execute_internal(self, statement: t.Any, params: t.Any = None, **kwargs: t.Any) -> t.Any:
        # SQLAlchemy says neither clause nor mapper of a union of models, and of a bare function.
        kwargs["bind_arguments"] = {"clause": statement, **(kwargs.get("bind_arguments") or {})}
        if not self.router.replica_sets:
            return super()._execute_internal(statement, params, **kwargs)
        # A listener may execute a statement inside of another's.
        outer, was_repeated, repeats = self._reading, self._is_repeated, 0
        self._is_repeated = True
        try:
            while True:
                self._reading = t.cast("_Reading | None", None)
                try:
                    return super()._execute_internal(statement, params, **kwargs)
                except sa.exc.DBAPIError as error:
                    reading = self._reading
                    if (
                        reading is None
                        or repeats > reading.replicas  # it may be the statement that does it
                        or not self._may_repeat(reading, error)
                    ):
                        raise  # else once more, on another replica or on the primary
                    repeats += 1
        finally:
            self._reading, self._is_repeated = outer, was_repeated

    def _may_repeat(self, reading: _Reading, error: sa.exc.DBAPIError) -> bool:
        """Whether it is the replica's failure, not the statement's; then it is left if need be."""
        unit = reading.unit
        if error.connection_invalidated:
            return self.replica_reads.lost(unit, reading.since)
        replicas = self.router.replica_sets.get(unit.bind_key)
        if unit.replica is None or replicas is None:
            return False
        said = said_of_reads(self._db, unit.bind_key)
        if (
            not pools.is_conflict(unit.replica.engine, error)
            or _need(replicas, said).fallback != "primary"
        ):
            return False
        # Other replicas replay the same.
        self.replica_reads.leave(unit)
        self._fall_back(unit, replicas, said, "conflict")
        return True

    def _refuse_foreign_expressions(self) -> None:
        """A flush does not show the SQL expressions that it writes.

        :raises CrossBindError: if one is about another bind than its object.
        """
        for instance in (*self.new, *self.dirty):
            for value in vars(instance).values():
                if isinstance(value, sa.ClauseElement):
                    self._owner(type(instance), self.router.reader.facts(value))

    def _find_bind(
        self, mapper: t.Any | None, clause: t.Any | None, kwargs: dict[str, t.Any]
    ) -> sa.Engine | sa.Connection:
        engines = self.router.engines
        router = self.router
        if (
            len(engines) == len(self._db.metadatas) == 1
            and not router.replica_sets
            and self.bind_key in (ALL_BINDS, None)
        ):  # only the default bind, and no model that could belong to another
            table = getattr(mapper, "local_table", None)
            is_ours = mapper is None or getattr(table, "metadata", None) is self._db.metadata
            if is_ours and None in engines:
                return engines[None]
            return super().get_bind(mapper=mapper, clause=clause, **kwargs)

        facts = None if clause is None else router.reader.facts(clause)
        bind_key = self._owner(mapper, facts)  # rule 2
        if bind_key not in engines:
            if bind_key is None:  # no default bind, and nothing that says which
                return super().get_bind(mapper=mapper, clause=clause, **kwargs)
            raise UnknownBindError(bind_key, engines)
        replicas = router.replica_sets.get(bind_key)
        if replicas is None:  # rule 3
            return engines[bind_key]
        unit = self.unit(bind_key)
        said = said_of_reads(self._db, bind_key)
        verdict = self._decide(unit, facts, said)  # rules 4 to 7
        if verdict.reason is None:  # rule 8, as far as it takes no I/O
            return self._replica_for(unit, replicas, said)
        if verdict.pins:
            unit.pin(verdict.reason)
        elif verdict.is_fallback:
            self._fall_back(unit, replicas, said, verdict.reason)
        if clause is not None or self._is_first_of_flush(bind_key):
            self._tell(bind_key, "primary", router.primary_name(bind_key), verdict.reason)
        return engines[bind_key]

    def _decide(self, unit: Unit, facts: Facts | None, said: Said) -> Verdict:
        method = request.method if self.router.by_method and has_request_context() else None
        return decide(unit, facts, said, method, is_flush=self._flushing)

    def _replica_for(self, unit: Unit, replicas: ReplicaSet, said: Said) -> sa.Engine:
        """The engine of the unit's replica, which may turn out to be of no use when connected."""
        if unit.replica is None:
            need = _need(replicas, said)
            unit.replica = replicas.choose(need.max_lag) or next(iter(replicas.replicas), None)
            if unit.replica is None:  # the last one was removed just now
                return self.primary(unit.bind_key)
        return unit.replica.engine

    def _fall_back(self, unit: Unit, replicas: ReplicaSet, said: Said, reason: str) -> None:
        try:
            self.replica_reads.fall_back(unit, replicas, _need(replicas, said), reason)
        except NoReplicaError as error:
            self._tell_refused(error)
            raise

    def _is_first_of_flush(self, bind_key: str | None) -> bool:
        """SQLAlchemy asks several times for each mapper in a flush; it is signalled once."""
        if not self._flushing or bind_key in self._flushed:
            return False
        self._flushed.add(bind_key)
        return True

    def _owner(self, mapper: t.Any | None, facts: Facts | None) -> str | None:
        """Rule 2.

        :raises CrossBindError: if tables of several binds are named.
        :raises WrongBindError: if this session is for another bind.
        """
        owners = {} if facts is None else facts.owners
        if mapper is not None:
            owners = {**owners, **mapper_owners(mapper)}
        owner = single_owner(owners)
        if self.bind_key is ALL_BINDS:
            return None if owner is None else owner[0]
        if owner is not None and owner[0] != self.bind_key:
            raise WrongBindError(self.bind_key, owner[0], owners[owner[0]])
        return self.bind_key

    def _engine_for_unseen_work(self, bind_key: str | None) -> sa.Engine:
        """The engine for work that is not shown to us as a statement."""
        primary = self.primary(bind_key)
        replicas = self.router.replica_sets.get(bind_key)
        if replicas is None:
            return primary
        unit = self.unit(bind_key)
        said = said_of_reads(self._db, bind_key)
        if unit.pinned is None and said.role == "replica":
            return self._replica_for(unit, replicas, said)
        if unit.pinned is not None and unit.is_fallback and said.role == "replica":
            self._fall_back(unit, replicas, said, unit.pinned)
            self._tell(bind_key, "primary", self.router.primary_name(bind_key), unit.pinned)
            return primary
        self._pin_and_tell(bind_key, "connection")
        return primary

    def _pin_and_tell(self, bind_key: str | None, reason: str) -> None:
        """For work that does not come through :meth:`get_bind`."""
        if bind_key in self.router.replica_sets:
            unit = self.unit(bind_key)
            unit.pin(reason)
            name = self.router.primary_name(bind_key)
            self._tell(bind_key, "primary", name, unit.pinned or reason)

    def _tell(self, bind_key: str | None, role: str, server: str, reason: str) -> None:
        signals.send(signals.routed, bind_key=bind_key, role=role, server=server, reason=reason)

    def _tell_refused(self, error: NoReplicaError) -> None:
        signals.send(signals.read_refused, bind_key=error.bind_key, error=error)

    def _connection_for_bind(
        self, engine: t.Any, execution_options: t.Any | None = None, **kwargs: t.Any
    ) -> sa.Connection:
        replica = self.router.replicas.get(engine)
        unit = None if replica is None else self.unit(replica.bind_key)
        if unit is None or unit.replica is not replica:
            # A primary's engine, or what the caller has given as a bind.
            given = super()._connection_for_bind(engine, execution_options, **kwargs)
            self._keep_order()
            return given
        # So that commit, rollback and expiry are what they are without replicas.
        self._autobegin_t()
        connection = self._replica_connection(unit)
        if connection is None:
            primary = self.primary(unit.bind_key)
            given = super()._connection_for_bind(primary, execution_options, **kwargs)
            self._keep_order()
            return given
        if execution_options:
            if "isolation_level" in execution_options:
                raise sa.exc.InvalidRequestError(
                    "A replica's connections are always in autocommit mode; for an isolation level,"
                    " read from the primary."
                )
            connection = connection.execution_options(**execution_options)
        return connection

    def _replica_connection(self, unit: Unit) -> sa.Connection | None:
        """Rule 8: the connection to the unit's replica; ``None``: use the primary."""
        bind_key = unit.bind_key
        replicas = self.router.replica_sets.get(bind_key) or ReplicaSet()
        said = said_of_reads(self._db, bind_key)
        need = _need(replicas, said)
        primary = self.primary(bind_key)
        try:
            connection, is_stale = self.replica_reads.connection(
                unit, replicas, need, primary, is_repeated=self._is_repeated
            )
        except NoReplicaError as error:
            self._tell_refused(error)
            raise
        if connection is None:
            name = self.router.primary_name(bind_key)
            self._tell(bind_key, "primary", name, unit.pinned or "replica_down")
            return None
        self._reading = _Reading(unit, time.monotonic(), len(replicas.replicas))
        reason = "fallback" if is_stale else "read" if said.role is None else "scope"
        self._tell(bind_key, "replica", t.cast(Replica, unit.replica).name, reason)
        return connection

    def _keep_order(self) -> None:
        """Commit the connections in order, if there are several by now."""
        transaction: t.Any = self.get_transaction()
        if transaction is not None and (len(transaction._connections) > 2 or self.twophase):
            commit_in_order(transaction, self.router.place_of)

    def _connections_in_use(self) -> list[tuple[sa.Connection, bool]]:
        """The connections of the current transaction in the order of their use, and which are ours.

        The others were given by the caller in the place of an engine.
        """
        transaction: t.Any = self.get_transaction()
        entries = {} if transaction is None else transaction._connections
        # Each stands there once more, under its engine.
        return [(entry[0], entry[3]) for name, entry in entries.items() if name is entry[0]]

    def _given_or_own(self, bind_key: str | None) -> str | None:
        return bind_key if self.bind_key is ALL_BINDS else self.bind_key


@sa.event.listens_for(RoutingSession, "after_commit")
def _note_commit(session: RoutingSession) -> None:
    if not session.in_nested_transaction():
        session.has_committed = True


@sa.event.listens_for(RoutingSession, "after_transaction_end")
def _transaction_ended(session: RoutingSession, transaction: sa_orm.SessionTransaction) -> None:
    if transaction.parent is None:
        session.may_have_written = False
        session.replica_reads.release()


def _only_reads(clause: t.Any) -> bool:
    """Whether a statement is a SELECT that locks nothing. What its functions do is not asked."""
    return getattr(clause, "is_select", False) and getattr(clause, "_for_update_arg", None) is None


def _need(replicas: ReplicaSet, said: Said) -> Need:
    """What a read asks: what the scopes say goes before what the bind's settings say."""
    max_lag = replicas.max_lag if said.max_lag is None else said.max_lag
    return Need(None if max_lag == math.inf else max_lag, said.fallback or replicas.fallback)
