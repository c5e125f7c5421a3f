"""Replicas that are added, drained and removed while the app runs."""

from __future__ import annotations

import gc
import threading
import time
import typing as t

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy.record_queries import get_recorded_queries

from flask_commondb import ConfigError
from flask_commondb import UnknownBindError
from flask_commondb import UnknownReplicaError

from .apps import Lab
from .apps import busy
from .apps import can_say_who
from .servers import wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from .servers import Database
    from .servers import MariaDBCluster
    from .servers import MariaDBServer

PRIMARY = 1


@pytest.fixture
def lab(mariadb_database: Database[MariaDBCluster]) -> t.Iterator[Lab]:
    """An app that begins with the first replica alone, and goes by weight: not by which of them
    happens to be the slower one on a busy machine."""
    can_say_who(mariadb_database)
    config = {
        "SQLALCHEMY_ENGINE_OPTIONS": {"pool_size": 10},
        "SQLALCHEMY_RECORD_QUERIES": True,
        "COMMONDB_POLICY": "random_of_two",
    }
    lab = Lab(mariadb_database.primary_url, mariadb_database.replica_urls[:1], config)
    with lab.app.app_context():
        lab.db.create_all()
        lab.db.session.add(lab.Post(title="first"))
        lab.db.session.commit()
    mariadb_database.sync()
    yield lab
    lab.dispose()
    for replica in list(lab.db.routers[lab.app].replicas.values()):
        replica.engine.dispose()


def connections(server: MariaDBServer, database: str) -> int:
    ((number,),) = server.execute(
        "SELECT COUNT(*) FROM information_schema.processlist WHERE user = 'app' AND db = %s",
        database,
    )
    return int(number)


def test_under_load(lab: Lab, mariadb_database: Database[MariaDBCluster]) -> None:
    """A replica comes and goes again and again under 8 threads: no error; while it is there it is
    read from, and soon after it has been removed it has no connection left."""
    second = mariadb_database.cluster.replicas[1]
    url = mariadb_database.replica_urls[1]
    seen: list[int] = []

    def read() -> None:
        with lab.request():
            first = lab.read()
            seen.append(first)
            assert lab.read() in (first, PRIMARY)  # which a removal may have in between

    with busy(8, read):
        for drains in (True, False, True, False):
            with lab.app.app_context():
                name = lab.db.add_replica(url)
            seen.clear()
            wait_until(lambda: seen.count(second.server_id) > 20, "it to be read from")
            with lab.app.app_context():
                if drains:
                    lab.db.drain_replica(name)
                    time.sleep(0.3)
                    seen.clear()
                    time.sleep(0.1)
                    assert set(seen) == {2}
                lab.db.remove_replica(name)
            wait_until(
                lambda: connections(second, mariadb_database.name) == 0, "its connections to close"
            )
            time.sleep(0.3)  # who has read there goes on to the end of his unit of work
            seen.clear()
            time.sleep(0.1)
            assert set(seen) == {2}
    assert lab.checked_out() == 0


def test_drain(lab: Lab, mariadb_database: Database[MariaDBCluster]) -> None:
    """A unit of work that reads from a replica that is drained ends there; a new one does not
    begin there, until it is used again."""
    with lab.app.app_context():
        name = lab.db.add_replica({"url": mariadb_database.replica_urls[1], "weight": 1000})
    with lab.request():
        assert lab.read() == 3
        lab.db.drain_replica(name)
        assert lab.read() == 3
        lab.db.session.commit()
        assert lab.read() == 3
        states = {status.server: status.state for status in lab.db.server_status()}
        assert states[name] == "draining"
    assert {lab.run(lab.read) for _ in range(10)} == {2}
    with lab.app.app_context():
        lab.db.resume_replica(name)
    assert 3 in {lab.run(lab.read) for _ in range(10)}


@pytest.mark.parametrize("ends", [False, True])
def test_remove_in_the_middle(
    lab: Lab, mariadb_database: Database[MariaDBCluster], ends: bool
) -> None:
    """A unit of work whose replica is removed goes on on the primary, never on another replica, be
    its transaction at an end or not."""
    with lab.app.app_context():
        name = lab.db.add_replica({"url": mariadb_database.replica_urls[1], "weight": 1000})
    with lab.request():
        assert lab.read() == 3
        lab.db.remove_replica(name)
        if ends:
            lab.db.session.commit()
        assert lab.read() == PRIMARY
    assert lab.checked_out() == 0
    assert connections(mariadb_database.cluster.replicas[1], mariadb_database.name) == 0


def test_again_and_again(lab: Lab, mariadb_database: Database[MariaDBCluster]) -> None:
    """Nothing is left of the replicas that come and go: neither they, nor listeners of the
    primary's engine."""
    primary = t.cast(t.Any, lab.engines[0])
    before = len(list(primary.pool.dispatch.connect))
    for _ in range(3):
        with lab.app.app_context():
            (name,) = [each.server for each in lab.db.server_status() if each.role == "replica"]
            lab.db.remove_replica(name)
        assert lab.run(lab.read) == PRIMARY
        with lab.app.app_context():
            lab.db.add_replica(mariadb_database.replica_urls[0])
        assert lab.run(lab.read) == 2
    assert len(list(primary.pool.dispatch.connect)) == before
    del lab.engines[1:]
    gc.collect()
    assert len(lab.db.routers[lab.app].replicas) == 1


def test_remove_the_last(lab: Lab, mariadb_database: Database[MariaDBCluster]) -> None:
    """Without replicas a bind is as if it never had any, and may get some again."""
    with lab.app.app_context():
        (name,) = [s.server for s in lab.db.server_status() if s.role == "replica"]
        lab.db.remove_replica(name)
        assert lab.db.replica_engines == {}
    with lab.routes() as routes:
        assert lab.run(lab.read) == PRIMARY
    assert routes == []
    with lab.app.app_context():
        lab.db.add_replica(mariadb_database.replica_urls[0])
    assert lab.run(lab.read) == 2


def test_what_is_added_is_whole(lab: Lab, mariadb_database: Database[MariaDBCluster]) -> None:
    """An added replica has the bind's options, is read-only, recorded, watched and closed."""
    with lab.app.app_context():
        name = lab.db.add_replica({"url": mariadb_database.replica_urls[1], "pool_timeout": 7})
        engine = lab.db.replica_engines[None][1]
        pool = t.cast(t.Any, engine.pool)
        assert (pool.size(), pool._timeout) == (10, 7)
        first = lab.db.replica_engines[None][0]
        lab.db.remove_replica(f"{first.url.host}:{first.url.port}")
        with lab.db.replica():
            assert lab.read() == 3
            with pytest.raises(sa.exc.OperationalError, match="read-only"):
                lab.db.session.execute(sa.text("DELETE FROM post"))
            assert "count(post.id)" in str(get_recorded_queries()[0].statement)
        assert [status.server for status in lab.db.pool_status()][1:] == [name]
    assert lab.checked_out() == 0


def test_bad_input(lab: Lab, mariadb_database: Database[MariaDBCluster]) -> None:
    """What cannot be added or is not there says so, and nothing changes."""
    with lab.app.app_context():
        before = lab.db.server_status()
        with pytest.raises(ConfigError, match="a sqlite server is no replica of a mysql server"):
            lab.db.add_replica("sqlite:///some.db")
        with pytest.raises(ConfigError, match="'weight' must be a number above 0"):
            lab.db.add_replica({"url": mariadb_database.replica_urls[1], "weight": 0})
        with pytest.raises(ConfigError, match="'pool_sise' is no option of a replica"):
            lab.db.add_replica({"url": mariadb_database.replica_urls[1], "pool_sise": 1})
        with pytest.raises(ValueError, match=r"reads from .* already"):
            lab.db.add_replica(mariadb_database.replica_urls[0])
        with pytest.raises(UnknownBindError, match="Bind key 'orders'"):
            lab.db.add_replica(mariadb_database.replica_urls[1], bind_key="orders")
        for method in (lab.db.drain_replica, lab.db.resume_replica, lab.db.remove_replica):
            with pytest.raises(UnknownReplicaError, match=r"no replica 'nowhere:1'; it has '127"):
                method("nowhere:1")
            with pytest.raises(KeyError, match="Bind 'orders' has no replica"):
                method("nowhere:1", bind_key="orders")
        assert [s._replace(statements=0) for s in lab.db.server_status()] == [
            s._replace(statements=0) for s in before
        ]


def test_by_many_at_once(lab: Lab, mariadb_database: Database[MariaDBCluster]) -> None:
    """When several add and remove the same replica, it is there once, or not at all."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(6)
    (name,) = {f"127.0.0.1:{mariadb_database.cluster.replicas[1].port}"}

    def work(index: int) -> None:
        with lab.app.app_context():
            for _ in range(20):
                barrier.wait()
                try:
                    if index % 2:
                        lab.db.add_replica(mariadb_database.replica_urls[1])
                    else:
                        lab.db.remove_replica(name)
                except (ValueError, UnknownReplicaError):
                    pass  # another one was faster
                except BaseException as error:
                    errors.append(error)
                    raise
                names = [status.server for status in lab.db.server_status()]
                if names.count(name) > 1:
                    errors.append(AssertionError(names))

    threads = [threading.Thread(target=work, args=[index]) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_another_dbs_app(lab: Lab) -> None:
    """What is asked about an app that the ``db`` does not have says so."""
    for method in (lab.db.server_status, lab.db.pool_status):
        with pytest.raises(RuntimeError, match="not registered with this 'CommonDB' instance"):
            method(Flask("other"))


def test_two_apps(lab: Lab, mariadb_database: Database[MariaDBCluster]) -> None:
    """What is added to one app is not added to another one of the same ``db``."""
    other = Flask("other")
    other.config.from_mapping(
        SQLALCHEMY_DATABASE_URI=mariadb_database.primary_url,
        COMMONDB_REPLICAS=mariadb_database.replica_urls[:1],
    )
    lab.db.init_app(other)
    with lab.app.app_context():
        lab.db.add_replica(mariadb_database.replica_urls[1])
        assert len(lab.db.server_status()) == 3
    with other.app_context():
        assert len(lab.db.server_status()) == 2
        lab.db.engine.dispose()
        for engine in lab.db.replica_engines[None]:
            engine.dispose()


def test_sqlite(tmp_path: Path) -> None:
    """A database file that gets its first replica is put into WAL mode, and its reads go there."""
    file = f"sqlite:///{tmp_path}/app.db"
    lab = Lab(file)
    with lab.app.app_context():
        lab.db.create_all()
        lab.db.session.add(lab.Post(title="first"))
        lab.db.session.commit()
        assert lab.db.session.scalar(sa.text("PRAGMA journal_mode")) == "delete"
        lab.db.session.remove()
        assert lab.db.add_replica(file) == "app.db"
        assert lab.db.session.scalar(sa.text("PRAGMA journal_mode")) == "wal"
    with lab.request(), lab.routes() as routes:
        assert lab.titles() == ["first"]
        assert lab.db.explain_route(sa.select(lab.Post))[:4] == (None, "replica", "app.db", "read")
    assert routes == [("replica", "read")]
    with lab.app.app_context():
        lab.db.remove_replica("app.db")
    lab.dispose()
