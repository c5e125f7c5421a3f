"""The same promises with PyMySQL, mysqlclient and psycopg: what is sent, and what must not be lost.

What is sent is asked of the servers' own logs.
"""

from __future__ import annotations

import re
import typing as t

import pytest
import sqlalchemy as sa

from .drivers import BINDS
from .drivers import DRIVERS
from .drivers import Wired
from .servers import wait_until

if t.TYPE_CHECKING:
    import collections.abc as c

MYSQL_FAMILY = ("PyMySQL", "mysqlclient")


class Logged(Wired):
    """The app, with a server that writes down all that it is asked."""

    def __init__(self, request: pytest.FixtureRequest, driver: str) -> None:
        super().__init__(request, driver)
        if self.family == "mysql":
            self.execute("SET GLOBAL log_output = 'TABLE'")
            self.execute("SET GLOBAL general_log = 1")
        else:
            self.execute(f"ALTER DATABASE {self.database.name} SET log_statement = 'all'")

    def sent_by(self, work: t.Callable[[], object]) -> list[str]:
        """The first words of the statements that a piece of work sends, once it is warm."""
        for _ in range(3):
            work()
        if self.family == "mysql":
            self._settle()
            self.execute("TRUNCATE mysql.general_log")
            work()
            self._settle()
            rows = self.execute(
                "SELECT argument FROM mysql.general_log"
                " WHERE command_type IN ('Query', 'Ping') AND user_host LIKE '%app%'"
            )
            statements = [row[0] if isinstance(row[0], str) else row[0].decode() for row in rows]
        else:
            before = len(self.server.log)
            work()
            log = self.server.log[before:]
            statements = re.findall(r"LOG:  (?:statement|execute \S+): (.*)", log)
        return [statement.split()[0].upper().rstrip(";") for statement in statements]

    def _settle(self) -> None:
        """Have the server's answer to the end of a read, which nobody has waited for, be read."""
        for engine in self.engines.values():
            if t.cast(sa.QueuePool, engine.pool).checkedin():
                engine.pool.connect().close()


@pytest.fixture(params=DRIVERS)
def wired(request: pytest.FixtureRequest) -> c.Iterator[Wired]:
    """The app, once for each driver."""
    wired = Wired(request, request.param)
    yield wired
    wired.dispose()


@pytest.fixture(params=DRIVERS)
def logged(request: pytest.FixtureRequest) -> c.Iterator[Logged]:
    """The app and its server's log, once for each driver."""
    logged = Logged(request, request.param)
    yield logged
    logged.dispose()


@pytest.mark.parametrize("bind_key", BINDS)
def test_read(logged: Logged, bind_key: str | None) -> None:
    """A unit that only reads is its statements and one ROLLBACK; psycopg begins with a BEGIN."""
    path = f"/{bind_key}"
    begin = ["BEGIN"] if logged.family == "postgresql" else []
    assert logged.sent_by(lambda: logged.client.get(path)) == [*begin, "SELECT", "ROLLBACK"]


@pytest.mark.parametrize("bind_key", BINDS)
def test_write(logged: Logged, bind_key: str | None) -> None:
    """A unit that writes is its statements and one COMMIT."""
    path = f"/{bind_key}"
    begin = ["BEGIN"] if logged.family == "postgresql" else []
    assert logged.sent_by(lambda: logged.client.post(path)) == [*begin, "INSERT", "COMMIT"]


def test_nothing(logged: Logged) -> None:
    """A unit that ends before it has sent anything sends nothing."""
    db = logged.db

    def work() -> None:
        with logged.app.test_request_context():
            db.session.connection()
            db.session.commit()
            db.session.connection()
            db.session.rollback()
            db.session.connection()

    assert logged.sent_by(work) == []


def test_no_old_snapshot(wired: Wired) -> None:
    """What another session has committed is seen by the next unit, however the last one ended."""
    db, model = wired.db, wired.models[None]
    count = sa.select(sa.func.count()).select_from(model)

    def nothing() -> None:
        pass

    def read_after_commit() -> None:
        db.session.commit()
        db.session.scalar(count)

    def raw() -> None:
        db.session.rollback()
        with db.cursor() as cursor:
            cursor.execute(f"SELECT * FROM {model.__tablename__}")
            cursor.fetchall()

    for number in range(20):
        for end in (nothing, db.session.commit, db.session.rollback, read_after_commit, raw):
            before = len(wired.execute(f"SELECT id FROM {model.__tablename__}"))
            with wired.app.test_request_context():
                assert db.session.scalar(count) == before, (number, end)
                end()
            wired.execute(f"INSERT INTO {model.__tablename__} VALUES (DEFAULT)")


def test_changed_autocommit(wired: Wired) -> None:
    """A raw cursor that switches autocommit does so for nobody else."""
    with wired.app.test_request_context():
        connection: t.Any = wired.db.session.connection().connection.dbapi_connection
        if wired.family == "mysql":
            with wired.db.cursor() as cursor:
                cursor.execute("SET autocommit = 1")
        else:
            connection.rollback()
            connection.autocommit = True
    with wired.app.test_request_context():
        wired.db.session.add(wired.models[None]())
        wired.db.session.flush()
        wired.db.session.rollback()
        assert wired.db.session.scalars(sa.select(wired.models[None].id)).all() == []


@pytest.mark.parametrize("level", ["AUTOCOMMIT", "SERIALIZABLE"])
def test_variants(wired: Wired, level: str) -> None:
    """Sessions with an isolation level of their own take turns with others on one connection."""
    db, model = wired.db, wired.models[None]
    statement = sa.select(model.id)
    for _ in range(20):
        with wired.app.test_request_context():
            assert db.session.execute(statement).all() == []
        with wired.app.test_request_context():
            db.session.connection(execution_options={"isolation_level": level})
            assert db.session.execute(statement).all() == []
    pool = t.cast(sa.QueuePool, wired.engines[None].pool)
    assert (pool.checkedout(), pool.checkedin()) == (0, 1)


def test_savepoint_that_reads(wired: Wired, caplog: pytest.LogCaptureFixture) -> None:
    """A unit that ends inside of a savepoint, in which it has only read, ends in peace."""
    db, model = wired.db, wired.models[None]
    for _ in range(3):
        with wired.app.test_request_context():
            db.session.begin_nested()
            assert db.session.execute(sa.select(model.id)).all() == []
    pool = t.cast(sa.QueuePool, wired.engines[None].pool)
    assert (pool.checkedout(), pool.checkedin()) == (0, 1)
    assert caplog.records == []


@pytest.mark.parametrize("wired", MYSQL_FAMILY, indirect=True)
def test_two_phases_that_read(wired: Wired, caplog: pytest.LogCaptureFixture) -> None:
    """So does one in two phases that it has not used."""
    db, model = wired.db, wired.models[None]
    numbers = set()
    for _ in range(3):
        with wired.app.test_request_context():
            db.session().twophase = True
            assert db.session.execute(sa.select(model.id)).all() == []
            numbers.add(db.session.scalar(sa.text("SELECT CONNECTION_ID()")))
    assert len(numbers) == 1
    assert caplog.records == []


@pytest.mark.parametrize("wired", MYSQL_FAMILY, indirect=True)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_interrupted_at_the_end(wired: Wired, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """An interrupt while a unit sends its ROLLBACK does not leave an answer for the next unit."""
    db, model = wired.db, wired.models[None]
    with wired.engines[None].connect() as connection:
        driver_class: t.Any = type(connection.connection.dbapi_connection)
    original = driver_class._send_rollback
    interrupts = [1, 1, 1]

    def send_rollback(connection: t.Any) -> None:
        if interrupts and moment == "before":
            interrupts.pop()
            raise KeyboardInterrupt
        original(connection)
        if interrupts:
            interrupts.pop()
            raise KeyboardInterrupt

    monkeypatch.setattr(driver_class, "_send_rollback", send_rollback)
    for number in range(1, 4):
        context = wired.app.test_request_context()
        context.push()
        db.session.execute(sa.select(model.id)).all()
        with pytest.raises(KeyboardInterrupt):
            context.pop()
        for _ in range(3):
            with wired.app.test_request_context():
                assert db.session.scalar(sa.text(f"SELECT {number}")) == number
    assert t.cast(sa.QueuePool, wired.engines[None].pool).checkedout() == 0


@pytest.mark.parametrize("driver", DRIVERS)
def test_replica(request: pytest.FixtureRequest, driver: str) -> None:
    """A replica's connections are read-only, send nothing at the end, and are kept."""
    wired = Wired(request, driver)
    replica = wired.database.replica_urls[0].partition("://")[2]
    name = DRIVERS[driver][0]
    with_replica = Wired(request, driver, COMMONDB_REPLICAS=[f"{name}://{replica}"])
    wired.dispose()
    db, model = with_replica.db, with_replica.models[None]
    with_replica.database.sync()
    own_number = sa.text(
        "SELECT CONNECTION_ID()" if wired.family == "mysql" else "SELECT pg_backend_pid()"
    )
    numbers = set()
    for _ in range(3):
        with with_replica.app.test_request_context(), db.replica():
            assert db.session.scalars(sa.select(model.id)).all() == []
            numbers.add(db.session.scalar(own_number))
            cte = sa.select(model.id).cte()
            assert db.session.execute(sa.select(cte)).all() == []
            with pytest.raises(sa.exc.DBAPIError, match=r"(?i)read.only"):
                db.session.execute(sa.text(f"DELETE FROM {model.__tablename__}"))
            db.session.rollback()
    assert len(numbers) == (1 if driver != "mysqlclient" else 3)  # which shows no status
    with with_replica.app.test_request_context(), db.replica():
        db.session.execute(sa.text("START TRANSACTION"))
        db.session.scalars(sa.select(model.id)).all()
    with_replica.execute(f"INSERT INTO {model.__tablename__} VALUES (1)")
    with_replica.database.sync()
    with with_replica.app.test_request_context(), db.replica():
        assert db.session.scalars(sa.select(model.id)).all() == [1]
    for (engine,) in db_replicas(with_replica):
        engine.dispose()
    with_replica.dispose()


@pytest.mark.parametrize("driver", DRIVERS)
def test_replica_is_kept(request: pytest.FixtureRequest, driver: str) -> None:
    """Reads on a replica take turns on one connection, also with a driver that shows no status."""
    name, fixture = DRIVERS[driver]
    replica = request.getfixturevalue(fixture).replica_urls[0].partition("://")[2]
    wired = Wired(request, driver, COMMONDB_REPLICAS=[f"{name}://{replica}"])
    wired.database.sync()
    connects: list[object] = []
    for (engine,) in db_replicas(wired):
        sa.event.listen(engine, "connect", lambda *event: connects.append(event))
    for _ in range(5):
        assert wired.client.get("/None").text == "0"
    assert len(connects) == 1
    for (engine,) in db_replicas(wired):
        engine.dispose()
    wired.dispose()


def db_replicas(wired: Wired) -> t.Iterable[t.Sequence[sa.Engine]]:
    with wired.app.app_context():
        return list(wired.db.replica_engines.values())


@pytest.mark.parametrize("left", [False, True], ids=["read", "left"])
def test_stream(wired: Wired, left: bool) -> None:
    """A stream arrives row by row, and may be left half-read."""
    db, model = wired.db, wired.models[None]
    with wired.app.test_request_context(method="POST"):
        db.session.execute(sa.insert(model), [{"id": id} for id in range(1, 1001)])
        db.session.commit()
        stream = db.stream(sa.select(model.id), chunk=10)
        for number, row in enumerate(stream, 1):
            assert row.id == number
            if left and number == 15:
                break
        stream.close()
        assert db.session.scalar(sa.select(sa.func.count()).select_from(model)) == 1000
    assert t.cast(sa.QueuePool, wired.engines[None].pool).checkedout() == 0


@pytest.mark.parametrize("driver", DRIVERS)
def test_pool_settings(request: pytest.FixtureRequest, driver: str) -> None:
    """``pool_min_size`` and ``pool_max_idle`` are seen at the server, with each driver."""
    settings = {"pool_size": 5, "pool_min_size": 2, "pool_max_idle": 0.3}
    wired = Wired(request, driver, COMMONDB_ENGINE_DEFAULTS=settings)
    minimum = 2 * len(BINDS)
    wired.warm_up(5)
    wait_until(lambda: len(wired.connections()) == minimum, "what is idle is closed")
    wired.dispose()
    assert wired.statuses() == [200] * 2 * len(BINDS)
    wait_until(lambda: len(wired.connections()) == minimum, "the minimum is opened")
    wired.kill()
    assert wired.statuses() == [200] * 2 * len(BINDS)
    wired.dispose()
    wait_until(lambda: not wired.connections(), "nothing is opened after the end")
