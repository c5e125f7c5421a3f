"""Time limits: one name for all servers, for a bind and for a block; a usable session after."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import pickle
import threading
import time
import typing as t

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_commondb.dialects.frugal import Frugal
from flask_commondb.errors import StatementTimeout
from flask_commondb.errors import UnknownBindError

from .apps import Lab
from .apps import lab_with_orders
from .drivers import BINDS
from .drivers import Wired

if t.TYPE_CHECKING:
    import collections.abc as c
    from pathlib import Path

    from .conftest import MakeWired
    from .servers import Database
    from .servers import MariaDBCluster

#: How to ask which connection it is, and to stop what another one does.
OWN_NUMBER = {"mysql": "SELECT CONNECTION_ID()", "postgresql": "SELECT pg_backend_pid()"}
STOP = {"mysql": "KILL QUERY {}", "postgresql": "SELECT pg_cancel_backend({})"}

ENDLESS_JOIN = "SELECT COUNT(*) FROM " + ", ".join(
    f"information_schema.columns {x}" for x in "abcd"
)

SLEEP = {"mysql": "SELECT SLEEP({})", "postgresql": "SELECT pg_sleep({})"}


def sleep(wired: Wired, seconds: float) -> sa.TextClause:
    return sa.text(SLEEP[wired.family].format(seconds))


def limits_at_server(wired: Wired, session: t.Any) -> tuple[float, float]:
    """The limits of a statement and of a lock that the server has for the next statement."""
    if wired.family == "mysql":
        row = session.execute(sa.text("SELECT @@max_statement_time, @@innodb_lock_wait_timeout"))
        return t.cast("tuple[float, float]", tuple(map(float, row.one())))
    names = "'statement_timeout', 'lock_timeout'"
    rows = session.execute(
        sa.text(f"SELECT name, setting FROM pg_settings WHERE name IN ({names})")
    )
    found = {name: int(value) / 1000 for name, value in rows}
    return found["statement_timeout"], found["lock_timeout"]


# A block --------------------------------------------------------------------------------------


def test_block(make_wired: MakeWired) -> None:
    """A statement that takes longer than the block allows is stopped, and the session goes on."""
    wired = make_wired()
    for bind_key in BINDS:
        with wired.app.test_request_context():
            session = wired.db.sessions[bind_key]
            with wired.db.timeout(0.2):
                with pytest.raises(StatementTimeout, match=r"longer than 0\.2 s") as caught:
                    session.execute(sleep(wired, 30))
                assert isinstance(caught.value, sa.exc.OperationalError)
                assert caught.value.bind_key == bind_key
                assert caught.value.limit == 0.2
                assert session.scalar(sa.text("SELECT 1")) == 1
            session.add(wired.models[bind_key]())
            session.commit()
            session.execute(sleep(wired, 0.3))


def test_limits_that_the_server_has(make_wired: MakeWired) -> None:
    """Inside a block the server itself has the limits, after it those from before."""
    wired = make_wired()
    with wired.app.test_request_context():
        session = wired.db.session
        usual = limits_at_server(wired, session)
        ends: list[t.Callable[[], None]] = [lambda: None, session.commit, session.rollback]
        for end in ends:
            with wired.db.timeout(7, lock=3):
                assert limits_at_server(wired, session) == (7, 3)
                with wired.db.timeout(lock=2):
                    assert limits_at_server(wired, session) == (7, 2)
                    with wired.db.timeout(0):
                        assert limits_at_server(wired, session) == (0, 2)
                end()
                assert limits_at_server(wired, session) == (7, 3)
            assert limits_at_server(wired, session) == usual


def test_limits_and_savepoints(make_wired: MakeWired) -> None:
    """A savepoint that is rolled back neither takes a limit away nor brings one back."""
    wired = make_wired()
    with wired.app.test_request_context():
        session = wired.db.session
        usual = limits_at_server(wired, session)
        with wired.db.timeout(7):
            savepoint = session.begin_nested()
            assert limits_at_server(wired, session)[0] == 7
            savepoint.rollback()
            assert limits_at_server(wired, session)[0] == 7
            savepoint = session.begin_nested()
        assert limits_at_server(wired, session) == usual
        savepoint.rollback()
        assert limits_at_server(wired, session) == usual


def test_limits_of_a_bind_alone(make_wired: MakeWired) -> None:
    """A block with bind keys is about these, whatever stands around it."""
    wired = make_wired()
    db = wired.db
    with wired.app.test_request_context():
        usual = limits_at_server(wired, db.session)
        with db.timeout(7, "orders"):
            assert limits_at_server(wired, db.sessions["orders"])[0] == 7
            assert limits_at_server(wired, db.session) == usual
            with db.timeout(5, None):
                assert limits_at_server(wired, db.sessions["orders"])[0] == 7
                assert limits_at_server(wired, db.sessions[None])[0] == 5


def test_next_user_of_a_connection(make_wired: MakeWired) -> None:
    """A connection that goes back to its pool inside of a block has its usual limits after it."""
    wired = make_wired()
    engine = wired.engines[None]
    with wired.app.test_request_context():
        usual = limits_at_server(wired, wired.db.session)
    levels = ("AUTOCOMMIT", "READ COMMITTED")
    for level, next_level in itertools.product(levels, levels):
        with wired.app.app_context(), wired.db.timeout(7):
            with engine.connect().execution_options(isolation_level=level) as connection:
                assert limits_at_server(wired, connection)[0] == 7
        for _ in range(2):
            with engine.connect().execution_options(isolation_level=next_level) as connection:
                assert limits_at_server(wired, connection) == usual
                with wired.app.app_context(), wired.db.timeout(7):
                    assert limits_at_server(wired, connection)[0] == 7
                assert limits_at_server(wired, connection) == usual
    assert t.cast(sa.QueuePool, engine.pool).checkedin() == 1


def test_next_raw_user_of_a_connection(make_wired: MakeWired) -> None:
    """The same for who takes a connection from its pool without SQLAlchemy."""
    wired = make_wired()
    engine = wired.engines[None]
    seen: list[t.Any] = []
    show = {"mysql": "SELECT @@max_statement_time", "postgresql": "SHOW statement_timeout"}

    def look() -> None:
        connection = engine.raw_connection()
        cursor = connection.cursor()
        cursor.execute(show[wired.family])
        seen.append(cursor.fetchone())
        connection.close()

    look()
    for level in ("AUTOCOMMIT", "READ COMMITTED"):
        with wired.app.app_context(), wired.db.timeout(7):
            with engine.connect().execution_options(isolation_level=level) as connection:
                assert limits_at_server(wired, connection)[0] == 7
        look()
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("make_wired", ["PyMySQL", "mysqlclient"], indirect=True)
def test_variables_that_are_set_inside(make_wired: MakeWired) -> None:
    """A SET inside of a block holds after it, also for a connection that is made there."""
    wired = make_wired(COMMONDB_ENGINE_DEFAULTS={"statement_timeout": 7, "lock_timeout": 9})
    with wired.app.test_request_context():
        session = wired.db.session
        with wired.db.timeout(2, lock=3):
            assert limits_at_server(wired, session) == (2, 3)
        assert limits_at_server(wired, session) == (7, 9)
        with wired.db.timeout(2):
            session.execute(sa.text("SET SESSION max_statement_time = 5"))
        assert limits_at_server(wired, session) == (5, 9)


def test_far_and_near(make_wired: MakeWired) -> None:
    """A limit that the server would take for none, or for a mistake, is the nearest that it has."""
    wired = make_wired()
    with wired.app.test_request_context():
        with wired.db.timeout(60 * 60 * 24 * 365):
            assert limits_at_server(wired, wired.db.session)[0] >= 60 * 60 * 24 * 20
        with wired.db.timeout(3e-7), pytest.raises(StatementTimeout):
            wired.db.session.execute(sleep(wired, 30))


def test_view(make_wired: MakeWired) -> None:
    """As a decorator it is for a view; other threads and requests know nothing of it."""
    wired = make_wired()
    seen: list[t.Any] = []

    @wired.app.get("/limited")
    @wired.db.timeout(7)
    def limited() -> str:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return str(limits_at_server(wired, wired.db.session)[0])

    def elsewhere() -> None:
        with wired.app.app_context():
            seen.append(limits_at_server(wired, wired.db.session)[0])

    assert wired.client.get("/limited").text == "7.0"
    elsewhere()
    assert seen[0] == seen[1] != 7


def test_what_was_done_before(make_wired: MakeWired) -> None:
    """What the transaction has done before a read is stopped is kept, and the session goes on."""
    wired = make_wired()
    db, model = wired.db, wired.models[None]
    with wired.app.test_request_context():
        db.session.add(model(id=1))
        db.session.flush()
        db.session.add(model(id=2))  # goes with the statement that is stopped
        slow = {"mysql": sa.func.sleep(30), "postgresql": sa.func.pg_sleep(30)}[wired.family]
        for statement in (sa.select(slow), sleep(wired, 30)):
            with db.timeout(0.2), pytest.raises(StatementTimeout):
                db.session.execute(statement)
            assert db.session.scalars(sa.select(model.id).order_by(model.id)).all() == [1, 2]
        db.session.commit()
        assert db.session.scalars(sa.select(model.id).order_by(model.id)).all() == [1, 2]


def test_autoflush_of_the_statement_that_is_stopped(make_wired: MakeWired) -> None:
    """What a session writes in the same call, before its first statement, is not lost either."""
    wired = make_wired()
    db, model = wired.db, wired.models[None]
    slow = {"mysql": sa.func.sleep(30), "postgresql": sa.func.pg_sleep(30)}[wired.family]
    with wired.app.test_request_context():
        db.session.add(model(id=1))
        with db.timeout(0.2), pytest.raises(StatementTimeout):
            db.session.execute(sa.select(model.id, slow))
        db.session.commit()
        assert db.session.scalars(sa.select(model.id)).all() == [1]


@pytest.mark.parametrize("make_wired", ["psycopg"], indirect=True)
def test_limit_of_the_bind_on_postgresql(make_wired: MakeWired) -> None:
    """Outside of a block PostgreSQL gives up the transaction, and what is in it is not thrown away
    in silence: only a statement that was alone in it leaves nothing to roll back."""
    wired = make_wired(COMMONDB_ENGINE_DEFAULTS={"statement_timeout": 0.2})
    db, model = wired.db, wired.models[None]
    with wired.app.test_request_context():
        with pytest.raises(StatementTimeout):
            db.session.execute(sleep(wired, 30))
        assert db.session.scalars(sa.select(model.id)).all() == []
        with pytest.raises(StatementTimeout):
            db.session.execute(sleep(wired, 30))
        with pytest.raises(sa.exc.InternalError, match="current transaction is aborted"):
            db.session.execute(sa.select(model.id))
        db.session.rollback()
        assert db.session.scalars(sa.select(model.id)).all() == []


@pytest.mark.parametrize("make_wired", ["psycopg"], indirect=True)
def test_settings_of_the_transaction(make_wired: MakeWired) -> None:
    """What a listener has set for the transaction holds after a statement was stopped."""
    wired = make_wired()
    db = wired.db
    tenant = sa.text("SELECT current_setting('app.tenant', true)")

    @sa.event.listens_for(db.session, "after_begin")
    def after_begin(session: object, transaction: object, connection: sa.Connection) -> None:
        connection.exec_driver_sql("SET LOCAL app.tenant = 'acme'")

    with wired.app.test_request_context():
        assert db.session.scalar(tenant) == "acme"
        with db.timeout(0.2), pytest.raises(StatementTimeout):
            db.session.execute(sleep(wired, 30))
        assert db.session.scalar(tenant) == "acme"


@contextlib.contextmanager
def locked(wired: Wired) -> c.Iterator[None]:
    """Someone else is about to change the one row that there is, 1, to 2; and does not."""
    model = wired.models[None]
    with wired.app.test_request_context():
        wired.db.session.add(model(id=1))
        wired.db.session.commit()
    with wired.engines[None].connect() as blocker:
        blocker.execute(sa.update(model).values(id=2))
        yield
        blocker.rollback()


def test_flush(make_wired: MakeWired) -> None:
    """A flush that takes too long is rolled back; the next transaction is as any other."""
    wired = make_wired()
    model = wired.models[None]
    with locked(wired), wired.app.test_request_context(), wired.db.timeout(0.2):
        wired.db.session.add(model(id=2))
        with pytest.raises(StatementTimeout):
            wired.db.session.commit()
        assert wired.db.session.scalars(sa.select(model.id)).all() == [1]
    with wired.app.test_request_context():
        wired.db.session.add(model(id=2))
        wired.db.session.commit()
        assert wired.db.session.scalars(sa.select(model.id).order_by(model.id)).all() == [1, 2]


def test_lock(make_wired: MakeWired) -> None:
    """A lock is waited for no longer than the block allows."""
    wired = make_wired()
    with locked(wired), wired.app.test_request_context(), wired.db.timeout(lock=1):
        with pytest.raises(sa.exc.OperationalError, match=r"(?i)lock") as caught:
            wired.db.session.execute(sa.update(wired.models[None]).values(id=3))
        assert not isinstance(caught.value, StatementTimeout)


def test_many_rows(make_wired: MakeWired) -> None:
    """An INSERT of many rows stays one statement inside of a block, and gives its keys back."""
    wired = make_wired()
    model = wired.models[None]
    with wired.app.test_request_context():
        with wired.db.timeout(5):
            wired.proxy.clear()
            wired.db.session.execute(sa.insert(model), [{"id": id} for id in range(1, 50)])
            inserts = [command for command in wired.proxy.commands if "INSERT" in str(command)]
            assert len(inserts) == (wired.family == "mysql")
            rows = [model() for _ in range(5)]
            if wired.family == "postgresql":
                rows = [model(id=id) for id in range(50, 55)]
            wired.db.session.add_all(rows)
            wired.db.session.commit()
        assert len({row.id for row in rows}) == 5


def test_raw_cursor(make_wired: MakeWired) -> None:
    """What a raw cursor sends has the limits, too; the error is the driver's."""
    wired = make_wired()
    error = wired.engines[None].dialect.loaded_dbapi.Error
    with wired.app.test_request_context():
        with wired.db.timeout(0.2), pytest.raises(error, match=r"(?i)max_statement_time|timeout"):
            with wired.db.cursor() as cursor:
                cursor.execute(str(sleep(wired, 30)))
        wired.db.session.rollback()
        wired.db.session.execute(sleep(wired, 0.3))


def test_stopped_by_hand(make_wired: MakeWired) -> None:
    """A statement that somebody has stopped has not timed out."""
    wired = make_wired()
    with wired.app.test_request_context():
        number = wired.db.session.scalar(sa.text(OWN_NUMBER[wired.family]))
        timer = threading.Timer(0.5, wired.execute, [STOP[wired.family].format(number)])
        timer.start()
        with (
            wired.db.timeout(30),
            pytest.raises(sa.exc.DBAPIError, match=r"(?i)cancel|interrupt") as caught,
        ):
            wired.db.session.execute(sa.text(ENDLESS_JOIN))
        timer.join()
        assert not isinstance(caught.value, StatementTimeout)


@pytest.mark.parametrize("make_wired", ["PyMySQL", "mysqlclient"], indirect=True)
def test_round_trips(make_wired: MakeWired) -> None:
    """On MariaDB a limit costs no round trip; the end of a transaction has none."""
    wired = make_wired()
    statement = sa.select(wired.models[None].id)
    with wired.app.test_request_context():
        wired.db.session.execute(statement)
    wired.proxy.catch_up()  # with the end of that one
    wired.proxy.clear()
    with wired.app.test_request_context(), wired.db.timeout(2, lock=0.5):
        wired.db.session.execute(statement)
        wired.db.session.commit()
    limited, end = map(str, wired.proxy.commands)
    variables = "max_statement_time=2, innodb_lock_wait_timeout=1, lock_wait_timeout=1"
    assert limited.startswith(f"SET STATEMENT {variables} FOR SELECT")
    assert end == "COMMIT"


@pytest.mark.parametrize("make_wired", ["PyMySQL", "mysqlclient"], indirect=True)
def test_server_without_limits_in_front(
    make_wired: MakeWired, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MySQL's limits are the connection's own: set when they change, and only then."""
    monkeypatch.setattr(Frugal, "is_mariadb", False)
    wired = make_wired(COMMONDB_ENGINE_DEFAULTS={"statement_timeout": 20})
    statement = sa.select(wired.models[None].id)
    with wired.app.test_request_context():
        session = wired.db.session
        usual = limits_at_server(wired, session)
        assert usual[0] == 20
        wired.proxy.clear()
        with wired.db.timeout(7, lock=3):
            session.execute(statement)
            session.execute(statement)
            assert limits_at_server(wired, session) == (7, 3)
            with wired.db.timeout(5):
                session.execute(statement)
                assert limits_at_server(wired, session) == (5, 3)
        with pytest.raises(StatementTimeout), wired.db.timeout(0.2):
            session.execute(sleep(wired, 30))
        session.execute(statement)
        assert limits_at_server(wired, session) == usual
    settings = [str(command) for command in wired.proxy.commands if "SET" in str(command)]
    assert len(settings) == 4


# A bind ---------------------------------------------------------------------------------------


def test_settings(make_wired: MakeWired) -> None:
    """``statement_timeout`` and ``lock_timeout`` of a bind are its connections' own."""
    wired = make_wired(COMMONDB_ENGINE_DEFAULTS={"statement_timeout": 0.3, "lock_timeout": 2})
    for bind_key in BINDS:
        with wired.app.test_request_context():
            session = wired.db.sessions[bind_key]
            assert limits_at_server(wired, session) == (0.3, 2)
            with pytest.raises(StatementTimeout, match=r"longer than 0\.3 s"):
                session.execute(sleep(wired, 30))
            session.rollback()  # for PostgreSQL
            with wired.db.timeout(30):
                session.execute(sleep(wired, 0.4))
                assert limits_at_server(wired, session) == (30, 2)
            assert limits_at_server(wired, session) == (0.3, 2)
            session.rollback()
            assert limits_at_server(wired, session) == (0.3, 2)


# SQLite ---------------------------------------------------------------------------------------

ENDLESS = sa.text(
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
)


def test_sqlite(tmp_path: Path) -> None:
    """SQLite has the same limits, in a block as for a bind."""
    lab = lab_with_orders(tmp_path)
    with lab.request():
        with lab.db.timeout(0.2), pytest.raises(StatementTimeout, match=r"0\.2 s"):
            lab.db.session.execute(ENDLESS)
        lab.db.session.add(lab.Post(title="after"))
        lab.db.session.commit()
        assert lab.titles() == ["after"]
    lab.dispose()
    limited = Lab(
        f"sqlite:///{tmp_path}/default.db",
        config={"COMMONDB_ENGINE_DEFAULTS": {"statement_timeout": 0.2}},
    )
    with limited.request():
        with pytest.raises(StatementTimeout, match=r"0\.2 s"):
            limited.db.session.execute(ENDLESS)
        time.sleep(0.3)
        assert limited.titles() == ["after"]
    limited.dispose()


def test_sqlite_lock(tmp_path: Path) -> None:
    """A lock on SQLite is waited for as long as the block allows, and as before after it."""
    lab = lab_with_orders(tmp_path)

    def busy_timeout() -> int:
        return int(lab.db.session.scalar(sa.text("PRAGMA busy_timeout")))

    with lab.request():
        assert busy_timeout() == 5000
        with lab.db.timeout(lock=0.1):
            assert busy_timeout() == 100
            with lab.db.timeout(1):
                assert busy_timeout() == 100
        assert busy_timeout() == 5000
    lab.dispose()


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "2", True])
def test_wrong_limits(tmp_path: Path, seconds: t.Any) -> None:
    """What is no number of seconds is refused when it is written down."""
    lab = lab_with_orders(tmp_path)
    with pytest.raises(ValueError, match="number of seconds"):
        lab.db.timeout(seconds)
    with pytest.raises(ValueError, match="number of seconds"):
        lab.db.timeout(lock=seconds)
    lab.dispose()


def test_no_limit_for_locks(tmp_path: Path) -> None:
    """0 means no limit on one server and no wait on the other, so it is refused for locks."""
    lab = lab_with_orders(tmp_path)
    with pytest.raises(ValueError, match="above 0"):
        lab.db.timeout(lock=0)
    with pytest.raises(ValueError, match="needs seconds"):
        lab.db.timeout()
    lab.dispose()


def test_unknown_bind(tmp_path: Path) -> None:
    """A bind that the app does not have is an error when the block is entered."""
    lab = lab_with_orders(tmp_path)
    with lab.request():
        with pytest.raises(UnknownBindError, match="orders"):
            with lab.db.timeout(2, "order"):
                pass
    lab.dispose()


def test_tasks(tmp_path: Path) -> None:
    """Each task has limits of its own, also while another one waits inside of a block."""
    lab = lab_with_orders(tmp_path)
    db = lab.db
    seen: list[int] = []

    async def task(seconds: int) -> None:
        with db.timeout(seconds):
            await asyncio.sleep(0.01)
            (scope,) = db.time_limits.get()
            seen.append(int(scope.limits.statement or 0))

    async def tasks() -> None:
        await asyncio.gather(*(task(seconds) for seconds in (1, 2, 3)))

    asyncio.run(tasks())
    assert sorted(seen) == [1, 2, 3]
    assert db.time_limits.get() == ()
    lab.dispose()


def test_error_says_nothing_secret(tmp_path: Path) -> None:
    """The error shows the statement without its parameters, and survives a job queue."""
    lab = lab_with_orders(tmp_path)
    endless = sa.text(f"{ENDLESS} WHERE i != :secret").bindparams(secret="s3cret")
    with lab.request():
        with lab.db.timeout(0.1), pytest.raises(StatementTimeout) as caught:
            lab.db.session.execute(endless)
    assert "s3cret" not in str(caught.value)
    assert "RECURSIVE" in str(caught.value.statement)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (copied.limit, copied.bind_key, str(copied)) == (0.1, None, str(caught.value))
    lab.dispose()


# With the rest ---------------------------------------------------------------------------------


def test_procedure(procedures: Database[MariaDBCluster]) -> None:
    """A procedure is one statement, and is stopped as one."""
    procedures.execute("CREATE PROCEDURE slow() BEGIN SELECT 1; SELECT SLEEP(30); END")
    lab = Lab(procedures.primary_url)
    with lab.app.app_context():
        with lab.db.timeout(0.2), pytest.raises(StatementTimeout, match=r"0\.2 s"):
            lab.db.callproc("slow")
        assert lab.db.session.scalar(sa.text("SELECT 1")) == 1
        with lab.db.timeout(5):
            assert lab.db.callproc("np_in", 7, "seven").all()
    lab.dispose()


def test_stream(make_wired: MakeWired) -> None:
    """A stream that is stopped says so where a row is missing; with psycopg a chunk counts."""
    wired = make_wired()
    db, model = wired.db, wired.models[None]
    with wired.app.test_request_context(method="POST"):
        db.session.execute(sa.insert(model), [{"id": id} for id in range(1, 41)])
        db.session.commit()
        sleep = {"mysql": sa.func.sleep(0.05), "postgresql": sa.func.pg_sleep(0.05)}
        slow = sa.select(model.id, sa.cast(sleep[wired.family], sa.String(10)))
        with db.timeout(0.5), pytest.raises(StatementTimeout, match=r"0\.5 s"):
            for _ in db.stream(slow, chunk=20):
                pass
        assert db.session.scalar(sa.select(sa.func.count()).select_from(model)) == 40
    assert t.cast(sa.QueuePool, wired.engines[None].pool).checkedout() == 0


def test_transaction(make_wired: MakeWired) -> None:
    """A unit of work whose statement is stopped leaves nothing behind, and is not repeated."""
    wired = make_wired()
    db, model = wired.db, wired.models[None]
    runs: list[int] = []

    @db.transactional(retry=3)
    @db.timeout(0.2)
    def work() -> None:
        runs.append(1)
        db.session.add(model(id=1))
        db.session.flush()
        db.session.execute(sleep(wired, 30))

    with wired.app.test_request_context(method="POST"):
        with pytest.raises(StatementTimeout):
            work()
        assert db.session.scalars(sa.select(model.id)).all() == []
    assert len(runs) == 1


def test_savepoint(make_wired: MakeWired) -> None:
    """Inside of a savepoint the rest of the transaction is kept, on every server."""
    wired = make_wired()
    db, model = wired.db, wired.models[None]
    with wired.app.test_request_context(method="POST"):
        with db.transaction() as session:
            session.add(model(id=1))
            with pytest.raises(StatementTimeout):
                with db.transaction(), db.timeout(0.2):
                    session.add(model(id=2))
                    session.flush()
                    session.execute(sleep(wired, 30))
        assert db.session.scalars(sa.select(model.id)).all() == [1]


def test_two_apps(tmp_path: Path) -> None:
    """A limit of one app's settings is not the other's, though both have one ``db``."""
    (tmp_path / "b").mkdir()
    lab = lab_with_orders(tmp_path)
    other = Flask("other")
    other.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/b/default.db"
    other.config["SQLALCHEMY_BINDS"] = {
        "orders": {"url": f"sqlite:///{tmp_path}/b/orders.db", "statement_timeout": 0.1}
    }
    lab.db.init_app(other)
    numbers = str(ENDLESS).replace("FROM n)", "FROM n LIMIT 3000000)")
    short = sa.text(numbers)
    for app, stopped in [(lab.app, False), (other, True)]:
        with app.app_context():
            assert lab.db.session.scalar(short) == 3_000_000
            session = lab.db.sessions["orders"]
            if stopped:
                with pytest.raises(
                    StatementTimeout, match=r"bind 'orders' took longer than 0\.1 s"
                ):
                    session.scalar(short)
            else:
                assert session.scalar(short) == 3_000_000
    with other.app_context():
        for engine in lab.db.engines.values():
            engine.dispose()
    lab.dispose()
