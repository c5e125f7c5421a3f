"""What happens to a connection between the server and a session.

Owns: what is set up on an engine, replica connections that are read-only and do no I/O when a
session ends, and the driver's connection under one that is checked out.

Must not: choose a server, or know of sessions.
"""

from __future__ import annotations

import contextlib
import copy
import typing as t
import weakref

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from . import addresses
from . import forks
from . import keeping
from . import liveness
from .dialects import CurrentLimits
from .dialects import Generic
from .dialects import Limits
from .dialects import Position
from .dialects import dialect_for
from .dialects import uncounted
from .errors import TwoPhaseNotSupported
from .executing import Executor
from .executing import Traffic
from .holders import has_room
from .options import PoolSettings
from .patience import Patience

#: A replica's engine always has this. Each SELECT sees the newest data, and nothing stays open.
REPLICA_ISOLATION = "AUTOCOMMIT"


def prepare(
    engine: sa.Engine,
    settings: PoolSettings,
    bind_key: str | None,
    limits: CurrentLimits,
    *,
    has_replicas: bool = False,
) -> None:
    """Make a primary's engine ready. Called once, before its first connection.

    :param engine: the engine of a bind.
    :param settings: what the bind's options say beyond SQLAlchemy's.
    :param bind_key: the bind.
    :param limits: what the caller allows to a statement at the moment.
    :param has_replicas: whether reads will go elsewhere.
    """
    dialect = _prepare(engine, settings, bind_key, limits, is_primary=True)
    if has_replicas:
        _with_replicas.add(engine)

    @sa.event.listens_for(engine, "connect")
    def connect(dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        if engine in _with_replicas:
            dialect.prepare_primary(dbapi_connection)


def prepare_replica(
    engine: sa.Engine,
    settings: PoolSettings,
    bind_key: str | None,
    limits: CurrentLimits,
    timed: t.Callable[[float], None] | None = None,
    on_dead: t.Callable[[], None] | None = None,
) -> None:
    """Make a replica's engine ready: read-only by the server's hand, and silent at the end.

    At commit, rollback and close its connections send nothing, so that a dead replica can never
    change what the primary's commit reports.

    :param engine: an engine with the isolation level :data:`REPLICA_ISOLATION`. The others as for
        :func:`prepare`.
    :param timed: is told how many seconds each statement has taken.
    :param on_dead: is told each time that the server, which says nothing to a statement, says
        nothing to a knock either.
    """
    dialect = _prepare(engine, settings, bind_key, limits, is_primary=False, timed=timed)
    dialect.be_patient(Patience(engine, dialect, on_dead))
    engine.dialect.do_commit = engine.dialect.do_rollback = _nothing  # type: ignore[method-assign]
    if not dialect.streams_in_autocommit:
        engine.dialect.supports_server_side_cursors = False

    @sa.event.listens_for(engine, "connect")
    def connect(dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        dialect.hold_read_only(dbapi_connection)

    @sa.event.listens_for(engine, "reset")
    def reset(dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry, state: t.Any) -> None:
        # text("START TRANSACTION") in a replica scope would hand an old snapshot to the next user,
        # and a result that is still being read would go on reading the next user's socket.
        if engine in _retired or dialect.is_left_open(dbapi_connection):
            entry.invalidate()


def expect_replicas(engine: sa.Engine) -> None:
    """The engine of a primary that has had no replicas yet will have some."""
    _with_replicas.add(engine)
    if is_local(engine):  # the file is what has to be prepared
        engine.dispose()


def is_local(engine: sa.Engine) -> bool:
    """Whether the engine's database is part of this process."""
    return dialect_for(engine).is_local


def warm(engine: sa.Engine) -> None:
    """Have the engine's pool hold a connection that the server answers on.

    :raises sqlalchemy.exc.DBAPIError: if the server cannot be reached.
    """
    with engine.connect() as connection:
        if not dialect_for(engine).answers(t.cast(t.Any, _drivers_own(connection))):
            connection.invalidate()
            raise sa.exc.DisconnectionError("The server does not answer on a new connection.")


def position(connection: sa.Connection) -> Position | None:
    """How far a replica is, asked on a connection that is checked out; ``None`` if it says nothing.

    One round trip, which is no use of the connection, and is counted apart.
    """
    dbapi_connection = _drivers_own(connection)
    if dbapi_connection is None:
        return None
    try:
        return _ask_position(connection.engine, dbapi_connection)
    except connection.dialect.loaded_dbapi.Error as error:
        connection.invalidate(error)
        return None


def primary_position(engine: sa.Engine) -> Position | None:
    """How far a primary is; ``None`` if it does not say.

    Four round trips: one to know that it answers at all, as it would be waited for; one to know
    that it is a primary; and one that ends the transaction which some drivers begin for a question.
    """
    dialect, driver_error = dialect_for(engine), engine.dialect.loaded_dbapi.Error
    # Those who wait for a place in the pool are not to be told that replicas are behind.
    pool = engine.pool if has_room(engine.pool) else sa.NullPool(engine.pool._creator)
    try:
        proxied = pool.connect()
    except (sa.exc.SQLAlchemyError, driver_error):
        return None
    try:
        dbapi_connection = t.cast(t.Any, proxied.dbapi_connection)
        if not dialect.answers(dbapi_connection):
            proxied.invalidate()
            return None
        count_probe(engine)
        if dialect.is_writable(dbapi_connection):  # one that is demoted shows its replay's
            return _ask_position(engine, dbapi_connection)
    except driver_error as error:
        proxied.invalidate(error)
    finally:
        with contextlib.suppress(Exception):
            proxied.close()
    return None


def refuse_writable(engine: sa.Engine) -> None:
    """Have a replica's engine connect to no server that can be written to.

    One that was the primary, and comes back as if it still were, has a history of its own.
    """
    dialect = dialect_for(engine)

    @sa.event.listens_for(engine, "connect")
    def connect(dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        count_probe(engine)
        if dialect.is_writable(dbapi_connection):
            raise sa.exc.DisconnectionError("It can be written to, so it is no replica.")


def is_conflict(engine: sa.Engine, error: sa.exc.DBAPIError) -> bool:
    """Whether a replica's engine says that what is replayed there has ended a read."""
    return dialect_for(engine).is_conflict(error.orig)


def retire(engine: sa.Engine) -> None:
    """Close a replica's connections: what is idle now, what is in use when it comes back."""
    _retired.add(engine)  # no listener: others may be going through its listeners
    engine.dispose()


def traffic(engine: sa.Engine) -> Traffic:
    """What was sent to the engine's server by this process."""
    found = _executors.get(engine.dialect)
    executor = None if found is None else found()
    return Traffic(0, 0) if executor is None else executor.traffic


def count_probe(engine: sa.Engine) -> None:
    """The engine's server was asked something that nobody else has asked for."""
    found = _executors.get(engine.dialect)
    executor = None if found is None else found()
    if executor is not None:
        executor.probes.add()


def is_usable(connection: sa.Connection) -> bool:
    """Whether a connection that is checked out can take another statement. No round trip."""
    dbapi_connection = _drivers_own(connection)
    return dbapi_connection is not None and not dialect_for(connection.engine).is_dead(
        dbapi_connection
    )


def refuse_without_twophase(engine: sa.Engine, bind_key: str | None) -> None:
    """Make sure that a server can prepare a transaction.

    :raises TwoPhaseNotSupported: if it cannot. Asked once of each engine that can.
    """
    if engine in _twophase:
        return
    reason = dialect_for(engine).why_no_twophase(engine)
    if reason is not None:
        raise TwoPhaseNotSupported(
            f"A two-phase transaction cannot have a part on bind {bind_key!r}: {reason}."
        )
    _twophase.add(engine)


def streaming(engine: sa.Engine) -> sa.Engine:
    """A replica's engine for results that are read while they arrive; with the same pool.

    Where the driver streams inside a transaction only, its connections have one, and end it.
    """
    if dialect_for(engine).streams_in_autocommit:
        return engine
    variant = engine.execution_options(isolation_level="READ COMMITTED")
    variant.dialect = copy.copy(engine.dialect)
    variant.dialect.supports_server_side_cursors = True
    del variant.dialect.do_commit, variant.dialect.do_rollback
    _executors[variant.dialect] = _executors[engine.dialect]  # what is sent there is counted, too
    return variant


def stop_reading(connection: sa.Connection) -> None:
    """Throw a connection away if it has a result that was not read to its end.

    To close it properly would be to read all of it.
    """
    if is_reading(connection):
        discard(connection)


def end_read(connection: sa.Connection) -> None:
    """Roll back a transaction that has only read; what the server says to that is read later.

    It is of no interest now. That the connection is lost is found out when it leaves its pool.
    """
    dbapi_connection = _drivers_own(connection)
    if dbapi_connection is None:
        return
    entry = t.cast(t.Any, connection.connection)._connection_record
    if (
        entry is None
        or entry.finalize_callback  # sends something before it goes back
        or connection.in_nested_transaction()
        or isinstance(connection.get_transaction(), sa.TwoPhaseTransaction)
    ):
        return
    driver_error = connection.dialect.loaded_dbapi.Error
    with contextlib.suppress(driver_error):  # the session's own rollback will say so
        dialect_for(connection.engine).end_read(dbapi_connection)


def is_reading(connection: sa.Connection) -> bool:
    """Whether a connection that is checked out still has rows on their way. No round trip."""
    dbapi_connection = _drivers_own(connection)
    return dbapi_connection is not None and dialect_for(connection.engine).is_reading(
        dbapi_connection
    )


def discard(connection: sa.Connection) -> None:
    """Throw a connection away; its pool makes a new one when it needs one."""
    with contextlib.suppress(Exception):
        connection.invalidate()
    close(connection)


def close(connection: sa.Connection) -> Exception | None:
    """Give a connection back, whatever happens; one that cannot be closed is thrown away.

    :returns: the error that closing has run into.
    """
    valid = not connection.closed and not connection.invalidated
    proxied = connection.connection if valid else None
    try:
        connection.close()
    except BaseException as error:
        for attempt in (connection.invalidate, connection.close):
            with contextlib.suppress(Exception):
                attempt()
        if proxied is not None and proxied.is_valid:
            with contextlib.suppress(Exception):
                proxied.invalidate()
        if not isinstance(error, Exception):
            raise
        return error
    return None


@contextlib.contextmanager
def raw_cursor(connection: sa.Connection, *args: t.Any, **kwargs: t.Any) -> t.Iterator[t.Any]:
    """A cursor of the driver; errors stay the driver's, but a lost connection is noticed.

    It is closed when the transaction ends, before the connection goes back to the pool: what it
    would do after that would be part of someone else's transaction.

    :param args: with ``kwargs``, what the driver's ``cursor()`` takes.
    """
    driver_error = connection.dialect.loaded_dbapi.Error
    proxied = connection.connection
    found = _executors.get(connection.dialect)
    executor = None if found is None else found()
    if executor is not None:
        executor.before_raw_cursor(proxied)
    cursor = proxied.cursor(*args, **kwargs)

    def end(*event: t.Any) -> None:
        with contextlib.suppress(driver_error):
            cursor.close()

    if not connection.in_transaction():
        connection.begin()  # so that its end is an event
    for event in ("commit", "rollback"):
        sa.event.listen(connection, event, end)
    try:
        try:
            yield cursor
        except BaseException:
            end()
            raise
        cursor.close()  # reads what is left of the results, and may find a late error
    except driver_error as error:
        # SQLAlchemy does not see what a raw cursor runs into.
        if not connection.closed:
            demoted = executor is not None and executor.is_demoted(error, proxied.dbapi_connection)
            if demoted or connection.dialect.is_disconnect(error, proxied, cursor):
                connection.invalidate(error)
            if demoted:
                connection.engine.dispose()
        raise
    finally:
        for event in ("commit", "rollback"):
            sa.event.remove(connection, event, end)


#: Engines whose servers can prepare a transaction.
_twophase: weakref.WeakSet[sa.Engine] = weakref.WeakSet()

#: Engines of primaries that have, or have had, replicas.
_with_replicas: weakref.WeakSet[sa.Engine] = weakref.WeakSet()

#: Engines of replicas that were removed.
_retired: weakref.WeakSet[sa.Engine] = weakref.WeakSet()


#: By SQLAlchemy's dialect object of an engine, which has it, and which it knows.
_executors: weakref.WeakKeyDictionary[sa.Dialect, weakref.ref[Executor]] = (
    weakref.WeakKeyDictionary()
)


def _prepare(
    engine: sa.Engine,
    settings: PoolSettings,
    bind_key: str | None,
    limits: CurrentLimits,
    *,
    is_primary: bool,
    timed: t.Callable[[float], None] | None = None,
) -> Generic:
    dialect = dialect_for(engine, Limits(settings.statement_timeout, settings.lock_timeout))
    dialect.install(engine, limits)
    forks.guard(engine, is_local=dialect.is_local)
    executor = Executor(dialect, bind_key, limits, is_primary, timed)
    executor.install(engine)
    _executors[engine.dialect] = weakref.ref(executor)
    keeping.keep(
        engine,
        answers=dialect.answers,
        min_size=settings.min_size,
        max_idle=settings.max_idle,
    )
    if not dialect.is_local:
        if settings.resolve_after is not None and isinstance(engine.pool, sa.QueuePool):
            # First: so a connection that takes the place of a dead one is not looked up at once.
            addresses.follow_names(engine, dialect, settings.resolve_after)
        ping_after = None if engine.pool._pre_ping else settings.ping_after
        liveness.look_at_checkout(engine, dialect, ping_after)
        if not settings.recycle_is_given:
            liveness.stay_below_idle_limit(engine, dialect)
    return dialect


def _ask_position(engine: sa.Engine, dbapi_connection: t.Any) -> Position:
    count_probe(engine)
    with uncounted(dbapi_connection):
        return dialect_for(engine).position(dbapi_connection)


def _drivers_own(connection: sa.Connection) -> DBAPIConnection | None:
    """The driver's connection, if there is still one that is ours."""
    if connection.closed or connection.invalidated:
        return None
    return connection.connection.dbapi_connection


def _nothing(dbapi_connection: DBAPIConnection) -> None:
    """In the place of a COMMIT or ROLLBACK."""
