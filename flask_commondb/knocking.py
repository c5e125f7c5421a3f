"""A knock at a server's door: whether it opens, found out without waiting and without a thread.

Owns: one attempt to get a server's first word, and where an engine's driver would connect to.

Must not: log in, or decide what follows from the answer.
"""

from __future__ import annotations

import errno
import inspect
import os
import socket
import time
import typing as t
import weakref

import sqlalchemy as sa
from sqlalchemy.engine import create

from .dialects import Address
from .dialects import Generic
from .dialects import dialect_for
from .dialects import is_readable

#: Seconds for the connection to one address of a name that has several; then comes the next.
CONNECT_LIMIT = 1.0


def knock_at(engine: sa.Engine) -> Knock | None:
    """Knock where an engine's driver would connect to.

    A name is looked up as the driver would do it, which may take as long as the resolver takes.

    :returns: ``None`` where that is not known, or not one place, so that only a real connection
        tells: SQLite, a ``creator``, a listener to ``do_connect``, several hosts in one URL, an
        option file of the driver's, a driver that we do not know.
    """
    listeners: t.Any = engine.dialect.dispatch
    arguments = arguments_of(engine)
    if arguments is None or listeners.do_connect:
        return None
    dialect = dialect_for(engine)
    address = dialect.address(arguments)
    return None if address is None else Knock(address, dialect)


def arguments_of(engine: sa.Engine) -> t.Mapping[str, t.Any] | None:
    """What an engine's driver is told when it connects: the URL and ``connect_args``.

    :returns: ``None`` if a ``creator`` connects, or a pool of the user's own.
    """
    connect = engine.pool._creator
    if getattr(connect, "__module__", "") != create.__name__:
        return None
    arguments: t.Mapping[str, t.Any] = inspect.getclosurevars(connect).nonlocals["cparams"]
    return arguments


class Knock:
    """A connection that goes no further than the server's first word.

    A server that is frozen still has a kernel that accepts connections: only a word of its own says
    that it is there. Nothing here waits unless it is told to. For one thread at a time. A forked
    child that has inherited a knock knocks itself.

    The servers of the MySQL family count connections that end before the login, and block the host
    after ``max_connect_errors`` of them in a row (error 1129). A login that succeeds sets the count
    back. **So a knock that was answered is to be followed by a real connection.**

    :param address: of the server.
    :param dialect: knows how the server begins.
    """

    def __init__(self, address: Address, dialect: Generic) -> None:
        self._address = address
        self._dialect = dialect
        self._answer: bool | None = None
        self._socket: socket.socket | None = None
        self.forget()
        self._move()

    @property
    def is_under_way(self) -> bool:
        """Whether it could be begun: not so if, say, this process has no descriptors left."""
        return self._socket is not None or self._answer is not None

    @property
    def has_spoken(self) -> bool:
        """Whether the server has said anything, be it that it lets nobody in."""
        return bool(self._words)

    def answer(self, timeout: float = 0) -> bool | None:
        """Whether the server opens its door. As soon as that is known, the knock is closed.

        :param timeout: seconds to wait for it.
        :returns: ``False`` if it does not: nobody is there, or it lets nobody in. ``None`` if
            nothing is known yet.
        """
        until = time.monotonic() + timeout
        while True:
            self._move()
            left = until - time.monotonic()
            if self._answer is not None or left <= 0:
                return self._answer
            self._wait(min(left, CONNECT_LIMIT))

    def close(self) -> None:
        """Give it up; it counts as not answered."""
        if self._answer is None:
            self._answer = False
        self._hang_up()

    def forget(self) -> None:
        """Leave what a forked child has inherited alone; the next look begins anew."""
        self._hang_up()
        self._words = b""
        #: The family and the address of each socket that the server may have.
        self._places: list[tuple[int, t.Any]] | None = None

    def _move(self) -> None:
        """Do what can be done without waiting."""
        if self._places is None and self._answer is None:
            self._places = _places(self._address)
        while self._answer is None and self._places:
            try:
                self._approach(self._places)
            except OSError as error:
                if error.errno in _NOTHING_YET:
                    return
                self._hang_up()
                if error.errno in _OWN_TROUBLE:
                    return
                del self._places[0]  # nobody there
        self.close()

    def _approach(self, places: list[tuple[int, t.Any]]) -> None:
        family, place = places[0]
        if self._socket is None:
            self._socket = socket.socket(family, socket.SOCK_STREAM)
            self._socket.setblocking(False)
            self._is_connected = False
            self._started = time.monotonic()
            _open.add(self)
        if not self._is_connected:
            code = self._socket.connect_ex(place)
            if code not in (0, errno.EISCONN):
                if len(places) > 1 and time.monotonic() - self._started > CONNECT_LIMIT:
                    code = errno.ETIMEDOUT
                raise OSError(code, os.strerror(code))
            self._is_connected = True
            if self._dialect.hello:
                self._socket.send(self._dialect.hello)
        words = self._socket.recv(4096)
        self._words += words
        # What ends without a word was closed by something that stands before the server.
        self._answer = self._dialect.opens(self._words) if words else False

    def _wait(self, seconds: float) -> None:
        """Until something may have happened."""
        if self._socket is not None and self._is_connected:
            is_readable(self._socket.fileno(), seconds)
        else:
            time.sleep(min(seconds, _STEP))

    def _hang_up(self) -> None:
        _open.discard(self)
        if self._socket is not None:
            self._socket.close()
            self._socket = None


#: Seconds between two looks at a connection that is not made yet.
_STEP = 0.01

#: The second is a Unix socket's whose queue is full.
_NOTHING_YET = {errno.EINPROGRESS, errno.EAGAIN, errno.EWOULDBLOCK, errno.EALREADY, errno.EINTR}

#: No more descriptors, memory or ports: that says nothing of the server.
_OWN_TROUBLE = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL}

#: The knocks that have a connection.
_open: weakref.WeakSet[Knock] = weakref.WeakSet()


def _places(address: Address) -> list[tuple[int, t.Any]]:
    if isinstance(address, str):
        return [(socket.AF_UNIX, address)]
    try:
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # a name that nobody knows
        return []
    return [(family, place) for family, _, _, _, place in found]


def _forget_inherited_knocks() -> None:
    for knock in list(_open):
        knock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_inherited_knocks)
