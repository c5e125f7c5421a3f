"""An app with two binds on one real server, reached by each of the drivers through a proxy.

Owns: :class:`Wired`. Must not: know what a test is about.
"""

from __future__ import annotations

import os
import typing as t

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask

from flask_commondb import CommonDB

if t.TYPE_CHECKING:
    from .conftest import MakeProxy


def skip_or_fail(missing: str) -> t.NoReturn:
    """Something is not installed here that the test needs; under CI nothing may be missing."""
    if os.environ.get("CI") == "true":
        pytest.fail(missing)
    pytest.skip(missing)


#: By the driver: SQLAlchemy's name for it, and the fixture of its server.
DRIVERS = {
    "PyMySQL": ("mysql+pymysql", "mariadb_database"),
    "mysqlclient": ("mysql+mysqldb", "mariadb_database"),
    "psycopg": ("postgresql+psycopg", "postgresql_database"),
}

BINDS = (None, "orders")


def import_driver(name: str) -> None:
    """Skip the test where a driver is not installed, or fail it under CI.

    :param name: SQLAlchemy's name for it.
    """
    try:
        sa.make_url(f"{name}://").get_dialect().import_dbapi()
    except ImportError as error:
        skip_or_fail(str(error))


#: What the user of the app has open now.
_CONNECTIONS = {
    "mysql": "SELECT id FROM information_schema.processlist WHERE user = 'app' AND db = DATABASE()",
    "postgresql": "SELECT pid FROM pg_stat_activity WHERE usename = 'app'"
    " AND datname = current_database()",
}

_KILL = {"mysql": "KILL {}", "postgresql": "SELECT pg_terminate_backend({}, 1000)"}


class Wired:
    """The app, its server, and the proxy between them; both binds lead to the same database.

    :param driver: a key of :data:`DRIVERS`.
    :param config: more of ``app.config``.
    """

    def __init__(self, request: pytest.FixtureRequest, driver: str, **config: t.Any) -> None:
        name, fixture = DRIVERS[driver]
        import_driver(name)
        self.database = request.getfixturevalue(fixture)
        self.server = self.database.cluster.primary
        make_proxy: MakeProxy = request.getfixturevalue("proxy")
        self.family = name.partition("+")[0]
        self.proxy = make_proxy(self.server.port, *((None,) if self.family == "postgresql" else ()))
        url = sa.make_url(self.database.primary_url).set(
            drivername=name, host="127.0.0.1", port=self.proxy.port
        )
        self.url = url.render_as_string(hide_password=False)
        self.app = Flask("wired")
        self.app.config.from_mapping(
            SQLALCHEMY_DATABASE_URI=self.url, SQLALCHEMY_BINDS={"orders": self.url}
        )
        self.app.config.from_mapping(config)

        class Base(so.DeclarativeBase):
            pass

        self.db = CommonDB(self.app, model_class=Base)

        class Post(self.db.Model):  # type: ignore[name-defined, misc]
            id: so.Mapped[int] = so.mapped_column(primary_key=True)

        class Order(self.db.Model):  # type: ignore[name-defined, misc]
            __bind_key__ = "orders"
            __tablename__ = "purchase"
            id: so.Mapped[int] = so.mapped_column(primary_key=True)

        self.models: dict[str | None, t.Any] = {None: Post, "orders": Order}
        for bind_key, model in self.models.items():
            self._add_views(bind_key, model)
        plain = sa.create_engine(self.url, poolclass=sa.NullPool)
        for metadata in self.db.metadatas.values():
            metadata.create_all(plain)
        with self.app.app_context():
            self.engines = dict(self.db.engines)
        self.client = self.app.test_client()

    def warm_up(self, connections: int = 3) -> None:
        """Have that many idle connections wait in each pool."""
        for engine in self.engines.values():
            held = [engine.connect() for _ in range(connections)]
            for connection in held:
                connection.close()

    def connections(self) -> set[int]:
        """What the server calls the connections that the app has open."""
        return {number for (number,) in self.execute(_CONNECTIONS[self.family])}

    def kill(self, *connections: int) -> None:
        """Have the server end connections, by default all that the app has."""
        for number in connections or self.connections():
            self.execute(_KILL[self.family].format(number))

    def execute(self, statement: str) -> list[t.Any]:
        """Run a statement as the server's administrator."""
        rows: list[t.Any] = self.server.execute(statement, database=self.database.name)
        return rows

    def statuses(self) -> list[int]:
        """What the next requests get: a read and a write on each bind."""
        answers = [
            self.client.open(f"/{bind_key}", method=method)
            for method in ("GET", "POST")
            for bind_key in BINDS
        ]
        return [answer.status_code for answer in answers]

    def dispose(self) -> None:
        for engine in self.engines.values():
            engine.dispose()

    def _add_views(self, bind_key: str | None, model: t.Any) -> None:
        def read() -> str:
            return str(self.db.session.scalar(sa.select(sa.func.count()).select_from(model)))

        def write() -> str:
            self.db.session.add(model())
            self.db.session.commit()
            return "written"

        self.app.add_url_rule(f"/{bind_key}", f"read_{bind_key}", read, methods=["GET"])
        self.app.add_url_rule(f"/{bind_key}", f"write_{bind_key}", write, methods=["POST"])
