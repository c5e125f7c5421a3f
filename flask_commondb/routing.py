"""Where a statement goes: rules 1 to 8, in :meth:`RoutingSession.get_bind`.

Owns: the role of a unit of work on each bind, the session class that routes, and the replica
connections that a session holds.

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
import dataclasses
import enum
import functools
import logging
import typing as t
import weakref

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from flask import has_request_context
from flask import request
from flask_sqlalchemy.session import Session as UpstreamSession

from . import pools
from . import procedures
from . import signals
from .commits import Place
from .commits import abandon
from .commits import commit_in_order
from .errors import UnknownBindError
from .errors import WrongBindError
from .holders import NoWatch
from .identities import ForeignBind
from .identities import KeepsApart
from .naming import server_name
from .replicas import PAUSE
from .replicas import Replica
from .replicas import ReplicaSet
from .scopes import scope_role
from .statements import Facts
from .statements import Reader
from .statements import mapper_owners
from .statements import single_owner

if t.TYPE_CHECKING:
    from .extension import CommonDB

_logger = logging.getLogger("flask_commondb")

#: The methods of a request that only reads.
READ_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "QUERY"})


class AllBinds(enum.Enum):
    """In the place of a bind key: the session of ``db.session``, which is for every bind."""

    ALL_BINDS = "all binds"


ALL_BINDS: t.Final = AllBinds.ALL_BINDS


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
    #: The same replicas, by their engines.
    replicas: dict[t.Any, Replica] = dataclasses.field(default_factory=dict)
    #: What the primaries of these binds are called.
    primaries: dict[str | None, str] = dataclasses.field(default_factory=dict)

    def add(self, bind_key: str | None, primary: str, replicas: t.Sequence[Replica]) -> None:
        """Route the reads of a bind to replicas; called while the app is initialized."""
        self.replica_sets[bind_key] = ReplicaSet(replicas)
        self.replicas.update({replica.engine: replica for replica in replicas})
        self.primaries[bind_key] = primary

    def bind_key_of(self, engine: sa.Engine, default: str | None = None) -> str | None:
        """The bind that an engine leads to, also when it has execution options of its own."""
        replica = self.replicas.get(engine)
        if replica is not None:
            return replica.bind_key
        for bind_key, known in self.engines.items():
            if known.engine.pool is engine.pool:
                return bind_key
        return default

    def servers(self) -> t.Iterator[tuple[sa.Engine, str | None, str, str]]:
        """For each server its engine, bind key, role and name; a primary before its replicas."""
        for bind_key, engine in self.engines.items():
            yield engine, bind_key, "primary", server_name(engine.engine.url)
            if bind_key in self.replica_sets:
                for replica in self.replica_sets[bind_key].replicas:
                    yield replica.engine, bind_key, "replica", replica.name

    def place_of(self, connection: sa.Connection) -> Place:
        """Where a connection stands in a commit: the default bind first, then as configured.

        Last comes an engine of the caller's own, which is called by its server's name.
        """
        bind_key = self.bind_key_of(connection.engine, server_name(connection.engine.url))
        keys = sorted(self.engines, key=lambda key: key is not None)
        return Place(keys.index(bind_key) if bind_key in keys else len(keys), bind_key)


@dataclasses.dataclass
class BindRole:
    """Where one unit of work stands on one bind that has replicas.

    :param replica: the one it reads from, once chosen.
    :param has_read: whether anything was read from it.
    :param pinned: why the unit stays on the primary, ``None`` as long as it may read elsewhere.
    """

    replica: Replica | None = None
    has_read: bool = False
    pinned: str | None = None


class RoutingSession(KeepsApart, UpstreamSession):
    """The session of ``db.session`` and of ``db.sessions[key]``.

    A replica's connection is the session's own, beside its transaction: commit and rollback do
    not know of it, so it cannot change what they report.
    """

    #: The bind that it is for; :data:`ALL_BINDS` for ``db.session``.
    bind_key: str | AllBinds | None = ALL_BINDS

    #: Whether the current transaction has seen anything but a SELECT that locks nothing.
    may_have_written = False

    #: Whether the last transaction was committed, whatever a listener raised after that.
    has_committed = False

    #: Whether its results are read while they arrive: see :mod:`.streams`.
    is_stream = False

    _db: CommonDB

    def __init__(self, db: CommonDB, **kwargs: t.Any) -> None:
        super().__init__(db, **kwargs)
        #: The roles of the unit of work, by bind key; all sessions of a context share them.
        self.roles: dict[str | None, BindRole] = {}
        #: The replica connections, by bind key.
        self.replica_connections: dict[str | None, sa.Connection] = {}
        self._flushed: set[str | None] = set()

    @functools.cached_property
    def router(self) -> Router:
        """What is known of the app that the session belongs to."""
        return self._db.router

    def join_context(
        self, bind_key: str | AllBinds | None, router: Router, roles: dict[str | None, BindRole]
    ) -> None:
        """Make it a session of a context, for one bind or for all."""
        self.bind_key = bind_key
        self.router = router
        self.roles = roles

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

    def role(self, bind_key: str | None) -> BindRole:
        """Where the unit of work stands on a bind."""
        role = self.roles.get(bind_key)
        return self.roles.setdefault(bind_key, BindRole()) if role is None else role

    def pin(self, bind_key: str | None, reason: str) -> None:
        """Keep the unit of work on the primary of a bind for the rest of its life.

        :param reason: why, in the words of :data:`.signals.routed`.
        """
        role = self.role(bind_key)
        role.pinned = role.pinned or reason

    def pin_all(self, reason: str) -> None:
        """:meth:`pin` this session's bind, or all binds that have replicas.

        What was read from a replica is expired, so that no change is computed from old values.
        """
        is_stale = False
        for bind_key in self.router.replica_sets:
            if self.bind_key in (ALL_BINDS, bind_key):
                role = self.role(bind_key)
                is_stale = is_stale or (role.has_read and role.pinned is None)
                self.pin(bind_key, reason)
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
        return [*self.own_connections(), *self.replica_connections.values()]

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

    def release_replica_connections(self) -> None:
        """Give the replica connections back to their pools. No I/O, and raises no Exception."""
        while self.replica_connections:
            bind_key, connection = self.replica_connections.popitem()
            error = pools.close(connection)
            if error is not None:
                _logger.warning(
                    "A replica connection of bind %r was thrown away: %s", bind_key, error
                )

    def _execute_internal(self, statement: t.Any, params: t.Any = None, **kwargs: t.Any) -> t.Any:
        # SQLAlchemy says neither clause nor mapper of a union of models, and of a bare function.
        kwargs["bind_arguments"] = {"clause": statement, **(kwargs.get("bind_arguments") or {})}
        return super()._execute_internal(statement, params, **kwargs)

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
        if bind_key not in router.replica_sets:  # rule 3
            return engines[bind_key]

        role = self.role(bind_key)
        reason = self._reason_for_primary(bind_key, role, facts)  # rules 4 to 7
        if reason is None:
            role.replica = role.replica or router.replica_sets[bind_key].choose()  # rule 8
            if role.replica is not None:
                return role.replica.engine
            role.pinned = reason = "replica_down"
        if clause is not None or self._is_first_of_flush(bind_key):
            _send_routed(bind_key, "primary", router.primaries[bind_key], reason)
        return engines[bind_key]

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

    def _reason_for_primary(
        self, bind_key: str | None, role: BindRole, facts: Facts | None
    ) -> str | None:
        """Rules 4 to 7: why the primary answers, ``None`` if a replica may."""
        if self._flushing:
            self.pin(bind_key, "write")
        if role.pinned is not None:  # rule 4, and what rule 7 has decided before
            return role.pinned
        scope = scope_role(self._db, bind_key)
        if facts is None:
            return "unknown"
        if facts.not_read is not None and not (facts.is_text and scope == "replica"):  # rule 7
            self.pin(bind_key, facts.not_read)
            return facts.not_read
        if scope is not None:  # rule 5
            return None if scope == "replica" else "scope"
        if self.router.by_method and has_request_context():  # rule 6
            return None if request.method in READ_METHODS else "method"
        return "default"

    def _engine_for_unseen_work(self, bind_key: str | None) -> sa.Engine:
        """The engine for work that is not shown to us as a statement."""
        primary = self.primary(bind_key)
        replicas = self.router.replica_sets.get(bind_key)
        if replicas is None:
            return primary
        role = self.role(bind_key)
        if role.pinned is None and scope_role(self._db, bind_key) == "replica":
            role.replica = role.replica or replicas.choose()
            if role.replica is not None:
                return role.replica.engine
            role.pinned = "replica_down"
        self._pin_and_tell(bind_key, "connection")
        return primary

    def _pin_and_tell(self, bind_key: str | None, reason: str) -> None:
        """For work that does not come through :meth:`get_bind`."""
        if bind_key in self.router.replica_sets:
            self.pin(bind_key, reason)
            name = self.router.primaries[bind_key]
            _send_routed(bind_key, "primary", name, self.role(bind_key).pinned or reason)

    def _connection_for_bind(
        self, engine: t.Any, execution_options: t.Any | None = None, **kwargs: t.Any
    ) -> sa.Connection:
        replica = self.router.replicas.get(engine)
        if replica is None or self.role(replica.bind_key).replica is not replica:
            # A primary's engine, or what the caller has given as a bind.
            given = super()._connection_for_bind(engine, execution_options, **kwargs)
            self._keep_order()
            return given
        # So that commit, rollback and expiry are what they are without replicas.
        self._autobegin_t()
        connection = self._replica_connection(replica.bind_key)
        if connection is None:
            primary = self.primary(replica.bind_key)
            name = self.router.primaries[replica.bind_key]
            _send_routed(replica.bind_key, "primary", name, "replica_down")
            given = super()._connection_for_bind(primary, execution_options, **kwargs)
            self._keep_order()
            return given
        name = t.cast(Replica, self.role(replica.bind_key).replica).name
        reason = "read" if scope_role(self._db, replica.bind_key) is None else "scope"
        _send_routed(replica.bind_key, "replica", name, reason)
        if execution_options:
            if "isolation_level" in execution_options:
                raise sa.exc.InvalidRequestError(
                    "A replica's connections are always in autocommit mode; for an isolation level,"
                    " read from the primary."
                )
            connection = connection.execution_options(**execution_options)
        return connection

    def _replica_connection(self, bind_key: str | None) -> sa.Connection | None:
        """The connection to the unit's replica, made when needed; ``None``: use the primary.

        A replica that cannot be reached is paused and the next one is tried, as long as nothing
        was read. After that it is the same replica or the primary, which is never behind it.
        """
        connection = self.replica_connections.get(bind_key)
        if connection is not None:
            if pools.is_usable(connection):
                return connection
            pools.discard(self.replica_connections.pop(bind_key))
        role = self.role(bind_key)
        replicas = self.router.replica_sets[bind_key]
        while role.replica is not None:
            try:
                connection = self._replica_engine(role.replica).connect()
            except sa.exc.DBAPIError as error:
                replicas.pause(role.replica)
                _report_down(role.replica, error)
                role.replica = None if role.has_read else replicas.choose()
            else:
                role.has_read = True
                self.replica_connections[bind_key] = connection
                return connection
        self.pin(bind_key, "replica_down")
        return None

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

    def _replica_engine(self, replica: Replica) -> sa.Engine:
        return replica.streaming or replica.engine if self.is_stream else replica.engine

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
        if session.replica_connections:
            session.release_replica_connections()


def _only_reads(clause: t.Any) -> bool:
    """Whether a statement is a SELECT that locks nothing. What its functions do is not asked."""
    return getattr(clause, "is_select", False) and getattr(clause, "_for_update_arg", None) is None


def _report_down(replica: Replica, error: sa.exc.DBAPIError) -> None:
    _logger.warning(
        "Replica %s of bind %r cannot be reached and is left alone for %g seconds: %s",
        replica.name,
        replica.bind_key,
        PAUSE,
        error.orig,
        extra={"bind_key": replica.bind_key, "server": replica.name},
    )
    signals.send(signals.replica_down, bind_key=replica.bind_key, server=replica.name, error=error)


def _send_routed(bind_key: str | None, role: str, server: str, reason: str) -> None:
    signals.send(signals.routed, bind_key=bind_key, role=role, server=server, reason=reason)
