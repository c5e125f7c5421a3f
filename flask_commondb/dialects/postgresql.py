"""PostgreSQL: streaming replication, with psycopg 3 first."""

from __future__ import annotations

import contextlib
import math
import os
import re
import struct
import typing as t

import sqlalchemy as sa
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import PoolProxiedConnection

from . import psycopg
from .generic import Address
from .generic import Arguments
from .generic import CurrentLimits
from .generic import Generic
from .generic import Limits
from .generic import Patience
from .generic import ask
from .generic import ask_row
from .generic import run
from .generic import uncounted
from .histories import Position
from .histories import PostgreSQLPosition

#: libpq's PQTRANS_IDLE, PQTRANS_INTRANS and PQTRANS_INERROR: no transaction, one, a failed one.
_IDLE = 0
_IN_TRANSACTION = 2
_IN_ERROR = 3

#: To come back to when a statement is stopped; PostgreSQL would give up the whole transaction.
_SAVEPOINT = "commondb_limit"

#: What begins a statement that may be stopped alone. A write would be a transaction of its own
#: inside of a savepoint, which has its price.
_READ = re.compile(r"[\s(]*(SELECT|WITH|TABLE|VALUES)\b", re.IGNORECASE)

#: In milliseconds: an int of the server.
_LONGEST = 2**31 - 1

_PORT = 5432

#: Arguments that say where libpq finds more of them.
_ELSEWHERE = {"conninfo", "dsn", "service", "servicefile"}

_POSITION = """
SELECT pg_postmaster_start_time()::text,
  CASE WHEN NOT pg_is_in_recovery() THEN pg_current_wal_insert_lsn()::text END,
  pg_last_wal_replay_lsn()::text
"""

#: What the server, the database or the user has by default, not what this session has chosen.
_IS_WRITABLE = """
SELECT NOT pg_is_in_recovery() AND EXISTS (
  SELECT FROM pg_settings WHERE name = 'default_transaction_read_only' AND reset_val = 'off'
)
"""

#: By SQLSTATE.
_READ_ONLY = "25006"
_CANCELLED = "57014"

#: A standby has nothing else that could not be serialized, or be locked for good.
_CONFLICTS = ("40001", "40P01")

_FAILURES = {"40P01": "deadlock", "55P03": "lock_timeout", "40001": "serialization"}


class _SetNow(t.NamedTuple):
    """The limits that a connection has beyond the usual ones."""

    session: dict[str, t.Any]
    transaction: dict[str, t.Any]
    #: Whether :data:`_SAVEPOINT` stands right before the last statement.
    has_savepoint: bool = False


_NOTHING = _SetNow({}, {})
_UNKNOWN = {"statement_timeout": None, "lock_timeout": None}

#: In a pool entry's ``info``: a :class:`_SetNow`.
_SET_NOW = "flask_commondb.limits"


class PostgreSQL(Generic):
    """A standby refuses writes by itself; this holds for a promoted one, too."""

    #: libpq takes whole seconds, and 2 for 1.
    arguments: t.ClassVar[Arguments] = {
        "psycopg": {"connect_timeout": ("connect_timeout", math.ceil)},
        "psycopg2": {"connect_timeout": ("connect_timeout", math.ceil)},
    }

    #: SSLRequest, which every server answers before it wants to know who asks.
    hello = struct.pack("!II", 8, 80877103)

    #: A server-side cursor is the transaction's.
    streams_in_autocommit = False

    def install(self, engine: sa.Engine, limits: CurrentLimits) -> None:
        """Have psycopg make our connections, unless the dialect or a ``module`` is the user's own.

        ``do_connect`` listeners still run before it.
        """
        rollback_to = self.dialect.do_rollback_to_savepoint

        def do_rollback_to_savepoint(connection: sa.Connection, name: str) -> None:
            rollback_to(connection, name)
            # Limits that were set, or taken back, since then are not, or are again.
            info = connection.connection.info
            if _SET_NOW in info:
                info[_SET_NOW] = info[_SET_NOW]._replace(transaction=_UNKNOWN)

        self.dialect.do_rollback_to_savepoint = do_rollback_to_savepoint  # type: ignore[method-assign]
        own = type(self.dialect).connect is not DefaultDialect.connect
        if not own and getattr(self.dialect.dbapi, "__name__", "") == "psycopg":
            connection_class: t.Any = type("Connection", (psycopg.connection_class(),), {})
            self.dialect.connect = connection_class.connect  # type: ignore[method-assign]
            self.dialect.do_ping = connection_class.ping  # type: ignore[method-assign]

    def be_patient(self, patience: Patience) -> None:
        connection_class: t.Any = getattr(self.dialect.connect, "__self__", None)
        if hasattr(connection_class, "patience"):
            connection_class.patience = patience

    def address(self, arguments: t.Mapping[str, t.Any]) -> Address | None:
        # Without a host libpq looks for one in several places; it connects to several in turn.
        host = str(arguments.get("hostaddr") or arguments.get("host") or "")
        if self.dialect.driver not in self.arguments or not host or set(host) & set(",@"):
            return None
        if _ELSEWHERE & arguments.keys() or "PGSERVICE" in os.environ:
            return None
        port = str(arguments.get("port") or os.environ.get("PGPORT") or _PORT)
        return f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, int(port))

    def host_of(self, dbapi_connection: t.Any) -> str | None:
        return getattr(getattr(dbapi_connection, "info", None), "host", None)

    def opens(self, words: bytes) -> bool | None:
        # One letter: whether it speaks TLS. "E" begins an error.
        return words[:1] != b"E" if words else None

    def was_sent(self, error: t.Any, cursor: t.Any) -> bool:
        # BEGIN goes first, and its answer is waited for. psycopg documents the attribute.
        return getattr(cursor, "_query", error) is not None

    def idle_limit(self, dbapi_connection: DBAPIConnection) -> float | None:
        with outside_transaction(dbapi_connection):
            milliseconds = ask(
                dbapi_connection,
                "SELECT setting FROM pg_settings WHERE name = 'idle_session_timeout'",
            )
        return int(milliseconds or 0) / 1000 or None  # 0: never

    def position(self, dbapi_connection: DBAPIConnection) -> Position:
        return PostgreSQLPosition.read(*ask_row(dbapi_connection, _POSITION))

    def is_demoted(self, error: t.Any, dbapi_connection: t.Any) -> bool:
        # Under these names psycopg and psycopg2 have what ``postgresql_readonly`` has set.
        by_choice = any(getattr(dbapi_connection, name, None) for name in ("read_only", "readonly"))
        return bool(_state(error) == _READ_ONLY) and not by_choice

    def is_writable(self, dbapi_connection: DBAPIConnection) -> bool:
        with uncounted(dbapi_connection), outside_transaction(dbapi_connection):
            return bool(ask(dbapi_connection, _IS_WRITABLE))

    def is_full(self, error: t.Any) -> bool:
        # psycopg does not know the state of a connection that was never made.
        return "too many c" in str(error) or "remaining connection slots" in str(error)

    def is_conflict(self, error: t.Any) -> bool:
        return _state(error) in _CONFLICTS

    def is_timeout(self, error: t.Any) -> bool:
        # Someone's pg_cancel_backend() has the same code.
        return bool(_state(error) == _CANCELLED) and "user request" not in str(error)

    def set_limits(self, dbapi_connection: DBAPIConnection) -> None:
        variables = _variables(self.usual)
        if variables:
            with outside_transaction(dbapi_connection):
                run(dbapi_connection, _set(variables, is_local=False))

    def limit(self, connection: PoolProxiedConnection, limits: Limits | None, sql: str) -> None:
        dbapi_connection = t.cast(t.Any, connection.dbapi_connection)
        status = int(dbapi_connection.info.transaction_status)
        if status == _IN_ERROR:
            return  # the next statement can only be a ROLLBACK
        # A ROLLBACK would take back what a transaction has set for the session.
        is_local = not dbapi_connection.autocommit
        for_session, set_now, _ = connection.info.get(_SET_NOW, _NOTHING)
        if status == _IDLE:
            set_now = for_session  # the transaction that had others is over
        wanted = {} if limits is None else _variables(limits)
        needs_savepoint = (
            bool(wanted) and status == _IN_TRANSACTION and _READ.match(sql) is not None
        )
        connection.info[_SET_NOW] = _SetNow(
            for_session if is_local else wanted, wanted, needs_savepoint
        )
        commands = [f"SAVEPOINT {_SAVEPOINT}"] if needs_savepoint else []
        if wanted != set_now:
            commands.append(_set({**self._usually(set_now), **wanted}, is_local))
        if commands:
            with uncounted(dbapi_connection):
                run(dbapi_connection, "; ".join(commands))

    def renew_limits(self, entry: t.Any, limits: Limits | None) -> None:
        for_session, *_ = entry.info.pop(_SET_NOW, _NOTHING)
        wanted = {} if limits is None else _variables(limits)
        if for_session == wanted:
            entry.info[_SET_NOW] = _SetNow(for_session, wanted)
        elif for_session:
            with outside_transaction(entry.dbapi_connection):
                run(entry.dbapi_connection, _set(self._usually(for_session), is_local=False))

    def _usually(self, names: t.Iterable[str]) -> dict[str, t.Any]:
        usual = _variables(self.usual)
        return {name: usual.get(name) for name in names}

    def leave_failed_transaction(self, connection: PoolProxiedConnection) -> None:
        dbapi_connection = t.cast(t.Any, connection.dbapi_connection)
        if int(dbapi_connection.info.transaction_status) != _IN_ERROR:
            return
        set_now = connection.info.get(_SET_NOW, _NOTHING)
        if set_now.has_savepoint:
            with uncounted(dbapi_connection):
                run(dbapi_connection, f"ROLLBACK TO SAVEPOINT {_SAVEPOINT}")
            connection.info[_SET_NOW] = set_now._replace(transaction=_UNKNOWN)
        elif self.uses(dbapi_connection) == 1:
            # It was alone in its transaction. Else what a function, a flush or a listener has done
            # or set before would be lost without a word.
            dbapi_connection.rollback()

    def hold_read_only(self, dbapi_connection: DBAPIConnection) -> None:
        run(dbapi_connection, "SET default_transaction_read_only = on")

    def is_autocommit(self, dbapi_connection: DBAPIConnection) -> bool | None:
        return t.cast("bool | None", getattr(dbapi_connection, "autocommit", None))

    def why_no_twophase(self, engine: sa.Engine) -> str | None:
        with engine.connect() as connection:
            limit = connection.scalar(sa.text("SHOW max_prepared_transactions"))
        return "its max_prepared_transactions is 0" if limit == "0" else None

    def failure(self, error: BaseException) -> str | None:
        # A transaction that is read-only by choice has the same error, and keeps its connection.
        is_lost = isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
        if is_lost and _state(t.cast(t.Any, error).orig) == _READ_ONLY:
            return "demoted"
        return super().failure(error)

    def classify(self, error: t.Any) -> str | None:
        return _FAILURES.get(_state(error))

    def is_left_open(self, dbapi_connection: DBAPIConnection) -> bool:
        info = getattr(dbapi_connection, "info", None)
        return info is not None and int(info.transaction_status) != _IDLE


@contextlib.contextmanager
def outside_transaction(dbapi_connection: t.Any) -> t.Iterator[None]:
    """Send something on a new connection that no ROLLBACK takes back."""
    autocommit = dbapi_connection.autocommit
    dbapi_connection.autocommit = True
    try:
        yield
    finally:
        dbapi_connection.autocommit = autocommit


def _state(error: t.Any) -> t.Any:
    """The SQLSTATE of an error of psycopg or psycopg2."""
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)


def _set(values: t.Mapping[str, t.Any], is_local: bool) -> str:
    """For the transaction or the session; ``None`` is what is usual for the server."""
    settings = ", ".join(
        f"set_config('{name}', {'NULL' if value is None else repr(str(value))}, {is_local})"
        for name, value in values.items()
    )
    return f"SELECT {settings}"


def _variables(limits: Limits) -> dict[str, t.Any]:
    variables = {"statement_timeout": limits.statement, "lock_timeout": limits.lock}
    return {
        name: min(math.ceil(seconds * 1000), _LONGEST)
        for name, seconds in variables.items()
        if seconds is not None
    }
