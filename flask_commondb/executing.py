"""How each statement is handed to the driver, and what becomes of its errors.

Owns: the limits that a statement is given, its repetition on another connection when the first was
dead, the error of one that took too long, and the end of a pool whose server is no primary any
more.

Must not: add a round trip to a statement that has no limits of its own.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import typing as t

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.pool import PoolProxiedConnection

from . import liveness
from .dialects import NO_LIMITS
from .dialects import CurrentLimits
from .dialects import Generic
from .dialects import Limits
from .errors import StatementTimeout


class Traffic(t.NamedTuple):
    """What one process has sent to a server.

    :param statements: of sessions and connections, each time they were tried.
    :param probes: our own questions, how far the server is, and whether it is a primary.
    """

    statements: int
    probes: int


class Counter:
    """Counts what several threads do, without a lock: each has a number of its own."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self) -> None:
        """One more."""
        thread = threading.get_ident()
        self._counts[thread] = self._counts.get(thread, 0) + 1

    @property
    def total(self) -> int:
        """How many there were."""
        return sum(self._counts.copy().values())


class Executor:
    """Runs the statements of one engine.

    :param dialect: of its server.
    :param bind_key: the bind that it belongs to.
    :param limits: what the caller allows to a statement at the moment.
    :param is_primary: whether its server is written to.
    :param timed: is told how many seconds each statement has taken that was no failure.
    """

    def __init__(
        self,
        dialect: Generic,
        bind_key: str | None,
        limits: CurrentLimits,
        is_primary: bool,
        timed: t.Callable[[float], None] | None = None,
    ) -> None:
        self._dialect = dialect
        self._bind_key = bind_key
        self._limits = limits
        self._is_primary = is_primary
        self._timed = timed
        self.probes = Counter()
        self._statements = Counter()
        #: Whether there may be a connection with limits that are not the usual ones.
        self._has_limited = dialect.is_local and dialect.usual.statement is not None
        #: Whether SQLAlchemy has asked the server all that it wants to know at first connect. It
        #: does so on a connection that is not its pool's yet.
        self._is_initialized = False

    def install(self, engine: sa.Engine) -> None:
        """Take over the engine's statements."""

        @sa.event.listens_for(engine, "connect")
        def connect(dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
            self._is_initialized = True
            self._dialect.set_limits(dbapi_connection)

        @sa.event.listens_for(engine, "checkout")
        def checkout(
            dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry, proxied: t.Any
        ) -> None:
            if self._has_limited:  # a raw cursor would not ask
                try:
                    self._dialect.renew_limits(entry, self._limits())
                except engine.dialect.loaded_dbapi.Error as error:
                    raise sa.exc.DisconnectionError(str(error)) from error

        # Not listeners: they cost more, and would keep those of the caller's from being called.
        for name in ("do_execute", "do_executemany", "do_execute_no_params"):
            run = functools.partial(self._run, getattr(engine.dialect, name))
            setattr(engine.dialect, name, run)
        sa.event.listen(engine, "handle_error", self._handle_error)

    @property
    def traffic(self) -> Traffic:
        """What this process has sent."""
        return Traffic(self._statements.total, self.probes.total)

    def before_raw_cursor(self, connection: PoolProxiedConnection) -> None:
        """Give what a raw cursor will send the limits of this moment."""
        limits = self._limits()
        if limits is not None or self._has_limited:
            self._limit(connection, limits, "")

    def is_demoted(self, error: BaseException, dbapi_connection: t.Any) -> bool:
        """Whether the driver's error says that the server was a primary, and is none any more."""
        return self._is_primary and self._dialect.is_demoted(error, dbapi_connection)

    def _run(self, execute: t.Callable[..., None], cursor: t.Any, *args: t.Any) -> None:
        if not self._is_initialized:
            execute(cursor, *args)
            return
        self._statements.add()
        started = time.monotonic()
        context = args[-1]
        limits = self._limits()
        is_limited = limits is not None or self._has_limited
        try:
            if is_limited:
                self._limit(context.root_connection.connection, limits, args[0])
            execute(cursor, *args)
            if self._timed is not None:
                self._timed(time.monotonic() - started)
        except Exception as error:
            seconds = time.monotonic() - started
            fresh = liveness.replacement(self._dialect, context, cursor, args[0], error, seconds)
            if fresh is None:
                raise
            self._statements.add()
            try:
                if is_limited:
                    self._limit(context.root_connection.connection, limits, args[0])
                execute(fresh, *args)
            except BaseException:
                with contextlib.suppress(Exception):
                    fresh.close()
                raise

    def _limit(self, connection: PoolProxiedConnection, limits: Limits | None, sql: str) -> None:
        self._has_limited = True
        self._dialect.limit(connection, limits, sql)

    def _handle_error(self, context: sa.engine.ExceptionContext) -> Exception | None:
        error = context.original_exception
        if not isinstance(context.sqlalchemy_exception, sa.exc.DBAPIError):
            return None
        connection = context.connection
        if connection is not None and (
            connection.invalidated or self.is_demoted(error, connection.connection.dbapi_connection)
        ):
            context.is_disconnect = True  # so that the next transaction connects anew
        if not self._dialect.is_timeout(error):
            return None
        if connection is not None and not connection.invalidated:
            self._dialect.leave_failed_transaction(connection.connection)
        limits = self._limits() or NO_LIMITS
        limit = self._dialect.usual.statement if limits.statement is None else limits.statement
        return StatementTimeout(context.sqlalchemy_exception, self._bind_key, limit)
