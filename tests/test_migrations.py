"""DDL, Alembic and Flask-Migrate use the primaries, wherever reads go.

Four binds: two on MariaDB with replicas, one there without, one on PostgreSQL with a standby. In
most tests the replicas stand still meanwhile: what is taken from them is old, and shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import typing as t
from pathlib import Path

import alembic.command
import alembic.config
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask

from flask_commondb import CommonDB

from .logs import Logs

if t.TYPE_CHECKING:
    import collections.abc as c

    from .servers import Database
    from .servers import MariaDBCluster
    from .servers import PostgreSQLCluster

BINDS = (None, "orders", "legacy", "archive")

#: By bind, the table of its only model.
TABLES = {None: "post", "orders": "purchase", "legacy": "item", "archive": "entry"}

REPLICAS = (2, 3)


class Site:
    """The servers of an app with four binds, its settings, and what its servers have done."""

    def __init__(
        self, mariadb: Database[MariaDBCluster], postgresql: Database[PostgreSQLCluster]
    ) -> None:
        self.mariadb, self.postgresql = mariadb, postgresql
        self.cluster = mariadb.cluster
        self.databases: dict[str | None, str] = {None: mariadb.name}
        for bind_key in ("orders", "legacy"):
            self.databases[bind_key] = f"{mariadb.name}_{bind_key}"
            self.cluster.create_database(self.databases[bind_key])
        postgresql.execute(
            f"ALTER ROLE app IN DATABASE {postgresql.name} SET log_statement = 'all'"
        )
        postgresql.sync()
        self.logs = Logs(self.cluster)
        self._standby_log = len(postgresql.cluster.standby.log)

    @property
    def config(self) -> dict[str, t.Any]:
        def urls(bind_key: str | None) -> list[str]:
            return [
                server.url(database=self.databases[bind_key]) for server in self.cluster.servers
            ]

        return {
            "SQLALCHEMY_DATABASE_URI": urls(None)[0],
            "COMMONDB_REPLICAS": urls(None)[1:],
            "SQLALCHEMY_BINDS": {
                "orders": {"url": urls("orders")[0], "replicas": urls("orders")[1:]},
                "legacy": urls("legacy")[0],
                "archive": {
                    "url": self.postgresql.primary_url,
                    "replicas": self.postgresql.replica_urls,
                },
            },
        }

    def tables(self, bind_key: str | None, server: int = 0) -> set[str]:
        """The tables of a bind on a server: the primary, or the replica of that number."""
        cluster: t.Any = self.postgresql.cluster if bind_key == "archive" else self.cluster
        name = self.postgresql.name if bind_key == "archive" else self.databases[bind_key]
        schema = "'public'" if bind_key == "archive" else "DATABASE()"
        rows = cluster.servers[server].execute(
            f"SELECT table_name FROM information_schema.tables WHERE table_schema = {schema}",
            database=name,
        )
        return {table for (table,) in rows}

    def stop_replication(self) -> None:
        for replica in self.cluster.replicas:
            replica.execute("STOP SLAVE")
        self.postgresql.cluster.standby.execute("SELECT pg_wal_replay_pause()")

    def start_replication(self) -> None:
        for replica in self.cluster.replicas:
            self.cluster.start_replication(replica)
        self.postgresql.cluster.standby.execute("SELECT pg_wal_replay_resume()")
        self.cluster.sync()
        self.postgresql.sync()

    def assert_replicas_untouched(self) -> None:
        """No replica has executed anything for the app since the last time."""
        assert self.logs.take().keys() <= {1}
        log = self.postgresql.cluster.standby.log
        assert "LOG:  statement" not in log[self._standby_log :]
        assert "LOG:  execute" not in log[self._standby_log :]
        self._standby_log = len(log)

    def assert_only_replicated(self) -> None:
        """What the replicas' binary logs hold comes from the primary, and nothing has stopped."""
        self.cluster.sync()
        for replica in self.cluster.replicas:
            assert self.logs.origin(replica.server_id) == 1
            status = replica.slave_status()
            assert (status["Last_SQL_Errno"], status["Slave_SQL_Running"]) == (0, "Yes")

    def close(self) -> None:
        self.logs.close()
        self.start_replication()
        for bind_key in ("orders", "legacy"):
            self.cluster.drop_database(self.databases[bind_key])


@pytest.fixture
def site(
    mariadb_database: Database[MariaDBCluster], postgresql_database: Database[PostgreSQLCluster]
) -> c.Iterator[Site]:
    site = Site(mariadb_database, postgresql_database)
    yield site
    site.close()


class App:
    """The app in this process."""

    def __init__(self, config: t.Mapping[str, t.Any]) -> None:
        self.app = Flask("migrations")
        self.app.config.from_mapping(config)

        class Base(so.DeclarativeBase):
            pass

        self.db = CommonDB(self.app, model_class=Base)
        for bind_key, name in TABLES.items():
            self.db.Table(
                name,
                sa.Column("id", sa.Integer, primary_key=True),
                sa.Column("title", sa.String(50), index=True),
                bind_key=bind_key,
            )

    def dispose(self) -> None:
        with self.app.app_context():
            for engine in self.db.engines.values():
                engine.dispose()
            for engines in self.db.replica_engines.values():
                for engine in engines:
                    engine.dispose()


@pytest.fixture
def local(site: Site) -> c.Iterator[App]:
    local = App(site.config)
    yield local
    local.dispose()


@pytest.fixture(params=["GET", "db.replica()"])
def reading(request: pytest.FixtureRequest, local: App) -> c.Iterator[CommonDB]:
    """Where reads go to replicas: in a GET, and in a scope that says so."""
    if request.param == "GET":
        with local.app.test_request_context():
            yield local.db
    else:
        with local.app.app_context(), local.db.replica():
            yield local.db


def test_create_reflect_drop(site: Site, reading: CommonDB) -> None:
    """``create_all()``, ``reflect()`` and ``drop_all()`` only ask and change the primaries."""
    site.stop_replication()
    reading.create_all()
    reading.create_all()  # finds them, so that it has looked where they are
    for bind_key, name in TABLES.items():
        assert site.tables(bind_key) == {name}
        assert site.tables(bind_key, -1) == set()
    for metadata in reading.metadatas.values():
        metadata.clear()
    reading.reflect()
    assert {key: set(metadata.tables) for key, metadata in reading.metadatas.items()} == {
        key: {name} for key, name in TABLES.items()
    }
    site.start_replication()
    assert [site.tables(bind_key, -1) for bind_key in BINDS] == [{TABLES[key]} for key in BINDS]
    site.stop_replication()
    reading.drop_all()
    assert [site.tables(bind_key) for bind_key in BINDS] == [set()] * len(BINDS)
    site.assert_replicas_untouched()
    site.start_replication()
    site.assert_only_replicated()


def test_ddl_in_a_session(site: Site, reading: CommonDB) -> None:
    """DDL that a session executes is the primary's, and so is what the unit reads after it."""
    for bind_key in BINDS:
        (table,) = reading.metadatas[bind_key].sorted_tables
        site.stop_replication()
        reading.session.execute(sa.schema.CreateTable(table))
        for index in table.indexes:
            reading.session.execute(sa.schema.CreateIndex(index))
        assert reading.session.execute(sa.select(table)).all() == []
        reading.session.execute(sa.schema.DropTable(table))
        reading.session.commit()
        site.start_replication()
    site.assert_replicas_untouched()
    site.assert_only_replicated()


def test_reads_still_go_to_replicas(site: Site, local: App) -> None:
    """The log would show it: a read in the same app is a replica's."""
    with local.app.app_context():
        local.db.create_all()
    site.start_replication()
    site.logs.take()
    with local.app.test_request_context():
        for metadata in local.db.metadatas.values():
            assert local.db.session.execute(sa.select(*metadata.sorted_tables)).all() == []
    assert set(site.logs.take()) > {1}
    with pytest.raises(AssertionError, match="LOG:  "):
        site.assert_replicas_untouched()


def test_no_replica_among_the_engines(site: Site, local: App) -> None:
    """``db.engines``, which migration tools go by, has one engine for each bind: the primary's."""
    with local.app.app_context():
        found = {
            key: (engine.url.port, engine.url.database) for key, engine in local.db.engines.items()
        }
    archive = (site.postgresql.cluster.primary.port, site.postgresql.name)
    assert found.pop("archive") == archive
    assert found == {key: (site.cluster.primary.port, name) for key, name in site.databases.items()}


# --- Alembic -------------------------------------------------------------------------------------

ENVIRONMENT = """
from alembic import context

context.configure(connection=context.config.attributes["connection"], render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
"""

REVISION = """
import sqlalchemy as sa
from alembic import op

revision = "1"
down_revision = None


def upgrade():
    op.create_table("made", sa.Column("id", sa.Integer, primary_key=True))
    with op.batch_alter_table("made", recreate="always") as batch:
        batch.add_column(sa.Column("title", sa.String(50)))


def downgrade():
    op.drop_table("made")
"""


@pytest.mark.parametrize("bind_key", [None, "archive"])
def test_alembic(site: Site, reading: CommonDB, tmp_path: Path, bind_key: str | None) -> None:
    """Alembic's own commands on a bind's engine, with tables that are copied to be altered."""
    (tmp_path / "versions").mkdir()
    (tmp_path / "env.py").write_text(ENVIRONMENT)
    (tmp_path / "versions" / "one.py").write_text(REVISION)
    config = alembic.config.Config()
    config.set_main_option("script_location", str(tmp_path))
    site.stop_replication()
    with reading.engines[bind_key].connect() as config.attributes["connection"]:
        alembic.command.upgrade(config, "head")
        alembic.command.upgrade(config, "head")  # there is nothing left to do, the primary says
    assert site.tables(bind_key) == {"made", "alembic_version"}
    assert site.tables(bind_key, -1) == set()
    site.assert_replicas_untouched()
    site.start_replication()
    assert site.tables(bind_key, -1) == {"made", "alembic_version"}
    with reading.engines[bind_key].connect() as config.attributes["connection"]:
        alembic.command.downgrade(config, "base")
    assert site.tables(bind_key) == {"alembic_version"}
    site.assert_only_replicated()


# --- Flask-Migrate -------------------------------------------------------------------------------

SITE = """
import json

import flask_migrate
import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask

from flask_commondb import CommonDB

app = Flask(__name__)
app.config.from_file("config.json", json.load)
app.config.from_prefixed_env()


class Base(so.DeclarativeBase):
    pass


db = CommonDB(app, model_class=Base)
migrate = flask_migrate.Migrate(app, db)


class Post(db.Model):
    id: so.Mapped[int] = so.mapped_column(primary_key=True)
    title: so.Mapped[str] = so.mapped_column(sa.String(50), index=True)
    if app.config.get("LATER"):
        body: so.Mapped[str | None] = so.mapped_column(sa.String(50))


class Purchase(db.Model):
    __bind_key__ = "orders"
    id: so.Mapped[int] = so.mapped_column(primary_key=True)
    if app.config.get("LATER"):
        body: so.Mapped[str | None] = so.mapped_column(sa.String(50))


class Item(db.Model):
    __bind_key__ = "legacy"
    id: so.Mapped[int] = so.mapped_column(primary_key=True)


class Entry(db.Model):
    __bind_key__ = "archive"
    id: so.Mapped[int] = so.mapped_column(primary_key=True)
    if app.config.get("LATER"):
        body: so.Mapped[str | None] = so.mapped_column(sa.String(50))


@app.cli.command()
def careless():
    with db.replica():
        flask_migrate.migrate(message="second")
        flask_migrate.upgrade()
        flask_migrate.current()
"""


class Project:
    """A directory with an app, where ``flask`` commands are run."""

    def __init__(self, directory: Path, site: Site) -> None:
        self.directory = directory
        (directory / "board.py").write_text(textwrap.dedent(SITE))
        (directory / "config.json").write_text(json.dumps(site.config))

    def flask(self, *arguments: str, later: bool = False) -> str:
        """What a command says; it must succeed."""
        done = subprocess.run(
            [sys.executable, "-m", "flask", "--app", "board", *arguments],
            cwd=self.directory,
            env={**os.environ, **({"FLASK_LATER": "true"} if later else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def revisions(self) -> int:
        return len(list((self.directory / "migrations" / "versions").glob("*.py")))


def test_flask_migrate(site: Site, tmp_path: Path) -> None:
    """``flask db`` with four binds: tables and versions are looked up and changed on the primaries
    only, also in ``db.replica()``, and come to the replicas by replication."""
    made = {bind_key: {name, "alembic_version"} for bind_key, name in TABLES.items()}
    project = Project(tmp_path, site)
    site.stop_replication()

    project.flask("db", "init", "--multidb")
    project.flask("db", "migrate", "-m", "first")
    project.flask("db", "upgrade")
    assert {bind_key: site.tables(bind_key) for bind_key in BINDS} == made
    assert "No changes in schema detected" in project.flask("db", "migrate")
    assert project.revisions() == 1

    said = project.flask("careless", later=True)
    assert said.count("Detected added column") == 3
    assert "Detected added table" not in said
    assert said.count("(head)") == len(BINDS)
    assert project.revisions() == 2
    site.assert_replicas_untouched()

    site.start_replication()
    assert {bind_key: site.tables(bind_key, -1) for bind_key in BINDS} == made
    site.stop_replication()
    project.flask("db", "downgrade", "base", later=True)
    assert {bind_key: site.tables(bind_key) for bind_key in BINDS} == {
        bind_key: {"alembic_version"} for bind_key in BINDS
    }
    site.assert_replicas_untouched()
    site.start_replication()
    site.assert_only_replicated()
