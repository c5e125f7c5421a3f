"""PyMySQL's connection, made to save round trips and to keep to time limits.

Owns: the subclass, and the TLS context that an engine's connections share. PyMySQL is imported only
when an engine uses it; what is used of its private parts is pinned by ``tests/test_contract.py``.

Must not: know of engines, pools or SQLAlchemy.
"""

from __future__ import annotations

import contextlib
import functools
import os
import ssl
import typing as t

from .frugal import Frugal
from .generic import PING_TIMEOUT

#: The files in PyMySQL's TLS options.
_TLS_FILES = ("ca", "capath", "cert", "key")


@functools.cache
def connection_class() -> type[t.Any]:
    """A PyMySQL connection that knows what it has sent, and waits for no server without end."""
    from pymysql.connections import Connection as PyMySQLConnection
    from pymysql.constants.COMMAND import COM_PING

    # The private parts that are used have no types.
    base: t.Any = PyMySQLConnection

    class Connection(Frugal, base):  # type: ignore[misc]
        #: The TLS contexts of the engine, by what they were made of.
        tls_contexts: t.ClassVar[dict[t.Any, ssl.SSLContext]] = {}

        _read_timeout: float | None

        def connect(self, sock: t.Any = None) -> None:
            # PyMySQL's connect_timeout ends with the TCP connect: a server that accepts and never
            # greets (frozen, or behind a dead proxy) would be waited for without end.
            with self._answered_within(self.connect_timeout):
                super().connect(sock)

        def ping(self, reconnect: bool = False) -> None:
            with self._answered_within(min(PING_TIMEOUT, self.connect_timeout or PING_TIMEOUT)):
                super().ping(reconnect)

        @property
        def is_mariadb(self) -> bool:
            return "MariaDB" in self.server_version

        def fileno(self) -> int:
            return int(self._sock.fileno())

        @contextlib.contextmanager
        def _answered_within(self, seconds: float | None) -> t.Iterator[None]:
            read_timeout = self._read_timeout
            limits = [limit for limit in (read_timeout, seconds) if limit]
            self._read_timeout = min(limits, default=None)
            try:
                yield
            finally:
                self._read_timeout = read_timeout

        def _create_ssl_ctx(self, sslp: t.Any) -> ssl.SSLContext:
            """A new one for each connection, as PyMySQL has it, takes over 20 ms to make."""
            if isinstance(sslp, ssl.SSLContext):
                return sslp
            key = _what_tls_is_made_of(sslp)
            context = self.tls_contexts.get(key)
            if context is None:
                context = super()._create_ssl_ctx(sslp)
                self.tls_contexts.clear()  # of files that have been renewed
                self.tls_contexts[key] = context
            return context

        def _force_close(self) -> None:
            # An unbuffered result would go on reading from the socket that is closed here.
            if self._result is not None:
                self._result.unbuffered_active = False
            super()._force_close()

        def _execute_command(self, command: int, sql: str | bytes) -> None:
            if command != COM_PING:
                self.nothing_pending = False
                self.uses += 1
            super()._execute_command(command, sql)

    return Connection


def _what_tls_is_made_of(options: t.Mapping[str, t.Any]) -> t.Any:
    """A key that changes when the options do, or one of the files that they name."""
    files = [str(options[name]) for name in _TLS_FILES if options.get(name)]
    changed = []
    for file in files:
        with contextlib.suppress(OSError):  # PyMySQL will say so
            changed.append(os.stat(file).st_mtime_ns)
    return repr(sorted(options.items())), tuple(changed)
