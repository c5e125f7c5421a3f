"""What a request costs on the wire, counted by a proxy between the app and each server."""

from __future__ import annotations

import typing as t

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from .apps import Lab
from .apps import can_say_who
from .proxy import Proxy

if t.TYPE_CHECKING:
    from .servers import Database
    from .servers import MariaDBCluster


class Wire:
    """An app behind one proxy for the primary and one for each replica."""

    def __init__(self, database: Database[MariaDBCluster], proxies: list[Proxy]) -> None:
        cluster = database.cluster
        self.proxies = proxies
        primary, *replicas = (
            server.url(database=database.name, port=proxy.port)
            for server, proxy in zip(cluster.servers, proxies, strict=True)
        )
        self.primary = primary
        self.replicas = replicas

    def cost(self, work: t.Callable[[], object]) -> list[str]:
        """The commands that a piece of work sends once everything is warm, to all servers."""
        for _ in range(20):  # both replicas have had their turn
            work()
        for proxy in self.proxies:
            proxy.catch_up()
            proxy.clear()
        work()
        for proxy in self.proxies:
            proxy.catch_up()
        return [
            (command.sql or command.name).split()[0].upper()
            for proxy in self.proxies
            for command in proxy.commands
        ]


@pytest.fixture
def wire(mariadb_database: Database[MariaDBCluster], proxy: t.Callable[[int], Proxy]) -> Wire:
    can_say_who(mariadb_database)
    mariadb_database.execute(
        "CREATE TABLE post (id INT AUTO_INCREMENT PRIMARY KEY, title VARCHAR(50) NOT NULL)"
    )
    mariadb_database.sync()
    servers = mariadb_database.cluster.servers
    return Wire(mariadb_database, [proxy(server.port) for server in servers])


def _insert(lab: Lab) -> None:
    lab.db.session.add(lab.Post(title="x"))
    lab.db.session.commit()


def test_with_replicas(wire: Wire) -> None:
    """A GET with one SELECT on a warm replica is 1 command, a POST with INSERT and commit 2."""
    lab = Lab(wire.primary, wire.replicas)
    assert wire.cost(lambda: lab.run(lab.read)) == ["SELECT"]
    assert wire.cost(lambda: lab.run(lambda: [lab.read() for _ in range(3)])) == ["SELECT"] * 3
    assert wire.cost(lambda: lab.run(lambda: _insert(lab), "POST")) == ["INSERT", "COMMIT"]
    lab.dispose()


def test_without_replicas(wire: Wire) -> None:
    """Without replicas a GET with one SELECT is 2 commands, a POST with INSERT and commit 2."""
    lab = Lab(wire.primary)
    assert wire.cost(lambda: lab.run(lab.read)) == ["SELECT", "ROLLBACK"]
    assert wire.cost(lambda: lab.run(lambda: _insert(lab), "POST")) == ["INSERT", "COMMIT"]
    lab.dispose()


def test_a_get_that_writes(wire: Wire) -> None:
    """A GET that writes costs its read on the replica, then no more than a POST."""
    lab = Lab(wire.primary, wire.replicas)

    def view() -> None:
        lab.read()
        _insert(lab)

    assert sorted(wire.cost(lambda: lab.run(view))) == ["COMMIT", "INSERT", "SELECT"]
    lab.dispose()


def test_nothing_done(wire: Wire) -> None:
    """A request that uses no database sends nothing, nor does one that only makes its session."""
    lab = Lab(wire.primary, wire.replicas)
    lab.run(lab.read)
    assert wire.cost(lambda: lab.run(lambda: None)) == []
    assert wire.cost(lambda: lab.run(lambda: lab.db.session.rollback())) == []
    lab.dispose()


def test_a_context_that_is_empty(wire: Wire) -> None:
    """A context outside of a request sends nothing when it uses no database."""
    lab = Lab(wire.primary, wire.replicas)
    lab.run(lab.read)

    def empty() -> None:
        with lab.app.app_context():
            pass

    assert wire.cost(empty) == []
    lab.dispose()


@pytest.mark.parametrize("replicas", [False, True], ids=["plain", "replicas"])
def test_procedures(wire: Wire, mariadb_database: Database[MariaDBCluster], replicas: bool) -> None:
    """A procedure with IN parameters only is 1 command, with OUT 2, with INOUT 3."""
    mariadb_database.execute("CREATE PROCEDURE only_in(a INT) SELECT a")
    mariadb_database.execute("CREATE PROCEDURE with_out(a INT, OUT b INT) SET b = a")
    mariadb_database.execute("CREATE PROCEDURE with_inout(INOUT a INT) SET a = a + 1")
    lab = Lab(wire.primary, wire.replicas if replicas else ())
    with lab.app.app_context():
        assert wire.cost(lambda: lab.db.callproc("only_in", 1)) == ["CALL"]
        assert wire.cost(lambda: lab.db.callproc("with_out", 1)) == ["CALL", "SELECT"]
        assert wire.cost(lambda: lab.db.callproc("with_inout", 1)) == ["SET", "CALL", "SELECT"]
    lab.dispose()


def test_ping_when_asked_for(wire: Wire) -> None:
    """``pool_pre_ping`` is the user's to have: it adds its one command, on replicas as well."""
    lab = Lab(
        wire.primary,
        wire.replicas,
        config={"SQLALCHEMY_ENGINE_OPTIONS": {"pool_pre_ping": True}},
    )
    assert wire.cost(lambda: lab.run(lab.read)) == ["PING", "SELECT"]
    insert = wire.cost(lambda: lab.run(lambda: _insert(lab), "POST"))
    assert insert == ["PING", "INSERT", "COMMIT"]
    lab.dispose()


@pytest.mark.parametrize(("pre_ping", "ping"), [(False, []), (True, ["PING"])])
def test_upstream(wire: Wire, pre_ping: bool, ping: list[str]) -> None:
    """Flask-SQLAlchemy itself sends 3 commands for each, 4 with ``pool_pre_ping``."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = wire.primary
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"pool_pre_ping": pre_ping}
    db = SQLAlchemy(app)

    class Post(db.Model):  # type: ignore[name-defined, misc]
        id = sa.Column(sa.Integer, primary_key=True)
        title = sa.Column(sa.String(50))

    def read() -> None:
        with app.test_request_context():
            db.session.scalars(sa.select(Post.id)).all()

    def write() -> None:
        with app.test_request_context(method="POST"):
            db.session.add(Post(title="x"))
            db.session.commit()

    assert wire.cost(read) == [*ping, "SELECT", "ROLLBACK", "ROLLBACK"]
    assert wire.cost(write) == [*ping, "INSERT", "COMMIT", "ROLLBACK"]
    with app.app_context():
        db.engine.dispose()


def test_get_bind_connects_to_nothing(
    wire: Wire, mariadb_database: Database[MariaDBCluster]
) -> None:
    """A routing decision opens no connection, neither to the replica nor to the primary."""
    lab = Lab(wire.primary, wire.replicas)
    with lab.request():
        engine = lab.db.session.get_bind(clause=sa.select(lab.Post))
        assert engine is not lab.db.engine
        lab.db.session.get_bind(clause=sa.insert(lab.Post))
    assert [proxy.links for proxy in wire.proxies] == [0, 0, 0]
    lab.dispose()


def test_a_replica_that_is_not_needed(wire: Wire) -> None:
    """No connection is opened to a server before it is needed."""
    lab = Lab(wire.primary, wire.replicas)
    lab.run(lambda: _insert(lab), "POST")
    assert [proxy.links for proxy in wire.proxies] == [1, 0, 0]
    lab.dispose()


def _units(lab: Lab) -> list[t.Callable[[], list[str]]]:
    """Units of work of every kind, each of which returns what it has seen."""
    session = lab.db.session
    titles = sa.text("SELECT title FROM post ORDER BY id")

    def orm() -> list[str]:
        return lab.titles()

    def text() -> list[str]:
        return list(session.scalars(titles))

    def raw_cursor() -> list[str]:
        with lab.db.cursor() as cursor:
            cursor.execute("SELECT title FROM post ORDER BY id")
            return [title for (title,) in cursor.fetchall()]

    def read_after_commit() -> list[str]:
        session.execute(sa.update(lab.Post).where(lab.Post.id == 0).values(title="x"))
        session.commit()
        return lab.titles()

    def read_and_rollback() -> list[str]:
        lab.titles()
        session.rollback()
        return lab.titles()

    def raw_after_rollback() -> list[str]:
        lab.titles()
        session.rollback()
        return raw_cursor()

    def core_connection() -> list[str]:
        with lab.db.engine.connect() as connection:
            return list(connection.scalars(titles))

    def driver_connection() -> list[str]:
        connection = lab.db.engine.raw_connection()
        try:
            cursor = connection.cursor()
            cursor.execute("SELECT title FROM post ORDER BY id")
            return [title for (title,) in cursor.fetchall()]
        finally:
            connection.close()

    def procedure() -> list[str]:
        return list(lab.db.callproc("titles").scalars())

    def open_snapshot() -> list[str]:
        session.execute(sa.text("START TRANSACTION WITH CONSISTENT SNAPSHOT"))
        return lab.titles()

    def failing() -> list[str]:
        with pytest.raises(sa.exc.ProgrammingError, match="doesn't exist"):
            session.execute(sa.text("SELECT 1 FROM missing"))
        return lab.titles()

    return [
        orm,
        text,
        raw_cursor,
        read_after_commit,
        read_and_rollback,
        raw_after_rollback,
        core_connection,
        driver_connection,
        procedure,
        open_snapshot,
        failing,
    ]


@pytest.mark.parametrize("replicas", [False, True], ids=["plain", "replicas"])
def test_no_snapshot_survives_in_the_pool(
    mariadb_database: Database[MariaDBCluster], replicas: bool
) -> None:
    """On a pool of one, each of 1,000 mixed units sees what another client has just committed."""
    database = mariadb_database
    lab = Lab(
        database.primary_url,
        database.replica_urls[:1] if replicas else (),
        engine_options={"pool_size": 1, "max_overflow": 0},
    )
    with lab.app.app_context():
        lab.db.create_all()
    database.execute("INSERT INTO post VALUES (1, 'start')")
    database.execute("CREATE PROCEDURE titles() SELECT title FROM post ORDER BY id")
    database.sync()
    units = _units(lab)
    stale = []
    for number in range(1000):
        unit = units[(number * 7 + number // len(units)) % len(units)]
        database.execute(f"UPDATE post SET title = 'now {number}'")
        if replicas:
            database.sync()
        method = "POST" if number % 3 == 0 else "GET"
        seen = lab.run(unit, method)
        if seen != [f"now {number}"]:
            stale.append((number, unit.__name__, method, seen))
    assert stale == []
    assert lab.checked_out() == 0
    lab.dispose()


def test_a_transaction_left_open_on_a_replica(mariadb_database: Database[MariaDBCluster]) -> None:
    """A transaction that text opens in a replica scope does not wait for the next user."""
    database = mariadb_database
    lab = Lab(
        database.primary_url,
        database.replica_urls[:1],
        engine_options={"pool_size": 1, "max_overflow": 0},
    )
    with lab.app.app_context():
        lab.db.create_all()
    database.execute("INSERT INTO post VALUES (1, 'old')")
    database.sync()
    with lab.request(), lab.db.replica():
        lab.db.session.execute(sa.text("START TRANSACTION"))
        assert lab.titles() == ["old"]
    database.execute("UPDATE post SET title = 'new'")
    database.sync()
    assert lab.run(lab.titles) == ["new"]
    lab.dispose()


def test_lost_rollback_is_not_taken_for_done(mariadb_database: Database[MariaDBCluster]) -> None:
    """A ROLLBACK that the driver could not send is not remembered as sent."""
    lab = Lab(mariadb_database.primary_url)
    with lab.app.app_context():
        connection = lab.db.engine.connect()
        driver = t.cast(t.Any, connection.connection.driver_connection)
        connection.exec_driver_sql("SELECT 1")
        assert not driver.nothing_pending
        mariadb_database.cluster.primary.execute(f"KILL {driver.thread_id()}")
        with pytest.raises(sa.exc.OperationalError, match="Lost connection"):
            connection.rollback()
        assert not driver.nothing_pending
        connection.close()
    lab.dispose()


DRIVERS = ["mysql+pymysql", "mysql+mysqldb"]


def _lab_on(wire: Wire, driver: str) -> Lab:
    """An app whose pool has one connection."""
    url = wire.primary.replace("mysql+pymysql", driver)
    options = {"pool_size": 1, "max_overflow": 0, "connect_args": {"read_timeout": 5}}
    return Lab(url, engine_options=options)


def _read_only(lab: Lab) -> t.Any:
    """Read in a context of its own; returns the driver's connection that was used."""
    seen: list[t.Any] = []

    def note(dbapi_connection: t.Any, entry: t.Any, proxied: t.Any) -> None:
        seen.append(dbapi_connection)

    sa.event.listen(lab.engines[0], "checkout", note)
    assert lab.run(lab.titles) is not None
    sa.event.remove(lab.engines[0], "checkout", note)
    return seen[-1]


@pytest.mark.parametrize("driver", DRIVERS)
def test_end_of_a_read_is_not_waited_for(wire: Wire, driver: str) -> None:
    """A unit that has only read ends without the server's answer, which is read when it is there.

    With a server that answers nothing any more the end of the context would not come.
    """
    lab = _lab_on(wire, driver)
    (proxy, *_) = wire.proxies
    used = _read_only(lab)
    with lab.request():
        lab.titles()
        proxy.stall()
    assert used.owes_answer
    assert lab.checked_out() == 0
    proxy.resume()
    assert wire.cost(lambda: lab.run(lab.titles)) == ["SELECT", "ROLLBACK"]
    assert _read_only(lab) is used
    lab.dispose()


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("fails", ["cut", "lost", "killed"])
def test_answer_that_does_not_come(
    wire: Wire, mariadb_database: Database[MariaDBCluster], driver: str, fails: str
) -> None:
    """A connection whose ROLLBACK is never answered is replaced, and nobody sees an error."""
    lab = _lab_on(wire, driver)
    (proxy, *_) = wire.proxies
    used = _read_only(lab)
    with lab.request():
        lab.titles()
        if fails == "lost":
            proxy.lose()
    if fails == "cut":
        proxy.cut()
    elif fails == "killed":
        mariadb_database.execute(f"KILL {used.thread_id()}")
    assert used.owes_answer
    assert _read_only(lab) is not used
    assert lab.checked_out() == 0
    lab.dispose()


@pytest.mark.parametrize("driver", DRIVERS)
def test_end_of_a_write_is_waited_for(wire: Wire, driver: str) -> None:
    """A unit that may have changed or locked anything ends when its rollback has happened."""
    lab = _lab_on(wire, driver)
    used = _read_only(lab)
    lock = sa.select(lab.Post).with_for_update()
    units: list[t.Callable[[], t.Any]] = [
        lambda: lab.db.session.execute(lock).all(),
        lambda: lab.db.session.execute(sa.text("SELECT 1")).all(),
        lambda: lab.db.session.execute(sa.delete(lab.Post)),
    ]
    for unit in units:
        lab.run(unit, "POST")
        assert not used.owes_answer
    lab.dispose()


@pytest.mark.parametrize("driver", DRIVERS)
def test_closed_with_an_answer_to_come(wire: Wire, driver: str) -> None:
    """A pool that is disposed of says farewell, whether or not the answer has come."""
    (proxy, *_) = wire.proxies
    lab = _lab_on(wire, driver)
    for has_come in (True, False):
        used = _read_only(lab)
        if not has_come:
            with lab.request():
                lab.titles()
                proxy.stall()
        assert used.owes_answer
        lab.dispose()
        proxy.resume()
        proxy.wait_for("QUIT")
        proxy.clear()
        assert not used.open
