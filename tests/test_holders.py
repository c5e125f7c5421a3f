"""Who holds which connection: ``COMMONDB_LEAK_WATCH``, ``PoolExhausted``, ``db.pool_status()``.

What the pools say is compared with what the servers know of their connections.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import threading
import typing as t

import pytest
import sqlalchemy as sa
from flask import Flask
from flask import Response
from flask import render_template_string

from flask_commondb import CommonDB
from flask_commondb import Holder
from flask_commondb import PoolExhausted
from flask_commondb import PoolStatus
from flask_commondb.signals import connection_leaked

from .apps import Lab
from .apps import can_say_who
from .conftest import clean_database
from .servers import wait_until

if t.TYPE_CHECKING:
    from .servers import Database
    from .servers import MariaDBCluster
    from .servers import PostgreSQLCluster

#: Engine options for a pool of one connection, which does not wait long for it.
ONE = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.05}

MakeLab = t.Callable[..., Lab]


@pytest.fixture(scope="module")
def database(mariadb: MariaDBCluster) -> t.Iterator[Database[MariaDBCluster]]:
    """A MariaDB database with an empty table."""
    with clean_database(mariadb) as database:
        can_say_who(database)
        database.execute(
            "CREATE TABLE post (id INT PRIMARY KEY AUTO_INCREMENT, title VARCHAR(50) NOT NULL)"
        )
        database.sync()
        yield database


@pytest.fixture
def make(database: Database[MariaDBCluster]) -> t.Iterator[MakeLab]:
    """A function that makes an app on MariaDB, with the leak watch."""
    with contextlib.ExitStack() as stack:

        def make(replicas: t.Sequence[t.Any] = (), **config: t.Any) -> Lab:
            config = {"COMMONDB_LEAK_WATCH": True, **config}
            lab = Lab(database.primary_url, replicas, config)
            stack.callback(lab.dispose)
            return lab

        yield make


@pytest.fixture
def lab(make: MakeLab, database: Database[MariaDBCluster]) -> Lab:
    """An app with a replica, whose reads go to the primary unless it is told otherwise."""
    return make(database.replica_urls[:1], COMMONDB_ROUTING="explicit")


@pytest.fixture
def leaks(lab: Lab) -> t.Iterator[list[Holder]]:
    """Collects what is signalled as leaked."""
    seen: list[Holder] = []

    def note(app: Flask, bind_key: str | None, holder: Holder) -> None:
        assert bind_key == holder.bind_key
        seen.append(holder)

    with connection_leaked.connected_to(note, lab.app):
        yield seen


def connections(database: Database[MariaDBCluster], server: int = 0) -> set[int]:
    """The connections that the app has to a server, as that one knows them."""
    found = database.cluster.servers[server].execute(
        "SELECT id FROM information_schema.processlist WHERE db = %s AND user = 'app'",
        database.name,
    )
    return {int(number) for (number,) in found}


def id_of(connection: sa.Connection) -> int:
    return int(connection.scalar(sa.text("SELECT CONNECTION_ID()")) or 0)


# Off ------------------------------------------------------------------------------------------


def test_off(make: MakeLab) -> None:
    """Without the setting nothing of the watch is installed, and nobody is named."""
    lab = make(COMMONDB_LEAK_WATCH=False)
    pool = lab.engines[0].pool
    for event in ("checkout", "checkin", "detach"):
        modules = {listener.__module__ for listener in getattr(pool.dispatch, event)}
        assert "flask_commondb.holders" not in modules
    with lab.app.app_context():
        with lab.db.engine.connect():
            (status,) = lab.db.pool_status()
    assert (status.in_use, status.holders) == (1, ())


def test_off_by_default() -> None:
    """It is off unless asked for."""
    lab = Lab("sqlite://")
    with lab.app.app_context():
        assert type(lab.db.router.watch).__name__ == "NoWatch"
    lab.dispose()


# What is remembered ---------------------------------------------------------------------------


def use_session(lab: Lab) -> None:
    lab.titles()


def use_session_of_a_bind(lab: Lab) -> None:
    lab.db.sessions[None].execute(sa.text("SELECT 1"))


def use_cursor(lab: Lab) -> None:
    with lab.db.cursor() as cursor:
        cursor.execute("SELECT 1")


def use_engine(lab: Lab) -> t.Any:
    return lab.db.engine.connect()


def use_stream(lab: Lab) -> t.Any:
    return lab.db.stream(sa.text("SELECT 1"))


USES = [use_session, use_session_of_a_bind, use_cursor, use_engine, use_stream]


@pytest.mark.parametrize("use", USES)
def test_holder(lab: Lab, use: t.Callable[[Lab], t.Any]) -> None:
    """A checkout remembers endpoint, thread, age, and the places in the application's own code."""
    seen: list[Holder] = []

    @lab.app.get("/")
    def index() -> str:
        kept = use(lab)
        (holder,) = lab.db.pool_status()[0].holders
        seen.append(holder)
        if kept is not None:
            kept.close()
        return "ok"

    thread = threading.Thread(target=lab.app.test_client().get, args=["/"], name="worker-7")
    thread.start()
    thread.join()
    (holder,) = seen
    assert (holder.bind_key, holder.endpoint, holder.thread) == (None, "index", "worker-7")
    age = holder.age
    assert 0 < age < holder.age
    places = [place.split(" ") for place in holder.origin]
    assert [name for _, name in places][-2:] == [use.__name__, "index"]
    assert {place.partition(":")[0] for place, _ in places} <= {__name__, "tests.apps"}
    first = use.__code__.co_firstlineno
    assert first < int(places[-2][0].partition(":")[2]) <= first + 3
    text = str(holder)
    assert "endpoint 'index' in thread 'worker-7' for 0." in text
    assert f"{__name__}:" in text
    assert lab.db.pool_status()[0].holders == ()


def test_holder_outside_of_a_request(lab: Lab) -> None:
    """Outside of a request there is no endpoint."""
    with lab.app.app_context():
        with lab.db.engine.connect():
            (holder,) = lab.db.pool_status()[0].holders
    assert holder.endpoint is None
    assert str(holder).startswith("outside of a request in thread 'MainThread'")


def test_holder_in_a_template(lab: Lab) -> None:
    """What a template makes the session load is said to come from the template, and the view."""
    with lab.request("POST"):
        render_template_string("{{ titles() }}", titles=lambda: lab.titles())
        (holder,) = lab.db.pool_status()[0].holders
    assert [place.partition(":")[0] for place in holder.origin] == [
        "tests.apps",
        __name__,
        "<template>",
    ]


def test_holders_come_oldest_first(lab: Lab) -> None:
    """The one that holds its connection longest is named first, also when places are used anew."""
    with lab.app.app_context():
        engine = lab.db.engine
        first, second, third = engine.connect(), engine.connect(), engine.connect()
        first.close()
        fourth = engine.connect()
        ages = [holder.age for holder in lab.db.pool_status()[0].holders]
        assert ages == sorted(ages, reverse=True)
        assert len(ages) == 3
        for connection in (second, third, fourth):
            connection.close()


def test_holder_is_forgotten(lab: Lab, leaks: list[Holder]) -> None:
    """Closed, dropped, invalidated and detached connections are held by nobody."""
    with lab.app.app_context():
        engine = lab.db.engine
        engine.connect().close()
        engine.connect()
        gc.collect()
        lost = engine.connect()
        lost.invalidate()
        detached = engine.connect()
        detached.detach()
        assert lab.db.pool_status()[0].holders == ()
        assert lab.db.pool_status()[0].in_use == 0
    assert leaks == []
    assert id_of(detached) > 0
    detached.close()


# What is not given back -------------------------------------------------------------------------


def connect(lab: Lab) -> t.Any:
    return lab.db.engine.connect()


def begin(lab: Lab) -> t.Any:
    connection = lab.db.engine.connect()
    connection.execute(sa.insert(lab.Post).values(title="lost"))
    return connection


def read_a_part(lab: Lab) -> t.Any:
    connection = lab.db.engine.connect().execution_options(stream_results=True)
    next(iter(connection.execute(sa.text("SELECT seq FROM seq_1_to_100000"))))
    return connection


def connect_to_a_replica(lab: Lab) -> t.Any:
    return lab.db.replica_engines[None][0].connect()


@pytest.mark.parametrize("take", [connect, begin, read_a_part, connect_to_a_replica])
def test_leak(
    lab: Lab,
    leaks: list[Holder],
    database: Database[MariaDBCluster],
    caplog: pytest.LogCaptureFixture,
    take: t.Callable[[Lab], t.Any],
) -> None:
    """What a view does not give back is thrown away when it ends, with one signal and one record.

    The pool has it no more, nor the server, and the leaking code cannot use it: neither this
    connection, nor that of someone else.
    """
    kept: list[sa.Connection] = []

    @lab.app.post("/")
    def index() -> str:
        kept.append(take(lab))
        return "ok"

    assert lab.app.test_client().post("/").text == "ok"
    (holder,) = leaks
    assert holder.endpoint == "index"
    assert [place.split(" ")[1] for place in holder.origin] == [take.__name__, "index"]
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("flask_commondb", logging.ERROR)
    assert record.__dict__["bind_key"] is None
    assert record.__dict__["endpoint"] == "index"
    assert str(holder)[:30] in record.getMessage()
    assert lab.checked_out() == 0
    assert lab.db.pool_status()[0].holders == ()
    server = 1 if take is connect_to_a_replica else 0
    wait_until(lambda: not connections(database, server), "the server has closed the connection")
    with lab.app.app_context(), lab.engines[server].connect() as other:
        assert id_of(other)
        with pytest.raises(sa.exc.ResourceClosedError, match="thrown away"):
            kept[0].commit() if take is begin else id_of(kept[0])
        with pytest.raises(sa.exc.SQLAlchemyError, match=r"thrown away|rolled back"):
            id_of(kept[0])
        assert id_of(other) in connections(database, server)
    kept[0].close()
    assert lab.checked_out() == 0
    assert database.execute("SELECT * FROM post") == []
    assert len(leaks) == len(caplog.records) == 1


def test_leak_of_a_raw_connection(lab: Lab, leaks: list[Holder]) -> None:
    """A DBAPI connection that was left out is taken back as well."""
    with lab.app.app_context():
        raw = lab.db.engine.raw_connection()
    assert len(leaks) == 1
    assert lab.checked_out() == 0
    with pytest.raises(sa.exc.ResourceClosedError, match=r"outside of a request .* Close it"):
        raw.cursor()
    raw.close()


def test_leak_on_postgresql(
    postgresql_database: Database[PostgreSQLCluster], caplog: pytest.LogCaptureFixture
) -> None:
    """So is PostgreSQL's, and the record names the bind."""
    url = postgresql_database.primary_url
    config = {"COMMONDB_LEAK_WATCH": True, "SQLALCHEMY_BINDS": {"orders": url}}
    lab = Lab(url, config=config)
    with lab.app.app_context():
        connection = lab.db.engines["orders"].connect()
        pid = connection.scalar(sa.text("SELECT pg_backend_pid()"))
    alive = "SELECT 1 FROM pg_stat_activity WHERE pid = %s"
    wait_until(lambda: not postgresql_database.execute(alive, pid), "the backend is gone")
    with pytest.raises(sa.exc.ResourceClosedError, match="thrown away"):
        connection.scalar(sa.text("SELECT 1"))
    assert lab.checked_out() == 0
    assert "bind 'orders'" in caplog.text
    lab.dispose()


def test_leak_in_a_context_that_fails(lab: Lab, leaks: list[Holder]) -> None:
    """The error of a view stays what it is, and what it has left is taken back."""
    kept = []
    with pytest.raises(LookupError, match="oh"), lab.app.app_context():
        kept.append(lab.db.engine.connect())
        raise LookupError("oh")
    assert len(leaks) == 1
    assert lab.checked_out() == 0


def test_receiver_that_raises(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """A receiver that raises changes nothing: all connections are taken back."""

    def fail(app: Flask, **_: object) -> None:
        raise LookupError("oh")

    with connection_leaked.connected_to(fail, lab.app):
        with lab.app.app_context():
            kept = [lab.db.engine.connect() for _ in range(3)]
    assert len(kept) == 3
    assert lab.checked_out() == 0
    assert caplog.text.count("was still out") == 3


def test_not_a_leak(lab: Lab, leaks: list[Holder]) -> None:
    """What is closed in time, used by a session, or taken outside of a context is no leak."""
    with lab.app.app_context():
        engine = lab.db.engine
    outside = engine.connect()
    with lab.request("POST"):
        with engine.connect() as connection:
            id_of(connection)
        lab.db.session.execute(sa.text("SELECT 1"), bind_arguments={"bind": outside})
        lab.db.session.connection({"bind": outside})
    with lab.request("POST"):
        for use in USES[:3]:
            use(lab)
        assert len(lab.db.pool_status()[0].holders) == 3  # two sessions, and the one outside
    assert leaks == []
    assert id_of(outside) > 0
    outside.close()


def test_connection_of_an_outer_context(lab: Lab, leaks: list[Holder]) -> None:
    """The end of an inner context takes back what was taken in it, and nothing else."""
    with lab.app.app_context():
        outer = lab.db.engine.connect()
        with lab.app.app_context():
            inner = lab.db.engine.connect()
            lab.db.session.execute(sa.text("SELECT 1"), bind_arguments={"bind": outer})
        assert len(leaks) == 1
        assert not outer.invalidated
        assert id_of(outer) > 0
        with pytest.raises(sa.exc.ResourceClosedError, match="thrown away"):
            id_of(inner)
        outer.close()
    assert len(leaks) == 1


def test_outer_session_in_an_inner_context(lab: Lab, leaks: list[Holder]) -> None:
    """A session that takes its connection inside of an inner context keeps it after that."""
    with lab.request("POST"):
        outer = lab.db.session()
        who = sa.text("SELECT CONNECTION_ID()")
        with lab.app.app_context():
            connection = outer.scalar(who)
        assert leaks == []
        assert outer.scalar(who) == connection


def test_stream_of_a_response(lab: Lab, leaks: list[Holder]) -> None:
    """A stream that a response reads from outlives the context, and is no leak."""

    @lab.app.get("/")
    def index() -> Response:
        rows = lab.db.stream(sa.text("SELECT seq FROM seq_1_to_5000"), chunk=10).scalars()
        return Response(f"{number}," for number in rows)

    response = lab.app.test_client().get("/")
    (holder,) = lab.db.pool_status()[0].holders
    assert holder.endpoint == "index"
    assert response.text.endswith("4999,5000,")
    response.close()
    assert leaks == []
    assert lab.checked_out() == 0


def test_database_in_memory(caplog: pytest.LogCaptureFixture) -> None:
    """An in-memory database is one connection: to throw it away would be to lose the data."""
    lab = Lab("sqlite://", config={"COMMONDB_LEAK_WATCH": True})
    with lab.app.app_context():
        lab.db.create_all()
        lab.db.session.add(lab.Post(title="kept"))
        lab.db.session.commit()
        connection = lab.db.engine.connect()
    with lab.app.app_context():
        assert lab.titles() == ["kept"]
    connection.close()
    assert caplog.records == []
    lab.dispose()


def test_fork(lab: Lab, leaks: list[Holder], database: Database[MariaDBCluster]) -> None:
    """In a forked child the end of the context takes nothing away from the parent."""
    context = lab.app.app_context()
    context.push()
    connection = lab.db.engine.connect()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            context.pop()
            assert leaks == []
            with lab.app.app_context():
                assert lab.db.pool_status()[0].holders == ()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert id_of(connection) in connections(database)
    connection.close()
    context.pop()
    assert leaks == []


def test_many_threads(lab: Lab, leaks: list[Holder]) -> None:
    """Threads that take and give back leave no holder, and those that leak are all found."""

    def work() -> None:
        for number in range(20):
            with lab.app.app_context():
                connection = lab.db.engine.connect()
                lab.titles()
                if number % 10:
                    connection.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(leaks) == 8
    assert lab.checked_out() == 0
    assert lab.db.pool_status()[0].holders == ()


# The pool is exhausted ------------------------------------------------------------------------


@pytest.mark.parametrize("watch", [True, False])
@pytest.mark.parametrize("use", USES)
def test_exhausted(make: MakeLab, use: t.Callable[[Lab], t.Any], watch: bool) -> None:
    """Whoever asks is told who holds the connections, or how to find out; without secrets."""
    lab = make(SQLALCHEMY_ENGINE_OPTIONS=ONE, COMMONDB_LEAK_WATCH=watch)
    with lab.app.app_context():
        with lab.db.engine.connect() as connection:
            connection.execute(sa.text("SELECT :value"), {"value": "s3cret"})
            with lab.app.test_request_context("/"):
                with pytest.raises(PoolExhausted, match="All 1 connections of bind None") as caught:
                    use(lab)
            assert lab.checked_out() == 1
        use(lab) and None
    error = caught.value
    assert isinstance(error, sa.exc.TimeoutError)
    assert isinstance(error.__cause__, sa.exc.TimeoutError)
    text = str(error)
    assert f"127.0.0.1:{lab.engines[0].url.port}" in text
    assert "app:app" not in text
    assert "s3cret" not in text
    if watch:
        (holder,) = error.holders
        assert holder in text
        assert "outside of a request in thread 'MainThread' for 0." in holder
        assert f"taken by {__name__}:" in holder
        assert " test_exhausted" in holder
    else:
        assert error.holders == ()
        assert "Set COMMONDB_LEAK_WATCH to see who holds them." in text


def test_replica_is_exhausted(make: MakeLab, database: Database[MariaDBCluster]) -> None:
    """A replica whose pool is exhausted is not down: nothing is paused, and nobody else asked."""
    lab = make([{"url": database.replica_urls[0], **ONE}])
    with lab.request():
        replica = lab.db.replica_engines[None][0]
        with replica.connect():
            for read in (lab.read, lambda: lab.db.stream(sa.select(lab.Post.id))):
                with pytest.raises(PoolExhausted, match=f"to 127.0.0.1:{replica.url.port}"):
                    read()
        assert lab.read() == 2
    assert lab.run(lab.read) == 2


def test_exhausted_after_dispose(make: MakeLab) -> None:
    """A new pool tells as well, and names its own holders only."""
    lab = make(SQLALCHEMY_ENGINE_OPTIONS=ONE)
    with lab.app.app_context():
        engine = lab.db.engine
        old = engine.connect()
        for _ in range(3):
            engine.dispose()
            assert lab.db.pool_status()[0].holders == ()
            with engine.connect():
                with pytest.raises(PoolExhausted, match="taken by") as caught:
                    engine.connect()
            assert len(caught.value.holders) == 1
        old.close()


class OwnPool(sa.QueuePool):
    """A user's pool, which makes its successor by name."""

    def recreate(self) -> OwnPool:
        return OwnPool(
            self._creator,
            pool_size=self.size(),
            max_overflow=self._max_overflow,
            timeout=self._timeout,
            _dispatch=self.dispatch,
            dialect=self._dialect,
        )


def test_exhausted_pool_of_the_user(make: MakeLab) -> None:
    """A pool class of the user's own keeps its name and its kind, and tells."""
    lab = make(SQLALCHEMY_ENGINE_OPTIONS={**ONE, "poolclass": OwnPool})
    with lab.app.app_context():
        engine = lab.db.engine
        for _ in range(2):
            assert isinstance(engine.pool, OwnPool)
            assert type(engine.pool).__name__ == "OwnPool"
            with engine.connect():
                with pytest.raises(PoolExhausted, match="taken by"):
                    engine.connect()
            engine.dispose()


@pytest.mark.parametrize("pool_class", [sa.NullPool, sa.StaticPool])
def test_other_pools_are_left_alone(make: MakeLab, pool_class: type[sa.Pool]) -> None:
    """A pool that never waits is what it was, and does not count."""
    lab = make(SQLALCHEMY_ENGINE_OPTIONS={"poolclass": pool_class})
    with lab.app.app_context():
        assert type(lab.db.engine.pool) is pool_class
        with lab.db.engine.connect():
            (status,) = lab.db.pool_status()
        assert (status.in_use, status.idle, status.limit) == (None, None, None)
        assert len(status.holders) == (1 if pool_class is sa.NullPool else 0)


def test_thread_that_died_in_a_context(make: MakeLab) -> None:
    """What only a dead thread could reach comes back, before anybody is told of exhaustion."""
    lab = make(SQLALCHEMY_ENGINE_OPTIONS=ONE)

    def work() -> None:
        lab.app.app_context().push()
        lab.titles()

    gc.disable()
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        del thread
        assert lab.checked_out() == 1
        with lab.app.app_context():
            assert lab.titles() == []
    finally:
        gc.enable()
    assert lab.checked_out() == 0


def test_connection_comes_back_while_someone_waits(make: MakeLab) -> None:
    """Who waits long enough is served, and is told nothing."""
    lab = make(SQLALCHEMY_ENGINE_OPTIONS={**ONE, "pool_timeout": 30})
    with lab.app.app_context():
        engine = lab.db.engine
        connection = engine.connect()
    results: list[int] = []

    def work() -> None:
        with engine.connect() as other:
            results.append(id_of(other))

    thread = threading.Thread(target=work)
    thread.start()
    connection.close()
    thread.join()
    assert len(results) == 1


# The status of the pools ----------------------------------------------------------------------


def test_status(make: MakeLab, database: Database[MariaDBCluster]) -> None:
    """The numbers are the pool's and the server's, for primary and replicas, at any time."""
    options = {"pool_size": 2, "max_overflow": 1}
    lab = make(database.replica_urls, SQLALCHEMY_ENGINE_OPTIONS=options)

    def check(*expected: tuple[int, int]) -> None:
        """Compare what is in use and idle, the primary first."""
        status = lab.db.pool_status()
        assert [(one.in_use, one.idle) for one in status] == list(expected)
        for number, (one, (in_use, idle)) in enumerate(zip(status, expected, strict=True)):
            wait_until(
                lambda number=number, total=in_use + idle: (  # type: ignore[misc]
                    len(connections(database, number)) == total
                ),
                "the server knows of as many",
            )
            assert one.bind_key is None
            assert one.role == ("replica" if number else "primary")
            assert one.server == f"127.0.0.1:{database.cluster.servers[number].port}"
            assert one.limit == 3
            assert len(one.holders) == in_use

    check((0, 0), (0, 0), (0, 0))
    with lab.app.app_context():
        check((0, 0), (0, 0), (0, 0))
        lab.titles()
        check((1, 0), (0, 0), (0, 0))
        with lab.db.engine.connect() as one, lab.db.engine.connect():
            check((3, 0), (0, 0), (0, 0))
            one.invalidate()
            check((2, 0), (0, 0), (0, 0))
        check((1, 1), (0, 0), (0, 0))
    check((0, 1), (0, 0), (0, 0))  # the pool keeps the place of the one that was thrown away
    with lab.request():
        replica = lab.read()
        check((0, 1), (int(replica == 2), 0), (int(replica == 3), 0))
    check((0, 1), (0, int(replica == 2)), (0, int(replica == 3)))
    with lab.request("POST"):
        stream = lab.db.stream(sa.text("SELECT seq FROM seq_1_to_5000"), chunk=1)
        check((1, 0), (0, int(replica == 2)), (0, int(replica == 3)))
        lab.titles()
        check((2, 0), (0, int(replica == 2)), (0, int(replica == 3)))
        stream.close()
        check((1, 0), (0, int(replica == 2)), (0, int(replica == 3)))
    lab.dispose()
    check((0, 0), (0, 0), (0, 0))


@pytest.mark.parametrize("options", [{"pool_size": 0}, {"pool_size": 1, "max_overflow": -1}])
def test_unlimited_pool(make: MakeLab, options: dict[str, int]) -> None:
    """A pool without a limit says so, and counts."""
    lab = make(SQLALCHEMY_ENGINE_OPTIONS=options)
    with lab.app.app_context(), contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(lab.db.engine.connect())
        (status,) = lab.db.pool_status()
        assert (status.in_use, status.idle, status.limit) == (8, 0, None)
        assert len(status.holders) == 8
        stack.close()
        (status,) = lab.db.pool_status()
        assert (status.in_use, status.idle) == (0, 8 if options["pool_size"] == 0 else 1)


def test_status_of_two_apps(database: Database[MariaDBCluster]) -> None:
    """Each app has pools, a watch and a status of its own."""
    db = CommonDB()
    one, two = apps = [Flask("one"), Flask("two")]
    for app in apps:
        app.config.update(
            SQLALCHEMY_DATABASE_URI=database.primary_url, COMMONDB_LEAK_WATCH=app is one
        )
        db.init_app(app)
    with one.app_context():
        with db.engine.connect(), two.app_context():
            db.session.execute(sa.text("SELECT 1"))
            assert db.pool_status() == db.pool_status(two)
            assert [db.pool_status(app)[0].in_use for app in apps] == [1, 1]
            assert [len(db.pool_status(app)[0].holders) for app in apps] == [1, 0]
        assert [db.pool_status(app)[0].in_use for app in apps] == [0, 0]
    with pytest.raises(RuntimeError, match="Which app is meant"):
        db.pool_status()
    for app in apps:
        with app.app_context():
            db.engine.dispose()


def test_no_secrets(lab: Lab) -> None:
    """What is shown of a pool and of its holders names no user, password or parameter."""
    with lab.app.app_context():
        with lab.db.engine.connect() as connection:
            connection.execute(sa.text("SELECT :value"), {"value": "s3cret"})
            status = lab.db.pool_status()
    shown = repr(status) + "".join(map(str, status)) + "".join(map(str, status[0].holders))
    assert isinstance(status[0], PoolStatus)
    assert "in_use=1" in shown
    assert "app:" not in shown
    assert "s3cret" not in shown
    assert "0x" not in shown
