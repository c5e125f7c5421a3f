"""psycopg 3's connection, made to know whether it was used and to keep to time limits.

Owns: the subclass. psycopg is imported only when an engine uses it.

Must not: know of engines, pools or SQLAlchemy.
"""

from __future__ import annotations

import functools
import typing as t

from .generic import PING_TIMEOUT
from .generic import Patience
from .generic import is_readable
from .generic import waiting


@functools.cache
def connection_class() -> type[t.Any]:
    """A psycopg connection that counts its cursors.

    It needs nothing to leave a ROLLBACK out: psycopg knows from each answer of the server whether a
    transaction is open.
    """
    from psycopg import Connection as PsycopgConnection
    from psycopg import OperationalError

    base: t.Any = PsycopgConnection

    class Connection(base):  # type: ignore[misc]
        #: How many cursors were made since it left its pool. Nothing is sent without one.
        uses = 0

        #: Who is asked when the server says nothing; an engine's connections have their own.
        patience: Patience | None = None

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

        def wait(self, gen: t.Any, *args: t.Any, **kwargs: t.Any) -> t.Any:
            # With a time of the caller's own, it waits for a notification.
            if self.patience is not None and not args and not kwargs:
                gen = Patient(gen, self)
            return super().wait(gen, *args, **kwargs)

        @functools.cached_property
        def is_ready(self) -> dict[int, t.Callable[[float], bool]]:
            """By what psycopg waits for: whether it is so within some seconds."""
            return {wanted: waiting(self.fileno(), *want) for wanted, want in _WANTED.items()}

    class Patient:
        """What is done with the server, a generator; this waits in psycopg's place.

        Not a generator itself: when it is interrupted, psycopg cancels the statement, and waits
        for its end with the same one.
        """

        __slots__ = ("connection", "gen", "is_interrupted")

        def __init__(self, gen: t.Any, connection: t.Any) -> None:
            self.gen = gen
            self.connection = connection
            self.is_interrupted = False

        def __iter__(self) -> t.Any:
            return self

        def __next__(self) -> int:
            return self.send(None)

        def send(self, ready: int | None) -> int:
            while True:
                wanted: int = self.gen.send(ready)
                if self.is_interrupted:
                    return wanted
                self.wait(wanted)
                if wanted == _EITHER:
                    return wanted  # psycopg sees which
                ready = wanted

        def wait(self, wanted: int) -> None:
            connection = self.connection
            is_ready, patience = connection.is_ready[wanted], connection.patience
            try:
                if not is_ready(patience.seconds) and not patience.wait(
                    connection.fileno(), is_ready
                ):
                    raise TimeoutError("the server says nothing, not even to a new connection")
            except TimeoutError as error:
                connection.pgconn.finish()
                raise OperationalError(f"the connection is lost: {error}") from error
            except BaseException:
                self.is_interrupted = True
                raise

    return Connection


#: What psycopg waits for, and whether that is to read and to write.
_EITHER = 3
_WANTED = {1: (True, False), 2: (False, True), _EITHER: (True, True)}
