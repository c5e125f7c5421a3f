"""PyMySQL's connection, made to save round trips and to keep to time limits.

Owns: the subclass, the socket that has a silent server asked, and the TLS context that an engine's
connections share. PyMySQL is imported only when an engine uses it; what is used of its private
parts is pinned by ``tests/test_contract.py``.

Must not: know of engines, pools or SQLAlchemy.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import socket
import ssl
import typing as t

from .frugal import Frugal
from .generic import PING_TIMEOUT
from .generic import Patience
from .generic import answering
from .generic import waiting
from .packets import read_result

#: The files in PyMySQL's TLS options.
_TLS_FILES = ("ca", "capath", "cert", "key")


@functools.cache
def connection_class() -> type[t.Any]:
    """A PyMySQL connection that knows what it has sent, and waits for no server without end."""
    from pymysql.connections import Connection as PyMySQLConnection
    from pymysql.constants.COMMAND import COM_PING
    from pymysql.constants.COMMAND import COM_QUERY

    # The private parts that are used have no types.
    base: t.Any = PyMySQLConnection

    class Connection(Frugal, base):  # type: ignore[misc]
        #: The TLS contexts of the engine, by what they were made of.
        tls_contexts: t.ClassVar[dict[t.Any, ssl.SSLContext]] = {}

        _read_timeout: float | None
        _rfile: t.Any

        def connect(self, sock: t.Any = None) -> None:
            # PyMySQL's connect_timeout ends with the TCP connect: a server that accepts and never
            # greets (frozen, or behind a dead proxy) would be waited for without end.
            with self._answered_within(self.connect_timeout):
                super().connect(sock)
            if self.patience is not None:
                self._rfile.close()
                self._rfile = io.BufferedReader(_PatientSocket(self._sock, self.patience))

        def ping(self, reconnect: bool = False) -> None:
            with self._answered_within(self._ping_timeout):
                super().ping(reconnect)

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

        def cut(self) -> None:
            self._force_close()

        def _send_rollback(self) -> None:
            self._execute_command(COM_QUERY, "ROLLBACK")

        def _read_answer(self) -> None:
            with self._answered_within(self._ping_timeout):
                self._read_ok_packet()

        @property
        def _ping_timeout(self) -> float:
            return min(PING_TIMEOUT, self.connect_timeout or PING_TIMEOUT)

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
            self.owes_answer = False
            super()._force_close()

        def _execute_command(self, command: int, sql: str | bytes) -> None:
            if command != COM_PING:
                self.nothing_pending = False
                self.uses += 1
            if self.owes_answer:
                self.read_answer()
            super()._execute_command(command, sql)

        def _read_query_result(self, unbuffered: bool = False) -> t.Any:
            if unbuffered:
                return super()._read_query_result(unbuffered)
            return read_result(self)

    return Connection


class _PatientSocket(io.RawIOBase):
    """Reads from a socket. All that PyMySQL reads comes through here, up to 8 KB at once.

    So a silence is noticed before an answer and in the middle of it, also in that of a procedure or
    an unbuffered cursor. What is sent is not watched: a statement that is larger than the buffers
    between here and a frozen server waits for PyMySQL's ``write_timeout``.
    """

    def __init__(self, sock: socket.socket, patience: Patience) -> None:
        self._sock = sock
        self._patience = patience

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: t.Any) -> int:
        sock, patience = self._sock, self._patience
        limit = sock.gettimeout()
        if limit is not None and limit <= patience.seconds:  # of a ping, say
            return sock.recv_into(buffer)
        # Not poll(): only the socket itself knows whether TLS has a whole record.
        sock.settimeout(patience.seconds)
        try:
            return sock.recv_into(buffer)
        except TimeoutError:
            limit_left = None if limit is None else limit - patience.seconds
            is_answering = answering(waiting(sock.fileno()), limit_left)
            while patience.wait(sock.fileno(), is_answering):
                with contextlib.suppress(TimeoutError):
                    return sock.recv_into(buffer)
            raise TimeoutError("it says nothing, not even to a new connection") from None
        finally:
            sock.settimeout(limit)


def _what_tls_is_made_of(options: t.Mapping[str, t.Any]) -> t.Any:
    """A key that changes when the options do, or one of the files that they name."""
    files = [str(options[name]) for name in _TLS_FILES if options.get(name)]
    changed = []
    for file in files:
        with contextlib.suppress(OSError):  # PyMySQL will say so
            status = os.stat(file)
            changed.append((status.st_ino, status.st_mtime_ns, status.st_ctime_ns))
    return repr(sorted(options.items())), tuple(changed)
