"""Connections: replicas cannot write, nor change a commit. I6, I7."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import sqlite3
import threading
import typing as t

import pytest
import sqlalchemy as sa

from .apps import Lab
from .apps import can_say_who

if t.TYPE_CHECKING:
    from pathlib import Path

    from .servers import Database
    from .servers import MariaDBCluster
    from .servers import PostgreSQLCluster

# Read-only by the server's hand ---------------------------------------------------------------

WRITES = [
    "INSERT INTO post (title) VALUES ('x')",
    "UPDATE post SET title = 'x'",
    "DELETE FROM post",
    "CREATE TABLE made (id INTEGER)",
    "ALTER TABLE post ADD COLUMN more INTEGER",
    "DROP TABLE post",
]

MARIADB_WRITES = [
    *WRITES,
    "REPLACE INTO post VALUES (1, 'x')",
    "TRUNCATE TABLE post",
    "SELECT * FROM post FOR UPDATE",
    "CREATE TEMPORARY TABLE made (id INTEGER)",
    "CALL writes()",
]


@pytest.mark.parametrize("user", ["app", "lab"])
def test_mariadb_replica_cannot_write(
    mariadb_database: Database[MariaDBCluster], user: str
) -> None:
    """Nothing written through a replica connection arrives, not even as an all-powerful user."""
    database = mariadb_database
    cluster = database.cluster
    lab = Lab(
        cluster.primary.url(user=user, database=database.name),
        [server.url(user=user, database=database.name) for server in cluster.replicas],
    )
    with lab.app.app_context():
        lab.db.create_all()
    database.execute("CREATE PROCEDURE writes() INSERT INTO post (title) VALUES ('x')")
    database.execute("INSERT INTO post (title) VALUES ('kept')")
    database.sync()
    before = [server.execute("SELECT @@gtid_binlog_pos") for server in cluster.replicas]
    for statement in MARIADB_WRITES:
        with lab.request(), lab.db.replica():
            with pytest.raises(sa.exc.DBAPIError) as caught:
                lab.db.session.execute(sa.text(statement))
            # 1792: read-only transaction; 1290: read-only server, for what it refuses first
            assert caught.value.orig is not None
            assert caught.value.orig.args[0] in ({1792} if user == "lab" else {1792, 1290})
            lab.db.session.rollback()
            assert lab.titles() == ["kept"]
    after = [server.execute("SELECT @@gtid_binlog_pos") for server in cluster.replicas]
    assert after == before
    lab.dispose()


def test_postgresql_replica_cannot_write(postgresql_database: Database[PostgreSQLCluster]) -> None:
    """A replica connection cannot write, even if the server it leads to is no standby."""
    database = postgresql_database
    lab = Lab(database.primary_url, [database.primary_url])
    with lab.app.app_context():
        lab.db.create_all()
        lab.db.session.add(lab.Post(title="kept"))
        lab.db.session.commit()
    for statement in [*WRITES, "SELECT * FROM post FOR UPDATE"]:
        with lab.request(), lab.db.replica():
            with pytest.raises(sa.exc.DBAPIError, match="read-only transaction"):
                lab.db.session.execute(sa.text(statement))
            lab.db.session.rollback()
            assert lab.titles() == ["kept"]
    lab.dispose()


def test_sqlite_replica_cannot_write(tmp_path: Path) -> None:
    """The replica of a SQLite file is a read-only connection to it; the file is in WAL mode."""
    url = f"sqlite:///{tmp_path}/app.db"
    lab = Lab(url, [url])
    with lab.app.app_context():
        lab.db.create_all()
        lab.db.session.add(lab.Post(title="kept"))
        lab.db.session.commit()
        assert lab.db.session.scalar(sa.text("PRAGMA journal_mode")) == "wal"
    for statement in WRITES:
        with lab.request(), lab.db.replica():
            with pytest.raises(sa.exc.OperationalError, match="readonly"):
                lab.db.session.execute(sa.text(statement))
            lab.db.session.rollback()
            assert lab.titles() == ["kept"]
    lab.dispose()


def test_sqlite_locked_while_the_mode_is_set(tmp_path: Path) -> None:
    """A worker that finds the file locked while it would set WAL mode goes on; the next sets it."""
    url = f"sqlite:///{tmp_path}/app.db"
    lab = Lab(url, [url], engine_options={"connect_args": {"timeout": 0.1}})
    with contextlib.closing(sqlite3.connect(tmp_path / "app.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with lab.app.app_context(), lab.db.engine.connect():
            pass
    lab.dispose()
    with lab.app.app_context():
        assert lab.db.session.scalar(sa.text("PRAGMA journal_mode")) == "wal"
    lab.dispose()


def test_sqlite_without_replicas_is_left_alone(tmp_path: Path) -> None:
    """Without replicas a SQLite file keeps the journal mode that it has."""
    lab = Lab(f"sqlite:///{tmp_path}/app.db")
    with lab.app.app_context():
        assert lab.db.session.scalar(sa.text("PRAGMA journal_mode")) == "delete"
    lab.dispose()


# A commit says what the primary did -----------------------------------------------------------

UNITS = int(os.environ.get("COMMONDB_TEST_UNITS", "1000"))


def test_a_replica_cannot_change_a_commit(mariadb_database: Database[MariaDBCluster]) -> None:
    """1,000 units lose their replica connection at every step: commits reported = rows there."""
    database = mariadb_database
    can_say_who(database)
    lab = Lab(database.primary_url, database.replica_urls)
    with lab.app.app_context():
        lab.db.create_all()
    database.sync()
    reported: list[str] = []
    outcomes: dict[str, int] = {}

    def step(name: str, doomed: str) -> None:
        """Kill the unit's replica connection if this is the step for it."""
        if name != doomed:
            return
        for connection in lab.db.session().replica_reads.connections.values():
            driver = t.cast(t.Any, connection.connection.driver_connection)
            server = next(s for s in database.cluster.replicas if s.port == driver.port)
            server.execute(f"KILL {driver.thread_id()}")

    def unit(title: str, doomed: str) -> None:
        session = lab.db.session
        lab.read()
        step("after the first read", doomed)
        lab.read()
        step("before the write", doomed)
        session.add(lab.Post(title=title))
        step("before the flush", doomed)
        session.flush()
        step("after the flush", doomed)
        lab.read()
        step("before the commit", doomed)
        session.commit()
        reported.append(title)
        step("after the commit", doomed)

    steps = itertools.cycle(
        [
            "never",
            "after the first read",
            "before the write",
            "before the flush",
            "after the flush",
            "before the commit",
            "after the commit",
        ]
    )
    for number in range(UNITS):
        doomed = next(steps)
        try:
            lab.run(functools.partial(unit, f"unit {number}", doomed))
            outcome = "reported"
        except sa.exc.DBAPIError:
            outcome = "raised"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        assert lab.checked_out() == 0
    rows = [title for (title,) in database.execute("SELECT title FROM post ORDER BY id")]
    assert rows == reported
    assert outcomes == {"reported": UNITS}
    lab.dispose()


def test_a_read_that_fails_in_flight(mariadb_database: Database[MariaDBCluster]) -> None:
    """A read that is ended after it ran for long, on a server that lives, raises: it may be why it
    was ended. The unit goes on, and its commit holds."""
    database = mariadb_database
    lab = Lab(
        database.primary_url, database.replica_urls, config={"COMMONDB_READ_FUNCTIONS": ["die"]}
    )
    with lab.app.app_context():
        lab.db.create_all()
    # The server hangs up while it is asked: the statement has been sent, no answer comes.
    database.execute(
        "CREATE FUNCTION die() RETURNS INT NOT DETERMINISTIC READS SQL DATA RETURN SLEEP(30)"
    )
    database.sync()
    with lab.request():
        assert lab.titles() == []
        (connection,) = lab.db.session().replica_reads.connections.values()
        driver = t.cast(t.Any, connection.connection.driver_connection)
        server = next(s for s in database.cluster.replicas if s.port == driver.port)
        killer = threading.Timer(1.3, server.execute, [f"KILL {driver.thread_id()}"])
        killer.start()
        with pytest.raises(sa.exc.OperationalError, match="Lost connection"):
            lab.db.session.scalar(sa.select(sa.func.die()))
        killer.join()
        lab.db.session.add(lab.Post(title="kept"))
        lab.db.session.commit()
        assert lab.titles() == ["kept"]
    assert database.execute("SELECT title FROM post") == [("kept",)]
    assert lab.checked_out() == 0
    lab.dispose()


# What a user leaves behind ---------------------------------------------------------------------


def _small(database: Database[MariaDBCluster], replicas: t.Sequence[str] = ()) -> Lab:
    """An app whose pools have one connection each."""
    lab = Lab(database.primary_url, replicas, engine_options={"pool_size": 1, "max_overflow": 0})
    with lab.app.app_context():
        lab.db.create_all()
    database.sync()
    return lab


@pytest.mark.parametrize("way", ["text", "driver"])
def test_autocommit_switched_on_the_primary(
    mariadb_database: Database[MariaDBCluster], way: str
) -> None:
    """A connection that was switched to autocommit is not the next user's: his rollback counts."""
    lab = _small(mariadb_database)
    with lab.request("POST"):
        if way == "text":
            lab.db.session.execute(sa.text("SET autocommit = 1"))
        else:
            with lab.db.cursor() as cursor:
                cursor.connection.autocommit(True)
    with lab.request("POST"):
        lab.db.session.add(lab.Post(title="rolled back"))
        lab.db.session.flush()
        lab.db.session.rollback()
    assert mariadb_database.execute("SELECT * FROM post") == []
    lab.dispose()


def test_autocommit_of_sqlalchemy_is_kept(mariadb_database: Database[MariaDBCluster]) -> None:
    """SQLAlchemy's own switch is undone by itself, and costs no connection."""
    lab = _small(mariadb_database)
    connections = set()
    for _ in range(3):
        with lab.app.app_context():
            engine = lab.db.engine.execution_options(isolation_level="AUTOCOMMIT")
            with engine.connect() as connection:
                connections.add(connection.scalar(sa.text("SELECT CONNECTION_ID()")))
    assert len(connections) == 1
    lab.dispose()


@pytest.mark.parametrize("way", ["text", "driver"])
def test_autocommit_switched_off_on_a_replica(
    mariadb_database: Database[MariaDBCluster], way: str
) -> None:
    """A replica connection that was taken out of autocommit keeps no snapshot for the next user."""
    lab = _small(mariadb_database, mariadb_database.replica_urls[:1])
    with lab.request(), lab.db.replica():
        if way == "text":
            lab.db.session.execute(sa.text("SET autocommit = 0"))
            assert lab.titles() == []
        else:
            with lab.db.cursor() as cursor:
                cursor.connection.autocommit(False)
                cursor.execute("SELECT * FROM post")
    mariadb_database.execute("INSERT INTO post VALUES (1, 'new')")
    mariadb_database.sync()
    assert lab.run(lab.titles) == ["new"]
    lab.dispose()


def test_result_still_being_read_from_a_replica(
    mariadb_database: Database[MariaDBCluster],
) -> None:
    """An unbuffered result that outlives its unit does not go on reading a pooled connection."""
    lab = _small(mariadb_database, mariadb_database.replica_urls[:1])
    mariadb_database.execute("INSERT INTO post SELECT seq, 'x' FROM seq_1_to_20000")
    mariadb_database.sync()
    with lab.request():
        statement = sa.select(lab.Post.id).execution_options(yield_per=5)
        rows = iter(lab.db.session.execute(statement))
        next(rows)
        (connection,) = lab.db.session().replica_reads.connections.values()
        driver = t.cast(t.Any, connection.connection.driver_connection)
        lab.db.session.commit()
        assert not driver.open
        assert lab.checked_out() == 0
    assert lab.run(lambda: len(lab.titles())) == 20000
    del rows
    lab.dispose()


def test_isolation_level_of_a_replica(mariadb_database: Database[MariaDBCluster]) -> None:
    """An isolation level cannot be had on a replica, and the attempt leaks nothing."""
    lab = _small(mariadb_database, mariadb_database.replica_urls[:1])
    options = {"isolation_level": "REPEATABLE READ"}
    for _ in range(3):
        with lab.request(), lab.db.replica():
            with pytest.raises(sa.exc.InvalidRequestError, match="autocommit"):
                lab.db.session.connection(execution_options=options)
        assert lab.checked_out() == 0
    lab.dispose()


# Liveness -------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [False, True], ids=["primary", "replica"])
def test_pooled_connections_killed(
    mariadb_database: Database[MariaDBCluster], replicas: bool
) -> None:
    """Connections that the server has closed while they were idle cost no request an error."""
    database = mariadb_database
    lab = Lab(database.primary_url, database.replica_urls if replicas else ())
    with lab.app.app_context():
        lab.db.create_all()
    database.sync()
    for _ in range(5):
        assert lab.run(lab.titles) == []
        for server in database.cluster.servers:
            for (connection,) in server.execute(
                "SELECT id FROM information_schema.processlist WHERE user = 'app'"
            ):
                server.execute(f"KILL {connection}")
    lab.dispose()


def test_postgresql_pooled_connections_killed(
    postgresql_database: Database[PostgreSQLCluster],
) -> None:
    """The same on PostgreSQL, on the primary and on the standby."""
    database = postgresql_database
    lab = Lab(database.primary_url, database.replica_urls)
    with lab.app.app_context():
        lab.db.create_all()
    database.sync()
    for method in ("GET", "POST") * 3:
        assert lab.run(lab.titles, method) == []
        for server in database.cluster.servers:
            server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'"
            )
    lab.dispose()


# What is not to be lost -----------------------------------------------------------------------


def test_listeners_of_the_user_run(mariadb_database: Database[MariaDBCluster]) -> None:
    """``do_connect`` listeners, which hand in passwords that expire, run before our connect."""
    url = sa.make_url(mariadb_database.primary_url)
    lab = Lab(url.set(password="wrong").render_as_string(hide_password=False))
    asked: list[bool] = []

    def password(dialect: object, record: object, args: object, options: dict[str, t.Any]) -> None:
        asked.append(True)
        options["password"] = url.password

    with lab.app.app_context():
        sa.event.listen(lab.db.engine, "do_connect", password)
        assert lab.db.session.scalar(sa.text("SELECT 1")) == 1
    assert asked == [True]
    lab.dispose()


def test_replica_has_engine_options(mariadb_database: Database[MariaDBCluster]) -> None:
    """A replica has the options of its bind, then its own, but no way to the primary."""
    database = mariadb_database
    calls: list[bool] = []

    def creator() -> t.Any:
        import pymysql

        calls.append(True)
        url = sa.make_url(database.primary_url)
        return pymysql.connect(
            host=url.host,
            port=url.port or 3306,
            user=url.username,
            password=url.password or "",
            database=url.database,
        )

    can_say_who(database)
    lab = Lab(
        database.primary_url,
        [{"url": database.replica_urls[0], "pool_size": 2}, database.replica_urls[1]],
        engine_options={"creator": creator, "pool_size": 3, "isolation_level": "READ COMMITTED"},
    )
    with lab.app.app_context():
        lab.db.create_all()
    database.sync()
    sizes = [t.cast(sa.QueuePool, engine.pool).size() for engine in lab.engines]
    assert sizes == [3, 2, 3]
    calls.clear()
    assert {lab.run(lab.read) for _ in range(20)} == {2, 3}
    assert calls == []
    with lab.app.app_context():
        level = lab.db.session.connection().get_isolation_level()
        assert level == "READ COMMITTED"
    lab.dispose()


def test_password_is_never_logged(
    mariadb_database: Database[MariaDBCluster], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a replica that refuses us nor a repr shows a password."""
    bad = sa.make_url(mariadb_database.replica_urls[0]).set(password="s3cret")
    lab = Lab(
        mariadb_database.primary_url,
        [bad.render_as_string(hide_password=False)],
    )
    with caplog.at_level(logging.DEBUG):
        with lab.request():
            assert lab.db.session.scalar(sa.select(sa.literal(1))) == 1
            shown = repr(lab.db)
        assert "cannot be reached" in caplog.text
    assert "s3cret" not in caplog.text + shown
    assert "app:app" not in shown
    lab.dispose()
