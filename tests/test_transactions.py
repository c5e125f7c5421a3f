"""Units of work: commits in order, blocks, two phases, repetition, on real servers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import inspect
import itertools
import os
import random
import re
import sqlite3
import threading
import typing as t

import pymysql
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import abort

from flask_commondb import NoContextError
from flask_commondb import OpenTransactionError
from flask_commondb import PartialCommitError
from flask_commondb import TwoPhaseNotSupported
from flask_commondb import commits
from flask_commondb.signals import unit_repeated

from .apps import Lab
from .apps import lab_with_orders
from .proxy import Proxy
from .servers import Database
from .servers import wait_until

if t.TYPE_CHECKING:
    import collections.abc as c
    from pathlib import Path

    MakeShop = c.Callable[..., "Shop"]

#: How often the two threads of a drill meet.
ROUNDS = int(os.environ.get("COMMONDB_TEST_UNITS", "1000")) // 50 + 1


#: The binds of a shop that has two.
KEYS = (None, "second")


class Shop(Lab):
    """An app over several binds, with a table of entries in each.

    :param urls: by bind key, in the order of the configuration.
    :param databases: those of the binds that have a server.
    :param proxies: what stands before some of them.
    """

    def __init__(
        self,
        urls: t.Mapping[str | None, str],
        databases: t.Mapping[str | None, Database[t.Any]],
        proxies: t.Mapping[str | None, Proxy],
        **arguments: t.Any,
    ) -> None:
        self.urls = urls
        self.databases = databases
        self.proxies = proxies
        ways: dict[str | None, t.Any] = {key: sa.make_url(url) for key, url in urls.items()}
        for key, proxy in proxies.items():
            ways[key] = ways[key].set(port=proxy.port)
        super().__init__(ways.pop(None), config={"SQLALCHEMY_BINDS": ways}, **arguments)
        self.models = {key: self._model(key) for key in urls}
        with self.app.app_context():
            self.db.create_all()
        for key, database in databases.items():
            if self.backend(key) == "postgresql":
                database.execute(
                    f"ALTER TABLE {table_of(key)} ADD FOREIGN KEY (parent)"
                    f" REFERENCES {table_of(key)} DEFERRABLE INITIALLY DEFERRED"
                )

    def _model(self, key: str | None) -> t.Any:
        columns = {
            "id": so.mapped_column(sa.Integer, primary_key=True),
            "title": so.mapped_column(sa.String(50), unique=True),
            "number": so.mapped_column(sa.Integer, default=0),
            "parent": so.mapped_column(sa.Integer),
            "__bind_key__": key,
            "__tablename__": table_of(key),
        }
        return type(f"Entry{key}", (self.db.Model,), columns)

    def backend(self, key: str | None) -> str:
        return sa.make_url(self.urls[key]).get_backend_name()

    def entry(self, key: str | None, title: str = "x", **values: t.Any) -> t.Any:
        return self.models[key](title=title, **values)

    def add(self, session: t.Any, *keys: str | None, title: str = "x") -> None:
        """Add an entry for each key, and flush."""
        for key in keys:
            session.add(self.entry(key, title))
            session.flush()

    def add_orphan(self, session: t.Any, key: str | None) -> None:
        """Add what PostgreSQL refuses, but not before the commit."""
        session.add(self.entry(key, "orphan", parent=999))
        session.flush()

    def durable(self) -> dict[str | None, list[str]]:
        """What each server has, asked on a connection of its own."""
        found = {}
        for key, url in self.urls.items():
            engine = sa.create_engine(url, poolclass=sa.NullPool)
            with engine.connect() as connection:
                table = sa.table(table_of(key), sa.column("title"))
                found[key] = list(connection.scalars(sa.select(table).order_by("title")))
        return found

    def connection_id(self, key: str | None, session: t.Any = None) -> int:
        """What the server calls the connection of a session."""
        functions = {"mysql": sa.func.connection_id, "postgresql": sa.func.pg_backend_pid}
        statement = sa.select(functions[self.backend(key)]())
        own = {"bind": self.db.engines[key]}
        return int((session or self.db.session).scalars(statement, bind_arguments=own).one())

    def kill(self, key: str | None, connection_id: int) -> None:
        """End a connection by the server's hand; returns when it is gone."""
        execute = self.databases[key].execute
        if self.backend(key) == "mysql":
            execute(f"KILL {connection_id}")
            there = f"SELECT 1 FROM information_schema.processlist WHERE id = {connection_id}"
        else:
            execute(f"SELECT pg_terminate_backend({connection_id})")
            there = f"SELECT 1 FROM pg_stat_activity WHERE pid = {connection_id}"
        wait_until(lambda: not execute(there), "the connection is gone")

    def prepared(self) -> list[str]:
        """What stands prepared on the servers."""
        found: list[str] = []
        for key, database in self.databases.items():
            if self.backend(key) == "mysql":
                found += [row[3].decode() for row in database.execute("XA RECOVER")]
            else:
                found += [row[0] for row in database.execute("SELECT gid FROM pg_prepared_xacts")]
        return found


def table_of(key: str | None) -> str:
    return f"entry_{key or 'default'}"


@pytest.fixture
def make_shop(request: pytest.FixtureRequest, tmp_path: Path) -> c.Iterator[MakeShop]:
    """Makes a shop: ``make_shop("mariadb", "postgresql")`` has the binds None and "second"."""
    shops: list[Shop] = []
    stack = contextlib.ExitStack()

    def make(*servers: str, behind_proxy: tuple[str | None, ...] = (), **arguments: t.Any) -> Shop:
        urls: dict[str | None, str] = {}
        databases: dict[str | None, Database[t.Any]] = {}
        for key, server in zip((None, "second", "third"), servers, strict=False):
            if server == "sqlite":
                urls[key] = f"sqlite:///{tmp_path}/{key}.db"
            else:
                databases[key] = request.getfixturevalue(f"{server}_database")
                urls[key] = databases[key].primary_url
        proxies = {
            key: stack.enter_context(Proxy(databases[key].cluster.primary.port, None))
            for key in behind_proxy
        }
        shops.append(Shop(urls, databases, proxies, **arguments))
        return shops[-1]

    with stack:
        yield make
        for shop in shops:
            checked_out = shop.checked_out()
            shop.dispose()
            assert checked_out == 0


@pytest.fixture
def lab(tmp_path: Path) -> t.Iterator[Lab]:
    """An app on SQLite with two binds and no replicas."""
    lab = lab_with_orders(tmp_path)
    yield lab
    assert lab.checked_out() == 0
    lab.dispose()


def order(lab: Lab, item: str) -> t.Any:
    return lab.Order(item=item)  # type: ignore[attr-defined]


def run_together(*functions: t.Callable[[], object]) -> None:
    """Run each function in a thread of its own; the first error comes out."""
    with concurrent.futures.ThreadPoolExecutor(len(functions)) as executor:
        for future in [executor.submit(function) for function in functions]:
            future.result(60 + ROUNDS)


# Commit and blocks on SQLite ------------------------------------------------------------------


def test_a_failed_commit_has_rolled_back(lab: Lab) -> None:
    """When ``commit()`` raises the session is usable at once, and nothing of it is kept."""
    with lab.app.app_context():
        for session in (lab.db.session, lab.db.sessions["orders"]):
            session.add_all([order(lab, "same"), order(lab, "same")])
            with pytest.raises(sa.exc.IntegrityError, match="UNIQUE"):
                session.commit()
            session.add(order(lab, "other"))
            session.commit()
            session.execute(sa.delete(lab.Order))  # type: ignore[attr-defined]
            session.commit()


def test_transaction_commits(lab: Lab) -> None:
    """A block that ends commits, though the session has been used before."""
    with lab.app.app_context():
        lab.titles()
        with lab.db.transaction() as session:
            assert session is lab.db.session()
            session.add(lab.Post(title="x"))
    with lab.app.app_context():
        assert lab.titles() == ["x"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_transaction_rolls_back(lab: Lab, error: type[BaseException]) -> None:
    """Any exception rolls back, comes out unchanged, and leaves a usable session."""
    raised = error("mine")
    with lab.app.app_context():
        with pytest.raises(error, match="mine") as caught, lab.db.transaction() as session:
            session.add(lab.Post(title="x"))
            session.flush()
            raise raised
        assert caught.value is raised
        assert lab.titles() == []


def test_transaction_nests(lab: Lab) -> None:
    """A block inside another is a savepoint: its failure undoes it alone."""
    with lab.app.app_context():
        with lab.db.transaction() as session:
            session.add(lab.Post(title="outer"))
            with pytest.raises(ValueError, match="inner"), lab.db.transaction():
                session.add(lab.Post(title="inner"))
                session.flush()
                raise ValueError("inner")
            with lab.db.transaction():
                session.add(lab.Post(title="second"))
            assert lab.titles() == ["outer", "second"]
        lab.db.session.rollback()
        assert lab.titles() == ["outer", "second"]


def test_inner_block_is_undone_with_the_outer(lab: Lab) -> None:
    """What an inner block has released goes when the outer one fails."""
    with lab.app.app_context():
        with pytest.raises(ValueError, match="outer"), lab.db.transaction() as session:
            with lab.db.transaction():
                session.add(lab.Post(title="inner"))
            raise ValueError("outer")
        assert lab.titles() == []


def test_transaction_inside_begin(lab: Lab) -> None:
    """Inside ``session.begin()`` a block is a savepoint, and the commit stays where it was."""
    with lab.app.app_context():
        with lab.db.session.begin():
            with lab.db.transaction() as session:
                session.add(lab.Post(title="x"))
            lab.db.session.add(lab.Post(title="y"))
        assert lab.titles() == ["x", "y"]


def test_transaction_inside_begin_nested(lab: Lab) -> None:
    """Inside ``session.begin_nested()`` a block is a savepoint, too, and commits nothing."""
    with lab.app.app_context():
        lab.db.session.add(lab.Post(title="before"))
        with pytest.raises(ValueError, match="mine"), lab.db.session.begin_nested():
            with lab.db.transaction() as session:
                session.add(lab.Post(title="inner"))
            raise ValueError("mine")
        assert lab.titles() == ["before"]
        lab.db.session.rollback()
        assert lab.titles() == []


def test_transaction_ended_underneath(lab: Lab) -> None:
    """A transaction that text has ended underneath a savepoint is not reported as committed."""
    with lab.app.app_context():
        with pytest.raises(sa.exc.InvalidRequestError, match="Nothing more is committed"):
            with lab.db.transaction() as session:
                session.add(lab.Post(title="lost"))
                with pytest.raises(KeyError, match="mine"), lab.db.transaction():
                    session.execute(sa.text("ROLLBACK"))
                    raise KeyError("mine")
                session.add(lab.Post(title="after"))
        assert lab.titles() == []
        with lab.db.transaction() as session:
            session.add(lab.Post(title="next"))
        assert lab.titles() == ["next"]


def test_transaction_without_autobegin(tmp_path: Path) -> None:
    """With ``autobegin=False`` a block begins the transaction itself."""
    lab = Lab(f"sqlite:///{tmp_path}/a.db", session_options={"autobegin": False})
    with lab.app.app_context():
        lab.db.create_all()
        with lab.db.transaction() as session:
            session.add(lab.Post(title="x"))
        with lab.db.transaction():
            assert lab.titles() == ["x"]
    lab.dispose()


def test_integrity_error_in_a_block(lab: Lab) -> None:
    """An inner block may fail on a constraint; the outer one goes on."""
    with lab.app.app_context():
        with lab.db.transaction("orders") as session:
            session.add(order(lab, "same"))
            session.flush()
            with pytest.raises(sa.exc.IntegrityError, match="UNIQUE"):
                with lab.db.transaction("orders"):
                    session.add(order(lab, "same"))
            session.add(order(lab, "other"))
        items = sa.select(lab.Order.item).order_by(lab.Order.id)  # type: ignore[attr-defined]
        assert lab.db.session.scalars(items).all() == ["same", "other"]


def test_transaction_over_several_binds(lab: Lab) -> None:
    """Several keys give their sessions in order, and all are committed, or none."""
    with lab.app.app_context():
        with lab.db.transaction(None, "orders") as (posts, orders):
            posts.add(lab.Post(title="x"))
            orders.add(order(lab, "x"))
        with pytest.raises(sa.exc.IntegrityError, match="UNIQUE"):
            with lab.db.transaction(None, "orders") as (posts, orders):
                posts.add(lab.Post(title="y"))
                orders.add(order(lab, "x"))
        assert lab.titles() == ["x"]


def test_partial_commit(lab: Lab) -> None:
    """A commit that fails half-way names what is durable, what failed and what was undone."""

    def refuse(connection: sa.Connection) -> None:
        raise sa.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError("disk full"))

    with lab.app.app_context():
        sa.event.listen(lab.db.engines["orders"], "commit", refuse)
        with pytest.raises(PartialCommitError, match="'orders'") as caught:
            with lab.db.transaction(None, "orders") as (posts, orders):
                posts.add(lab.Post(title="x"))
                orders.add(order(lab, "x"))
        error = caught.value
        assert (error.committed, error.failed, error.pending) == ((None,), "orders", ())
        assert isinstance(error.__cause__, sa.exc.OperationalError)
        # The first to fail leaves nothing durable: then it is the database's own error.
        with pytest.raises(sa.exc.OperationalError, match="disk full"):
            with lab.db.transaction("orders", None) as (orders, posts):
                orders.add(order(lab, "y"))
                posts.add(lab.Post(title="y"))
        sa.event.remove(lab.db.engines["orders"], "commit", refuse)
        assert lab.titles() == ["x"]
        assert lab.db.session.scalars(sa.select(lab.Order)).all() == []  # type: ignore[attr-defined]


def test_a_savepoint_is_not_durable(lab: Lab) -> None:
    """Of blocks inside others nothing is said to be durable: the first error comes out."""

    def refuse(connection: sa.Connection, name: str | None, context: object) -> None:
        raise sa.exc.OperationalError("RELEASE", {}, sqlite3.OperationalError("disk full"))

    with lab.app.app_context():
        sa.event.listen(lab.db.engines["orders"], "release_savepoint", refuse)
        with pytest.raises(sa.exc.OperationalError, match="disk full"):
            with lab.db.transaction(None, "orders"), lab.db.transaction(None, "orders") as inner:
                inner[0].add(lab.Post(title="x"))
                inner[1].add(order(lab, "x"))
        sa.event.remove(lab.db.engines["orders"], "release_savepoint", refuse)
        assert lab.titles() == []


def test_a_key_twice(lab: Lab) -> None:
    """A block over the same bind twice is a mistake."""
    with lab.app.app_context(), pytest.raises(ValueError, match="given twice"):
        lab.db.transaction("orders", "orders").__enter__()


# A commit over several binds ------------------------------------------------------------------

#: For such a shop: each server comes first once.
PAIRS = [("mariadb", "postgresql"), ("postgresql", "mariadb")]


@pytest.mark.parametrize("used", list(itertools.permutations([None, "second", "third"])))
def test_the_order_of_commits(make_shop: MakeShop, used: tuple[str | None, ...]) -> None:
    """The default bind is committed first, then the others as configured, however used."""
    shop = make_shop("sqlite", "sqlite", "sqlite")
    seen: list[str | None] = []
    with shop.app.app_context():
        for key, engine in shop.db.engines.items():
            sa.event.listen(engine, "commit", lambda connection, key=key: seen.append(key))
        shop.add(shop.db.session, *used)
        shop.db.session.commit()
    assert seen == [None, "second", "third"]
    assert shop.durable() == {None: ["x"], "second": ["x"], "third": ["x"]}


def test_the_first_commit_fails(make_shop: MakeShop) -> None:
    """When the first commit fails nothing is durable, and the error is the database's own."""
    shop = make_shop("postgresql", "mariadb", "sqlite")
    with shop.app.app_context():
        shop.add(shop.db.session, "third", "second", None)
        shop.add_orphan(shop.db.session, None)
        with pytest.raises(sa.exc.IntegrityError, match="foreign key"):
            shop.db.session.commit()
        assert shop.durable() == {None: [], "second": [], "third": []}
        shop.add(shop.db.session, None, "second", "third", title="next")
        shop.db.session.commit()
    assert shop.durable() == {None: ["next"], "second": ["next"], "third": ["next"]}


@pytest.mark.parametrize(
    ("servers", "committed", "failed", "pending"),
    [
        (("mariadb", "postgresql", "sqlite"), [None], "second", ["third"]),
        (("mariadb", "sqlite", "postgresql"), [None, "second"], "third", []),
    ],
)
def test_a_later_commit_fails(
    make_shop: MakeShop,
    servers: tuple[str, ...],
    committed: list[str | None],
    failed: str,
    pending: list[str],
) -> None:
    """When a later commit fails the report is what the servers have, and the session goes on."""
    shop = make_shop(*servers)
    with shop.app.app_context():
        shop.add(shop.db.session, "third", "second", None)
        shop.add_orphan(shop.db.session, failed)
        with pytest.raises(PartialCommitError, match=repr(failed)) as caught:
            shop.db.session.commit()
        error = caught.value
        assert (error.committed, error.failed, error.pending, error.prepared) == (
            tuple(committed),
            failed,
            tuple(pending),
            (),
        )
        assert isinstance(error.__cause__, sa.exc.IntegrityError)
        assert shop.durable() == {
            key: ["x"] if key in committed else [] for key in (None, "second", "third")
        }
        assert shop.checked_out() == 0
        shop.add(shop.db.session, None, "second", "third", title="next")
        shop.db.session.commit()
    assert all("next" in titles for titles in shop.durable().values())


@pytest.mark.parametrize("servers", PAIRS)
def test_a_connection_killed_before_the_commit(
    make_shop: MakeShop, servers: tuple[str, str]
) -> None:
    """A connection killed after the flush: nothing is durable, or exactly what is said."""
    shop = make_shop(*servers)
    with shop.app.app_context():
        shop.add(shop.db.session, *KEYS, title="first")
        shop.kill(None, shop.connection_id(None))
        with pytest.raises(sa.exc.OperationalError):
            shop.db.session.commit()
        assert shop.checked_out() == 0
        shop.add(shop.db.session, *KEYS, title="second")
        shop.kill("second", shop.connection_id("second"))
        with pytest.raises(PartialCommitError, match="'second'") as caught:
            shop.db.session.commit()
        assert (caught.value.committed, caught.value.failed) == ((None,), "second")
        assert isinstance(caught.value.__cause__, sa.exc.OperationalError)
        assert shop.checked_out() == 0
        shop.add(shop.db.session, *KEYS, title="third")
        shop.db.session.commit()
    assert shop.durable() == {None: ["second", "third"], "second": ["third"]}


@pytest.mark.parametrize("servers", PAIRS)
def test_a_connection_known_to_be_lost(make_shop: MakeShop, servers: tuple[str, str]) -> None:
    """A bind whose loss was noticed, and swallowed, fails before any other is durable."""
    shop = make_shop(*servers)
    with shop.app.app_context():
        shop.add(shop.db.session, None, "second")
        shop.kill("second", shop.connection_id("second"))
        with pytest.raises(sa.exc.OperationalError):
            shop.connection_id("second")
        with pytest.raises(sa.exc.PendingRollbackError, match="invalid transaction"):
            shop.db.session.commit()
        assert shop.durable() == {None: [], "second": []}
        shop.add(shop.db.session, None, "second", title="next")
        shop.db.session.commit()
    assert shop.durable() == {None: ["next"], "second": ["next"]}


@pytest.mark.parametrize("servers", PAIRS)
def test_rollback_of_lost_connections(make_shop: MakeShop, servers: tuple[str, str]) -> None:
    """A rollback that fails on every bind has given all connections back."""
    shop = make_shop(*servers)
    with shop.app.app_context():
        shop.add(shop.db.session, None, "second")
        for key in (None, "second"):
            shop.kill(key, shop.connection_id(key))
        with pytest.raises(sa.exc.OperationalError):
            shop.db.session.rollback()
        assert shop.checked_out() == 0
        shop.add(shop.db.session, None, "second", title="next")
        shop.db.session.commit()
    assert shop.durable() == {None: ["next"], "second": ["next"]}


@pytest.mark.parametrize("server", ["mariadb", "postgresql", "sqlite"])
def test_one_connection_is_left_alone(make_shop: MakeShop, server: str) -> None:
    """With one connection the session's transaction is SQLAlchemy's own, untouched."""
    shop = make_shop(server, "sqlite")
    with shop.app.app_context():
        shop.add(shop.db.session, None)
        transaction: t.Any = shop.db.session().get_transaction()
        assert {type(begun) for _, begun, _, _ in transaction._connections.values()} == {
            sa.RootTransaction
        }
        shop.db.session.rollback()


@pytest.mark.parametrize("servers", PAIRS)
def test_savepoints_over_several_binds(make_shop: MakeShop, servers: tuple[str, str]) -> None:
    """A savepoint is undone on every bind, the rest is committed, in order."""
    shop = make_shop(*servers)
    with shop.app.app_context():
        session = shop.db.session
        shop.add(session, None, title="outer")
        with pytest.raises(ValueError, match="mine"), session.begin_nested():
            shop.add(session, "second", None, title="inner")
            raise ValueError("mine")
        with session.begin_nested():
            shop.add(session, "second", None, title="kept")
        session.commit()
    assert shop.durable() == {None: ["kept", "outer"], "second": ["kept"]}


@pytest.mark.parametrize("servers", PAIRS)
def test_joined_connections(make_shop: MakeShop, servers: tuple[str, str]) -> None:
    """Connections that the caller has joined are committed as the session's join mode says."""
    shop = make_shop(*servers)
    for mode in ("conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"):
        with shop.app.app_context():
            shop.db.session().join_transaction_mode = mode
            joined = [engine.connect() for engine in shop.db.engines.values()]
            outer = [connection.begin() for connection in joined]
            for key, connection in zip(shop.db.engines, joined, strict=True):
                insert = sa.insert(shop.models[key].__table__).values(title=mode)
                shop.db.session.execute(insert, bind_arguments={"bind": connection})
            shop.db.session.commit()
            are_ended = [not transaction.is_active for transaction in outer]
            assert are_ended == [mode == "control_fully"] * 2
            for transaction, connection in zip(outer, joined, strict=True):
                transaction.close()
                connection.close()
    assert shop.durable() == {None: ["control_fully"], "second": ["control_fully"]}


def test_a_joined_savepoint_is_not_durable(make_shop: MakeShop) -> None:
    """A savepoint that is released in a caller's transaction is not reported as durable."""
    shop = make_shop(
        "mariadb", "postgresql", session_options={"join_transaction_mode": "create_savepoint"}
    )
    with shop.app.app_context(), contextlib.ExitStack() as stack:
        for key, engine in shop.db.engines.items():
            connection = stack.enter_context(engine.connect())
            stack.enter_context(connection.begin())
            insert = sa.insert(shop.models[key].__table__).values(title="x")
            shop.db.session.execute(insert, bind_arguments={"bind": connection})
            if key == "second":  # SQLAlchemy does not see that the transaction is aborted
                with contextlib.suppress(Exception):
                    connection.connection.cursor().execute("SELECT * FROM missing")
        with pytest.raises(sa.exc.DBAPIError, match="aborted"):
            shop.db.session.commit()
        stack.pop_all().__exit__(ValueError, ValueError(), None)


@pytest.mark.parametrize("expire", [True, False])
def test_expire_on_commit(make_shop: MakeShop, expire: bool) -> None:
    """A commit over several binds expires objects when, and only when, the session says so."""
    shop = make_shop("sqlite", "sqlite", session_options={"expire_on_commit": expire})
    with shop.app.app_context():
        entries = [shop.entry(key) for key in (None, "second")]
        shop.db.session.add_all(entries)
        shop.db.session.commit()
        assert [sa.inspect(entry).expired for entry in entries] == [expire, expire]
        assert [entry.title for entry in entries] == ["x", "x"]


def test_a_listener_adds_another_bind(make_shop: MakeShop) -> None:
    """What a ``before_commit`` listener writes on another bind is committed in its place."""
    shop = make_shop("sqlite", "sqlite", "sqlite")
    seen: list[str | None] = []
    with shop.app.app_context():
        for key, engine in shop.db.engines.items():
            sa.event.listen(engine, "commit", lambda connection, key=key: seen.append(key))

        def audit(session: t.Any) -> None:
            shop.add(session, None, title="audit")

        shop.add(shop.db.session, "third")
        sa.event.listen(shop.db.session(), "before_commit", audit, once=True)
        shop.db.session.commit()
    assert seen == [None, "third"]
    assert shop.durable() == {None: ["audit"], "second": [], "third": ["x"]}


def test_an_interrupt_between_two_commits(make_shop: MakeShop) -> None:
    """An interrupt comes out as it is; what was not committed yet is rolled back."""
    shop = make_shop("sqlite", "sqlite", "sqlite")

    def interrupt(connection: sa.Connection) -> None:
        raise KeyboardInterrupt("now")

    with shop.app.app_context():
        shop.add(shop.db.session, None, "second", "third")
        sa.event.listen(shop.db.engines["second"], "commit", interrupt)
        with pytest.raises(KeyboardInterrupt, match="now"):
            shop.db.session.commit()
        sa.event.remove(shop.db.engines["second"], "commit", interrupt)
        assert shop.durable() == {None: ["x"], "second": [], "third": []}
        shop.add(shop.db.session, None, "second", "third", title="next")
        shop.db.session.commit()
    assert all("next" in titles for titles in shop.durable().values())


# Blocks on real servers -----------------------------------------------------------------------


@pytest.mark.parametrize("server", ["mariadb", "postgresql"])
def test_a_connection_killed_in_a_block(make_shop: MakeShop, server: str) -> None:
    """Wherever a block loses its connection: an error, nothing durable, a usable session."""
    shop = make_shop(server)
    for step in ("begin", "read", "swallowed", "flush", "commit"):
        with shop.app.app_context():
            number = shop.connection_id(None)  # the session has begun before the block
            if step == "begin":
                shop.kill(None, number)
            with pytest.raises((sa.exc.DBAPIError, sa.exc.InvalidRequestError), match="onnection"):
                with shop.db.transaction() as session:
                    if step == "begin":
                        shop.connection_id(None)
                    shop.add(session, None, title="lost")
                    if step != "flush":
                        shop.kill(None, number)
                    if step == "read":
                        shop.connection_id(None)
                    if step == "swallowed":
                        with pytest.raises(sa.exc.OperationalError):
                            shop.connection_id(None)
                    if step == "flush":
                        session.add(shop.entry(None, "lost as well"))
                        shop.kill(None, number)
            assert shop.checked_out() == 0
            with shop.db.transaction() as session:
                shop.add(session, None, title=step)
    assert shop.durable() == {None: ["begin", "commit", "flush", "read", "swallowed"]}


@pytest.mark.parametrize("server", ["mariadb", "postgresql"])
def test_a_connection_killed_in_an_inner_block(make_shop: MakeShop, server: str) -> None:
    """Loses an inner block its connection, the outer one cannot commit, though it may go on."""
    shop = make_shop(server)
    for swallow in (False, True):
        with shop.app.app_context():
            with pytest.raises((sa.exc.DBAPIError, sa.exc.InvalidRequestError), match="onnection"):
                with shop.db.transaction() as session:
                    shop.add(session, None, title="outer")
                    number = shop.connection_id(None)
                    try:
                        with shop.db.transaction():
                            shop.add(session, None, title="inner")
                            shop.kill(None, number)
                            shop.connection_id(None)
                    except sa.exc.OperationalError:
                        if not swallow:
                            raise
            assert shop.checked_out() == 0
            with shop.db.transaction() as session:
                shop.add(session, None, title=f"next {swallow}")
    assert shop.durable() == {None: ["next False", "next True"]}


def test_begun_anew_inside_a_block(make_shop: MakeShop) -> None:
    """A block that has lost its connection may roll back by hand, and commits what comes then."""
    shop = make_shop("mariadb")
    with shop.app.app_context():
        with shop.db.transaction() as session:
            number = shop.connection_id(None)
            with pytest.raises(sa.exc.OperationalError), shop.db.transaction():
                shop.add(session, None, title="lost")
                shop.kill(None, number)
                shop.connection_id(None)
            session.rollback()
            shop.add(session, None, title="kept")
    assert shop.durable() == {None: ["kept"]}


@pytest.mark.parametrize("servers", PAIRS)
def test_a_key_killed_before_the_commit(make_shop: MakeShop, servers: tuple[str, str]) -> None:
    """Of several keys one is killed between flush and commit: the report says what is durable."""
    shop = make_shop(*servers)

    def work(title: str, victim: str | None) -> None:
        with shop.db.transaction(*KEYS) as sessions:
            for key, session in zip(KEYS, sessions, strict=True):
                session.add(shop.entry(key, title))
            session = sessions[KEYS.index(victim)]
            number = shop.connection_id(victim, session)

            def kill(session: t.Any) -> None:
                shop.kill(victim, number)

            sa.event.listen(sessions[0], "before_commit", kill, once=True)

    with shop.app.app_context():
        with pytest.raises(sa.exc.OperationalError):
            work("first", None)
        assert shop.checked_out() == 0
        with pytest.raises(PartialCommitError, match="'second'") as caught:
            work("second", "second")
        error = caught.value
        assert (error.committed, error.failed, error.pending) == ((None,), "second", ())
        assert isinstance(error.__cause__, sa.exc.OperationalError)
        assert shop.checked_out() == 0
        with shop.db.transaction(*KEYS) as sessions:
            for key, session in zip(KEYS, sessions, strict=True):
                shop.add(session, key, title="third")
    assert shop.durable() == {None: ["second", "third"], "second": ["third"]}


def test_a_key_known_to_be_lost(make_shop: MakeShop) -> None:
    """Of several keys one whose loss was noticed, and swallowed, fails before any is durable."""
    shop = make_shop("mariadb", "postgresql")
    with shop.app.app_context():
        with pytest.raises(sa.exc.InvalidRequestError, match="Nothing is committed"):
            with shop.db.transaction(None, "second") as (first, second):
                shop.add(first, None)
                shop.add(second, "second")
                shop.kill("second", shop.connection_id("second", second))
                with pytest.raises(sa.exc.OperationalError):
                    shop.connection_id("second", second)
        assert shop.durable() == {None: [], "second": []}
        assert shop.checked_out() == 0


def test_keys_in_the_order_named(make_shop: MakeShop) -> None:
    """Several keys are committed in the order in which they are named, not as configured."""
    shop = make_shop("mariadb", "postgresql", "sqlite")
    with shop.app.app_context():
        with pytest.raises(PartialCommitError, match="'second'") as caught:
            with shop.db.transaction("third", "second", None) as sessions:
                for key, session in zip(("third", "second", None), sessions, strict=True):
                    shop.add(session, key)
                shop.add_orphan(sessions[1], "second")
        error = caught.value
        assert (error.committed, error.failed, error.pending) == (("third",), "second", (None,))
    assert shop.durable() == {None: [], "second": [], "third": ["x"]}


def test_a_listener_that_raises_after_the_commit(make_shop: MakeShop) -> None:
    """A key whose ``after_commit`` listener raises is reported as durable, and is usable."""

    def fail(session: t.Any) -> None:
        raise LookupError("metrics")

    shop = make_shop("sqlite", "sqlite")
    with shop.app.app_context():
        with pytest.raises(PartialCommitError, match="None") as caught:
            with shop.db.transaction(None, "second") as (first, second):
                entry = shop.entry(None)
                first.add(entry)
                shop.add(second, "second")
                sa.event.listen(first, "after_commit", fail, once=True)
        error = caught.value
        assert (error.committed, error.failed, error.pending) == ((None,), None, ("second",))
        assert isinstance(error.__cause__, LookupError)
        assert shop.checked_out() == 0
        assert entry.title == "x"
        with shop.db.transaction(None, "second") as (first, second):
            shop.add(first, None, title="next")
            shop.add(second, "second", title="next")
    assert shop.durable() == {None: ["next", "x"], "second": ["next"]}


def test_a_listener_that_raises_alone(make_shop: MakeShop) -> None:
    """With one key the listener's own error comes out; what was committed is, and all goes on."""

    def fail(session: t.Any) -> None:
        raise LookupError("metrics")

    shop = make_shop("sqlite")
    with shop.app.app_context():
        with pytest.raises(LookupError, match="metrics"), shop.db.transaction() as session:
            shop.add(session, None)
            sa.event.listen(session, "after_commit", fail, once=True)
        with shop.db.transaction() as session:
            shop.add(session, None, title="next")
    assert shop.durable() == {None: ["next", "x"]}


def test_a_listener_that_refuses(make_shop: MakeShop) -> None:
    """A ``before_commit`` listener that raises undoes the first key; of a later one it is told."""

    def refuse(session: t.Any) -> None:
        raise LookupError("not today")

    shop = make_shop("sqlite", "sqlite")
    with shop.app.app_context():
        with pytest.raises(LookupError, match="not today"):
            with shop.db.transaction(None, "second") as (first, second):
                shop.add(first, None)
                sa.event.listen(first, "before_commit", refuse, once=True)
        assert shop.durable() == {None: [], "second": []}
        with pytest.raises(PartialCommitError, match="'second'") as caught:
            with shop.db.transaction(None, "second") as (first, second):
                shop.add(first, None)
                shop.add(second, "second")
                sa.event.listen(second, "before_commit", refuse, once=True)
        assert (caught.value.committed, caught.value.failed) == ((None,), "second")
    assert shop.durable() == {None: ["x"], "second": []}


def test_a_half_released_inner_block(make_shop: MakeShop) -> None:
    """An inner block over several keys that fails half-way cannot be half kept by the outer one."""
    shop = make_shop("mariadb", "postgresql")
    for twophase in (False, True):
        with shop.app.app_context():
            with pytest.raises(sa.exc.InvalidRequestError, match="Nothing more is committed"):
                with shop.db.transaction(*KEYS, twophase=twophase) as (first, second):
                    shop.add(second, "second", title="outer")
                    with pytest.raises(sa.exc.DBAPIError, match="aborted"):
                        with shop.db.transaction(*KEYS, twophase=twophase):
                            shop.add(first, None, title="inner")
                            shop.add(second, "second", title="inner")
                            with contextlib.suppress(Exception), shop.db.cursor("second") as cursor:
                                cursor.execute("SELECT * FROM missing")
            assert (shop.prepared(), shop.checked_out()) == ([], 0)
    assert shop.durable() == {None: [], "second": []}


@pytest.mark.parametrize("server", ["mariadb", "postgresql", "sqlite"])
def test_a_failed_flush_swallowed_in_a_block(make_shop: MakeShop, server: str) -> None:
    """A flush that failed, and was swallowed, is not committed in part; the session goes on."""
    shop = make_shop(server)
    with shop.app.app_context():
        with pytest.raises(sa.exc.PendingRollbackError, match="rolled back"):
            with shop.db.transaction() as session:
                shop.add(session, None, title="first")
                session.add(shop.entry(None, "first"))
                with pytest.raises(sa.exc.IntegrityError):
                    session.flush()
        assert shop.durable() == {None: []}
        with shop.db.transaction() as session:
            shop.add(session, None, title="next")
    assert shop.durable() == {None: ["next"]}


def test_an_interrupt_while_rolling_back(make_shop: MakeShop) -> None:
    """An interrupt at the rollback of one key does not keep the others from being rolled back."""
    shop = make_shop("sqlite", "sqlite")

    def interrupt(connection: sa.Connection) -> None:
        raise KeyboardInterrupt("now")

    for key in (None, "second"):
        with shop.app.app_context():
            engine = shop.db.engines[key]
            sa.event.listen(engine, "rollback", interrupt)
            with pytest.raises(KeyboardInterrupt, match="now"):
                with shop.db.transaction(None, "second") as (first, second):
                    shop.add(first, None)
                    shop.add(second, "second")
                    raise ValueError("mine")
            sa.event.remove(engine, "rollback", interrupt)
            with shop.db.transaction(None, "second") as (first, second):
                first.flush()
        assert shop.checked_out() == 0
    assert shop.durable() == {None: [], "second": []}


def test_abort_rolls_back(lab: Lab) -> None:
    """``abort()`` inside a block is its 404, and nothing of the block is durable."""

    @lab.app.post("/")
    def view() -> str:
        with lab.db.transaction() as session:
            session.add(lab.Post(title="x"))
            session.flush()
            abort(404)

    @lab.app.errorhandler(404)
    def not_found(error: Exception) -> tuple[str, int]:
        return repr(lab.titles()), 404

    answer = lab.app.test_client().post("/")
    assert (answer.status_code, answer.text) == (404, "[]")


def test_an_error_page_that_queries(lab: Lab) -> None:
    """After a duplicate in a view the error page can query: no ``PendingRollbackError``. (P14)"""

    @lab.app.post("/<how>")
    def view(how: str) -> str:
        entry = order(lab, "same")
        if how == "commit":
            lab.db.session.add(entry)
            lab.db.session.commit()
        elif how == "block":
            with lab.db.transaction("orders") as session:
                session.add(entry)
        elif how == "sessions":
            lab.db.sessions["orders"].add(entry)
            lab.db.sessions["orders"].commit()
        else:
            lab.db.transactional(lambda: lab.db.session.add(entry))()
        return "ok"

    @lab.app.errorhandler(sa.exc.IntegrityError)
    def conflict(error: Exception) -> tuple[str, int]:
        count = sa.select(sa.func.count()).select_from(lab.Order)  # type: ignore[attr-defined]
        counts = [lab.db.session.scalar(count), lab.db.sessions["orders"].scalar(count)]
        return repr(counts), 409

    client = lab.app.test_client()
    assert client.post("/commit").text == "ok"
    for how in ("commit", "block", "sessions", "transactional"):
        answer = client.post(f"/{how}")
        assert (answer.status_code, answer.text) == (409, "[1, 1]")


# Two phases -----------------------------------------------------------------------------------


@contextlib.contextmanager
def two_phases(shop: Shop, by_key: bool) -> t.Iterator[dict[str | None, t.Any]]:
    """A two-phase block over both binds; their sessions by key, or ``db.session`` for each."""
    with shop.db.transaction(*(KEYS if by_key else ()), twophase=True) as taken:
        yield dict(zip(KEYS, taken if by_key else (taken, taken), strict=True))


@contextlib.contextmanager
def on_the(number: int, event: str, shop: Shop, act: t.Callable[[str], object]) -> t.Iterator[None]:
    """Do something with the xid at the n-th of the events of all binds, just before it happens."""
    seen: list[str] = []

    def note(connection: sa.Connection, xid: str, *more: object) -> None:
        seen.append(xid)
        if len(seen) == number:
            act(xid)

    for engine in shop.engines:
        sa.event.listen(engine, event, note)
    yield
    for engine in shop.engines:
        sa.event.remove(engine, event, note)
    assert len(seen) >= number


def commit_by_hand(shop: Shop, key: str | None, xid: str) -> None:
    command = "XA COMMIT" if shop.backend(key) == "mysql" else "COMMIT PREPARED"
    shop.databases[key].execute(f"{command} '{xid}'")


@pytest.mark.parametrize("servers", PAIRS)
def test_two_phases(make_shop: MakeShop, servers: tuple[str, str]) -> None:
    """All servers have prepared before the first commits, in order."""
    shop = make_shop(*servers)
    seen: list[tuple[str, str | None]] = []

    def listen(engine: sa.Engine, event: str, key: str | None) -> None:
        sa.event.listen(engine, event, lambda *args: seen.append((event, key)))

    with shop.app.app_context():
        for key, engine in shop.db.engines.items():
            listen(engine, "prepare_twophase", key)
            listen(engine, "commit_twophase", key)
        with two_phases(shop, by_key=True) as sessions:
            for key in reversed(KEYS):
                shop.add(sessions[key], key)
        assert seen == [
            (event, key) for event in ("prepare_twophase", "commit_twophase") for key in KEYS
        ]
        assert shop.prepared() == []
    assert shop.durable() == {None: ["x"], "second": ["x"]}


@pytest.mark.parametrize("servers", PAIRS)
def test_two_phases_of_one_session(make_shop: MakeShop, servers: tuple[str, str]) -> None:
    """``db.session`` commits in two phases over all binds, also after it has read; only then."""
    shop = make_shop(*servers)
    seen: list[str | None] = []
    with shop.app.app_context():
        for key, engine in shop.db.engines.items():
            sa.event.listen(engine, "commit_twophase", lambda *args, key=key: seen.append(key))
        shop.connection_id(None)
        with shop.db.transaction(twophase=True) as session:
            shop.add(session, "second", None)
            assert session.twophase
        assert seen == [None, "second"]
        assert not session.twophase
        shop.add(session, None, "second", title="next")
        session.commit()
        assert seen == [None, "second"]
        assert shop.prepared() == []
    assert shop.durable() == {None: ["next", "x"], "second": ["next", "x"]}


def test_two_phases_in_which_one_only_reads(make_shop: MakeShop) -> None:
    """A bind that was only read from, or not used at all, is no obstacle."""
    shop = make_shop("mariadb", "postgresql")
    with shop.app.app_context():
        for reader, writer in (KEYS, reversed(KEYS)):
            with two_phases(shop, by_key=True) as sessions:
                shop.connection_id(reader, sessions[reader])
                shop.add(sessions[writer], writer)
        with two_phases(shop, by_key=True) as sessions:
            shop.add(sessions[None], None, title="alone")
        assert shop.prepared() == []
    assert shop.durable() == {None: ["alone", "x"], "second": ["x"]}


def test_two_phases_rolled_back(make_shop: MakeShop) -> None:
    """An exception rolls back on all servers; nothing stands prepared, and the sessions go on."""
    shop = make_shop("mariadb", "postgresql")
    errors = (ValueError("mine"), KeyboardInterrupt("mine"))
    for by_key, error in itertools.product((True, False), errors):
        with shop.app.app_context():
            with pytest.raises(type(error), match="mine"), two_phases(shop, by_key) as sessions:
                for key in KEYS:
                    shop.add(sessions[key], key)
                raise error
            assert (shop.prepared(), shop.checked_out()) == ([], 0)
            assert not any(session.twophase for session in sessions.values())
            for key in KEYS:
                shop.connection_id(key, sessions[key])
    assert shop.durable() == {None: [], "second": []}


@pytest.mark.parametrize("servers", PAIRS)
def test_a_server_that_refuses_to_prepare(make_shop: MakeShop, servers: tuple[str, str]) -> None:
    """When one server does not prepare, the error is its own, and nothing is left on any."""
    shop = make_shop(*servers)
    postgresql = KEYS[servers.index("postgresql")]
    for by_key in (True, False):
        with shop.app.app_context():
            with pytest.raises(sa.exc.IntegrityError, match="foreign key"):
                with two_phases(shop, by_key) as sessions:
                    for key in KEYS:
                        shop.add(sessions[key], key)
                    shop.add_orphan(sessions[postgresql], postgresql)
            assert (shop.prepared(), shop.checked_out()) == ([], 0)
            assert shop.durable() == {None: [], "second": []}
            shop.connection_id(None)
            shop.connection_id("second")


def killer(shop: Shop) -> tuple[dict[str | None, int], t.Callable[[str], None]]:
    """Where to write down the connections of each bind, and what kills them in two phases."""
    numbers: dict[str | None, int] = {}

    def kill_all(xid: str) -> None:
        for key in KEYS:
            shop.kill(key, numbers[key])

    return numbers, kill_all


@pytest.mark.parametrize("servers", PAIRS)
def test_connections_lost_while_preparing(make_shop: MakeShop, servers: tuple[str, str]) -> None:
    """All connections are lost at a prepare: what one has prepared is undone from outside."""
    shop = make_shop(*servers)
    numbers, kill_all = killer(shop)
    for number, by_key in itertools.product((1, 2), (True, False)):
        with shop.app.app_context(), on_the(number, "prepare_twophase", shop, kill_all):
            with pytest.raises(sa.exc.OperationalError), two_phases(shop, by_key) as sessions:
                for key in KEYS:
                    shop.add(sessions[key], key)
                    numbers[key] = shop.connection_id(key, sessions[key])
            assert (shop.prepared(), shop.checked_out()) == ([], 0)
            assert shop.durable() == {None: [], "second": []}
            shop.connection_id(None)
            shop.connection_id("second")


@pytest.mark.parametrize("servers", PAIRS)
def test_connections_lost_between_the_phases(make_shop: MakeShop, servers: tuple[str, str]) -> None:
    """All connections are lost when all have prepared: committed from outside, without an error."""
    shop = make_shop(*servers)
    numbers, kill_all = killer(shop)
    for number, by_key in itertools.product((1, 2), (True, False)):
        title = f"{number} {by_key}"
        with shop.app.app_context(), on_the(number, "commit_twophase", shop, kill_all):
            with two_phases(shop, by_key) as sessions:
                for key in KEYS:
                    shop.add(sessions[key], key, title=title)
                    numbers[key] = shop.connection_id(key, sessions[key])
            assert (shop.prepared(), shop.checked_out()) == ([], 0)
            shop.connection_id(None)
            shop.connection_id("second")
        assert all(title in titles for titles in shop.durable().values())


@pytest.mark.parametrize("servers", PAIRS)
def test_the_answer_to_a_commit_is_lost(make_shop: MakeShop, servers: tuple[str, str]) -> None:
    """What turns out to be committed when its connection is lost is no error."""
    shop = make_shop(*servers)

    def commit_and_kill(xid: str) -> None:
        shop.kill(None, number)
        commit_by_hand(shop, None, xid)

    with shop.app.app_context(), on_the(1, "commit_twophase", shop, commit_and_kill):
        with two_phases(shop, by_key=True) as sessions:
            for key in KEYS:
                shop.add(sessions[key], key)
            number = shop.connection_id(None, sessions[None])
        assert shop.prepared() == []
    assert shop.durable() == {None: ["x"], "second": ["x"]}


def test_a_commit_that_fails_on_a_live_connection(make_shop: MakeShop) -> None:
    """A listener that raises in the second phase cannot stop it; its connection is not reused."""
    shop = make_shop("mariadb", "postgresql")

    def fail(xid: str) -> None:
        raise LookupError("metrics")

    for number in (1, 2):
        with shop.app.app_context(), on_the(number, "commit_twophase", shop, fail):
            with two_phases(shop, by_key=False) as sessions:
                for key in KEYS:
                    shop.add(sessions[key], key, title=f"{number}")
            assert shop.prepared() == []
            for key in KEYS:
                shop.connection_id(key)
    assert shop.durable() == {None: ["1", "2"], "second": ["1", "2"]}


def test_an_interrupt_in_the_second_phase(make_shop: MakeShop) -> None:
    """An interrupt between two commits comes out when all that was prepared is committed."""
    shop = make_shop("mariadb", "postgresql")

    def interrupt(xid: str) -> None:
        raise KeyboardInterrupt("now")

    for number, by_key in itertools.product((1, 2), (True, False)):
        title = f"{number} {by_key}"
        with shop.app.app_context(), on_the(number, "commit_twophase", shop, interrupt):
            with pytest.raises(KeyboardInterrupt, match="now"):
                with two_phases(shop, by_key) as sessions:
                    for key in KEYS:
                        shop.add(sessions[key], key, title=title)
            assert (shop.prepared(), shop.checked_out()) == ([], 0)
        assert all(title in titles for titles in shop.durable().values())


@pytest.mark.parametrize("servers", PAIRS)
def test_a_server_that_is_gone_in_the_second_phase(
    make_shop: MakeShop,
    servers: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What cannot be reached any more is named as prepared, and logged; the others are durable."""
    monkeypatch.setattr(commits, "PATIENCE", 0.1)
    shop = make_shop(*servers, behind_proxy=(None,))
    xids: list[str] = []

    def go_away(xid: str) -> None:
        xids.append(xid)
        shop.proxies[None].refuse()
        shop.proxies[None].cut()

    for by_key in (True, False):
        with shop.app.app_context(), on_the(1, "commit_twophase", shop, go_away):
            with pytest.raises(PartialCommitError, match="by hand") as caught:
                with two_phases(shop, by_key) as sessions:
                    for key in KEYS:
                        shop.add(sessions[key], key, title=f"{by_key}")
            error = caught.value
            assert (error.committed, error.failed, error.pending) == (("second",), None, ())
            assert error.prepared == (None,)
            assert isinstance(error.__cause__, sa.exc.OperationalError)
            assert shop.prepared() == xids[-1:]
            assert xids[-1] in caplog.text
            assert shop.checked_out() == 0
            commit_by_hand(shop, None, xids[-1])
            shop.proxies[None].accept()
            for key in KEYS:
                shop.connection_id(key, sessions[key])
    assert shop.durable() == {None: ["False", "True"], "second": ["False", "True"]}


def test_a_deadlock_in_two_phases(make_shop: MakeShop) -> None:
    """MariaDB has rolled back half of XA's state after a deadlock; the session goes on."""
    shop = make_shop("mariadb", "postgresql")
    lock = sa.text(f"UPDATE {table_of(None)} SET number = number + 1 WHERE title = :title")
    with shop.app.app_context():
        shop.add(shop.db.session, None, title="a")
        shop.add(shop.db.session, None, title="b")
        shop.db.session.commit()
        barrier = threading.Barrier(2)
        errors: list[object] = []

        def take(first: str, second: str) -> None:
            with shop.app.app_context():
                try:
                    with two_phases(shop, by_key=False) as sessions:
                        shop.add(sessions["second"], "second", title=first)
                        sessions[None].execute(lock, {"title": first})
                        barrier.wait(10)
                        sessions[None].execute(lock, {"title": second})
                except sa.exc.OperationalError as error:
                    errors.append(t.cast(t.Any, error.orig).args[0])
                    shop.add(shop.db.session, None, "second", title="next")
                    shop.db.session.commit()

        run_together(lambda: take("a", "b"), lambda: take("b", "a"))
        assert errors == [1213]
        assert shop.prepared() == []
    assert [len(titles) for titles in shop.durable().values()] == [3, 2]


def test_blocks_inside_two_phases(make_shop: MakeShop) -> None:
    """A block inside a two-phase one is a savepoint, whether or not it asks for two phases."""
    shop = make_shop("mariadb", "postgresql")
    with shop.app.app_context():
        with two_phases(shop, by_key=True) as sessions:
            for twophase in (True, False):
                with shop.db.transaction(*KEYS, twophase=twophase):
                    for key in KEYS:
                        shop.add(sessions[key], key, title=f"kept {twophase}")
                with pytest.raises(ValueError, match="mine"):
                    with shop.db.transaction(*KEYS, twophase=twophase):
                        for key in KEYS:
                            shop.add(sessions[key], key, title=f"undone {twophase}")
                        raise ValueError("mine")
    assert set(map(tuple, shop.durable().values())) == {("kept False", "kept True")}


def test_two_phases_that_begin_too_late(make_shop: MakeShop) -> None:
    """Two phases cannot begin in a session that has changes, or inside what has one phase."""
    shop = make_shop("mariadb", "postgresql")

    def begin() -> None:
        with shop.db.transaction(twophase=True):
            raise AssertionError("has begun")

    with shop.app.app_context():
        session = shop.db.session
        session.add(shop.entry(None))
        with pytest.raises(OpenTransactionError, match=r"two-phase.*db\.session has changes that"):
            begin()
        session.flush()
        with pytest.raises(OpenTransactionError, match="may have written"):
            begin()
        session.commit()  # nothing was lost
        with pytest.raises(OpenTransactionError, match=r"inside one that is not"):
            with shop.db.transaction():
                begin()
        with session.begin():
            with pytest.raises(OpenTransactionError, match="inside one that is not"):
                begin()
        with pytest.raises(OpenTransactionError, match=r"db\.sessions\['second'\] has changes"):
            shop.db.sessions["second"].add(shop.entry("second"))
            with shop.db.transaction(*KEYS, twophase=True):
                raise AssertionError("has begun")
        assert not shop.db.sessions[None]().twophase
        shop.db.sessions["second"].commit()
    assert shop.durable() == {None: ["x"], "second": ["x"]}


def test_a_listener_that_raises_in_two_phases(make_shop: MakeShop) -> None:
    """An ``after_commit`` listener that raises keeps no key from being committed."""
    shop = make_shop("mariadb", "postgresql")

    def fail(session: t.Any) -> None:
        raise LookupError("metrics")

    with shop.app.app_context():
        with pytest.raises(PartialCommitError, match="None") as caught:
            with two_phases(shop, by_key=True) as sessions:
                for key in KEYS:
                    shop.add(sessions[key], key)
                sa.event.listen(sessions[None], "after_commit", fail, once=True)
        error = caught.value
        assert (error.committed, error.failed, error.pending) == (KEYS, None, ())
        assert error.prepared == ()
        assert (shop.prepared(), shop.checked_out()) == ([], 0)
        shop.add(shop.db.sessions[None], None, title="next")
        shop.db.sessions[None].commit()
    assert shop.durable() == {None: ["next", "x"], "second": ["x"]}


def test_two_phases_are_the_sessions_own(make_shop: MakeShop) -> None:
    """With ``twophase`` among the session's options it is so in every commit, and stays so."""
    shop = make_shop("mariadb", "postgresql", session_options={"twophase": True})
    with shop.app.app_context():
        shop.add(shop.db.session, *KEYS)
        with shop.db.transaction(twophase=True) as session:
            shop.add(session, *KEYS, title="block")
        assert session.twophase
        shop.add(shop.db.session, *KEYS, title="next")
        shop.db.session.commit()
        assert shop.prepared() == []
    assert shop.durable() == {None: ["block", "next", "x"], "second": ["block", "next", "x"]}


def test_a_bind_without_two_phases(make_shop: MakeShop) -> None:
    """A bind that cannot prepare is named before anything has begun."""
    shop = make_shop("mariadb", "sqlite")
    with shop.app.app_context():
        for keys in ((), KEYS, ("second",)):
            with pytest.raises(TwoPhaseNotSupported, match=r"bind 'second': sqlite"):
                shop.db.transaction(*keys, twophase=True).__enter__()
        with shop.db.transaction(None, twophase=True) as session:
            shop.add(session, None)
    assert shop.durable() == {None: ["x"], "second": []}


def test_a_postgresql_that_is_not_set_up(make_shop: MakeShop) -> None:
    """PostgreSQL does not prepare by default; the error names bind and setting."""
    shop = make_shop("mariadb", "postgresql")
    primary = shop.databases["second"].cluster.primary
    primary.execute("ALTER SYSTEM SET max_prepared_transactions = 0")
    try:
        primary.restart()
        with shop.app.app_context():
            with pytest.raises(TwoPhaseNotSupported, match=r"'second'.*max_prepared_transactions"):
                shop.db.transaction(*KEYS, twophase=True).__enter__()
    finally:
        primary.execute("ALTER SYSTEM RESET max_prepared_transactions")
        primary.restart()
    with shop.app.app_context():
        with shop.db.transaction(*KEYS, twophase=True) as (_, second):
            shop.add(second, "second")
    assert shop.durable() == {None: [], "second": ["x"]}


# Under fire -----------------------------------------------------------------------------------


@contextlib.contextmanager
def random_kills(shop: Shop) -> t.Iterator[None]:
    """End connections of the app at random moments, by the servers' hands."""
    is_over = threading.Event()

    def kill_some() -> None:
        queries = {
            "mysql": "SELECT id FROM information_schema.processlist WHERE user = 'app' AND db = %s",
            "postgresql": "SELECT pid FROM pg_stat_activity WHERE usename = 'app' AND datname = %s",
        }
        while not is_over.wait(random.uniform(0, 0.02)):
            key = random.choice(KEYS)
            database = shop.databases[key]
            found = database.execute(queries[shop.backend(key)], database.name)
            if found:
                (number,) = random.choice(found)
                with contextlib.suppress(pymysql.err.OperationalError):  # it has gone by itself
                    shop.kill(key, number)

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        killer = executor.submit(kill_some)
        try:
            yield
        finally:
            is_over.set()
            killer.result(30)


@pytest.mark.parametrize("servers", PAIRS)
@pytest.mark.parametrize("twophase", [False, True], ids=["one phase", "two phases"])
def test_units_under_fire(make_shop: MakeShop, servers: tuple[str, str], twophase: bool) -> None:
    """Whatever is killed when: what is said to be durable is, and two phases are all or nothing."""
    shop = make_shop(*servers)
    outcomes: dict[str, BaseException | None] = {}

    def work(number: int) -> None:
        for title in (f"{number} {count}" for count in range(ROUNDS)):
            outcomes[title] = None
            with shop.app.app_context():
                try:
                    with shop.db.transaction(*KEYS, twophase=twophase) as sessions:
                        for key, session in zip(KEYS, sessions, strict=True):
                            shop.add(session, key, title=title)
                except sa.exc.SQLAlchemyError as error:
                    outcomes[title] = error

    with random_kills(shop):
        run_together(lambda: work(1), lambda: work(2))
    assert (shop.prepared(), shop.checked_out()) == ([], 0)
    durable = shop.durable()
    for title, error in outcomes.items():
        there = [key for key in KEYS if title in durable[key]]
        if error is None:
            assert there == [None, "second"]
        elif twophase:
            assert not isinstance(error, PartialCommitError)
            assert there == []
        elif isinstance(error, PartialCommitError):  # whether the failed one is, nobody knows
            assert error.committed == (None,)
            assert None in there
        else:
            assert "second" not in there


# Repetition -----------------------------------------------------------------------------------


class Repeats(list[tuple[tuple[str | None, ...], int, str]]):
    """Collects what the signal tells of an app's repeated units: bind keys, attempt and reason.

    :param then: what is done when it is sent.
    """

    def __init__(self, lab: Lab, then: t.Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self._lab = lab
        self._then = then

    def __enter__(self) -> Repeats:
        unit_repeated.connect(self._note, self._lab.app)
        return self

    def __exit__(self, *exc_info: object) -> None:
        unit_repeated.disconnect(self._note, self._lab.app)

    def _note(
        self,
        app: object,
        bind_keys: tuple[str | None, ...],
        attempt: int,
        reason: str,
        error: Exception,
    ) -> None:
        assert isinstance(error, Exception)
        self.append((bind_keys, attempt, reason))
        self._then()

    @property
    def reasons(self) -> list[str]:
        return [reason for _, _, reason in self]


def accounts(shop: Shop) -> None:
    """Two entries with a number to add to, ``a`` and ``b``."""
    with shop.app.app_context():
        for title in "ab":
            shop.add(shop.db.session, None, title=title)
        shop.db.session.commit()


def numbers(shop: Shop) -> list[int]:
    """Theirs, in the order of the titles."""
    with shop.app.app_context():
        entry = shop.models[None]
        return list(shop.db.session.scalars(sa.select(entry.number).order_by(entry.title)))


@pytest.mark.parametrize("way", ["orm", "cursor"])
@pytest.mark.parametrize("server", ["mariadb", "postgresql"])
def test_deadlocks(make_shop: MakeShop, server: str, way: str) -> None:
    """Two threads that lock in opposite order all commit, and no sum is lost or counted twice."""
    shop = make_shop(server)
    accounts(shop)
    if server == "postgresql":
        name = shop.databases[None].name
        shop.databases[None].execute(f"ALTER DATABASE {name} SET deadlock_timeout = '5ms'")
        shop.dispose()
    rounds = ROUNDS if way == "orm" else ROUNDS // 4 + 1
    barrier = threading.Barrier(2, timeout=20)

    def add_one(title: str) -> None:
        if way == "orm":
            entry = shop.models[None]
            statement = sa.select(entry).where(entry.title == title).with_for_update()
            shop.db.session.scalars(statement).one().number += 1
            shop.db.session.flush()
        else:
            with shop.db.cursor() as cursor:
                table = table_of(None)
                cursor.execute(f"UPDATE {table} SET number = number + 1 WHERE title = %s", (title,))

    def work(titles: str) -> None:
        for _ in range(rounds):
            attempts = itertools.count(1)

            @shop.db.transactional(retry=10)
            def unit() -> None:
                add_one(titles[0])
                if next(attempts) == 1:  # noqa: B023
                    barrier.wait()  # both have their first lock: one of them must give way
                add_one(titles[1])

            barrier.wait()  # for the other's last round
            with shop.app.app_context():
                unit()

    with Repeats(shop) as repeats:
        run_together(lambda: work("ab"), lambda: work("ba"))
    assert numbers(shop) == [2 * rounds, 2 * rounds]
    assert len(repeats) >= rounds
    assert set(repeats.reasons) == {"deadlock"}


@pytest.mark.parametrize("server", ["mariadb", "postgresql", "sqlite"])
def test_a_lock_waited_for_too_long(make_shop: MakeShop, server: str) -> None:
    """A lock that another transaction holds for too long is waited for once more."""
    options = {"connect_args": {"timeout": 0.05}} if server == "sqlite" else {}
    shop = make_shop(server, engine_options=options)
    accounts(shop)
    patience = {
        "mariadb": "SET innodb_lock_wait_timeout = 1",
        "postgresql": "SET LOCAL lock_timeout = '20ms'",
        "sqlite": "SELECT 1",
    }
    entry = shop.models[None]

    @shop.db.transactional
    def unit() -> str:
        shop.db.session.execute(sa.text(patience[server]))
        shop.db.session.execute(sa.update(entry).values(number=entry.number + 1))
        return "done"

    other = sa.create_engine(shop.urls[None]).connect()
    other.execute(sa.update(entry).values(number=10))
    with shop.app.app_context(), Repeats(shop, other.commit) as repeats:
        assert unit() == "done"
    other.close()
    other.engine.dispose()
    assert numbers(shop) == [11, 11]
    assert repeats == [((), 1, "lock_timeout")]


@pytest.mark.parametrize("when", ["statement", "commit"])
def test_a_serialization_failure(make_shop: MakeShop, when: str) -> None:
    """PostgreSQL's serializable transactions are repeated, also when COMMIT finds it out."""
    shop = make_shop("postgresql", engine_options={"isolation_level": "SERIALIZABLE"})
    accounts(shop)
    entry = shop.models[None]
    total = sa.select(sa.func.sum(entry.number))

    def set_to_total(session: t.Any, title: str) -> None:
        value = session.scalar(total) + 1
        session.execute(sa.update(entry).where(entry.title == title).values(number=value))

    attempts = itertools.count(1)

    @shop.db.transactional()
    def unit() -> None:
        session = shop.db.session
        if when == "commit":
            set_to_total(session, "a")
        else:
            session.scalar(total)
        if next(attempts) == 1:
            with shop.db.scope(), shop.db.transaction() as other:
                set_to_total(other, "b" if when == "commit" else "a")
        if when == "statement":
            set_to_total(session, "a")

    with shop.app.app_context(), Repeats(shop) as repeats:
        unit()
    assert repeats.reasons == ["serialization"]
    assert numbers(shop) == ([2, 1] if when == "commit" else [2, 0])


def test_a_snapshot_conflict(make_shop: MakeShop) -> None:
    """MariaDB's error 1020, a row that has changed since the snapshot, is repeated."""
    shop = make_shop("mariadb")
    if not shop.databases[None].execute("SHOW VARIABLES LIKE 'innodb_snapshot_isolation'"):
        pytest.skip("this MariaDB has no innodb_snapshot_isolation")
    accounts(shop)
    entry = shop.models[None]
    attempts = itertools.count(1)

    @shop.db.transactional(None)
    def unit() -> None:
        session = shop.db.sessions[None]
        session.execute(sa.text("SET innodb_snapshot_isolation = ON"))
        read = session.scalars(sa.select(entry).where(entry.title == "a")).one()
        if next(attempts) == 1:
            shop.databases[None].execute(f"UPDATE {table_of(None)} SET number = 10")
        read.number += 1

    with shop.app.app_context(), Repeats(shop) as repeats:
        unit()
    assert repeats == [((None,), 1, "serialization")]
    assert numbers(shop) == [11, 10]


def locked() -> sa.exc.OperationalError:
    """What SQLite raises, and what may go away."""
    return sa.exc.OperationalError("UPDATE", {}, sqlite3.OperationalError("database is locked"))


def test_repeated_until_it_is_too_often(make_shop: MakeShop) -> None:
    """When the last repetition fails as well its error comes out, and nothing is durable."""
    shop = make_shop("sqlite")
    errors: list[Exception] = []

    @shop.db.transactional(retry=2)
    def unit() -> None:
        shop.add(shop.db.session, None)
        errors.append(locked())
        raise errors[-1]

    with shop.app.app_context(), Repeats(shop) as repeats:
        with pytest.raises(sa.exc.OperationalError, match="locked") as caught:
            unit()
        assert shop.checked_out() == 0
    assert caught.value is errors[2]
    assert [attempt for _, attempt, _ in repeats] == [1, 2]
    assert shop.durable() == {None: []}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, sa.exc.IntegrityError])
def test_what_is_not_repeated(make_shop: MakeShop, error: type[BaseException]) -> None:
    """An error that would come again comes out at once, as it is."""
    shop = make_shop("sqlite")
    attempts = itertools.count(1)

    @shop.db.transactional
    def unit() -> None:
        next(attempts)
        shop.add(shop.db.session, None)
        if error is sa.exc.IntegrityError:
            shop.add(shop.db.session, None)
        raise error("mine")

    with shop.app.app_context(), Repeats(shop) as repeats:
        with pytest.raises(error, match=r"mine|UNIQUE"):
            unit()
    assert next(attempts) == 2
    assert repeats == []
    assert shop.durable() == {None: []}


def test_a_partial_commit_is_not_repeated(make_shop: MakeShop) -> None:
    """A lock that keeps a later bind from its commit is told, and never waited for once more."""
    shop = make_shop("sqlite", "sqlite")
    attempts = itertools.count(1)

    def fail(session: t.Any) -> None:
        raise locked()

    @shop.db.transactional(*KEYS)
    def unit() -> None:
        next(attempts)
        shop.add(shop.db.sessions[None], None)
        sa.event.listen(shop.db.sessions["second"](), "before_commit", fail, once=True)

    with shop.app.app_context(), Repeats(shop) as repeats:
        with pytest.raises(PartialCommitError, match="'second'"):
            unit()
    assert next(attempts) == 2
    assert repeats == []
    assert shop.durable() == {None: ["x"], "second": []}


def test_a_deadlock_in_a_savepoint(make_shop: MakeShop) -> None:
    """A deadlock ends the whole transaction: that its savepoint is gone does not hide it."""
    shop = make_shop("mariadb")
    accounts(shop)
    barrier = threading.Barrier(2, timeout=20)
    update = sa.text(f"UPDATE {table_of(None)} SET number = number + 1 WHERE title = :title")

    def work(titles: str, nest: t.Callable[[], t.Any]) -> None:
        attempts = itertools.count(1)

        @shop.db.transactional(retry=10)
        def unit() -> None:
            shop.db.session.execute(update, {"title": titles[0]})
            if next(attempts) == 1:
                barrier.wait()
            with nest():
                shop.db.session.execute(update, {"title": titles[1]})

        with shop.app.app_context():
            unit()

    for nest in (shop.db.transaction, shop.db.session.begin_nested):
        with Repeats(shop) as repeats:
            run_together(lambda: work("ab", nest), lambda: work("ba", nest))  # noqa: B023
        assert repeats.reasons[:1] == ["deadlock"]
    assert numbers(shop) == [4, 4]


REFUSED: dict[str, t.Callable[[Shop], object]] = {
    "new": lambda shop: shop.db.session.add(shop.entry(None)),
    "dirty": lambda shop: setattr(first(shop), "number", 5),
    "deleted": lambda shop: shop.db.session.delete(first(shop)),
    "flushed": lambda shop: shop.add(shop.db.session, None),
    "insert": lambda shop: shop.db.session.execute(
        sa.insert(shop.models[None]).values(title="inserted")
    ),
    "text": lambda shop: shop.db.session.execute(sa.text("SELECT 1")),
    "for update": lambda shop: shop.db.session.scalars(
        sa.select(shop.models[None]).with_for_update()
    ).all(),
    "connection": lambda shop: shop.db.session.connection(),
    "cursor": lambda shop: shop.db.cursor().__enter__(),
    "callproc": lambda shop: shop.db.callproc("nothing"),
}


def first(shop: Shop) -> t.Any:
    return shop.db.session.scalars(sa.select(shop.models[None])).first()


@pytest.mark.parametrize("before", REFUSED)
def test_refused_after_a_change(make_shop: MakeShop, before: str) -> None:
    """A unit that is to be repeated cannot begin after what it could not repeat; that is kept."""
    shop = make_shop("mariadb" if before == "callproc" else "sqlite")
    if before == "callproc":
        shop.databases[None].execute("CREATE PROCEDURE nothing() SELECT 1")
    accounts(shop)

    @shop.db.transactional
    def unit() -> None:
        raise AssertionError("has begun")

    with shop.app.app_context(), contextlib.ExitStack() as stack:
        if before == "cursor":
            stack.enter_context(shop.db.cursor())
        else:
            REFUSED[before](shop)
        with pytest.raises(OpenTransactionError, match=r"unit\(\) needs .* db\.session "):
            unit()
        shop.db.session.commit()
    changed = {"new": ["a", "b", "x"], "flushed": ["a", "b", "x"], "deleted": ["b"]}
    changed["insert"] = ["a", "b", "inserted"]
    assert shop.durable() == {None: changed.get(before, ["a", "b"])}
    assert numbers(shop)[0] == (5 if before == "dirty" else 0)


OPEN: dict[str, t.Callable[[Lab], t.ContextManager[t.Any]]] = {
    "db.transaction()": lambda lab: lab.db.transaction(),
    "session.begin()": lambda lab: lab.db.session.begin(),
    "savepoint": lambda lab: lab.db.session.begin_nested(),
}


@pytest.mark.parametrize("name", OPEN)
def test_refused_inside_a_transaction(lab: Lab, name: str) -> None:
    """A unit that is to be repeated is refused inside another; without repetition it nests."""
    seen: list[str] = []

    @lab.db.transactional(retry=0)
    def nested(fails: bool) -> None:
        lab.db.session.add(lab.Post(title=f"nested {fails}"))
        lab.db.session.flush()
        if fails:
            raise ValueError("mine")

    with lab.app.app_context():
        with OPEN[name](lab):
            with pytest.raises(OpenTransactionError, match=re.escape(name)):
                lab.db.transactional(seen.append)("begun")
            with pytest.raises(ValueError, match="mine"):
                nested(True)
            nested(False)
        lab.db.session.commit()
        assert seen == []
        assert lab.titles() == ["nested False"]


def test_refused_inside_another_unit(lab: Lab) -> None:
    """A unit inside another would be repeated by itself, while the server has ended both."""

    @lab.db.transactional
    def inner() -> None:
        raise AssertionError("has begun")

    @lab.db.transactional
    def outer() -> None:
        lab.db.session.add(lab.Post(title="outer"))
        with pytest.raises(OpenTransactionError, match=r"inner\(\).*inside db\.transaction\(\)"):
            inner()

    with lab.app.app_context():
        outer()
        assert lab.titles() == ["outer"]


@pytest.mark.parametrize("server", ["mariadb", "postgresql", "sqlite"])
def test_not_refused_after_a_read(make_shop: MakeShop, server: str) -> None:
    """A login loader that has read is no obstacle; the unit sees what was committed since. (P14)"""
    shop = make_shop(server)
    accounts(shop)
    entry = shop.models[None]

    @shop.db.transactional
    def unit() -> list[int]:
        return list(shop.db.session.scalars(sa.select(entry.number).order_by(entry.title)))

    with shop.app.app_context():
        user = first(shop)
        assert shop.db.session.scalar(sa.select(sa.func.count()).select_from(entry)) == 2
        engine = sa.create_engine(shop.urls[None], poolclass=sa.NullPool)
        if server == "sqlite":  # whose reader keeps writers from committing
            shop.db.session.rollback()
            user = first(shop)
        else:
            with engine.begin() as other:
                other.execute(sa.update(entry).values(number=7))
        user.number = user.number  # sets what is there already
        assert unit() == ([0, 0] if server == "sqlite" else [7, 7])
        assert user.number == (0 if server == "sqlite" else 7)


@pytest.mark.parametrize("server", ["mariadb", "postgresql"])
def test_not_refused_when_the_connection_is_lost(make_shop: MakeShop, server: str) -> None:
    """What has only read has lost nothing: its unit begins on another connection."""
    shop = make_shop(server)
    with shop.app.app_context():
        shop.kill(None, shop.connection_id(None))
        shop.db.transactional(shop.add)(shop.db.session, None, title="repeated")
        shop.kill(None, shop.connection_id(None))
        with shop.db.transaction(twophase=True) as session:
            shop.add(session, None, title="two phases")
    assert shop.durable() == {None: ["repeated", "two phases"]}


def test_what_it_can_decorate(lab: Lab) -> None:
    """It decorates what returns when its work is done, with and without arguments, and keeps it."""

    @lab.db.transactional
    def bare(title: str, /, *, again: bool = False) -> str:
        """Adds a post."""
        lab.db.session.add(lab.Post(title=title))
        return title

    @lab.db.transactional("orders")
    def keyed() -> None:
        lab.db.sessions["orders"].add(order(lab, "x"))

    @lab.db.transactional(None, "orders", retry=1)
    def several() -> None:
        lab.db.sessions[None].add(lab.Post(title="several"))
        lab.db.sessions["orders"].add(order(lab, "several"))

    assert (bare.__name__, bare.__doc__) == ("bare", "Adds a post.")
    assert str(inspect.signature(bare)).startswith("(title: 'str', /, *, again")
    with lab.app.app_context():
        assert bare("x", again=True) == "x"
        keyed()
        several()
        assert lab.titles() == ["x", "several"]
        items = sa.select(lab.Order.item)  # type: ignore[attr-defined]
        assert lab.db.session.scalars(items).all() == ["x", "several"]


def test_what_it_cannot_decorate(lab: Lab) -> None:
    """A generator or a coroutine is refused at once: it returns before its work is done."""

    def generator() -> t.Iterator[int]:
        yield 1

    async def coroutine() -> None: ...

    for function in (generator, coroutine):
        with pytest.raises(TypeError, match=f"{function.__name__}.* generator or a coroutine"):
            lab.db.transactional(function)
        with pytest.raises(TypeError, match="generator or a coroutine"):
            lab.db.transactional("orders", retry=0)(function)


def test_without_a_context(lab: Lab) -> None:
    """Where no context is active the error says what to do."""

    @lab.db.transactional
    def unit() -> None:
        raise AssertionError("has begun")

    with pytest.raises(NoContextError, match=r"db\.scope\(app\)"):
        run_together(unit)


def test_a_view(lab: Lab) -> None:
    """A view is committed before its response is built; ``abort()`` rolls it back."""
    seen: list[list[str]] = []

    @lab.app.post("/<title>")
    @lab.db.transactional
    def view(title: str) -> t.Any:
        lab.db.session.add(lab.Post(title=title))
        if title == "aborted":
            lab.db.session.flush()
            abort(409)
        return f"{title}", 400 if title == "returned" else 200

    make_response = lab.app.make_response

    def make_response_later(answer: t.Any) -> t.Any:
        seen.append(committed())
        return make_response(answer)

    vars(lab.app)["make_response"] = make_response_later

    def committed() -> list[str]:
        with lab.app.app_context():
            return lab.titles()

    client = lab.app.test_client()
    assert client.post("/kept").status_code == 200
    assert seen == [["kept"]]
    assert client.post("/aborted").status_code == 409
    assert client.post("/returned").status_code == 400
    assert committed() == ["kept", "returned"]


def test_a_view_whose_commit_fails(make_shop: MakeShop) -> None:
    """A commit that fails is a 500, never a 200 with lost data. (P15)"""
    shop = make_shop("postgresql")
    shop.app.testing = False

    @shop.app.post("/")
    @shop.db.transactional
    def view() -> str:
        shop.add_orphan(shop.db.session, None)
        return "ok"

    assert shop.app.test_client().post("/").status_code == 500
    assert shop.durable() == {None: []}


# Savepoints and listeners ---------------------------------------------------------------------


def test_a_block_after_a_first_savepoint(tmp_path: Path) -> None:
    """A savepoint that is a session's first call does not make a block after it a savepoint."""
    lab = Lab(f"sqlite:///{tmp_path}/lab.db")
    with lab.app.app_context():
        lab.db.create_all()
        with lab.db.session.begin_nested():
            lab.db.session.add(lab.Post(title="a"))
        with lab.db.transaction() as session:
            session.add(lab.Post(title="b"))
    with lab.app.app_context():
        assert lab.titles() == ["a", "b"]
    lab.dispose()


def test_a_listener_that_raises_after_a_commit(tmp_path: Path) -> None:
    """What a listener raises after a commit comes out; the commit holds, the session is usable."""
    lab = Lab(f"sqlite:///{tmp_path}/lab.db")
    with lab.app.app_context():
        lab.db.create_all()

        def tell(session: so.Session) -> None:
            raise RuntimeError("no mail server")

        sa.event.listen(lab.db.session(), "after_commit", tell)
        lab.db.session.add(lab.Post(title="a"))
        with pytest.raises(RuntimeError, match="no mail server"):
            lab.db.session.commit()
        assert lab.titles() == ["a"]
    lab.dispose()


def test_an_engine_that_is_no_binds(tmp_path: Path) -> None:
    """In the report of a commit, an engine of the caller's own has its server's name."""
    lab = Lab(f"sqlite:///{tmp_path}/lab.db")
    engine = sa.create_engine(f"sqlite:///{tmp_path}/own.db")
    with lab.app.app_context(), engine.connect() as connection:
        place = lab.db.router.place_of(connection)
        assert place == (1, "own.db")
        with lab.db.engine.connect() as ours:
            assert lab.db.router.place_of(ours) == (0, None)
    engine.dispose()
    lab.dispose()
