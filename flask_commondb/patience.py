"""Patience with a server that says nothing: it is asked whether it is alive, and waited for if so.

Owns: the wait for an answer that has not come in time, when a knock beside it is due, and the
verdict that all who wait for the same server share.

Must not: limit how long a living server works on a statement, or choose another server.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import typing as t

import sqlalchemy as sa

from . import forks
from .dialects import Address
from .dialects import Generic
from .knocking import Knock
from .knocking import arguments_of
from .naming import server_name

#: Seconds until a server that has not begun to answer is asked whether it is alive.
PATIENCE = 0.7

#: Seconds that it has for its first word; and for the login after it, at each step.
KNOCK_LIMIT = 1.0

#: Seconds until it is asked again: the first time, and at most.
PAUSES = (2.0, 30.0)

_logger = logging.getLogger("flask_commondb")


class Patience:
    """Of all in this process who wait for answers on one engine's connections.

    What is asked is the other end of the very connection on which somebody waits: by a name, or
    through a ``do_connect`` listener, one could have come to another server meanwhile. A proxy in
    between that speaks for itself, as PgBouncer does, answers for itself.

    There is one knock at a time; whoever waits meanwhile has its verdict as well.

    :param engine: whose connections they are.
    :param dialect: of its server.
    :param on_dead: is told each time that the server does not answer a knock.
    """

    def __init__(
        self,
        engine: sa.Engine,
        dialect: Generic,
        on_dead: t.Callable[[], None] | None = None,
    ) -> None:
        #: Seconds that the drivers' connections wait before they call :meth:`wait`.
        self.seconds = PATIENCE
        self._engine = engine
        self._dialect = dialect
        self._on_dead = on_dead
        self.begin_anew()
        forks.renew(self)

    def begin_anew(self) -> None:
        """In a forked child the one who knocks is not there."""
        self._lock = threading.Lock()
        self._doors: dict[Address, _Door] = {}

    def wait(self, descriptor: int, is_answering: t.Callable[[float], bool]) -> bool:
        """Wait on for an answer that has not begun within :attr:`seconds`.

        :param descriptor: the socket's.
        :param is_answering: waits for so many seconds; whether the answer has begun.
        :returns: ``False`` if the server is dead.
        """
        address = _look_at_link(descriptor)
        if address is None:  # closed, which the driver is about to find out
            return True
        since = time.monotonic() - self.seconds
        pause, longest = PAUSES
        while self._is_alive(address, since, is_answering):
            since = time.monotonic()
            if is_answering(pause):
                return True
            pause = min(2 * pause, longest)
        return is_answering(0)

    def _is_alive(
        self, address: Address, since: float, is_answering: t.Callable[[float], bool]
    ) -> bool:
        """The verdict of a moment after ``since``; or alive, as it answers."""
        while True:
            with self._lock:
                door = self._doors.setdefault(address, _Door())
                if door.verdict_at > since:
                    return door.is_alive
                asks = not door.is_asked
                door.is_asked = True
            if asks:
                return self._ask(address, door, is_answering)
            if is_answering(_SLICE):
                return True

    def _ask(self, address: Address, door: _Door, is_answering: t.Callable[[float], bool]) -> bool:
        knock = None
        try:
            knock = Knock(address, self._dialect)
            until = time.monotonic() + KNOCK_LIMIT
            while knock.answer(_SLICE) is None and not is_answering(0):
                if time.monotonic() > until:
                    break
            knock.answer()  # once more: it may be this process that was held up
            is_alive = knock.has_spoken or not knock.is_under_way or is_answering(0)
            if not is_alive and self._on_dead is not None:
                self._on_dead()  # before the others give up: they will look at what it has done
            with self._lock:
                door.is_alive, door.verdict_at = is_alive, time.monotonic()
        finally:
            door.is_asked = False
            if knock is not None:
                knock.close()
        if not is_alive:
            _logger.warning(
                "%s says nothing, on a new connection neither: what waits for it is given up.",
                server_name(self._engine.url),
            )
        elif self._dialect.counts_knocks:
            _log_in(self._engine, self._dialect)
        return is_alive


class _Door:
    """What is known of the server at one address."""

    #: Whether somebody knocks now.
    is_asked = False

    is_alive = True
    verdict_at = float("-inf")


#: Seconds between two looks at whether the answer has come after all.
_SLICE = 0.05

#: The kernel asks the other one's after 10 s of silence, and says that the link is broken when
#: three questions in 5 s each had no answer, or when what was sent has none for 25 s.
_KEEPALIVE = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 25_000,
}


def _look_at_link(descriptor: int) -> Address | None:
    """The other end of a connection; and have the kernel find out whether the link still holds.

    A firewall may have forgotten this connection alone. Then the server answers a knock, and would
    be waited for without end. Where the user's own limits are shorter, they stay.
    """
    try:
        with socket.socket(fileno=os.dup(descriptor)) as link:
            place = link.getpeername()
            if not isinstance(place, tuple):
                return os.fsdecode(place) or None
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE.items():
                option = getattr(socket, name, None)
                if option is not None:
                    now = link.getsockopt(socket.IPPROTO_TCP, option) or value
                    link.setsockopt(socket.IPPROTO_TCP, option, min(now, value))
            return place[0], place[1]
    except OSError:
        return None


def _log_in(engine: sa.Engine, dialect: Generic) -> None:
    """Connect as the engine does, not through its pool, and say farewell.

    So the server counts the knock no more: see :class:`.Knock`.
    """
    arguments = dict(t.cast("t.Mapping[str, t.Any]", arguments_of(engine)))
    of_driver = dialect.arguments.get(engine.dialect.driver, {})
    listeners: t.Any = engine.dialect.dispatch
    with contextlib.suppress(Exception):  # it has no room, say: alive it is
        connection = None
        for listener in listeners.do_connect:
            connection = listener(engine.dialect, None, [], arguments)
            if connection is not None:
                break
        else:
            if "connect_timeout" in of_driver:
                name, convert = of_driver["connect_timeout"]
                arguments[name] = convert(KNOCK_LIMIT)
            connection = engine.dialect.connect(**arguments)
        connection.close()
