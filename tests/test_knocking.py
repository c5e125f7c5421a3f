"""A knock: whether a server opens its door, found out without waiting."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
import typing as t

import pymysql
import pytest
import sqlalchemy as sa

from flask_commondb import knocking
from flask_commondb.dialects import Address
from flask_commondb.dialects import dialect_for
from flask_commondb.knocking import Knock
from flask_commondb.knocking import arguments_of
from flask_commondb.knocking import knock_at

from .servers import wait_until

if t.TYPE_CHECKING:
    import collections.abc as c

    from .conftest import MakeProxy
    from .servers import Database
    from .servers import MariaDBCluster
    from .servers import PostgreSQLCluster

#: The server of each family that can be asked, by its fixture.
FAMILIES = {"mariadb_database": "mysql+pymysql", "postgresql_database": "postgresql+psycopg"}

TOO_MANY = b"\x17\x00\x00\x00\xff\x10\x04Too many connections"


class Server:
    """A real server, and an engine that leads to it through a proxy."""

    def __init__(self, request: pytest.FixtureRequest, fixture: str) -> None:
        self.database: Database[t.Any] = request.getfixturevalue(fixture)
        self.server = self.database.cluster.replicas[0]
        make_proxy: MakeProxy = request.getfixturevalue("proxy")
        self.proxy = make_proxy(self.server.port, None)
        self.url = sa.make_url(self.database.replica_urls[0]).set(
            drivername=FAMILIES[fixture], host="127.0.0.1", port=self.proxy.port
        )
        self.engine = sa.create_engine(self.url)


@pytest.fixture(params=FAMILIES)
def server(request: pytest.FixtureRequest) -> Server:
    """A server of each family."""
    return Server(request, request.param)


@pytest.fixture
def listener() -> c.Iterator[socket.socket]:
    """A port of this test's own, where it is the server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def knock(listener: socket.socket) -> c.Iterator[Knock]:
    """A knock at it, as at a MySQL."""
    knock = knock_at(sa.create_engine(f"mysql+pymysql://127.0.0.1:{port_of(listener)}/app"))
    assert knock is not None
    yield knock
    knock.close()


# Real servers ---------------------------------------------------------------------------------


def test_door(server: Server) -> None:
    """A server that is there opens its door; more than one look may be needed."""
    knock = begun(server.engine)
    assert knock.answer(10) is True
    assert knock.has_spoken
    assert knock.answer() is True
    wait_until(lambda: server.proxy.links == 0, "the knock is closed")


def test_looks(server: Server) -> None:
    """Looks that do not wait find it out as well."""
    knock = begun(server.engine)
    wait_until(lambda: knock.answer() is not None, "somebody answers")
    assert knock.answer() is True


def test_frozen(server: Server) -> None:
    """The kernel of a frozen server accepts a connection; that is no answer until it has thawed."""
    server.server.freeze()
    knock = begun(server.engine)
    assert knock.answer(0.3) is None
    assert knock.is_under_way
    assert not knock.has_spoken
    server.server.thaw()
    assert knock.answer(10) is True


def test_nobody(server: Server) -> None:
    """Where nobody listens, and where the connection is closed without a word, nobody opens."""
    server.proxy.target = 1
    assert begun(server.engine).answer(10) is False
    server.proxy.refuse()
    knock = begun(server.engine)
    assert knock.answer(10) is False
    assert not knock.has_spoken


def test_given_up(server: Server) -> None:
    """A knock that is given up is closed, and counts as not answered."""
    server.proxy.stall()
    knock = begun(server.engine)
    assert knock.answer() is None
    knock.close()
    assert knock.answer(1) is False
    server.proxy.resume()
    wait_until(lambda: server.proxy.links == 0, "the knock is closed")


def test_full(mariadb_database: Database[MariaDBCluster]) -> None:
    """A server that has no connection left says so: it is there, and its door is shut."""
    server = mariadb_database.cluster.replicas[0]
    server.execute("SET GLOBAL max_connections = 10")
    engine = sa.create_engine(
        mariadb_database.replica_urls[0], poolclass=sa.NullPool, connect_args={"ssl_disabled": True}
    )
    held: list[sa.Connection] = []
    while True:
        with contextlib.suppress(sa.exc.OperationalError):
            while True:
                held.append(engine.connect())
        knock = begun(engine)
        if not knock.answer(10):  # else there was one more on its way out
            break
    assert knock.has_spoken
    for connection in held:
        connection.close()
    wait_until(lambda: begun(engine).answer(10), "there is room again")


def test_sockets(
    mariadb_database: Database[MariaDBCluster], postgresql_database: Database[PostgreSQLCluster]
) -> None:
    """Unix sockets have doors, too."""
    mariadb = mariadb_database.cluster.primary
    url = sa.make_url(mariadb_database.primary_url)
    for driver in ("pymysql", "mysqldb"):
        with contextlib.suppress(ImportError):  # mysqlclient is not installed
            engine = sa.create_engine(
                url.set(drivername=f"mysql+{driver}", host=None, port=None),
                connect_args={"unix_socket": f"{mariadb.directory}/s"},
            )
            assert begun(engine).answer(10) is True
    postgresql = postgresql_database.cluster.primary
    ((directory,),) = postgresql.execute("SHOW unix_socket_directories")
    engine = sa.create_engine(
        "postgresql+psycopg:///app", connect_args={"host": directory, "port": postgresql.port}
    )
    assert begun(engine).answer(10) is True


# What it goes by ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (b"", None),
        (b"\x4a\x00\x00\x00", None),
        (b"\x4a\x00\x00\x00\x0a8.0.36", True),
        (TOO_MANY, False),
    ],
)
def test_mysql(words: bytes, expected: bool | None) -> None:
    """The first packet is a greeting or an error; its head alone says nothing."""
    assert dialect_for(sa.create_engine("mysql+pymysql://")).opens(words) is expected


@pytest.mark.parametrize(
    ("words", "expected"), [(b"", None), (b"S", True), (b"N", True), (b"Esorry\0", False)]
)
def test_postgresql(words: bytes, expected: bool | None) -> None:
    """The question for TLS is answered with one letter, or an error."""
    assert dialect_for(sa.create_engine("postgresql+psycopg://")).opens(words) is expected


@pytest.mark.parametrize(
    ("url", "arguments", "expected"),
    [
        ("mysql+pymysql://h/app", {}, ("h", 3306)),
        ("mariadb+pymysql://h:1/app", {}, ("h", 1)),
        ("mysql+pymysql:///app", {}, ("localhost", 3306)),
        ("mysql+pymysql://h/app", {"host": "i", "port": 2}, ("i", 2)),
        ("mysql+pymysql://h/app?unix_socket=/s", {}, "/s"),
        ("mysql+pymysql://h/app", {"read_default_file": "~/.my.cnf"}, None),
        ("mysql+mysqldb://h/app", {}, ("h", 3306)),
        ("mysql+mysqldb:///app", {}, None),
        ("mysql+mysqldb://localhost/app", {}, None),
        ("mysql+mysqldb://localhost/app?unix_socket=/s", {}, "/s"),
        ("postgresql+psycopg://h/app", {}, ("h", 5432)),
        ("postgresql+psycopg://h:1/app", {"hostaddr": "::1"}, ("::1", 1)),
        ("postgresql+psycopg:///app?host=/run/pg", {}, "/run/pg/.s.PGSQL.5432"),
        ("postgresql+psycopg://h/app", {"host": "i", "port": "2"}, ("i", 2)),
        ("postgresql+psycopg:///app", {}, None),
        ("postgresql+psycopg:///app?host=a:1&host=b:2", {}, None),
        ("postgresql+psycopg:///app?host=@abstract", {}, None),
        ("postgresql+psycopg://h/app", {"service": "app"}, None),
    ],
)
def test_address(url: str, arguments: dict[str, t.Any], expected: Address | None) -> None:
    """Where the driver would connect to, if that is one place and known."""
    try:
        engine = sa.create_engine(url, connect_args=arguments)
    except ImportError:
        pytest.skip("the driver is not installed")
    told = arguments_of(engine)
    assert told is not None
    assert dialect_for(engine).address(told) == expected
    assert expected is not None or knock_at(engine) is None


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """libpq's environment counts where the URL says nothing."""
    engine = sa.create_engine("postgresql+psycopg://h/app")
    dialect, told = dialect_for(engine), t.cast(t.Any, arguments_of(engine))
    monkeypatch.setenv("PGPORT", "7")
    assert dialect.address(told) == ("h", 7)
    monkeypatch.setenv("PGSERVICE", "app")
    assert dialect.address(told) is None


def test_unknown() -> None:
    """No knock at a file, nor where only the user's code knows the server."""
    assert knock_at(sa.create_engine("sqlite://")) is None
    assert knock_at(sa.create_engine("mysql+pymysql://h/app", creator=pymysql.connect)) is None
    engine = sa.create_engine("mysql+pymysql://127.0.0.1:1/app")
    assert begun(engine).answer(10) is False
    sa.event.listen(engine, "do_connect", lambda *event: None)
    assert knock_at(engine) is None


def test_name_that_nobody_knows() -> None:
    """A name without an address is a door that does not open."""
    engine = sa.create_engine("mysql+pymysql://nobody.invalid/app")
    assert begun(engine).answer(10) is False


def test_several_addresses(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a name's addresses, the next is tried when one refuses, or is behind a black hole."""
    places = [("127.0.0.1", 1), ("192.0.2.1", 9), ("127.0.0.1", port_of(listener))]
    found = [(socket.AF_INET, place) for place in places]
    monkeypatch.setattr(knocking, "_places", lambda address: list(found))
    monkeypatch.setattr(knocking, "CONNECT_LIMIT", 0.2)
    knock = Knock(("h", 1), dialect_for(sa.create_engine("mysql+pymysql://")))
    wait_until(lambda: knock.answer() is None and is_ready(listener), "it comes to the last")
    greet(listener)
    assert knock.answer(10) is True


def test_in_pieces(listener: socket.socket, knock: Knock) -> None:
    """A greeting may come byte by byte."""
    assert knock.answer() is None
    client, _ = listener.accept()
    for byte in b"\x4a\x00\x00\x00":
        client.send(bytes([byte]))
        assert knock.answer(0.05) is None
    assert knock.has_spoken
    client.send(b"\x0a")
    assert knock.answer(10) is True
    client.close()


def test_waits_no_longer(listener: socket.socket, knock: Knock) -> None:
    """The word ends the wait."""
    greet(listener)
    began = time.monotonic()
    assert knock.answer(60) is True
    assert time.monotonic() - began < 30


def test_own_trouble(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """That this process has no descriptor left says nothing of the server; it is tried again."""
    real = socket.socket

    def refuse(*args: t.Any, **kwargs: t.Any) -> t.NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket, "socket", refuse)
    engine = sa.create_engine(f"mysql+pymysql://127.0.0.1:{port_of(listener)}/app")
    knock = begun(engine)
    assert knock.answer(0.05) is None
    seen = [knock.is_under_way]
    monkeypatch.setattr(socket, "socket", real)
    assert knock.answer() is None
    seen.append(knock.is_under_way)
    assert seen == [False, True]
    greet(listener)
    assert knock.answer(10) is True


def test_fork(listener: socket.socket, knock: Knock) -> None:
    """A forked child leaves its parent's knock alone, and makes its own when it looks at it."""
    assert knock.answer() is None
    descriptor = t.cast(socket.socket, knock._socket).fileno()
    child = os.fork()
    if not child:
        is_closed = False
        try:
            os.fstat(descriptor)
        except OSError:
            is_closed = True
        os._exit(0 if is_closed and knock.answer(10) is True else 1)
    parents, _ = listener.accept()
    childs, _ = listener.accept()
    childs.send(b"\x4a\x00\x00\x00\x0a")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert knock.answer() is None
    parents.send(b"\x4a\x00\x00\x00\x0a")
    assert knock.answer(10) is True
    parents.close()
    childs.close()


def begun(engine: sa.Engine) -> Knock:
    knock = knock_at(engine)
    assert knock is not None
    return knock


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def is_ready(listener: socket.socket) -> bool:
    return bool(select.select([listener], [], [], 0)[0])


def greet(listener: socket.socket) -> None:
    """Do as a MySQL does that has heard somebody come."""
    client, _ = listener.accept()
    with client:
        client.send(b"\x4a\x00\x00\x00\x0a8.0.36\0")
