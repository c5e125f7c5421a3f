"""What the connections of both MySQL drivers have in common: they know what they have sent.

Owns: the mixin that leaves out a COMMIT or ROLLBACK with nothing to end, counts what was sent since
the connection left its pool, and puts a time limit before a statement.

Must not: know of engines, pools, SQLAlchemy, or one of the drivers.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import typing as t

from .generic import CurrentLimits
from .generic import Limits
from .generic import Patience
from .generic import is_readable


def mariadb_variables(limits: Limits) -> dict[str, float]:
    """The session variables of MariaDB that limits are written in."""
    variables: dict[str, float] = {}
    if limits.statement is not None:
        # A limit that is over before the statement begins is none.
        variables["max_statement_time"] = limits.statement and max(limits.statement, 0.001)
    if limits.lock is not None:
        # Whole seconds. The second is for metadata: a DROP that waits for a reader.
        variables["innodb_lock_wait_timeout"] = math.ceil(limits.lock)
        variables["lock_wait_timeout"] = math.ceil(limits.lock)
    return variables


class Frugal:
    """A mixin that goes before a driver's connection class.

    SQLAlchemy ends a transaction and then resets the connection when it goes back to the pool:
    a second ROLLBACK. Whether that one can be left out cannot be read from PyMySQL's
    ``server_status``, which a SELECT does not update while it opens a snapshot (a connection
    wrongly taken for clean shows yesterday's data), and mysqlclient shows no status at all. So the
    commands are watched instead: nothing is pending exactly when nothing but a ping was sent since
    the last COMMIT or ROLLBACK that succeeded. That covers raw cursors, procedures and session
    variables alike.
    """

    #: Whether a COMMIT or ROLLBACK would have nothing to end.
    nothing_pending = False

    #: Whether the server has still to answer a ROLLBACK.
    owes_answer = False

    #: What was sent since the connection left its pool.
    uses = 0

    #: Whether the server may be in the middle of a transaction although autocommit is on.
    may_have_begun = False

    #: What the caller allows to the next statement; an engine's connections have their own.
    limits: CurrentLimits = staticmethod(lambda: None)

    #: Who is asked when the server says nothing; an engine's connections have their own, or nobody.
    patience: Patience | None = None

    @property
    def is_mariadb(self) -> bool:
        """Whether the server is a MariaDB, which takes a statement's limits in front of it."""
        return "MariaDB" in self.get_server_info()  # type: ignore[attr-defined]

    def commit(self) -> None:
        """COMMIT, if there is anything to commit."""
        if not self.nothing_pending:
            super().commit()  # type: ignore[misc]
            self.nothing_pending = True
            self.may_have_begun = False

    def rollback(self) -> None:
        """ROLLBACK, if there is anything to roll back."""
        if not self.nothing_pending:
            super().rollback()  # type: ignore[misc]
            self.nothing_pending = True
            self.may_have_begun = False

    def send_rollback(self) -> None:
        """ROLLBACK, if there is anything to roll back, and do not wait for the answer.

        It is read before anything else is sent, by :meth:`read_answer`.
        """
        if not self.nothing_pending:
            try:
                self._send_rollback()
                self.nothing_pending = self.owes_answer = True
                self.may_have_begun = False
            except BaseException:  # a signal's, say: it may be sent, and would be answered
                self.cut()
                raise

    def read_answer(self) -> None:
        """Read the answer to :meth:`send_rollback`, which has long been there as a rule."""
        if self.owes_answer:
            try:
                self.owes_answer = False
                self._read_answer()
            except BaseException:
                self.cut()
                raise

    def close(self) -> None:
        """Say farewell; an answer that was left unread would make it a reset for the server."""
        with contextlib.suppress(Exception):
            if self.owes_answer and is_readable(self.fileno()):
                self.read_answer()
        super().close()  # type: ignore[misc]

    def fileno(self) -> int:
        """The socket's descriptor."""
        return int(super().fileno())  # type: ignore[misc]

    def cut(self) -> None:
        """Close it without a word to the server."""
        raise NotImplementedError

    def _send_rollback(self) -> None:
        raise NotImplementedError

    def _read_answer(self) -> None:
        raise NotImplementedError

    def query(self, query: t.Any, *args: t.Any, **kwargs: t.Any) -> t.Any:
        """Send a statement; on MariaDB with its time limit in front, which costs no round trip."""
        limits = self.limits()
        if limits is not None and self.is_mariadb and not _SET.match(_as_bytes(query)):
            prefix = _prefix(limits)
            query = prefix + query if isinstance(query, str) else prefix.encode() + query
        return super().query(query, *args, **kwargs)  # type: ignore[misc]


#: What sets a variable. SET STATEMENT would set it back, if it is one of its own.
_SET = re.compile(rb"\s*SET\b", re.IGNORECASE)


def _as_bytes(query: t.Any) -> bytes:
    return query[:20].encode() if isinstance(query, str) else bytes(query[:20])


@functools.lru_cache(maxsize=128)
def _prefix(limits: Limits) -> str:
    variables = ", ".join(f"{name}={value}" for name, value in mariadb_variables(limits).items())
    return f"SET STATEMENT {variables} FOR "
