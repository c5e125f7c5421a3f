"""MariaDB and MySQL, with PyMySQL as the first-class driver.

Owns: the family's SQL, and the choice of the connection class for a driver.
"""

from __future__ import annotations

import contextlib
import math
import typing as t

import sqlalchemy as sa
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import PoolProxiedConnection

from . import mysqlclient
from . import pymysql
from .frugal import Frugal
from .frugal import mariadb_variables
from .generic import Address
from .generic import Arguments
from .generic import CurrentLimits
from .generic import Generic
from .generic import Limits
from .generic import Outcome
from .generic import Parameter
from .generic import Patience
from .generic import ResultSet
from .generic import ask
from .generic import ask_row
from .generic import run
from .generic import uncounted
from .histories import MariaDBPosition
from .histories import MySQLPosition
from .histories import Position

#: The SERVER_STATUS_ bits of these names in the client/server protocol.
_IN_TRANSACTION = 1
_AUTOCOMMIT = 2
_NO_BACKSLASH_ESCAPES = 512

#: ROUTINES first: it has a row for a procedure without parameters, too. Both show what the user
#: may only EXECUTE.
_PARAMETERS = """
SELECT p.parameter_name, p.parameter_mode, p.dtd_identifier
FROM information_schema.routines r LEFT JOIN information_schema.parameters p
  ON p.specific_schema = r.routine_schema AND p.specific_name = r.specific_name
  AND p.routine_type = 'PROCEDURE'
WHERE r.routine_schema = COALESCE(%s, DATABASE()) AND r.routine_name = %s
  AND r.routine_type = 'PROCEDURE'
ORDER BY p.ordinal_position
"""

#: The error of who lacks a privilege for the statement.
_ACCESS_DENIED = 1227

#: By error number. 1020, a row that has changed since it was read, is MariaDB's name for it when
#: ``innodb_snapshot_isolation`` is on.
_FAILURES = {1213: "deadlock", 1205: "lock_timeout", 1020: "serialization"}

#: 2006, the server has gone away, is the client's own word for a statement that it could not send;
#: 0 the one of PyMySQL for a connection that it has closed.
_NOT_SENT = (2006, 0)

#: The server runs with an option that keeps it from executing the statement.
_OPTION_PREVENTS = 1290

#: Also the user's own, by choice.
_READ_ONLY_TRANSACTION = 1792

#: MySQL's own word for it.
_READ_ONLY_MODE = 1836

#: MySQL's super_read_only is never on without the first.
_READ_ONLY_MODES = "SELECT @@global.read_only, @@global.innodb_read_only"

#: Too many connections: of all, or of this user.
_FULL = (1040, 1203, 1226)

#: MariaDB's max_statement_time; MySQL's max_execution_time.
_TIMEOUTS = (1969, 3024)

#: The first byte of a packet that is an error.
_ERROR = 0xFF

_PORT = 3306

#: Arguments of a driver that name a file in which more of them stand.
_OPTION_FILES = {"read_default_file", "read_default_group"}

_MARIADB_POSITION = "SELECT @@server_id, @@gtid_current_pos, @@gtid_slave_pos"
_MYSQL_POSITION = "SELECT @@server_uuid, @@global.gtid_executed"

#: By the driver's module.
_CONNECTIONS = {"pymysql": pymysql.connection_class, "MySQLdb": mysqlclient.connection_class}

#: In a pool entry's ``info``: the limits that its connection has beyond the usual ones.
_SET_NOW = "flask_commondb.limits"

#: No such procedure; wrong number of arguments; an argument for OUT that is no variable.
_STALE_SIGNATURE = ((1305,), (1318,), (1414,))


class MySQL(Generic):
    """The MySQL family."""

    counts_knocks = True

    arguments: t.ClassVar[Arguments] = {
        "pymysql": {"connect_timeout": ("connect_timeout", float)},
        "mysqldb": {"connect_timeout": ("connect_timeout", math.ceil)},
    }

    def install(self, engine: sa.Engine, limits: CurrentLimits) -> None:
        """Have the driver make our connections. ``do_connect`` listeners still run before it.

        A dialect, a ``module`` or a ``creator`` of the user's own is left alone.
        """
        own = type(self.dialect).connect is not DefaultDialect.connect
        driver = getattr(self.dialect.dbapi, "__name__", "")
        if not own and driver in _CONNECTIONS:
            shared = {"limits": staticmethod(limits), "tls_contexts": {}}
            connection_class = type("Connection", (_CONNECTIONS[driver](),), shared)
            self.dialect.connect = connection_class  # type: ignore[method-assign]

    def be_patient(self, patience: Patience) -> None:
        connect: t.Any = self.dialect.connect
        if isinstance(connect, type) and issubclass(connect, Frugal):
            connect.patience = patience

    def address(self, arguments: t.Mapping[str, t.Any]) -> Address | None:
        driver = self.dialect.driver
        if driver not in self.arguments or _OPTION_FILES & arguments.keys():
            return None
        path = arguments.get("unix_socket")
        host = str(arguments.get("host") or "localhost")
        if path or (driver == "mysqldb" and host == "localhost"):
            return str(path) if path else None  # a Unix socket that the C library knows
        return host, int(arguments.get("port") or _PORT)

    def host_of(self, dbapi_connection: t.Any) -> str | None:
        host: str | None = getattr(dbapi_connection, "host", None)  # PyMySQL
        if host is None and hasattr(dbapi_connection, "get_host_info"):  # "name via TCP/IP"
            host = dbapi_connection.get_host_info().partition(" via ")[0]
        return host

    def opens(self, words: bytes) -> bool | None:
        # Behind the four bytes of a packet's head: the protocol's version, or the sign of an error,
        # such as 1040 (too many connections) or 1129 (the host is blocked).
        return words[4] != _ERROR if len(words) > 4 else None

    def why_no_twophase(self, engine: sa.Engine) -> str | None:
        with engine.connect():  # so that the version is known
            dialect = t.cast(t.Any, self.dialect)
        if dialect.server_version_info < ((10, 5) if dialect.is_mariadb else (5, 7, 7)):
            return "before MariaDB 10.5 and MySQL 5.7.7, what is prepared ends with its connection"
        return None

    def parameters(
        self, connection: sa.Connection, schema: str | None, name: str
    ) -> tuple[Parameter, ...] | None:
        if self.dialect.driver != "pymysql":
            return super().parameters(connection, schema, name)
        rows = connection.exec_driver_sql(_PARAMETERS, (schema, name)).all()
        if not rows:
            return None
        return tuple(Parameter(*row) for row in rows if row[0] is not None)

    def call(
        self,
        connection: sa.Connection,
        schema: str | None,
        name: str,
        parameters: t.Sequence[Parameter],
        args: t.Sequence[t.Any],
    ) -> Outcome:
        path = ".".join(map(_quote, filter(None, (schema, name))))
        values = iter(args)
        bound: list[t.Any] = []
        inout: list[t.Any] = []
        places: list[str] = []
        assignments: list[str] = []
        for variable, parameter in _variables(parameters):
            if parameter.mode == "IN":
                places.append("%s")
                bound.append(next(values))
                continue
            places.append(variable)
            if parameter.mode == "INOUT":
                assignments.append(f"{variable} = %s")
                inout.append(next(values))
        if assignments:
            connection.exec_driver_sql(f"SET {', '.join(assignments)}", tuple(inout))
        statement = f"CALL {path}({', '.join(places)})"
        with _same_escaping(connection), _draining(connection) as cursors:
            # Streaming, if it is the session's wish, would bring the driver's own cursor back.
            options = {"stream_results": False}
            connection.exec_driver_sql(statement, tuple(bound), execution_options=options)
        cursor = cursors[-1]
        warnings: list[tuple[str, int, str]] = []
        if cursor.warning_count:
            rows = connection.exec_driver_sql("SHOW WARNINGS").all()
            warnings = [(level, code, message) for level, code, message in rows]
        out = self._out(connection, parameters)
        return Outcome(cursor.sets, out, cursor.rowcount, warnings)

    def is_stale_signature(self, error: sa.exc.DBAPIError) -> bool:
        return error.orig is not None and error.orig.args[:1] in _STALE_SIGNATURE

    def _out(
        self, connection: sa.Connection, parameters: t.Sequence[Parameter]
    ) -> dict[str, t.Any]:
        """The OUT and INOUT values in Python types; user variables alone lose some of them."""
        wanted = [
            (variable, parameter)
            for variable, parameter in _variables(parameters)
            if parameter.mode != "IN"
        ]
        if not wanted:
            return {}
        columns = ", ".join(_typed(variable, parameter.full_type) for variable, parameter in wanted)
        row = connection.exec_driver_sql(f"SELECT {columns}").one()
        return {
            parameter.name: bool(value)
            if parameter.full_type == "tinyint(1)" and value is not None
            else value
            for (_, parameter), value in zip(wanted, row, strict=True)
        }

    def begin_use(self, dbapi_connection: t.Any) -> None:
        super().begin_use(dbapi_connection)
        if isinstance(dbapi_connection, Frugal):
            dbapi_connection.may_have_begun = False  # what has set it up is no transaction

    def was_sent(self, error: t.Any, cursor: t.Any) -> bool:
        return not error.args or error.args[0] not in _NOT_SENT

    def idle_limit(self, dbapi_connection: DBAPIConnection) -> float | None:
        return float(ask(dbapi_connection, "SELECT @@wait_timeout"))

    def position(self, dbapi_connection: DBAPIConnection) -> Position:
        if t.cast(t.Any, self.dialect).is_mariadb:
            return MariaDBPosition.read(*ask_row(dbapi_connection, _MARIADB_POSITION))
        return MySQLPosition.read(*ask_row(dbapi_connection, _MYSQL_POSITION))

    def is_demoted(self, error: t.Any, dbapi_connection: t.Any) -> bool:
        return _is_read_only_mode(error) or error.args[:1] == (_READ_ONLY_TRANSACTION,)

    def is_writable(self, dbapi_connection: DBAPIConnection) -> bool:
        with uncounted(dbapi_connection):
            found = ask_row(dbapi_connection, _READ_ONLY_MODES)
        return all(str(mode).upper() in ("0", "OFF") for mode in found)

    def is_full(self, error: t.Any) -> bool:
        return bool(error.args) and error.args[0] in _FULL

    def is_timeout(self, error: t.Any) -> bool:
        return bool(error.args) and error.args[0] in _TIMEOUTS

    def set_limits(self, dbapi_connection: DBAPIConnection) -> None:
        variables = self._variables(self.usual)
        if variables:
            _set_session(dbapi_connection, variables)

    def limit(self, connection: PoolProxiedConnection, limits: Limits | None, sql: str) -> None:
        if getattr(connection.dbapi_connection, "is_mariadb", False):
            return  # our connections write them in front of the statement
        wanted = {} if limits is None else self._variables(limits)
        set_now = connection.info.get(_SET_NOW, {})
        if wanted == set_now:
            return
        usual = self._variables(self.usual)
        before = {name: usual.get(name, "DEFAULT") for name in set_now}
        with uncounted(connection.dbapi_connection):
            _set_session(connection.dbapi_connection, {**before, **wanted})
        connection.info[_SET_NOW] = wanted

    def _variables(self, limits: Limits) -> dict[str, t.Any]:
        variables: dict[str, t.Any] = mariadb_variables(limits)
        if not t.cast(t.Any, self.dialect).is_mariadb and "max_statement_time" in variables:
            seconds = variables.pop("max_statement_time")
            variables["max_execution_time"] = math.ceil(seconds * 1000)
        return variables

    def end_read(self, dbapi_connection: t.Any) -> None:
        if isinstance(dbapi_connection, Frugal):
            dbapi_connection.send_rollback()

    def is_dead(self, dbapi_connection: t.Any) -> bool:
        if isinstance(dbapi_connection, Frugal):
            try:
                dbapi_connection.read_answer()
            except Exception:
                return True
        return super().is_dead(dbapi_connection)

    def hold_read_only(self, dbapi_connection: DBAPIConnection) -> None:
        # Stronger than the server's read_only: it binds users with READ_ONLY ADMIN as well.
        run(dbapi_connection, "SET SESSION TRANSACTION READ ONLY")
        # It lets them ANALYZE and FLUSH, which a replica must not log as transactions of its own.
        try:
            run(dbapi_connection, "SET SESSION sql_log_bin = 0")
        except self.dialect.loaded_dbapi.Error as error:
            if error.args[0] != _ACCESS_DENIED:  # to all but them, who need it
                raise

    def is_left_open(self, dbapi_connection: DBAPIConnection) -> bool:
        status = getattr(dbapi_connection, "server_status", None)
        if status is None:  # mysqlclient
            is_open = getattr(dbapi_connection, "may_have_begun", False)
        else:
            is_open = bool(status & _IN_TRANSACTION)
        return is_open or self.is_reading(dbapi_connection)

    def is_reading(self, dbapi_connection: DBAPIConnection) -> bool:
        result = getattr(dbapi_connection, "_result", None)
        reading = getattr(dbapi_connection, "is_reading", False)  # mysqlclient
        return bool(reading or getattr(result, "unbuffered_active", False))

    def classify(self, error: t.Any) -> str | None:
        if _is_read_only_mode(error):
            return "demoted"
        return _FAILURES.get(error.args[0]) if error.args else None

    def is_autocommit(self, dbapi_connection: DBAPIConnection) -> bool | None:
        # A SELECT does not update the status, but it cannot change this bit either.
        status = getattr(dbapi_connection, "server_status", None)
        if status is not None:
            return bool(status & _AUTOCOMMIT)
        get_autocommit = getattr(dbapi_connection, "get_autocommit", None)  # mysqlclient
        return None if get_autocommit is None else bool(get_autocommit())


def _set_session(dbapi_connection: t.Any, variables: t.Mapping[str, t.Any]) -> None:
    assignments = ", ".join(f"{name} = {value}" for name, value in variables.items())
    run(dbapi_connection, f"SET SESSION {assignments}")


def _variables(parameters: t.Sequence[Parameter]) -> t.Iterator[tuple[str, Parameter]]:
    for index, parameter in enumerate(parameters):
        yield f"@commondb_{index}", parameter


def _is_read_only_mode(error: t.Any) -> bool:
    code, text = (*error.args, "", "")[:2]
    if code == _OPTION_PREVENTS:  # --skip-grant-tables and others do so, too
        return "read-only" in str(text) or "read_only" in str(text)
    return bool(code == _READ_ONLY_MODE)


def _quote(identifier: str) -> str:
    """An identifier for a statement in which the driver will look for ``%s``."""
    return "`" + identifier.replace("`", "``").replace("%", "%%") + "`"


def _typed(variable: str, full_type: str) -> str:
    """A user variable as an expression of its parameter's type."""
    name, _, length = full_type.lower().partition("(")
    length = length.partition(")")[0]
    if name in ("datetime", "timestamp"):
        return f"CAST({variable} AS DATETIME({length or 0}))"
    if name == "time":
        return f"CAST({variable} AS TIME({length or 0}))"
    if name == "date":
        return f"CAST({variable} AS DATE)"
    if name == "bit":
        return f"{variable} + 0"
    return variable


class _DrainedCursor(t.Protocol):
    sets: list[ResultSet]
    rowcount: int
    warning_count: int


@contextlib.contextmanager
def _draining(connection: sa.Connection) -> t.Iterator[list[_DrainedCursor]]:
    """Have SQLAlchemy use cursors that read every result set while they execute.

    A late error then comes out of ``execute()``, where SQLAlchemy wraps it, tells its listeners
    and notices a lost connection, instead of out of the next statement, or of nothing at all.
    """
    from pymysql.cursors import Cursor

    cursors: list[_DrainedCursor] = []

    class DrainingCursor(Cursor):
        def __init__(self, driver_connection: t.Any) -> None:
            super().__init__(driver_connection)
            self.sets: list[ResultSet] = []
            cursors.append(self)

        def execute(self, query: str, args: t.Any = None) -> int:
            super().execute(query, args)
            while True:
                if self.description is not None:
                    keys = [column[0] for column in self.description]
                    self.sets.append(ResultSet(keys, self.fetchall()))
                if not self.nextset():
                    return int(self.rowcount)

    driver_connection = t.cast(t.Any, connection.connection.driver_connection)
    cursor_class = driver_connection.cursorclass
    driver_connection.cursorclass = DrainingCursor
    try:
        yield cursors
    finally:
        driver_connection.cursorclass = cursor_class


@contextlib.contextmanager
def _same_escaping(connection: sa.Connection) -> t.Iterator[None]:
    """Mend what a procedure that switches NO_BACKSLASH_ESCAPES leaves behind.

    The server restores sql_mode when the procedure ends, but goes on telling the driver that
    backslashes need no escaping: the next bound value could inject SQL.
    """
    driver_connection = t.cast(t.Any, connection.connection.driver_connection)
    before = driver_connection.server_status & _NO_BACKSLASH_ESCAPES
    try:
        yield
    finally:
        if driver_connection.server_status & _NO_BACKSLASH_ESCAPES != before:
            try:
                run(driver_connection, "SET sql_mode = @@sql_mode")
            except Exception as error:
                connection.invalidate(error)
