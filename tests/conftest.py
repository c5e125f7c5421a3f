"""Fixtures for tests against real servers.

This module owns when the servers start, that each test finds them whole and its database empty,
and what happens where they are not installed. How a server is run is the business of `servers`.
"""

from __future__ import annotations

import contextlib
import itertools
import sqlite3
import typing as t
import weakref
from pathlib import Path

import pytest
import sqlalchemy as sa

from .apps import Lab
from .apps import can_say_who
from .drivers import DRIVERS
from .drivers import Wired
from .drivers import skip_or_fail
from .proxy import Proxy
from .servers import ClusterT
from .servers import Database
from .servers import MariaDBCluster
from .servers import PostgreSQLCluster
from .servers import ServerMissing
from .servers import split_statements

if t.TYPE_CHECKING:
    import collections.abc as c

    MakeLab = c.Callable[..., Lab]
    MakeProxy = c.Callable[..., Proxy]
    MakeWired = c.Callable[..., Wired]

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def mariadb() -> c.Iterator[MariaDBCluster]:
    """A MariaDB primary with two replicas, started when the first test asks for it."""
    with started(MariaDBCluster()) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def postgresql() -> c.Iterator[PostgreSQLCluster]:
    """A PostgreSQL primary with a standby, started when the first test asks for it."""
    with started(PostgreSQLCluster()) as cluster:
        yield cluster


@pytest.fixture(scope="session", autouse=True)
def _sqlite_closed() -> c.Iterator[c.Callable[[], None]]:
    """Keeps SQLite's connections from being collected: unclosed ones warn from Python 3.13 on."""
    opened: list[tuple[sqlite3.Connection, weakref.ref[object]]] = []

    def note(dbapi_connection: object, entry: object) -> None:
        if isinstance(dbapi_connection, sqlite3.Connection):
            opened.append((dbapi_connection, weakref.ref(entry)))

    def close() -> None:
        """Close those whose pool is gone."""
        for connection, entry in opened[:]:
            if entry() is None:
                opened.remove((connection, entry))
                with contextlib.suppress(sqlite3.ProgrammingError):  # opened by another thread
                    connection.close()

    sa.event.listen(sa.Pool, "connect", note)
    yield close
    sa.event.remove(sa.Pool, "connect", note)
    for connection, _ in opened:
        with contextlib.suppress(sqlite3.ProgrammingError):
            connection.close()


@pytest.fixture(autouse=True)
def _sqlite_closed_in_time(_sqlite_closed: c.Callable[[], None]) -> c.Iterator[None]:
    yield
    _sqlite_closed()


@pytest.fixture
def mariadb_database(mariadb: MariaDBCluster) -> c.Iterator[Database[MariaDBCluster]]:
    """An empty database on a MariaDB cluster that is whole."""
    with clean_database(mariadb) as database:
        yield database


@pytest.fixture
def postgresql_database(postgresql: PostgreSQLCluster) -> c.Iterator[Database[PostgreSQLCluster]]:
    """An empty database on a PostgreSQL cluster that is whole."""
    with clean_database(postgresql) as database:
        yield database


@pytest.fixture
def make_lab(mariadb_database: Database[MariaDBCluster]) -> c.Iterator[MakeLab]:
    """A function that makes the app with its replicas, and more of its configuration."""
    can_say_who(mariadb_database)
    made: list[Lab] = []

    def make(replicas: c.Sequence[t.Any] | None = None, **config: t.Any) -> Lab:
        urls = mariadb_database.replica_urls if replicas is None else replicas
        made.append(Lab(mariadb_database.primary_url, urls, config))
        with made[-1].app.app_context():
            made[-1].db.create_all()
        mariadb_database.sync()
        return made[-1]

    yield make
    for lab in made:
        lab.dispose()


@pytest.fixture
def procedures(mariadb_database: Database[MariaDBCluster]) -> Database[MariaDBCluster]:
    """The test's database, with the procedures of `procedures.sql` on every server."""
    script = Path(__file__).with_name("procedures.sql").read_text(encoding="utf-8")
    for statement in split_statements(script):
        mariadb_database.execute(statement)
    mariadb_database.sync()
    return mariadb_database


@pytest.fixture
def proxy() -> c.Iterator[MakeProxy]:
    """A function that puts a proxy before a port: `proxy(port)`, or `proxy(port, None)`."""
    with contextlib.ExitStack() as stack:
        yield lambda *args: stack.enter_context(Proxy(*args))


@pytest.fixture(params=DRIVERS)
def make_wired(request: pytest.FixtureRequest) -> c.Iterator[MakeWired]:
    """A function that makes the app, once for each driver."""
    made: list[Wired] = []

    def make(**config: t.Any) -> Wired:
        made.append(Wired(request, request.param, **config))
        return made[-1]

    yield make
    for wired in made:
        wired.dispose()


@contextlib.contextmanager
def started(cluster: ClusterT) -> c.Iterator[ClusterT]:
    """Run a cluster; where its programs are missing, skip the test, or fail it under CI."""
    try:
        cluster.start()
    except ServerMissing as error:
        skip_or_fail(str(error))
    try:
        yield cluster
    finally:
        cluster.stop()


@contextlib.contextmanager
def clean_database(cluster: ClusterT) -> c.Iterator[Database[ClusterT]]:
    """Create a database and drop it, on a cluster that is repaired before and after."""
    # Before as well: a test may have used the cluster without asking for a database.
    cluster.repair()
    database = Database(cluster, f"test_{next(_numbers)}")
    cluster.create_database(database.name)
    try:
        yield database
    finally:
        cluster.repair()
        cluster.drop_database(database.name)
