"""Tests of the throw-away servers: they start, replicate, break, recover and go away.

This module owns the promises that other tests rely on without looking. It must not test the
package.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import typing as t
from pathlib import Path

import psycopg
import pymysql
import pytest

from . import servers
from .conftest import clean_database
from .conftest import started
from .servers import Database
from .servers import MariaDBCluster
from .servers import MariaDBServer
from .servers import PostgreSQLCluster
from .servers import PostgreSQLServer
from .servers import wait_until

if t.TYPE_CHECKING:
    import collections.abc as c

AnyCluster = MariaDBCluster | PostgreSQLCluster
AnyDatabase = Database[MariaDBCluster] | Database[PostgreSQLCluster]

both = pytest.mark.parametrize("kind", ["mariadb", "postgresql"])


@pytest.fixture
def cluster(kind: str, request: pytest.FixtureRequest) -> AnyCluster:
    """The session's cluster of the kind that the test is run for."""
    found: AnyCluster = request.getfixturevalue(kind)
    return found


@pytest.fixture
def database(kind: str, request: pytest.FixtureRequest) -> AnyDatabase:
    """An empty database of the kind that the test is run for."""
    found: AnyDatabase = request.getfixturevalue(f"{kind}_database")
    return found


def new_cluster(kind: str) -> AnyCluster:
    return MariaDBCluster() if kind == "mariadb" else PostgreSQLCluster()


def app_connection(server: MariaDBServer, database: str, **options: t.Any) -> t.Any:
    """Connect as the plain user; the connection closes at the end of a `with`."""
    return pymysql.connect(
        host="127.0.0.1",
        port=server.port,
        user="app",
        password="app",
        database=database,
        ssl_disabled=True,
        **options,
    )


def plain_url(server: PostgreSQLServer, database: str) -> str:
    return server.url(database=database).replace("+psycopg", "")


def can_connect(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


class TestBothKinds:
    @both
    def test_start_and_stop(self, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
        """A cluster is up after start() and gone, with all its files, after stop()."""
        cluster = new_cluster(kind)
        begun = time.monotonic()
        with started(cluster):
            took = time.monotonic() - begun
            found = list(cluster.servers)
            assert all(server.is_running and can_connect(server.port) for server in found)
        with capsys.disabled():
            print(f" [{kind} started in {took:.2f} s] ", end="")
        assert not any(server.is_running or can_connect(server.port) for server in found)
        assert not found[0].directory.parent.exists()
        cluster.stop()

    @both
    def test_two_at_once(self, kind: str, cluster: AnyCluster) -> None:
        """A second cluster runs beside the first and shares no port with it."""
        with started(new_cluster(kind)) as second:
            ports = {server.port for server in [*cluster.servers, *second.servers]}
            assert len(ports) == len(cluster.servers) + len(second.servers)

    @both
    def test_rows_arrive(self, kind: str, database: AnyDatabase) -> None:
        """A row written on the primary is on every replica after sync()."""
        database.execute("CREATE TABLE rule (number INT PRIMARY KEY)")
        for number in range(20):
            database.execute("INSERT INTO rule VALUES (%s)", number)
        database.sync()
        for replica in database.cluster.replicas:
            count = replica.execute("SELECT count(*) FROM rule", database=database.name)
            assert count == [(20,)]

    @both
    def test_urls(self, kind: str, database: AnyDatabase) -> None:
        """A database knows the URLs of all servers for the plain user."""
        ports = [server.port for server in database.cluster.servers]
        start = "mysql+pymysql://app:app@" if kind == "mariadb" else "postgresql+psycopg://app@"
        assert [database.primary_url, *database.replica_urls] == [
            f"{start}127.0.0.1:{port}/{database.name}" for port in ports
        ]
        assert database.cluster.primary.url(port=1).endswith("127.0.0.1:1/app")

    @both
    def test_clean(self, kind: str, cluster: AnyCluster) -> None:
        """Each test gets a database of its own, which is gone afterwards on every server."""
        with clean_database(cluster) as first, clean_database(cluster) as second:
            assert first.name != second.name
        for server in cluster.servers:
            with pytest.raises((pymysql.MySQLError, psycopg.Error), match=first.name):
                server.execute("SELECT 1", database=first.name)

    @both
    @pytest.mark.parametrize("position", [0, 1])
    def test_kill(self, kind: str, position: int, database: AnyDatabase) -> None:
        """A server that was killed comes back on its port with every committed row."""
        server = database.cluster.servers[position]
        port = server.port
        database.execute("CREATE TABLE kept (number INT PRIMARY KEY)")
        for number in range(10):
            database.execute("INSERT INTO kept VALUES (%s)", number)
        if position:
            database.sync()
        server.kill()
        assert (server.is_running, server.pid, can_connect(port)) == (False, None, False)
        server.start()
        assert server.port == port
        count = server.execute("SELECT count(*) FROM kept", database=database.name)
        assert count == [(10,)]
        database.execute("INSERT INTO kept VALUES (10)")
        database.sync()

    @both
    def test_restart(self, kind: str, cluster: AnyCluster) -> None:
        """restart() gives a new process on the old port."""
        server = cluster.replicas[0]
        before = (server.pid, server.port)
        server.restart()
        assert server.is_running
        assert server.pid != before[0]
        assert server.port == before[1]
        cluster.repair()

    @both
    def test_freeze(self, kind: str, cluster: AnyCluster) -> None:
        """A frozen server accepts connections and says nothing until it is thawed."""
        server = cluster.replicas[0]
        server.freeze()
        with socket.create_connection(("127.0.0.1", server.port), 1) as client:
            client.settimeout(0.2)
            # What PostgreSQL answers with one byte; MariaDB speaks first.
            client.sendall(b"\x00\x00\x00\x08\x04\xd2\x16\x2f")
            with pytest.raises(TimeoutError, match="timed out"):
                client.recv(1)
            assert "frozen" in repr(server)
            server.thaw()
            client.settimeout(5)
            assert client.recv(1)
        assert not cluster.repair()

    @both
    @pytest.mark.parametrize("position", [0, 1])
    @pytest.mark.parametrize("damage", ["kill", "freeze", "stop"])
    def test_repair(self, kind: str, damage: str, position: int, database: AnyDatabase) -> None:
        """repair() undoes what a test did to a server and keeps the databases."""
        cluster = database.cluster
        getattr(cluster.servers[position], damage)()
        assert cluster.repair()
        assert not cluster.repair()
        database.execute("CREATE TABLE whole (number INT)")
        database.sync()

    @both
    def test_everything_broken(self, kind: str, database: AnyDatabase) -> None:
        """repair() copes with damage on all servers at once."""
        for server, damage in zip(
            database.cluster.servers, ["kill", "freeze", "stop"], strict=False
        ):
            getattr(server, damage)()
        assert database.cluster.repair()
        assert not database.cluster.repair()

    @both
    def test_failed_start(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A server that cannot start is an error that shows the log, and leaves nothing behind."""
        monkeypatch.setattr(servers, "MARIADB_FLAGS", [*servers.MARIADB_FLAGS, "--no-such-flag"])
        monkeypatch.setattr(PostgreSQLServer, "_argv", _with_bad_setting(PostgreSQLServer._argv))
        cluster = new_cluster(kind)
        with pytest.raises(servers.ServerFailed, match=r"Its log:\n(.|\n)*no.such.flag"):
            cluster.start()
        assert not any(server.is_running for server in cluster.servers)
        assert not cluster.primary.directory.parent.exists()

    @both
    def test_port_taken(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A server whose port was snatched away takes another one."""
        with socket.create_server(("127.0.0.1", servers.free_port())) as thief:
            taken = thief.getsockname()[1]
            real, offers = servers.free_port, [taken]
            monkeypatch.setattr(servers, "free_port", lambda: offers.pop() if offers else real())
            with started(new_cluster(kind)) as cluster:
                assert not offers
                assert taken not in [server.port for server in cluster.servers]

    @both
    def test_port_lost(self, kind: str, cluster: AnyCluster) -> None:
        """A server that is started again never changes its port: its clients know only that."""
        server = cluster.replicas[0]
        server.kill()
        with (
            socket.create_server(("127.0.0.1", server.port)),
            pytest.raises(servers.ServerFailed, match="Address already in use"),
        ):
            server.start()
        assert cluster.repair()

    @both
    def test_missing(self, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """A missing program is named with its package: a skip on a laptop, a failure under CI."""
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(servers, "MARIADB_DIRECTORIES", [])
        monkeypatch.setattr(servers, "POSTGRESQL_HOME", tmp_path)
        monkeypatch.setattr(servers, "_templates", {})
        with pytest.raises(servers.ServerMissing, match=f"apt-get install {kind}"):
            new_cluster(kind).start()
        monkeypatch.setenv("CI", "true")
        with pytest.raises(pytest.fail.Exception, match="is not installed"):
            _enter(started(new_cluster(kind)))
        monkeypatch.delenv("CI")
        with pytest.raises(pytest.skip.Exception, match="is not installed"):
            _enter(started(new_cluster(kind)))


class TestMariaDB:
    def test_server_ids(self, mariadb: MariaDBCluster) -> None:
        """Each server says that it is the one it is taken for."""
        answers = [server.execute("SELECT @@server_id") for server in mariadb.servers]
        assert answers == [[(server.server_id,)] for server in mariadb.servers]
        assert answers == [[(1,)], [(2,)], [(3,)]]

    def test_plain_user(self, mariadb_database: Database[MariaDBCluster]) -> None:
        """`app` works on the primary and is refused by read_only replicas with 1290."""
        cluster, name = mariadb_database.cluster, mariadb_database.name
        with app_connection(cluster.primary, name) as connection, connection.cursor() as cursor:
            cursor.execute("CREATE TABLE note (number INT)")
        mariadb_database.sync()
        for replica in cluster.replicas:
            with app_connection(replica, name) as connection, connection.cursor() as cursor:
                cursor.execute("SELECT @@server_id, @@read_only")
                assert cursor.fetchall() == ((replica.server_id, 1),)
                with pytest.raises(pymysql.err.OperationalError, match=r"1290.*read-only"):
                    cursor.execute("INSERT INTO note VALUES (1)")
        grants = mariadb_database.execute("SHOW GRANTS FOR app")
        assert "READ_ONLY ADMIN" not in str(grants)
        assert "READ ONLY ADMIN" not in str(grants)

    def test_grants_are_exact(self, mariadb: MariaDBCluster) -> None:
        """The underscore in a database's name is no wildcard in the plain user's grants."""
        with clean_database(mariadb) as database:
            other = database.name.replace("_", "x")
            database.execute(f"CREATE DATABASE {other}")
            with pytest.raises(pymysql.err.OperationalError, match="Access denied"):
                app_connection(mariadb.primary, other)
            database.execute(f"DROP DATABASE {other}")

    def test_diverged(self, mariadb_database: Database[MariaDBCluster]) -> None:
        """`lab` can write on a replica; such a replica is beyond repair and begun again."""
        cluster = mariadb_database.cluster
        ports = [server.port for server in cluster.servers]
        cluster.replicas[0].execute("CREATE TABLE stray (number INT)", database="app")
        assert cluster.repair()
        assert [server.port for server in cluster.servers] == ports
        assert cluster.replicas[0].execute("SHOW TABLES", database="app") == []
        assert not cluster.repair()

    def test_broken_replication(self, mariadb_database: Database[MariaDBCluster]) -> None:
        """A replica that stops with an error is reported at once, with its reason."""
        cluster = mariadb_database.cluster
        cluster.replicas[1].execute("CREATE TABLE stray (number INT)", database="app")
        cluster.primary.execute("CREATE TABLE stray (number INT)", database="app")
        begun = time.monotonic()
        with pytest.raises(servers.ReplicationFailed, match="out-of-order"):
            cluster.wait_for_replicas(timeout=30)
        assert time.monotonic() - begun < 15
        assert cluster.repair()

    def test_promoted(self, mariadb_database: Database[MariaDBCluster]) -> None:
        """Exchanged roles are put back."""
        cluster = mariadb_database.cluster
        chosen = cluster.replicas[0]
        chosen.execute("STOP SLAVE")
        chosen.execute("RESET SLAVE ALL")
        chosen.execute("SET GLOBAL read_only = OFF")
        cluster.primary.execute("SET GLOBAL read_only = ON")
        assert cluster.repair()
        read_only = [server.execute("SELECT @@read_only") for server in cluster.servers]
        assert read_only == [[(0,)], [(1,)], [(1,)]]

    def test_lag(self, mariadb_database: Database[MariaDBCluster]) -> None:
        """A replica whose replication is stopped falls behind, and catches up once started."""
        cluster, name = mariadb_database.cluster, mariadb_database.name
        slow, quick = cluster.replicas
        mariadb_database.execute("CREATE TABLE lag (number INT)")
        mariadb_database.sync()
        cluster.stop_replication(slow)
        mariadb_database.execute("INSERT INTO lag VALUES (1)")
        cluster.wait_for_replicas(replicas=[quick])
        assert slow.execute("SELECT * FROM lag", database=name) == []
        assert quick.execute("SELECT * FROM lag", database=name) == [(1,)]
        with pytest.raises(servers.ReplicationFailed, match="does not keep up"):
            cluster.wait_for_replicas(timeout=0.1)
        cluster.start_replication(slow)
        mariadb_database.sync()
        assert slow.execute("SELECT * FROM lag", database=name) == [(1,)]

    def test_stopped_replication(self, mariadb_database: Database[MariaDBCluster]) -> None:
        """repair() starts replication that a test stopped."""
        mariadb_database.cluster.stop_replication(mariadb_database.cluster.replicas[1])
        assert mariadb_database.cluster.repair()
        assert not mariadb_database.cluster.repair()

    def test_nothing_to_wait_for(self) -> None:
        """On a cluster that nobody has written to, the wait is for replication itself."""
        with started(MariaDBCluster()) as cluster:
            assert cluster.primary.execute("SELECT @@gtid_binlog_pos") == [("",)]
            cluster.wait_for_replicas()
            cluster.stop_replication(cluster.replicas[0])
            with pytest.raises(servers.ReplicationFailed, match="does not keep up"):
                cluster.wait_for_replicas(timeout=0.1)

    def test_settings(self, mariadb_database: Database[MariaDBCluster]) -> None:
        """repair() takes back every SET GLOBAL, whatever the variable's type."""
        cluster = mariadb_database.cluster
        query = "SELECT @@wait_timeout, @@sql_mode, @@general_log, @@long_query_time, @@read_only"
        query += ", @@init_connect"
        before = [server.execute(query) for server in cluster.servers]
        for server in (cluster.primary, cluster.replicas[0]):
            server.execute("SET GLOBAL wait_timeout = 7")
            server.execute("SET GLOBAL sql_mode = 'ANSI'")
            server.execute("SET GLOBAL general_log = ON")
            server.execute("SET GLOBAL long_query_time = 0.5")
            server.execute("SET GLOBAL read_only = %s", 1 - before[0][0][4])
            server.execute("SET GLOBAL init_connect = 'SELECT 1'")
        assert cluster.repair()
        assert [server.execute(query) for server in cluster.servers] == before
        assert not cluster.repair()

    def test_general_log(self, mariadb_database: Database[MariaDBCluster]) -> None:
        """The general log can be switched on while the server runs, and read as a table."""
        replica = mariadb_database.cluster.replicas[0]
        replica.execute("SET GLOBAL general_log = ON")
        replica.execute("SELECT 'look for me'")
        logged = "SELECT count(*) FROM mysql.general_log WHERE argument = %s"
        assert replica.execute(logged, "SELECT 'look for me'") == [(1,)]

    def test_functions(self, mariadb_database: Database[MariaDBCluster]) -> None:
        """`app` may create a function in spite of the binary log."""
        cluster, name = mariadb_database.cluster, mariadb_database.name
        with app_connection(cluster.primary, name) as connection, connection.cursor() as cursor:
            cursor.execute("CREATE FUNCTION one() RETURNS INT RETURN 1")
            cursor.execute("SELECT one()")
            assert cursor.fetchall() == ((1,),)

    def test_drop_while_in_use(self, mariadb: MariaDBCluster) -> None:
        """Dropping a database does not wait for transactions that are open, on any server."""
        with contextlib.ExitStack() as stack:
            with clean_database(mariadb) as database:
                database.execute("CREATE TABLE used (number INT)")
                database.sync()
                for server in mariadb.servers:
                    connection = app_connection(server, database.name)
                    stack.callback(connection.close)
                    connection.cursor().execute("SELECT * FROM used")
                begun = time.monotonic()
            # Far less than lock_wait_timeout, which it would be otherwise.
            assert time.monotonic() - begun < 8

    def test_procedures(self, procedures: Database[MariaDBCluster]) -> None:
        """The procedures are on every server and give what their comments say."""
        cluster, name = procedures.cluster, procedures.name
        count = (
            "SELECT routine_type, count(*) FROM information_schema.routines"
            " WHERE routine_schema = %s GROUP BY 1 ORDER BY 1"
        )
        for server in cluster.servers:
            assert server.execute(count, name) == [("FUNCTION", 1), ("PROCEDURE", 36)]
        with app_connection(cluster.replicas[0], name) as connection:
            cursor = connection.cursor()
            cursor.execute("CALL np_out(@a, @b)")
            cursor.execute("SELECT @a, @b")
            assert cursor.fetchall() == ((42, "żółw 'quoted' \\ %s"),)
            cursor.execute("CALL `np we``ird.näme`(1, @a)")
            cursor.execute("SELECT @a")
            assert cursor.fetchall() == ((2,),)
            with pytest.raises(pymysql.err.OperationalError, match="1290"):
                cursor.execute("CALL np_invoker_write('me')")


class TestPostgreSQL:
    def test_plain_role(self, postgresql_database: Database[PostgreSQLCluster]) -> None:
        """`app` owns its database on the primary, and the standby refuses its writes."""
        cluster, name = postgresql_database.cluster, postgresql_database.name
        with psycopg.connect(plain_url(cluster.primary, name)) as connection:
            connection.execute("CREATE TABLE note (number INT)")
        postgresql_database.sync()
        with psycopg.connect(plain_url(cluster.standby, name)) as connection:
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction, match="read-only"):
                connection.execute("INSERT INTO note VALUES (1)")
            connection.rollback()
        role = "SELECT rolsuper, rolcreatedb FROM pg_roles WHERE rolname = 'app'"
        assert postgresql_database.execute(role) == [(False, False)]

    def test_who_is_who(self, postgresql: PostgreSQLCluster) -> None:
        """Only the standby is in recovery."""
        answers = [server.execute("SELECT pg_is_in_recovery()") for server in postgresql.servers]
        assert answers == [[(False,)], [(True,)]]
        assert postgresql.servers == [postgresql.primary, postgresql.standby]

    def test_freeze_reaches_sessions(self, postgresql: PostgreSQLCluster) -> None:
        """Freezing stops the sessions there are, each of which is a process of its own."""
        with psycopg.connect(plain_url(postgresql.standby, "app")) as connection:
            answers: list[object] = []
            question = threading.Thread(
                target=lambda: answers.append(connection.execute("SELECT 1").fetchall())
            )
            postgresql.standby.freeze()
            question.start()
            question.join(0.2)
            assert answers == []
            postgresql.standby.thaw()
            question.join(5)
            assert answers == [[(1,)]]

    def test_promoted(self, postgresql_database: Database[PostgreSQLCluster]) -> None:
        """A standby that was promoted is begun again as a standby."""
        cluster = postgresql_database.cluster
        assert cluster.standby.execute("SELECT pg_promote()") == [(True,)]
        assert cluster.repair()
        assert cluster.standby.execute("SELECT pg_is_in_recovery()") == [(True,)]
        assert not cluster.repair()

    def test_lag(self, postgresql_database: Database[PostgreSQLCluster]) -> None:
        """A standby whose replay is paused falls behind, and repair() lets it go on."""
        cluster, name = postgresql_database.cluster, postgresql_database.name
        postgresql_database.execute("CREATE TABLE lag (number INT)")
        postgresql_database.sync()
        cluster.standby.execute("SELECT pg_wal_replay_pause()")
        wait_until(
            lambda: (
                cluster.standby.execute("SELECT pg_get_wal_replay_pause_state()") == [("paused",)]
            ),
            "replay is paused",
        )
        postgresql_database.execute("INSERT INTO lag VALUES (1)")
        with pytest.raises(servers.ReplicationFailed, match="does not keep up"):
            cluster.wait_for_standby(timeout=0.1)
        assert cluster.standby.execute("SELECT * FROM lag", database=name) == []
        assert cluster.repair()
        assert cluster.standby.execute("SELECT * FROM lag", database=name) == [(1,)]

    def test_drop_while_in_use(self, postgresql: PostgreSQLCluster) -> None:
        """Dropping a database ends the connections to it, on both servers."""
        with contextlib.ExitStack() as stack:
            with clean_database(postgresql) as database:
                for server in postgresql.servers:
                    connection = psycopg.connect(plain_url(server, database.name))
                    stack.callback(connection.close)
                    connection.execute("SELECT 1")
            for server in postgresql.servers:
                query = "SELECT count(*) FROM pg_database WHERE datname = %s"
                assert server.execute(query, database.name) == [(0,)]

    def test_no_shared_memory(self) -> None:
        """A cluster that was killed and never started again leaves no shared memory."""
        with started(PostgreSQLCluster()) as cluster:
            killed = {_shared_memory(server) for server in cluster.servers}
            assert killed <= _all_shared_memory()
            for server in cluster.servers:
                server.kill()
        assert not killed & _all_shared_memory()


class TestOrphans:
    SCRIPT = """
        import json, os, sys, time
        from tests.servers import MariaDBCluster, PostgreSQLCluster

        with MariaDBCluster() as mariadb, PostgreSQLCluster() as postgresql:
            servers = [*mariadb.servers, *postgresql.servers]
            mariadb.replicas[0].freeze()
            postgresql.standby.freeze()
            # A fork inherits every pipe and all objects. It must neither end the servers nor
            # prolong their lives.
            ready, tell = os.pipe()
            fork = os.fork()
            if not fork:
                mariadb.stop()
                postgresql.stop()
                os.write(tell, b"!")
                time.sleep(60)
                os._exit(0)
            os.read(ready, 1)
            print(json.dumps({
                "fork": fork,
                "pids": [server.pid for server in servers],
                "ports": [server.port for server in servers],
                "directories": sorted({str(server.directory.parent) for server in servers}),
            }), flush=True)
            sys.stdin.read()
    """

    def test_parent_killed(self, mariadb: MariaDBCluster, postgresql: PostgreSQLCluster) -> None:
        """When the process that started servers is killed, they and their files vanish."""
        with self._running() as (process, found):
            assert all(map(servers.is_alive, found["pids"]))
            process.kill()
            process.wait()
            try:
                self._expect_nothing(found)
            finally:
                os.kill(found["fork"], signal.SIGKILL)
        assert all(server.is_running for server in [*mariadb.servers, *postgresql.servers])

    def test_parent_exits(self, mariadb: MariaDBCluster, postgresql: PostgreSQLCluster) -> None:
        """When that process just ends, nothing is left at that moment, and nothing complains."""
        with self._running() as (process, found):
            os.kill(found["fork"], signal.SIGKILL)
            _, errors = process.communicate("")
            assert (process.returncode, errors) == (0, "")
            assert not any(map(Path.exists, map(Path, found["directories"])))
            assert not any(map(can_connect, found["ports"]))

    @contextlib.contextmanager
    def _running(self) -> c.Iterator[tuple[subprocess.Popen[str], dict[str, t.Any]]]:
        script = "\n".join(line[8:] for line in self.SCRIPT.splitlines())
        with subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate()
            yield process, json.loads(line)

    def _expect_nothing(self, found: dict[str, t.Any]) -> None:
        wait_until(lambda: not any(map(servers.is_alive, found["pids"])), "the servers ended")
        wait_until(
            lambda: not any(map(Path.exists, map(Path, found["directories"]))),
            "the directories are gone",
        )
        assert not any(map(can_connect, found["ports"]))


class TestHelpers:
    def test_wait_until(self) -> None:
        """wait_until() looks before it waits, and names what it waited for."""
        wait_until(lambda: True, "now", timeout=0)
        with pytest.raises(TimeoutError, match=r"gave up after 0\.01 s waiting until pigs fly"):
            wait_until(lambda: False, "pigs fly", timeout=0.01)

    def test_free_port(self) -> None:
        """A free port can be bound, and is none that outgoing connections get."""
        port = servers.free_port()
        socket.create_server(("127.0.0.1", port)).close()
        low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
        assert not int(low) <= port <= int(high)

    def test_split_statements(self) -> None:
        """A line of // ends a statement, and comment lines are dropped."""
        script = "-- why\nSELECT 1\n//\n-- more\nSELECT '//',\n  2\n//\n"
        assert servers.split_statements(script) == ["SELECT 1", "SELECT '//',\n  2"]


def _enter(manager: contextlib.AbstractContextManager[object]) -> None:
    with manager:
        pass


def _shared_memory(server: PostgreSQLServer) -> str:
    lines = (server.directory / "d" / "postmaster.pid").read_text().splitlines()
    return lines[6].split()[1]


def _all_shared_memory() -> set[str]:
    return {line.split()[1] for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]}


def _with_bad_setting(
    argv: c.Callable[[PostgreSQLServer], list[str]],
) -> c.Callable[[PostgreSQLServer], list[str]]:
    return lambda server: [*argv(server), "-c", "no_such_flag=1"]
