"""Who holds which connection: the leak watch, and what ``db.pool_status()`` tells.

Owns: the record of each checkout while :data:`COMMONDB_LEAK_WATCH` is on, what happens to a
connection that outlives its context, and the text of :exc:`.PoolExhausted`.

Must not: cost anything while it is off, or keep a connection from being collected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import sys
import threading
import time
import typing as t
import weakref

import sqlalchemy as sa
from flask import Flask
from flask import g
from flask import has_app_context
from flask import has_request_context
from flask import request
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.pool import PoolProxiedConnection

from . import signals
from .errors import PoolExhausted

#: The name under which everything stands on ``g``: sessions by their ``db``, and the leak watch.
ON_G = "_commondb"

_logger = logging.getLogger("flask_commondb")


@dataclasses.dataclass(eq=False)
class Holder:
    """Who has taken a connection from its pool, and when.

    :param bind_key: the bind that it leads to.
    :param server: the server that it leads to.
    :param endpoint: of the request, ``None`` outside of one.
    :param thread: the name of the thread.
    :param origin: the innermost places in the application's code, as ``module:line function``.
    """

    bind_key: str | None
    server: str
    endpoint: str | None
    thread: str
    origin: tuple[str, ...]
    _since: float = dataclasses.field(default_factory=time.monotonic, repr=False)
    #: The ``g`` of its context; ``None`` when it may outlive it.
    _context: weakref.ref[t.Any] | None = dataclasses.field(default=None, repr=False)
    _proxied: weakref.ref[t.Any] | None = dataclasses.field(default=None, repr=False)
    #: Stays the same when the engine is disposed of.
    _dialect: sa.Dialect | None = dataclasses.field(default=None, repr=False)

    @property
    def age(self) -> float:
        """Seconds since it was taken."""
        return time.monotonic() - self._since

    def __str__(self) -> str:
        return (
            f"endpoint {self.endpoint!r} in thread {self.thread!r} for {self.age:.1f} s,"
            f" taken by {' < '.join(self.origin) or 'unknown code'}"
        )


@dataclasses.dataclass(frozen=True)
class PoolStatus:
    """One pool at one moment.

    :param bind_key: the bind.
    :param role: ``"primary"`` or ``"replica"``.
    :param server: what the server is called.
    :param in_use: connections that are taken; ``None`` if this kind of pool does not count.
    :param idle: connections that wait in the pool.
    :param limit: how many there may be; ``None`` for no limit.
    :param holders: who has taken them; empty unless :data:`COMMONDB_LEAK_WATCH` is on.
    """

    bind_key: str | None
    role: str
    server: str
    in_use: int | None
    idle: int | None
    limit: int | None
    holders: tuple[Holder, ...]


class NoWatch:
    """The leak watch of an app that has not asked for one."""

    def watch(self, engine: sa.Engine, bind_key: str | None, server: str) -> None:
        """Note every checkout of an engine from now on."""

    def holders(self, engine: sa.Engine) -> tuple[Holder, ...]:
        """Who holds connections of an engine, the oldest first."""
        return ()

    def let_go(self, connection: sa.Connection) -> None:
        """A connection may outlive the context in which it was taken."""

    def take_back(self, app: Flask) -> None:
        """The current context ends: throw away what was taken in it and not given back.

        Each is logged and signalled. It is not put back into the pool, because whoever holds it
        may still use it.
        """


class LeakWatch(NoWatch):
    """Knows who holds each connection of one app."""

    def __init__(self) -> None:
        self._holders: dict[ConnectionPoolEntry, Holder] = {}

    def watch(self, engine: sa.Engine, bind_key: str | None, server: str) -> None:
        @sa.event.listens_for(engine, "checkout")
        def checkout(
            dbapi_connection: DBAPIConnection,
            entry: ConnectionPoolEntry,
            proxied: PoolProxiedConnection,
        ) -> None:
            holder = Holder(
                bind_key,
                server,
                request.endpoint if has_request_context() else None,
                threading.current_thread().name,
                _origin(),
                _proxied=weakref.ref(proxied),
                _dialect=engine.dialect,
            )
            if has_app_context():
                holder._context = weakref.ref(g._get_current_object())
                g.setdefault(ON_G, {})[LeakWatch] = self
            self._holders[entry] = holder

        @sa.event.listens_for(engine, "checkin")
        def checkin(dbapi_connection: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
            self._holders.pop(entry, None)

    def holders(self, engine: sa.Engine) -> tuple[Holder, ...]:
        held = [
            holder for holder in list(self._holders.values()) if holder._dialect is engine.dialect
        ]
        return tuple(sorted(held, key=lambda holder: holder._since))

    def let_go(self, connection: sa.Connection) -> None:
        for holder in list(self._holders.values()):
            if holder._proxied is not None and holder._proxied() is connection.connection:
                holder._context = None

    def take_back(self, app: Flask) -> None:
        context = g._get_current_object()
        for entry, holder in list(self._holders.items()):
            if holder._context is None or holder._context() is not context:
                continue
            proxied = None if holder._proxied is None else holder._proxied()
            self._holders.pop(entry, None)
            if proxied is None:
                continue
            _logger.error(
                "A connection of bind %r was still out when its context ended, and was thrown"
                " away: %s",
                holder.bind_key,
                holder,
                extra={"bind_key": holder.bind_key, "endpoint": holder.endpoint},
            )
            with contextlib.suppress(Exception):
                proxied.invalidate()
            signals.send(signals.connection_leaked, app, bind_key=holder.bind_key, holder=holder)


def status(
    engine: sa.Engine, watch: NoWatch, bind_key: str | None, role: str, server: str
) -> PoolStatus:
    """What an engine's pool looks like now. No I/O."""
    pool = engine.pool
    if isinstance(pool, sa.QueuePool):
        in_use: int | None = pool.checkedout()
        return PoolStatus(
            bind_key, role, server, in_use, pool.checkedin(), _limit(pool), watch.holders(engine)
        )
    return PoolStatus(bind_key, role, server, None, None, None, watch.holders(engine))


def tell_when_exhausted(
    engine: sa.Engine, watch: NoWatch, bind_key: str | None, server: str
) -> None:
    """Have an engine's pool raise :exc:`.PoolExhausted`, which says who holds its connections."""
    pool_class = type(engine.pool)
    if not issubclass(pool_class, sa.QueuePool):  # others never wait
        return

    class Pool(pool_class):  # type: ignore[misc, valid-type]
        def _do_get(self) -> ConnectionPoolEntry:
            try:
                return t.cast(ConnectionPoolEntry, super()._do_get())
            except sa.exc.TimeoutError as error:
                # Contexts of threads that have died, say: what nobody can reach any more.
                gc.collect()
                if self.checkedin():
                    return t.cast(ConnectionPoolEntry, super()._do_get())
                holders = [str(holder) for holder in watch.holders(engine)]
                raise PoolExhausted(bind_key, server, _limit(self) or 0, holders) from error

    Pool.__name__ = Pool.__qualname__ = pool_class.__name__
    # dispose() makes a new pool from the class of the old one.
    engine.pool.__class__ = Pool


#: How many places of the application's code an origin names.
_DEPTH = 3

#: Code that takes connections for others.
_NOT_THE_ORIGIN = {"contextlib", "flask_commondb", "flask_sqlalchemy", "sqlalchemy"}


def _limit(pool: sa.QueuePool) -> int | None:
    limit = pool.size() + pool._max_overflow
    return None if pool._max_overflow < 0 or pool.size() == 0 else limit


def _origin() -> tuple[str, ...]:
    places: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and len(places) < _DEPTH:
        name = frame.f_globals.get("__name__", "?")
        if name.partition(".")[0] not in _NOT_THE_ORIGIN:
            places.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(places)
