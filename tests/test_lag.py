"""A read that says how far behind it may be is never answered from further behind.

The links of replication go through proxies, so that they can be black-holed.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import math
import threading
import time
import typing as t

import pytest
import sqlalchemy as sa

from flask_commondb import NoReplicaError
from flask_commondb.signals import read_refused

from .apps import Lab
from .servers import wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from .conftest import MakeLab
    from .conftest import MakeProxy
    from .proxy import Proxy
    from .servers import Database
    from .servers import MariaDBCluster
    from .servers import MariaDBServer
    from .servers import PostgreSQLCluster

PRIMARY = 1
REPLICAS = {2, 3}


class Links:
    """The links of replication: from each replica through a proxy to the primary."""

    def __init__(self, cluster: MariaDBCluster, proxy: MakeProxy) -> None:
        self.cluster = cluster
        self.proxies: list[Proxy] = []
        for replica in cluster.replicas:
            self.proxies.append(proxy(cluster.primary.port, None))
            self.follow(replica, self.proxies[-1].port)

    def follow(self, replica: MariaDBServer, port: int, delay: int = 0) -> None:
        self.cluster.stop_replication(replica)
        replica.execute("CHANGE MASTER TO MASTER_PORT = %s, MASTER_DELAY = %s", port, delay)
        self.cluster.start_replication(replica)

    def stall(self) -> None:
        for link in self.proxies:
            link.stall()

    def settle(self) -> None:
        """Wait until what came through before a stall has been replayed."""
        for replica in self.cluster.replicas:
            wait_until(functools.partial(_has_replayed, replica), "all that came to be replayed")

    def resume(self) -> None:
        for link in self.proxies:
            link.resume()

    def restore(self) -> None:
        self.resume()
        for replica in self.cluster.replicas:
            self.follow(replica, self.cluster.primary.port)


def _has_replayed(replica: MariaDBServer) -> bool:
    ((replayed,),) = replica.execute("SELECT @@gtid_slave_pos")
    return bool(replica.slave_status()["Gtid_IO_Pos"] == replayed)


@pytest.fixture
def links(mariadb_database: Database[MariaDBCluster], proxy: MakeProxy) -> t.Iterator[Links]:
    links = Links(mariadb_database.cluster, proxy)
    yield links
    links.restore()


def write(lab: Lab, title: str = "x") -> int:
    """Commit one row."""
    with lab.app.app_context():
        post = lab.Post(title=title)
        lab.db.session.add(post)
        lab.db.session.commit()
        return int(post.id)


def last(lab: Lab) -> tuple[int, int]:
    """The number of the newest row that is seen, and which server has shown it."""
    statement = sa.select(sa.func.who(), sa.func.max(lab.Post.id))
    server, number = lab.db.session.execute(statement).one()
    return number or 0, server


def test_a_black_hole(make_lab: MakeLab, links: Links) -> None:
    """While the links of both replicas are black holes, and the servers say that they are 0 seconds
    behind, no read is older than its bound: the primary answers in the end, then replicas again."""
    bound = 0.5
    lab = make_lab(COMMONDB_MAX_LAG=bound)
    committed: list[tuple[float, int]] = [(time.monotonic(), write(lab))]
    stop = threading.Event()

    def keep_writing() -> None:
        while not stop.wait(0.002):
            number = write(lab)
            committed.append((time.monotonic(), number))

    def read_for(seconds: float, until: t.Callable[[int], bool] | None = None) -> list[int]:
        servers = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            asked = time.monotonic()
            with lab.request():
                number, server = last(lab)
            index = bisect.bisect(committed, (asked - bound, math.inf))
            if index:
                assert number >= committed[index - 1][1], f"server {server} was too far behind"
            servers.append(server)
            if until is not None and until(server):
                break
        return servers

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        before = read_for(1)
        links.stall()
        read_for(bound)
        links.settle()
        read_for(bound)
        meanwhile = read_for(2)
        lags = [each.slave_status()["Seconds_Behind_Master"] for each in links.cluster.replicas]
        links.resume()
        read_for(10, until=REPLICAS.__contains__)
        after = read_for(1)
    finally:
        stop.set()
        writer.join()
    assert lags == [0, 0]
    assert set(meanwhile) == {PRIMARY}
    for servers in (before, after):
        assert sum(server in REPLICAS for server in servers) > 0.9 * len(servers)


def test_one_that_is_delayed(make_lab: MakeLab, links: Links) -> None:
    """A replica that is later by design serves who allows for that, and nobody else."""
    delayed, other = links.cluster.replicas
    links.follow(delayed, links.proxies[0].port, delay=2)
    lab = make_lab()
    stop = threading.Event()

    def keep_writing() -> None:
        while not stop.wait(0.02):
            write(lab)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        time.sleep(0.5)
        strict, lax = set(), set()
        for _ in range(60):
            with lab.request(), lab.db.replica(max_lag=0.5):
                strict.add(lab.read())
            with lab.request(), lab.db.replica(max_lag=60):
                lax.add(lab.read())
            time.sleep(0.05)  # until there is a position of the primary that it can have reached
    finally:
        stop.set()
        writer.join()
    assert strict == {other.server_id}
    assert lax == REPLICAS


def test_one_name_for_two_servers(make_lab: MakeLab, links: Links, proxy: MakeProxy) -> None:
    """When one URL leads to several servers, what is proved of one says nothing of another."""
    near, far = links.cluster.replicas
    door = proxy(near.port, None)
    url = sa.make_url(make_lab().app.config["COMMONDB_REPLICAS"][0]).set(port=door.port)
    lab = make_lab(COMMONDB_REPLICAS=[url], COMMONDB_MAX_LAG=2)
    write(lab)
    links.cluster.sync()
    assert lab.run(lab.read) == near.server_id
    links.proxies[1].stall()
    number = write(lab)
    wait_until(lambda: lab.run(lambda: last(lab)) == (number, near.server_id), "it to have that")
    time.sleep(2.1)
    assert lab.run(lab.read) == near.server_id  # which proves anew that it is current
    door.target = far.port
    lab.engines[1].dispose()
    assert lab.run(lambda: last(lab)) == (number, PRIMARY)
    with lab.request(), lab.db.replica(max_lag=math.inf):
        assert last(lab) == (number - 1, far.server_id)


def test_idle(make_lab: MakeLab) -> None:
    """When nothing is written a replica stays current, however long ago the last write was."""
    lab = make_lab(COMMONDB_MAX_LAG=0.2)
    write(lab)
    servers = set()
    for _ in range(30):
        servers.add(lab.run(lab.read))
        time.sleep(0.03)
    assert servers == REPLICAS


def test_what_it_costs(make_lab: MakeLab) -> None:
    """The servers are asked now and then, not for every read; without a bound they never are."""
    lab = make_lab()
    for _ in range(20):
        lab.run(lab.read)
    assert probes(lab) == 0
    began = time.monotonic()
    for _ in range(200):
        with lab.request(), lab.db.replica(max_lag=30):
            lab.read()
    # For each replica two questions when it is first used. A replica that is just behind is asked
    # a few times more.
    assert time.monotonic() - began < 15
    assert 3 <= probes(lab) <= 16


def probes(lab: Lab) -> int:
    return sum(status.probes for status in lab.db.server_status(lab.app))


def test_in_the_middle_of_a_unit(make_lab: MakeLab, links: Links) -> None:
    """A unit of work whose replica falls behind goes on on the primary, and is told why."""
    lab = make_lab(COMMONDB_MAX_LAG=0.3)
    with lab.request():
        assert lab.read() in REPLICAS
        links.stall()
        number = write(lab)
        time.sleep(0.35)
        with lab.routes() as routes:
            assert last(lab) == (number, PRIMARY)
            assert last(lab) == (number, PRIMARY)
    assert routes == [("primary", "lag"), ("primary", "lag")]


def test_stale(make_lab: MakeLab, links: Links) -> None:
    """With the fallback ``"stale"`` a replica that is too far behind serves, and not the primary;
    one that is not goes before it."""
    lab = make_lab(COMMONDB_MAX_LAG=0.3, COMMONDB_FALLBACK="stale")
    lab.run(lab.read)
    links.stall()
    number = write(lab)
    time.sleep(0.35)
    for _ in range(5):
        with lab.request(), lab.routes() as routes:
            for _ in range(2):
                seen, server = last(lab)
                assert seen < number
                assert server in REPLICAS
        assert routes == [("replica", "fallback")] * 2
    links.proxies[0].resume()
    first = links.cluster.replicas[0].server_id

    def is_current() -> bool:
        with lab.routes() as routes:
            answer = lab.run(lambda: last(lab))
        return (answer, routes) == ((number, first), [("replica", "read")])

    wait_until(is_current, "the first replica to be current")
    for _ in range(10):
        assert is_current()


def test_stale_beside_one_that_is_down(make_lab: MakeLab, links: Links) -> None:
    """The fallback ``"stale"`` finds the replica that is behind, also in the read that finds out
    that the other one is down."""
    lab = make_lab(
        COMMONDB_MAX_LAG=0.3,
        COMMONDB_FALLBACK="stale",
        COMMONDB_POLICY=lambda replicas: replicas[0],
    )
    lab.run(lab.read)
    links.stall()
    behind, other = links.cluster.replicas
    other.kill()
    try:
        time.sleep(0.35)
        assert lab.run(lab.read) == behind.server_id
    finally:
        other.start()


def test_error(make_lab: MakeLab, links: Links) -> None:
    """With the fallback ``"error"`` such a read raises at once, says why, and harms nothing."""
    lab = make_lab(COMMONDB_MAX_LAG=0.3)
    refused: list[t.Any] = []

    def note(app: object, bind_key: str | None, error: Exception) -> None:
        refused.append((bind_key, error))

    lab.run(lab.read)
    links.stall()
    number = write(lab)
    time.sleep(0.35)
    with lab.request(), read_refused.connected_to(note):
        with lab.db.replica(fallback="error"):
            with pytest.raises(NoReplicaError, match="bind None is known to be current") as caught:
                last(lab)
            assert (caught.value.bind_key, caught.value.reason) == (None, "lag")
            assert isinstance(caught.value, sa.exc.OperationalError)
        assert refused == [(None, caught.value)]
        assert last(lab) == (number, PRIMARY)  # outside of the scope it may
    links.resume()

    def is_current() -> bool:
        with lab.request(), lab.db.replica(fallback="error"), contextlib.suppress(NoReplicaError):
            return last(lab)[1] in REPLICAS
        return False

    wait_until(is_current, "a replica to be current")


def test_scopes(make_lab: MakeLab, links: Links) -> None:
    """The innermost scope that says how far behind a read may be counts; infinity is no bound."""
    lab = make_lab(COMMONDB_MAX_LAG=0.3)
    lab.run(lab.read)
    links.stall()
    write(lab)
    time.sleep(0.35)
    with lab.app.app_context(), lab.db.replica(max_lag=math.inf):
        assert lab.read() in REPLICAS
        with lab.db.replica():
            assert lab.read() in REPLICAS
        with lab.db.replica(None, max_lag=0.3):
            assert lab.read() == PRIMARY


@pytest.mark.parametrize("lag", [0, -1, "1", True, math.nan])
def test_no_lag(lab_without_servers: Lab, lag: t.Any) -> None:
    """A bound is a number of seconds above 0."""
    with pytest.raises(ValueError, match="max_lag is a number of seconds above 0"):
        lab_without_servers.db.replica(max_lag=lag)


def test_no_fallback(lab_without_servers: Lab) -> None:
    """A fallback is one of three."""
    with pytest.raises(ValueError, match=r"no fallback 'none'; known are 'primary', 'stale'"):
        lab_without_servers.db.replica(fallback="none")


def test_a_primary_that_is_gone(
    make_lab: MakeLab, mariadb_database: Database[MariaDBCluster]
) -> None:
    """Without a primary nothing is proved any more: soon replicas serve whom a stale one is good
    enough for, and nobody else."""
    lab = make_lab(COMMONDB_MAX_LAG=0.5, COMMONDB_FALLBACK="stale")
    assert lab.run(lab.read) in REPLICAS
    mariadb_database.cluster.primary.kill()
    time.sleep(0.6)
    with lab.request(), lab.routes() as routes:
        assert lab.read() in REPLICAS
    assert routes == [("replica", "fallback")]
    with lab.request(), lab.db.replica(fallback="error"):
        with pytest.raises(NoReplicaError, match="known to be current enough"):
            lab.read()


def test_a_primary_that_is_frozen(
    make_lab: MakeLab, mariadb_database: Database[MariaDBCluster]
) -> None:
    """A primary that does not answer is waited for by one read now and then, not by all of them."""
    lab = make_lab(COMMONDB_MAX_LAG=0.5, COMMONDB_FALLBACK="stale")
    assert lab.run(lab.read) in REPLICAS
    mariadb_database.cluster.primary.freeze()
    time.sleep(0.6)
    waited = []
    for _ in range(40):
        began = time.monotonic()
        assert lab.run(lab.read) in REPLICAS
        waited.append(time.monotonic() - began > 0.5)
        time.sleep(0.02)
    assert 1 <= sum(waited) <= 3
    mariadb_database.cluster.primary.thaw()

    def is_current() -> bool:
        with lab.routes() as routes:
            lab.run(lab.read)
        return routes == [("replica", "read")]

    wait_until(is_current, "a replica to be current", timeout=20)


def test_a_busy_primary(make_lab: MakeLab) -> None:
    """A primary whose connections are all in use is asked all the same: replicas stay current."""
    options = {"pool_size": 2, "max_overflow": 0, "pool_timeout": 1}
    lab = make_lab(COMMONDB_MAX_LAG=0.2, SQLALCHEMY_ENGINE_OPTIONS=options)
    lab.run(lab.read)
    with lab.app.app_context():
        taken = [lab.db.engine.connect() for _ in range(2)]
    time.sleep(0.3)
    for _ in range(10):
        assert lab.run(lab.read) in REPLICAS
        time.sleep(0.03)
    for connection in taken:
        connection.close()


def test_many_threads(make_lab: MakeLab) -> None:
    """Threads that all need a proof at the same time all find a replica."""
    lab = make_lab(COMMONDB_MAX_LAG=0.5)
    write(lab)
    servers: list[int] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        for _ in range(30):
            servers.append(lab.run(lab.read))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(servers) == 240
    assert set(servers) == REPLICAS
    assert lab.checked_out() == 0


def test_postgresql(postgresql_database: Database[PostgreSQLCluster]) -> None:
    """The same on PostgreSQL: a standby whose replay is paused serves only whom that is enough."""
    cluster = postgresql_database.cluster
    lab = Lab(
        postgresql_database.primary_url,
        postgresql_database.replica_urls,
        {"COMMONDB_MAX_LAG": 0.5},
    )
    with lab.app.app_context():
        lab.db.create_all()
    postgresql_database.sync()

    def newest() -> tuple[int, int]:
        statement = sa.select(sa.func.inet_server_port(), sa.func.max(lab.Post.id))
        server, number = lab.db.session.execute(statement).one()
        return number or 0, server

    write(lab)
    wait_until(lambda: lab.run(newest) == (1, cluster.standby.port), "the standby to be current")
    for _ in range(10):
        assert lab.run(newest) == (1, cluster.standby.port)
    for engine in lab.engines:
        engine.dispose()  # so that the stream's connection is a new one, and is asked
    asked = lab.db.server_status(lab.app)[1].probes
    with lab.request():
        assert len(list(lab.db.stream(sa.select(lab.Post.id)))) == 1
    assert lab.db.server_status(lab.app)[1].probes > asked
    cluster.standby.execute("SELECT pg_wal_replay_pause()")
    number = write(lab)
    time.sleep(0.6)
    for _ in range(5):
        assert lab.run(newest) == (number, cluster.primary.port)
    with lab.request(), lab.db.replica(max_lag=math.inf):
        assert newest() == (1, cluster.standby.port)
    cluster.standby.execute("SELECT pg_wal_replay_resume()")
    wait_until(lambda: lab.run(newest) == (number, cluster.standby.port), "it to have caught up")
    lab.dispose()


@pytest.fixture
def lab_without_servers(tmp_path: Path) -> t.Iterator[Lab]:
    file = f"sqlite:///{tmp_path}/app.db"
    lab = Lab(file, [file])
    with lab.app.app_context():
        lab.db.create_all()
    yield lab
    lab.dispose()


def test_sqlite(lab_without_servers: Lab) -> None:
    """A replica that is the same file is never behind, and is asked nothing."""
    lab = lab_without_servers
    write(lab)
    with lab.request(), lab.routes() as routes, lab.db.replica(max_lag=1e-9):
        assert lab.titles() == ["x"]
    assert routes == [("replica", "scope")]
    assert probes(lab) == 0
