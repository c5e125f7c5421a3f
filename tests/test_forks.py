"""Forks: a child uses no connection of its parent, and disturbs none, however it ends. I9."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
import typing as t
from pathlib import Path

import pytest
import sqlalchemy as sa

from .apps import Lab
from .forking import FILE_CHILDREN
from .forking import ROWS
from .forking import STREAMED
from .forking import WAYS

if t.TYPE_CHECKING:
    from .servers import Database
    from .servers import MariaDBCluster

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def started(
    *arguments: str, environment: t.Mapping[str, str] | None = None, **options: t.Any
) -> t.Iterator[subprocess.Popen[str]]:
    """A Python program, which is gone afterwards together with all its children."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def forking(kind: str, *urls: str) -> dict[str, t.Any]:
    """What `tests/forking.py` finds. Neither it nor a child of it has said anything else."""
    arguments = ["-W", "default::ResourceWarning", "-m", "tests.forking", kind, *urls]
    with started(*arguments, stdout=subprocess.PIPE) as process:
        found, said = process.communicate(timeout=60)
    assert said == ""
    assert process.returncode == 0
    return t.cast(dict[str, t.Any], json.loads(found))


def run_in_child(
    function: t.Callable[[], None], meanwhile: t.Callable[[], None] = lambda: None
) -> None:
    """Run a function in a child of this process, which ends without what belongs to pytest."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    try:
        meanwhile()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        status = os.waitpid(child, 0)[1]
    assert status == 0


# Children of every kind -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_a_child_disturbs_no_connection(request: pytest.FixtureRequest, kind: str) -> None:
    """Whatever a child does with what it inherits, the parent keeps connections and transactions.

    Collected, closed, used, or left to the interpreter's end; on primary and replica; idle,
    checked out, detached, in the middle of a result. And no child has anything to say of it.
    """
    database: Database[t.Any] = request.getfixturevalue(f"{kind}_database")
    found = forking("servers", database.primary_url, database.replica_urls[0])
    rest = STREAMED - 1 if kind == "mariadb" else 0
    assert found == {way.__name__: {"code": 0, "rest": rest, "same": True} for way in WAYS}
    committed = [title for (title,) in database.execute("SELECT title FROM post ORDER BY title")]
    assert committed == sorted(way.__name__ for way in WAYS for _ in ("session", "connection"))


@pytest.mark.parametrize("is_wal", [False, True], ids=["journal", "wal"])
def test_a_child_does_not_break_a_file(tmp_path: Path, is_wal: bool) -> None:
    """A child rolls back no transaction that its parent has open on a SQLite file.

    It would put back pages that the parent has written, and delete the journal. With a replica the
    file is in WAL mode.
    """
    url = f"sqlite:///{tmp_path}/app.db"
    found = forking("files", url, *[url] * is_wal)
    assert found == {child.__name__: [0, ROWS + 1, "ok"] for child in FILE_CHILDREN}


def test_a_child_has_its_own_locks_on_a_file(tmp_path: Path) -> None:
    """A parent that closes a SQLite file does not take it for unused while its child has it open.

    It would delete the write-ahead log, into which the child then writes for nobody.
    """
    url = f"sqlite:///{tmp_path}/app.db"
    lab = Lab(url, [url])
    with lab.app.app_context():
        lab.db.create_all()
    connected, closed = os.pipe(), os.pipe()

    def child() -> None:
        with lab.app.app_context():
            assert lab.titles() == []
            os.write(connected[1], b"!")
            os.read(closed[0], 1)
            lab.db.session.add(lab.Post(title="child"))
            lab.db.session.commit()

    def close() -> None:
        assert select.select([connected[0]], [], [], 30)[0]
        lab.dispose()
        os.write(closed[1], b"!")

    run_in_child(child, meanwhile=close)
    assert lab.run(lab.titles) == ["child"]
    lab.dispose()
    for descriptor in (*connected, *closed):
        os.close(descriptor)


def test_a_child_has_its_copy_of_a_database_in_memory() -> None:
    """A database in memory is forked as the memory is, as with Flask-SQLAlchemy."""
    lab = Lab("sqlite://")
    with lab.app.app_context():
        lab.db.create_all()
        lab.db.session.add(lab.Post(title="parent"))
        lab.db.session.commit()

    def child() -> None:
        assert lab.run(lab.titles) == ["parent"]

    run_in_child(child)
    lab.dispose()


@pytest.mark.parametrize("kind", ["mariadb", "postgresql"])
def test_a_child_is_refused_the_parents_connection(
    request: pytest.FixtureRequest, kind: str
) -> None:
    """What a child has inherited refuses to be used, and says why; rolled back, it is usable."""
    database: Database[t.Any] = request.getfixturevalue(f"{kind}_database")
    lab = Lab(database.primary_url)
    with lab.app.app_context():
        lab.db.create_all()
        session = lab.db.session()
        session.add(lab.Post(title="parent"))
        session.flush()
        connection = lab.db.engine.connect()
        raw = lab.db.engine.raw_connection()

        def child() -> None:
            for attempt in (session.commit, lambda: connection.execute(sa.select(1)), raw.cursor):
                with pytest.raises(sa.exc.ResourceClosedError, match="was forked from"):
                    attempt()
            session.rollback()
            assert session.scalars(sa.select(lab.Post.title)).all() == []

        run_in_child(child)
        session.commit()
        connection.close()
        raw.close()
    assert database.execute("SELECT title FROM post") == [("parent",)]
    lab.dispose()


def test_a_fork_inherits_no_connection(mariadb_database: Database[MariaDBCluster]) -> None:
    """Four children and their parent use disjoint connections, and none disturbs another."""
    database = mariadb_database
    lab = Lab(database.primary_url, database.replica_urls)
    with lab.app.app_context():
        lab.db.create_all()
    database.sync()

    def connections() -> list[int]:
        with lab.request("POST"):
            primary = lab.db.session.scalar(sa.text("SELECT CONNECTION_ID()"))
        with lab.request(), lab.db.replica():
            lab.db.session.scalar(sa.text("SELECT CONNECTION_ID()"))
        return [int(primary)]

    parent = set(connections())
    pipes = []
    for _ in range(4):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reading)
                seen = [number for _ in range(50) for number in connections()]
                os.write(writing, json.dumps(seen).encode())
                code = 0
            finally:
                os._exit(code)
        os.close(writing)
        pipes.append((child, reading))
    owned: list[set[int]] = []
    for child, reading in pipes:
        with open(reading, "rb") as pipe:
            owned.append(set(json.load(pipe)))
        assert os.waitpid(child, 0)[1] == 0
        parent |= set(connections())
    for one, other in itertools.combinations([parent, *owned], 2):
        assert one.isdisjoint(other)
    assert all(len(ids) == 1 for ids in owned)
    lab.dispose()


def test_a_fork_inside_a_context(mariadb_database: Database[MariaDBCluster]) -> None:
    """A child forked while a session is open has a session of its own; the parent's lives on."""
    lab = Lab(mariadb_database.primary_url)
    with lab.request("POST"):
        lab.db.create_all()
        lab.db.session.add(lab.Post(title="parent"))
        lab.db.session.flush()
        mine = lab.db.session()

        def child() -> None:
            assert lab.db.session() is not mine
            assert lab.titles() == []  # the parent has not committed

        run_in_child(child)
        lab.db.session.commit()
        assert lab.titles() == ["parent"]
    lab.dispose()


# Gunicorn -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--threads", "4"]], ids=["sync", "gthread"])
def test_gunicorn_preload(
    mariadb_database: Database[MariaDBCluster], tmp_path: Path, arguments: list[str]
) -> None:
    """Four workers of an app that was loaded before them share no connection, nor the master's."""
    report = tmp_path / "report.json"
    aborted = aborted_clients(mariadb_database)
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    address = listener.getsockname()
    gunicorn = started(
        *["-m", "gunicorn", "--config", "python:tests.preloaded", "tests.preloaded:app"],
        *[f"--bind=fd://{listener.fileno()}", *arguments],
        environment={
            "PRELOADED_PRIMARY": mariadb_database.primary_url,
            "PRELOADED_REPLICA": mariadb_database.replica_urls[0],
            "PRELOADED_REPORT": str(report),
        },
        pass_fds=[listener.fileno()],
    )
    with listener, gunicorn as process:
        listener.close()  # so that requests fail, instead of waiting, should gunicorn end
        answers = ask_until_all_answer(address, workers=4)
        assert aborted_clients(mariadb_database) == aborted
        process.terminate()
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in log
    assert "ERROR" not in log
    master = json.loads(report.read_text())
    assert master["after"] == master["before"]
    assert mariadb_database.execute("SELECT title FROM post") == [("of the master",)]
    for role in ("primary", "replica"):
        owned: dict[int, set[int]] = {master["pid"]: set(master["before"][role])}
        for answer in answers:
            owned.setdefault(answer["pid"], set()).add(answer[role])
        assert len(owned) == 5
        for one, other in itertools.combinations(owned.values(), 2):
            assert one.isdisjoint(other)


def ask_until_all_answer(address: tuple[str, int], workers: int) -> list[dict[str, int]]:
    """Send requests, several at a time, until each worker has answered one."""

    def ask(number: int) -> dict[str, int]:
        client = http.client.HTTPConnection(*address, timeout=30)
        with contextlib.closing(client):
            client.request("GET", "/")
            response = client.getresponse()
            assert response.status == 200
            return t.cast(dict[str, int], json.load(response))

    answers: list[dict[str, int]] = []
    deadline = time.monotonic() + 30
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        while len({answer["pid"] for answer in answers}) < workers:
            assert time.monotonic() < deadline, f"not all workers have answered: {answers}"
            answers += pool.map(ask, range(40))
    return answers


def aborted_clients(database: Database[t.Any]) -> str:
    """How often a client of the primary has gone without saying so."""
    ((_, number),) = database.execute("SHOW GLOBAL STATUS LIKE 'Aborted_clients'")
    return str(number)
