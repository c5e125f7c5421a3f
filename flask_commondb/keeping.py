"""Pools that keep a minimum of connections warm, and let go of those that are idle for long.

Owns: the one thread of a process that opens, pings, renews and closes idle connections, for all
pools that have asked for it. It runs only while one of them has connections.

Must not: know of binds, settings or families of servers, touch a connection that is checked out,
keep an engine from being collected, or hold a lock during I/O.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import math
import os
import queue
import random
import threading
import time
import typing as t
import weakref

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.pool.base import _ConnectionRecord

from .naming import server_name

#: Seconds of silence after which a connection that is kept is pinged: less than any sensible
#: ``wait_timeout`` of a server, and than the memory of firewalls.
KEEPALIVE = 30.0

_logger = logging.getLogger("flask_commondb")


def keep(
    engine: sa.Engine,
    *,
    answers: t.Callable[[DBAPIConnection], bool],
    min_size: int = 0,
    max_idle: float | None = None,
    keepalive: float = KEEPALIVE,
    clock: t.Callable[[], float] = time.monotonic,
) -> None:
    """Look after an engine's idle connections. Called once, before its first connection.

    From its first use in a process on, the pool has ``min_size`` connections. What is missing, then
    or after a loss, is opened in the background. As many as that are kept usable while nobody uses
    them: they are pinged, so that the server does not close them and a dead one is noticed, and
    renewed shortly before the pool's ``recycle`` age, so that no request has to. It all goes
    through the pool and its listeners, in a thread that has no context.

    Beyond that, a connection that was not used for ``max_idle`` seconds is closed properly. If the
    pool is "last in, first out", those that are not needed come to rest; else all take turns.

    A pool other than a :class:`~sqlalchemy.pool.QueuePool` has no idle connections to look after.

    :param answers: whether the server answers on an idle connection. It should soon give up: one
        thread asks for all pools.
    :param min_size: how many connections to keep, in use or idle; never more than the pool's size.
    :param max_idle: in seconds.
    :param keepalive: in seconds.
    :param clock: returns seconds that only ever grow.
    """
    if (min_size == 0 and max_idle is None) or not isinstance(engine.pool, sa.QueuePool):
        return
    kept = _Kept(engine, answers, min_size, max_idle, keepalive, clock)

    @sa.event.listens_for(engine, "connect")
    def connect(dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        entry.info[_TIMES] = _Times(clock())
        kept.retry_at = -math.inf  # the server can be reached
        _keeper.begin(kept)

    @sa.event.listens_for(engine, "checkin")
    def checkin(dbapi_connection: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
        if dbapi_connection is not None:
            entry.info[_TIMES].used = clock()

    def look(*event: t.Any) -> None:
        _keeper.tell(kept)

    sa.event.listen(engine, "engine_disposed", look)
    if min_size:
        sa.event.listen(engine, "close", look)
        sa.event.listen(engine, "detach", look)


@dataclasses.dataclass
class _Times:
    """When something has last happened to a connection. Stands in its entry's ``info``."""

    opened: float
    used: float = 0
    #: When the server has last answered a ping.
    heard: float = 0
    #: The part of the recycle age that it lives: not the same for all, so that not all end at once.
    part: float = dataclasses.field(default_factory=lambda: random.uniform(0.8, 0.9))

    def __post_init__(self) -> None:
        self.used = self.heard = self.opened


_TIMES = "flask_commondb.times"

#: Seconds after an event until the pool is looked at; many events are one look.
_SOON = 0.05

#: Seconds between attempts while a server is down: the first, and the most.
_RETRY = (0.5, 30.0)


class _Kept:
    """What is kept of one engine's connections. Only the thread changes it, but ``retry_at``."""

    def __init__(
        self,
        engine: sa.Engine,
        answers: t.Callable[[DBAPIConnection], bool],
        min_size: int,
        max_idle: float | None,
        keepalive: float,
        clock: t.Callable[[], float],
    ) -> None:
        self._engine = weakref.ref(engine)
        self._answers = answers
        self._min_size = min_size
        self._max_idle = math.inf if max_idle is None else max_idle
        self._keepalive = keepalive
        self._clock = clock
        self.forget()
        _all_kept.add(self)

    def forget(self) -> None:
        """Begin with a pool that was not used yet."""
        self._pool: sa.Pool | None = None
        self._failures = 0
        #: When the server may be tried again.
        self.retry_at = -math.inf

    def tend(self) -> float | None:
        """Do what is due.

        :returns: after how many seconds to do so again; ``None``: when the pool is used again.
        """
        engine = self._engine()
        if engine is None:
            return None
        slots = _Slots(engine.pool)
        if slots.pool is not self._pool and not self._begin(slots):
            return None
        minimum = min(self._min_size, slots.size or self._min_size)
        try:
            self._close_idle(slots, minimum)
            if self.retry_at <= self._clock():
                self._keep_warm(engine, slots, minimum)
                self._report_success(engine)
        except Exception as error:
            self._report_failure(engine, error)
        return self._pause(slots, minimum)

    def _begin(self, slots: _Slots) -> bool:
        """The engine has another pool than it had; whether that is in use already."""
        old = self._pool
        self.forget()
        if old is not None:
            old.dispose()  # of what was opened or put back while the engine did so
        if slots.count:
            self._pool = slots.pool
        return self._pool is not None

    def _close_idle(self, slots: _Slots, minimum: int) -> None:
        for _ in range(slots.count):  # should there be more to do, then the next time
            out, idle = slots.look()
            excess = out + sum(map(_is_open, idle)) - minimum
            before = self._clock() - self._max_idle
            # Without a connection it would be handed out as well as those that have one.
            over = [
                entry
                for entry in idle
                if (excess > 0 and _last_use(entry) <= before if _is_open(entry) else excess >= 0)
            ]
            if not over:
                return
            if slots.take(over[0]):
                try:
                    over[0].close()
                finally:
                    slots.give_up(over[0])

    def _keep_warm(self, engine: sa.Engine, slots: _Slots, minimum: int) -> None:
        for _ in range(minimum):
            entry = self._take_next(slots, minimum)
            if entry is None:
                return
            try:
                self._warm(engine, slots, entry)
            finally:
                slots.put_back(entry)

    def _take_next(self, slots: _Slots, minimum: int) -> t.Any:
        """An entry that needs a connection, a ping or a younger connection."""
        while True:
            out, idle = slots.look()
            usable = [entry for entry in idle if slots.is_usable(entry)]
            if out + len(usable) < minimum:
                wanting = [entry for entry in idle if entry not in usable]
                if not wanting:
                    return slots.make()
            else:
                now = self._clock()
                kept = _last(usable, minimum - out)
                wanting = [entry for entry in kept if self._due(slots, entry) <= now]
                if not wanting:
                    return None
            if slots.take(wanting[0]):
                return wanting[0]

    def _warm(self, engine: sa.Engine, slots: _Slots, entry: t.Any) -> None:
        used = None
        if slots.is_usable(entry):
            times: _Times = entry.info[_TIMES]
            used = times.used
            renewal = times.opened + slots.recycle * times.part
            if self._clock() < renewal and self._is_alive(engine, entry):
                times.heard = self._clock()
                return
        entry.close()
        entry.get_connection()
        if used is not None:  # nobody has used the new one either
            entry.info[_TIMES].used = used

    def _is_alive(self, engine: sa.Engine, entry: t.Any) -> bool:
        try:
            if not self._answers(entry.dbapi_connection):
                return False
            engine.dialect.do_rollback(entry.dbapi_connection)  # some drivers begin for a ping
        except Exception:
            return False
        return True

    def _due(self, slots: _Slots, entry: t.Any) -> float:
        """When an idle connection is to be pinged or renewed."""
        times: _Times = entry.info[_TIMES]
        silence = max(times.used, times.heard) + self._keepalive
        return min(silence, times.opened + slots.recycle * times.part)

    def _pause(self, slots: _Slots, minimum: int) -> float | None:
        now = self._clock()
        out, idle = slots.look()
        due: list[float] = []
        opened = list(filter(_is_open, idle))
        if out + len(opened) > minimum:
            # One that is out may come back at once. It is then seen before its time is over: so
            # nobody is woken by a checkin.
            due = [used + self._max_idle for used in (*map(_last_use, opened), now)]
        if minimum and self.retry_at > now:
            due.append(self.retry_at)
        elif minimum:
            usable = [entry for entry in idle if slots.is_usable(entry)]
            due += [self._due(slots, entry) for entry in _last(usable, minimum - out)]
            # Not to miss the time of those that are out now.
            due.append(now + min(self._keepalive, slots.recycle / 20))
        pause = min(due, default=math.inf) - now
        return None if pause == math.inf else max(pause, _SOON)

    def _report_failure(self, engine: sa.Engine, error: Exception) -> None:
        self._failures += 1
        first, longest = _RETRY
        pause = min(first * 2 ** min(self._failures - 1, 16), longest)
        self.retry_at = self._clock() + pause * random.uniform(0.5, 1)
        if self._failures == 1:
            # The driver's own text may name the user.
            code = error.args[0] if error.args and isinstance(error.args[0], int) else ""
            _logger.warning(
                "The idle connections of %s cannot be looked after (%s). This is tried again,"
                " less and less often.",
                _name_of(engine),
                f"{type(error).__name__} {code}".strip(),
            )

    def _report_success(self, engine: sa.Engine) -> None:
        if self._failures:
            self._failures = 0
            _logger.info("The idle connections of %s are looked after again.", _name_of(engine))


def _name_of(engine: sa.Engine) -> str:
    url = engine.url  # of the server that it leads to now
    return server_name(url) if url.host else url.get_backend_name()


class _Slots:
    """The places of a pool. All that is used of SQLAlchemy's private parts is used in here.

    Entries that wait in the queue stand in the order of their last use, the oldest first: the first
    is the next to be used, or the last if the pool is "last in, first out".
    """

    def __init__(self, pool: t.Any) -> None:
        self.pool = pool
        self._queue = pool._pool

    @property
    def size(self) -> int:
        """How many connections the pool keeps; 0 for no limit."""
        return int(self.pool.size())

    @property
    def count(self) -> int:
        """How many entries there are, checked out or idle, with and without a connection."""
        return int(self.pool.checkedin() + self.pool.checkedout())

    def look(self) -> tuple[int, list[t.Any]]:
        """How many entries are checked out, and those that are not."""
        with self._queue.mutex:
            return self.pool.checkedout(), list(self._queue.queue)

    def is_usable(self, entry: t.Any) -> bool:
        """Whether it has a connection, and nobody has said that it is bad."""
        return not entry._is_hard_or_soft_invalidated()

    @property
    def recycle(self) -> float:
        """After how many seconds a checkout replaces a connection."""
        return float(self.pool._recycle) if self.pool._recycle > 0 else math.inf

    def take(self, entry: t.Any) -> bool:
        """Take an idle entry, unless somebody was faster."""
        with self._queue.mutex:
            if entry not in self._queue.queue:
                return False
            self._queue.queue.remove(entry)
            return True

    def make(self) -> t.Any:
        """A new entry that has no connection yet, ``None`` if there are as many as may be."""
        return _ConnectionRecord(self.pool, connect=False) if self.pool._inc_overflow() else None

    def put_back(self, entry: t.Any) -> None:
        with self._queue.mutex:
            if not self._queue.full():
                self._insert(entry)
                return
        try:
            entry.close()
        finally:
            self.pool._dec_overflow()

    def give_up(self, entry: t.Any) -> None:
        """Have one entry less; it is closed."""
        with self._queue.mutex:
            exhausted = 0 <= self.pool._max_overflow <= self.pool.overflow()
            if exhausted and not self._queue.queue:  # somebody may wait, and must be woken
                self._insert(entry)
            else:
                self.pool._dec_overflow()

    def _insert(self, entry: t.Any) -> None:
        use = self._use(entry)
        place = sum(self._use(other) <= use for other in self._queue.queue)
        self._queue.queue.insert(place, entry)
        self._queue.not_empty.notify()

    def _use(self, entry: t.Any) -> float:
        if _is_open(entry):
            return _last_use(entry)
        return -math.inf if self._queue.use_lifo else math.inf  # the last that is handed out


def _is_open(entry: ConnectionPoolEntry) -> bool:
    return entry.dbapi_connection is not None


def _last_use(entry: ConnectionPoolEntry) -> float:
    times: _Times = entry.info[_TIMES]
    return times.used


def _last(entries: list[t.Any], count: int) -> list[t.Any]:
    return entries[-count:] if count > 0 else []


_Reference = t.Callable[[], "_Kept | None"]


class _Keeper:
    """The thread of one process.

    Others only ring its bell, which may be done at any moment, in a destructor too. They hand over
    a weak reference.
    """

    def __init__(self) -> None:
        self._bell: queue.SimpleQueue[_Reference] = queue.SimpleQueue()
        self._lock = threading.Lock()  # for the thread's begin and end
        self._thread: threading.Thread | None = None
        self._stopping = False

    def tell(self, kept: _Kept) -> None:
        """Something has happened to a pool."""
        self._bell.put(weakref.ref(kept, self._bell.put))

    def begin(self, kept: _Kept) -> None:
        """A pool is used."""
        self.tell(kept)
        with self._lock:
            if self._thread is None and not self._stopping:
                thread = threading.Thread(target=self._run, name="commondb-keeper", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads; the interpreter may be about to end
                    return
                self._thread = thread

    def stop(self) -> None:
        """The interpreter ends: have no thread in the middle of a driver's code then."""
        with self._lock:
            self._stopping = True
            thread = self._thread
        if thread is not None:
            self._bell.put(_nothing)
            thread.join(1)

    def _run(self) -> None:
        # As weak references that ring the bell, too, when one of them is no more.
        all_kept: set[_Reference] = set()
        pause = math.inf
        while not self._stopping:
            self._wait(all_kept, pause)
            pause = min([self._tend(all_kept, kept) for kept in list(all_kept)], default=math.inf)
            if not all_kept:
                with self._lock:
                    if self._bell.empty():
                        self._thread = None
                        return

    def _wait(self, all_kept: set[_Reference], pause: float) -> None:
        due = time.monotonic() + pause
        while not self._stopping and (left := due - time.monotonic()) > 0:
            try:
                kept = self._bell.get(timeout=min(left, 86400))
            except queue.Empty:
                continue
            if kept() is not None:
                all_kept.add(kept)
            due = min(due, time.monotonic() + _SOON)

    def _tend(self, all_kept: set[_Reference], reference: _Reference) -> float:
        kept = reference()
        pause = None if kept is None or self._stopping else kept.tend()
        if pause is None:
            all_kept.discard(reference)
            return math.inf
        return pause


def _nothing() -> None:
    """In the place of a weak reference."""


_all_kept: weakref.WeakSet[_Kept] = weakref.WeakSet()
_keeper = _Keeper()


def _begin_anew() -> None:
    """In a forked child: it has no thread, and whatever that held and locked is not to be used."""
    global _keeper
    _keeper = _Keeper()
    for kept in list(_all_kept):
        kept.forget()


def _stop() -> None:
    _keeper.stop()


atexit.register(_stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)
