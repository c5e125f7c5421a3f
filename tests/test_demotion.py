"""A primary that is none any more: its pool is dropped, and the next unit of work connects anew."""

from __future__ import annotations

import typing as t

import pymysql
import pytest
import sqlalchemy as sa

from flask_commondb.dialects import dialect_for

from .apps import Lab
from .drivers import BINDS
from .drivers import DRIVERS
from .drivers import Wired

if t.TYPE_CHECKING:
    import collections.abc as c

    from .servers import Database
    from .servers import MariaDBCluster
    from .servers import PostgreSQLCluster

READ_ONLY = r"read-only"


class Failover(Wired):
    """The app, and a second server that takes over."""

    def __init__(self, request: pytest.FixtureRequest, driver: str) -> None:
        super().__init__(request, driver)
        self.cluster = self.database.cluster
        self.second = self.cluster.replicas[0]

    def demote(self) -> None:
        """The old primary refuses to write from now on, and closes nothing."""
        if self.family == "mysql":
            self.server.execute("SET GLOBAL read_only = 1")
        else:
            self.server.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            self.server.execute("SELECT pg_reload_conf()")
            self.server.execute("SELECT pg_sleep(0.1)")

    def promote(self) -> None:
        """The second server becomes the primary, under the address of the first."""
        self.cluster.sync()
        if self.family == "mysql":
            self.cluster.stop_replication(self.second)
            self.second.execute("SET GLOBAL read_only = 0")
        else:
            self.second.execute("SELECT pg_promote()")
        self.proxy.target = self.second.port

    def rows(self, server: t.Any, bind_key: str | None = None) -> int:
        table = self.models[bind_key].__tablename__
        ((number,),) = server.execute(f"SELECT COUNT(*) FROM {table}", database=self.database.name)
        return int(number)


@pytest.fixture(params=DRIVERS)
def failover(request: pytest.FixtureRequest) -> c.Iterator[Failover]:
    """The app, once for each driver."""
    failover = Failover(request, request.param)
    yield failover
    failover.dispose()
    if failover.family == "postgresql":
        failover.server.execute("ALTER SYSTEM RESET default_transaction_read_only")
        failover.server.execute("SELECT pg_reload_conf()")
    failover.cluster.rebuild()
    failover.cluster.create_database(failover.database.name)  # which the fixture will drop


def test_failover(failover: Failover) -> None:
    """The first write after a failover is refused, the next goes to the new primary."""
    failover.warm_up(3)
    assert failover.statuses() == [200] * 4
    failover.demote()
    failover.promote()
    for bind_key in BINDS:
        before = failover.rows(failover.second, bind_key)
        path = f"/{bind_key}"
        assert failover.client.get(path).text == str(before)
        assert failover.client.post(path).status_code == 500
        assert failover.client.post(path).status_code == 200
        assert failover.client.get(path).text == str(before + 1)
        assert failover.rows(failover.second, bind_key) == before + 1
        assert failover.rows(failover.server, bind_key) == before


def test_in_one_session(failover: Failover) -> None:
    """The error is the server's; after a rollback the session writes to the new primary."""
    db, model = failover.db, failover.models[None]
    with failover.app.test_request_context(method="POST"):
        assert db.session.scalars(sa.select(model.id)).all() == []
        failover.demote()
        failover.promote()
        db.session.rollback()  # PostgreSQL decides when a transaction begins
        db.session.add(model(id=1))
        with pytest.raises(sa.exc.DBAPIError, match=READ_ONLY) as caught:
            db.session.flush()
        assert caught.value.connection_invalidated
        db.session.rollback()
        with db.transaction() as session:
            session.add(model(id=2))
        assert db.session.scalars(sa.select(model.id)).all() == [2]
    assert failover.rows(failover.second) == 1


def test_raw_cursor(failover: Failover) -> None:
    """What a raw cursor is told counts as well."""
    table = failover.models[None].__tablename__
    failover.warm_up(3)
    failover.demote()
    failover.promote()
    error = failover.engines[None].dialect.loaded_dbapi.Error
    with failover.app.test_request_context(method="POST"):
        with pytest.raises(error, match=READ_ONLY), failover.db.cursor() as cursor:
            cursor.execute(f"INSERT INTO {table} (id) VALUES (1)")
        failover.db.session.rollback()
        with failover.db.transaction(), failover.db.cursor() as cursor:
            cursor.execute(f"INSERT INTO {table} (id) VALUES (2)")
    assert failover.rows(failover.second) == 1


@pytest.mark.parametrize("failover", ["PyMySQL", "mysqlclient"], indirect=True)
def test_at_commit(failover: Failover) -> None:
    """MariaDB refuses the COMMIT of what was written before; nothing of it is left behind."""
    db, model = failover.db, failover.models[None]
    with failover.app.test_request_context(method="POST"):
        db.session.add(model(id=1))
        db.session.flush()
        failover.demote()
        with pytest.raises(sa.exc.DBAPIError, match=READ_ONLY):
            db.session.commit()
        failover.promote()
        db.session.add(model(id=2))
        db.session.commit()
    assert (failover.rows(failover.server), failover.rows(failover.second)) == (0, 1)


def test_replicas_keep_their_pools(mariadb_database: Database[MariaDBCluster]) -> None:
    """A replica is read-only by its nature: that it says so changes nothing."""
    lab = Lab(mariadb_database.primary_url, mariadb_database.replica_urls[:1])
    with lab.app.app_context():
        lab.db.create_all()
        mariadb_database.sync()
    number = sa.text("SELECT CONNECTION_ID()")
    with lab.request(), lab.db.replica():
        before = lab.db.session.scalar(number)
        with pytest.raises(sa.exc.DBAPIError, match=r"READ ONLY transaction|read-only") as caught:
            lab.db.session.execute(sa.text("INSERT INTO post (title) VALUES ('x')"))
        assert not caught.value.connection_invalidated
        lab.db.session.rollback()
        assert lab.db.session.scalar(number) == before
    lab.dispose()


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        (1290, "The MariaDB server is running with the --read-only option so it cannot", True),
        (1290, "The MySQL server is running with the --super-read-only option so it", True),
        (1290, "The MySQL server is running with the --read_only option so it cannot", True),
        (1290, "The MariaDB server is running with the --secure-file-priv option so it", False),
        (1290, "The MariaDB server is running with the --skip-grant-tables option", False),
        (1792, "Cannot execute statement in a READ ONLY transaction", True),
        (1836, "Running in read-only mode", True),
        (1205, "Lock wait timeout exceeded; try restarting transaction", False),
    ],
)
def test_what_demotion_is(code: int, text: str, expected: bool) -> None:
    """An option that forbids something else has the same number, and says another name."""
    engine = sa.create_engine("mysql+pymysql://")
    error = pymysql.err.OperationalError(code, text)
    assert dialect_for(engine).is_demoted(error, None) is expected


def test_read_only_by_choice(postgresql_database: Database[PostgreSQLCluster]) -> None:
    """A transaction that the caller has made read-only says nothing about the server."""
    lab = Lab(postgresql_database.primary_url)
    with lab.app.app_context():
        lab.db.create_all()
    number = sa.text("SELECT pg_backend_pid()")
    with lab.request():
        before = lab.db.session.scalar(number)
        lab.db.session.commit()
        lab.db.session.connection(execution_options={"postgresql_readonly": True})
        lab.db.session.add(lab.Post(title="x"))
        with pytest.raises(sa.exc.DBAPIError, match=READ_ONLY) as caught:
            lab.db.session.flush()
        assert not caught.value.connection_invalidated
        lab.db.session.rollback()
        assert lab.db.session.scalar(number) == before
    lab.dispose()
