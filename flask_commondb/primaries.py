"""Which of several servers is a bind's primary, found out by asking them.

Owns: :class:`Candidates`: where a bind's primary may be, where it is now, the search for it, and
what becomes of the connections to a server that it has left.

Must not: promote, demote or fence a server, choose a replica, know Flask, or hold a lock during
I/O.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
import typing as t
import weakref

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from . import forks
from .capabilities import have_same_driver
from .dialects import FAMILIES
from .dialects import dialect_for
from .naming import server_name
from .patience import Patience
from .reaching import Reach
from .reaching import Way

_logger = logging.getLogger("flask_commondb")

#: Seconds without a word of the primary after which it is knocked at before a new connection, and
#: after which a connection that leaves its pool has it asked whether it still is one.
TRUST = 1.0

#: Seconds between two searches, and the age of a connection that is used again, while no server
#: can be written to.
SOON = 0.25

#: Seconds for which a search that has found nothing speaks for those who come during the next one.
STALE = 5.0


class Candidates:
    """The servers that may be the primary of one bind. The first URL's is taken for it at first.

    The engine stays the same object, with the same pool; where that connects to changes, and with
    it the engine's ``url``. ``do_connect`` listeners still run first, and may make a connection of
    their own, of which nothing is known here.

    :param engine: of the bind, otherwise ready, before its first connection.
    :param urls: as configured, the bind's own first. All are for the same driver.
    :param bind_key: whose they are.
    :param moved: is told the names of the new primary and the former one. It may use the database.
    :param asked: is told of each question that a server is asked.
    :param clock: returns seconds that only ever grow.
    """

    def __init__(
        self,
        engine: sa.Engine,
        urls: t.Sequence[sa.URL],
        bind_key: str | None,
        moved: t.Callable[[str, str], None],
        asked: t.Callable[[], None],
        clock: t.Callable[[], float] = time.monotonic,
    ) -> None:
        self.bind_key = bind_key
        self.urls = (engine.url, *(_completed(url, engine.url, urls[0]) for url in urls[1:]))
        self._moved = moved
        self._asked = asked
        self._clock = clock
        self._present = 0
        self._engine = weakref.ref(engine)
        self._dialect = dialect_for(engine)
        self._dialect.be_patient(Patience(engine, self._dialect, self._note_silence))
        self._connect = engine.dialect.connect
        self._driver_error: type[Exception] = engine.dialect.loaded_dbapi.Error
        self._ways = [Way.to(url, engine) for url in self.urls]
        self.begin_anew()
        engine.dialect.connect = self.connect  # type: ignore[method-assign]
        self._listen(engine)
        forks.renew(self)

    def begin_anew(self) -> None:
        """In a forked child: what another thread was about to do, it will not."""
        #: Covers the entries and who searches.
        self._lock = threading.Lock()
        self._search: threading.Event | None = None
        self._verdict: _Verdict | None = None
        #: When the primary has last been known to be one.
        self._heard_at = float("-inf")
        #: When it has last been found to say nothing.
        self._silent_at = float("-inf")
        #: What this thread's pool gets next, and whether this thread searches.
        self._thread = threading.local()
        self._entries: weakref.WeakSet[ConnectionPoolEntry] = weakref.WeakSet()

    @property
    def url(self) -> sa.URL:
        """Where the primary is now."""
        return self.urls[self._present]

    @property
    def server(self) -> str:
        """What the primary is called now."""
        return server_name(self.url)

    def is_primary(self, url: sa.URL) -> bool:
        """Whether a URL leads to the present primary: to its host, port and database."""
        return _place(url) == _place(self.url)

    def has(self, url: sa.URL) -> bool:
        """Whether a URL leads to one of the candidates."""
        return any(_place(url) == _place(candidate) for candidate in self.urls)

    def connect(self, *args: t.Any, **kwargs: t.Any) -> DBAPIConnection:
        """A connection to the primary, for the pool. Called as the driver's own function.

        While there is none, to a server that can be read from: the one that was it, or if that
        cannot be reached another candidate. It is not used for long.

        :raises Exception: the driver's error for the one that was it, if none can be reached.
        """
        if self._thread.__dict__.get("is_searching"):  # and has come back here by a detour
            return self._connect(*args, **kwargs)
        reach = Reach(self._connect, self._ways, self._dialect, args, kwargs)
        while True:
            if self._clock() - self._heard_at < TRUST:
                connection = self._open_primary(reach)
                if connection is not None:
                    return connection
            search = self._begin_search()
            if search is None:
                return self._look_for_it(reach)
            if not isinstance(search, _Verdict):
                search.wait()
            elif search.error is not None:
                raise search.error
            else:
                connection = reach.connect(search.place, soon=True)
                return self._hand_over(search.place, connection, False)

    def _listen(self, engine: sa.Engine) -> None:
        # First of all, so that what is noted for this connection is never taken for another one.
        @sa.event.listens_for(engine, "connect", insert=True)
        def connect(dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
            made: _Made | None = self._thread.__dict__.pop("made", None)
            if made is None:
                return
            entry.info[_MADE] = made
            with self._lock:
                self._entries.add(entry)
            if self._is_former(made):
                entry.invalidate(soft=True)

        @sa.event.listens_for(engine, "checkin")
        def checkin(dbapi_connection: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
            made: _Made | None = entry.info.get(_MADE)
            if dbapi_connection is not None and made is not None:
                made.is_used = True
                if self._is_former(made):
                    entry.invalidate()

        @sa.event.listens_for(engine, "checkout")
        def checkout(
            dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry, proxied: t.Any
        ) -> None:
            made: _Made | None = entry.info.get(_MADE)
            if made is not None and made.is_used:
                self._ask_again(dbapi_connection, made)

    def _open_primary(self, reach: Reach) -> DBAPIConnection | None:
        """A connection to the server that was the primary a moment ago, if it still is."""
        place = self._present
        try:
            connection = reach.connect(place, soon=True)
        except self._driver_error as error:
            self._raise_if_full(error)
        else:
            if self._is_writable(connection):
                return self._hand_over(place, connection, True)
            _close(connection)
        self._heard_at = float("-inf")
        return None

    def _raise_if_full(self, error: Exception) -> None:
        """A primary that lets nobody in just now is the primary all the same.

        Elsewhere, what is read may be older than what was read before, and a server that was the
        primary long ago may still say that it is.
        """
        if self._dialect.is_full(error):
            self._heard_at = self._clock()
            raise error

    def _begin_search(self) -> threading.Event | _Verdict | None:
        """``None`` if this thread is to search; else what to wait for, or what is known."""
        with self._lock:
            verdict = self._verdict
            age = float("inf") if verdict is None else self._clock() - verdict.at
            if verdict is not None and age < (SOON if self._search is None else STALE):
                return verdict
            if self._search is None:
                self._search = threading.Event()
                return None
            return self._search

    def _look_for_it(self, reach: Reach) -> DBAPIConnection:
        """Search, and let the others know."""
        former = self._present
        was_lost = self._verdict is not None
        verdict: _Verdict | None = None
        self._thread.is_searching = True
        try:
            place, connection, is_writable = self._find(reach)
            if is_writable:
                self._move_to(place)
            else:
                verdict = _Verdict(self._clock(), place)
        except Exception as error:
            if not self._dialect.is_full(error):
                verdict = _Verdict(self._clock(), former, error)
            raise
        finally:
            with self._lock:
                search, self._search = self._search, None
                self._verdict = verdict
            self._thread.is_searching = False
            if search is not None:
                search.set()
        if is_writable and place != former:  # not before, as others wait
            self._tell(server_name(self.urls[former]))
        elif not is_writable and not was_lost:
            _logger.warning(
                "No server of bind %r can be written to at present. Until there is one, what is"
                " for its primary %s is read from %s.",
                self.bind_key,
                self.server,
                server_name(self.urls[place]),
                extra={"bind_key": self.bind_key, "server": self.server},
            )
        return self._hand_over(place, connection, is_writable)

    def _find(self, reach: Reach) -> tuple[int, DBAPIConnection, bool]:
        """Where the primary is, or a server to read from; a connection, and which it is."""
        spare: tuple[int, DBAPIConnection] | None = None
        error: Exception | None = None
        try:
            # The present one need not be waited for again, if somebody just did.
            patiently = self._clock() - self._silent_at > TRUST
            for place, is_there in reach.answering(self._present, patiently=patiently):
                try:
                    connection = reach.connect(place, soon=not is_there)
                except self._driver_error as reason:
                    if place == self._present:
                        self._raise_if_full(reason)
                        error = reason
                    continue
                if self._is_writable(connection):
                    return place, connection, True
                if spare is None and error is None:
                    spare = place, connection
                else:
                    _close(connection)
            if error is not None:
                raise error
            if spare is None:
                # Nobody answers, so it says why, as it would if it were the only one.
                spare = self._present, reach.connect(self._present, soon=True)
            found, spare = spare, None
            return (*found, False)
        finally:
            if spare is not None:
                _close(spare[1])

    def _move_to(self, place: int) -> None:
        """Connections to other servers are not used again."""
        self._heard_at = self._clock()
        engine = self._engine()
        with self._lock:
            self._present = place
            entries = list(self._entries)
        if engine is not None:
            engine.url = self.url
        for entry in entries:
            made: _Made | None = entry.info.get(_MADE)
            if made is not None and made.place != place:
                entry.invalidate(soft=True)

    def _is_former(self, made: _Made) -> bool:
        """Whether a connection leads to a server that was the primary when it was made."""
        return made.is_writable and made.place != self._present

    def _hand_over(
        self, place: int, connection: DBAPIConnection, is_writable: bool
    ) -> DBAPIConnection:
        """A connection for the pool, which tells next where it keeps it."""
        self._thread.made = _Made(place, is_writable, self._clock())
        return connection

    def _ask_again(self, dbapi_connection: DBAPIConnection, made: _Made) -> None:
        """See to it that a connection that leaves its pool leads to a server that is the primary.

        One that has become a replica goes on answering: those who only read would never notice.
        """
        now = self._clock()
        if now - made.asked_at < (TRUST if made.is_writable else SOON):
            return
        made.asked_at = now
        if not (made.is_writable and self._is_writable(dbapi_connection)):
            raise sa.exc.DisconnectionError("This server is not known to be the primary.")
        self._heard_at = now

    def _is_writable(self, connection: DBAPIConnection) -> bool:
        """Whether a server is a primary; not so if it does not even answer that."""
        self._asked()
        try:
            return self._dialect.is_writable(connection)
        except self._driver_error:
            return False

    def _note_silence(self) -> None:
        """The server has not answered those who wait for it."""
        self._silent_at = self._clock()
        self._heard_at = float("-inf")

    def _tell(self, former: str) -> None:
        server = self.server
        _logger.warning(
            "The primary of bind %r is %s now; it was %s.",
            self.bind_key,
            server,
            former,
            extra={"bind_key": self.bind_key, "server": server},
        )
        self._moved(server, former)


def why_no_candidate(url: sa.URL, known: t.Sequence[sa.URL]) -> str | None:
    """Why a URL cannot be a candidate for the primary, beside those that are known already.

    :param known: the bind's own URL first.
    """
    family = FAMILIES.get(url.get_backend_name())
    if family is not None and family.is_local:
        return f"a {url.get_backend_name()} database is on no server, so it never moves to another."
    if not have_same_driver(known[0], url):
        return (
            f"the driver must be that of the bind's own URL, which is {known[0].drivername!r}, not"
            f" {url.drivername!r}."
        )
    if any(_place(url) == _place(other) for other in known):
        return f"{server_name(url)} is a candidate already."
    return None


@dataclasses.dataclass
class _Made:
    """Where a connection leads. Stands in its entry's ``info``.

    :param place: the URL's.
    :param is_writable: whether that server was the primary when it was last asked.
    :param asked_at: when that was.
    """

    place: int
    is_writable: bool
    asked_at: float
    #: Whether it has been back in its pool.
    is_used: bool = False


_MADE = "flask_commondb.candidate"


class _Verdict(t.NamedTuple):
    """There is no primary.

    :param at: when the search has ended.
    :param place: where to read meanwhile.
    :param error: why that is not possible either.
    """

    at: float
    place: int
    error: Exception | None = None


def _completed(url: sa.URL, made: sa.URL, given: sa.URL) -> sa.URL:
    """With what Flask-SQLAlchemy has added to the bind's own URL, the character set say."""
    added = {
        name: value
        for name, value in made.query.items()
        if name not in given.query and name not in url.query
    }
    return url.update_query_dict(added) if added else url


def _place(url: sa.URL) -> tuple[t.Any, ...]:
    """What two URLs of the same server and database have in common."""
    port = url.port or _PORTS.get(url.get_backend_name())
    return (
        (url.host or "").lower(),
        port,
        url.database,
        sorted(url.query.items()) if not url.host else (),
    )


_PORTS = {"mysql": 3306, "mariadb": 3306, "postgresql": 5432}


def _close(connection: DBAPIConnection) -> None:
    with contextlib.suppress(Exception):
        connection.close()
