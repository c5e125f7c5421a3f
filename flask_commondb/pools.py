"""What happens to a connection between the server and a session.

Owns: the listeners on an engine's pool: a free look whether the server has hung up, and replica
connections that are read-only and do no I/O when a session ends.

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

from . import forks
from .dialects import Generic
from .dialects import dialect_for
from .errors import TwoPhaseNotSupported

#: A replica's engine always has this. Each SELECT sees the newest data, and nothing stays open.
REPLICA_ISOLATION = "AUTOCOMMIT"


def prepare(engine: sa.Engine, *, has_replicas: bool = False) -> None:
    """Make a primary's engine ready. Called once, before its first connection.

    :param engine: the engine of a bind.
    :param has_replicas: whether reads will go elsewhere.
    """
    dialect = dialect_for(engine)
    dialect.install(engine)
    if not dialect.is_local:
        _discard_dead_connections(engine, dialect)
        _discard_changed_connections(engine, dialect)
    forks.guard(engine, is_local=dialect.is_local)
    if has_replicas:

        @sa.event.listens_for(engine, "connect")
        def connect(dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
            dialect.prepare_primary(dbapi_connection)


def prepare_replica(engine: sa.Engine) -> None:
    """Make a replica's engine ready: read-only by the server's hand, and silent at the end.

    At commit, rollback and close its connections send nothing, so that a dead replica can never
    change what the primary's commit reports.

    :param engine: an engine with the isolation level :data:`REPLICA_ISOLATION`.
    """
    prepare(engine)
    dialect = dialect_for(engine)
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
        if dialect.is_left_open(dbapi_connection):
            entry.invalidate()


def is_usable(connection: sa.Connection) -> bool:
    """Whether a connection that is checked out can take another statement. No round trip."""
    if connection.closed or connection.invalidated:
        return False
    dbapi_connection = connection.connection.dbapi_connection
    return dbapi_connection is not None and not dialect_for(connection.engine).is_dead(
        dbapi_connection
    )


def is_shared(engine: sa.Engine) -> bool:
    """Whether all users of a thread, or of the process, have the same connection."""
    return isinstance(engine.pool, (sa.StaticPool, sa.pool.SingletonThreadPool))


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
    return variant


def stop_reading(connection: sa.Connection) -> None:
    """Throw a connection away if it has a result that was not read to its end.

    To close it properly would be to read all of it.
    """
    if is_reading(connection):
        discard(connection)


def is_reading(connection: sa.Connection) -> bool:
    """Whether a connection that is checked out still has rows on their way. No round trip."""
    if connection.closed or connection.invalidated:
        return False
    dbapi_connection = connection.connection.dbapi_connection
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
        if not connection.closed and connection.dialect.is_disconnect(error, proxied, cursor):
            connection.invalidate(error)
        raise
    finally:
        for event in ("commit", "rollback"):
            sa.event.remove(connection, event, end)


#: Engines whose servers can prepare a transaction.
_twophase: weakref.WeakSet[sa.Engine] = weakref.WeakSet()


def _discard_dead_connections(engine: sa.Engine, dialect: Generic) -> None:
    @sa.event.listens_for(engine, "checkout")
    def checkout(
        dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry, proxy: t.Any
    ) -> None:
        if dialect.is_dead(dbapi_connection):
            raise sa.exc.DisconnectionError("The server has closed this connection.")


def _discard_changed_connections(engine: sa.Engine, dialect: Generic) -> None:
    """A raw cursor or a procedure that switches autocommit must not do so for the next user."""

    @sa.event.listens_for(engine, "connect")
    def connect(dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        entry.info[_AUTOCOMMIT] = dialect.is_autocommit(dbapi_connection)

    @sa.event.listens_for(engine, "checkin")
    def checkin(dbapi_connection: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        # SQLAlchemy has undone its own changes by now.
        if dbapi_connection is not None:
            autocommit = dialect.is_autocommit(dbapi_connection)
            if autocommit != entry.info.get(_AUTOCOMMIT, autocommit):
                entry.invalidate()


#: In a pool entry's ``info``: whether its connection was made in autocommit mode.
_AUTOCOMMIT = "flask_commondb.autocommit"


def _nothing(dbapi_connection: DBAPIConnection) -> None:
    """In the place of a COMMIT or ROLLBACK."""
