"""psycopg 3's connection, made to know whether it was used and to keep to time limits.

Owns: the subclass. psycopg is imported only when an engine uses it.

Must not: know of engines, pools or SQLAlchemy.
"""

from __future__ import annotations

import functools
import typing as t

from .generic import PING_TIMEOUT
from .generic import is_readable


@functools.cache
def connection_class() -> type[t.Any]:
    """A psycopg connection that counts its cursors.

    It needs nothing to leave a ROLLBACK out: psycopg knows from each answer of the server whether a
    transaction is open.
    """
    from psycopg import Connection as PsycopgConnection

    base: t.Any = PsycopgConnection

    class Connection(base):  # type: ignore[misc]
        #: How many cursors were made since it left its pool. Nothing is sent without one.
        uses = 0

        def cursor(self, *args: t.Any, **kwargs: t.Any) -> t.Any:
            self.uses += 1
            return super().cursor(*args, **kwargs)

        def ping(self) -> bool:
            """Whether the server answers in time. For an idle connection."""
            server = self.pgconn
            server.send_query(b"")
            server.flush()
            while True:
                while server.is_busy():
                    if not is_readable(self.fileno(), PING_TIMEOUT):
                        return False
                    server.consume_input()
                if server.get_result() is None:
                    return not self.broken

    return Connection
