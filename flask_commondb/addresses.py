"""Names that lead elsewhere by now: connections to a server's former address are let go of.

Owns: how often the names that connections were made by are looked up, and what was found.

Must not: choose a server, start a thread, or hold a lock while a name is looked up.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import os
import socket
import threading
import time
import typing as t

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from . import forks
from .dialects import Generic
from .knocking import arguments_of

_logger = logging.getLogger("flask_commondb")


def follow_names(engine: sa.Engine, dialect: Generic, resolve_after: float) -> None:
    """Have the pool hand out no connection to an address that its name does not lead to any more.

    Whoever takes a connection when it is due looks the name up, and the others go on meanwhile. A
    connection that was made since then is right. Costs nothing where there is no name to look up.

    :param resolve_after: seconds between two looks.
    """
    arguments = arguments_of(engine) or {}
    place = dialect.address(arguments)
    if isinstance(place, tuple) and place[0] != arguments.get("host"):
        return  # the driver is told an address beside the name, and looks nothing up
    names = Names(resolve_after)

    @sa.event.listens_for(engine, "connect")
    def connect(dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        name = dialect.host_of(dbapi_connection)
        address = _peer(dbapi_connection) if name is not None and _is_name(name) else None
        if name is not None and address is not None:
            entry.info[_LINK] = names.link(name, address)
            entry.info[_IS_NEW] = True

    @sa.event.listens_for(engine, "checkout")
    def checkout(
        dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry, proxy: t.Any
    ) -> None:
        link: Link | None = entry.info.get(_LINK)
        if link is None or entry.info.pop(_IS_NEW, False):
            return  # SQLAlchemy gives up when a connection is refused that has replaced another
        if names.is_elsewhere(link):
            _logger.info(
                "A connection to %s is replaced: %s leads elsewhere now.", link.address, link.name
            )
            raise sa.exc.DisconnectionError(f"{link.name} does not lead to {link.address} now.")


@dataclasses.dataclass(frozen=True)
class Link:
    """By which name a connection was made, which address that was, and when."""

    name: str
    address: str
    made_at: float


class Names:
    """Where the names lead that one engine's connections were made by.

    :param resolve_after: seconds between two looks.
    """

    def __init__(self, resolve_after: float) -> None:
        self._resolve_after = resolve_after
        self.begin_anew()
        forks.renew(self)

    def begin_anew(self) -> None:
        """In a forked child: what another thread was about to find out, it will not."""
        #: Covers who looks.
        self._lock = threading.Lock()
        self._looks: dict[str, _Look] = {}

    def link(self, name: str, address: str) -> Link:
        """Note a connection that was just made."""
        now = time.monotonic()
        self._looks.setdefault(name, _Look(now))
        return Link(name, address, now)

    def is_elsewhere(self, link: Link) -> bool:
        """Whether the name has led to other addresses since the connection was made."""
        look = self._looks.get(link.name)
        if look is None:
            look = self._looks.setdefault(link.name, _Look(link.made_at))
        if time.monotonic() - look.at >= self._resolve_after:
            self._resolve(link.name, look)
        return look.asked_at > link.made_at and link.address not in look.addresses

    def _resolve(self, name: str, look: _Look) -> None:
        with self._lock:
            now = time.monotonic()
            if look.is_under_way or now - look.at < self._resolve_after:
                return
            look.is_under_way = True
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            # In this order: whoever reads them between the two has the old answer.
            look.addresses = frozenset(str(place[0]) for *_, place in found)
            look.asked_at = now
            look.has_failed = False
        except (OSError, UnicodeError) as error:
            if not look.has_failed:
                _logger.info("The name %s cannot be looked up: %s", name, error)
            look.has_failed = True
        finally:
            look.at = time.monotonic()
            look.is_under_way = False


@dataclasses.dataclass
class _Look:
    """The last look at a name.

    :param at: when it was over; at first, when the name was first connected to.
    :param asked_at: when the one had begun that has found the addresses.
    """

    at: float
    asked_at: float = float("-inf")
    addresses: frozenset[str] = frozenset()
    is_under_way: bool = False
    has_failed: bool = False


#: In a pool entry's ``info``: its :class:`Link`, and whether nobody has had it yet.
_LINK = "flask_commondb.link"
_IS_NEW = "flask_commondb.link_is_new"


def _is_name(host: str) -> bool:
    """Whether a host is a name that may lead elsewhere one day."""
    if not host or host.lower() == "localhost" or host.startswith("/"):
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def _peer(dbapi_connection: t.Any) -> str | None:
    """The address at the other end; ``None`` for a Unix socket, or if the driver does not say."""
    try:
        with socket.socket(fileno=os.dup(dbapi_connection.fileno())) as link:
            place = link.getpeername()
    except Exception:  # no socket, or one that is closed
        return None
    return str(place[0]) if isinstance(place, tuple) else None
