"""mysqlclient's connection, made to save round trips and to keep to time limits.

Owns: the subclass. mysqlclient is imported only when an engine uses it.

Must not: know of engines, pools or SQLAlchemy.
"""

from __future__ import annotations

import functools
import re
import typing as t

from .frugal import Frugal
from .generic import PING_TIMEOUT
from .generic import is_readable

#: What begins no transaction.
_READ = re.compile(rb"[\s(]*(SELECT|WITH|SHOW|EXPLAIN|DESC)\b", re.IGNORECASE)


@functools.cache
def connection_class() -> type[t.Any]:
    """A mysqlclient connection that knows what it has sent.

    The driver shows neither the server's status nor whether rows are still on their way. Both are
    concluded from what was sent, in doubt in favour of throwing the connection away.
    """
    from MySQLdb import OperationalError
    from MySQLdb.connections import Connection as MySQLdbConnection

    base: t.Any = MySQLdbConnection

    class Connection(Frugal, base):  # type: ignore[misc]
        #: Whether an unbuffered cursor has rows that it has not read.
        is_reading = False

        def query(self, query: bytes) -> None:
            self.nothing_pending = False
            self.uses += 1
            if not _READ.match(query):
                self.may_have_begun = True
            super().query(query)

        def ping(self) -> None:
            # COM_PING would be waited for without end.
            self.send_query(b"DO 0")
            if not is_readable(self.fileno(), PING_TIMEOUT):
                self.close()
                raise OperationalError(2013, "The server has not answered a ping in time.")
            self.read_query_result()
            self.store_result()

        @property
        def is_mariadb(self) -> bool:
            return "MariaDB" in self.get_server_info()

        def use_result(self) -> t.Any:
            self.is_reading = True
            return super().use_result()

        def warning_count(self) -> int:
            # Unbuffered cursors ask for it when they have come to the end.
            self.is_reading = False
            return int(super().warning_count())

    return Connection
