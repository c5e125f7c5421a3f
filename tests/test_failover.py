"""Several candidates for a primary: the one that can be written to is found, without a restart.

The servers are real, and so is what happens to them: a planned switchover, a crash, a freeze.
``COMMONDB_TEST_REQUESTS`` sets how much is written while the primary moves.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import socket
import threading
import time
import typing as t

import pymysql
import pytest
import sqlalchemy as sa
from flask import Flask

from flask_commondb import pools
from flask_commondb.dialects import dialect_for
from flask_commondb.naming import server_name
from flask_commondb.primaries import TRUST
from flask_commondb.primaries import Candidates
from flask_commondb.signals import primary_changed
from flask_commondb.signals import replica_down
from flask_commondb.signals import unit_repeated

from .apps import Lab
from .apps import can_say_who
from .drivers import DRIVERS
from .drivers import import_driver
from .servers import free_port
from .servers import wait_until

if t.TYPE_CHECKING:
    import collections.abc as c

    from .conftest import MakeProxy
    from .servers import Database
    from .servers import MariaDBCluster
    from .servers import Server

REQUESTS = int(os.environ.get("COMMONDB_TEST_REQUESTS", "2000"))

THREADS = 8

#: Seconds after a promotion until all write again. At the small size other tests have a part of the
#: machine, and what would never end is told from what takes its time.
LIMIT = 2.0 if REQUESTS >= 20_000 else 20.0

# A pool that is collected with its connections; psycopg says so.
pytestmark = pytest.mark.filterwarnings("ignore:.* was deleted while still open:ResourceWarning")


class Failover:
    """A cluster whose primary moves from its first server to its second, and apps on it."""

    def __init__(self, request: pytest.FixtureRequest, driver: str) -> None:
        self.drivername, fixture = DRIVERS[driver]
        import_driver(self.drivername)
        self.database: Database[t.Any] = request.getfixturevalue(fixture)
        self.cluster = self.database.cluster
        self.family = self.drivername.partition("+")[0]
        self.old: t.Any = self.cluster.servers[0]
        self.new: t.Any = self.cluster.servers[1]
        self.labs: list[Lab] = []
        if self.family == "mysql":
            can_say_who(self.database)
        self.database.execute("CREATE TABLE post (id SERIAL PRIMARY KEY, title VARCHAR(50))")
        if self.family == "postgresql":
            self.database.execute("ALTER TABLE post OWNER TO app")
        self.cluster.sync()

    def url(self, server: Server | int, user: str = "app") -> str:
        """The URL of a server, or of a port that leads to one."""
        port = server if isinstance(server, int) else server.port
        url = sa.make_url(self.old.url(user, self.database.name, port))
        return url.set(drivername=self.drivername).render_as_string(hide_password=False)

    def lab(
        self,
        primary: Server | int | None = None,
        candidates: t.Sequence[Server | int | str] | None = None,
        **config: t.Any,
    ) -> Lab:
        """An app; by default its primary is the old one, and the new one is a candidate."""
        further = [self.new] if candidates is None else candidates
        urls = [each if isinstance(each, str) else self.url(each) for each in further]
        lab = Lab(self.url(primary or self.old), config={"COMMONDB_CANDIDATES": urls, **config})
        self.labs.append(lab)

        def write(mark: str) -> str:
            insert(lab, mark)
            return mark

        lab.app.add_url_rule("/<mark>", view_func=write, methods=["POST"])
        lab.app.testing = False
        return lab

    def who(self, server: t.Any) -> int:
        """What a server says when it is asked who it is."""
        return int(server.server_id if self.family == "mysql" else server.port)

    def titles(self, server: t.Any) -> list[str]:
        rows = server.execute("SELECT title FROM post ORDER BY id", database=self.database.name)
        return [title for (title,) in rows]

    def switch_over(self) -> None:
        """Make the new one the primary in good order. Nothing is lost."""
        self.demote()
        self.promote()

    def demote(self) -> None:
        """The old one takes no write any more, and the new one gets all that it has."""
        if self.family == "mysql":
            self.old.execute("SET GLOBAL read_only = 1")
            self.cluster.wait_for_replicas(replicas=[self.new])
        else:
            self.old.stop()  # which sends all to its standby first

    def promote(self) -> None:
        if self.family == "mysql":
            self.new.execute("STOP SLAVE")
            self.new.execute("RESET SLAVE ALL")
            self.new.execute("SET GLOBAL read_only = 0")
        else:
            assert self.new.execute("SELECT pg_promote()") == [(True,)]

    def follow(self) -> None:
        """The old one, which was switched over or has crashed, comes back as a replica."""
        if self.family == "mysql":
            self.old.read_only = True
            self.old.start()
            self.old.execute(
                "CHANGE MASTER TO MASTER_HOST = '127.0.0.1', MASTER_PORT = %s,"
                " MASTER_USER = 'repl', MASTER_PASSWORD = 'repl', MASTER_USE_GTID = slave_pos,"
                " MASTER_DEMOTE_TO_SLAVE = 1",
                self.new.port,
            )
            self.old.execute("START SLAVE")
        else:
            (self.old.directory / "d" / "standby.signal").touch()
            with open(self.old.directory / "d" / "postgresql.conf", "a") as settings:
                settings.write(f"primary_conninfo = 'host=127.0.0.1 port={self.new.port} user=lab'")
            self.old.start()
        wait_until(
            lambda: self.titles(self.old) == self.titles(self.new), "the old one is a replica"
        )


@pytest.fixture(params=DRIVERS)
def failover(request: pytest.FixtureRequest) -> c.Iterator[Failover]:
    """A cluster, once for each driver."""
    failover = Failover(request, request.param)
    yield failover
    for lab in failover.labs:
        lab.dispose()
    if failover.family == "mysql":
        failover.old.read_only = False
    failover.cluster.rebuild()
    failover.cluster.create_database(failover.database.name)  # which the fixture will drop


on_mariadb = pytest.mark.parametrize("failover", ["PyMySQL"], indirect=True)
on_mysql_drivers = pytest.mark.parametrize("failover", ["PyMySQL", "mysqlclient"], indirect=True)


def insert(lab: Lab, title: str) -> None:
    lab.db.session.add(lab.Post(title=title))
    lab.db.session.commit()


def write(lab: Lab, title: str) -> None:
    """In a request of its own."""
    lab.run(lambda: insert(lab, title), "POST")


def writes_again(lab: Lab, title: str = "again") -> None:
    """Return as soon as a write succeeds, and see how long that took."""
    started = time.monotonic()
    while True:
        try:
            write(lab, title)
        except sa.exc.DBAPIError:
            pass
        else:
            break
    assert time.monotonic() - started < LIMIT


@contextlib.contextmanager
def changes(lab: Lab) -> t.Iterator[list[dict[str, t.Any]]]:
    """Collects what the signal says inside the block; its receiver uses the database."""
    seen: list[dict[str, t.Any]] = []

    def note(app: Flask, **values: t.Any) -> None:
        with app.app_context(), lab.db.engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT 1")) == 1
        seen.append(values)

    with primary_changed.connected_to(note, lab.app):
        yield seen


# -- where the primary goes ----------------------------------------------------------------


def test_switchover(failover: Failover, caplog: pytest.LogCaptureFixture) -> None:
    """After a switchover the same engine writes to the new primary; its name is shown."""
    lab = failover.lab()
    engine = lab.engines[0]
    write(lab, "before")
    names = {
        each: server_name(sa.make_url(failover.url(each))) for each in failover.cluster.servers
    }
    old, new = names[failover.old], names[failover.new]
    with changes(lab) as seen, caplog.at_level(logging.WARNING, "flask_commondb"):
        failover.switch_over()
        writes_again(lab)
    assert lab.run(lab.read, "POST") == failover.who(failover.new)
    assert failover.titles(failover.new) == ["before", "again"]
    assert seen == [{"bind_key": None, "server": new, "former": old}]
    assert caplog.messages == [f"The primary of bind None is {new} now; it was {old}."]
    with lab.app.app_context():
        assert lab.db.engine is engine
        assert new in repr(lab.db)
    assert [status.server for status in lab.db.pool_status(lab.app)] == [new]
    failover.follow()
    engine.dispose()
    write(lab, "after")
    wait_until(lambda: "after" in failover.titles(failover.old), "it is on the replica as well")
    assert lab.run(lab.read, "POST") == failover.who(failover.new)


def test_crash(failover: Failover) -> None:
    """A primary that is killed: reads go on elsewhere, writes as soon as there is a new one."""
    lab = failover.lab()
    write(lab, "before")
    failover.cluster.sync()
    failover.old.kill()
    with contextlib.suppress(sa.exc.DBAPIError):  # its connections have to be found dead first
        lab.run(lab.read, "POST")
    assert lab.run(lab.read, "POST") == failover.who(failover.new)
    with pytest.raises(sa.exc.DBAPIError, match="read-only"):
        write(lab, "nowhere")
    failover.promote()
    writes_again(lab)
    assert failover.titles(failover.new) == ["before", "again"]
    failover.follow()
    assert lab.run(lab.read, "POST") == failover.who(failover.new)


def test_freeze(failover: Failover) -> None:
    """A primary that stands still, with connections that are open: the new one is found."""
    lab = failover.lab()
    write(lab, "before")
    failover.cluster.sync()
    failover.old.freeze()
    failover.promote()
    with pytest.raises(sa.exc.DBAPIError):  # nobody can know what became of it
        write(lab, "lost")
    writes_again(lab)
    assert failover.titles(failover.new)[:2] == ["before", "again"]
    failover.old.thaw()
    assert lab.run(lab.read, "POST") == failover.who(failover.new)


@pytest.mark.parametrize("is_writable", [True, False])
@on_mariadb
def test_the_old_one_comes_back(failover: Failover, is_writable: bool) -> None:
    """Two claim to be the primary: the present one stays it, whichever is named first."""
    lab = failover.lab()
    write(lab, "before")
    failover.cluster.sync()
    failover.old.kill()
    failover.promote()
    writes_again(lab)
    failover.old.read_only = not is_writable
    failover.old.start()
    for number in range(3):
        lab.engines[0].dispose()
        time.sleep(number * TRUST)
        write(lab, f"{number}")
    assert failover.titles(failover.new) == ["before", "again", *"012"]
    assert failover.titles(failover.old) == ["before"]


def test_start(failover: Failover) -> None:
    """An app that starts while the first candidate is down works with another one."""
    failover.switch_over()
    failover.old.kill()
    lab = failover.lab()

    class Other(lab.db.Model):  # type: ignore[name-defined, misc]
        id = lab.db.Column(lab.db.Integer, primary_key=True)

    with changes(lab) as seen, lab.app.app_context():
        lab.db.create_all()
    assert [each["server"] for each in seen] == [f"127.0.0.1:{failover.new.port}"]
    failover.new.execute("SELECT id FROM other", database=failover.database.name)
    write(lab, "x")
    assert failover.titles(failover.new) == ["x"]


@on_mariadb
def test_no_primary_for_a_while(failover: Failover, caplog: pytest.LogCaptureFixture) -> None:
    """While there is none, reads go on and the server itself refuses writes; then all is well."""
    lab = failover.lab()
    write(lab, "before")
    failover.demote()
    with caplog.at_level(logging.WARNING, "flask_commondb"):
        for _ in range(20):
            with pytest.raises(sa.exc.DBAPIError, match="read-only"):
                write(lab, "nowhere")
            assert lab.run(lab.read, "POST") == failover.who(failover.old)
            time.sleep(0.02)
    old = f"127.0.0.1:{failover.old.port}"
    assert caplog.messages == [
        "No server of bind None can be written to at present. Until there is one, what is for its"
        f" primary {old} is read from {old}."
    ]
    failover.promote()
    writes_again(lab)
    assert failover.titles(failover.new) == ["before", "again"]


@on_mariadb
def test_demoted_and_back(failover: Failover) -> None:
    """A primary that was read-only for a while is the primary again, and nothing has moved."""
    lab = failover.lab()
    write(lab, "before")
    failover.demote()
    with pytest.raises(sa.exc.DBAPIError, match="read-only"):
        write(lab, "nowhere")
    assert lab.run(lab.read, "POST") == failover.who(failover.old)
    with changes(lab) as seen:
        failover.old.execute("SET GLOBAL read_only = 0")
        writes_again(lab)
    assert seen == []
    assert failover.titles(failover.old) == ["before", "again"]


def test_all_down(failover: Failover) -> None:
    """Nobody can be reached: the error is the driver's own, and comes soon."""
    lab = failover.lab()
    write(lab, "before")
    for server in failover.cluster.servers:
        server.kill()
    for _ in range(3):
        with pytest.raises(sa.exc.OperationalError):
            write(lab, "nowhere")
    assert lab.checked_out() == 0
    failover.old.start()
    writes_again(lab)
    assert failover.titles(failover.old) == ["before", "again"]


@on_mysql_drivers  # PostgreSQL ends all connections to a primary that goes
@pytest.mark.parametrize("is_slow", [False, True])
def test_reading_only(failover: Failover, is_slow: bool) -> None:
    """An app that only reads leaves a primary that is a replica now, without any error."""
    lab = failover.lab()
    held = lab.engines[0].connect()
    assert lab.run(lab.read, "POST") == failover.who(failover.old)
    failover.demote()
    if is_slow:
        time.sleep(TRUST)
        assert lab.run(lab.read, "POST") == failover.who(failover.old)
    failover.promote()
    wait_until(
        lambda: lab.run(lab.read, "POST") == failover.who(failover.new), "it reads elsewhere", 5
    )
    # One that was in use meanwhile is thrown away when it comes back.
    entry = t.cast(t.Any, held.connection)._connection_record
    held.close()
    assert entry.dbapi_connection is None


@on_mariadb
def test_idle_connections(failover: Failover) -> None:
    """As soon as the primary is found elsewhere, no connection to the former one is used again."""
    lab = failover.lab()
    number = sa.text("SELECT @@server_id")
    with lab.engines[0].connect() as first:
        lab.engines[0].connect().close()
        failover.switch_over()
        first.invalidate()
        assert first.scalar(number) == failover.new.server_id
        with lab.engines[0].connect() as second:
            assert second.scalar(number) == failover.new.server_id


def test_urls_of_their_own(failover: Failover) -> None:
    """Each URL is taken at its word: what it says, and what only the first one says."""
    query, question = {
        "mysql": ({"charset": "latin1"}, "SELECT @@character_set_client"),
        "postgresql": ({"application_name": "latin1"}, "SHOW application_name"),
    }[failover.family]
    first = sa.make_url(failover.url(failover.old)).update_query_dict(query)
    lab = failover.lab(
        candidates=[failover.url(failover.new, user="lab")],
        SQLALCHEMY_DATABASE_URI=first.render_as_string(hide_password=False),
    )

    def answers() -> tuple[str, bool]:
        with lab.app.app_context():
            user = lab.db.session.scalar(sa.text("SELECT CURRENT_USER"))
            return str(user).partition("@")[0], lab.db.session.scalar(sa.text(question)) == "latin1"

    assert answers() == ("app", True)
    failover.switch_over()
    writes_again(lab)
    assert answers() == ("lab", False)


@on_mariadb
def test_renewed_password(failover: Failover) -> None:
    """What a ``do_connect`` listener tells the driver is told for every candidate."""
    urls = [
        sa.make_url(failover.url(server)).set(password="old").render_as_string(hide_password=False)
        for server in (failover.old, failover.new)
    ]
    lab = failover.lab(candidates=urls[1:], SQLALCHEMY_DATABASE_URI=urls[0])

    @sa.event.listens_for(lab.engines[0], "do_connect")
    def do_connect(dialect: t.Any, entry: t.Any, args: t.Any, kwargs: dict[str, t.Any]) -> None:
        kwargs["password"] = "app"

    write(lab, "before")
    failover.switch_over()
    writes_again(lab)
    assert failover.titles(failover.new) == ["before", "again"]


@on_mariadb
def test_wrong_password(failover: Failover) -> None:
    """A candidate that lets us not in is none; if it is the only one that lives, it says why."""
    wrong = sa.make_url(failover.url(failover.old)).set(password="wrong")
    wrong_url = wrong.render_as_string(hide_password=False)
    lab = failover.lab(SQLALCHEMY_DATABASE_URI=wrong_url)
    with pytest.raises(sa.exc.OperationalError, match="Access denied"):
        write(lab, "nowhere")
    failover.switch_over()
    writes_again(lab)
    assert failover.titles(failover.new) == ["again"]
    last = failover.cluster.servers[2]
    lab = failover.lab(last, [wrong_url, failover.new])
    write(lab, "third")
    assert failover.titles(failover.new) == ["again", "third"]


@pytest.mark.parametrize("failover", ["PyMySQL", "psycopg"], indirect=True)
def test_a_full_primary(failover: Failover) -> None:
    """A primary that has no connection left is the primary still, whoever else claims to be it."""
    lab = failover.lab()
    write(lab, "before")
    failover.cluster.sync()
    failover.promote()  # as in a failover that was undone
    if failover.family == "mysql":
        failover.old.execute("GRANT USAGE ON *.* TO app WITH MAX_USER_CONNECTIONS 1")
    else:
        failover.old.execute("ALTER ROLE app CONNECTION LIMIT 1")
    lab.engines[0].dispose()
    plain = sa.create_engine(failover.url(failover.old), poolclass=sa.NullPool)
    with plain.connect():
        for _ in range(3):
            with pytest.raises(sa.exc.OperationalError, match=r"max_user|too many connections"):
                write(lab, "nowhere")
    writes_again(lab, "after")
    assert failover.titles(failover.old) == ["before", "after"]
    assert failover.titles(failover.new) == ["before"]


def test_binds_and_apps(failover: Failover) -> None:
    """Each bind of each app finds its primary by itself."""
    urls = [failover.url(server) for server in (failover.old, failover.new)]
    orders = {"orders": {"url": urls[0], "candidates": urls[1:]}, "alone": urls[0]}
    lab = failover.lab(SQLALCHEMY_BINDS=orders)
    second = Flask("second")
    second.config.from_mapping(SQLALCHEMY_DATABASE_URI=urls[0], COMMONDB_CANDIDATES=urls[1:])
    lab.db.init_app(second)
    statement = sa.text(f"SELECT {lab.who}()")

    def answers(app: Flask, key: str | None = None) -> int | None:
        with app.app_context(), contextlib.suppress(sa.exc.DBAPIError):
            return int(lab.db.sessions[key].scalar(statement))
        return None

    places: list[tuple[t.Any, ...]] = [(lab.app, None), (lab.app, "orders"), (second, None)]
    assert {answers(*place) for place in places} == {failover.who(failover.old)}
    with changes(lab) as seen:
        failover.switch_over()
        for place in places:
            wait_until(
                functools.partial(
                    lambda place: answers(*place) == failover.who(failover.new), place
                ),
                "the bind has moved",
            )
    assert [each["bind_key"] for each in seen] == [None, "orders"]
    if failover.family == "mysql":
        assert answers(lab.app, "alone") == failover.who(failover.old)
    with second.app_context():
        for engine in lab.db.engines.values():
            engine.dispose()


@on_mariadb
def test_replicas_change_roles(failover: Failover) -> None:
    """A server that is the primary serves no reads of the replicas', and does when it is not."""
    servers = failover.cluster.servers
    lab = failover.lab(COMMONDB_REPLICAS=[failover.url(server) for server in servers])
    assert {lab.run(lab.read) for _ in range(40)} == {2, 3}
    failover.switch_over()
    writes_again(lab)
    failover.follow()
    assert {lab.run(lab.read) for _ in range(40)} == {1, 3}
    write(lab, "x")
    assert failover.titles(failover.new) == ["again", "x"]


@on_mariadb
def test_a_former_primary_that_can_be_written_to(failover: Failover) -> None:
    """One that comes back as if it still were the primary is no replica until it is read-only."""
    servers = failover.cluster.servers
    lab = failover.lab(COMMONDB_REPLICAS=[failover.url(server) for server in servers])
    write(lab, "before")
    failover.cluster.sync()
    failover.old.kill()
    failover.promote()
    writes_again(lab)
    failover.old.read_only = False
    failover.old.start()
    failover.old.execute(
        "INSERT INTO post (title) VALUES ('of the former')", database=failover.database.name
    )
    down: list[BaseException] = []

    def note(app: Flask, server: str, error: BaseException, **_: t.Any) -> None:
        down.append(error)

    with replica_down.connected_to(note, lab.app):
        seen = {lab.run(lab.read) for _ in range(40)}
    assert seen == {3}
    assert [str(error) for error in down][:1] == ["It can be written to, so it is no replica."]
    failover.old.execute("SET GLOBAL read_only = 1")
    wait_until(lambda: lab.run(lab.read) == 1, "it to serve as a replica")


@on_mariadb
def test_a_bound_after_a_switchover(failover: Failover) -> None:
    """How far behind a replica may be is proved against the new primary as well; one that goes on
    with the former primary is behind."""
    servers = failover.cluster.servers
    lab = failover.lab(
        COMMONDB_REPLICAS=[failover.url(server) for server in servers], COMMONDB_MAX_LAG=0.5
    )
    wait_until(lambda: lab.run(lab.read) in (2, 3), "a replica to be current")
    failover.switch_over()
    writes_again(lab)
    write(lab, "x")  # the third still follows the old one
    time.sleep(0.6)
    assert {lab.run(lab.read) for _ in range(20)} == {2}
    failover.follow()
    wait_until(lambda: lab.run(lab.read) == 1, "the old one to be current")


@on_mariadb
def test_a_connection_of_the_users_own(failover: Failover) -> None:
    """What a ``do_connect`` listener has connected to is its own affair."""
    lab = failover.lab()

    @sa.event.listens_for(lab.engines[0], "do_connect")
    def do_connect(dialect: t.Any, entry: t.Any, args: t.Any, kwargs: dict[str, t.Any]) -> t.Any:
        return pymysql.connect(**{**kwargs, "port": failover.new.port})

    assert lab.run(lab.read, "POST") == failover.who(failover.new)
    with pytest.raises(sa.exc.DBAPIError, match="read-only"):
        write(lab, "nowhere")


def test_names(failover: Failover) -> None:
    """Whatever names the primary, names the present one."""
    options = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}
    lab = failover.lab(SQLALCHEMY_ENGINE_OPTIONS=options, COMMONDB_LEAK_WATCH=True)
    write(lab, "before")
    failover.switch_over()
    writes_again(lab)
    name = f"127.0.0.1:{failover.new.port}"
    with lab.request("POST"), lab.engines[0].connect():
        (status,) = lab.db.pool_status(lab.app)
        assert [status.server, *(holder.server for holder in status.holders)] == [name, name]
        with pytest.raises(sa.exc.TimeoutError, match=name):
            lab.read()
        assert name in repr(lab.db)


# -- units of work -------------------------------------------------------------------------


@on_mysql_drivers
@pytest.mark.parametrize("is_at_commit", [False, True])
def test_a_unit_is_run_again(failover: Failover, is_at_commit: bool) -> None:
    """A unit that the old primary has refused had no effect, so it runs again, on the new one."""
    lab = failover.lab()
    reasons: list[str] = []

    def note(app: Flask, reason: str, **_: t.Any) -> None:
        reasons.append(reason)

    @lab.db.transactional(retry=3)
    def unit() -> None:
        lab.titles()  # on a connection that it keeps
        if is_at_commit:
            lab.db.session.add(lab.Post(title="x"))
            lab.db.session.flush()
        if not reasons:
            failover.switch_over()
        lab.db.session.add(lab.Post(title="y"))

    with unit_repeated.connected_to(note, lab.app):
        lab.run(unit, "POST")
    assert reasons == ["demoted"]
    assert failover.titles(failover.new) == (["x", "y"] if is_at_commit else ["y"])
    assert failover.titles(failover.old) == []


def test_read_only_by_choice(failover: Failover) -> None:
    """A unit that has made its own transaction read-only fails as it did, once."""
    lab = failover.lab()
    runs: list[int] = []

    @lab.db.transactional(retry=3)
    def unit() -> None:
        runs.append(1)
        if failover.family == "mysql":
            lab.db.session.execute(sa.text("SET TRANSACTION READ ONLY"))
        else:
            lab.db.session.connection(execution_options={"postgresql_readonly": True})
        insert(lab, "x")

    with pytest.raises(sa.exc.DBAPIError, match=r"READ ONLY|read-only"):
        lab.run(unit, "POST")
    assert runs == [1]
    write(lab, "y")
    assert failover.titles(failover.old) == ["y"]


@pytest.mark.parametrize("is_crash", [False, True])
def test_under_load(failover: Failover, is_crash: bool) -> None:
    """Threads that write while the primary moves write on within 2 s; nothing is doubled.

    Nothing is lost in good order: what was acknowledged is on the new primary. After a crash that
    is so for what was acknowledged by the new one.
    """
    lab = failover.lab()
    written: dict[int, list[tuple[str, float]]] = {number: [] for number in range(THREADS)}
    enough = REQUESTS // 4
    is_over = threading.Event()

    def work(number: int) -> None:
        client = lab.app.test_client()
        for count in itertools.count():
            if is_over.is_set():
                return
            mark = f"{number}.{count}"
            if client.post(f"/{mark}").status_code == 200:
                written[number].append((mark, time.monotonic()))

    def total() -> int:
        return sum(map(len, written.values()))

    lab.app.logger.disabled = True  # what fails in between is expected, and logged in full
    threads = [threading.Thread(target=work, args=(number,)) for number in written]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: total() >= enough, "enough is written", timeout=60)
        if is_crash:
            failover.old.kill()
            failover.promote()
        else:
            failover.switch_over()
        promoted_at, before = time.monotonic(), total()
        wait_until(lambda: total() >= before + enough, "as much is written again", timeout=60)
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    for times in ([at for _, at in each] for each in written.values()):
        assert min(at for at in times if at > promoted_at) - promoted_at < LIMIT
    titles = failover.titles(failover.new)
    assert len(titles) == len(set(titles))
    since = promoted_at if is_crash else 0
    assert {mark for each in written.values() for mark, at in each if at > since} <= set(titles)
    assert lab.checked_out() == 0


# -- what it costs -------------------------------------------------------------------------


@on_mariadb
def test_round_trips(failover: Failover, proxy: MakeProxy) -> None:
    """A new connection is asked once; without candidates nothing is. In use, neither is."""
    doors = [proxy(server.port) for server in (failover.old, failover.new)]
    ports = [door.port for door in doors]

    def sent(lab: Lab) -> list[str]:
        for door in doors:
            door.catch_up()
        commands = [str(command) for door in doors for command in door.commands]
        for door in doors:
            door.clear()
        lab.run(lambda: insert(lab, "x"), "POST")
        lab.run(lambda: lab.titles(), "GET")
        for door in doors:
            door.catch_up()
        assert [str(command).split()[0] for door in doors for command in door.commands] == [
            "INSERT",
            "COMMIT",
            "SELECT",
            "ROLLBACK",
        ]
        return commands

    alone = failover.lab(ports[0], [])
    with alone.engines[0].connect():
        pass
    expected = sent(alone)
    for door in doors:
        door.clear()
    several = failover.lab(ports[0], ports[1:])
    with several.engines[0].connect():
        pass
    question = "SELECT @@global.read_only, @@global.innodb_read_only"

    def links() -> list[int]:
        return [command.link for command in doors[0].commands if str(command) == question]

    (first,) = links()
    assert not [command for command in expected if "read_only" in command]
    commands = sent(several)
    assert commands.count(question) == 1
    commands.remove(question)
    assert commands == expected
    assert pools.traffic(several.engines[0]).probes == 1
    assert pools.traffic(alone.engines[0]).probes == 0
    assert doors[1].commands == []
    # The server that has just spoken is not knocked at before the next connection.
    with several.engines[0].connect(), several.engines[0].connect():
        pass
    (second,) = links()
    assert second == first + 1


def test_a_detour(mariadb_database: Database[MariaDBCluster]) -> None:
    """What connects while it searches, as a server is found slow, does not wait for itself."""
    urls = [mariadb_database.primary_url, *mariadb_database.replica_urls]
    engine = sa.create_engine(urls[0])
    (_, arguments) = engine.dialect.create_connect_args(engine.url)

    def detour() -> None:
        t.cast(t.Any, engine.dialect).connect(**arguments).close()

    Candidates(engine, list(map(sa.make_url, urls)), None, lambda *names: None, detour)
    thread = threading.Thread(target=lambda: engine.connect().close())
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()
    engine.dispose()


def test_one_search_for_all() -> None:
    """Threads that need a connection at the same time have one search, and its outcome."""
    with contextlib.ExitStack() as stack:
        doors = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        for door in doors:
            door.setblocking(False)
        first, second = (
            f"mysql+pymysql://app@127.0.0.1:{door.getsockname()[1]}/app" for door in doors
        )
        lab = Lab(first, config={"COMMONDB_CANDIDATES": [second]})
        errors: list[str] = []

        def connect() -> None:
            try:
                lab.engines[0].connect()
            except sa.exc.OperationalError as error:
                errors.append(str(error.orig))

        started = time.monotonic()
        threads = [threading.Thread(target=connect) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - started < 8  # a driver alone waits for 10
        assert len(errors) == THREADS
        assert len(set(errors)) == 1

        def callers(door: socket.socket) -> int:
            for count in itertools.count():
                try:
                    door.accept()[0].close()
                except BlockingIOError:
                    return count
            raise AssertionError

        # A knock at each, and the connection whose error all have got.
        assert [callers(door) for door in doors] == [2, 1]
        lab.dispose()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@on_mariadb
def test_fork_during_a_search(failover: Failover) -> None:
    """A child that is forked while its parent searches does not wait for it."""
    lab = failover.lab(failover.old)
    failover.old.freeze()
    failover.promote()
    searching = threading.Thread(target=writes_again, args=(lab, "parent"))
    searching.start()
    time.sleep(0.1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            write(lab, "child")
            code = 0
        finally:
            os._exit(code)
    searching.join()
    wait_until(lambda: os.waitpid(child, os.WNOHANG)[0] == child, "the child ends", timeout=20)
    assert sorted(failover.titles(failover.new)) == ["child", "parent"]


# -- what a server says of itself ----------------------------------------------------------


def test_is_writable(failover: Failover) -> None:
    """A server says whether it is a primary, to whomever, on whichever connection."""
    failover.database.sync()
    url = failover.url(failover.old)
    lab = Lab(url, [failover.url(failover.new), failover.url(failover.old)])

    def said(engine: sa.Engine) -> bool:
        with contextlib.closing(engine.raw_connection()) as connection:
            dbapi_connection = connection.dbapi_connection
            assert dbapi_connection is not None
            return dialect_for(engine).is_writable(dbapi_connection)

    primary, replica, second = lab.engines
    assert [said(primary), said(replica), said(second)] == [True, False, True]
    almighty = sa.create_engine(failover.url(failover.new, user="lab"))
    assert said(almighty) is False
    almighty.dispose()
    failover.switch_over()
    if failover.family == "mysql":
        assert [said(primary), said(replica), said(second)] == [False, True, False]
    else:
        assert said(replica) is True
        failover.new.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        failover.new.execute("SELECT pg_reload_conf()")
        wait_until(lambda: not said(replica), "it does not want to be one")
    lab.dispose()


def test_is_primary(failover: Failover) -> None:
    """A URL of the present primary is known by host, port and database."""
    lab = failover.lab()
    with lab.app.app_context():
        (candidates,) = lab.db.router.candidates.values()
    old, new = (sa.make_url(failover.url(each)) for each in (failover.old, failover.new))
    assert [candidates.is_primary(url) for url in (old, new)] == [True, False]
    assert candidates.is_primary(old.set(username="other", password=None))
    assert not candidates.is_primary(old.set(database="other"))
    failover.switch_over()
    writes_again(lab)
    assert [candidates.is_primary(url) for url in (old, new)] == [False, True]
    assert candidates.server == server_name(new)
    assert candidates.url.host == new.host


def test_usual_port() -> None:
    """A port that is not named is the usual one."""
    lab = Lab("mysql+pymysql://h/app", config={"COMMONDB_CANDIDATES": ["mysql+pymysql://i/app"]})
    with lab.app.app_context():
        (candidates,) = lab.db.router.candidates.values()
    assert candidates.is_primary(sa.make_url("mysql+pymysql://H:3306/app"))
    assert not candidates.is_primary(sa.make_url(f"mysql+pymysql://h:{free_port()}/app"))
