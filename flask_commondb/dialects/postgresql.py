"""PostgreSQL: streaming replication, with psycopg 3 first."""

from __future__ import annotations

import typing as t

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection

from .generic import Generic
from .generic import run

#: libpq's PQTRANS_IDLE: no transaction is open.
_IDLE = 0


#: By SQLSTATE.
_FAILURES = {"40P01": "deadlock", "55P03": "lock_timeout", "40001": "serialization"}


class PostgreSQL(Generic):
    """A standby refuses writes by itself; this holds for a promoted one, too."""

    #: A server-side cursor is the transaction's.
    streams_in_autocommit = False

    def hold_read_only(self, dbapi_connection: DBAPIConnection) -> None:
        run(dbapi_connection, "SET default_transaction_read_only = on")

    def is_autocommit(self, dbapi_connection: DBAPIConnection) -> bool | None:
        return t.cast("bool | None", getattr(dbapi_connection, "autocommit", None))

    def why_no_twophase(self, engine: sa.Engine) -> str | None:
        with engine.connect() as connection:
            limit = connection.scalar(sa.text("SHOW max_prepared_transactions"))
        return "its max_prepared_transactions is 0" if limit == "0" else None

    def classify(self, error: t.Any) -> str | None:
        state: t.Any = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        return _FAILURES.get(state)

    def is_left_open(self, dbapi_connection: DBAPIConnection) -> bool:
        info = getattr(dbapi_connection, "info", None)
        return info is not None and int(info.transaction_status) != _IDLE
