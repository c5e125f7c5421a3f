"""``db.stream()``: rows that arrive one by one, on a connection that always goes back.

What the servers have sent is counted by a proxy, and who has answered is asked of them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import tracemalloc
import types
import typing as t
import weakref

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as so
import werkzeug.serving
from flask import Flask
from flask import Response
from flask import abort
from flask import stream_with_context
from werkzeug.test import create_environ

from flask_commondb import CommonDB
from flask_commondb import CrossBindError
from flask_commondb import NoContextError
from flask_commondb import UnknownBindError
from flask_commondb import WrongBindError
from flask_commondb.routing import RoutingSession
from flask_commondb.sessions import current_context
from flask_commondb.signals import replica_down
from flask_commondb.streams import Held
from flask_commondb.streams import Stream

from .apps import Lab
from .apps import can_say_who
from .conftest import clean_database
from .proxy import Proxy
from .proxy import _Link
from .servers import MariaDBServer
from .servers import Server
from .servers import wait_until

if t.TYPE_CHECKING:
    from pathlib import Path

    from .conftest import MakeProxy
    from .servers import Database
    from .servers import PostgreSQLCluster

#: As many rows as wanted, without a table.
ROWS = {
    "mysql": "SELECT seq AS n, REPEAT('x', {width}) AS pad FROM seq_1_to_{count}",
    "postgresql": "SELECT n, repeat('x', {width}) AS pad FROM generate_series(1, {count}) AS n",
    "sqlite": "WITH RECURSIVE seq(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM seq LIMIT {count})"
    " SELECT n, printf('%{width}s', '') AS pad FROM seq",
}

#: Engine options for a pool of one connection, which does not wait long for it.
ONE = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}

#: What drivers say of a connection that has died.
LOST = r"Lost connection|killed|terminat|closed the connection|connection is lost|server"

CONNECTION_ID = {"mysql": "CONNECTION_ID()", "postgresql": "pg_backend_pid()"}

#: More than all buffers between a server and a reader hold: 40 MB.
LARGE = {"count": 4_000, "width": 10_000}


@pytest.fixture(scope="module")
def databases(request: pytest.FixtureRequest) -> t.Iterator[t.Callable[[str], Database[t.Any]]]:
    """A function for the database of a cluster, with posts 1 to 25; made when first asked for."""
    made: dict[str, Database[t.Any]] = {}
    with contextlib.ExitStack() as stack:

        def database(name: str) -> Database[t.Any]:
            if name not in made:
                cluster = request.getfixturevalue(name)
                made[name] = stack.enter_context(clean_database(cluster))
                if name == "mariadb":
                    can_say_who(made[name])
                write_posts(made[name])
            return made[name]

        yield database


@pytest.fixture(params=["mariadb", "postgresql"])
def database(
    request: pytest.FixtureRequest, databases: t.Callable[[str], Database[t.Any]]
) -> Database[t.Any]:
    """The posts on a server and its replicas, for tests that leave them as they are."""
    return databases(request.param)


@pytest.fixture
def lab(database: Database[t.Any]) -> t.Iterator[Lab]:
    """An app with replicas."""
    yield from finished(Lab(database.primary_url, database.replica_urls))


@pytest.fixture
def on_mariadb(databases: t.Callable[[str], Database[t.Any]]) -> t.Iterator[Lab]:
    """An app on MariaDB without replicas, which answers errors with a page."""
    config = {"PROPAGATE_EXCEPTIONS": False}
    yield from finished(Lab(databases("mariadb").primary_url, config=config))


@pytest.fixture
def on_sqlite(tmp_path: Path) -> t.Iterator[Lab]:
    """An app on a SQLite file in WAL mode."""
    url = f"sqlite:///{tmp_path}/app.db"
    lab = Lab(url, [url])
    make_posts(lab)
    yield from finished(lab)


@pytest.fixture(params=["mariadb", "postgresql", "file", "memory"])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> t.Iterator[Lab]:
    """An app on each kind of database."""
    if request.param in ("file", "memory"):
        name = "" if request.param == "memory" else f"/{tmp_path}/app.db"
        lab = Lab(f"sqlite://{name}")
        make_posts(lab)
    else:
        lab = Lab(request.getfixturevalue("databases")(request.param).primary_url)
    yield lab
    lab.dispose()


@pytest.fixture
def rewritten(database: Database[t.Any]) -> t.Iterator[None]:
    """For a test that changes the posts: they are written anew."""
    yield
    database.execute("DELETE FROM post")
    write_posts(database)


class Meter(Proxy):
    """A proxy that counts the bytes which a server sends."""

    def __init__(self, target: int) -> None:
        self.received = 0
        super().__init__(target, None)

    def feed(self, data: bytes) -> None:
        """What a client has sent is not counted."""

    def hear_server(self, data: bytes) -> None:
        self.received += len(data)

    def _welcome(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        self._links.append(_Link(client, self.target, t.cast(t.Any, self)))


class Metered(t.NamedTuple):
    """An app, and the meters before its primary and its only replica."""

    lab: Lab
    primary: Meter
    replica: Meter


@pytest.fixture
def metered(database: Database[t.Any]) -> t.Iterator[Metered]:
    """An app whose servers' bytes are counted."""
    servers = database.cluster.servers[:2]
    with Meter(servers[0].port) as primary, Meter(servers[1].port) as replica:
        first, second = (
            server.url(database=database.name, port=meter.port)
            for server, meter in zip(servers, (primary, replica), strict=True)
        )
        lab = Lab(first, [second])
        yield Metered(lab, primary, replica)
        assert lab.checked_out() == 0
        lab.dispose()


def finished(lab: Lab) -> t.Iterator[Lab]:
    yield lab
    assert lab.checked_out() == 0
    lab.dispose()


def write_posts(database: Database[t.Any]) -> None:
    lab = Lab(database.primary_url)
    make_posts(lab)
    lab.dispose()
    database.sync()


def make_posts(lab: Lab) -> None:
    with lab.app.app_context():
        lab.db.create_all()
        lab.db.session.add_all([lab.Post(id=n, title=f"post {n}") for n in range(1, 26)])
        lab.db.session.commit()


def dialect_of(lab: Lab) -> str:
    return str(lab.engines[0].dialect.name)


def rows(lab: Lab, count: int = 4_000, width: int = 0) -> sa.TextClause:
    """SQL text for rows of a number and a padding."""
    return sa.text(ROWS[dialect_of(lab)].format(count=count, width=width))


def titles(lab: Lab) -> sa.Select[tuple[str]]:
    return sa.select(lab.Post.title).order_by(lab.Post.id)


@contextlib.contextmanager
def reading_from(lab: Lab, role: str) -> t.Iterator[None]:
    """A request whose reads go to the primary, or to the replica; text as well."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(lab.request("POST" if role == "primary" else "GET"))
        if role == "replica":
            stack.enter_context(lab.db.replica())
        yield


def open_ones(lab: Lab) -> set[Held]:
    return current_context(lab.db).streams


def call(app: Flask, path: str = "/", method: str = "GET") -> t.Any:
    """What the app returns to a WSGI server: to be iterated, and to be closed."""
    return app(create_environ(path, method=method), lambda *args: lambda data: None)


# It streams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["primary", "replica"])
def test_first_row_before_the_last(metered: Metered, role: str) -> None:
    """The first row is there while most of 40 MB has not left the server; all of them come."""
    lab = metered.lab
    with reading_from(lab, role):
        stream = lab.db.stream(rows(lab, **LARGE), chunk=10)
        assert next(stream).n == 1
        assert metered.primary.received + metered.replica.received < 20_000_000
        assert sum(1 for _ in stream) == 3_999
        assert getattr(metered, role).received > 40_000_000


@pytest.mark.parametrize("view", ["rows", "partitions"])
@pytest.mark.parametrize("anywhere", ["mariadb", "postgresql", "file"], indirect=True)
def test_memory(anywhere: Lab, view: str) -> None:
    """Reading 10 MB takes the memory of a few chunks, however it is read."""
    lab = anywhere
    with lab.request("POST"):
        stream = lab.db.stream(rows(lab, count=1_000, width=10_000), chunk=10)
        lists = ([row] for row in stream) if view == "rows" else stream.partitions()
        tracemalloc.start()
        try:
            assert sum(len(row.pad) for rows in lists for row in rows) == 10_000_000
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()


def test_memory_of_objects(lab: Lab) -> None:
    """Objects of a stream are not kept once they have been read."""
    with lab.request():
        seen: list[weakref.ref[t.Any]] = []
        for post in lab.db.stream(sa.select(lab.Post), chunk=5).scalars():
            seen.append(weakref.ref(post))
            assert sum(ref() is not None for ref in seen) <= 11  # the chunk, and the one before
        assert len(seen) == 25


def test_chunk(databases: t.Callable[[str], Database[t.Any]]) -> None:
    """``chunk`` is how many rows the server is asked for at once; it says so itself."""
    database = databases("postgresql")
    lab = Lab(database.primary_url)
    pid = "SELECT pg_backend_pid() AS pid FROM generate_series(1, 100)"
    query = "SELECT query FROM pg_stat_activity WHERE pid = %s"
    with lab.request():
        for statement in (sa.text(pid), sa.select(sa.text(f"* FROM ({pid}) AS pids"))):
            with lab.db.stream(statement, chunk=7) as stream:
                first, second = next(stream), next(stream)
                ((last,),) = database.execute(query, first[0])
            assert first == second
            assert last.startswith("FETCH FORWARD 7 ")
    lab.dispose()


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunk_of_nothing(on_sqlite: Lab, chunk: int) -> None:
    """A chunk without rows is refused, before anything is sent: it could mean "all"."""
    with on_sqlite.request():
        with pytest.raises(ValueError, match="at least one row"):
            on_sqlite.db.stream(titles(on_sqlite), chunk=chunk)
        assert open_ones(on_sqlite) == set()


# What it yields -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 25, 1000])
def test_rows_and_their_views(anywhere: Lab, chunk: int) -> None:
    """Rows, first columns, mappings, lists and objects come complete and in order."""
    lab = anywhere
    expected = [f"post {n}" for n in range(1, 26)]

    def stream() -> Stream[t.Any]:
        return lab.db.stream(titles(lab), chunk=chunk)

    with lab.request():
        assert [row.title for row in stream()] == expected
        assert list(stream().scalars()) == expected
        assert [row["title"] for row in stream().mappings()] == expected
        lists = list(stream().partitions())
        assert [row.title for rows in lists for row in rows] == expected
        assert [len(rows) for rows in lists[:-1]] == [chunk] * (len(lists) - 1)
        assert [len(rows) for rows in stream().scalars().partitions(10)] == [10, 10, 5]
        assert list(stream().mappings().partitions(24))[1] == [{"title": "post 25"}]
        posts = sa.select(lab.Post).order_by(lab.Post.id)
        objects = list(lab.db.stream(posts, chunk=chunk).scalars())
        assert [post.title for post in objects] == expected
        assert [row[0].title for row in lab.db.stream(posts, chunk=chunk)] == expected


def test_parameters(anywhere: Lab) -> None:
    """Parameters are bound, in text as well."""
    lab = anywhere
    with lab.request():
        select = titles(lab).where(lab.Post.id == sa.bindparam("id"))
        assert list(lab.db.stream(select, {"id": 3}).scalars()) == ["post 3"]
        text = sa.text("SELECT title FROM post WHERE title = :title")
        assert list(lab.db.stream(text, {"title": "post 4"}).scalars()) == ["post 4"]


def test_empty_result(anywhere: Lab) -> None:
    """A result without rows is at its end at once."""
    lab = anywhere
    with lab.request():
        stream = lab.db.stream(titles(lab).where(lab.Post.id > 99))
        assert list(stream) == []
        assert lab.db.pool_status()[0].in_use in (0, None)


def test_after_the_end(anywhere: Lab) -> None:
    """Read to its end a stream stays at its end, in each view, and gives its connection back."""
    lab = anywhere
    with lab.request():
        stream = lab.db.stream(titles(lab))
        scalars = stream.scalars()
        assert len(list(scalars)) == 25
        assert open_ones(lab) == set()
        assert list(scalars) == list(stream) == list(stream.mappings()) == []
        stream.close()
        assert list(scalars) == []


@pytest.mark.parametrize("view", ["rows", "scalars", "mappings", "partitions"])
def test_read_after_close(anywhere: Lab, view: str) -> None:
    """To read on when it is closed is an error, never an early end that looks like the last row."""
    lab = anywhere
    with lab.request():
        stream = lab.db.stream(titles(lab), chunk=10)
        chosen = stream if view == "rows" else getattr(stream, view)()
        next(chosen)
        stream.close()
        for _ in range(2):
            with pytest.raises(sa.exc.ResourceClosedError, match="closed before all of its rows"):
                next(chosen)


def test_with_block_closes_every_view(on_mariadb: Lab) -> None:
    """The end of a ``with`` block gives the connection back though a view of it is still there."""
    with on_mariadb.request():
        with on_mariadb.db.stream(titles(on_mariadb), chunk=1) as stream:
            scalars = stream.scalars()
            next(scalars)
        assert on_mariadb.checked_out() == 0
        with pytest.raises(sa.exc.ResourceClosedError, match="closed before"):
            next(scalars)


def test_objects_are_the_streams(lab: Lab) -> None:
    """Objects are not the unit's own, and keep what was loaded when the stream has ended."""
    with lab.request():
        own = lab.db.session.get(lab.Post, 1)
        (post,) = lab.db.stream(sa.select(lab.Post).where(lab.Post.id == 1)).scalars()
        assert post is not own
        assert post.title == "post 1"
        assert sa.inspect(post).detached


def test_changed_objects_are_not_written(lab: Lab) -> None:
    """A change to an object of a stream is sent nowhere."""
    with lab.request("POST"):
        for post in lab.db.stream(sa.select(lab.Post), chunk=5).scalars():
            post.title = "changed"
        lab.db.session.commit()
        assert lab.titles()[0] == "post 1"


def test_loading_more_on_mariadb(on_mariadb: Lab) -> None:
    """What would break the rows off is refused; unnoticed they would end too early."""
    lab = on_mariadb
    with lab.request():
        stream = lab.db.stream(sa.select(lab.Post), chunk=5).scalars()
        post = next(stream)
        t.cast(so.Session, so.object_session(post)).expire(post)
        with pytest.raises(sa.exc.InvalidRequestError, match="takes no other statement"):
            post.title  # noqa: B018
        assert sum(1 for _ in stream) == 24


@pytest.mark.parametrize("role", ["primary", "replica"])
def test_loading_more(lab: Lab, role: str) -> None:
    """Objects of a stream load more where the server can; elsewhere no row is lost for it."""
    with reading_from(lab, role):
        stream = lab.db.stream(sa.select(lab.Post).order_by(lab.Post.id), chunk=5).scalars()
        post = next(stream)
        t.cast(so.Session, so.object_session(post)).expire(post)
        if dialect_of(lab) == "mysql":
            with pytest.raises(sa.exc.InvalidRequestError, match="takes no other statement"):
                post.title  # noqa: B018
        else:
            assert post.title == "post 1"
        assert [post.id for post in stream] == list(range(2, 26))


# Beside the unit's session ----------------------------------------------------------------------


@pytest.mark.parametrize("role", ["primary", "replica"])
def test_connection_of_its_own(lab: Lab, role: str) -> None:
    """Two streams and the session have three connections, and do not disturb one another."""
    who = sa.text(f"SELECT {CONNECTION_ID[dialect_of(lab)]}")
    with reading_from(lab, role):
        own = lab.db.session.scalar(who)
        numbers = sa.text(f"SELECT n, {CONNECTION_ID[dialect_of(lab)]} AS id FROM ({rows(lab)}) r")
        first = lab.db.stream(numbers)
        second = lab.db.stream(numbers)
        ids = {next(first).id, next(second).id, own, lab.db.session.scalar(who)}
        assert len(ids) == 3
        assert sum(row.n for row in first) == sum(row.n for row in second) == 8_001_999


@pytest.mark.usefixtures("rewritten")
def test_sees_what_is_committed(lab: Lab) -> None:
    """The unit writes, commits and rolls back while it reads; the stream sees neither."""
    with lab.request("POST"):
        lab.db.session.execute(sa.update(lab.Post).values(title="mine"))
        stream = lab.db.stream(titles(lab), chunk=1).scalars()
        assert next(stream) == "post 1"
        lab.db.session.commit()
        assert next(stream) == "post 2"
        lab.db.session.add(lab.Post(id=99, title="later"))
        lab.db.session.flush()
        assert next(stream) == "post 3"
        lab.db.session.rollback()
        assert list(stream)[-1] == "post 25"
        assert set(lab.db.stream(titles(lab)).scalars()) == {"mine"}


@pytest.mark.usefixtures("rewritten")
def test_end_of_a_stream_does_not_end_the_unit(lab: Lab) -> None:
    """What the unit has not committed outlives a stream, however that ends."""
    with lab.request("POST"):
        lab.db.session.add(lab.Post(id=99, title="mine"))
        lab.db.session.flush()
        lab.db.stream(titles(lab)).close()
        assert len(list(lab.db.stream(titles(lab)))) == 25
        lab.db.session.commit()
        assert lab.titles()[-1] == "mine"


def test_unit_that_has_not_flushed(lab: Lab) -> None:
    """A stream does not flush the unit's session: it would not see what is flushed."""
    with lab.request("POST"):
        lab.db.session.add(lab.Post(id=99, title="mine"))
        assert len(list(lab.db.stream(titles(lab)))) == 25
        assert len(lab.db.session.new) == 1


def test_replica_of_the_unit(lab: Lab) -> None:
    """Streams read from the replica that the unit reads from, whoever comes first."""
    who = sa.select(getattr(sa.func, lab.who)())
    primary = lab.run(lab.read, "POST")
    for _ in range(5):
        with lab.request():
            first = lab.db.stream(who).scalars()
            answers = {*first, lab.db.session.scalar(who), *lab.db.stream(who).scalars()}
            assert len(answers) == 1
            assert answers != {primary}


def test_reads_of_the_primary(lab: Lab) -> None:
    """After a write, in a POST, in ``db.primary()`` and outside of requests the primary answers."""
    who = sa.select(getattr(sa.func, lab.who)())
    primary = lab.run(lab.read, "POST")
    with lab.request():
        assert list(lab.db.stream(who).scalars()) != [primary]
        lab.db.session.execute(sa.update(lab.Post).values(title="x"))
        assert list(lab.db.stream(who).scalars()) == [primary]
    with lab.request("POST"):
        assert list(lab.db.stream(who).scalars()) == [primary]
    with lab.request(), lab.db.primary():
        assert list(lab.db.stream(who).scalars()) == [primary]
    with lab.app.app_context():
        assert list(lab.db.stream(who).scalars()) == [primary]


def test_replica_refuses_a_stream_that_writes(lab: Lab) -> None:
    """Text that writes, in a replica scope, is the server's to refuse."""
    with reading_from(lab, "replica"):
        with pytest.raises(sa.exc.DBAPIError, match=r"READ ONLY|read-only|syntax"):
            lab.db.stream(sa.text("DELETE FROM post"))
        assert lab.checked_out() == 0


@pytest.mark.parametrize("is_read", [False, True])
def test_transaction_of_a_standby(
    postgresql_database: Database[PostgreSQLCluster], is_read: bool
) -> None:
    """A standby's connection is what it was when a stream has used it: it sees the newest data."""
    write_posts(postgresql_database)
    replica = {"url": postgresql_database.replica_urls[0], **ONE}
    lab = Lab(postgresql_database.primary_url, [replica])
    who = sa.text("SELECT pg_backend_pid() FROM generate_series(1, 100)")
    with lab.request(), lab.db.replica():
        stream = lab.db.stream(who, chunk=5).scalars()
        (pid,) = set(stream) if is_read else {next(stream)}
        stream.close()
    postgresql_database.execute("UPDATE post SET title = 'new'")
    postgresql_database.sync()
    with lab.request(), lab.db.replica():
        assert lab.db.session.scalar(who) == pid
        assert set(lab.titles()) == {"new"}
    with lab.request(), lab.db.replica():
        assert list(lab.db.stream(who).scalars()) == [pid] * 100
    lab.dispose()


# The connection goes back ---------------------------------------------------------------------


def read_to_the_end(stream: Stream[t.Any]) -> None:
    assert len(list(stream)) == 4_000


def close(stream: Stream[t.Any]) -> None:
    next(stream)
    stream.close()


def close_twice(stream: Stream[t.Any]) -> None:
    stream.close()
    stream.close()


def leave_a_block(stream: Stream[t.Any]) -> None:
    with contextlib.suppress(LookupError):
        with stream:
            next(stream)
            raise LookupError


def leave_a_loop(stream: Stream[t.Any]) -> None:
    for _ in stream:
        break


def close_a_generator(stream: Stream[t.Any]) -> None:
    generator = (row for row in stream)
    next(generator)
    generator.close()


def drop(stream: Stream[t.Any]) -> None:
    next(stream)


def drop_unread(stream: Stream[t.Any]) -> None:
    pass


def drop_views(stream: Stream[t.Any]) -> None:
    next(stream)
    views = [stream.scalars(), stream.mappings(), stream.partitions(), stream.scalars()]
    next(views[3])


def drop_a_view_that_was_begun(stream: Stream[t.Any]) -> None:
    next(stream.partitions())


def drop_in_a_cycle(stream: Stream[t.Any]) -> None:
    next(stream)
    box = types.SimpleNamespace(stream=stream.scalars())
    box.itself = box
    del stream, box
    gc.collect()


def drop_in_a_thread(stream: Stream[t.Any]) -> None:
    box = [stream]
    del stream
    thread = threading.Thread(target=lambda: next(box.pop()))
    thread.start()
    thread.join()


WAYS = [
    read_to_the_end,
    close,
    close_twice,
    leave_a_block,
    leave_a_loop,
    close_a_generator,
    drop,
    drop_unread,
    drop_views,
    drop_a_view_that_was_begun,
    drop_in_a_cycle,
    drop_in_a_thread,
]


@pytest.mark.parametrize("way", WAYS)
def test_connection_goes_back(
    database: Database[t.Any],
    way: t.Callable[[Stream[t.Any]], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """However a stream ends, its connection is in the pool and fit for the next user, in silence.

    The pool has one, so that the next user is given the same.
    """
    lab = Lab(database.primary_url, [], {"SQLALCHEMY_ENGINE_OPTIONS": ONE})
    with lab.app.app_context():
        for _ in range(2):
            way(lab.db.stream(rows(lab), chunk=50))
            assert lab.checked_out() == 0
            assert open_ones(lab) == set()
            assert lab.titles()[-1] == "post 25"
            lab.db.session.rollback()
    assert caplog.records == []
    lab.dispose()


@pytest.mark.parametrize("way", [read_to_the_end, close, drop])
def test_connection_to_a_replica_goes_back(
    database: Database[t.Any], way: t.Callable[[Stream[t.Any]], None]
) -> None:
    """So is a replica's connection."""
    lab = Lab(database.primary_url, [{"url": database.replica_urls[0], **ONE}])
    for _ in range(2):
        with reading_from(lab, "replica"):
            way(lab.db.stream(rows(lab), chunk=50))
            assert lab.checked_out() == 0
            assert lab.titles()[-1] == "post 25"
    lab.dispose()


@pytest.mark.parametrize("role", ["primary", "replica"])
def test_rest_is_not_fetched(metered: Metered, role: str) -> None:
    """A reader who leaves does not make the server send the rest of 40 MB."""
    lab = metered.lab
    for end in (close, drop, leave_a_loop, close_a_generator):
        with reading_from(lab, role):
            end(lab.db.stream(rows(lab, **LARGE), chunk=10))
            assert lab.titles()[-1] == "post 25"
    assert metered.primary.received + metered.replica.received < 4 * 20_000_000


def test_what_becomes_of_the_connection(lab: Lab) -> None:
    """Left early PostgreSQL's goes on being used, MariaDB's is thrown away with what it sends."""
    who = sa.text(CONNECTION_ID[dialect_of(lab)].join(("SELECT ", "")))
    with lab.request("POST"):
        before = lab.db.session.scalar(who)
        lab.db.session.rollback()
        close(lab.db.stream(rows(lab)))
        after = lab.db.session.scalar(who)
    assert (before == after) == (dialect_of(lab) == "postgresql")


def test_end_of_a_scope(lab: Lab) -> None:
    """A stream ends with its context when no response reads it; it is not read on after that."""
    with lab.db.scope():
        stream = lab.db.stream(rows(lab), chunk=1)
        next(stream)
    assert lab.checked_out() == 0
    with pytest.raises(sa.exc.ResourceClosedError, match="its context has ended"):
        next(stream)


def test_end_of_a_request_without_response(lab: Lab) -> None:
    """``test_request_context`` makes no response that could read on."""
    with lab.request():
        stream = lab.db.stream(rows(lab), chunk=1)
        next(stream)
    assert lab.checked_out() == 0
    with pytest.raises(sa.exc.ResourceClosedError, match="its context has ended"):
        next(stream)


def test_end_of_a_nested_context(lab: Lab) -> None:
    """The end of an inner context closes its streams, and not those of the outer one."""
    with lab.request():
        outer = lab.db.stream(titles(lab), chunk=1)
        with lab.app.app_context():
            inner = lab.db.stream(titles(lab), chunk=1)
            assert next(inner) == next(outer)
        with pytest.raises(sa.exc.ResourceClosedError, match="its context has ended"):
            next(inner)
        assert len(list(outer)) == 24


def test_context_that_is_dropped(on_mariadb: Lab) -> None:
    """A context that nobody pops takes its streams with it when Python frees it."""
    streams: list[Stream[t.Any]] = []

    def work() -> None:
        on_mariadb.app.app_context().push()
        streams.append(on_mariadb.db.stream(titles(on_mariadb), chunk=1))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gc.collect()
    assert on_mariadb.checked_out() == 0
    with pytest.raises(sa.exc.ResourceClosedError, match="its context has ended"):
        next(streams[0])


PROGRAM = """
import sys
import flask
import sqlalchemy
import flask_commondb

app = flask.Flask("program")
app.config["SQLALCHEMY_DATABASE_URI"] = sys.argv[1]
db = flask_commondb.CommonDB(app)
app.app_context().push()
stream = db.stream(sqlalchemy.text(sys.argv[2]), chunk=10)
print(next(stream).n)
"""


def test_end_of_the_program(metered: Metered) -> None:
    """A program that ends in mid-stream does not fetch the rest of 40 MB, nor complain."""
    url = metered.lab.engines[0].url.render_as_string(hide_password=False)
    command = [sys.executable, "-W", "error", "-c", PROGRAM, url, str(rows(metered.lab, **LARGE))]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("1\n", "")
    assert metered.primary.received < 20_000_000


@pytest.mark.parametrize("kind", ["app_context", "test_request_context"])
def test_thousand_streams(on_sqlite: Lab, kind: str) -> None:
    """A long job that opens streams one after another leaves nothing of them behind."""
    lab = on_sqlite
    with getattr(lab.app, kind)():
        sessions = [use_and_forget(lab, is_left=number % 2 == 0) for number in range(1000)]
        assert open_ones(lab) == set()
        gc.collect()
        assert [ref for ref in sessions if ref() is not None] == []


def test_hundred_streams(lab: Lab) -> None:
    """Nor does it on servers, where a replica's engine may be one made for streams."""
    with lab.request():
        sessions = [use_and_forget(lab, is_left=number % 20 == 0) for number in range(100)]
        assert open_ones(lab) == set()
        gc.collect()
        assert [ref for ref in sessions if ref() is not None] == []


def use_and_forget(lab: Lab, *, is_left: bool) -> weakref.ref[t.Any]:
    stream = lab.db.stream(titles(lab), chunk=10)
    (held,) = open_ones(lab)
    session = weakref.ref(t.cast(RoutingSession, held._session))
    assert next(stream).title == "post 1"
    assert is_left or len(list(stream)) == 24
    return session


# Responses ------------------------------------------------------------------------------------


def test_response_reads_on(on_mariadb: Lab) -> None:
    """A response reads from a stream after the request has ended, and gives it back at its end."""
    lab = on_mariadb

    @lab.app.get("/")
    def index() -> t.Iterator[str]:
        return (f"{title}," for title in lab.db.stream(titles(lab), chunk=5).scalars())

    body = call(lab.app)
    assert lab.checked_out() == 1
    assert b"".join(body).startswith(b"post 1,post 2,")
    assert lab.checked_out() == 0
    body.close()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("read", [0, 1, 3])
@pytest.mark.parametrize("with_context", [False, True])
def test_client_leaves(on_mariadb: Lab, method: str, read: int, with_context: bool) -> None:
    """A response that is closed before its end gives the connection back, also unread, or a HEAD's.

    Although the view's module still refers to the stream.
    """
    lab = on_mariadb
    kept: list[Stream[t.Any]] = []

    @lab.app.get("/")
    def index() -> Response:
        kept.append(lab.db.stream(rows(lab), chunk=1))
        lines = (f"{row.n}\n" for row in kept[0])
        return Response(stream_with_context(lines) if with_context else lines)

    body = call(lab.app, method=method)
    for _, line in zip(range(read), body, strict=False):
        assert line
    body.close()
    assert lab.checked_out() == 0
    with pytest.raises(sa.exc.ResourceClosedError, match="closed before all of its rows"):
        next(kept[0])
    body.close()


@pytest.mark.parametrize("read", [0, 2, 30])
def test_stream_opened_by_the_response(on_mariadb: Lab, read: int) -> None:
    """A stream that is opened while the response is sent ends with the context of that."""
    lab = on_mariadb

    @lab.app.get("/")
    def index() -> Response:
        def lines() -> t.Iterator[str]:
            for title in lab.db.stream(titles(lab), chunk=1).scalars():
                yield f"{title},"

        return Response(stream_with_context(lines()))

    body = call(lab.app)
    assert len([line for _, line in zip(range(read), body, strict=False)]) == min(read, 25)
    body.close()
    assert lab.checked_out() == 0


def test_client_of_a_real_server(on_mariadb: Lab) -> None:
    """A client that hangs up in the middle of 40 MB costs neither the rest nor a connection."""
    lab = on_mariadb
    left = threading.Event()

    @lab.app.get("/")
    def index() -> Response:
        def lines() -> t.Iterator[str]:
            try:
                for row in lab.db.stream(rows(lab, **LARGE), chunk=10):
                    yield row.pad
            except GeneratorExit:
                left.set()
                raise

        return Response(stream_with_context(lines()))

    server = werkzeug.serving.make_server("127.0.0.1", 0, lab.app)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"200 OK" in client.recv(1000)
    thread.join()
    server.server_close()
    assert left.is_set()
    assert lab.checked_out() == 0


def test_response_is_replaced(on_mariadb: Lab) -> None:
    """The response that is read may be another one than the view has made."""
    lab = on_mariadb

    @lab.app.get("/")
    def index() -> Response:
        return Response(f"{title}," for title in lab.db.stream(titles(lab), chunk=5).scalars())

    @lab.app.after_request
    def replace(response: Response) -> Response:
        return Response(response.iter_encoded(), headers={"X-New": "1"})

    body = call(lab.app)
    assert b"".join(body).count(b",") == 25
    body.close()
    assert lab.checked_out() == 0
    body = call(lab.app)
    next(iter(body))
    body.close()
    del body
    assert lab.checked_out() == 0


def test_response_that_does_not_read(on_mariadb: Lab) -> None:
    """What a view opens and forgets somewhere is closed with its response."""
    lab = on_mariadb
    kept: list[Stream[t.Any]] = []

    @lab.app.get("/")
    def index() -> str:
        kept.append(lab.db.stream(titles(lab), chunk=1))
        return "ok"

    body = call(lab.app)
    assert b"".join(body) == b"ok"
    body.close()
    assert lab.checked_out() == 0


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_view_that_raises(on_mariadb: Lab, error: type[BaseException], propagate: bool) -> None:
    """A view that raises leaves no stream open, whether the error becomes a page or not."""
    lab = on_mariadb
    lab.app.config["PROPAGATE_EXCEPTIONS"] = propagate
    kept: list[Stream[t.Any]] = []

    @lab.app.get("/")
    def index() -> str:
        kept.append(lab.db.stream(titles(lab), chunk=1))
        next(kept[0])
        raise error("oh")

    with silent(lab.app):
        if propagate or error is KeyboardInterrupt:
            with pytest.raises(error, match="oh"):
                call(lab.app)
        else:
            body = call(lab.app)  # nor does it wait for the page to be read
            assert lab.checked_out() == 0
            body.close()
    assert lab.checked_out() == 0


def test_view_that_aborts(on_mariadb: Lab) -> None:
    """An error that becomes an ordinary page closes the stream with that, at the latest."""
    lab = on_mariadb
    kept: list[Stream[t.Any]] = []

    @lab.app.get("/")
    def index() -> str:
        kept.append(lab.db.stream(titles(lab), chunk=1))
        abort(404)

    call(lab.app).close()
    assert lab.checked_out() == 0


def test_after_request_that_raises(on_mariadb: Lab) -> None:
    """When an ``after_request`` function raises the view's response is lost, and nobody reads."""
    lab = on_mariadb
    kept: list[t.Any] = []

    @lab.app.get("/")
    def index() -> Response:
        kept.append(lab.db.stream(titles(lab), chunk=1))
        kept.append(Response(title for title in kept[0].scalars()))
        return t.cast(Response, kept[1])

    @lab.app.after_request
    def fail(response: Response) -> Response:
        if response.status_code == 200:
            raise ValueError("oh")
        return response

    with silent(lab.app):
        body = call(lab.app)
    assert lab.checked_out() == 0
    assert b"Internal Server Error" in b"".join(body)
    body.close()


@pytest.mark.parametrize("kind", ["teardown_appcontext", "teardown_request"])
@pytest.mark.parametrize("when", ["before init_app", "after init_app"])
def test_teardown_that_raises(
    databases: t.Callable[[str], Database[t.Any]], kind: str, when: str
) -> None:
    """When someone's teardown raises the finished response is lost, and nobody reads."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = databases("mariadb").primary_url
    db = CommonDB()
    kept: list[t.Any] = []

    def fail(error: BaseException | None) -> None:
        raise ValueError("oh")

    @app.get("/")
    def index() -> Response:
        kept.append(db.stream(sa.text("SELECT title FROM post"), chunk=1))
        kept.append(Response(title for title in kept[0].scalars()))
        return t.cast(Response, kept[1])

    if when == "before init_app":
        getattr(app, kind)(fail)
    db.init_app(app)
    if when == "after init_app":
        getattr(app, kind)(fail)
    with pytest.raises(ValueError, match="oh") as caught:
        call(app)
    assert caught.value is not None
    assert db.pool_status(app)[0].in_use == 0
    with contextlib.suppress(ValueError), app.app_context():
        db.engine.dispose()


def test_request_inside_an_error_handler(on_mariadb: Lab) -> None:
    """An error that the code around a request is busy with does not count as the request's."""
    lab = on_mariadb

    @lab.app.get("/")
    def index() -> t.Iterator[str]:
        return (f"{title}," for title in lab.db.stream(titles(lab), chunk=5).scalars())

    try:
        raise LookupError
    except LookupError:
        body = call(lab.app)
        assert b"".join(body).count(b",") == 25
        body.close()
        body = call(lab.app)
        del body
    assert lab.checked_out() == 0


def test_two_apps(databases: t.Callable[[str], Database[t.Any]]) -> None:
    """One ``db`` serves two apps; the end of one's context closes nothing of the other's."""
    db = CommonDB()
    apps = [Flask("one"), Flask("two")]
    for app in apps:
        app.config["SQLALCHEMY_DATABASE_URI"] = databases("mariadb").primary_url
        db.init_app(app)
    statement = sa.text("SELECT title FROM post ORDER BY id")
    with apps[0].test_request_context():
        outer = db.stream(statement, chunk=1)
        with apps[1].app_context():
            inner = db.stream(statement, chunk=1)
            assert next(inner) == next(outer)
            assert [db.pool_status(app)[0].in_use for app in apps] == [1, 1]
        assert [db.pool_status(app)[0].in_use for app in apps] == [1, 0]
        assert len(list(outer)) == 24
    for app in apps:
        with app.app_context():
            db.engine.dispose()


@contextlib.contextmanager
def silent(app: Flask) -> t.Iterator[None]:
    """Without the record that Flask writes of each error."""
    app.logger.disabled = True
    yield
    app.logger.disabled = False


# What goes wrong ------------------------------------------------------------------------------


def test_statements_that_write(on_mariadb: Lab, proxy: MakeProxy) -> None:
    """What says that it writes is refused, and nothing is sent."""
    lab = on_mariadb
    url = lab.engines[0].url
    watched = proxy(url.port)
    other = Lab(url.set(port=watched.port).render_as_string(hide_password=False))
    post = other.Post
    statements = [
        sa.insert(post).values(title="x"),
        sa.insert(post).values(title="x").returning(post.id),
        sa.update(post).values(title="x"),
        sa.delete(post),
        sa.select(sa.insert(post).values(title="x").returning(post.id).cte("written")),
    ]
    with other.request("POST"):
        for statement in statements:
            with pytest.raises(TypeError, match=r"db\.stream\(\) reads"):
                other.db.stream(statement)
        assert open_ones(other) == set()
    assert watched.commands == []
    other.dispose()


def test_text_that_writes(anywhere: Lab) -> None:
    """Text that has written is undone, and the caller is told."""
    lab = anywhere
    with lab.request("POST"):
        with pytest.raises((TypeError, sa.exc.ProgrammingError), match=r"reads|syntax"):
            lab.db.stream(sa.text("DELETE FROM post"))
        assert open_ones(lab) == set()
        lab.db.session.rollback()
        assert len(lab.titles()) == 25


def test_statement_that_fails(lab: Lab) -> None:
    """A statement that the server refuses raises its error, and leaves nothing open."""
    with lab.request():
        for _ in range(3):
            with pytest.raises(sa.exc.ProgrammingError, match="missing"):
                lab.db.stream(sa.text("SELECT * FROM missing"))
            assert lab.checked_out() == 0
            assert open_ones(lab) == set()


def test_statement_that_fails_while_it_is_read(lab: Lab) -> None:
    """An error that comes with a later row is SQLAlchemy's, and closes the stream."""
    number = {
        "mysql": "IF(n < 3000, 1, (SELECT id FROM post))",
        "postgresql": "1 / (n - 3000)",
    }
    statement = sa.text(f"SELECT n, {number[dialect_of(lab)]} FROM ({rows(lab)}) AS r")
    with reading_from(lab, "replica"):
        stream = lab.db.stream(statement, chunk=10)
        with pytest.raises(sa.exc.DBAPIError, match=r"division by zero|more than 1 row"):
            sum(1 for _ in stream)
        assert lab.checked_out() == 0
        with pytest.raises(sa.exc.ResourceClosedError, match="by an error"):
            next(stream)


def test_no_context(on_sqlite: Lab) -> None:
    """Without a context the error says what to do."""
    with pytest.raises(NoContextError, match=r"app\.app_context\(\)"):
        on_sqlite.db.stream(titles(on_sqlite))


@pytest.fixture
def two_binds(tmp_path: Path) -> t.Iterator[Lab]:
    """An app with a second bind, which has a model of its own."""
    binds = {"orders": f"sqlite:///{tmp_path}/orders.db"}
    lab = Lab(f"sqlite:///{tmp_path}/app.db", [], {"SQLALCHEMY_BINDS": binds})

    class Order(lab.db.Model):  # type: ignore[name-defined, misc]
        __bind_key__ = "orders"
        id: so.Mapped[int] = so.mapped_column(primary_key=True)

    lab.Order = Order  # type: ignore[attr-defined]
    make_posts(lab)
    yield from finished(lab)


def test_binds(two_binds: Lab) -> None:
    """The owner of the tables is found; ``bind_key`` is for text, and must be known and right."""
    lab = two_binds
    order = lab.Order  # type: ignore[attr-defined]
    with lab.request():
        assert list(lab.db.stream(sa.select(order))) == []
        assert len(list(lab.db.stream(sa.text("SELECT * FROM post")))) == 25
        text = sa.text("SELECT count(*) FROM 'order'")
        assert list(lab.db.stream(text, bind_key="orders").scalars()) == [0]
        with pytest.raises(CrossBindError, match=r"'post' .* 'order'"):
            lab.db.stream(sa.select(lab.Post.id, order.id))
        with pytest.raises(UnknownBindError, match="Did you mean 'orders'"):
            lab.db.stream(text, bind_key="order")
        with pytest.raises(WrongBindError, match="'post' belongs to bind None"):
            lab.db.stream(sa.select(lab.Post.id), bind_key="orders")
        assert open_ones(lab) == set()


def test_one_connection_for_all() -> None:
    """In memory a stream reads through the unit's session, and ends nothing of the unit's."""
    lab = Lab("sqlite://")
    make_posts(lab)
    with lab.app.app_context():
        lab.db.session.execute(sa.delete(lab.Post).where(lab.Post.id > 3))
        stream = lab.db.stream(titles(lab), chunk=2)
        assert next(stream).title == "post 1"
        lab.db.session.execute(sa.delete(lab.Post).where(lab.Post.id == 2))
        assert list(stream.scalars()) == ["post 2", "post 3"]
        lab.db.session.add(lab.Post(id=9, title="pending"))
        assert list(lab.db.stream(titles(lab)).scalars()) == ["post 1", "post 3"]
        assert len(lab.db.session.new) == 1
        lab.db.session.commit()
        assert lab.titles() == ["post 1", "post 3", "pending"]
        lab.db.session.execute(sa.delete(lab.Post))
        lab.db.stream(titles(lab)).close()
        lab.db.session.rollback()
        assert len(lab.titles()) == 3
    lab.dispose()


@pytest.mark.parametrize("role", ["primary", "replica"])
@pytest.mark.parametrize("end", ["killed", "cut"])
def test_connection_is_lost_while_it_is_read(
    database: Database[t.Any],
    metered: Metered,
    end: str,
    role: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A connection that dies in mid-stream is an OperationalError, said once; the pool recovers."""
    lab = metered.lab
    big = sa.text(
        f"SELECT {CONNECTION_ID[dialect_of(lab)]} AS id, r.* FROM ({rows(lab, **LARGE)}) AS r"
    )
    with reading_from(lab, role):
        stream = lab.db.stream(big, chunk=10)
        connection = next(stream).id
        if end == "killed":
            kill(database.cluster.servers[role == "replica"], connection)
        else:
            getattr(metered, role).cut()
        with pytest.raises(sa.exc.OperationalError, match=LOST) as caught:
            sum(1 for _ in stream)
        assert caught.value.connection_invalidated
        assert lab.checked_out() == 0
        with pytest.raises(sa.exc.ResourceClosedError, match="by an error"):
            next(stream)
        assert len(lab.titles()) == 25
        assert len(list(lab.db.stream(titles(lab)))) == 25
    assert caplog.records == []


def kill(server: Server, connection: int) -> None:
    """Have a server end a connection, and wait until it has."""
    if isinstance(server, MariaDBServer):
        ask, end = "SELECT 1 FROM information_schema.processlist WHERE id = %s", "KILL %s"
    else:
        ask, end = (
            "SELECT 1 FROM pg_stat_activity WHERE pid = %s",
            "SELECT pg_terminate_backend(%s)",
        )
    server.execute(end, connection)
    wait_until(lambda: not server.execute(ask, connection), "the connection is gone")


@pytest.mark.parametrize("role", ["primary", "replica"])
def test_connection_is_lost_and_nobody_reads_on(
    metered: Metered, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A reader who leaves does not learn that the connection has died, nor does the log."""
    lab = metered.lab
    for leave in (close, drop):
        with reading_from(lab, role):
            stream = lab.db.stream(rows(lab, **LARGE), chunk=10)
            next(stream)
            getattr(metered, role).cut()
            if leave is close:
                stream.close()
            del stream
            assert lab.checked_out() == 0
            assert len(lab.titles()) == 25
    assert caplog.records == []


def test_server_that_freezes_under_a_response(metered: Metered) -> None:
    """That a replica says nothing any more is signalled also where a response is read, which has no
    context."""
    lab = metered.lab
    down: list[str | None] = []

    def note(app: Flask, bind_key: str | None, **_: object) -> None:
        assert app is lab.app
        down.append(bind_key)

    @lab.app.get("/frozen")
    def frozen() -> t.Iterator[str]:
        with lab.db.replica():
            stream = lab.db.stream(rows(lab, **LARGE), chunk=10)
        return (str(row) for row in stream)

    with replica_down.connected_to(note):
        response = call(lab.app, "/frozen")
        next(response)
        metered.replica.stall()
        with pytest.raises(sa.exc.OperationalError, match=LOST):
            sum(1 for _ in response)
        response.close()
    metered.replica.resume()
    assert down == [None]


def test_interrupt_while_it_is_read(
    databases: t.Callable[[str], Database[t.Any]], proxy: MakeProxy
) -> None:
    """An interrupt in the middle of a row closes the stream; nobody is given half a row."""
    database = databases("mariadb")
    link = proxy(database.cluster.primary.port)
    lab = Lab(database.cluster.primary.url(database=database.name, port=link.port))

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt("now")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with lab.request():
            stream = lab.db.stream(rows(lab, **LARGE), chunk=10)
            next(stream)
            link.stall()
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt, match="now"):
                sum(1 for _ in stream)
            link.resume()
            assert lab.checked_out() == 0
            assert len(lab.titles()) == 25
    finally:
        signal.signal(signal.SIGALRM, before)
    lab.dispose()


def test_fork_in_mid_stream(lab: Lab) -> None:
    """A child reads no row of its parent's stream and closes nothing; the parent reads on."""
    with reading_from(lab, "replica"):
        stream = lab.db.stream(rows(lab), chunk=10)
        next(stream)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                # What stands in the buffer is its own copy; after that, no early end.
                with pytest.raises(sa.exc.ResourceClosedError, match="a parent process's"):
                    sum(1 for _ in stream)
                stream.close()
                del stream
                gc.collect()
                assert lab.titles()[-1] == "post 25"
                assert len(list(lab.db.stream(rows(lab)))) == 4_000
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert sum(1 for _ in stream) == 3_999


# Listeners ------------------------------------------------------------------------------------


def test_listeners_of_the_session(on_sqlite: Lab) -> None:
    """A listener on ``db.session`` that narrows what may be read holds for streams, too."""

    @sa.event.listens_for(on_sqlite.db.session, "do_orm_execute")
    def only_the_first(state: so.ORMExecuteState) -> None:
        criteria = so.with_loader_criteria(on_sqlite.Post, on_sqlite.Post.id == 1)
        state.statement = t.cast(sa.Select[t.Any], state.statement).options(criteria)

    with on_sqlite.app.app_context():
        assert list(on_sqlite.db.stream(sa.select(on_sqlite.Post.id)).scalars()) == [1]


def test_one_engine_for_all_streams(postgresql_database: Database[t.Any]) -> None:
    """Streams from a standby share what SQLAlchemy has compiled, however many there are."""
    lab = Lab(postgresql_database.primary_url, postgresql_database.replica_urls)
    make_posts(lab)
    postgresql_database.sync()
    (replica,) = lab.db.routers[lab.app].replicas
    with lab.request("GET"):
        for _ in range(10):
            list(lab.db.stream(sa.select(lab.Post.title)))
    assert len(replica._compiled_cache) <= 2
    lab.dispose()
