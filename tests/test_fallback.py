"""Reads that find no replica: where they go, how many of them at once, and what the others get."""

from __future__ import annotations

import collections
import threading
import time
import typing as t

import pytest
import sqlalchemy as sa

from flask_commondb import NoReplicaError
from flask_commondb import breakers

from .apps import Lab

if t.TYPE_CHECKING:
    from .conftest import MakeLab
    from .servers import Database
    from .servers import MariaDBCluster

PRIMARY = 1
REPLICAS = {2, 3}


@pytest.fixture
def make_alone(
    make_lab: MakeLab, mariadb_database: Database[MariaDBCluster]
) -> t.Callable[..., Lab]:
    """A function that makes the app; then all replicas are down."""

    def make(**config: t.Any) -> Lab:
        lab = make_lab(COMMONDB_READ_FUNCTIONS=["who", "sleep"], **config)
        with lab.app.app_context():
            lab.db.session.add(lab.Post(title="first"))
            lab.db.session.commit()
        for replica in mariadb_database.cluster.replicas:
            replica.kill()
        return lab

    return make


def test_primary(make_alone: t.Callable[..., Lab]) -> None:
    """By default the primary answers, without a limit of ours."""
    lab = make_alone()
    with lab.request():
        assert lab.read() == PRIMARY
        assert lab.read() == PRIMARY


@pytest.mark.parametrize("fallback", ["error", "stale"])
def test_no_fallback(make_alone: t.Callable[..., Lab], fallback: str) -> None:
    """Otherwise the read raises, as there is no replica that could be behind; writes go on."""
    lab = make_alone(COMMONDB_FALLBACK=fallback)
    with lab.request():
        for _ in range(2):
            with pytest.raises(NoReplicaError, match="No replica of bind None can be reached"):
                lab.read()
        with lab.db.primary():
            assert lab.read() == PRIMARY
        lab.db.session.add(lab.Post(title="second"))
        lab.db.session.commit()
        assert lab.read() == PRIMARY  # as it has written
    assert lab.checked_out() == 0


def test_scope(make_alone: t.Callable[..., Lab]) -> None:
    """A scope says it for its block; what the unit of work does after that is not concerned."""
    lab = make_alone()
    with lab.app.app_context():
        with lab.db.replica(fallback="error"):
            with pytest.raises(NoReplicaError, match="No replica of bind None can be reached"):
                lab.read()
            with lab.db.replica(fallback="primary"):
                assert lab.read() == PRIMARY
        assert lab.read() == PRIMARY


def test_error_is_at_once(
    make_alone: t.Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is known that all are down, a read that may not fall back tries to reach nobody."""
    # However slow this machine is just now, no replica is due for its next trial yet.
    monkeypatch.setattr(breakers, "FIRST_PAUSE", 60.0)
    lab = make_alone(COMMONDB_FALLBACK="error")
    with pytest.raises(NoReplicaError, match="can be reached"):
        lab.run(lab.read)
    for replica in lab.db.routers[lab.app].replicas.values():
        sa.event.listen(replica.engine, "do_connect", _must_not_connect)
    for _ in range(20):
        with pytest.raises(NoReplicaError, match="can be reached"):
            lab.run(lab.read)


def _must_not_connect(*args: t.Any) -> t.NoReturn:
    raise AssertionError("nobody should be reached")


def test_limit(
    make_alone: t.Callable[..., Lab], mariadb_database: Database[MariaDBCluster]
) -> None:
    """Never more than the limit read from the primary at once for want of a replica, as its own
    list of processes says; the others get their error at once, and writes are not held up."""
    limit = 3
    lab = make_alone(COMMONDB_FALLBACK_LIMIT=limit, SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 20})
    outcomes: collections.Counter[str] = collections.Counter()
    most = 0
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                with lab.request():
                    lab.db.session.scalar(sa.select(sa.func.sleep(0.05)))
                outcomes["read"] += 1
            except NoReplicaError as error:
                outcomes[f"refused by {error.limit}"] += 1
                time.sleep(0.01)

    def keep_writing() -> None:
        while not stop.is_set():
            with lab.request("POST"):
                lab.db.session.add(lab.Post(title="x"))
                lab.db.session.commit()
            outcomes["written"] += 1

    threads = [threading.Thread(target=read) for _ in range(16)]
    threads.append(threading.Thread(target=keep_writing))
    for thread in threads:
        thread.start()
    for _ in range(20):
        time.sleep(0.05)
        ((reading,),) = mariadb_database.cluster.primary.execute(
            "SELECT COUNT(*) FROM information_schema.processlist"
            " WHERE user = 'app' AND info LIKE 'SELECT sleep%%'"
        )
        most = max(most, reading)
    stop.set()
    for thread in threads:
        thread.join()
    assert most == limit
    assert outcomes["read"] > 20
    assert outcomes["refused by 3"] > 100
    assert outcomes["written"] > 20
    assert lab.checked_out() == 0


@pytest.mark.parametrize("end", ["commit", "rollback", "close", "remove", "context"])
def test_a_place_is_given_back(make_alone: t.Callable[..., Lab], end: str) -> None:
    """A unit of work keeps its place as long as its transaction, in all sessions of its own."""
    lab = make_alone(COMMONDB_FALLBACK_LIMIT=1)

    def another() -> int:
        answers: list[int] = []

        def work() -> None:
            try:
                answers.append(lab.run(lab.read))
            except NoReplicaError:
                answers.append(0)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return answers[0]

    with lab.request():
        assert lab.read() == PRIMARY
        assert another() == 0
        assert lab.read() == PRIMARY
        if end != "context":
            getattr(lab.db.session, end)()
            assert another() == PRIMARY
            assert lab.read() == PRIMARY  # it takes a place again
            assert another() == 0
    assert another() == PRIMARY


def test_a_place_after_an_error(make_alone: t.Callable[..., Lab]) -> None:
    """A statement that fails, or that is never sent, keeps no place for longer than its unit."""
    lab = make_alone(COMMONDB_FALLBACK_LIMIT=1)
    for _ in range(3):
        with lab.request():
            with pytest.raises(sa.exc.ProgrammingError, match="nowhere"):
                lab.db.session.execute(sa.select(sa.table("nowhere", sa.column("id"))))
    for _ in range(3):
        with lab.request():
            lab.db.session.get_bind(clause=sa.select(lab.Post))
    assert lab.run(lab.read) == PRIMARY


def test_a_write_needs_no_place(make_alone: t.Callable[..., Lab]) -> None:
    """Who writes is not counted, nor what is read after that."""
    lab = make_alone(COMMONDB_FALLBACK_LIMIT=1)
    inside = threading.Event()
    leave = threading.Event()

    def occupy() -> None:
        with lab.request():
            lab.read()
            inside.set()
            leave.wait()

    thread = threading.Thread(target=occupy)
    thread.start()
    inside.wait()
    try:
        with lab.request():
            with pytest.raises(NoReplicaError, match="The 1 that COMMONDB_FALLBACK_LIMIT allows"):
                lab.read()
            lab.db.session.add(lab.Post(title="second"))
            lab.db.session.commit()
            with lab.routes() as routes:
                assert lab.read() == PRIMARY
            assert routes == [("primary", "write")]
    finally:
        leave.set()
        thread.join()


def test_one_that_fell_back_and_writes(make_alone: t.Callable[..., Lab]) -> None:
    """A unit of work that reads from the primary for want of a replica may write there."""
    lab = make_alone()
    with lab.request(), lab.routes() as routes:
        lab.read()
        lab.db.session.add(lab.Post(title="second"))
        lab.db.session.flush()
        assert lab.titles() == ["first", "second"]
        lab.db.session.commit()
    assert routes == [("primary", "replica_down"), ("primary", "write"), ("primary", "write")]


def test_a_unit_has_one_place(make_alone: t.Callable[..., Lab]) -> None:
    """All sessions of a unit of work share its place, and the last that ends gives it back."""
    lab = make_alone(COMMONDB_FALLBACK_LIMIT=1)
    who = sa.select(sa.func.who())
    slots = lab.db.routers[lab.app].replica_sets[None].slots
    with lab.request():
        assert lab.read() == PRIMARY
        assert lab.db.sessions[None].scalar(who) == PRIMARY
        assert lab.db.stream(who).scalars().__next__() == PRIMARY
        lab.db.session.commit()
        assert slots.take() is None
        lab.db.sessions[None].commit()
        assert slots.take() is not None


def test_a_cursor_is_a_read_that_falls_back(make_alone: t.Callable[..., Lab]) -> None:
    """A cursor in ``db.replica()`` falls back as a statement does, and is counted as one."""
    lab = make_alone(COMMONDB_FALLBACK_LIMIT=1)
    slots = lab.db.routers[lab.app].replica_sets[None].slots
    with lab.request(), lab.db.replica(), lab.routes() as routes:
        assert lab.read() == PRIMARY
        lab.db.session.commit()
        with lab.db.cursor() as cursor:
            cursor.execute("SELECT who()")
            assert cursor.fetchone() == (PRIMARY,)
        assert slots.take() is None
        assert lab.read() == PRIMARY
    assert routes == [("primary", "replica_down")] * 3
