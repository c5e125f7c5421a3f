"""Pools that keep a minimum warm and let idle connections go. The servers say what is open."""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import inspect
import json
import logging
import os
import random
import subprocess
import sys
import threading
import time
import typing as t
import weakref
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.pool.base import _ConnectionRecord
from sqlalchemy.util.queue import Queue

from flask_commondb import forks
from flask_commondb import keeping

from . import kept
from .servers import wait_until

if t.TYPE_CHECKING:
    from .conftest import MakeProxy
    from .servers import Database
    from .servers import MariaDBCluster

ROOT = Path(__file__).parent.parent

#: How many checkouts each thread of the drill makes.
UNITS = int(os.environ.get("COMMONDB_TEST_UNITS", "1000")) // 4

KINDS = ["mariadb", "postgresql"]

BOTH = pytest.mark.parametrize("database", KINDS, indirect=True)
ORDERS = pytest.mark.parametrize("lifo", [False, True], ids=["fifo", "lifo"])

CONNECTIONS = {
    "mariadb": "SELECT id FROM information_schema.processlist WHERE user = 'app' AND db = %s",
    "postgresql": "SELECT pid FROM pg_stat_activity WHERE usename = 'app' AND datname = %s",
}
KILL = {"mariadb": "KILL %s", "postgresql": "SELECT pg_terminate_backend(%s)"}

Make = t.Callable[..., sa.Engine]


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Asked:
    """A database, and what its server says of the connections to it."""

    def __init__(self, kind: str, database: Database[t.Any]) -> None:
        self.kind = kind
        self.database = database
        self.url = database.primary_url
        self.server = database.cluster.primary
        self.id = sa.text(kept.ID["mysql" if kind == "mariadb" else kind])

    def ids(self) -> set[int]:
        rows = self.server.execute(CONNECTIONS[self.kind], self.database.name)
        return {number for (number,) in rows}

    def wait_for(self, count: int, timeout: float = 15) -> set[int]:
        wait_until(lambda: len(self.ids()) == count, f"there are {count} connections", timeout)
        return self.ids()

    def kill(self, *ids: int) -> None:
        for number in ids:
            self.server.execute(KILL[self.kind], number)

    def aborted(self) -> object:
        """How often a client has gone without saying so; PostgreSQL does not count that."""
        if self.kind == "postgresql":
            return None
        return self.server.execute("SHOW GLOBAL STATUS LIKE 'Aborted_clients'")

    def use(self, engine: sa.Engine, count: int = 1) -> list[int]:
        """Check out so many connections at once; the server's names for them."""
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(engine.connect()) for _ in range(count)]
            return [int(connection.scalar(self.id) or 0) for connection in connections]


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Asked:
    return Asked(request.param, request.getfixturevalue(f"{request.param}_database"))


@pytest.fixture
def mariadb_asked(mariadb_database: Database[MariaDBCluster]) -> Asked:
    return Asked("mariadb", mariadb_database)


@pytest.fixture
def make() -> t.Iterator[Make]:
    """A function that makes an engine; what is not an option of SQLAlchemy's is for ``keep()``."""
    engines: list[weakref.ref[sa.Engine]] = []

    def make(url: object, **options: t.Any) -> sa.Engine:
        names = inspect.signature(keeping.keep).parameters
        settings = {name: options.pop(name) for name in [*options] if name in names}
        if str(url).startswith("mysql"):
            options["connect_args"] = {"ssl_disabled": True, **options.get("connect_args", {})}
        engine = sa.create_engine(str(url), **options)
        forks.guard(engine, is_local=False)
        settings.setdefault("answers", engine.dialect.do_ping)
        keeping.keep(engine, **settings)
        engines.append(weakref.ref(engine))
        return engine

    yield make
    for reference in engines:
        engine = reference()
        if engine is not None:
            engine.dispose()
    del engine
    wait_until(lambda: not kept.keepers(), "the thread ends")


def pool_of(engine: sa.Engine) -> t.Any:
    return engine.pool


def idle(engine: sa.Engine) -> int:
    """How many connections wait in the pool."""
    entries = list(pool_of(engine)._pool.queue)
    return sum(entry.dbapi_connection is not None for entry in entries)


def wait_until_idle(engine: sa.Engine, count: int) -> None:
    pool = pool_of(engine)
    wait_until(
        lambda: pool.checkedout() == 0 and idle(engine) == count, f"{count} connections are idle"
    )


def tell() -> None:
    """Have the thread look at all pools, once what it does now is done."""
    for one in list(keeping._all_kept):
        keeping._keeper.tell(one)


# Only when asked for ---------------------------------------------------------------------------


def test_nothing_without_settings(make: Make, tmp_path: Path) -> None:
    """A pool that has not asked for anything has no listener, and there is no thread."""
    engine = make(f"sqlite:///{tmp_path}/app.db")
    plain = sa.create_engine("sqlite://")
    for event in ("connect", "checkin", "close", "detach"):
        own = [getattr(each.pool.dispatch, event).listeners for each in (engine, plain)]
        assert [f for f in own[0] if "keeping" in f.__module__] == []
    with engine.connect(), engine.connect():
        assert kept.keepers() == []


def test_no_thread_before_the_first_use(make: Make, tmp_path: Path) -> None:
    """The thread begins with the first connection, and is one for all pools."""
    engines = [make(f"sqlite:///{tmp_path}/{n}.db", min_size=2, max_idle=60) for n in range(3)]
    assert kept.keepers() == []
    for engine in engines:
        with engine.connect():
            pass
        assert len(kept.keepers()) == 1
    for engine in engines:
        wait_until_idle(engine, 2)
    assert kept.keepers()[0].daemon


@pytest.mark.parametrize("pool", [sa.NullPool, sa.StaticPool], ids=lambda pool: pool.__name__)
def test_other_pools_are_left_alone(make: Make, tmp_path: Path, pool: type[sa.Pool]) -> None:
    """A pool that keeps no idle connections, or one for ever, is as it was."""
    engine = make(f"sqlite:///{tmp_path}/app.db", min_size=2, max_idle=0.01, poolclass=pool)
    with engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1
    assert kept.keepers() == []
    engine.dispose()


def test_thread_ends_with_the_engines(make: Make, tmp_path: Path) -> None:
    """Neither the thread nor anything else keeps an engine alive; without engines it ends."""
    engines = [make(f"sqlite:///{tmp_path}/{n}.db", min_size=2) for n in range(2)]
    pools = []
    for engine in engines:
        with engine.connect():
            pass
        pools.append(weakref.ref(engine.pool))
        wait_until_idle(engine, 2)
    time.sleep(0.2)  # until the thread sleeps
    del engine
    engines.clear()
    gc.collect()
    assert [pool() for pool in pools] == [None, None]
    wait_until(lambda: not kept.keepers(), "the thread ends", timeout=5)


def test_thread_ends_with_the_last_idle_connection(make: Make, tmp_path: Path) -> None:
    """When all connections were idle for too long there is nothing to do, until the next use."""
    engine = make(f"sqlite:///{tmp_path}/app.db", max_idle=0.1)
    for _ in range(2):
        with engine.connect():
            assert len(kept.keepers()) == 1
        wait_until(lambda: pool_of(engine).checkedin() == 0, "the connection is closed")
        wait_until(lambda: not kept.keepers(), "the thread ends")


def test_thread_sleeps(make: Make, tmp_path: Path) -> None:
    """While nothing is due, the thread does not even look."""
    clock = Counting()
    engine = make(f"sqlite:///{tmp_path}/app.db", min_size=2, max_idle=60, clock=clock)
    with engine.connect():
        pass
    wait_until_idle(engine, 2)
    time.sleep(0.3)
    looks = clock.looks
    time.sleep(0.5)
    assert clock.looks == looks


class Counting:
    """A clock that counts how often it was looked at."""

    looks = 0

    def __call__(self) -> float:
        self.looks += 1
        return time.monotonic()


# Idle for too long -----------------------------------------------------------------------------


@BOTH
@ORDERS
def test_idle_connections_go(database: Asked, make: Make, lifo: bool) -> None:
    """What is idle for too long is closed without any traffic, down to the minimum, properly."""
    aborted = database.aborted()
    engine = make(database.url, pool_use_lifo=lifo, min_size=2, max_idle=0.3, pool_size=5)
    used = database.use(engine, 5)
    assert database.ids() == set(used)
    left = database.wait_for(2)
    assert left == set(used[:2])  # given back last
    time.sleep(0.7)
    assert database.ids() == left
    assert pool_of(engine).checkedin() == 2
    assert pool_of(engine).checkedout() == 0
    assert set(database.use(engine, 2)) == left
    assert database.aborted() == aborted


def test_the_server_is_told(mariadb_asked: Asked, make: Make, proxy: MakeProxy) -> None:
    """An idle connection says farewell."""
    link = proxy(mariadb_asked.server.port)
    url = sa.make_url(mariadb_asked.url).set(port=link.port)
    engine = make(url.render_as_string(hide_password=False), max_idle=0.1)
    mariadb_asked.use(engine)
    link.clear()
    link.wait_for("QUIT")
    assert [command.name for command in link.commands] == ["QUIT"]
    mariadb_asked.wait_for(0)


@ORDERS
def test_only_the_idle_ones_go(make: Make, tmp_path: Path, lifo: bool) -> None:
    """A connection goes when nobody has used it for so long; one that is out never does."""
    clock = Clock()
    url = f"sqlite:///{tmp_path}/app.db"
    engine = make(url, pool_use_lifo=lifo, max_idle=60, min_size=1, clock=clock)
    out, first, second = (engine.raw_connection() for _ in range(3))
    drivers = [proxy.dbapi_connection for proxy in (out, first, second)]
    first.close()
    clock.now += 40
    second.close()
    clock.now += 19
    tell()
    time.sleep(0.3)
    assert pool_of(engine).checkedin() == 2
    clock.now += 1
    tell()
    wait_until(lambda: pool_of(engine).checkedin() == 1, "the first is closed")
    with contextlib.closing(engine.raw_connection()) as connection:
        assert connection.dbapi_connection is drivers[2]
    clock.now += 1000
    tell()
    wait_until(lambda: pool_of(engine).checkedin() == 0, "the second is closed")
    assert out.dbapi_connection is drivers[0]
    out.close()
    clock.now += 1000
    tell()
    time.sleep(0.3)
    assert pool_of(engine).checkedin() == 1  # the minimum


def test_whoever_waits_gets_the_place(make: Make, tmp_path: Path) -> None:
    """The place of a connection that is being closed goes to who waits for one, and at once."""
    closing, waiting = threading.Event(), threading.Event()
    clock = Clock()
    engine = make(
        f"sqlite:///{tmp_path}/app.db",
        **{"max_idle": 60, "clock": clock, "pool_size": 1, "max_overflow": 0, "pool_timeout": 60},
    )

    @sa.event.listens_for(engine, "close")
    def close(*event: object) -> None:
        closing.set()
        assert waiting.wait(10)

    with engine.connect():
        pass
    clock.now += 60
    tell()
    assert closing.wait(10)
    asking = threading.Thread(target=lambda: engine.connect().close())
    asking.start()
    wait_until(lambda: pool_of(engine)._pool.not_empty._waiters, "somebody waits")
    waiting.set()
    asking.join(20)
    assert not asking.is_alive()
    assert (pool_of(engine).checkedin(), pool_of(engine).overflow()) == (1, 0)


@pytest.mark.parametrize("moment", ["_close_idle", "_take_next"])
def test_a_request_is_faster(make: Make, tmp_path: Path, moment: str) -> None:
    """A connection that somebody takes at the last moment is neither closed nor pinged."""
    now = [0.0]
    taken: list[t.Any] = []
    pinged: list[object] = []
    settings: dict[str, t.Any] = {"keepalive": 60, "min_size": 1}
    if moment == "_close_idle":
        settings = {"max_idle": 60}

    def clock() -> float:
        # It is looked at between a look at the pool and what is done then.
        if now[0] >= 60 and not taken and sys._getframe(1).f_code.co_name == moment:
            taken.append(None)
            taken.append(engine.connect())
        return now[0]

    def answers(connection: object) -> bool:
        pinged.append(connection)
        return True

    url = f"sqlite:///{tmp_path}/app.db"
    engine = make(url, clock=clock, answers=answers, **settings)
    with engine.connect() as connection:
        driver = connection.connection.dbapi_connection
    wait_until_idle(engine, 1)
    now[0] = 60
    tell()
    wait_until(lambda: len(taken) == 2, "it is taken")
    time.sleep(0.3)
    assert taken[1].connection.dbapi_connection is driver
    assert taken[1].scalar(sa.text("SELECT 1")) == 1
    assert pinged == []
    taken[1].close()


def test_listener_that_raises(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A listener of the user's that fails costs neither the place nor the thread."""
    engine = make(f"sqlite:///{tmp_path}/app.db", max_idle=0.1, pool_size=1, max_overflow=0)
    raised: list[bool] = []

    @sa.event.listens_for(engine, "close")
    def close(*event: object) -> None:
        if not raised:
            raised.append(True)
            raise LookupError("of the user's listener")

    for _ in range(2):
        with engine.connect():
            pass
        wait_until(lambda: not pool_of(engine)._pool.queue or idle(engine) == 0, "it is closed")
    assert raised == [True]
    (record,) = caplog.records
    assert "sqlite cannot be looked after (LookupError)" in record.getMessage()


# The minimum -----------------------------------------------------------------------------------


@BOTH
def test_filled_at_first_use(database: Asked, make: Make) -> None:
    """One connection is used, and there are as many as are to be; the others are used next."""
    engine = make(database.url, min_size=3)
    time.sleep(0.2)
    assert database.ids() == set()
    database.use(engine)
    ids = database.wait_for(3)
    wait_until_idle(engine, 3)
    assert set(database.use(engine, 3)) == ids


def test_never_more_than_the_size(mariadb_asked: Asked, make: Make) -> None:
    """A minimum above the pool's size is the pool's size; without a size it is the minimum."""
    small = make(mariadb_asked.url, min_size=5, pool_size=2, max_overflow=3)
    mariadb_asked.use(small)
    mariadb_asked.wait_for(2)
    time.sleep(0.3)
    assert len(mariadb_asked.ids()) == 2
    small.dispose()
    unlimited = make(mariadb_asked.url, min_size=3, max_idle=0.1, pool_size=0)
    mariadb_asked.use(unlimited, 6)
    mariadb_asked.wait_for(3)
    mariadb_asked.use(unlimited, 6)
    mariadb_asked.wait_for(3)
    wait_until_idle(unlimited, 3)


def test_what_is_out_counts(mariadb_asked: Asked, make: Make) -> None:
    """Connections that are in use are part of the minimum."""
    engine = make(mariadb_asked.url, min_size=3)
    with engine.connect(), engine.connect(), engine.connect(), engine.connect():
        time.sleep(0.3)
        assert len(mariadb_asked.ids()) == 4


def test_made_through_the_pool(mariadb_asked: Asked, make: Make) -> None:
    """Connections of the thread have what all have: SQLAlchemy's own set-up and listeners."""
    engine = make(mariadb_asked.url, min_size=3, isolation_level="READ UNCOMMITTED")
    threads = collections.Counter[str]()

    @sa.event.listens_for(engine, "connect")
    def connect(dbapi_connection: t.Any, entry: object) -> None:
        threads[threading.current_thread().name] += 1
        with dbapi_connection.cursor() as cursor:
            cursor.execute("SET @made = 'so'")

    mariadb_asked.use(engine)
    wait_until_idle(engine, 3)
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(engine.connect())
            made = connection.scalar(sa.text("SELECT CONCAT(@made, ' ', @@tx_isolation)"))
            assert made == "so READ-UNCOMMITTED"
    assert sorted(threads.values()) == [1, 2]
    assert threads["commondb-keeper"] == 2


@BOTH
@ORDERS
def test_killed(database: Asked, make: Make, lifo: bool) -> None:
    """Idle connections that the server has closed are found without any request, and replaced."""
    engine = make(database.url, min_size=3, keepalive=0.2, pool_use_lifo=lifo)
    database.use(engine)
    ids = database.wait_for(3)
    wait_until_idle(engine, 3)
    database.kill(*sorted(ids)[:2])
    wait_until(lambda: len(database.ids() - ids) == 2, "the killed ones are replaced")
    wait_until(lambda: pool_of(engine).checkedin() == 3, "they are in the pool")
    assert set(database.use(engine, 3)) == database.ids()
    assert len(database.ids()) == 3


@BOTH
def test_lost_by_its_user(database: Asked, make: Make) -> None:
    """What users invalidate or take out of the pool is replaced at once."""
    engine = make(database.url, min_size=2)
    database.use(engine)
    before = database.wait_for(2)
    time.sleep(0.2)  # until the thread sleeps
    with engine.connect() as connection:
        connection.invalidate()
    wait_until(lambda: len(database.ids()) == 2, "there are two again")
    wait_until_idle(engine, 2)
    assert len(database.ids() & before) == 1
    time.sleep(0.2)
    with engine.connect() as connection:
        connection.detach()
        wait_until(lambda: len(database.ids()) == 3, "there are two again, and the detached one")
    database.wait_for(2)


def test_all_that_are_bad_are_replaced(mariadb_asked: Asked, make: Make) -> None:
    """When SQLAlchemy declares all idle connections bad, no request has to renew them."""
    engine = make(mariadb_asked.url, min_size=3, pool_pre_ping=True)
    mariadb_asked.use(engine)
    ids = mariadb_asked.wait_for(3)
    wait_until_idle(engine, 3)
    time.sleep(0.1)  # SQLAlchemy compares times
    mariadb_asked.kill(*ids)
    mariadb_asked.use(engine)
    wait_until(lambda: len(mariadb_asked.ids() - ids) == 3, "all are replaced")
    wait_until(lambda: idle(engine) == 3, "they are in the pool")


@BOTH
def test_restarted_server(database: Asked, make: Make) -> None:
    """After a restart of the server the pool fills up by itself."""
    engine = make(database.url, min_size=3, keepalive=0.2)
    database.use(engine)
    before = database.wait_for(3)
    database.server.restart()
    wait_until(lambda: pool_of(engine).checkedin() == 3 == len(database.ids()), "it is full")
    assert set(database.use(engine, 3)) == database.ids()
    assert pool_of(engine).overflow() == 3 - pool_of(engine).size()
    del before


@BOTH
def test_server_down_and_up(
    database: Asked,
    make: Make,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An outage is one warning without secrets and few attempts; its end is noticed."""
    caplog.set_level(logging.DEBUG, "flask_commondb")
    monkeypatch.setattr(keeping, "_RETRY", (0.1, 0.4))
    url = sa.make_url(database.url)
    asked: list[str] = []
    engine = make(
        url.set(username="app").render_as_string(hide_password=False), min_size=2, keepalive=0.1
    )

    @sa.event.listens_for(engine, "do_connect")
    def connecting(*event: object) -> None:
        asked.append(threading.current_thread().name)

    database.use(engine)
    database.wait_for(2)
    asked.clear()
    database.server.stop()
    wait_until(lambda: len(asked) >= 4, "the thread has tried some times")
    tries = len(asked)
    time.sleep(1)
    assert 1 <= len(asked) - tries <= 8
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert f"127.0.0.1:{database.server.port}" in warning.getMessage()
    database.server.start()
    database.wait_for(2)
    wait_until(lambda: len(caplog.records) == 2, "the end is noticed")
    assert "looked after again" in caplog.records[1].getMessage()
    assert "app" not in caplog.text
    assert set(database.use(engine, 2)) == database.ids()
    assert set(asked) == {"commondb-keeper"}


def test_password_that_is_wrong(
    mariadb_asked: Asked, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that refuses us is an outage too; neither user nor password is told."""
    caplog.set_level(logging.DEBUG, "flask_commondb")
    engine = make(mariadb_asked.url, min_size=2)
    with engine.connect():

        @sa.event.listens_for(engine, "do_connect")
        def connecting(
            dialect: object, entry: object, arguments: object, options: dict[str, t.Any]
        ) -> None:
            options["password"] = "s3cret"

        wait_until(lambda: caplog.records, "it is refused")
    (record,) = caplog.records
    assert f"{mariadb_asked.server.port} cannot be looked after (OperationalError 1045)" in (
        record.getMessage()
    )
    assert "s3cret" not in caplog.text
    assert "app" not in caplog.text


def test_a_user_ends_the_outage(
    mariadb_asked: Asked, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that reaches the server has the pool filled at once, however long the pause."""
    monkeypatch.setattr(keeping, "_RETRY", (3600.0, 3600.0))
    engine = make(mariadb_asked.url, min_size=3, keepalive=0.1)
    mariadb_asked.use(engine)
    mariadb_asked.wait_for(3)
    mariadb_asked.server.stop()
    wait_until(lambda: idle(engine) < 3, "the outage is noticed")
    mariadb_asked.server.start()
    time.sleep(0.3)
    assert len(mariadb_asked.ids()) == 0
    while not mariadb_asked.ids():
        with contextlib.suppress(sa.exc.DBAPIError):
            mariadb_asked.use(engine)
    mariadb_asked.wait_for(3)


def test_pauses_grow(make: Make, tmp_path: Path) -> None:
    """The pauses of an outage grow up to a limit, differ, and take any number of failures."""
    engine = make(f"sqlite:///{tmp_path}/app.db", min_size=1, clock=(clock := Clock()))
    (one,) = [one for one in keeping._all_kept if one._engine() is engine]
    pauses = []
    for _ in range(2000):
        one._report_failure(engine, OSError("down"))
        pauses.append(one.retry_at - clock.now)
    first, longest = keeping._RETRY
    for number, pause in enumerate(pauses):
        usual = min(first * 2 ** min(number, 20), longest)
        assert usual / 2 <= pause <= usual
    assert len(set(pauses)) > 1900


@ORDERS
def test_empty_places_go(make: Make, tmp_path: Path, lifo: bool) -> None:
    """A place whose connection was lost does not make a request connect while others are warm."""
    engine = make(f"sqlite:///{tmp_path}/app.db", min_size=2, pool_use_lifo=lifo)
    connections = [engine.connect() for _ in range(4)]
    for connection in connections[:2]:
        connection.close()
    for connection in connections[2:]:
        connection.invalidate()
        connection.close()
    wait_until(lambda: pool_of(engine).checkedin() == 2, "the empty places are gone")
    assert idle(engine) == 2
    assert pool_of(engine).overflow() == 2 - 5


# Warm is usable ---------------------------------------------------------------------------------


@BOTH
def test_renewed_in_the_background(database: Asked, make: Make) -> None:
    """Before a connection is too old the thread replaces it; a request never has to."""
    engine = make(database.url, min_size=3, pool_recycle=2)
    aborted = database.aborted()
    database.use(engine)
    first = database.wait_for(3)
    threads: list[str] = []

    @sa.event.listens_for(engine, "connect")
    def connect(*event: object) -> None:
        threads.append(threading.current_thread().name)

    wait_until(lambda: not database.ids() & first, "all are replaced")
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        database.use(engine)
        time.sleep(0.01)
    assert len(threads) >= 3
    assert set(threads) == {"commondb-keeper"}
    assert database.aborted() == aborted


def test_renewed_that_was_out(make: Make, tmp_path: Path) -> None:
    """A connection that is out when the pool is looked at is renewed in time, too."""
    engine = make(f"sqlite:///{tmp_path}/app.db", min_size=1, pool_recycle=2)
    with engine.connect() as connection:
        driver = connection.connection.dbapi_connection
        time.sleep(0.3)
    wait_until(lambda: queue_of(engine) not in ([], [id(driver)]), "it is renewed")


def test_to_be_renewed_is_no_use(make: Make, tmp_path: Path) -> None:
    """A younger connection stands where the one stood that it replaces."""
    clock = Clock()
    url = f"sqlite:///{tmp_path}/app.db"
    engine = make(url, min_size=2, keepalive=1000, pool_recycle=100, clock=clock)
    with engine.connect():
        pass
    wait_until_idle(engine, 2)
    clock.now += 50
    with engine.connect() as connection:
        connection.invalidate()
    wait_until_idle(engine, 2)
    old, young = queue_of(engine)
    clock.now += 45
    tell()
    wait_until(lambda: old not in queue_of(engine), "the old one is renewed")
    wait_until_idle(engine, 2)
    assert queue_of(engine)[1] == young


def test_wait_timeout(mariadb_asked: Asked, make: Make) -> None:
    """The server's own limit does not close what is kept, only what is more than that."""
    server = mariadb_asked.server
    server.execute("SET GLOBAL wait_timeout = 2")  # undone by the cluster's repair
    engine = make(mariadb_asked.url, min_size=2, keepalive=0.3, pool_use_lifo=True)
    used = mariadb_asked.use(engine, 4)
    left = mariadb_asked.wait_for(2)
    time.sleep(3)
    assert mariadb_asked.ids() == left
    assert left <= set(used)
    assert set(mariadb_asked.use(engine, 2)) == left


@pytest.mark.parametrize("lifo", [False, True], ids=["fifo", "lifo"])
def test_a_ping_is_no_use(mariadb_asked: Asked, make: Make, proxy: MakeProxy, lifo: bool) -> None:
    """A ping is one command; it changes neither the order of connections nor their idle time."""
    link = proxy(mariadb_asked.server.port)
    url = sa.make_url(mariadb_asked.url).set(port=link.port)
    engine = make(
        url.render_as_string(hide_password=False),
        **{"min_size": 3, "keepalive": 0.2, "pool_use_lifo": lifo, "max_idle": 1.0},
    )
    mariadb_asked.use(engine, 4)
    order = queue_of(engine)
    assert len(order) == 4
    link.clear()
    link.wait_for("PING")
    wait_until(lambda: len(link.commands) >= 20, "all are pinged several times")
    assert len(mariadb_asked.wait_for(3)) == 3
    wait_until(lambda: len(queue_of(engine)) == 3, "the connection is closed")
    assert queue_of(engine) == order[1:]
    names = {command.name for command in link.commands}
    assert names == {"PING", "QUERY", "QUIT"}
    # PyMySQL itself sends a ROLLBACK; our connection class does not.
    assert {command.sql for command in link.commands if command.sql} == {"ROLLBACK"}


def queue_of(engine: sa.Engine) -> list[int]:
    """The connections that are idle, in the order of the pool; none is out for a ping."""
    pool = pool_of(engine)
    while True:
        with pool._pool.mutex:
            if pool.checkedout() == 0:
                return [id(entry.dbapi_connection) for entry in pool._pool.queue]


def test_postgresql_is_not_left_in_a_transaction(
    postgresql_database: Database[t.Any], make: Make
) -> None:
    """Whatever a ping begins is over when the connection is idle again."""
    asked = Asked("postgresql", postgresql_database)

    def answers(connection: t.Any) -> bool:
        connection.execute("SELECT 1")  # begins a transaction
        return True

    engine = make(asked.url, min_size=1, keepalive=0.1, answers=answers)
    asked.use(engine)
    states = collections.Counter[str]()
    for _ in range(50):
        rows = asked.server.execute(
            "SELECT state FROM pg_stat_activity WHERE usename = 'app' AND datname = %s"
            " AND state_change < clock_timestamp() - interval '50 ms'",
            postgresql_database.name,
        )
        states.update(state for (state,) in rows)
        time.sleep(0.01)
    assert set(states) == {"idle"}


# Engines come and go ----------------------------------------------------------------------------


@BOTH
def test_disposed(database: Asked, make: Make) -> None:
    """An engine that was disposed of has no connection and no thread, until it is used again."""
    aborted = database.aborted()
    engine = make(database.url, min_size=3, max_idle=60)
    for _ in range(3):
        database.use(engine)
        database.wait_for(3)
        engine.dispose()
        database.wait_for(0)
        wait_until(lambda: not kept.keepers(), "the thread ends")
        assert database.ids() == set()
    assert database.aborted() == aborted


@BOTH
def test_disposed_at_any_moment(database: Asked, make: Make) -> None:
    """Nothing that is opened while the engine is disposed of stays open, or is dropped."""
    aborted = database.aborted()
    engine = make(database.url, min_size=4)
    for number in range(40):
        database.use(engine)
        time.sleep(0.04 + number / 1000)  # the thread begins to open after 50 ms
        engine.dispose()
    database.wait_for(0)
    wait_until(lambda: not kept.keepers(), "the thread ends")
    assert database.ids() == set()
    assert database.aborted() == aborted


def test_disposed_while_it_is_used(mariadb_asked: Asked, make: Make) -> None:
    """The pool after the one that was disposed of is kept as that was."""
    engine = make(mariadb_asked.url, min_size=3)
    mariadb_asked.use(engine)
    before = mariadb_asked.wait_for(3)
    with engine.connect():
        engine.dispose()
        mariadb_asked.use(engine)
        mariadb_asked.wait_for(4)  # three of the new pool, and ours
    wait_until(lambda: pool_of(engine).checkedin() == 3, "the new pool is filled")
    assert not set(mariadb_asked.use(engine, 3)) & before


@pytest.mark.parametrize("kind", KINDS)
def test_forked(request: pytest.FixtureRequest, kind: str) -> None:
    """A child has a thread and connections of its own, whatever lock was held; ours stay."""
    asked = Asked(kind, request.getfixturevalue(f"{kind}_database"))
    found, said = run("forks", asked.url)
    assert found == {"children": [0, 0, 0], "same": True}
    assert said == ""


@pytest.mark.parametrize("kind", KINDS)
def test_end_of_a_program(request: pytest.FixtureRequest, kind: str) -> None:
    """A program ends as before, without a word, while its pools are looked after."""
    asked = Asked(kind, request.getfixturevalue(f"{kind}_database"))
    found, said = run("ends", asked.url)
    assert (found, said) == ({}, "")
    asked.wait_for(0)


def test_first_use_at_the_end(tmp_path: Path) -> None:
    """A program that uses a pool for the first time when it ends, and can have no thread, works."""
    assert run("late", f"sqlite:///{tmp_path}/app.db") == ({}, "")


def run(*arguments: str) -> tuple[object, str]:
    """What `tests/kept.py` has found, and what else it has said."""
    # Python warns of each fork beside threads.
    ignored = ["-W", "ignore::DeprecationWarning"]
    process = subprocess.run(
        [sys.executable, *ignored, "-m", "tests.kept", *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout), process.stderr


# All at once ------------------------------------------------------------------------------------

SIZE, OVERFLOW = 8, 4


class Tally:
    """How many connections of a pool are open on this side, and the most there were."""

    def __init__(self, engine: sa.Engine) -> None:
        self.open: set[object] = set()
        self.most = 0
        self.closed_by_thread = 0
        self.opened_by_thread = 0
        self._lock = threading.Lock()
        sa.event.listen(engine, "connect", self.connect)
        sa.event.listen(engine, "close", self.close)

    def connect(self, dbapi_connection: object, entry: object) -> None:
        with self._lock:
            self.open.add(dbapi_connection)
            self.most = max(self.most, len(self.open))
            self.opened_by_thread += is_keeper()

    def close(self, dbapi_connection: object, entry: object) -> None:
        with self._lock:
            self.open.discard(dbapi_connection)
            self.closed_by_thread += is_keeper()


def is_keeper() -> bool:
    return threading.current_thread().name == "commondb-keeper"


@ORDERS
def test_drill(
    mariadb_asked: Asked, make: Make, monkeypatch: pytest.MonkeyPatch, lifo: bool
) -> None:
    """Sixteen threads take and give while the keeper opens and closes: no place and no connection
    is lost, none is handed out closed, and there are never too many."""
    monkeypatch.setattr(keeping, "_SOON", 0.0005)
    engine = make(
        mariadb_asked.url,
        **{"min_size": 4, "max_idle": 0.002, "keepalive": 0.004, "pool_use_lifo": lifo},
        **{"pool_size": SIZE, "max_overflow": OVERFLOW, "pool_timeout": 30},
    )
    tally = Tally(engine)
    failures: list[BaseException] = []
    most = 0
    over = threading.Event()
    together = threading.Barrier(16, timeout=60)

    def work(number: int) -> None:
        chance = random.Random(number)
        try:
            for unit in range(UNITS):
                with engine.connect() as connection:
                    assert connection.scalar(sa.text("SELECT 1")) == 1
                    if chance.random() < (0.5 if unit % 25 == 24 else 0.02):
                        connection.invalidate()
                if chance.random() < 0.3:
                    time.sleep(chance.random() / 50)
                if unit % 25 == 24:  # all rest, so that the keeper has something to do
                    together.wait()
                    time.sleep(0.02)
        except BaseException as error:
            failures.append(error)
            together.abort()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.01):
            # Those that are here twice: one that is closed on this side takes a moment to go.
            here = mariadb_asked.ids()
            most = max(most, len(here & mariadb_asked.ids()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    watching = threading.Thread(target=watch)
    for thread in (*threads, watching):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    watching.join()
    assert failures == []
    assert tally.most <= SIZE + OVERFLOW
    assert 4 <= most <= SIZE + OVERFLOW
    assert tally.closed_by_thread > 10
    assert tally.opened_by_thread > 10
    monkeypatch.undo()
    pool = pool_of(engine)
    wait_until(lambda: pool.checkedin() == 4 and pool.checkedout() == 0, "the minimum is left")
    assert pool.overflow() == 4 - SIZE
    assert len(mariadb_asked.wait_for(4)) == len(tally.open) == 4
    # Every place can be had.
    pool._timeout = 0.1
    with contextlib.ExitStack() as stack:
        for _ in range(SIZE + OVERFLOW):
            stack.enter_context(engine.connect())
        with pytest.raises(sa.exc.TimeoutError, match="limit of size 8 overflow 4"):
            engine.connect()


# What is used of SQLAlchemy ---------------------------------------------------------------------


@ORDERS
def test_contract_of_the_pool(tmp_path: Path, lifo: bool) -> None:
    """A QueuePool has a queue with a mutex, which counts and orders entries as we think."""
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db", pool_use_lifo=lifo, pool_recycle=7)
    pool = pool_of(engine)
    assert isinstance(pool._pool, Queue)
    assert isinstance(pool._pool.queue, collections.deque)
    assert pool._pool.use_lifo is lifo
    assert isinstance(pool._pool.not_empty, threading.Condition)
    assert pool._recycle == 7
    with pool._pool.mutex:
        assert pool._pool.mutex.acquire(blocking=False)  # by its holder, again
        pool._pool.mutex.release()
        assert pool.checkedout() == 0
    first, second = engine.raw_connection(), engine.raw_connection()
    drivers = [first.dbapi_connection, second.dbapi_connection]
    assert (pool.checkedout(), pool.checkedin(), pool.overflow()) == (2, 0, -3)
    first.close()
    second.close()
    assert [entry.dbapi_connection for entry in pool._pool.queue] == drivers
    assert not pool._pool.full()
    with contextlib.closing(engine.raw_connection()) as next_one:
        assert next_one.dbapi_connection is drivers[-1 if lifo else 0]
    # An entry more, and one less.
    assert pool._inc_overflow()
    assert pool.overflow() == -2
    assert pool._dec_overflow()
    assert pool.overflow() == -3
    engine.dispose()


def test_contract_of_an_entry(tmp_path: Path) -> None:
    """An entry is made without a connection, and connects when it is asked for one."""
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db")
    events: list[str] = []
    for name in ("connect", "close", "checkin"):
        sa.event.listen(engine, name, functools.partial(note, events, name))
    entry: t.Any = _ConnectionRecord(engine.pool, connect=False)
    assert entry.dbapi_connection is None
    assert entry._is_hard_or_soft_invalidated()
    entry.info["old"] = True
    assert entry.get_connection() is entry.dbapi_connection
    assert events == ["connect"]
    assert entry.info == {}
    assert not entry._is_hard_or_soft_invalidated()
    entry.close()
    entry.close()
    assert events == ["connect", "close"]
    assert entry.dbapi_connection is None
    entry.get_connection()
    time.sleep(0.02)  # times are compared
    entry.invalidate(soft=True)
    assert entry.driver_connection is not None
    assert entry._is_hard_or_soft_invalidated()
    entry.close()


def note(events: list[str], name: str, *event: object) -> None:
    events.append(name)


def test_contract_of_dispose(tmp_path: Path) -> None:
    """``dispose()`` empties the pool, puts one with its listeners in its place, and tells."""
    engine = sa.create_engine(f"sqlite:///{tmp_path}/app.db")
    before = engine.pool
    seen: list[tuple[str, bool]] = []

    @sa.event.listens_for(engine, "close")
    def close(*event: object) -> None:
        seen.append(("close", engine.pool is before))

    @sa.event.listens_for(engine, "engine_disposed")
    def disposed(engine: sa.Engine) -> None:
        seen.append(("disposed", engine.pool is before))

    for _ in range(2):
        with engine.connect():
            pass
        engine.dispose()
        before = engine.pool
    assert [name for name, _ in seen] == ["close", "disposed"] * 2
    assert seen[1] == ("disposed", False)
    before.dispose()  # may be called again
