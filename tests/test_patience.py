"""A server that says nothing: the dead are found out, the slow are waited for."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import struct
import threading
import time
import typing as t
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from flask_commondb import patience
from flask_commondb import pools
from flask_commondb.dialects import Limits
from flask_commondb.dialects import dialect_for
from flask_commondb.options import PoolSettings
from flask_commondb.patience import Patience

from .drivers import DRIVERS
from .drivers import skip_or_fail
from .servers import wait_until

if t.TYPE_CHECKING:
    import collections.abc as c

    from .conftest import MakeProxy

#: Linux's, which Python does not know.
SO_ATTACH_FILTER = 26

SLEEP = {"mysql": "SELECT SLEEP({})", "postgresql": "SELECT pg_sleep({})"}
NUMBER = {"mysql": "SELECT CONNECTION_ID()", "postgresql": "SELECT pg_backend_pid()"}
STOP = {"mysql": "KILL QUERY {}", "postgresql": "SELECT pg_cancel_backend({})"}
MANY = {
    "mysql": "SELECT seq, REPEAT('x', 1000) FROM seq_1_to_20000",
    "postgresql": "SELECT n, repeat('x', 1000) FROM generate_series(1, 20000) n",
}

#: What a driver says of a connection that is lost.
LOST = r"Lost connection|connection is lost"

#: And of one that the kernel has given up.
NOT_ANSWERED = r"Lost connection|timed out|server closed the connection"


class Replica:
    """A replica's engine, as the package prepares it, behind a proxy.

    :param driver: a key of :data:`DRIVERS`.
    :param arguments: for ``create_engine()``.
    """

    def __init__(self, request: pytest.FixtureRequest, driver: str, **arguments: t.Any) -> None:
        name, fixture = DRIVERS[driver]
        try:
            sa.make_url(f"{name}://").get_dialect().import_dbapi()
        except ImportError as error:
            skip_or_fail(str(error))
        self.driver = driver
        self.family = name.partition("+")[0]
        self.database = request.getfixturevalue(fixture)
        self.server = self.database.cluster.replicas[0]
        make_proxy: MakeProxy = request.getfixturevalue("proxy")
        self.proxy = make_proxy(self.server.port, *((None,) if self.family != "mysql" else ()))
        self.name = name
        #: How long the server may work on the next statement.
        self.limits: Limits | None = None
        #: One entry for each time that the server was found dead.
        self.deaths: list[float] = []
        self.engine = self.make_engine(self.proxy.port, **arguments)

    def make_engine(self, port: int, **arguments: t.Any) -> sa.Engine:
        url = sa.make_url(self.database.replica_urls[0]).set(
            drivername=self.name, host="127.0.0.1", port=port
        )
        engine = sa.create_engine(
            url, isolation_level=pools.REPLICA_ISOLATION, pool_size=20, **arguments
        )
        pools.prepare_replica(
            engine,
            PoolSettings(),
            None,
            lambda: self.limits,
            on_dead=lambda: self.deaths.append(time.monotonic()),
        )
        return engine

    def warm_up(self, connections: int = 1) -> int:
        """Have idle connections; returns how many the proxy has seen."""
        self.database.sync()
        for connection in [self.engine.connect() for _ in range(connections)]:
            connection.close()
        return self.proxy.accepted

    def sleep(self, seconds: float) -> t.Any:
        return self.ask(SLEEP[self.family].format(seconds))

    def ask(self, statement: str) -> t.Any:
        with self.engine.connect() as connection:
            return connection.scalar(sa.text(statement))

    @property
    def knocks(self) -> int:
        """How many connections a knock that was answered makes: a MySQL counts what is not."""
        return 2 if self.family == "mysql" else 1


MakeReplica: t.TypeAlias = "c.Callable[..., Replica]"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE", 0.2)
    monkeypatch.setattr(patience, "KNOCK_LIMIT", 0.4)
    monkeypatch.setattr(patience, "PAUSES", (0.2, 0.4))


@pytest.fixture(params=DRIVERS)
def make_replica(request: pytest.FixtureRequest) -> c.Iterator[MakeReplica]:
    """A function that makes the engine, once for each driver."""
    made: list[Replica] = []

    def make(**arguments: t.Any) -> Replica:
        made.append(Replica(request, request.param, **arguments))
        return made[-1]

    yield make
    for replica in made:
        replica.engine.dispose()


@pytest.fixture
def replica(make_replica: MakeReplica) -> Replica:
    return make_replica()


# The dead -------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["frozen", "black hole", "gone without a word"])
def test_dead(replica: Replica, trouble: str) -> None:
    """A server that says nothing to a statement, nor to a knock, is a lost connection."""
    before = replica.warm_up()
    with replica.engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT 1")) == 1
        if trouble == "frozen":
            replica.server.freeze()
        elif trouble == "black hole":
            replica.proxy.stall()
        else:
            replica.proxy.lose()
            replica.proxy.refuse()
        with pytest.raises(sa.exc.OperationalError, match=LOST) as caught:
            connection.execute(sa.text("SELECT 2"))
        assert caught.value.connection_invalidated
    assert len(replica.deaths) == 1
    assert replica.proxy.accepted - before <= 1
    if trouble == "frozen":
        replica.server.thaw()
    elif trouble == "black hole":
        replica.proxy.resume()
    else:
        replica.proxy.accept()
    assert replica.ask("SELECT 3") == 3
    assert len(replica.deaths) == 1


@pytest.mark.parametrize("moment", ["before it was sent", "while it is at work"])
def test_lost(replica: Replica, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Where this connection alone is lost, the server answers a knock; the kernel finds it out."""
    keepalive = {"TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 1, "TCP_USER_TIMEOUT": 500}
    assert keepalive.keys() == patience._KEEPALIVE.keys()
    monkeypatch.setattr(patience, "_KEEPALIVE", keepalive)
    replica.warm_up()
    with replica.engine.connect() as connection:
        link = socket.socket(
            fileno=os.dup(t.cast(t.Any, connection.connection.dbapi_connection).fileno())
        )
        if moment == "while it is at work":
            threading.Timer(0.1, lose, [link]).start()
        else:
            lose(link)
        with pytest.raises(sa.exc.OperationalError, match=NOT_ANSWERED) as caught:
            connection.execute(sa.text(SLEEP[replica.family].format(2.0)))
        assert caught.value.connection_invalidated
        link.close()
    assert replica.deaths == []
    assert replica.ask("SELECT 1") == 1


def test_first_statement(replica: Replica) -> None:
    """What waits on a connection that has just left its pool is not repeated on a new one."""
    before = replica.warm_up()
    replica.server.freeze()
    with pytest.raises(sa.exc.OperationalError, match=LOST):
        replica.ask("SELECT 1")
    assert replica.proxy.accepted == before + 1


def test_many_wait(replica: Replica) -> None:
    """Those who wait for the same server share one knock, and its verdict."""
    before = replica.warm_up(6)
    replica.server.freeze()
    with ThreadPoolExecutor(6) as executor:
        jobs = [executor.submit(replica.ask, "SELECT 1") for _ in range(6)]
        errors = [job.exception() for job in jobs]
    assert [type(error) for error in errors] == [sa.exc.OperationalError] * 6
    assert len(replica.deaths) == 1
    assert replica.proxy.accepted == before + 1


def test_big_statement(replica: Replica) -> None:
    """psycopg notices that a server takes nothing, either; the others wait to send."""
    if replica.driver != "psycopg":
        pytest.skip("its sending is not watched")
    replica.warm_up()
    replica.proxy.stall()
    with pytest.raises(sa.exc.OperationalError, match=LOST):
        replica.ask(f"SELECT length('{'x' * 30_000_000}')")
    replica.proxy.resume()


def test_middle_of_a_result(replica: Replica) -> None:
    """A server that falls silent in the middle of an answer is given up as well."""
    if replica.driver == "mysqlclient":
        pytest.skip("the C library reads a result to its end")
    replica.warm_up()
    with pools.streaming(replica.engine).connect() as connection:
        result = connection.execution_options(stream_results=True, max_row_buffer=10).execute(
            sa.text(MANY[replica.family])
        )
        assert result.fetchone()
        replica.proxy.stall()
        with pytest.raises(sa.exc.OperationalError, match=LOST) as caught:
            result.fetchall()
        assert caught.value.connection_invalidated
        result.close()
    replica.proxy.resume()
    assert len(replica.deaths) == 1


def test_unwatched(make_replica: MakeReplica) -> None:
    """A primary's connections have no patience, unless it is asked for."""
    replica = make_replica()
    plain, watched = (sa.create_engine(replica.engine.url) for _ in range(2))
    pools.prepare(plain, PoolSettings(), None, lambda: None)
    pools.prepare(watched, PoolSettings(), None, lambda: None)
    dialect_for(watched).be_patient(Patience(watched, dialect_for(watched)))
    with plain.connect() as first, watched.connect() as second, replica.engine.connect() as third:
        found = [
            t.cast(t.Any, connection.connection.dbapi_connection).patience
            for connection in (first, second, third)
        ]
    assert found[0] is None
    assert isinstance(found[1], patience.Patience)
    assert isinstance(found[2], patience.Patience)
    assert found[1] is not found[2]
    plain.dispose()
    watched.dispose()


# The slow -------------------------------------------------------------------------------------


def test_slow(replica: Replica) -> None:
    """A statement that takes long on a living server is waited for, however often it is asked."""
    before = replica.warm_up()
    with replica.engine.connect() as connection:
        connection.execute(sa.text(SLEEP[replica.family].format(1.5)))
        assert connection.scalar(sa.text("SELECT 2")) == 2
    assert replica.deaths == []
    assert before + 2 * replica.knocks <= replica.proxy.accepted <= before + 5 * replica.knocks


def test_many_slow(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict that the server is alive is shared, too."""
    monkeypatch.setattr(patience, "PAUSES", (30.0, 30.0))
    before = replica.warm_up(6)
    with ThreadPoolExecutor(6) as executor:
        list(executor.map(replica.sleep, [0.8] * 6))
    assert replica.deaths == []
    assert replica.proxy.accepted == before + replica.knocks


def test_thaw(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that wakes up while it is asked is alive, and answers."""
    monkeypatch.setattr(patience, "KNOCK_LIMIT", 20.0)
    before = replica.warm_up()
    replica.server.freeze()
    with ThreadPoolExecutor(1) as executor:
        job = executor.submit(replica.ask, "SELECT 1")
        wait_until(lambda: replica.proxy.accepted > before, "somebody knocks")
        replica.server.thaw()
        assert job.result(10) == 1
    assert replica.deaths == []


def test_full(make_replica: MakeReplica) -> None:
    """A server that lets nobody in any more is alive."""
    replica = make_replica()
    if replica.family != "mysql":
        pytest.skip("PostgreSQL looks at that after a knock")
    replica.warm_up()
    with replica.engine.connect() as connection:
        replica.server.execute("SET GLOBAL max_connections = 10")
        others = []
        with contextlib.suppress(sa.exc.OperationalError):
            while True:
                others.append(replica.engine.connect())
        connection.execute(sa.text("SELECT SLEEP(1)"))
        assert connection.scalar(sa.text("SELECT 2")) == 2
        for other in others:
            other.close()
    assert replica.deaths == []


def test_login(replica: Replica) -> None:
    """A knock at a server that counts who runs away is followed by a login and a farewell.

    It is made as the engine connects, but not through its pool.
    """
    if replica.family != "mysql":
        pytest.skip("PostgreSQL counts nobody")
    told: list[dict[str, t.Any]] = []

    @sa.event.listens_for(replica.engine, "do_connect")
    def do_connect(dialect: t.Any, entry: t.Any, args: t.Any, arguments: dict[str, t.Any]) -> None:
        told.append(dict(arguments))

    before = replica.warm_up()
    replica.proxy.clear()
    replica.sleep(0.3)
    replica.proxy.wait_for("QUIT")
    farewells = [command.link for command in replica.proxy.commands if command.name == "QUIT"]
    assert farewells[0] == before + 2
    # It is asked again as long as there is no answer, however long that takes this machine.
    assert len(told) > 1
    assert told == told[:1] * len(told)
    assert t.cast(sa.QueuePool, replica.engine.pool).checkedin() == 1


def test_login_at_a_silent_server(replica: Replica) -> None:
    """A server that falls silent between the knock and the login is not waited for long."""
    if replica.family != "mysql":
        pytest.skip("PostgreSQL counts nobody")
    replica.warm_up()

    @sa.event.listens_for(replica.engine, "do_connect")
    def do_connect(*event: t.Any) -> None:
        replica.proxy.stall()

    started = time.monotonic()
    with pytest.raises(sa.exc.OperationalError, match=LOST):
        replica.sleep(1)
    assert time.monotonic() - started < 8  # the time to connect is 10 s, or endless
    assert len(replica.deaths) == 1


def test_server_ends_it(replica: Replica) -> None:
    """Time limits and KILL QUERY work as ever while somebody waits."""
    replica.warm_up()
    replica.limits = Limits(statement=0.5)
    with replica.engine.connect() as connection:
        if replica.family == "mysql":
            with pytest.raises(sa.exc.DBAPIError, match="max_statement_time"):
                connection.execute(sa.text("SELECT SLEEP(30)"))
        else:
            with pytest.raises(sa.exc.DBAPIError, match="statement timeout"):
                connection.execute(sa.text("SELECT pg_sleep(30)"))
        replica.limits = None
        number = connection.scalar(sa.text(NUMBER[replica.family]))
        timer = threading.Timer(0.5, replica.server.execute, [STOP[replica.family].format(number)])
        timer.start()
        started = time.monotonic()
        with contextlib.suppress(sa.exc.DBAPIError):  # a SLEEP is no error when it is killed
            connection.execute(sa.text(SLEEP[replica.family].format(30)))
        assert time.monotonic() - started < 20
        timer.join()
        assert connection.scalar(sa.text("SELECT 2")) == 2
    assert replica.deaths == []


def test_read_timeout(make_replica: MakeReplica, request: pytest.FixtureRequest) -> None:
    """A ``read_timeout`` of the user's own holds, also while a living server is asked."""
    if "psycopg" in request.node.callspec.params.values():
        pytest.skip("psycopg has none")
    replica = make_replica(connect_args={"read_timeout": 1})
    before = replica.warm_up()
    started = time.monotonic()
    with pytest.raises(sa.exc.OperationalError, match=r"Lost connection .*timed out"):
        replica.sleep(20)
    assert 0.9 < time.monotonic() - started < 10
    assert replica.proxy.accepted > before
    assert replica.deaths == []


def test_link_options(make_replica: MakeReplica) -> None:
    """What the kernel is told of a link is never longer than what the user has told it."""
    replica = make_replica()
    replica.warm_up()
    with replica.engine.connect() as connection:
        descriptor = t.cast(t.Any, connection.connection.dbapi_connection).fileno()
        with socket.socket(fileno=os.dup(descriptor)) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 3)
            replica.ask("SELECT 1")
            assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
            connection.execute(sa.text(SLEEP[replica.family].format(0.4)))
            assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 3
            assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
            assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 25_000


def test_unknown_link(replica: Replica) -> None:
    """What has no other end cannot be asked about; the driver finds out by itself."""
    waiting = patience.Patience(replica.engine, t.cast(t.Any, None))
    with open(os.devnull) as nothing:
        assert waiting.wait(nothing.fileno(), lambda seconds: False)


# Interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["waiting", "knocking"])
def test_interrupted(
    make_replica: MakeReplica, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Ctrl-C while one waits, or knocks, leaves no connection whose answer is still to come."""
    replica = make_replica()
    if replica.driver == "psycopg" and is_old_psycopg():
        # It holds the interpreter, in which the proxy runs, while it cancels a statement.
        if moment == "knocking":
            pytest.skip("its cancelling waits for the proxy, and the proxy for it")
        replica.proxy = t.cast(t.Any, None)
        replica.engine = replica.make_engine(replica.server.port)
    else:
        replica.warm_up()
    if moment == "knocking":
        monkeypatch.setattr(patience, "KNOCK_LIMIT", 20.0)
        # The statement is on its way, and the server will be silent when it is asked.
        threading.Timer(0.1, replica.proxy.stall).start()
        threading.Timer(1.0, replica.proxy.resume).start()
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, {"waiting": 0.1, "knocking": 0.5}[moment])
            replica.sleep(1.5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert [replica.ask(f"SELECT {number}") for number in (5, 6, 7)] == [5, 6, 7]
    assert replica.sleep(0.6) in (0, "", None)


def test_fork(replica: Replica) -> None:
    """A child forked while a thread of the parent's knocks does not wait for that thread."""
    replica.warm_up()
    waiting: t.Any = patience.Patience(replica.engine, t.cast(t.Any, None))
    door = waiting._doors.setdefault(("127.0.0.1", 1), patience._Door())
    door.is_asked = True
    with waiting._lock:
        child = os.fork()
        if not child:
            os._exit(waiting._lock.locked() or bool(waiting._doors))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert door.is_asked


def is_old_psycopg() -> bool:
    import psycopg

    return psycopg.__version__.startswith("3.1.")


def lose(link: socket.socket) -> None:
    """Have nothing arrive on a connection any more, not even the kernel's own packets."""
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    program = struct.pack("HL", 1, ctypes.addressof(drop_all))
    link.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
