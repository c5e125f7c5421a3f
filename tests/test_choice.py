"""The choice of a replica on real servers: policies, zones, a slow one, and what is counted."""

from __future__ import annotations

import collections
import os
import random
import time
import typing as t

import pytest
import sqlalchemy as sa

from flask_commondb.policies import POLICIES
from flask_commondb.signals import routed

from .apps import busy
from .servers import wait_until

if t.TYPE_CHECKING:
    from .conftest import MakeLab
    from .conftest import MakeProxy
    from .proxy import Proxy
    from .servers import Database
    from .servers import MariaDBCluster

PRIMARY = 1
REPLICAS = {2, 3}

#: Mixed statements, of which each is looked for in the servers' own logs.
STATEMENTS = int(os.environ.get("COMMONDB_TEST_REQUESTS", "2000")) * 2


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(
    make_lab: MakeLab, mariadb_database: Database[MariaDBCluster], policy: str
) -> None:
    """Each policy obeys the weights, as the servers that have answered say."""
    first, second = mariadb_database.replica_urls
    lab = make_lab([{"url": first, "weight": 3}, second], COMMONDB_POLICY=policy)
    counts = collections.Counter(lab.run(lab.read) for _ in range(400))
    assert set(counts) == REPLICAS
    assert counts[2] / 400 == pytest.approx(0.75, abs=0.11)  # five standard deviations


def test_a_policy_of_ones_own(make_lab: MakeLab) -> None:
    """A function that is given the candidates, with their figures, chooses once for each unit."""
    asked: list[list[tuple[str, float, int]]] = []

    def last(candidates: t.Sequence[t.Any]) -> t.Any:
        asked.append([(each.name, each.weight, each.in_use) for each in candidates])
        return candidates[-1]

    lab = make_lab(COMMONDB_POLICY=last)
    with lab.request():
        assert [lab.read() for _ in range(3)] == [3, 3, 3]
    assert len(asked) == 1
    assert [(weight, in_use) for _, weight, in_use in asked[0]] == [(1, 0), (1, 0)]


def test_policy_of_a_bind(make_lab: MakeLab, mariadb_database: Database[MariaDBCluster]) -> None:
    """What stands beside a bind's URL is for that bind."""
    bind = {
        "url": mariadb_database.primary_url,
        "replicas": mariadb_database.replica_urls,
        "policy": lambda candidates: candidates[1],
    }
    lab = make_lab(COMMONDB_POLICY="round_robin", SQLALCHEMY_BINDS={"other": bind})
    who = sa.select(sa.func.who())

    def both() -> tuple[int, int | None]:
        return lab.read(), lab.db.sessions["other"].scalar(who)

    assert [lab.run(both) for _ in range(4)] == [(2, 3), (3, 3), (2, 3), (3, 3)]


def test_zones(make_lab: MakeLab, mariadb_database: Database[MariaDBCluster]) -> None:
    """The nearest zone serves alone, until its replica is down or has no connections left."""
    near, far = mariadb_database.replica_urls
    options = {"pool_size": 1, "max_overflow": 1}
    lab = make_lab(
        [{"url": far, "zone": "far"}, {"url": near, "zone": "near", **options}],
        COMMONDB_ZONES=["near", "far"],
    )
    assert {lab.run(lab.read) for _ in range(20)} == {2}
    with lab.app.app_context():
        taken = [lab.db.replica_engines[None][1].connect() for _ in range(2)]
    assert {lab.run(lab.read) for _ in range(5)} == {3}
    for connection in taken:
        connection.close()
    assert {lab.run(lab.read) for _ in range(5)} == {2}
    mariadb_database.cluster.replicas[0].kill()
    assert {lab.run(lab.read) for _ in range(20)} == {3}


def test_a_slow_replica(
    make_lab: MakeLab, mariadb_database: Database[MariaDBCluster], proxy: MakeProxy
) -> None:
    """A replica that is slower by 300 ms gets less than a twentieth of the reads within 2 s, and
    its share again within 10 s of its recovery."""
    replicas = mariadb_database.cluster.replicas
    links: list[Proxy] = [proxy(replica.port, None) for replica in replicas]
    urls = [
        sa.make_url(url).set(port=link.port)
        for url, link in zip(mariadb_database.replica_urls, links, strict=True)
    ]
    slow, link = replicas[0], links[0]
    lab = make_lab(urls)
    reads: list[tuple[float, int]] = []

    def read() -> None:
        server = lab.run(lab.read)
        reads.append((time.monotonic(), server))
        time.sleep(0.002)

    def share(since: float) -> float:
        servers = [server for at, server in reads.copy() if at >= since]
        return servers.count(slow.server_id) / max(len(servers), 1)

    def has_its_share() -> bool:
        since = time.monotonic()
        time.sleep(0.5)
        return 0.35 < share(since) < 0.65

    with busy(8, read):
        wait_until(has_its_share, "both to be read from")
        link.delay(0.15)  # in each direction
        time.sleep(2)
        since = time.monotonic()
        time.sleep(4)
        assert share(since) < 0.05
        link.delay(0)
        wait_until(has_its_share, "its share", timeout=10)


def test_counters(make_lab: MakeLab, mariadb_database: Database[MariaDBCluster]) -> None:
    """Over thousands of mixed statements, what we count for each server is what its own log says;
    so are the signals, and our own questions stand apart."""
    lab = make_lab()
    told: collections.Counter[str] = collections.Counter()

    def note(app: object, server: str, **_: object) -> None:
        told[server] += 1

    chance = random.Random(5)
    Post = lab.Post

    def write() -> None:
        lab.db.session.add(Post(title="orm"))
        lab.db.session.commit()

    actions: list[tuple[str, t.Callable[[], object]]] = [
        ("GET", lab.read),
        ("GET", lab.titles),
        ("GET", lambda: lab.db.session.get(Post, chance.randrange(50))),
        ("GET", lambda: lab.db.session.execute(sa.text("SELECT 1"))),
        ("GET", lambda: lab.db.session.scalar(sa.select(Post.id).with_for_update().limit(1))),
        ("GET", lambda: lab.db.session.execute(sa.insert(Post).values(title="core"))),
        ("POST", lambda: lab.db.session.execute(sa.update(Post).values(title="x"))),
        ("POST", write),
        ("POST", lab.titles),
    ]
    for _ in range(5):
        for method, action in actions:
            lab.run(action, method)  # connections are made, and set up
    servers = mariadb_database.cluster.servers
    names = {server.server_id: f"127.0.0.1:{server.port}" for server in servers}
    before = {status.server: status for status in lab.db.server_status(lab.app)}
    for server in servers:
        server.execute("SET GLOBAL log_output = 'TABLE'")
        server.execute("TRUNCATE mysql.general_log")
        server.execute("SET GLOBAL general_log = ON")
    done = 0
    try:
        with routed.connected_to(note, lab.app):
            while done < STATEMENTS:
                chosen = chance.choices(actions, k=chance.randint(1, 5))
                with lab.request(chance.choice(["GET", "POST"])):
                    for _, action in chosen:
                        action()
                        done += 1
                if done % 50 == 0:
                    with lab.request(), lab.db.replica(max_lag=0.01):
                        lab.read()
    finally:
        for server in servers:
            server.execute("SET GLOBAL general_log = OFF")
    after = {status.server: status for status in lab.db.server_status(lab.app)}
    for server in servers:
        name = names[server.server_id]
        logged = server.execute(
            "SELECT CONVERT(argument USING utf8mb4) FROM mysql.general_log"
            " WHERE user_host LIKE 'app%%' AND command_type = 'Query'"
            " AND argument NOT IN ('COMMIT', 'ROLLBACK', 'SELECT 1 FROM DUAL')"
            " AND argument NOT LIKE 'SET %%'"
        )
        probes = [text for (text,) in logged if "@@" in text]
        assert after[name].probes - before[name].probes == len(probes)
        assert after[name].statements - before[name].statements == len(logged) - len(probes)
        assert told[name] == len(logged) - len(probes)
        assert len(logged) > STATEMENTS / 20
