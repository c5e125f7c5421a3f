"""Whether a connection is still alive, found out for nothing as long as it is in use.

Owns: the look at a connection that leaves its pool, the ping of one that was idle, the lifetime
that stays below the server's own limit, and the connection in the place of a dead one.

Must not: repeat anything that the server may have done already.
"""

from __future__ import annotations

import logging
import time
import typing as t

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.engine.interfaces import ExecuteStyle
from sqlalchemy.pool import ConnectionPoolEntry

from .dialects import Generic
from .statements import Reader

_logger = logging.getLogger("flask_commondb")

#: A dead connection says so at once. When it took longer than so many seconds, the server was at
#: work, and would have to do it all again.
AT_ONCE = 1.0


def look_at_checkout(engine: sa.Engine, dialect: Generic, ping_after: float | None) -> None:
    """Have the pool hand out no connection that is known to be dead.

    Each is looked at, which costs no round trip: what the server has closed can be read from, what
    is idle cannot. A link that has silently broken shows nothing, so a connection that was idle for
    long is pinged; when it fails, all others that are idle go as well.

    :param ping_after: seconds; ``None`` for no ping.
    """

    @sa.event.listens_for(engine, "checkin")
    def checkin(dbapi_connection: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        if dbapi_connection is None:
            return
        entry.info[_IDLE_SINCE] = time.monotonic()
        # A raw cursor or a procedure that switches autocommit must not do so for the next user.
        # SQLAlchemy has undone its own changes by now.
        autocommit = dialect.is_autocommit(dbapi_connection)
        if autocommit != entry.info.setdefault(_AUTOCOMMIT, autocommit):
            entry.invalidate()

    @sa.event.listens_for(engine, "connect")
    def connect(dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        # Made in the background, it may wait for its first use.
        entry.info[_IDLE_SINCE] = time.monotonic()
        entry.info[_AUTOCOMMIT] = dialect.is_autocommit(dbapi_connection)

    @sa.event.listens_for(engine, "checkout")
    def checkout(
        dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry, proxy: t.Any
    ) -> None:
        if dialect.is_dead(dbapi_connection):
            raise sa.exc.DisconnectionError("The server has closed this connection.")
        idle_since = entry.info.pop(_IDLE_SINCE, None)
        if (
            ping_after is not None
            and idle_since is not None
            and time.monotonic() - idle_since > ping_after
            and not dialect.answers(dbapi_connection)
        ):
            raise sa.exc.InvalidatePoolError("The server does not answer on this connection.")
        dialect.begin_use(dbapi_connection)


def stay_below_idle_limit(engine: sa.Engine, dialect: Generic) -> None:
    """Have no connection live as long as the server lets one idle. Asked once, at first connect."""
    asked = False

    @sa.event.listens_for(engine, "connect")
    def connect(dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        nonlocal asked
        if asked:
            return
        asked = True
        try:
            limit = dialect.idle_limit(dbapi_connection)
        except engine.dialect.loaded_dbapi.Error:  # something in between that does not know it
            return
        pool: t.Any = engine.pool
        if limit is not None:
            lifetime = limit - max(min(1.0, limit / 2), limit / 10)
            pool._recycle = lifetime if pool._recycle < 0 else min(lifetime, pool._recycle)


def is_shared(pool: sa.Pool) -> bool:
    """Whether all users of a thread, or of the process, have the same connection."""
    return isinstance(pool, (sa.StaticPool, sa.pool.SingletonThreadPool))


def replacement(
    dialect: Generic,
    context: t.Any,
    cursor: t.Any,
    statement: str,
    error: Exception,
    seconds: float,
) -> t.Any | None:
    """A cursor on a new connection, for the first statement of one that turned out dead.

    Only when nothing was sent on it before since it left its pool, and when the statement has not
    reached the server, or does no more than read.

    :param context: SQLAlchemy's, of the statement.
    :param statement: what was sent, which a listener may have changed.
    :param seconds: for how long it was tried.
    :returns: ``None`` if the statement must not be repeated, or there is no new connection.
    """
    if not isinstance(error, context.dialect.loaded_dbapi.Error):
        return None
    proxied = context.root_connection.connection
    entry = proxied._connection_record
    if (
        seconds > AT_ONCE
        or isinstance(error.__context__, TimeoutError)
        or context.cursor is not cursor  # of a default, say
        or context.execute_style is ExecuteStyle.INSERTMANYVALUES  # holds on to its cursor
        or entry is None  # detached: its pool has forgotten it
        or entry.finalize_callback  # has an isolation level of its own, say
        or dialect.uses(proxied.dbapi_connection) not in (0, 1)
        or not context.dialect.is_disconnect(error, proxied, cursor)
        or is_shared(proxied._pool)  # others are in the middle of something
        or isinstance(context.root_connection.get_transaction(), sa.TwoPhaseTransaction)
        or (
            dialect.was_sent(error, cursor)
            and not (statement == context.statement and _only_reads(context))
        )
    ):
        return None
    entry.invalidate(error)
    try:
        proxied.dbapi_connection = entry.get_connection()
        proxied._pool.dispatch.checkout(proxied.dbapi_connection, entry, proxied)
    except Exception as reason:
        _logger.info("A dead connection could not be replaced: %s", reason)
        entry.invalidate(reason)
        proxied.dbapi_connection = None
        proxied.close()
        context.root_connection.invalidate(error)
        return None
    _logger.info("A connection was dead at its first statement, and was replaced: %s", error)
    context.cursor = context.create_cursor()
    return context.cursor


#: In a pool entry's ``info``: since when its connection is idle, and whether it was made in
#: autocommit mode.
_IDLE_SINCE = "flask_commondb.idle_since"
_AUTOCOMMIT = "flask_commondb.autocommit"

#: Knows no function of the server that could not be called twice.
_reader = Reader(frozenset())


def _only_reads(context: t.Any) -> bool:
    statement = getattr(context.compiled, "statement", None)
    return statement is not None and _reader.facts(statement).not_read is None
