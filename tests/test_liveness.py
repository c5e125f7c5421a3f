"""Connections that have died while they were idle cost no request an error, with any driver."""

from __future__ import annotations

import threading
import time
import typing as t

import pytest
import sqlalchemy as sa

from flask_commondb.dialects import mysqlclient
from flask_commondb.dialects import psycopg
from flask_commondb.dialects import pymysql

from .apps import Lab
from .drivers import BINDS
from .drivers import Wired
from .servers import wait_until

#: What the drivers say of a lost connection.
LOST = r"(?i)lost connection|gone away|terminat|closed|refused"

ALL_FINE = [200] * 2 * len(BINDS)

if t.TYPE_CHECKING:
    from .conftest import MakeWired
    from .servers import Database
    from .servers import MariaDBCluster


# All that is idle is dead ---------------------------------------------------------------------


def test_killed(make_wired: MakeWired) -> None:
    """After a KILL of every idle connection the next requests are 200s, on each bind."""
    wired = make_wired()
    for _ in range(3):
        wired.warm_up()
        assert len(wired.connections()) >= 3 * len(BINDS)
        wired.kill()
        assert wired.statuses() == ALL_FINE


def test_restarted(make_wired: MakeWired) -> None:
    """After a restart of the server the next requests are 200s, on each bind."""
    wired = make_wired()
    wired.warm_up()
    wired.server.restart()
    assert wired.statuses() == ALL_FINE


def test_killed_server(make_wired: MakeWired) -> None:
    """The same when the server had no time to say farewell."""
    wired = make_wired()
    wired.warm_up()
    wired.server.kill()
    wired.server.start()
    assert wired.statuses() == ALL_FINE


def test_cut(make_wired: MakeWired) -> None:
    """The same when the link between app and server is cut."""
    wired = make_wired()
    wired.warm_up()
    wired.proxy.cut()
    assert wired.statuses() == ALL_FINE


def test_idle_limit_of_the_server(make_wired: MakeWired) -> None:
    """With a ``wait_timeout`` of 2 s and a pause of 3 the next requests are 200s."""
    wired = make_wired()
    _close_idle_after(wired, 2)
    wired.warm_up()
    open_before = wired.connections()
    assert open_before
    time.sleep(3)
    assert wired.connections() == set()
    assert wired.statuses() == ALL_FINE


def test_lost_link(make_wired: MakeWired, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that has silently broken is found by the ping of a connection that was idle."""
    for driver in (pymysql, mysqlclient, psycopg):
        monkeypatch.setattr(driver, "PING_TIMEOUT", 0.5)
    wired = make_wired(COMMONDB_ENGINE_DEFAULTS={"pool_ping_after": 0.2})
    wired.warm_up()
    wired.proxy.lose()
    time.sleep(0.3)
    assert wired.statuses() == ALL_FINE


def test_frozen_server(make_wired: MakeWired) -> None:
    """A server that accepts and never greets costs no more than the time to connect."""
    wired = make_wired(COMMONDB_ENGINE_DEFAULTS={"connect_timeout": 1, "pool_ping_after": 0.2})
    wired.warm_up()
    wired.proxy.stall()
    time.sleep(0.3)
    assert wired.client.get("/orders").status_code == 500  # and not never
    wired.proxy.resume()
    assert wired.statuses() == ALL_FINE


# What it costs --------------------------------------------------------------------------------


def test_no_ping_while_in_use(make_wired: MakeWired) -> None:
    """A connection that is in use is never pinged, one that was idle is, once."""
    wired = make_wired(COMMONDB_ENGINE_DEFAULTS={"pool_ping_after": 0.3})
    wired.statuses()
    pings = _count_pings(wired)
    wired.statuses()
    assert pings == []
    time.sleep(0.4)
    assert wired.statuses() == ALL_FINE
    assert len(pings) == len(BINDS)


@pytest.mark.parametrize("never", [None, 3600])
def test_no_ping(make_wired: MakeWired, never: float | None) -> None:
    """``pool_ping_after`` says after which time, or that there is none."""
    wired = make_wired(COMMONDB_ENGINE_DEFAULTS={"pool_ping_after": never})
    wired.statuses()
    pings = _count_pings(wired)
    time.sleep(0.1)
    assert wired.statuses() == ALL_FINE
    assert pings == []


def test_no_second_ping(make_wired: MakeWired) -> None:
    """With ``pool_pre_ping`` it is SQLAlchemy that pings, each time, and nobody else."""
    wired = make_wired(COMMONDB_ENGINE_DEFAULTS={"pool_ping_after": 0, "pool_pre_ping": True})
    wired.statuses()
    pings = _count_pings(wired)
    assert wired.statuses() == ALL_FINE
    assert len(pings) == len(ALL_FINE)


# The lifetime of a connection -----------------------------------------------------------------


def test_recycled_before_the_server_does(make_wired: MakeWired) -> None:
    """Connections live shorter than the server lets one idle."""
    wired = make_wired()
    _close_idle_after(wired, 20)
    for engine in wired.engines.values():
        assert _recycle(engine) not in (18, 20)
        engine.connect().close()
        assert _recycle(engine) == 18
        engine.dispose()
        assert _recycle(engine) == 18


def test_recycle_of_the_user(make_wired: MakeWired) -> None:
    """A lifetime that the user has chosen is kept, also a longer one."""
    wired = make_wired(
        SQLALCHEMY_ENGINE_OPTIONS={"pool_recycle": 300},
    )
    _close_idle_after(wired, 20)
    for engine in wired.engines.values():
        engine.connect().close()
        assert _recycle(engine) == 300


def test_server_without_a_limit(make_wired: MakeWired) -> None:
    """A limit far away, or none, leaves the lifetime as it was."""
    wired = make_wired()
    for engine in wired.engines.values():
        before = _recycle(engine)
        engine.connect().close()
        assert _recycle(engine) == before


# Dead at the first statement ------------------------------------------------------------------


def test_read_is_repeated(make_wired: MakeWired) -> None:
    """A read that finds its connection dead is repeated on another, if it is the first."""
    wired = make_wired()
    for bind_key in BINDS:
        statement = sa.select(wired.models[bind_key].id)
        with wired.app.test_request_context():
            session = wired.db.sessions[bind_key]
            connection = session.connection()
            wired.kill()
            assert session.execute(statement).all() == []
            assert session.connection() is connection
            session.add(wired.models[bind_key]())
            session.commit()
            assert len(session.execute(statement).all()) == 1


def test_nothing_is_repeated_later(make_wired: MakeWired) -> None:
    """Once something was read in a transaction, another connection could tell another story."""
    wired = make_wired()
    statement = sa.select(wired.models[None].id)
    with wired.app.test_request_context():
        wired.db.session.execute(statement)
        wired.kill()
        with pytest.raises(sa.exc.DBAPIError, match=LOST) as caught:
            wired.db.session.execute(statement)
        assert caught.value.connection_invalidated
        wired.db.session.rollback()
        assert wired.db.session.execute(statement).all() == []


def test_nothing_is_repeated_after_a_raw_cursor(make_wired: MakeWired) -> None:
    """What a raw cursor has sent was sent, too: it must not be lost in silence."""
    wired = make_wired()
    model = wired.models[None]
    statement = sa.select(model.id)
    with wired.app.test_request_context():
        with wired.db.cursor() as cursor:
            cursor.execute(f"INSERT INTO {model.__tablename__} (id) VALUES (7)")
        wired.kill()
        with pytest.raises(sa.exc.DBAPIError, match=LOST):
            wired.db.session.execute(statement)
        wired.db.session.rollback()
        assert wired.db.session.execute(statement).all() == []


def test_nothing_is_repeated_in_a_savepoint(make_wired: MakeWired) -> None:
    """A savepoint is something that was done."""
    wired = make_wired()
    with wired.app.test_request_context():
        wired.db.session.begin_nested()
        wired.db.session.connection()
        wired.kill()
        with pytest.raises(sa.exc.DBAPIError, match=LOST):
            wired.db.session.execute(sa.select(wired.models[None].id))
        wired.db.session.rollback()
    assert wired.statuses() == ALL_FINE


def test_text_is_not_repeated(make_wired: MakeWired) -> None:
    """Nobody knows what a text does, so it runs once at most; psycopg has not sent it yet."""
    wired = make_wired()
    with wired.app.test_request_context():
        wired.db.session.connection()
        wired.kill()
        statement = sa.text("SELECT 1")
        if wired.family == "postgresql":
            assert wired.db.session.scalar(statement) == 1
        else:
            with pytest.raises(sa.exc.OperationalError, match=LOST):
                wired.db.session.execute(statement)
            wired.db.session.rollback()
            assert wired.db.session.scalar(statement) == 1


def test_isolation_level_is_not_lost(make_wired: MakeWired) -> None:
    """A connection that was given an isolation level of its own is not replaced in silence."""
    wired = make_wired()
    with wired.app.test_request_context():
        wired.db.session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        wired.kill()
        with pytest.raises(sa.exc.DBAPIError, match=LOST):
            wired.db.session.execute(sa.select(wired.models[None].id))
        wired.db.session.rollback()


def test_server_that_is_gone_for_good(make_wired: MakeWired) -> None:
    """When there is no other connection, the error is the first one, and the pool is whole."""
    wired = make_wired()
    with wired.app.test_request_context():
        wired.db.session.connection()
        wired.proxy.refuse()
        wired.proxy.cut()
        with pytest.raises(sa.exc.DBAPIError, match=LOST):
            wired.db.session.execute(sa.select(wired.models[None].id))
        wired.db.session.rollback()
    pool = t.cast(sa.QueuePool, wired.engines[None].pool)
    assert pool.checkedout() == 0
    wired.proxy.accept()
    assert wired.statuses() == ALL_FINE


def test_listeners_see_the_new_connection(make_wired: MakeWired) -> None:
    """A connection in the place of a dead one is made and taken as any other."""
    wired = make_wired()
    seen: list[str] = []
    for event in ("connect", "checkout"):
        sa.event.listen(wired.engines[None], event, lambda *args, event=event: seen.append(event))
    with wired.app.test_request_context():
        wired.db.session.connection()
        assert seen == ["connect", "checkout"]
        wired.kill()
        wired.db.session.execute(sa.select(wired.models[None].id))
        assert seen == ["connect", "checkout"] * 2


def test_read_that_took_its_time(make_wired: MakeWired) -> None:
    """A slow query whose connection is lost is not sent again."""
    wired = make_wired()
    sleep = {"mysql": sa.func.sleep(30), "postgresql": sa.func.pg_sleep(30)}[wired.family]
    timers: list[threading.Timer] = []

    def kill_soon(*args: t.Any) -> None:
        timers.append(threading.Timer(1.5, wired.kill))
        timers[-1].start()

    sa.event.listen(wired.engines[None], "before_cursor_execute", kill_soon)
    with wired.app.test_request_context():
        with pytest.raises(sa.exc.DBAPIError, match=LOST):
            wired.db.session.execute(sa.select(sleep))
    (timer,) = timers
    timer.join()
    wait_until(lambda: not wired.connections(), "the server has ended the query")


def test_objects_are_repeated_too(make_wired: MakeWired) -> None:
    """What the ORM reads is a read as any other: ``get()``, a query, a lazy attribute."""
    wired = make_wired()
    db, model = wired.db, wired.models[None]
    with wired.app.test_request_context(method="POST"):
        db.session.add(model(id=1))
        db.session.commit()
    reads: list[t.Callable[[], t.Any]] = [
        lambda: db.session.get_one(model, 1).id,
        lambda: db.session.query(model).filter_by(id=1).one().id,
        lambda: db.session.scalars(db.select(model)).one().id,
        lambda: db.first_or_404(db.select(model)).id,
    ]
    for read in reads:
        with wired.app.test_request_context():
            db.session.connection()
            wired.kill()
            assert read() == 1


def test_statement_that_a_listener_has_changed(make_wired: MakeWired) -> None:
    """What is sent counts, not what the caller has written: it might write."""
    wired = make_wired()
    db, model = wired.db, wired.models[None]
    engine = wired.engines[None]
    changed = f"INSERT INTO {model.__tablename__} VALUES (DEFAULT)"

    @sa.event.listens_for(engine, "before_cursor_execute", retval=True)
    def change(*args: t.Any) -> tuple[str, t.Any]:
        if wired.family == "mysql":  # psycopg has not sent it, so it may run on another
            wired.kill()
        return changed, args[3]

    with wired.app.test_request_context():
        db.session.connection()
        if wired.family == "mysql":
            with pytest.raises(sa.exc.DBAPIError, match=LOST):
                db.session.execute(sa.select(model.id))
        else:
            with pytest.raises(sa.exc.ResourceClosedError, match="does not return rows"):
                db.session.execute(sa.select(model.id)).all()
        db.session.rollback()
    sa.event.remove(engine, "before_cursor_execute", change)
    assert wired.statuses() == ALL_FINE


def test_not_replaced_in_two_phases(make_wired: MakeWired) -> None:
    """A transaction in two phases has begun on its connection, so that one is not replaced."""
    wired = make_wired()
    engine = wired.engines[None]
    with engine.connect() as connection:
        connection.begin_twophase()
        wired.kill()
        with pytest.raises(sa.exc.DBAPIError, match=LOST):
            connection.execute(sa.select(wired.models[None].id))
    assert wired.statuses() == ALL_FINE


def test_replaced_under_the_leak_watch(make_wired: MakeWired) -> None:
    """Who holds a connection is known also when it stands in the place of a dead one."""
    wired = make_wired(COMMONDB_LEAK_WATCH=True)
    with wired.app.test_request_context():
        wired.db.session.connection()
        wired.kill()
        wired.db.session.execute(sa.select(wired.models[None].id))
        (holder,) = [holder for status in wired.db.pool_status() for holder in status.holders]
        assert holder.bind_key is None
    assert [status.in_use for status in wired.db.pool_status(wired.app)] == [0, 0]
    assert not any(status.holders for status in wired.db.pool_status(wired.app))


def test_replaced_on_a_replica(request: pytest.FixtureRequest) -> None:
    """A replica's connection is replaced, too, and the new one is read-only again."""
    database: Database[MariaDBCluster] = request.getfixturevalue("mariadb_database")
    lab = Lab(database.primary_url, database.replica_urls[:1])
    with lab.app.app_context():
        lab.db.create_all()
        ((engine,),) = lab.db.replica_engines.values()
    database.sync()
    server = database.cluster.replicas[0]

    killed: list[int] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def kill(*args: object) -> None:
        if killed:
            return
        for (number,) in server.execute(
            "SELECT id FROM information_schema.processlist WHERE user = 'app'"
        ):
            server.execute(f"KILL {number}")
            killed.append(number)

    with lab.request():
        assert lab.titles() == []
        assert killed
        with lab.db.replica(), pytest.raises(sa.exc.DBAPIError, match=r"(?i)read.only"):
            lab.db.session.execute(sa.text("INSERT INTO post (title) VALUES ('x')"))
    assert lab.checked_out() == 0
    lab.dispose()


def _close_idle_after(wired: Wired, seconds: int) -> None:
    """Have the server close what is idle for longer, of the connections to come."""
    if wired.family == "mysql":
        wired.execute(f"SET GLOBAL wait_timeout = {seconds}")
    else:
        name = wired.database.name
        wired.execute(f"ALTER DATABASE {name} SET idle_session_timeout = '{seconds}s'")


def _count_pings(wired: Wired) -> list[object]:
    """Collects the pings from now on."""
    pings: list[object] = []
    for engine in wired.engines.values():
        dialect: t.Any = engine.dialect
        ping = dialect.do_ping

        def do_ping(connection: object, ping: t.Any = ping) -> t.Any:
            pings.append(connection)
            return ping(connection)

        dialect.do_ping = do_ping
    return pings


def _recycle(engine: sa.Engine) -> float:
    return t.cast(float, t.cast(t.Any, engine.pool)._recycle)
