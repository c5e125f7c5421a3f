"""Names that lead elsewhere: the pools follow them, and no request notices.

A name leads to 127.0.0.2 or 127.0.0.3, where proxies stand before real servers. That it does is the
only thing that is made up.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import typing as t

import pytest
import sqlalchemy as sa

from flask_commondb import addresses

from .apps import Lab
from .apps import can_say_who
from .drivers import DRIVERS
from .drivers import skip_or_fail
from .servers import wait_until

if t.TYPE_CHECKING:
    import collections.abc as c

    from .conftest import MakeProxy
    from .proxy import Proxy
    from .servers import Database
    from .servers import MariaDBCluster

OLD, NEW = "127.0.0.2", "127.0.0.3"

#: As little as can be waited for.
SOON = 0.2


class Names:
    """What the resolver says of some names; of all others it says the truth."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        #: By name, its addresses; none if the resolver fails.
        self.addresses: dict[str, list[str]] = {}
        #: The names that were asked for.
        self.asked: list[str] = []
        #: What it says to us only, and not to a driver.
        self.ours: dict[str, list[str]] = {}
        #: Whether each time we ask another one of the addresses is the only answer.
        self.turns = False
        #: We have no answer before this.
        self.gate = threading.Event()
        self.gate.set()
        self._truth = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self.getaddrinfo)

    def getaddrinfo(self, host: t.Any, port: t.Any, *args: t.Any, **kwargs: t.Any) -> t.Any:
        addresses = self.addresses.get(host)
        if port is None:  # a driver asks for the port, too
            self.asked.append(host)
            self.gate.wait(30)
            addresses = self.ours.get(host, addresses)
        if addresses is None:
            return self._truth(host, port, *args, **kwargs)
        if self.turns:
            if port is None:
                addresses.append(addresses.pop(0))
            addresses = addresses[:1]
        if not addresses:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [
            place for address in addresses for place in self._truth(address, port, *args, **kwargs)
        ]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


class Moving:
    """An app that knows two servers by one name each; the proxies show who is connected where.

    The name ``primary.test`` leads to the primary by two ways; ``replica.test`` to the first
    replica, and later to the second.
    """

    def __init__(
        self, database: Database[MariaDBCluster], names: Names, make_proxy: MakeProxy
    ) -> None:
        self.names = names
        cluster = database.cluster
        self.database = database
        targets = {
            "primary.test": (cluster.primary.port, cluster.primary.port),
            "replica.test": tuple(replica.port for replica in cluster.replicas),
        }
        #: By name and address.
        self.proxies: dict[tuple[str, str], Proxy] = {}
        self.urls = {}
        for name, (old, new) in targets.items():
            names.addresses[name] = [OLD]
            proxy = self.proxies[name, OLD] = make_proxy(old, "mysql", OLD)
            self.proxies[name, NEW] = make_proxy(new, "mysql", NEW, proxy.port)
            url = sa.make_url(database.primary_url).set(host=name, port=proxy.port)
            self.urls[name] = url.render_as_string(hide_password=False)

    def lab(self, resolve_after: float | None = SOON) -> Lab:
        config: dict[str, t.Any] = {"COMMONDB_ENGINE_DEFAULTS": {}}
        config["COMMONDB_ENGINE_DEFAULTS"]["pool_resolve_after"] = resolve_after
        lab = Lab(self.urls["primary.test"], [self.urls["replica.test"]], config)
        with lab.app.app_context():
            lab.db.create_all()
        self.database.sync()
        return lab

    def links(self, name: str) -> tuple[int, int]:
        """How many connections there are to the old address of a name, and to its new one."""
        return self.proxies[name, OLD].links, self.proxies[name, NEW].links


@pytest.fixture
def moving(mariadb_database: Database[MariaDBCluster], names: Names, proxy: MakeProxy) -> Moving:
    can_say_who(mariadb_database)
    return Moving(mariadb_database, names, proxy)


@pytest.fixture
def lab(moving: Moving) -> c.Iterator[Lab]:
    lab = moving.lab()
    yield lab
    lab.dispose()


def at_once(lab: Lab, number: int, method: str = "GET") -> set[int]:
    """Who has answered so many requests that are all there at the same time."""
    barrier = threading.Barrier(number, timeout=30)
    answers: list[int] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with lab.request(method):
                answers.append(lab.read())
                barrier.wait()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(answers) == number
    return set(answers)


def test_a_replica_moves(lab: Lab, moving: Moving) -> None:
    """Reads go to the new address in time, the old one is left by all, and nothing fails."""
    assert at_once(lab, 4) == {2}
    assert moving.links("replica.test") == (4, 0)
    moving.names.addresses["replica.test"] = [NEW]
    wait_until(lambda: lab.run(lab.read) == 3, "reads come from the new address")
    assert at_once(lab, 4) == {3}
    wait_until(lambda: moving.links("replica.test") == (0, 4), "the old address is left")


def test_a_primary_moves(lab: Lab, moving: Moving) -> None:
    """So it is with writes; a connection that is in use finishes its work where it is."""

    def write() -> None:
        lab.db.session.add(lab.Post(title="x"))
        lab.db.session.commit()

    with lab.request("POST"):
        lab.db.session.add(lab.Post(title="begun"))
        lab.db.session.flush()
        moving.names.addresses["primary.test"] = [NEW]
        time.sleep(SOON * 1.5)
        assert at_once(lab, 2, "POST") == {1}
        assert moving.links("primary.test")[0] == 1
        lab.db.session.commit()
    for _ in range(3):
        lab.run(write, "POST")
    assert at_once(lab, 3, "POST") == {1}
    wait_until(lambda: moving.links("primary.test") == (0, 3), "the old address is left")
    assert lab.run(lambda: len(lab.titles()), "POST") == 4


def test_both_addresses(lab: Lab, moving: Moving) -> None:
    """What leads to one of several addresses stays where it is."""
    at_once(lab, 3)
    moving.names.addresses["replica.test"] = [NEW, OLD]
    time.sleep(SOON * 1.5)
    assert at_once(lab, 3) == {2}
    assert moving.names.asked.count("replica.test") >= 1
    assert moving.links("replica.test") == (3, 0)


def test_a_new_connection(lab: Lab, moving: Moving, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has just been made to replace another one is used, wherever the name leads by then."""
    assert lab.run(lab.read) in {2, 3}
    monkeypatch.setattr(addresses.Names, "is_elsewhere", lambda *args: True)
    for _ in range(3):
        assert lab.run(lab.read) in {2, 3}


def test_an_address_that_is_not_named(lab: Lab, moving: Moving) -> None:
    """A name whose answers change all the time costs new connections, and never an error."""
    moving.names.addresses["replica.test"] = [OLD, NEW]
    moving.names.turns = True
    for _ in range(2):
        wait_until(lambda: at_once(lab, 2) == {3}, "the new address has answered")
        wait_until(lambda: at_once(lab, 2) == {2}, "the old address has answered")


def test_one_look_at_a_time(lab: Lab, moving: Moving) -> None:
    """A name is looked up by one, and the others do not wait; and not again before its time."""
    at_once(lab, 4)
    time.sleep(SOON * 1.5)
    moving.names.asked.clear()
    moving.names.gate.clear()
    looking = threading.Thread(target=lambda: lab.run(lab.read))
    looking.start()
    wait_until(lambda: moving.names.asked == ["replica.test"], "somebody looks")
    assert at_once(lab, 3) == {2}
    assert looking.is_alive()
    assert moving.names.asked == ["replica.test"]
    moving.names.gate.set()
    looking.join()


def test_not_before_its_time(moving: Moving) -> None:
    """As long as it is not due, nobody looks; with ``None`` it is never due."""
    for resolve_after in (3600, None):
        lab = moving.lab(resolve_after)
        at_once(lab, 2)
        time.sleep(SOON)
        at_once(lab, 2)
        assert moving.names.asked == []
        lab.dispose()


def test_a_resolver_that_fails(lab: Lab, moving: Moving, caplog: pytest.LogCaptureFixture) -> None:
    """It changes nothing, and is told once; when it is well again, it is believed again."""
    at_once(lab, 2)
    caplog.set_level(logging.INFO, logger="flask_commondb")
    moving.names.addresses["replica.test"] = []
    for _ in range(3):
        time.sleep(SOON * 1.5)
        assert at_once(lab, 2) == {2}
    assert moving.names.asked.count("replica.test") >= 3
    assert [record.getMessage() for record in caplog.records] == [
        "The name replica.test cannot be looked up:"
        f" [Errno {socket.EAI_AGAIN}] Temporary failure in name resolution"
    ]
    moving.names.addresses["replica.test"] = [NEW]
    wait_until(lambda: at_once(lab, 2) == {3}, "reads come from the new address")
    assert {record.getMessage() for record in caplog.records[1:]} == {
        "A connection to 127.0.0.2 is replaced: replica.test leads elsewhere now."
    }


def test_two_apps(lab: Lab, moving: Moving) -> None:
    """Each engine looks for itself: what one has found out replaces nothing of another."""
    other = moving.lab(None)
    at_once(other, 2)
    at_once(lab, 2)
    moving.names.addresses["replica.test"] = [NEW]
    wait_until(lambda: lab.run(lab.read) == 3, "reads come from the new address")
    assert at_once(lab, 2) == {3}
    assert at_once(other, 2) == {2}
    wait_until(lambda: moving.links("replica.test") == (2, 2), "only its own are gone")
    other.dispose()


@pytest.mark.parametrize("host", ["127.0.0.2", "localhost"])
def test_what_is_no_name(moving: Moving, host: str) -> None:
    """An address, and ``localhost``, are not looked up."""
    moving.names.addresses[host] = [OLD]
    url = moving.urls["primary.test"].replace("primary.test", host)
    lab = Lab(url, config={"COMMONDB_ENGINE_DEFAULTS": {"pool_resolve_after": SOON}})
    with lab.app.app_context():
        lab.db.create_all()
    for _ in range(3):
        assert lab.run(lab.read) == 1
        time.sleep(SOON)
    assert moving.names.asked == []
    lab.dispose()


def test_a_fork() -> None:
    """A child that is forked while a thread of its parent's looks does not wait for that thread."""
    parents = addresses.Names(SOON)
    link = parents.link("replica.test", OLD)
    parents._looks[link.name].is_under_way = True
    with parents._lock:
        child = os.fork()
        if not child:
            os._exit(parents._lock.locked() or bool(parents._looks) or parents.is_elsewhere(link))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert parents._looks[link.name].is_under_way


#: Not an address, but for the resolver it is one: each driver can connect by it.
SHORT = "127.1"


@pytest.mark.parametrize(
    ("driver", "query"),
    [*((driver, {}) for driver in DRIVERS), ("psycopg", {"hostaddr": "127.0.0.1"})],
)
def test_each_driver(
    driver: str, query: dict[str, str], request: pytest.FixtureRequest, names: Names
) -> None:
    """Each driver says by which name it has connected, unless it was told the address as well."""
    drivername, fixture = DRIVERS[driver]
    url = sa.make_url(f"{drivername}://")
    try:
        url.get_dialect().import_dbapi()
    except ImportError as error:
        skip_or_fail(str(error))
    database: Database[t.Any] = request.getfixturevalue(fixture)
    url = sa.make_url(database.primary_url).set(drivername=drivername, host=SHORT, query=query)
    lab = Lab(
        url.render_as_string(hide_password=False),
        config={"COMMONDB_ENGINE_DEFAULTS": {"pool_resolve_after": SOON}},
    )
    with lab.app.app_context():
        engine = lab.db.engine
    made: list[object] = []
    sa.event.listen(engine, "connect", lambda connection, entry: made.append(connection))

    def use() -> int:
        with engine.connect():
            return len(made)

    assert use() == use() == 1
    time.sleep(SOON * 1.5)
    assert use() == 1
    names.ours[SHORT] = [NEW]
    time.sleep(SOON * 1.5)
    assert use() == (1 if query else 2)
    assert names.asked == ([] if query else [SHORT, SHORT])
    lab.dispose()
