"""Rules 1 to 8 on a MariaDB primary with two replicas; each server is asked who it is."""

from __future__ import annotations

import threading
import time
import typing as t

import pytest
import sqlalchemy as sa
from sqlalchemy.dialects import mysql

from flask_commondb.liveness import AT_ONCE
from flask_commondb.signals import replica_down

from .apps import Lab
from .apps import can_say_who
from .servers import wait_until

if t.TYPE_CHECKING:
    from .conftest import MakeLab
    from .conftest import MakeProxy
    from .servers import Database
    from .servers import MariaDBCluster

PRIMARY = 1
REPLICAS = {2, 3}


@pytest.fixture
def lab(make_lab: MakeLab, mariadb_database: Database[MariaDBCluster]) -> Lab:
    return with_a_post(make_lab(), mariadb_database)


def with_a_post(lab: Lab, database: Database[MariaDBCluster]) -> Lab:
    with lab.app.app_context():
        lab.db.session.add(lab.Post(title="first"))
        lab.db.session.commit()
    database.sync()
    return lab


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "QUERY"])
def test_reading_methods(lab: Lab, method: str) -> None:
    """A request whose method only reads is answered by a replica."""
    assert lab.run(lab.read, method) in REPLICAS


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_writing_methods(lab: Lab, method: str) -> None:
    """A request with any other method is answered by the primary, reads included."""
    assert lab.run(lab.read, method) == PRIMARY


def test_real_requests(lab: Lab) -> None:
    """Through the test client as well: GET by a replica, POST by the primary."""
    lab.app.add_url_rule("/", "index", lambda: str(lab.read()), methods=["GET", "POST"])
    client = lab.app.test_client()
    assert int(client.get("/").text) in REPLICAS
    assert int(client.post("/").text) == PRIMARY


def test_outside_a_request(lab: Lab) -> None:
    """Without a request, reads go to the primary."""
    with lab.app.app_context():
        assert lab.read() == PRIMARY


def test_one_replica_for_a_unit(lab: Lab) -> None:
    """A unit of work reads from one replica, though both serve; it holds one connection."""
    seen = set()
    for _ in range(30):
        with lab.request():
            servers = {lab.read() for _ in range(5)}
            assert len(servers) == 1
            assert lab.checked_out() == 1
        seen |= servers
    assert seen == REPLICAS


def test_after_a_write(lab: Lab) -> None:
    """A GET that writes succeeds; from its first write on everything comes from the primary."""
    with lab.request(), lab.routes() as routes:
        assert lab.read() in REPLICAS
        lab.db.session.add(lab.Post(title="second"))
        assert lab.read() == PRIMARY  # autoflush has written
        assert lab.titles() == ["first", "second"]
        lab.db.session.commit()
        assert lab.read() == PRIMARY
        assert lab.titles() == ["first", "second"]
        with lab.db.replica():
            assert lab.read() == PRIMARY
    assert routes[0] == ("replica", "read")
    assert set(routes[1:]) == {("primary", "write")}


def test_the_next_unit_reads_from_a_replica_again(lab: Lab) -> None:
    """What has pinned one unit of work does not reach the next."""
    with lab.request():
        lab.db.session.add(lab.Post(title="second"))
        lab.db.session.commit()
    assert lab.run(lab.read) in REPLICAS


def test_all_sessions_of_a_context_stay_with_a_write(lab: Lab) -> None:
    """A write through one session moves the reads of the context's other sessions, too."""
    with lab.request():
        own = lab.db.sessions[None]
        own.add(lab.Post(title="second"))
        own.commit()
        assert lab.read() == PRIMARY
        lab.db.session.remove()
        assert lab.titles() == ["first", "second"]


def _for_update(lab: Lab) -> t.Any:
    return sa.select(sa.func.who()).select_from(lab.Post).with_for_update()


def _for_share(lab: Lab) -> t.Any:
    return sa.select(sa.func.who()).select_from(lab.Post).with_for_update(read=True)


def _text(lab: Lab) -> t.Any:
    return sa.text("SELECT who()")


def _text_inside(lab: Lab) -> t.Any:
    return sa.select(sa.func.who()).select_from(lab.Post).where(sa.text("1 = 1"))


def _unknown_function(lab: Lab) -> t.Any:
    return sa.select(sa.func.who(), sa.func.get_lock("routing", 0))


def _last_insert_id(lab: Lab) -> t.Any:
    return sa.select(sa.func.who(), sa.func.last_insert_id())


def _literal(lab: Lab) -> t.Any:
    return sa.select(sa.literal_column("who()"))


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        (_for_update, "locked"),
        (_for_share, "locked"),
        (_text, "unknown_sql"),
        (_text_inside, "unknown_sql"),
        (_unknown_function, "unknown_sql"),
        (_last_insert_id, "unknown_sql"),
        (_literal, "unknown_sql"),
    ],
)
def test_what_is_not_provably_a_read(
    lab: Lab, statement: t.Callable[[Lab], t.Any], reason: str
) -> None:
    """A lock, SQL text or an unknown function goes to the primary, and the unit stays there."""
    with lab.request(), lab.routes() as routes:
        assert lab.read() in REPLICAS
        answer = lab.db.session.execute(statement(lab)).first()
        assert answer is not None
        assert answer[0] == PRIMARY
        assert lab.read() == PRIMARY
    assert routes == [("replica", "read"), ("primary", reason), ("primary", reason)]


@pytest.mark.parametrize(
    "write",
    [
        lambda lab: lab.db.session.execute(sa.insert(lab.Post).values(title="x")),
        lambda lab: lab.db.session.execute(
            mysql.insert(lab.Post)
            .values(id=1, title="x")
            .on_duplicate_key_update(title=sa.func.concat("x", "y"))
        ),
        lambda lab: lab.db.session.execute(sa.update(lab.Post).values(title="x")),
        lambda lab: lab.db.session.execute(sa.delete(lab.Post)),
        lambda lab: lab.db.session.execute(sa.insert(lab.Post), [{"title": "x"}, {"title": "y"}]),
        lambda lab: lab.db.session.bulk_insert_mappings(lab.Post, [{"title": "x"}]),
        lambda lab: lab.db.session.query(lab.Post).delete(),
        lambda lab: lab.db.session.execute(sa.text("DELETE FROM post")),
        lambda lab: lab.db.session.connection().execute(sa.delete(lab.Post)),
        lambda lab: lab.db.session.execute(
            sa.schema.CreateTable(sa.Table("made", sa.MetaData(), sa.Column("id", sa.Integer)))
        ),
    ],
)
def test_every_write_in_a_get(lab: Lab, write: t.Callable[[Lab], object]) -> None:
    """However a view writes in a GET, it raises nothing and the primary has it."""
    with lab.request():
        assert lab.read() in REPLICAS
        write(lab)
        assert lab.read() == PRIMARY
        lab.db.session.commit()


def test_cursor_in_a_get(lab: Lab) -> None:
    """A raw cursor is the primary's, as what it does is not seen."""
    with lab.request():
        assert lab.read() in REPLICAS
        with lab.db.cursor() as cursor:
            cursor.execute("SELECT who()")
            assert cursor.fetchall() == ((PRIMARY,),)
        assert lab.read() == PRIMARY


def test_primary_scope(lab: Lab) -> None:
    """``db.primary()`` reads from the primary inside the block, and only there."""
    with lab.request(), lab.routes() as routes:
        with lab.db.primary():
            assert lab.read() == PRIMARY
        assert lab.read() in REPLICAS
    assert routes == [("primary", "scope"), ("replica", "read")]


def test_replica_scope(lab: Lab) -> None:
    """``db.replica()`` reads from a replica outside requests and in a POST; text is believed."""
    with lab.app.app_context(), lab.db.replica():
        assert lab.read() in REPLICAS
        assert lab.db.session.scalar(sa.text("SELECT who()")) in REPLICAS
        with lab.db.cursor() as cursor:
            cursor.execute("SELECT who()")
            assert cursor.fetchone()[0] in REPLICAS
    with lab.request("POST"):
        assert lab.read() == PRIMARY
        with lab.db.replica():
            assert lab.read() in REPLICAS
        assert lab.read() == PRIMARY


def test_scope_as_decorator(lab: Lab) -> None:
    """A scope decorates a view."""
    lab.app.add_url_rule("/p", "p", lab.db.primary()(lambda: str(lab.read())))
    lab.app.add_url_rule("/r", "r", lab.db.replica()(lambda: str(lab.read())), methods=["POST"])
    client = lab.app.test_client()
    for _ in range(3):
        assert int(client.get("/p").text) == PRIMARY
        assert int(client.post("/r").text) in REPLICAS


def test_scope_of_another_bind(lab: Lab, mariadb_database: Database[MariaDBCluster]) -> None:
    """A scope that names binds leaves the others alone."""
    other = Lab(
        mariadb_database.primary_url,
        config={
            "SQLALCHEMY_BINDS": {
                "other": {
                    "url": mariadb_database.primary_url,
                    "replicas": mariadb_database.replica_urls,
                }
            }
        },
    )
    with other.request(), other.db.primary("other"):
        with other.db.replica(None):
            assert other.read() == PRIMARY  # the default bind has no replicas
        statement = sa.select(sa.func.who())
        assert other.db.sessions["other"].scalar(statement) == PRIMARY
    with other.request():
        assert other.db.sessions["other"].scalar(statement) in REPLICAS
    other.dispose()


def test_bind_of_the_caller(lab: Lab) -> None:
    """An engine given by the caller is theirs: neither method nor scope nor write moves it."""
    with lab.request():
        replica = next(iter(lab.db.router.replicas))
        statement = sa.text("SELECT who()")
        with lab.db.replica():
            own = {"bind": lab.db.engine}
            assert lab.db.session.scalar(statement, bind_arguments=own) == PRIMARY
        lab.db.session.add(lab.Post(title="x"))
        lab.db.session.flush()
        own = {"bind": replica}
        assert lab.db.session.scalar(statement, bind_arguments=own) in REPLICAS


def test_get_bind_without_a_statement(lab: Lab) -> None:
    """``session.get_bind()`` is upstream's own engine, and asking decides nothing."""
    with lab.request():
        assert lab.db.session.get_bind() is lab.db.engine
        assert lab.db.session.get_bind(lab.Post) is lab.db.engine
        assert lab.read() in REPLICAS


def test_explicit_routing(mariadb_database: Database[MariaDBCluster]) -> None:
    """With ``COMMONDB_ROUTING = "explicit"`` only a scope sends reads to a replica."""
    can_say_who(mariadb_database)
    lab = Lab(
        mariadb_database.primary_url,
        mariadb_database.replica_urls,
        config={"COMMONDB_ROUTING": "explicit"},
    )
    with lab.app.app_context():
        lab.db.create_all()
    mariadb_database.sync()
    with lab.request():
        assert lab.read() == PRIMARY
        with lab.db.replica():
            assert lab.read() in REPLICAS
    lab.dispose()


def test_weights(mariadb_database: Database[MariaDBCluster]) -> None:
    """A replica's weight is its share of the units of work."""
    can_say_who(mariadb_database)
    first, second = mariadb_database.replica_urls
    lab = Lab(mariadb_database.primary_url, [{"url": first, "weight": 9}, second])
    with lab.app.app_context():
        lab.db.create_all()
    mariadb_database.sync()
    served = [lab.run(lab.read) for _ in range(200)]
    # 180 expected; 150 is seven standard deviations away
    assert served.count(2) > 150
    assert served.count(3) > 0
    lab.dispose()


def test_a_transaction_block_reads_from_the_primary(lab: Lab) -> None:
    """``db.transaction()`` announces a write: what it reads to change comes from the primary."""
    with lab.request(), lab.db.transaction() as session:
        assert session.scalar(sa.select(sa.func.who())) == PRIMARY


def test_one_replica_down(lab: Lab, mariadb_database: Database[MariaDBCluster]) -> None:
    """With one replica dead every unit is answered by the other, without an error."""
    lab.run(lab.read)
    mariadb_database.cluster.replicas[0].kill()
    assert {lab.run(lab.read) for _ in range(20)} == {3}


def test_all_replicas_down(lab: Lab, mariadb_database: Database[MariaDBCluster]) -> None:
    """With all replicas dead the primary answers, signals say which are down, and why."""
    for _ in range(10):
        lab.run(lab.read)  # connections to both stand in the pools
    for replica in mariadb_database.cluster.replicas:
        replica.kill()
    down: list[str] = []

    def note(app: object, server: str, **_: object) -> None:
        down.append(server)

    with replica_down.connected_to(note), lab.routes() as routes:
        assert {lab.run(lab.read) for _ in range(10)} == {PRIMARY}
    assert set(routes) == {("primary", "replica_down")}
    ports = {f"127.0.0.1:{server.port}" for server in mariadb_database.cluster.replicas}
    assert set(down) == ports
    assert len(down) == 2  # asked once each, then left alone


def test_a_replica_comes_back(lab: Lab, mariadb_database: Database[MariaDBCluster]) -> None:
    """A replica that was down serves again once its pause is over."""
    replica = mariadb_database.cluster.replicas[0]
    replica.kill()
    lab.run(lambda: [lab.read()])
    for _ in range(20):
        lab.run(lab.read)
    replica.start()
    mariadb_database.sync()
    wait_until(lambda: lab.run(lab.read) == replica.server_id, "the replica to be used again")
    assert {lab.run(lab.read) for _ in range(30)} == REPLICAS


def test_a_frozen_replica(lab: Lab, mariadb_database: Database[MariaDBCluster]) -> None:
    """A replica that accepts and never greets costs one connect timeout, not an error."""
    frozen, other = mariadb_database.cluster.replicas
    quick = [f"{url}&connect_timeout=1" for url in _with_query(mariadb_database.replica_urls)]
    patient = Lab(mariadb_database.primary_url, quick)
    frozen.freeze()
    try:
        assert {patient.run(patient.read) for _ in range(10)} == {other.server_id}
    finally:
        frozen.thaw()
    patient.dispose()


def test_killed_while_it_reads(
    mariadb_database: Database[MariaDBCluster], make_lab: MakeLab
) -> None:
    """A short read whose connection is lost is repeated: the unit's first on any replica, a later
    one on the same replica or on the primary."""
    lab = with_a_post(make_lab(COMMONDB_READ_FUNCTIONS=["who", "sleep"]), mariadb_database)
    nap = sa.select(sa.func.who(), sa.func.sleep(0.3))

    def kill() -> None:
        for replica in mariadb_database.cluster.replicas:
            _kill_connections(replica, mariadb_database.name)

    for has_read in (False, True):
        with lab.request(), lab.routes() as routes:
            before = lab.read() if has_read else None
            killer = threading.Timer(0.1, kill)
            killer.start()
            server, _ = lab.db.session.execute(nap).one()
            killer.join()
            assert server == before if has_read else server in REPLICAS
            assert lab.read() == server
        assert {role for role, _ in routes} == {"replica"}
    assert lab.checked_out() == 0


def test_all_killed_while_they_read(
    mariadb_database: Database[MariaDBCluster], make_lab: MakeLab
) -> None:
    """A unit whose replicas die under its first read, one after the other, has its answer from the
    primary; so has one that has read before, at once."""
    lab = with_a_post(make_lab(COMMONDB_READ_FUNCTIONS=["who", "sleep"]), mariadb_database)
    # A replica would take longer than the test.
    seconds = sa.case((sa.func.who() == PRIMARY, 0), else_=60)
    nap = sa.select(sa.func.who(), sa.func.sleep(seconds))
    for has_read in (False, True):
        with lab.request():
            if has_read:
                assert lab.read() in REPLICAS
            killers = [threading.Timer(0.1, mariadb_database.cluster.replicas[0].kill)]
            killers.append(threading.Timer(0.2, mariadb_database.cluster.replicas[1].kill))
            for killer in killers:
                killer.start()
            server, _ = lab.db.session.execute(nap).one()
            for killer in killers:
                killer.join()
            assert server == PRIMARY
            lab.db.session.add(lab.Post(title="second"))
            lab.db.session.commit()
        if not has_read:
            for replica in mariadb_database.cluster.replicas:
                replica.start()
            mariadb_database.sync()
            wait_until(lambda: lab.run(lab.read) in REPLICAS, "a replica to be used again")
    assert lab.checked_out() == 0


def test_a_statement_that_is_always_lost(
    make_lab: MakeLab, mariadb_database: Database[MariaDBCluster]
) -> None:
    """A statement that loses its connection each time is not repeated without end."""
    lab = with_a_post(
        make_lab(
            COMMONDB_READ_FUNCTIONS=["sleep"],
            SQLALCHEMY_ENGINE_OPTIONS={"connect_args": {"read_timeout": 0.2}},
        ),
        mariadb_database,
    )
    tries: list[str] = []
    for engine in lab.engines:
        sa.event.listen(engine, "before_cursor_execute", lambda *args: tries.append(args[2]))
    with lab.request():
        with pytest.raises(sa.exc.OperationalError, match="Lost connection"):
            lab.db.session.scalar(sa.select(sa.func.sleep(0.5)))
        assert 1 < len(tries) <= 4
        assert lab.titles() == ["first"]


def test_what_a_listener_reads_first(
    mariadb_database: Database[MariaDBCluster], make_lab: MakeLab, proxy: MakeProxy
) -> None:
    """A write whose connection is lost is not repeated, and its error is not masked, although a
    listener has read from a replica in it whose connection is lost as well."""
    with_a_post(make_lab(), mariadb_database)
    links = [proxy(server.port, None) for server in mariadb_database.cluster.servers[:2]]
    primary, replica = (
        sa.make_url(url).set(port=link.port).render_as_string(hide_password=False)
        for url, link in zip(
            (mariadb_database.primary_url, *mariadb_database.replica_urls), links, strict=False
        )
    )
    lab = Lab(primary, [replica])

    def read_first(state: t.Any) -> None:
        if state.is_insert:
            assert lab.titles() == ["first"]
            for link in links:
                link.cut()

    with lab.request():
        with lab.db.primary():
            assert lab.titles() == ["first"]
        sa.event.listen(lab.db.session(), "do_orm_execute", read_first)
        with pytest.raises(sa.exc.OperationalError, match=r"Lost connection|gone away"):
            lab.db.session.execute(sa.insert(lab.Post).values(title="second"))
    lab.dispose()


def test_what_comes_before_a_short_statement(
    mariadb_database: Database[MariaDBCluster], make_lab: MakeLab
) -> None:
    """How long a statement ran is counted from when it was sent: not with its listeners, say."""
    lab = with_a_post(make_lab(), mariadb_database)

    def kill(*args: t.Any) -> None:
        if lab.db.session.info.pop("kills", False):
            for replica in mariadb_database.cluster.replicas:
                _kill_connections(replica, mariadb_database.name)

    for engine in lab.engines:
        sa.event.listen(engine, "before_cursor_execute", kill)
    with lab.request():
        server = lab.read()
        lab.db.session.info["kills"] = True
        sa.event.listen(lab.db.session(), "do_orm_execute", lambda state: time.sleep(AT_ONCE + 0.1))
        assert lab.read() == server


def test_a_replica_connection_killed_between_two_reads(
    lab: Lab, mariadb_database: Database[MariaDBCluster]
) -> None:
    """A replica connection that dies between statements is replaced; the unit stays where it is."""
    with lab.request():
        server = lab.read()
        replica = mariadb_database.cluster.servers[server - 1]
        _kill_connections(replica, mariadb_database.name)
        assert lab.read() == server


def test_a_replica_that_dies_between_two_reads(
    lab: Lab, mariadb_database: Database[MariaDBCluster]
) -> None:
    """When a unit's replica dies after it has been read, the primary goes on: no step back."""
    with lab.request(), lab.routes() as routes:
        server = lab.read()
        mariadb_database.cluster.servers[server - 1].kill()
        assert lab.read() == PRIMARY
        assert lab.read() == PRIMARY
    # The second read is signalled for each attempt.
    assert routes == [("replica", "read")] * 2 + [("primary", "replica_down")] * 2


def test_recorded_queries_include_replicas(mariadb_database: Database[MariaDBCluster]) -> None:
    """``SQLALCHEMY_RECORD_QUERIES`` records what a replica has answered."""
    from flask_sqlalchemy.record_queries import get_recorded_queries

    can_say_who(mariadb_database)
    lab = Lab(
        mariadb_database.primary_url,
        mariadb_database.replica_urls,
        config={"SQLALCHEMY_RECORD_QUERIES": True},
    )
    with lab.app.app_context():
        lab.db.create_all()
    mariadb_database.sync()
    with lab.request():
        assert lab.read() in REPLICAS
        assert [query.statement for query in get_recorded_queries()] == [
            "SELECT who() AS who_1, count(post.id) AS count_1 \nFROM post"
        ]
    lab.dispose()


def test_a_flush_is_signalled_once(lab: Lab) -> None:
    """A flush is one route for each bind, however many rows and statements it has."""
    with lab.request("POST"), lab.routes() as routes:
        for _ in range(2):
            lab.db.session.add_all([lab.Post(title="x"), lab.Post(title="y")])
            lab.db.session.flush()
    assert routes == [("primary", "write")] * 2


def test_lazy_loads_and_refresh(lab: Lab) -> None:
    """An object read from a replica is refreshed and lazily loaded from the same replica."""
    with lab.request(), lab.routes() as routes:
        post = lab.db.session.get_one(lab.Post, 1)
        lab.db.session.expire(post)
        assert post.title == "first"
        lab.db.session.refresh(post)
    assert routes == [("replica", "read")] * 3


def test_rollback_expires_what_a_replica_has_shown(
    lab: Lab, mariadb_database: Database[MariaDBCluster]
) -> None:
    """Commit and rollback expire objects that came from a replica, as they do without one."""
    with lab.request():
        post = lab.db.session.get_one(lab.Post, 1)
        mariadb_database.execute("UPDATE post SET title = 'changed'")
        mariadb_database.sync()
        assert post.title == "first"
        lab.db.session.rollback()
        assert post.title == "changed"


def _with_query(urls: t.Iterable[str]) -> t.Iterator[str]:
    return (url if "?" in url else f"{url}?charset=utf8mb4" for url in urls)


def _kill_connections(server: t.Any, database: str) -> int:
    """Kill the connections of the plain user to a database; returns how many there were."""
    rows = server.execute(
        "SELECT id FROM information_schema.processlist WHERE user = 'app' AND db = %s", database
    )
    for (connection,) in rows:
        server.execute(f"KILL {connection}")
    return len(rows)
