"""PostgreSQL: streaming replication, with psycopg 3 first."""

from __future__ import annotations

import typing as t

from sqlalchemy.engine.interfaces import DBAPIConnection

from .generic import Generic
from .generic import run

#: libpq's PQTRANS_IDLE: no transaction is open.
_IDLE = 0


class PostgreSQL(Generic):
    """A standby refuses writes by itself; this holds for a promoted one, too."""

    #: A server-side cursor is the transaction's.
    streams_in_autocommit = False

    def hold_read_only(self, dbapi_connection: DBAPIConnection) -> None:
        run(dbapi_connection, "SET default_transaction_read_only = on")

    def is_autocommit(self, dbapi_connection: DBAPIConnection) -> bool | None:
        return t.cast("bool | None", getattr(dbapi_connection, "autocommit", None))

    def is_left_open(self, dbapi_connection: DBAPIConnection) -> bool:
        info = getattr(dbapi_connection, "info", None)
        return info is not None and int(info.transaction_status) != _IDLE
