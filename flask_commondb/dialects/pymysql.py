"""PyMySQL's connection, made to know what it has sent.

Owns: the subclass that saves round trips and keeps to time limits. PyMySQL is imported only when an
engine uses it; what is used of its private parts is pinned by ``tests/test_contract.py``.

Must not: know of engines, pools or SQLAlchemy.
"""

from __future__ import annotations

import functools
import typing as t


@functools.cache
def connection_class() -> type[t.Any]:
    """A PyMySQL connection that sends no COMMIT or ROLLBACK which has nothing to do.

    SQLAlchemy ends a transaction and then resets the connection when it goes back to the pool:
    a second ROLLBACK. Whether that one can be left out cannot be read from ``server_status``,
    which a SELECT does not update while it opens a snapshot (a connection wrongly taken for clean
    shows yesterday's data). So the commands are watched instead: nothing is pending exactly when
    nothing but a ping was sent since the last COMMIT or ROLLBACK that succeeded. That covers raw
    cursors, procedures and session variables alike.
    """
    from pymysql.connections import Connection as PyMySQLConnection
    from pymysql.constants.COMMAND import COM_PING

    # The private parts that are used have no types.
    base: t.Any = PyMySQLConnection

    class Connection(base):  # type: ignore[misc]
        nothing_pending = False
        _read_timeout: float | None

        def connect(self, sock: t.Any = None) -> None:
            # PyMySQL's connect_timeout ends with the TCP connect: a server that accepts and never
            # greets (frozen, or behind a dead proxy) would be waited for without end.
            read_timeout = self._read_timeout
            limits = [limit for limit in (read_timeout, self.connect_timeout) if limit]
            self._read_timeout = min(limits, default=None)
            try:
                super().connect(sock)
            finally:
                self._read_timeout = read_timeout

        def commit(self) -> None:
            if not self.nothing_pending:
                super().commit()
                self.nothing_pending = True

        def rollback(self) -> None:
            if not self.nothing_pending:
                super().rollback()
                self.nothing_pending = True

        def fileno(self) -> int:
            return int(self._sock.fileno())

        def _force_close(self) -> None:
            # An unbuffered result would go on reading from the socket that is closed here.
            if self._result is not None:
                self._result.unbuffered_active = False
            super()._force_close()

        def _execute_command(self, command: int, sql: str | bytes) -> None:
            if command != COM_PING:
                self.nothing_pending = False
            super()._execute_command(command, sql)

    return Connection
