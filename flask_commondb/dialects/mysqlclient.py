"""mysqlclient's connection, made to save round trips and to keep to time limits.

Owns: the subclass. mysqlclient is imported only when an engine uses it.

Must not: know of engines, pools or SQLAlchemy.
"""

from __future__ import annotations

import contextlib
import functools
import re
import typing as t

from .frugal import Frugal
from .generic import PING_TIMEOUT
from .generic import Patience
from .generic import answering
from .generic import is_readable
from .generic import waiting

#: What begins no transaction.
_READ = re.compile(rb"[\s(]*(SELECT|WITH|SHOW|EXPLAIN|DESC)\b", re.IGNORECASE)


@functools.cache
def connection_class() -> type[t.Any]:
    """A mysqlclient connection that knows what it has sent.

    The driver shows neither the server's status nor whether rows are still on their way. Both are
    concluded from what was sent, in doubt in favour of throwing the connection away.
    """
    from MySQLdb import Error
    from MySQLdb import OperationalError
    from MySQLdb.connections import Connection as MySQLdbConnection
    from MySQLdb.constants import CR

    base: t.Any = MySQLdbConnection

    class Patient(base):  # type: ignore[misc]
        """Asks whether the server is alive while it has not begun to answer a statement.

        The rest of an answer, and the further results of a procedure, are read in C without end: so
        much of them may have been read already that a poll() would not tell.
        """

        patience: Patience | None = None

        def __init__(self, *args: t.Any, **kwargs: t.Any) -> None:
            self._read_timeout = kwargs.get("read_timeout")
            super().__init__(*args, **kwargs)

        def query(self, query: bytes) -> None:
            if self.patience is None:
                super().query(query)
            else:
                self._ask(self.patience, query)

        def commit(self) -> None:
            if self.patience is None:
                super().commit()
            else:
                self._ask(self.patience, b"COMMIT")

        def rollback(self) -> None:
            if self.patience is None:
                super().rollback()
            else:
                self._ask(self.patience, b"ROLLBACK")

        @functools.cached_property
        def _is_readable(self) -> t.Callable[[float], bool]:
            return waiting(self.fileno())

        def _ask(self, patience: Patience, query: bytes) -> None:
            try:
                self.send_query(query)
                if not self._is_readable(patience.seconds):
                    self._wait_on(patience)
            except Error:
                raise
            except TimeoutError as error:
                self.cut()
                message = f"Lost connection to server during query ({error})"
                raise OperationalError(CR.SERVER_LOST, message) from error
            except BaseException:  # the answer would be the next statement's
                self.cut()
                raise
            self.read_query_result()

        def _wait_on(self, patience: Patience) -> None:
            limit = self._read_timeout - patience.seconds if self._read_timeout else None
            is_answering = answering(self._is_readable, limit)
            if not patience.wait(self.fileno(), is_answering):
                raise TimeoutError("it says nothing, not even to a new connection")

    class Connection(Frugal, Patient):
        #: Whether an unbuffered cursor has rows that it has not read.
        is_reading = False

        def query(self, query: bytes) -> None:
            self.read_answer()
            self.nothing_pending = False
            self.uses += 1
            if not _READ.match(query):
                self.may_have_begun = True
            super().query(query)

        def autocommit(self, on: bool) -> None:
            self.read_answer()
            super().autocommit(on)

        def select_db(self, db: str) -> None:
            self.read_answer()
            super().select_db(db)

        def set_character_set(self, *args: t.Any, **kwargs: t.Any) -> None:
            self.read_answer()
            super().set_character_set(*args, **kwargs)

        def close(self) -> None:
            if self.open:  # else it would complain
                super().close()

        def cut(self) -> None:
            with contextlib.suppress(Exception):
                self.close()

        def ping(self) -> None:
            # COM_PING would be waited for without end.
            self.read_answer()
            self.send_query(b"DO 0")
            self._read_answer()

        def _send_rollback(self) -> None:
            self.send_query(b"ROLLBACK")

        def _read_answer(self) -> None:
            if not is_readable(self.fileno(), PING_TIMEOUT):
                self.close()
                message = "The server has not answered a ping in time."
                raise OperationalError(CR.SERVER_LOST, message)
            self.read_query_result()
            self.store_result()

        def use_result(self) -> t.Any:
            self.is_reading = True
            return super().use_result()

        def warning_count(self) -> int:
            # Unbuffered cursors ask for it when they have come to the end.
            self.is_reading = False
            return int(super().warning_count())

    return Connection
