"""Chaos: thousands of requests at once, while connections die, clients leave and others fail.

Owns: one drill on MariaDB and PostgreSQL, over three binds and two apps on one ``db``, with views
that raise, connections that are killed at any moment, clients that do not read to the end, and
teardowns of other extensions that raise; and what must be true when it is over. Each test below is
one such rule. ``COMMONDB_TEST_REQUESTS`` sets how many requests there are, ``COMMONDB_TEST_SEED``
repeats the choices of an earlier run, though not its moments.

Must not: put anything in the place of a part of the package.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import gc
import io
import itertools
import logging
import os
import queue
import random
import threading
import time
import typing as t
import weakref

import psycopg
import pymysql
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask
from flask import Response
from flask import abort
from flask import current_app
from flask import g
from flask import request
from flask import stream_with_context
from werkzeug.exceptions import HTTPException
from werkzeug.test import create_environ

from flask_commondb import CommonDB
from flask_commondb import signals
from flask_commondb.errors import PartialCommitError

from .conftest import clean_database
from .servers import MariaDBServer
from .servers import wait_until

if t.TYPE_CHECKING:
    from .servers import Database
    from .servers import MariaDBCluster
    from .servers import PostgreSQLCluster
    from .servers import Server

# psycopg's own cursors say so when the connection was killed under them.
pytestmark = pytest.mark.filterwarnings("ignore:.* was deleted while still open:ResourceWarning")

REQUESTS = int(os.environ.get("COMMONDB_TEST_REQUESTS", "2000"))

SEED = int(os.environ.get("COMMONDB_TEST_SEED", "0")) or random.randrange(1, 2**32)

THREADS = 8

#: Small, so that a connection too many shows.
POOL_SIZE = 4

#: In the order in which one commit goes over them.
BINDS = (None, "stats", "orders")

#: Rows of each bind that are there to be streamed.
LINES = 120

#: Rows that all want to change.
HOT = 4

#: Where a request finds its :class:`Visit`.
VISIT = "tests.visit"

#: How often a row may be there in the end.
NEVER, ONCE, NEVER_OR_ONCE = ((0,), (1,), (0, 1))

Answer = str | Response


class Trouble(Exception):
    """What a view raises because it is its part to do so."""


class ForeignError(Exception):
    """What another extension's teardown raises."""


class Mixed(Exception):
    """A request has met what belongs to another one."""


#: What a view may run into when a connection is killed.
KILLED = (sa.exc.OperationalError, sa.exc.InterfaceError, pymysql.Error, psycopg.Error)


@dataclasses.dataclass(eq=False)
class Write:
    """A row that a unit of work has sent, and how often it may be there in the end."""

    bind_key: str | None
    mark: str
    allowed: tuple[int, ...] = NEVER


class Unit:
    """A unit of work: the sessions of one context, the rows it writes, and what it was told.

    :param mark: which no other unit has.
    """

    def __init__(self, drill: Drill, mark: str) -> None:
        self.drill = drill
        self.mark = mark
        self.writes: list[Write] = []
        self.error: str | None = None
        self.is_error_expected = True
        #: Whether a connection was lost under it.
        self.is_killed = False
        self._asked: tuple[Write, ...] = ()

    def session(self, bind_key: t.Any) -> t.Any:
        """The current context's session: a bind's own, or with ``...`` the one for all."""
        db = self.drill.db
        session = db.session() if bind_key is ... else db.sessions[bind_key]()
        owner = session.info.setdefault("unit", self.mark)
        self.drill.watch(session)
        if owner != self.mark:
            raise Mixed(f"{self.mark} has the session of {owner}")
        return session

    def add(self, session: t.Any, bind_key: str | None, *, is_doomed: bool = False) -> Write:
        """Send a row.

        :param is_doomed: it is never to be committed.
        """
        write = self.note(bind_key)
        row = self.drill.records[bind_key](mark=write.mark, is_doomed=is_doomed)
        session.add(row)
        session.flush()
        return write

    def note(self, bind_key: str | None) -> Write:
        """A row that the caller sends."""
        write = Write(bind_key, f"{self.mark}.{len(self.writes)}")
        self.writes.append(write)
        return write

    def look(self, session: t.Any, bind_key: str | None) -> None:
        """Ask a bind a question that has another answer for each unit, and about other units."""
        record = self.drill.records[bind_key]
        statement = (
            sa.select(sa.literal(self.mark), sa.func.count())
            .select_from(record)
            .where(record.is_doomed, record.mark.not_like(f"{self.mark}.%"))
        )
        mark, others = session.execute(statement).one()
        if mark != self.mark:
            raise Mixed(f"{self.mark} has the answer to {mark}")
        if others:
            raise Mixed(f"{self.mark} sees {others} rows that nobody has committed")

    def see(self, session: t.Any, write: Write) -> None:
        """A row that was sent is seen, once."""
        record = self.drill.records[write.bind_key]
        statement = sa.select(sa.func.count()).where(record.mark == write.mark)
        found = session.scalar(statement)
        if found != 1:
            raise Mixed(f"{self.mark} sees its own row {found} times")

    def aim(self, session: t.Any, *, at_once: bool = False) -> None:
        """Have one of the session's connections killed.

        :param at_once: now, rather than at any moment from now on.
        """
        connections = session.all_connections()
        for connection in connections[len(self.writes) % (len(connections) or 1) :][:1]:
            if not connection.closed and not connection.invalidated:
                driver = connection.connection.driver_connection
                is_mariadb = isinstance(driver, pymysql.Connection)
                number = driver.thread_id() if is_mariadb else driver.info.backend_pid
                target = (self.drill.server_at(connection.engine.url.port), number)
                if at_once:
                    self.drill.kill(*target)
                else:
                    self.drill.targets.put(target)

    def ask(self, *writes: Write) -> None:
        """A commit of these rows follows at once."""
        self._asked = writes

    def told(self) -> None:
        """The commit was reported."""
        for write in self._asked:
            write.allowed = ONCE
        self._asked = ()

    def settle(self, error: BaseException) -> None:
        """The commit, if there was one, has raised.

        Only where it was asked, and no answer came, nobody can know.
        """
        first = self._asked[0].bind_key if self._asked else None
        for write in self._asked:
            if isinstance(error, PartialCommitError):
                if write.bind_key in error.committed:
                    write.allowed = ONCE
                elif write.bind_key == error.failed:
                    write.allowed = NEVER_OR_ONCE
            elif write.bind_key == first:
                write.allowed = NEVER_OR_ONCE
        self._asked = ()

    @contextlib.contextmanager
    def committing(self, *writes: Write) -> t.Iterator[None]:
        """Around a commit, and nothing else."""
        self.ask(*writes)
        try:
            yield
        except BaseException as error:
            self.settle(error)
            raise
        self.told()

    def heard(self, future: concurrent.futures.Future[None]) -> None:
        """:meth:`observed`, for work that another thread has done."""
        with contextlib.suppress(Exception), self.observed():
            future.result()
            self.told()

    @contextlib.contextmanager
    def observed(self, *expected: type[Exception]) -> t.Iterator[None]:
        """Around all of the unit: what it was told in the end."""
        try:
            yield
        except BaseException as error:
            self.settle(error)
            self.error = f"{type(error).__name__}: {error}"
            kinds = (Trouble, HTTPException, PartialCommitError, *KILLED, *expected)
            self.is_error_expected = isinstance(error, kinds)
            self.is_killed = isinstance(error, (PartialCommitError, *KILLED))
            raise


@dataclasses.dataclass(eq=False)
class Visit:
    """One request: what it is to do, what its view has seen, and what its client has got."""

    number: int
    drill: Drill = dataclasses.field(repr=False)
    dice: random.Random = dataclasses.field(repr=False)
    view: str
    method: str
    #: How much the client reads.
    manner: str
    #: Which teardown of another extension raises.
    foreign: str | None
    units: list[Unit] = dataclasses.field(default_factory=list, repr=False)
    #: Kept alive, as careless views and servers do.
    kept: list[t.Any] = dataclasses.field(default_factory=list, repr=False)
    #: What else the view may raise.
    expected: tuple[type[Exception], ...] = ()
    #: The status that belongs to what the view has done; 200 only if it has returned.
    due: int | None = None
    #: The status that the client has got.
    status: int | None = None
    #: What came out of the app in the place of a response, or out of its closing.
    escaped: BaseException | None = None
    #: What has ended the body before its end.
    broken: str | None = None
    is_broken_by_kill: bool = False
    #: Pieces of the body that the client has got, and that there are.
    received: int = 0
    pieces: int = 1

    def unit(self, name: str = "") -> Unit:
        unit = Unit(self.drill, f"{self.number}{name}")
        self.units.append(unit)
        return unit

    def chance(self, probability: float) -> bool:
        return self.dice.random() < probability

    def bind(self) -> str | None:
        return self.dice.choice(BINDS)

    def session(self, unit: Unit, bind_key: str | None) -> t.Any:
        """The bind's session, or the one for all binds."""
        return unit.session(... if self.chance(0.4) else bind_key)


class Drill:
    """Two apps on one ``db``, and the requests that are made to them.

    :param databases: for each bind.
    """

    def __init__(self, databases: dict[str | None, Database[t.Any]]) -> None:
        class Base(so.DeclarativeBase):
            pass

        self.databases = databases
        self.visits: list[Visit] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.checked_out: dict[str, int] = {}
        self.open_contexts = -1
        #: Sessions and streams that are still there.
        self.alive: weakref.WeakSet[t.Any] = weakref.WeakSet()
        #: Connections that are to be killed.
        self.targets: queue.SimpleQueue[tuple[Server, int]] = queue.SimpleQueue()
        # What the collector closes may be counted while something else is.
        self._lock = threading.RLock()
        options = {"pool_size": POOL_SIZE, "max_overflow": 60, "pool_timeout": 20}
        self.db = CommonDB(model_class=Base, engine_options=options)
        #: What the units write, and what there is to be streamed.
        self.records = {key: self._model("record", key, Record) for key in BINDS}
        self.lines = {key: self._model("line", key, Line) for key in BINDS}
        self.counter = self._model("counter", None, Counter)
        self.apps = [self._app("watched", True), self._app("plain", False)]
        self.engines: dict[str, sa.Engine] = {}
        for app in self.apps:
            for engine, key, role, name in self.db.routers[app].servers():
                self.engines[f"{app.name} {key} {role} {name}"] = engine
        self._fill()
        self.workers = concurrent.futures.ThreadPoolExecutor(2)
        self.executor = self.db.executor(self.workers)

    def count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.counts[what] += number

    def watch(self, transient: t.Any) -> None:
        """Note what has to go when its context has."""
        with self._lock:
            self.alive.add(transient)

    def run(self) -> None:
        """Make all requests; returns when the last one is answered and all work is done."""
        numbers = iter(range(REQUESTS))

        def work() -> None:
            while True:
                with self._lock:
                    number = next(numbers, None)
                if number is None:
                    return
                visit = self._visit(number)
                self.visits.append(visit)
                serve(self.apps[visit.dice.random() < 0.25], visit)
                del visit.dice

        killer = Killer(self)
        killer.start()
        try:
            with concurrent.futures.ThreadPoolExecutor(THREADS, "server") as threads:
                for thread in [threads.submit(work) for _ in range(THREADS)]:
                    thread.result()
        finally:
            killer.stop()
            self.workers.shutdown()
        self.checked_out = {
            name: t.cast(sa.QueuePool, engine.pool).checkedout()
            for name, engine in self.engines.items()
        }
        self.open_contexts = len(self.db.open_contexts)
        for visit in self.visits:
            visit.kept.clear()

    def units(self) -> t.Iterator[Unit]:
        return itertools.chain.from_iterable(visit.units for visit in self.visits)

    def servers(self) -> list[Server]:
        clusters = [self.databases[None].cluster, self.databases["orders"].cluster]
        return [server for cluster in clusters for server in cluster.servers]

    def pools_of(self, server: Server) -> list[sa.QueuePool]:
        return [
            t.cast(sa.QueuePool, engine.pool)
            for engine in self.engines.values()
            if engine.url.port == server.port
        ]

    def connections(self, server: Server, only: str = "") -> list[t.Any]:
        """The connections that a server has from the apps.

        :param only: which of them, in SQL.
        """
        names = ", ".join(sorted({f"'{database.name}'" for database in self.databases.values()}))
        if isinstance(server, MariaDBServer):
            processes = "information_schema.processlist"
            sql = f"SELECT id FROM {processes} WHERE user = 'app' AND db IN ({names})"
        else:
            activity = "pg_stat_activity"
            sql = f"SELECT pid FROM {activity} WHERE usename = 'app' AND datname IN ({names})"
        return [number for (number,) in server.execute(f"{sql} {only}")]

    def server_at(self, port: int | None) -> Server:
        (server,) = (server for server in self.servers() if server.port == port)
        return server

    def kill(self, server: Server, number: int, *, is_gentle: bool = False) -> None:
        """Kill a connection, or only what it is doing."""
        if isinstance(server, MariaDBServer):
            kill = f"KILL {'QUERY' if is_gentle else ''} {number}"
        else:
            kill = f"SELECT pg_{'cancel' if is_gentle else 'terminate'}_backend({number})"
        with contextlib.suppress(pymysql.OperationalError):  # it has left
            server.execute(kill)
            self.count("queries killed" if is_gentle else "connections killed")

    def transactions(self, server: Server) -> int:
        """How many transactions of the apps are open on a server."""
        if isinstance(server, MariaDBServer):
            own = ", ".join(map(str, [0, *self.connections(server)]))
            open_ones = f"information_schema.innodb_trx WHERE trx_mysql_thread_id IN ({own})"
            return int(server.execute(f"SELECT COUNT(*) FROM {open_ones}")[0][0])
        return len(self.connections(server, "AND xact_start IS NOT NULL"))

    def rows(self, bind_key: str | None) -> dict[str, int]:
        """What is durable: how often each mark is there."""
        table = self.records[bind_key].__tablename__
        sql = f"SELECT mark, COUNT(*) FROM {table} GROUP BY mark"
        return dict(self.databases[bind_key].execute(sql))

    def dispose(self) -> None:
        for engine in self.engines.values():
            engine.dispose()

    def _visit(self, number: int) -> Visit:
        dice = random.Random(f"{SEED} {number}")
        (view,) = dice.choices(list(VIEWS), [weight for weight, _ in VIEWS.values()])
        (method,) = dice.choices(["GET", "POST", "HEAD"], [55, 35, 10])
        if view in ("streams", "streams_in_context"):
            (manner,) = dice.choices(["all", "part", "nothing"], [40, 40, 20])
        else:
            (manner,) = dice.choices(["all", "nothing", "test client"], [80, 10, 10])
        (foreign,) = dice.choices([None, "first", "last", "request"], [85, 6, 6, 3])
        return Visit(number, self, dice, view, method, manner, foreign)

    def _app(self, name: str, leak_watch: bool) -> Flask:
        app = Flask(name)
        # Even the question whether the server has TLS takes 25 ms.
        plain = {"connect_args": {"ssl_disabled": True}}
        orders = self.databases["orders"]
        app.config.from_mapping(
            SQLALCHEMY_DATABASE_URI=self.databases[None].primary_url,
            SQLALCHEMY_ENGINE_OPTIONS=plain,
            SQLALCHEMY_BINDS={
                "stats": {"url": self.databases["stats"].primary_url, **plain},
                "orders": {"url": orders.primary_url, "replicas": orders.replica_urls},
            },
            COMMONDB_REPLICAS=self.databases[None].replica_urls,
            COMMONDB_LEAK_WATCH=leak_watch,
        )
        # Flask calls the last one first.
        app.teardown_appcontext(foreign_teardown("last"))
        self.db.init_app(app)
        app.teardown_appcontext(foreign_teardown("first"))
        app.teardown_request(foreign_teardown("request"))
        app.add_url_rule("/", "visit", answer, methods=["GET", "POST"])
        if leak_watch:  # in the other one a view's error goes through all of Flask

            @app.errorhandler(Exception)
            def show(error: Exception) -> t.Any:
                return error if isinstance(error, HTTPException) else ("failed", 500)

        app.logger.disabled = True
        return app

    def _model(self, name: str, bind_key: str | None, columns: type) -> t.Any:
        names = {"__tablename__": f"{bind_key or 'main'}_{name}", "__bind_key__": bind_key}
        bases = (columns, self.db.Model)
        return type(
            f"{bind_key or 'main'}_{name}".title(), bases, {**names, "__module__": __name__}
        )

    def _fill(self) -> None:
        with self.apps[0].app_context():
            self.db.create_all()
        for key, line in self.lines.items():
            numbers = f"seq_1_to_{LINES}" if key != "orders" else f"generate_series(1, {LINES}) seq"
            self.databases[key].execute(
                f"INSERT INTO {line.__tablename__} SELECT seq, REPEAT('x', 200) FROM {numbers}"
            )
        for number in range(1, HOT + 1):
            table = self.counter.__tablename__
            self.databases[None].execute(f"INSERT INTO {table} VALUES ({number}, 0)")
        self.databases[None].execute(
            "CREATE PROCEDURE add_record(IN new_mark VARCHAR(40)) BEGIN"
            f" INSERT INTO {self.records[None].__tablename__} (mark, is_doomed)"
            " VALUES (new_mark, 0);"
            " SELECT new_mark; END"
        )
        for database in self.databases.values():
            database.sync()


class Record:
    """What a unit of work writes."""

    id: so.Mapped[int] = so.mapped_column(primary_key=True)
    mark: so.Mapped[str] = so.mapped_column(sa.String(40), index=True)
    is_doomed: so.Mapped[bool] = so.mapped_column(index=True)


class Line:
    """What is streamed."""

    id: so.Mapped[int] = so.mapped_column(primary_key=True)
    text: so.Mapped[str] = so.mapped_column(sa.String(200))


class Counter:
    """What many want to change at once."""

    id: so.Mapped[int] = so.mapped_column(primary_key=True)
    value: so.Mapped[int] = so.mapped_column()


class Killer:
    """Kills connections of the apps, on every server, at random moments."""

    def __init__(self, drill: Drill) -> None:
        self._drill = drill
        self._dice = random.Random(f"{SEED} killer")
        self._done = threading.Event()
        self._threads = concurrent.futures.ThreadPoolExecutor(1, "killer")

    def start(self) -> None:
        self._future = self._threads.submit(self._work)

    def stop(self) -> None:
        """Returns when it has ended; raises what has gone wrong in it."""
        self._done.set()
        self._threads.shutdown()
        self._future.result()

    def _work(self) -> None:
        servers, targets = self._drill.servers(), self._drill.targets
        while not self._done.wait(self._dice.uniform(0, 0.02)):
            is_gentle = self._dice.random() < 0.2
            with contextlib.suppress(queue.Empty):
                self._drill.kill(*targets.get_nowait(), is_gentle=is_gentle)
                continue
            server = self._dice.choice(servers)
            is_mariadb, only = isinstance(server, MariaDBServer), ""
            if self._dice.random() < 0.5:
                only = "AND command <> 'Sleep'" if is_mariadb else "AND state <> 'idle'"
            numbers = self._drill.connections(server, only)
            if numbers:
                self._drill.kill(server, self._dice.choice(numbers), is_gentle=is_gentle)


# The way of a request ------------------------------------------------------------------------


def serve(app: Flask, visit: Visit) -> None:
    if visit.manner == "test client":
        serve_to_test_client(app, visit)
    else:
        serve_to_client(app, visit)


def serve_to_client(app: Flask, visit: Visit) -> None:
    """What a WSGI server does for a client that reads all of the answer, a part, or nothing."""
    environ = create_environ("/", method=visit.method)
    environ[VISIT] = visit

    def start_response(
        status: str, headers: t.Any, exc_info: t.Any = None
    ) -> t.Callable[[bytes], object]:
        visit.status = int(status[:3])
        return io.BytesIO().write

    limit = {"all": None, "nothing": 0, "part": visit.dice.randrange(1, LINES)}[visit.manner]
    try:
        body = app(environ, start_response)
    except Exception as error:
        visit.escaped = without_traceback(error)
        return
    if visit.chance(0.3):
        visit.kept.append(body)
    try:
        for _ in itertools.islice(body, limit):
            visit.received += 1
    except Exception as error:
        visit.broken = f"{type(error).__name__}: {error}"
        visit.is_broken_by_kill = isinstance(error, (Trouble, ForeignError, *KILLED))
    finally:
        try:
            body.close()  # type: ignore[attr-defined]
        except Exception as error:
            visit.escaped = without_traceback(error)


def serve_to_test_client(app: Flask, visit: Visit) -> None:
    """A test client that keeps the contexts of its request."""
    try:
        with app.test_client() as client:
            response = client.open("/", method=visit.method, environ_base={VISIT: visit})
            visit.status = response.status_code
    except Exception as error:
        visit.escaped = without_traceback(error)


def answer() -> Answer:
    """The only view of the apps."""
    visit: Visit = request.environ[VISIT]
    g.foreign = visit.foreign
    unit = visit.unit()
    try:
        with unit.observed():
            found = VIEWS[visit.view][1](visit, unit)
    except BaseException as error:
        visit.due = (error.code or 500) if isinstance(error, HTTPException) else 500
        unit.is_error_expected = unit.is_error_expected or isinstance(error, visit.expected)
        raise
    visit.due = 200
    return found


def foreign_teardown(name: str) -> t.Callable[[BaseException | None], None]:
    """Another extension, whose teardown raises for some requests."""

    def teardown(error: BaseException | None) -> None:
        if g.get("foreign") == name:
            g.foreign = None
            raise ForeignError(name)

    return teardown


def without_traceback(error: BaseException) -> BaseException:
    """An error that keeps nothing alive."""
    error.__context__ = None
    return error.with_traceback(None)


# Views ----------------------------------------------------------------------------------------

View = t.Callable[[Visit, Unit], Answer]

#: By name: how often each comes, in relation to the others, and the view.
VIEWS: dict[str, tuple[int, View]] = {}


def view(weight: int) -> t.Callable[[View], View]:
    def register(function: View) -> View:
        VIEWS[function.__name__] = (weight, function)
        return function

    return register


@view(20)
def reads(visit: Visit, unit: Unit) -> Answer:
    """Reads from several binds."""
    for key in visit.dice.sample(BINDS, visit.dice.randrange(1, 4)):
        session = visit.session(unit, key)
        unit.look(session, key)
        if visit.chance(0.1):
            unit.aim(session)
        if visit.chance(0.2):
            session.commit()
            unit.look(session, key)
    return "read"


@view(15)
def writes(visit: Visit, unit: Unit) -> Answer:
    """Writes to one bind, after it has read from it, perhaps from a replica."""
    key = visit.bind()
    session = visit.session(unit, key)
    if visit.chance(0.5):
        unit.look(session, key)
    write = unit.add(session, key)
    if visit.chance(0.2):
        unit.aim(session)
    unit.see(session, write)
    with unit.committing(write):
        session.commit()
    unit.see(session, write)
    if visit.chance(0.1):
        raise Trouble("after the commit")
    return "written"


@view(6)
def writes_to_all(visit: Visit, unit: Unit) -> Answer:
    """One session, one commit, three servers."""
    session = unit.session(...)
    written = [unit.add(session, key) for key in BINDS]
    if visit.chance(0.4):
        unit.aim(session, at_once=visit.chance(0.5))
    with unit.committing(*written):
        session.commit()
    return "written"


@view(12)
def fails(visit: Visit, unit: Unit) -> Answer:
    """Writes what it does not commit; then it raises, aborts, or returns."""
    if visit.chance(0.3):
        session = unit.session(None)
        write = unit.add(session, None)
        with unit.committing(write):
            session.commit()
    for key in visit.dice.sample(BINDS, visit.dice.randrange(1, 4)):
        session = visit.session(unit, key)
        unit.add(session, key, is_doomed=True)
        if visit.chance(0.2):
            unit.aim(session, at_once=True)
    way = visit.dice.randrange(3)
    if way == 0:
        raise Trouble("half-way")
    if way == 1:
        abort(visit.dice.choice([400, 404, 409, 503]))
    return "not committed"


@view(12)
def blocks(visit: Visit, unit: Unit) -> Answer:
    """``db.transaction()`` over one bind or several, some with a savepoint that is rolled back."""
    keys = visit.dice.sample(BINDS, visit.dice.choice([1, 1, 2, 3]))
    with visit.drill.db.transaction(*keys):
        written = []
        for key in keys:
            session = unit.session(key)
            written.append(unit.add(session, key))
            if visit.chance(0.15):
                unit.aim(session, at_once=visit.chance(0.3))
            if visit.chance(0.2):
                # Killed inside the savepoint, whose error is not shown: it says so later.
                visit.expected = (sa.exc.InvalidRequestError,)
                with contextlib.suppress(Trouble), visit.drill.db.transaction(key):
                    unit.add(session, key, is_doomed=True)
                    raise Trouble("in the savepoint")
        if visit.chance(0.1):
            raise Trouble("in the block")
        unit.ask(*written)
    unit.told()
    return "written"


@view(8)
def collides(visit: Visit, unit: Unit) -> Answer:
    """``@db.transactional``: two rows that others change at the same time, in any order."""
    counter = visit.drill.counter
    key: t.Any = visit.dice.choice([None, ...])

    def work() -> None:
        session = unit.session(key)
        unit.ask()
        for number in visit.dice.sample(range(1, HOT + 1), 2):
            change = sa.update(counter).where(counter.id == number)
            session.execute(change.values(value=counter.value + 1))
            unit.look(unit.session("stats"), "stats")
        write = unit.add(session, None)
        if visit.chance(0.1):
            unit.aim(session)
        unit.ask(write)

    db = visit.drill.db
    (db.transactional(retry=8) if key is ... else db.transactional(None, retry=8))(work)()
    unit.told()
    return "counted"


@view(5)
def uses_cursor(visit: Visit, unit: Unit) -> Answer:
    """``db.cursor()``, as code that comes from the driver."""
    key = visit.bind()
    session = unit.session(... if key is None else key)
    write = unit.note(key)
    table = visit.drill.records[key].__tablename__
    with visit.drill.db.cursor(key) as cursor:
        cursor.execute(f"INSERT INTO {table} (mark, is_doomed) VALUES (%s, false)", (write.mark,))
    if visit.chance(0.1):
        raise Trouble("after the cursor")
    with unit.committing(write):
        session.commit()
    return "written"


@view(5)
def calls(visit: Visit, unit: Unit) -> Answer:
    """``db.callproc()``: a procedure that writes, and answers."""
    session = unit.session(...)
    write = unit.note(None)
    result = visit.drill.db.callproc("add_record", write.mark)
    if result.scalars().all() != [write.mark]:
        raise Mixed(f"{unit.mark} has the answer of another call")
    with unit.committing(write):
        session.commit()
    return "called"


@view(4)
def leaks(visit: Visit, unit: Unit) -> Answer:
    """Takes a connection from an engine; where there is a leak watch, it forgets it, too."""
    db = visit.drill.db
    engines = [*db.engines.values(), *itertools.chain(*db.replica_engines.values())]
    connection = visit.dice.choice(engines).connect()
    is_careless = current_app.config["COMMONDB_LEAK_WATCH"]
    with contextlib.ExitStack() as stack:
        if is_careless:
            visit.kept.append(connection)
        else:
            stack.enter_context(connection)
        try:
            connection.execute(sa.text("SELECT 1"))
            unit.look(unit.session(None), None)
        finally:
            if is_careless and not connection.invalidated:  # its error would have given it back
                visit.drill.count("connections leaked")
        if visit.chance(0.3):
            raise Trouble("with a connection out")
    return "leaked"


@view(6)
def nests(visit: Visit, unit: Unit) -> Answer:
    """A context inside the request's, of the same app or the other one, with its own session."""
    session = unit.session(...)
    write = unit.add(session, None)
    if visit.chance(0.1):
        unit.aim(session)
    inner = visit.unit("-inner")
    with contextlib.suppress(ForeignError, Trouble):
        with inner.observed(ForeignError), visit.dice.choice(visit.drill.apps).app_context():
            g.foreign = visit.dice.choice([None, None, "first", "last"])
            own = inner.session(...)
            if own is session:
                raise Mixed("the inner context has the outer one's session")
            inner.look(own, None)
            written = inner.add(own, "orders")
            if visit.chance(0.2):
                raise Trouble("in the inner context")
            with inner.committing(written):
                own.commit()
    if unit.session(...) is not session:
        raise Mixed("the outer context has lost its session")
    unit.see(session, write)
    with unit.committing(write):
        session.commit()
    return "nested"


@view(5)
def has_job_done(visit: Visit, unit: Unit) -> Answer:
    """``@db.job`` inside the request: a unit of its own."""
    unit.add(unit.session(...), "stats", is_doomed=True)
    inner = visit.unit("-job")
    with inner.observed():
        visit.drill.db.job(job(visit, inner))()
        inner.told()
    unit.look(unit.session(...), "stats")
    return "done"


@view(5)
def submits(visit: Visit, unit: Unit) -> Answer:
    """``db.executor()``: the work of another thread, for which the view may wait."""
    inner = visit.unit("-work")
    future = visit.drill.executor.submit(job(visit, inner))
    future.add_done_callback(inner.heard)
    unit.look(unit.session(None), None)
    if visit.chance(0.5):
        future.result()
    return "submitted"


def job(visit: Visit, unit: Unit) -> t.Callable[[], None]:
    key, has_trouble = visit.bind(), visit.chance(0.2)

    def work() -> None:
        session = unit.session(...)
        unit.look(session, key)
        write = unit.add(session, key)
        if has_trouble:
            raise Trouble("in the job")
        unit.ask(write)

    return work


@view(6)
def tries_again(visit: Visit, unit: Unit) -> Answer:
    """After a commit that has raised the session is usable at once."""
    key = visit.bind()
    session = visit.session(unit, key)
    for attempt in itertools.count():
        try:
            write = unit.add(session, key)
            if attempt < 2 and visit.chance(0.5):
                unit.aim(session, at_once=True)
        except KILLED:
            session.rollback()
            continue
        try:
            with unit.committing(write):
                session.commit()
        except KILLED:
            visit.drill.count("commits that have raised")
        else:
            break
    return "written"


@view(14)
def streams(visit: Visit, unit: Unit) -> Answer:
    """A response that is read from a server, or from two, while it is sent."""
    keys = visit.dice.sample(BINDS, visit.dice.choice([1, 1, 1, 2]))
    opened = [open_stream(visit, key) for key in keys]
    if visit.chance(0.3):
        write = unit.add(unit.session(keys[0]), keys[0])
        with unit.committing(write):
            unit.session(keys[0]).commit()
    if visit.chance(0.1):
        next(opened[0])
        raise Trouble("with a stream open")
    if visit.chance(0.3):  # which nothing but the stream itself can end
        visit.pieces = LINES * len(opened)
        return Response(map(repr, itertools.chain(*opened)))
    return Response(pieces(visit, opened))


@view(5)
def streams_in_context(visit: Visit, unit: Unit) -> Answer:
    """A stream that is opened while the response is sent, in the request's context."""
    key, foreign = visit.bind(), visit.foreign

    def generate() -> t.Iterator[bytes]:
        stream = open_stream(visit, key)
        g.foreign = foreign
        yield from pieces(visit, [stream])

    return Response(stream_with_context(generate()))


def open_stream(visit: Visit, key: str | None) -> t.Iterator[t.Any]:
    line = visit.drill.lines[key]
    statement = sa.select(line.id, line.text)
    if visit.manner == "part" and visit.chance(0.3):  # more than any buffer holds
        for _ in range(2):
            other = so.aliased(line)
            statement = statement.join(other, other.id > line.id - LINES)
    stream = visit.drill.db.stream(statement, chunk=visit.dice.choice([5, 50, 1000]))
    visit.drill.watch(stream)
    way = visit.dice.randrange(3)
    return stream if way == 0 else stream.scalars() if way == 1 else stream.mappings()


def pieces(visit: Visit, opened: t.Sequence[t.Iterator[t.Any]]) -> t.Iterator[bytes]:
    visit.pieces = LINES * len(opened)
    end = visit.dice.randrange(LINES) if visit.chance(0.1) else -1
    for number, row in enumerate(itertools.chain(*opened)):
        if number == end:
            raise Trouble("while it is sent")
        yield str(row).encode()


# What is true when it is over -----------------------------------------------------------------


@pytest.fixture(scope="module")
def drill(mariadb: MariaDBCluster, postgresql: PostgreSQLCluster) -> t.Iterator[Drill]:
    """The drill, when it is over."""
    with contextlib.ExitStack() as stack:
        main, stats = (stack.enter_context(clean_database(mariadb)) for _ in range(2))
        orders = stack.enter_context(clean_database(postgresql))
        mariadb.primary.execute("SET GLOBAL max_connections = 200")
        drill = Drill({None: main, "stats": stats, "orders": orders})
        stack.callback(drill.dispose)
        for signal in (
            signals.connection_leaked,
            signals.replica_down,
            signals.session_close_failed,
            signals.unit_repeated,
        ):
            stack.enter_context(signal.connected_to(counting(drill, f"signals {signal.name}")))
        ears = Ears(drill)
        with heard_by(ears, "flask_commondb"), heard_by(ears, "sqlalchemy.pool"):
            begin = time.monotonic()
            drill.run()
            seconds = time.monotonic() - begin
        print(f"COMMONDB_TEST_SEED={SEED}: {REQUESTS} requests, {seconds:.1f} s")
        for what, number in sorted({**drill.counts, **figures(drill)}.items()):
            print(f"{number:7} {what}")
        yield drill


@pytest.fixture(autouse=True)
def _seed_is_told() -> None:
    """Where a rule is broken, pytest shows it."""
    print(f"COMMONDB_TEST_SEED={SEED}")


class Ears(logging.Handler):
    """Counts what the package logs, without keeping it."""

    def __init__(self, drill: Drill) -> None:
        super().__init__(logging.WARNING)
        self._drill = drill

    def emit(self, record: logging.LogRecord) -> None:
        self._drill.count(f"logged: {record.msg}")
        if record.exc_info:
            self._drill.count(f"logged: {record.exc_info[1]!r}")


@contextlib.contextmanager
def heard_by(ears: logging.Handler, name: str) -> t.Iterator[None]:
    """Have the handler alone hear a logger."""
    logger = logging.getLogger(name)
    logger.addHandler(ears)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = True
        logger.removeHandler(ears)


def counting(drill: Drill, what: str) -> t.Callable[..., None]:
    def count(app: Flask, **more: t.Any) -> None:
        drill.count(what)

    return count


def figures(drill: Drill) -> dict[str, int]:
    """What has happened, for those who read along."""
    found: collections.Counter[str] = collections.Counter()
    for visit in drill.visits:
        found[f"answers {visit.status}"] += 1
        found[f"views {visit.view}"] += 1
        if visit.escaped is not None:
            found[f"came out of the app: {type(visit.escaped).__name__}"] += 1
        if visit.broken:
            found[f"bodies broken: {visit.broken.partition(':')[0]}"] += 1
        if visit.pieces > visit.received and visit.view.startswith("streams"):
            found["streams left"] += 1
    for unit in drill.units():
        if unit.error:
            found[f"units raised: {unit.error.partition(':')[0]}"] += 1
        for write in unit.writes:
            found[f"rows allowed {write.allowed}"] += 1
    return dict(found)


def test_no_connection_is_out(drill: Drill) -> None:
    """Whatever happened, each connection to each server has come back, and nothing waits for it."""
    assert drill.checked_out == dict.fromkeys(drill.engines, 0)
    assert drill.open_contexts == 0


def test_nothing_is_kept(drill: Drill) -> None:
    """No session and no stream can be reached when its context, or its response, has ended."""
    gc.collect()
    assert list(drill.alive) == []


def test_nothing_is_mixed(drill: Drill) -> None:
    """No request has met the session, the answer or the uncommitted rows of another one."""
    assert [unit.error for unit in drill.units() if (unit.error or "").startswith("Mixed")] == []


def test_no_error_of_another_kind(drill: Drill) -> None:
    """A view meets nothing but its own trouble and the loss of a connection that was killed."""
    assert [unit.error for unit in drill.units() if not unit.is_error_expected] == []


def test_a_kill_costs_one_request(drill: Drill) -> None:
    """No more units fail than connections were killed: nobody is handed a dead one."""
    kills = sum(number for what, number in drill.counts.items() if "killed" in what)
    assert len([unit for unit in drill.units() if unit.is_killed]) <= kills


def test_every_200_stays_a_200(drill: Drill) -> None:
    """What a view has returned arrives; nothing of ours is raised when its context ends."""
    wrong = [visit for visit in drill.visits if visit.due == 200 and not has_arrived(visit)]
    assert wrong == []


def test_every_error_is_shown(drill: Drill) -> None:
    """What a view has raised arrives as the status that belongs to it."""
    wrong = [visit for visit in drill.visits if visit.due != 200 and not has_arrived(visit)]
    assert wrong == []


def has_arrived(visit: Visit) -> bool:
    """Whether the client has got the view's status, and no exception in its place.

    That of a foreign teardown is Flask's to show: up to 3.1 it leaves the app, and a test client
    then has no answer.
    """
    if visit.escaped is not None and not is_foreign(visit.escaped):
        return False
    if visit.escaped is not None and visit.manner == "test client":
        return visit.status in (visit.due, None)
    return visit.due is not None and visit.status == visit.due


def is_foreign(error: BaseException) -> bool:
    """Whether an error, or each in a group of them, is another extension's."""
    return all(isinstance(part, ForeignError) for part in getattr(error, "exceptions", [error]))


def test_a_body_is_whole_or_broken(drill: Drill) -> None:
    """A stream that ends without an error has all rows, and none ends for another reason."""
    bodies = [visit for visit in drill.visits if visit.view.startswith("streams")]
    assert [visit for visit in bodies if visit.broken and not visit.is_broken_by_kill] == []
    for visit in bodies:
        read_all = visit.manner == "all" and visit.method != "HEAD" and visit.escaped is None
        if read_all and visit.due == 200 and not visit.broken:
            assert visit.received == visit.pieces


def test_what_was_committed_is_there_once(drill: Drill) -> None:
    """A reported commit is durable exactly once, any other not at all.

    Where the commit itself has raised, its connection's end may have overtaken the answer.
    """
    for key in BINDS:
        rows = drill.rows(key)
        writes = [write for unit in drill.units() for write in unit.writes if write.bind_key == key]
        wrong = [write for write in writes if rows.pop(write.mark, 0) not in write.allowed]
        assert wrong == []
        assert rows == {}


def test_what_collides_is_counted_once(drill: Drill) -> None:
    """A unit of work that was run again has changed its rows once."""
    rows = drill.rows(None)
    units = [unit for visit in drill.visits if visit.view == "collides" for unit in visit.units]
    durable = sum(rows.get(write.mark, 0) for unit in units for write in unit.writes)
    sql = f"SELECT SUM(value) FROM {drill.counter.__tablename__}"
    assert drill.databases[None].execute(sql) == [(2 * durable,)]


def test_every_leak_is_taken_back(drill: Drill) -> None:
    """What a view has kept is signalled, once each, and nothing else is."""
    leaked = drill.counts["connections leaked"]
    assert drill.counts[f"signals {signals.connection_leaked.name}"] == leaked


def test_servers_have_no_more_than_the_pools(drill: Drill) -> None:
    """On no server is there a connection that does not wait in a pool."""
    for server in drill.servers():
        idle = sum(pool.checkedin() for pool in drill.pools_of(server))
        assert idle <= POOL_SIZE * len(drill.pools_of(server))
        wait_until(
            lambda s=server, n=idle: len(drill.connections(s)) <= n,  # type: ignore[misc]
            f"{server!r} has no more than {idle} connections",
        )


def test_no_transaction_is_open(drill: Drill) -> None:
    """What waits in a pool holds no lock and no snapshot."""
    for server in drill.servers():
        wait_until(
            lambda s=server: drill.transactions(s) == 0,  # type: ignore[misc]
            f"{server!r} has no transaction",
        )


def test_chaos_has_come(drill: Drill) -> None:
    """Every view has returned and every kind of trouble has happened: the rules were tried."""
    if REQUESTS < 1000:
        pytest.skip("too few requests for every kind of trouble")
    returned = {visit.view for visit in drill.visits if visit.due == 200}
    assert returned == set(VIEWS)
    happened = {what for what, number in {**drill.counts, **figures(drill)}.items() if number}
    assert happened >= {
        "answers 200",
        "answers 404",
        "answers 500",
        "bodies broken: Trouble",
        "came out of the app: ForeignError",
        "connections killed",
        "connections leaked",
        "queries killed",
        "streams left",
        "units raised: OperationalError",
        "units raised: Trouble",
    }


def test_the_pools_serve_again(drill: Drill) -> None:
    """After all that, the apps answer; connections that are killed while idle cost nothing."""
    for number in range(20):
        if number % 5 == 0:
            for server in drill.servers():
                for connection in drill.connections(server):
                    drill.kill(server, connection)
        visit = Visit(number, drill, random.Random(number), "reads", "GET", "all", None)
        serve(drill.apps[number % 2], visit)
        assert (visit.status, visit.escaped) == (200, None)


def test_nothing_outlives_the_pools(drill: Drill) -> None:
    """When the engines are disposed of, the servers are alone."""
    drill.dispose()
    for server in drill.servers():
        wait_until(
            lambda s=server: not drill.connections(s),  # type: ignore[misc]
            f"{server!r} has no connection of the apps",
        )
