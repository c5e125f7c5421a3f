"""The board on an SQLite file and on a MariaDB cluster: each test runs on both.

This module owns how a board is made and ended, and how a test asks the database itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import typing as t

import pytest

from examples.board import create_app
from examples.board.models import db

if t.TYPE_CHECKING:
    import collections.abc as c
    from pathlib import Path

    from flask import Flask

    from tests.servers import Database
    from tests.servers import MariaDBCluster

Row = tuple[t.Any, ...]


@dataclasses.dataclass(frozen=True)
class Backend:
    """A database for a board, and a way to ask it that does not lead through the board."""

    primary_url: str
    replica_urls: list[str]
    #: Runs one statement on the primary.
    execute: c.Callable[[str], list[Row]]
    #: Returns when the replicas have what the primary has.
    sync: c.Callable[[], None]

    @property
    def config(self) -> dict[str, t.Any]:
        return {
            "SQLALCHEMY_DATABASE_URI": self.primary_url,
            "COMMONDB_REPLICAS": self.replica_urls,
        }

    def stored(self) -> tuple[set[Row], set[Row]]:
        """All that the tables hold: the authors, and the posts."""
        return (
            set(self.execute("SELECT id, username, email FROM user")),
            set(self.execute("SELECT id, title, content, user_id FROM post")),
        )


@pytest.fixture(params=["sqlite", "mariadb"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    """An empty database: a file that is its own replica, or a cluster."""
    if request.param == "sqlite":
        return sqlite_backend(tmp_path / "board.db")
    database: Database[MariaDBCluster] = request.getfixturevalue("mariadb_database")
    return Backend(database.primary_url, database.replica_urls, database.execute, database.sync)


def sqlite_backend(path: Path) -> Backend:
    """A database file. There is nothing to wait for: a replica reads the same file."""

    def execute(sql: str) -> list[Row]:
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            return connection.execute(sql).fetchall()

    return Backend(f"sqlite:///{path}", [f"sqlite:///{path}"], execute, lambda: None)


@contextlib.contextmanager
def running(config: t.Mapping[str, t.Any]) -> c.Iterator[Flask]:
    """A board that gives back all its connections."""
    app = create_app(config)
    try:
        yield app
    finally:
        with app.app_context():
            for engine in (*db.engines.values(), *db.replica_engines.get(None, ())):
                engine.dispose()


@pytest.fixture
def app(backend: Backend) -> c.Iterator[Flask]:
    """A board with its sample posts, which the replicas have, too."""
    with running({**backend.config, "TESTING": True}) as app:
        backend.sync()
        yield app


@pytest.fixture(autouse=True)
def _push_request_context() -> None:
    """Takes the place of pytest-flask's, which keeps one request context open for a whole test.

    All requests of the test client would share its application context, and with it one session:
    after the first POST no GET would ever read from a replica again.
    """
