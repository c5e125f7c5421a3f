"""Tests of the proxy: what it sees is what was sent, and every disturbance is felt.

This module owns the promises that tests of failure rely on. It must not test the package.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import typing as t

import psycopg
import pymysql
import pytest

from .proxy import Command
from .proxy import Proxy
from .proxy import ProxyClosed
from .proxy import _CommandReader
from .servers import wait_until

if t.TYPE_CHECKING:
    import collections.abc as c

    from .conftest import MakeProxy
    from .servers import Database
    from .servers import MariaDBCluster
    from .servers import MariaDBServer
    from .servers import PostgreSQLCluster


def connect(port: int, **options: t.Any) -> t.Any:
    """Connect to MariaDB as the plain user; the connection closes at the end of a `with`."""
    options = {"connect_timeout": 5, "read_timeout": 5, **options}
    return pymysql.connect(
        host="127.0.0.1", port=port, user="app", password="app", ssl_disabled=True, **options
    )


def ask(connection: t.Any, sql: str = "SELECT 1") -> t.Any:
    with connection.cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall()


@pytest.fixture
def echo() -> c.Iterator[int]:
    """The port of a server that sends back what it gets, and closes after its client."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(client: socket.socket) -> None:
            with client, contextlib.suppress(OSError):
                while data := client.recv(65536):
                    client.sendall(data)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    thread = threading.Thread(target=serve, args=(client,))
                    threads.append(thread)
                    thread.start()

        threads = [threading.Thread(target=accept)]
        threads[0].start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


class TestCommands:
    def test_exactly(self, mariadb: MariaDBCluster, proxy: MakeProxy) -> None:
        """The list holds the commands that PyMySQL sent, no more, in their order."""
        through = proxy(mariadb.primary.port)
        with connect(through.port) as connection:
            # The driver's own beginning differs between its versions; logging in is no part of it.
            assert {command.name for command in through.commands} <= {"QUERY"}
            assert all(command.sql.startswith("SET ") for command in through.commands)
            through.clear()
            assert ask(connection, "SELECT @@server_id") == ((1,),)
            connection.rollback()
            connection.ping(reconnect=False)
            connection.select_db("app")
            assert through.links == 1
        through.wait_for("QUIT")
        commands = through.commands
        assert commands == [
            Command("QUERY", "SELECT @@server_id"),
            Command("QUERY", "ROLLBACK"),
            Command("PING"),
            Command("INIT_DB", "app"),
            Command("QUIT"),
        ]
        assert list(map(str, commands[:3])) == ["SELECT @@server_id", "ROLLBACK", "PING"]
        wait_until(lambda: through.links == 0, "the link is closed")

    def test_clear(self, mariadb: MariaDBCluster, proxy: MakeProxy) -> None:
        """clear() forgets; the list is the caller's own copy."""
        through = proxy(mariadb.primary.port)
        with connect(through.port) as connection:
            through.clear()
            before = through.commands
            ask(connection)
            assert (before, through.commands) == ([], [Command("QUERY", "SELECT 1")])

    def test_links_are_told_apart(self, mariadb: MariaDBCluster, proxy: MakeProxy) -> None:
        """Each command knows which connection sent it."""
        through = proxy(mariadb.primary.port)
        with connect(through.port) as first, connect(through.port) as second:
            through.clear()
            ask(second, "SELECT 2")
            ask(first, "SELECT 1")
            found = [(command.sql, command.link) for command in through.commands]
            assert found == [("SELECT 2", 2), ("SELECT 1", 1)]
            assert through.links == 2

    def test_other_character_sets(self, mariadb: MariaDBCluster, proxy: MakeProxy) -> None:
        """Text beyond ASCII is read as UTF-8."""
        through = proxy(mariadb.primary.port)
        with connect(through.port) as connection:
            assert ask(connection, "SELECT 'żółw'") == (("żółw",),)
        assert Command("QUERY", "SELECT 'żółw'") in through.commands

    def test_long_statement(self, mariadb: MariaDBCluster, proxy: MakeProxy) -> None:
        """A statement that takes two packets is one command."""
        through = proxy(mariadb.primary.port)
        # The server takes no more than 16 MB, so the answer is an error; the question counts.
        sql = f"SELECT LENGTH('{'x' * (1 << 24)}')"
        with connect(through.port) as connection:
            through.clear()
            with pytest.raises(pymysql.err.Error, match=r"1153|2006|2013"):
                ask(connection, sql)
            wait_until(lambda: through.commands, "the statement went through")
        # Compared without letting pytest print 16 MB.
        is_same = through.commands[0] == Command("QUERY", sql)
        assert is_same

    def test_upload(
        self, mariadb_database: Database[MariaDBCluster], proxy: MakeProxy, tmp_path: t.Any
    ) -> None:
        """The packets of a LOCAL INFILE are no commands, even when their numbers wrap round."""
        mariadb_database.execute("CREATE TABLE loaded (line TEXT)")
        file = tmp_path / "lines"
        file.write_bytes(b"\x01\x02\x03\x0e" * 250 + b"\n")
        size = 16 * 1024
        with open(file, "ab") as lines:
            # Twice round: more than 512 packets of 16 KB.
            lines.writelines([(b"\x0e" * (size - 1)) + b"\n"] * 600)
        through = proxy(mariadb_database.cluster.primary.port)
        sql = f"LOAD DATA LOCAL INFILE '{file}' INTO TABLE loaded"
        with connect(through.port, database=mariadb_database.name, local_infile=True) as connection:
            through.clear()
            ask(connection, sql)
            connection.rollback()
        through.wait_for("QUIT")
        assert list(map(str, through.commands)) == [sql, "ROLLBACK", "QUIT"]


class TestReader:
    """The reader by itself: how the network cuts the bytes must not matter."""

    LOGIN = b"\x04\x00\x00\x01\x85\xa2\x00\x00"
    QUERY = b"\x09\x00\x00\x00\x03SELECT 1"
    PING = b"\x01\x00\x00\x00\x0e"
    UNKNOWN = b"\x01\x00\x00\x00\x77"
    PREPARE = b"\x03\x00\x00\x00\x16DO"
    EXPECTED: t.ClassVar = [
        Command("QUERY", "SELECT 1"),
        Command("PING"),
        Command("0x77"),
        Command("STMT_PREPARE", "DO"),
    ]

    def read(self, chunks: c.Iterable[bytes]) -> list[Command]:
        found: list[Command] = []
        reader = _CommandReader(1, found.append)
        for chunk in chunks:
            reader.feed(chunk)
        return found

    @pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 1000])
    def test_pieces(self, size: int) -> None:
        """Split or joined, the same bytes are the same commands."""
        whole = self.LOGIN + self.QUERY + self.PING + self.UNKNOWN + self.PREPARE
        pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
        assert self.read(pieces) == self.EXPECTED

    @pytest.mark.parametrize("extra", [0, 1])
    def test_continuation(self, extra: int) -> None:
        """A payload goes on after a packet of the greatest length, if only with nothing."""
        text = b"\x03" + b"x" * (0xFFFFFF - 1)
        rest = extra.to_bytes(3, "little") + b"\x01" + b"\x0e" * extra
        (long, ping) = self.read([b"\xff\xff\xff\x00", text, rest, self.PING])
        assert (len(long.sql), ping) == (0xFFFFFF - 1 + extra, Command("PING"))

    def test_wrapped_number(self) -> None:
        """Number 0 after 255 goes on with an upload, unless the server has spoken since."""
        found: list[Command] = []
        reader = _CommandReader(1, found.append)
        reader.feed(b"\x01\x00\x00\xff\x0e" + self.PING)
        assert found == []
        reader.feed(b"\x01\x00\x00\xff\x0e")
        reader.hear_server(b"\x00")
        reader.feed(self.PING)
        assert found == [Command("PING")]

    def test_tls(self) -> None:
        """Nothing is read into a connection that is encrypted."""
        request = b"\x20\x00\x00\x01" + b"\x00\x08" + bytes(30)
        assert self.read([request, self.QUERY, self.PING]) == []
        no_request = b"\x20\x00\x00\x01" + bytes(32)
        assert self.read([no_request, self.PING]) == [Command("PING")]


class TestDisturbances:
    def test_cut(self, mariadb: MariaDBCluster, proxy: MakeProxy) -> None:
        """cut() ends the connections there are, at both ends; the next one works."""
        server = mariadb.replicas[0]
        through = proxy(server.port)
        with contextlib.closing(connect(through.port)) as connection:
            ((number,),) = ask(connection, "SELECT CONNECTION_ID()")
            through.cut()
            assert through.links == 0
            with pytest.raises(pymysql.err.OperationalError, match=r"2006|2013"):
                ask(connection)
            wait_until(lambda: number not in threads_of(server), "the server saw it, too")
        with connect(through.port) as connection:
            assert ask(connection) == ((1,),)

    def test_stall(self, mariadb: MariaDBCluster, proxy: MakeProxy) -> None:
        """While stalled, a question gets no answer and the server does not see it."""
        through = proxy(mariadb.replicas[0].port)
        with contextlib.closing(connect(through.port, read_timeout=0.2)) as connection:
            through.clear()
            through.stall()
            with pytest.raises(pymysql.err.OperationalError, match="timed out"):
                ask(connection)
            assert (through.links, through.commands) == (1, [])

    def test_resume(self, mariadb: MariaDBCluster, proxy: MakeProxy) -> None:
        """After resume() the answers come that were due."""
        through = proxy(mariadb.replicas[0].port)
        with connect(through.port, read_timeout=10) as connection:
            through.stall()
            answers: list[t.Any] = []
            thread = threading.Thread(target=lambda: answers.append(ask(connection)))
            thread.start()
            thread.join(0.1)
            assert answers == []
            through.resume()
            thread.join(5)
            assert answers == [((1,),)]

    def test_stalled_connect(self, mariadb: MariaDBCluster, proxy: MakeProxy) -> None:
        """While stalled, a new connection is accepted and hears nothing; then it works."""
        through = proxy(mariadb.replicas[0].port)
        through.stall()
        with socket.create_connection(("127.0.0.1", through.port), 1) as client:
            wait_until(lambda: through.links == 1, "the connection is accepted")
            client.settimeout(0.1)
            with pytest.raises(TimeoutError, match="timed out"):
                client.recv(1)
            through.resume()
            client.settimeout(5)
            assert client.recv(1)

    def test_stalled_cut(self, echo: int, proxy: MakeProxy) -> None:
        """A stalled link can be cut."""
        through = proxy(echo, None)
        with socket.create_connection(("127.0.0.1", through.port), 5) as client:
            wait_until(lambda: through.links == 1, "the connection is accepted")
            through.stall()
            through.cut()
            assert is_closed(client)

    def test_refuse(self, mariadb: MariaDBCluster, proxy: MakeProxy) -> None:
        """refuse() turns new connections away and keeps the old; accept() reopens the port."""
        through = proxy(mariadb.replicas[0].port)
        with connect(through.port) as connection:
            port = through.port
            through.refuse()
            through.refuse()
            with pytest.raises(pymysql.err.OperationalError, match=r"2003.*refused"):
                connect(port)
            assert ask(connection) == ((1,),)
            through.accept()
            through.accept()
            with connect(port) as second:
                assert ask(second) == ((1,),)
            assert through.port == port

    def test_delay(self, mariadb: MariaDBCluster, proxy: MakeProxy) -> None:
        """delay() holds back each direction: a question and its answer take twice as long."""
        through = proxy(mariadb.replicas[0].port)
        with connect(through.port) as connection:
            through.delay(0.1)
            begun = time.monotonic()
            ask(connection)
            assert time.monotonic() - begun >= 0.2
            through.delay(0)
            begun = time.monotonic()
            ask(connection)
            assert time.monotonic() - begun < 0.2

    def test_delay_is_no_throttle(self, echo: int, proxy: MakeProxy) -> None:
        """Bytes are delayed side by side: many of them take no longer than one."""
        through = proxy(echo, None)
        through.delay(0.1)
        data = os.urandom(4_000_000)
        begun = time.monotonic()
        assert exchange(through.port, data) == data
        # One delay after the other would be a hundred of them; the limit on what is held back
        # makes it a few.
        assert 0.2 <= time.monotonic() - begun < 5

    def test_server_down(self, mariadb: MariaDBCluster, proxy: MakeProxy) -> None:
        """With no server behind it, the proxy closes the connection; later ones work again."""
        server = mariadb.replicas[0]
        through = proxy(server.port)
        with contextlib.closing(connect(through.port)) as connection:
            server.kill()
            with pytest.raises(pymysql.err.OperationalError, match=r"2006|2013"):
                ask(connection)
        with pytest.raises(pymysql.err.OperationalError, match=r"2003|2013|2006"):
            connect(through.port)
        wait_until(lambda: through.links == 0, "the links are closed")
        server.start()
        with connect(through.port) as connection:
            assert ask(connection) == ((1,),)
        mariadb.repair()

    def test_other_target(self, mariadb: MariaDBCluster, proxy: MakeProxy) -> None:
        """A changed target counts for new links only."""
        through = proxy(mariadb.replicas[0].port)
        with connect(through.port) as before:
            through.target = mariadb.replicas[1].port
            with connect(through.port) as after:
                answers = [ask(link, "SELECT @@server_id") for link in (before, after)]
        assert answers == [((2,),), ((3,),)]


class TestPlain:
    def test_postgresql(
        self, postgresql_database: Database[PostgreSQLCluster], proxy: MakeProxy
    ) -> None:
        """Without a protocol the proxy serves PostgreSQL, and can be cut and stalled alike."""
        cluster, name = postgresql_database.cluster, postgresql_database.name
        through = proxy(cluster.primary.port, None)
        url = cluster.primary.url(database=name, port=through.port).replace("+psycopg", "")
        with psycopg.connect(url) as connection:
            connection.execute("CREATE TABLE passed (number INT)")
            assert connection.execute("SELECT 1").fetchall() == [(1,)]
            assert (through.links, through.commands) == (1, [])
        with contextlib.closing(psycopg.connect(url)) as connection:
            through.cut()
            with pytest.raises(psycopg.OperationalError, match="closed"):
                connection.execute("SELECT 1")
        through.refuse()
        with pytest.raises(psycopg.OperationalError, match="refused"):
            psycopg.connect(url)

    @pytest.mark.parametrize("size", [0, 1, 65536, 5_000_000])
    def test_every_byte(self, echo: int, proxy: MakeProxy, size: int) -> None:
        """What goes in comes out, and the end of a stream arrives after its last byte."""
        data = os.urandom(size)
        assert exchange(proxy(echo, None).port, data) == data

    def test_many_at_once(self, echo: int, proxy: MakeProxy) -> None:
        """Links do not mix, and orders from several threads do not collide."""
        through = proxy(echo, None)
        results: list[bool] = []

        def work(number: int) -> None:
            data = os.urandom(1000 + number)
            through.delay(number / 1000)
            through.stall()
            through.resume()
            results.append(exchange(through.port, data) == data)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 12


class TestClose:
    def test_nothing_left(self, echo: int) -> None:
        """close() leaves no thread, no socket and no link, whatever state the proxy was in."""
        threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
        with Proxy(echo, None) as through:
            client = socket.create_connection(("127.0.0.1", through.port), 5)
            wait_until(lambda: through.links == 1, "the connection is accepted")
            through.delay(60)
            client.sendall(b"held back")
            through.stall()
        assert is_closed(client)
        client.close()
        assert through.links == 0
        # The echo server's end of the link closes in a thread of its own.
        wait_until(lambda: threading.active_count() == threads, "the threads ended")
        wait_until(lambda: len(os.listdir("/proc/self/fd")) == files, "the sockets are closed")
        with pytest.raises(ConnectionRefusedError, match="refused"):
            socket.create_connection(("127.0.0.1", through.port), 1)

    def test_closed(self, echo: int) -> None:
        """A closed proxy can be closed again and does nothing else."""
        through = Proxy(echo)
        through.close()
        through.close()
        with pytest.raises(ProxyClosed, match="is closed"):
            through.cut()
        assert repr(through) == f"<Proxy {through.port} -> {echo}, 0 links>"


def threads_of(server: MariaDBServer) -> list[int]:
    return [row[0] for row in server.execute("SELECT id FROM information_schema.processlist")]


def is_closed(client: socket.socket) -> bool:
    """Whether the other end has closed; the kernel calls it a reset when bytes were lost."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def exchange(port: int, data: bytes) -> bytes:
    """Send everything, end the stream, and return all that comes back."""
    with socket.create_connection(("127.0.0.1", port), 10) as client:

        def send() -> None:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        received = bytearray()
        while chunk := client.recv(65536):
            received += chunk
        sender.join()
        return bytes(received)
