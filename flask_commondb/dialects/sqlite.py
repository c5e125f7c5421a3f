"""SQLite: the embedded default. A file in WAL mode; its replica reads the same file."""

from __future__ import annotations

import math
import sqlite3
import time
import typing as t

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import PoolProxiedConnection

from .generic import Arguments
from .generic import CurrentLimits
from .generic import Generic
from .generic import Limits
from .generic import run

#: How many steps of SQLite's machine lie between two looks at the clock.
_STEPS = 10_000

#: In a pool entry's ``info``: how long its connection waits for a lock, if not as is usual.
_LOCK_LIMIT = "flask_commondb.lock_limit"

#: Of Python's sqlite3, in seconds.
_USUAL_LOCK_LIMIT = 5.0


class SQLite(Generic):
    """A database file. Readers and the writer do not wait for each other in WAL mode."""

    is_local = True

    arguments: t.ClassVar[Arguments] = {"pysqlite": {"lock_timeout": ("timeout", float)}}

    def install(self, engine: sa.Engine, limits: CurrentLimits) -> None:
        # Not a listener: one on the engine makes every statement slower.
        savepoint = self.dialect.do_savepoint

        def do_savepoint(connection: sa.Connection, name: str) -> None:
            _begin_first(connection)
            savepoint(connection, name)

        self.dialect.do_savepoint = do_savepoint  # type: ignore[method-assign]

    def prepare_primary(self, dbapi_connection: DBAPIConnection) -> None:
        try:
            run(dbapi_connection, "PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            # The mode is the file's. Another process that is just setting it holds a lock that
            # SQLite does not wait for; if that one fails, the next connection sets it.
            if "locked" not in str(error):
                raise

    def hold_read_only(self, dbapi_connection: DBAPIConnection) -> None:
        # Not "mode=ro" in the URL: that one cannot open a file that is still to be created.
        run(dbapi_connection, "PRAGMA query_only=ON")

    def classify(self, error: t.Any) -> str | None:
        text = str(error)
        return "lock_timeout" if "locked" in text or "busy" in text else None

    def is_timeout(self, error: t.Any) -> bool:
        return str(error) == "interrupted"

    def limit(self, connection: PoolProxiedConnection, limits: Limits | None, sql: str) -> None:
        dbapi_connection = t.cast(t.Any, connection.dbapi_connection)
        seconds, lock = self.usual
        if limits is not None:
            seconds = seconds if limits.statement is None else limits.statement
            lock = lock if limits.lock is None else limits.lock
        if seconds:
            deadline = time.monotonic() + seconds
            dbapi_connection.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS)
        else:
            dbapi_connection.set_progress_handler(None, 0)
        if lock != connection.info.get(_LOCK_LIMIT, self.usual.lock):
            wait = _USUAL_LOCK_LIMIT if lock is None else lock
            run(dbapi_connection, f"PRAGMA busy_timeout = {math.ceil(wait * 1000)}")
            connection.info[_LOCK_LIMIT] = lock

    def is_left_open(self, dbapi_connection: DBAPIConnection) -> bool:
        return bool(getattr(dbapi_connection, "in_transaction", False))


def _begin_first(connection: sa.Connection) -> None:
    """Python's sqlite3 begins a transaction before INSERT, UPDATE and DELETE only. A savepoint
    outside of one would be a transaction of its own, and its release a commit."""
    if not getattr(connection.connection.dbapi_connection, "in_transaction", True):
        connection.exec_driver_sql("BEGIN")
