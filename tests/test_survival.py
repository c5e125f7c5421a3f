"""Replicas that fail in every way there is, under threads that read: nobody notices.

``COMMONDB_TEST_READS`` sets how many reads there are in each part of a drill.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import statistics
import threading
import time
import typing as t

import pymysql
import pytest
import sqlalchemy as sa

from flask_commondb.signals import replica_down
from flask_commondb.signals import replica_up

from .apps import Lab
from .apps import busy
from .apps import can_say_who
from .drivers import DRIVERS
from .drivers import import_driver
from .servers import wait_until

if t.TYPE_CHECKING:
    from .conftest import MakeProxy
    from .proxy import Proxy
    from .servers import Database
    from .servers import MariaDBCluster
    from .servers import MariaDBServer

PRIMARY = 1
THREADS = 16

#: Reads before, during and after a fault, of all threads together.
READS = int(os.environ.get("COMMONDB_TEST_READS", "400"))


@dataclasses.dataclass
class Drill:
    """An app whose replicas stand behind proxies, and its readers."""

    lab: Lab
    database: Database[MariaDBCluster]
    proxies: list[Proxy]

    def __post_init__(self) -> None:
        self.errors: list[BaseException] = []
        self.seconds: list[float] = []
        self.servers: collections.Counter[int] = collections.Counter()

    @property
    def replicas(self) -> list[MariaDBServer]:
        return self.database.cluster.replicas

    def read(self, number: int = READS) -> None:
        """Have the threads read so often together, each read a unit of work of its own."""
        self.seconds, self.servers = [], collections.Counter()
        left = collections.deque(range(number))

        def work() -> None:
            while True:
                try:
                    left.pop()
                except IndexError:
                    return
                began = time.perf_counter()
                try:
                    self.servers[self.lab.run(self.lab.read)] += 1
                except BaseException as error:
                    self.errors.append(error)
                self.seconds.append(time.perf_counter() - began)

        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.seconds, n=100)[98]


class Fault(t.NamedTuple):
    """What happens to one replica, and how it is mended."""

    strike: t.Callable[[Drill, int], object]
    mend: t.Callable[[Drill, int], object]


def _kill_all(drill: Drill, index: int) -> None:
    """End the app's connections; the server lives."""
    for (number,) in drill.replicas[index].execute(
        "SELECT id FROM information_schema.processlist WHERE user = 'app'"
    ):
        with contextlib.suppress(pymysql.err.OperationalError):  # it was faster
            drill.replicas[index].execute(f"KILL {number}")


def _refuse(drill: Drill, index: int) -> None:
    drill.proxies[index].refuse()
    drill.proxies[index].cut()


_crowd: dict[int, list[t.Any]] = {}


def _fill(drill: Drill, index: int) -> None:
    """Others take all the connections that the server allows."""
    server = drill.replicas[index]
    others = _crowd[index] = [_connect(server, "app") for _ in range(10)]
    mine = {other.thread_id() for other in others}
    with _connect(server, "lab") as connection, connection.cursor() as cursor:
        cursor.execute("SET GLOBAL max_connections = 10")
        cursor.execute("SELECT id FROM information_schema.processlist WHERE user = 'app'")
        for (number,) in cursor.fetchall():
            if number not in mine:
                with contextlib.suppress(pymysql.err.OperationalError):  # it was faster
                    cursor.execute(f"KILL {number}")


def _connect(server: MariaDBServer, user: str) -> t.Any:
    return pymysql.connect(
        host="127.0.0.1", port=server.port, user=user, password=user, ssl_disabled=True
    )


def _make_room(drill: Drill, index: int) -> None:
    drill.replicas[index].execute("SET GLOBAL max_connections = DEFAULT")
    for other in _crowd.pop(index):
        other.close()


def _password(drill: Drill, index: int, password: str) -> None:
    server = drill.replicas[index]
    with _connect(server, "lab") as connection, connection.cursor() as cursor:
        cursor.execute("SET SESSION sql_log_bin = 0")
        cursor.execute("SET PASSWORD FOR 'app'@'%%' = PASSWORD(%s)", (password,))


def _lock_out(drill: Drill, index: int) -> None:
    _password(drill, index, "another")
    _kill_all(drill, index)


FAULTS = {
    "killed": Fault(
        lambda drill, index: drill.replicas[index].kill(),
        lambda drill, index: drill.replicas[index].start(),
    ),
    "frozen": Fault(
        lambda drill, index: drill.replicas[index].freeze(),
        lambda drill, index: drill.replicas[index].thaw(),
    ),
    "black hole": Fault(
        lambda drill, index: drill.proxies[index].stall(),
        lambda drill, index: drill.proxies[index].resume(),
    ),
    "refused": Fault(_refuse, lambda drill, index: drill.proxies[index].accept()),
    "full": Fault(_fill, _make_room),
    "wrong password": Fault(_lock_out, lambda drill, index: _password(drill, index, "app")),
    "restart": Fault(
        lambda drill, index: drill.replicas[index].restart(), lambda drill, index: None
    ),
}


@pytest.fixture
def drill(mariadb_database: Database[MariaDBCluster], proxy: MakeProxy) -> t.Iterator[Drill]:
    can_say_who(mariadb_database)
    proxies = [proxy(replica.port, None) for replica in mariadb_database.cluster.replicas]
    urls = [
        sa.make_url(url).set(port=each.port)
        for url, each in zip(mariadb_database.replica_urls, proxies, strict=True)
    ]
    options = {"pool_size": THREADS + 4, "connect_timeout": 2}
    lab = Lab(mariadb_database.primary_url, urls, {"SQLALCHEMY_ENGINE_OPTIONS": options})
    with lab.app.app_context():
        lab.db.create_all()
        lab.db.session.add_all(lab.Post(title=str(number)) for number in range(10))
        lab.db.session.commit()
    mariadb_database.sync()
    yield Drill(lab, mariadb_database, proxies)
    lab.dispose()


def _read_from(drill: Drill, ids: list[int]) -> bool:
    drill.read(THREADS)
    return set(ids) <= set(drill.servers)


@pytest.mark.parametrize("name", FAULTS)
def test_faults(drill: Drill, name: str) -> None:
    """Whatever strikes one replica, then both, 16 threads that read see no error; while it lasts
    the others answer, and soon after it is mended the replica does again."""
    fault = FAULTS[name]
    ids = [replica.server_id for replica in drill.replicas]
    down: list[str] = []
    up: list[str] = []

    def note_down(app: object, server: str, **_: object) -> None:
        down.append(server)

    def note_up(app: object, server: str, **_: object) -> None:
        up.append(server)

    drill.read(THREADS * 5)
    drill.read()
    normal = drill.p99
    assert set(drill.servers) == set(ids)
    with replica_down.connected_to(note_down), replica_up.connected_to(note_up):
        for struck in ([0], [0, 1]):
            striker = threading.Timer(
                0.05, lambda struck=struck: [fault.strike(drill, index) for index in struck]
            )
            striker.start()
            drill.read()  # in the middle of which it strikes
            striker.join()
            drill.read(THREADS * 5)  # so that it is noticed
            drill.read()
            after = drill.p99
            print(f"{name}, {len(struck)} of 2: p99 {after / normal:.2f} of the normal one")
            if READS >= 10_000:  # a few reads have no such percentile
                assert after < 2 * normal
            assert drill.errors == []
            if name != "restart":
                left = {ids[index] for index in (0, 1) if index not in struck} or {PRIMARY}
                assert set(drill.servers) == left
            for index in struck:
                fault.mend(drill, index)
            wait_until(
                lambda: _read_from(drill, ids),
                "the replicas to be used again",
                timeout=40,
            )
            drill.read()
            assert set(drill.servers) == set(ids)
    assert drill.errors == []
    assert drill.lab.checked_out() == 0
    if name != "restart":
        assert len(down) == len(up) == 3


@pytest.mark.parametrize("fault", ["killed", "frozen", "black hole", "refused"])
@pytest.mark.parametrize("driver", ["mysqlclient", "psycopg"])
def test_other_drivers(
    request: pytest.FixtureRequest, proxy: MakeProxy, driver: str, fault: str
) -> None:
    """With the other drivers, too: 4 threads that read see no error when their only replica is
    struck, and are answered by it again soon after it was mended."""
    name, fixture = DRIVERS[driver]
    import_driver(name)
    database = request.getfixturevalue(fixture)
    replica = database.cluster.replicas[0]
    if fixture == "mariadb_database":
        can_say_who(database)
    link = proxy(replica.port, None)
    url = sa.make_url(database.replica_urls[0]).set(
        drivername=name, host="127.0.0.1", port=link.port
    )
    primary = sa.make_url(database.primary_url).set(drivername=name)
    lab = Lab(primary.render_as_string(hide_password=False), [url])
    with lab.app.app_context():
        lab.db.create_all()
    database.sync()
    ids = {True: replica.server_id, False: 1}
    if fixture == "postgresql_database":
        ids = {True: replica.port, False: database.cluster.primary.port}
    servers: list[int] = []

    def answers(server: int) -> bool:
        servers.clear()
        time.sleep(0.1)
        return set(servers) == {server}

    wait_until(lambda: lab.run(lab.read) == ids[True], "the replica to have the table")
    with busy(4, lambda: servers.append(lab.run(lab.read))):
        wait_until(lambda: answers(ids[True]), "the replica to answer")
        if fault in ("killed", "frozen"):
            (replica.kill if fault == "killed" else replica.freeze)()
        elif fault == "black hole":
            link.stall()
        else:
            link.refuse()
            link.cut()
        wait_until(lambda: answers(ids[False]), "the primary to answer")
        if fault in ("killed", "frozen"):
            (replica.start if fault == "killed" else replica.thaw)()
        elif fault == "black hole":
            link.resume()
        else:
            link.accept()
        wait_until(lambda: answers(ids[True]), "the replica to answer again", timeout=20)
    assert lab.checked_out() == 0
    lab.dispose()
