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
import types
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
from .naming import server_name

#: The name under which everything stands on ``g``: sessions by their ``db``, and what the leak
#: watch has seen, a :class:`Taken`, under :class:`LeakWatch`.
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
    _since: float = dataclasses.field(default_factory=time.monotonic, init=False, repr=False)

    @property
    def age(self) -> float:
        """Seconds since it was taken."""
        return time.monotonic() - self._since

    def __str__(self) -> str:
        where = "outside of a request" if self.endpoint is None else f"endpoint {self.endpoint!r}"
        return (
            f"{where} in thread {self.thread!r} for {self.age:.1f} s,"
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
    :param holders: who has taken them, the oldest first; empty unless
        :data:`COMMONDB_LEAK_WATCH` is on.
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

    def watch(self, engine: sa.Engine, bind_key: str | None) -> None:
        """Note every checkout of an engine from now on."""

    def holders(self, pool: sa.Pool) -> tuple[Holder, ...]:
        """Who holds connections of a pool, the oldest first."""
        return ()


class LeakWatch(NoWatch):
    """Knows who holds each connection of one app."""

    def __init__(self) -> None:
        self._checkouts: dict[ConnectionPoolEntry, _Checkout] = {}

    def watch(self, engine: sa.Engine, bind_key: str | None) -> None:
        @sa.event.listens_for(engine, "checkout")
        def checkout(
            dbapi_connection: DBAPIConnection,
            entry: ConnectionPoolEntry,
            proxied: PoolProxiedConnection,
        ) -> None:
            origin, by_session = _origin(sys._getframe(1))
            endpoint = request.endpoint if has_request_context() else None
            thread = threading.current_thread().name
            holder = Holder(bind_key, server_name(engine.url), endpoint, thread, origin)
            taken = None
            # A session ends with the context that it belongs to, which may be another one.
            if has_app_context() and not by_session:
                taken = g.setdefault(ON_G, {}).setdefault(LeakWatch, Taken())
                taken[entry] = holder, weakref.ref(proxied)
            self._checkouts[entry] = _Checkout(holder, engine.pool, taken)

        def forget(dbapi_connection: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
            checkout = self._checkouts.pop(entry, None)
            if checkout is not None and checkout.taken is not None:
                checkout.taken.pop(entry, None)

        sa.event.listen(engine, "checkin", forget)
        sa.event.listen(engine, "detach", forget)  # is the taker's own from now on

    def holders(self, pool: sa.Pool) -> tuple[Holder, ...]:
        # A copy, because others come and go. Their order is that of the checkouts.
        checkouts = self._checkouts.copy().values()
        return tuple(checkout.holder for checkout in checkouts if checkout.pool is pool)


class Taken(dict[ConnectionPoolEntry, tuple[Holder, "weakref.ref[PoolProxiedConnection]"]]):
    """What was taken in one context, other than by a session, and is still out."""

    def take_back(self, app: Flask) -> None:
        """The context ends: throw it all away, with a log record and a signal for each.

        It is not put back into the pool, because whoever holds it may still use it.
        """
        for entry in list(self):
            holder, proxied = self.pop(entry, (None, _gone))
            connection = proxied()
            if holder is None or connection is None or not connection.is_valid:
                continue  # another thread was giving it back, or it is a fork's parent's
            _take_away(connection, holder)
            _logger.error(
                "A connection of bind %r was still out when its context ended, and was thrown"
                " away: %s",
                holder.bind_key,
                holder,
                extra={"bind_key": holder.bind_key, "endpoint": holder.endpoint},
            )
            signals.send(signals.connection_leaked, app, bind_key=holder.bind_key, holder=holder)


def status(
    engine: sa.Engine, watch: NoWatch, bind_key: str | None, role: str, server: str
) -> PoolStatus:
    """What an engine's pool looks like now. No I/O."""
    pool = engine.pool
    in_use = idle = limit = None
    if isinstance(pool, sa.QueuePool):
        in_use, idle, limit = pool.checkedout(), _idle(pool), _limit(pool)
    return PoolStatus(bind_key, role, server, in_use, idle, limit, watch.holders(pool))


def has_room(pool: sa.Pool) -> bool:
    """Whether a pool has a connection, or may open one, so that nobody has to wait. No I/O."""
    if not isinstance(pool, sa.QueuePool):
        return True
    limit = _limit(pool)
    return limit is None or pool.checkedout() < limit


def tell_when_exhausted(engine: sa.Engine, watch: NoWatch, bind_key: str | None) -> None:
    """Have an engine's pool raise :exc:`.PoolExhausted`, which says who holds its connections."""
    pool_class = type(engine.pool)
    if not issubclass(pool_class, sa.QueuePool):  # others never wait
        return

    get: t.Callable[[t.Any], ConnectionPoolEntry] = pool_class._do_get

    class Pool(pool_class):  # type: ignore[misc, valid-type]
        def _do_get(self) -> ConnectionPoolEntry:
            try:
                return get(self)
            except PoolExhausted:  # it has called itself
                raise
            except sa.exc.TimeoutError as error:
                # Contexts of threads that have died, say: what nobody can reach any more.
                gc.collect()
                if self.checkedin():
                    with contextlib.suppress(sa.exc.TimeoutError):  # another thread was faster
                        return get(self)
                holders = [str(holder) for holder in watch.holders(self)]
                server = server_name(engine.url)
                raise PoolExhausted(bind_key, server, _limit(self) or 0, holders) from error

        def recreate(self) -> sa.Pool:
            pool = super().recreate()
            pool.__class__ = Pool  # also where a user's class names itself
            return t.cast(sa.Pool, pool)

    Pool.__name__, Pool.__qualname__ = pool_class.__name__, pool_class.__qualname__
    Pool.__module__ = pool_class.__module__
    engine.pool.__class__ = Pool


class _Checkout(t.NamedTuple):
    holder: Holder
    pool: sa.Pool  # the engine may have another one meanwhile
    taken: Taken | None


#: How many places of the application's code an origin names.
_DEPTH = 3

#: Code that takes connections for others.
_TAKERS = frozenset(
    "contextlib flask flask_commondb flask_sqlalchemy functools jinja2 sqlalchemy".split()
)

#: Code that calls the application's; what has called that is not of interest.
_CALLERS = frozenset("celery click concurrent flask.app threading werkzeug".split())

#: Where a session of ours asks for a connection.
_SESSIONS = f"{__package__}.routing"


def _origin(frame: types.FrameType | None) -> tuple[tuple[str, ...], bool]:
    """The innermost places in the application's code, and whether a session stands before them."""
    places: list[str] = []
    by_session = False
    while frame is not None and len(places) < _DEPTH:
        name = frame.f_globals.get("__name__") or frame.f_code.co_filename.rpartition("/")[2]
        package = name.partition(".")[0]
        if package in _CALLERS or name in _CALLERS:
            break
        if package not in _TAKERS:
            places.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        elif name == _SESSIONS and not places:
            by_session = True
        frame = frame.f_back
    return tuple(places), by_session


def _gone() -> None:
    """In the place of a weak reference."""


def _take_away(connection: PoolProxiedConnection, holder: Holder) -> None:
    def refuse(*args: t.Any, **kwargs: t.Any) -> t.NoReturn:
        raise sa.exc.ResourceClosedError(
            f"This connection was thrown away when the context ended in which it was taken:"
            f" {holder}. Close it before, or take it outside of the context."
        )

    with contextlib.suppress(Exception):
        connection.invalidate()
    # SQLAlchemy would fail an assertion.
    connection.cursor = connection.commit = refuse  # type: ignore[method-assign]


def _idle(pool: sa.QueuePool) -> int:
    """How many connections wait in a pool; it keeps the places of those thrown away."""
    places = list(pool._pool.queue)  # type: ignore[attr-defined]
    return sum(place.dbapi_connection is not None for place in places)


def _limit(pool: sa.QueuePool) -> int | None:
    limit = pool.size() + pool._max_overflow
    return None if pool._max_overflow < 0 or pool.size() == 0 else limit
