"""Throw-away database servers for the tests, started from Debian's binaries.

This module owns the servers' processes, their data directories and the promise that neither
outlives the test process. It must not know the package under test, pytest or any fixture.

Nothing here is safe against a power cut, and nothing asks for a real password: every server
listens on the loopback interface only and keeps its data in a directory that is deleted.
A server that is killed and started again does keep what was committed.
"""

from __future__ import annotations

import abc
import atexit
import contextlib
import dataclasses
import functools
import inspect
import os
import pwd
import random
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import typing as t
from pathlib import Path

import psycopg
import pymysql

if t.TYPE_CHECKING:
    import collections.abc as c

    import typing_extensions as te

Row = tuple[t.Any, ...]


class ServerMissing(RuntimeError):
    """The server's program is not installed; the message names the package that has it."""


class ServerFailed(RuntimeError):
    """A server did not start; the message ends with the server's own log."""


class ReplicationFailed(RuntimeError):
    """A replica stopped, or did not catch up in time; the message carries the server's reason."""


def wait_until(condition: c.Callable[[], object], what: str, timeout: float = 10.0) -> None:
    """Return as soon as `condition()` is true; raise `TimeoutError` naming `what` otherwise."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"gave up after {timeout:g} s waiting until {what}")
        time.sleep(0.005)


def free_port() -> int:
    """Return a loopback TCP port that nobody uses and that the kernel does not hand out itself.

    Ports for outgoing connections are avoided: while a killed server is down, a client could
    otherwise be given the server's port, or even connect to itself.
    """
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        first = 32768
    low, high = (10240, first) if first > 12288 else (first, 65536)
    for _ in range(200):
        port = random.randrange(low, high)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port between {low} and {high}")


def split_statements(script: str) -> list[str]:
    """Return the statements of a script whose delimiter is a line that holds only `//`."""
    chunks = [
        "\n".join(line for line in chunk.split("\n") if not line.startswith("--")).strip()
        for chunk in script.split("\n//\n")
    ]
    return [chunk for chunk in chunks if chunk]


class Server(abc.ABC):
    """One server process. Its port stays the same across kill and start."""

    #: What ends the server in good order, and what ends it fast when its data is not needed.
    stop_signal: t.ClassVar[signal.Signals]
    abort_signal: t.ClassVar[signal.Signals]

    def __init__(self, directory: Path, server_id: int) -> None:
        self.directory = directory
        self.server_id = server_id
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._has_served = False
        self._is_frozen = False

    def __repr__(self) -> str:
        state = "frozen" if self._is_frozen else "running" if self.is_running else "down"
        return f"<{type(self).__name__} {self.server_id} on port {self.port}: {state}>"

    @property
    def pid(self) -> int | None:
        """The process's number; None when the server is down."""
        return self._process.pid if self._process is not None and self.is_running else None

    @property
    def is_running(self) -> bool:
        """Whether the process exists; a frozen one does."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What the server has written to its log since it was last started."""
        try:
            return (self.directory / "log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    @abc.abstractmethod
    def url(self, user: str = "app", database: str = "app", port: int | None = None) -> str:
        """Return SQLAlchemy's URL for the server, or for `port`, such as a proxy's."""

    @abc.abstractmethod
    def execute(self, sql: str, *args: object, database: str | None = None) -> list[Row]:
        """Run one statement as the all-powerful user, on a connection of its own, and commit it."""

    def start(self) -> None:
        """Start the server unless it runs, and wait until it answers."""
        if not self.is_running:
            self.launch()
        self.wait_until_ready()

    def restart(self) -> None:
        """Stop the server in good order and start it again."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """Stop the server in good order; it keeps its data and can be started again."""
        self._end(self.stop_signal)

    def abort(self) -> None:
        """Stop the server as fast as it can be without leaving anything but its directory."""
        self._end(self.abort_signal)

    def kill(self) -> None:
        """End the server with SIGKILL, children included, as a crash would."""
        pids = self._pids()
        # A process that is stopped takes SIGKILL too; no need to thaw it.
        _signal(pids, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        wait_until(lambda: not any(map(is_alive, pids)), f"{self!r} is gone")
        self._is_frozen = False

    def freeze(self) -> None:
        """Stop the server's processes in their tracks: it accepts connections, and is silent."""
        pids = self._pids()
        _signal(pids, signal.SIGSTOP)
        self._is_frozen = True
        wait_until(lambda: all(_state(pid) in "TtZX" for pid in pids), f"{self!r} stands still")

    def thaw(self) -> None:
        """Let a frozen server go on."""
        _signal(self._pids(), signal.SIGCONT)
        self._is_frozen = False

    def launch(self) -> None:
        """Start the process and return at once."""
        with open(self.directory / "log", "wb") as log:
            self._process = subprocess.Popen(
                self._argv(),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C at the terminal must reach the tests only.
                start_new_session=True,
                **self._credentials(),
            )

    def wait_until_ready(self, timeout: float = 30.0) -> None:
        """Return when the server answers, raise `ServerFailed` as soon as it cannot any more."""
        deadline = time.monotonic() + timeout
        retried = False
        while not self._answers():
            if not self.is_running:
                if retried or "Address already in use" not in self.log:
                    raise ServerFailed(f"{self!r} ended while it started. Its log:\n{self.log}")
                # Somebody took the port between our look and the server's. Nobody knows a new
                # server's port yet; that of an old one is in its clients' URLs.
                retried = True
                if not self._has_served:
                    self.port = free_port()
                self.launch()
            if time.monotonic() > deadline:
                self.kill()
                raise ServerFailed(f"{self!r} was silent for {timeout:g} s. Its log:\n{self.log}")
            time.sleep(0.005)
        self._has_served = True

    def _end(self, number: signal.Signals) -> None:
        if self._process is None or not self.is_running:
            return
        self.thaw()
        self._process.send_signal(number)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()

    def _pids(self) -> list[int]:
        return _family(str(self.directory)) if self.is_running else []

    @abc.abstractmethod
    def _argv(self) -> list[str]: ...

    @abc.abstractmethod
    def _answers(self) -> bool: ...

    def _credentials(self) -> dict[str, t.Any]:
        return {}


class MariaDBServer(Server):
    """One mariadbd. `lab` may do anything, `app` is a plain user; each one's password is its name.

    `lab` writes on a replica in spite of read_only; `app` gets error 1290 there.
    """

    stop_signal = signal.SIGTERM
    abort_signal = signal.SIGKILL

    def __init__(self, directory: Path, server_id: int, read_only: bool) -> None:
        super().__init__(directory, server_id)
        self.read_only = read_only
        self._settings: dict[str, str | None] = {}

    def url(self, user: str = "app", database: str = "app", port: int | None = None) -> str:
        return f"mysql+pymysql://{user}:{user}@127.0.0.1:{port or self.port}/{database}"

    def execute(self, sql: str, *args: object, database: str | None = None) -> list[Row]:
        connection = pymysql.connect(
            host="127.0.0.1",
            port=self.port,
            user="lab",
            password="lab",
            database=database,
            autocommit=True,
            connect_timeout=5,
            # The only protection from a server that is frozen.
            read_timeout=30,
            write_timeout=30,
            # Asking for TLS costs 25 ms a connection, even when the server has none.
            ssl_disabled=True,
        )
        with connection, connection.cursor() as cursor:
            cursor.execute(sql, args or None)
            return list(cursor.fetchall())

    def remember_settings(self) -> None:
        """Note the global variables, for `restore_settings`."""
        self._settings = dict(
            self.execute(
                "SELECT variable_name, global_value FROM information_schema.system_variables"
                " WHERE variable_scope <> 'SESSION ONLY' AND read_only = 'NO'"
            )
        )

    def restore_settings(self) -> bool:
        """Undo every `SET GLOBAL` since `remember_settings`; tell whether there was any."""
        changed = [
            (name, kind)
            for name, kind, value in self.execute(
                "SELECT variable_name, variable_type, global_value"
                " FROM information_schema.system_variables WHERE global_value_origin = 'SQL'"
            )
            # Replication moves these by itself.
            if not name.startswith("GTID_") and value != self._settings.get(name, value)
        ]
        for name, kind in changed:
            value = self._settings[name]
            number = value is not None and ("INT" in kind or kind == "DOUBLE")
            self.execute(f"SET GLOBAL {name} = {value if number else '%s'}", *[value][number:])
        return bool(changed)

    def slave_status(self) -> dict[str, t.Any]:
        """Return `SHOW SLAVE STATUS` by column name; empty on a server that replicates nothing."""
        connection = pymysql.connect(
            host="127.0.0.1",
            port=self.port,
            user="lab",
            password="lab",
            connect_timeout=5,
            read_timeout=30,
            ssl_disabled=True,
            cursorclass=pymysql.cursors.DictCursor,
        )
        with connection, connection.cursor() as cursor:
            cursor.execute("SHOW SLAVE STATUS")
            return cursor.fetchone() or {}

    def _argv(self) -> list[str]:
        return [
            _find("mariadbd", "mariadb-server", MARIADB_DIRECTORIES),
            # Has to come first.
            "--no-defaults",
            *_as_root(),
            f"--datadir={self.directory}/d",
            f"--socket={self.directory}/s",
            f"--pid-file={self.directory}/pid",
            f"--tmpdir={self.directory}",
            f"--port={self.port}",
            f"--server-id={self.server_id}",
            "--report-host=127.0.0.1",
            f"--report-port={self.port}",
            f"--read-only={'ON' if self.read_only else 'OFF'}",
            *MARIADB_LAYOUT,
            *MARIADB_FLAGS,
        ]

    def _answers(self) -> bool:
        # The private socket, not the port: on the port some other server might answer. The
        # socket accepts before the server is ready, hence the wait for the greeting.
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(10)
            try:
                probe.connect(f"{self.directory}/s")
                return bool(probe.recv(1))
            except OSError:
                return False


class PostgreSQLServer(Server):
    """One postgres. `lab` is the superuser, `app` a plain role; neither has a password."""

    stop_signal = signal.SIGINT
    # Not SIGKILL, which leaves shared memory behind.
    abort_signal = signal.SIGQUIT

    def url(self, user: str = "app", database: str = "app", port: int | None = None) -> str:
        return f"postgresql+psycopg://{user}@127.0.0.1:{port or self.port}/{database}"

    def execute(self, sql: str, *args: object, database: str | None = None) -> list[Row]:
        with self._connect("127.0.0.1", database or "postgres") as connection:
            # As bytes, because the driver's type for text is "literals only".
            cursor = connection.execute(sql.encode(), args or None)
            return cursor.fetchall() if cursor.description else []

    def abort(self) -> None:
        super().abort()
        # What is left of a server that was killed and never started again.
        with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
            lines = (self.directory / "d" / "postmaster.pid").read_text().splitlines()
            segment = int(lines[6].split()[1])
            subprocess.run(["ipcrm", "-m", str(segment)], check=False, capture_output=True)

    def _connect(self, host: str, database: str) -> psycopg.Connection[Row]:
        return psycopg.connect(
            host=host,
            port=self.port,
            user="lab",
            dbname=database,
            connect_timeout=5,
            autocommit=True,
            # libpq would encrypt if it could; do not let it ask.
            sslmode="disable",
            gssencmode="disable",
        )

    def _argv(self) -> list[str]:
        postgres = _find("postgres", "postgresql", _postgresql_directories())
        place = str(self.directory)
        return [postgres, "-D", f"{place}/d", "-p", str(self.port), "-k", place]

    def _answers(self) -> bool:
        try:
            self._connect(str(self.directory), "postgres").close()
        except psycopg.OperationalError:
            return False
        return True

    def _credentials(self) -> dict[str, t.Any]:
        return _postgresql_credentials()


ServerT = t.TypeVar("ServerT", bound=Server)


class Cluster(abc.ABC, t.Generic[ServerT]):
    """A primary and the servers that follow it. Use as a context manager, or start and stop."""

    def __init__(self) -> None:
        self._directory: Path | None = None
        self._owner_pid = 0
        #: The primary, then its replicas; none before the start.
        self.servers: list[ServerT] = []

    @property
    def primary(self) -> ServerT:
        """The server that may be written to."""
        return self.servers[0]

    @property
    def replicas(self) -> list[ServerT]:
        """The servers that follow the primary."""
        return self.servers[1:]

    def __enter__(self) -> te.Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the servers on new ports and wait until the replicas follow the primary."""
        self._owner_pid = os.getpid()
        self._directory = _make_directory(self._owner())
        try:
            self.servers = self._make_servers(self._directory)
            self._assemble()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the servers and delete all they had; nothing on a cluster that does not run."""
        # A fork of the process that started them must leave the servers alone, as it cannot even
        # tell whether they run.
        if self._directory is None or self._owner_pid != os.getpid():
            return
        for server in reversed(self.servers):
            server.abort()
        _remove_directory(self._directory)
        self._directory = None

    def rebuild(self) -> None:
        """Begin again with empty servers on the same ports."""
        for server in reversed(self.servers):
            server.abort()
            shutil.rmtree(server.directory)
        self._assemble()

    def repair(self) -> bool:
        """Make a cluster whole after a test that broke it; tell whether there was anything to do.

        Starts, thaws and reconnects what a test killed, froze or stopped. Begins again with
        :meth:`rebuild` when that is not enough: a replica diverged, or roles were exchanged.
        """
        try:
            return self._mend()
        except _BEYOND_MENDING:
            self.rebuild()
            return True

    @abc.abstractmethod
    def sync(self, timeout: float = 10.0) -> None:
        """Return when every replica has what the primary has at this moment."""

    @abc.abstractmethod
    def create_database(self, name: str) -> None:
        """Create a database that user `app` may use, on all servers."""

    @abc.abstractmethod
    def drop_database(self, name: str) -> None:
        """Drop a database, and first the connections that still use it."""

    @abc.abstractmethod
    def _make_servers(self, directory: Path) -> list[ServerT]: ...

    @abc.abstractmethod
    def _assemble(self) -> None: ...

    @abc.abstractmethod
    def _mend(self) -> bool: ...

    def _owner(self) -> tuple[int, int] | None:
        return None

    def _wake(self) -> bool:
        """Start and thaw the servers; tell whether one needed it."""
        asleep = [server for server in self.servers if not server.is_running or server._is_frozen]
        for server in asleep:
            server.thaw()
            server.start()
        return bool(asleep)


class MariaDBCluster(Cluster[MariaDBServer]):
    """A MariaDB primary and two replicas that follow it by GTID; server ids 1, 2 and 3."""

    def wait_for_replicas(
        self, timeout: float = 10.0, replicas: c.Iterable[MariaDBServer] | None = None
    ) -> None:
        """Return when the replicas have applied all that is in the primary's binary log now."""
        ((position,),) = self.primary.execute("SELECT @@gtid_binlog_pos")
        for replica in self.replicas if replicas is None else replicas:
            if not position:
                # Nothing to wait for yet, and waiting for nothing succeeds on any server.
                self._wait_until_replicating(replica, timeout)
                continue
            deadline = time.monotonic() + timeout
            # In slices, because the wait does not end when the replica stops with an error.
            while replica.execute("SELECT MASTER_GTID_WAIT(%s, 0.2)", position) != [(0,)]:
                self._check_replication(replica, late=time.monotonic() > deadline)

    def sync(self, timeout: float = 10.0) -> None:
        self.wait_for_replicas(timeout)

    def stop_replication(self, server: MariaDBServer) -> None:
        """Let a replica fall behind."""
        server.execute("STOP SLAVE")

    def start_replication(self, server: MariaDBServer) -> None:
        """Let a replica catch up, and return when it is connected."""
        server.execute("START SLAVE")
        self._wait_until_replicating(server)

    def create_database(self, name: str) -> None:
        self.primary.execute(
            f"CREATE DATABASE {_backquote(name)} CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci"
        )
        self.primary.execute(f"GRANT {APP_PRIVILEGES} ON {_pattern(name)}.* TO 'app'@'%'")
        self.wait_for_replicas()

    def drop_database(self, name: str) -> None:
        for server in self.servers:
            # An open transaction would make DROP DATABASE wait, on a replica as well.
            for (number,) in server.execute(
                "SELECT id FROM information_schema.processlist WHERE db = %s"
                " AND user IN ('app', 'lab') AND id <> CONNECTION_ID()",
                name,
            ):
                with _ignored(UNKNOWN_THREAD):
                    server.execute(f"KILL {number}")
        self.primary.execute(f"DROP DATABASE IF EXISTS {_backquote(name)}")
        with _ignored(NO_SUCH_GRANT):
            self.primary.execute(f"REVOKE {APP_PRIVILEGES} ON {_pattern(name)}.* FROM 'app'@'%'")
        self.wait_for_replicas()

    def _make_servers(self, directory: Path) -> list[MariaDBServer]:
        return [
            MariaDBServer(directory / str(number), number, read_only=number > 1)
            for number in (1, 2, 3)
        ]

    def _assemble(self) -> None:
        template = _template("mariadb", _make_mariadb_template)
        for server in self.servers:
            server.directory.mkdir()
            _copy(template, server.directory / "d")
            server.launch()
        for server in self.servers:
            server.wait_until_ready()
            server.remember_settings()
        for replica in self.replicas:
            replica.execute(
                "CHANGE MASTER TO MASTER_HOST = '127.0.0.1', MASTER_PORT = %s,"
                " MASTER_USER = 'repl', MASTER_PASSWORD = 'repl', MASTER_USE_GTID = slave_pos,"
                " MASTER_CONNECT_RETRY = 1, MASTER_HEARTBEAT_PERIOD = 1",
                self.primary.port,
            )
            replica.execute("START SLAVE")
        for replica in self.replicas:
            self._wait_until_replicating(replica)

    def _mend(self) -> bool:
        mended = self._wake()
        for server in self.servers:
            mended |= server.restore_settings()
        if self.primary.slave_status():
            raise ReplicationFailed("the primary follows another server")
        for replica in self.replicas:
            status = replica.slave_status()
            if status.get("Master_Port") != self.primary.port:
                raise ReplicationFailed(f"{replica!r} does not follow the primary")
            if not status["Slave_IO_Running"] == status["Slave_SQL_Running"] == "Yes":
                # Both, or the receiver waits a second before it tries to connect again.
                replica.execute("STOP SLAVE")
                self.start_replication(replica)
                mended = True
        self.wait_for_replicas(timeout=5)
        positions = {server.execute("SELECT @@gtid_binlog_pos")[0] for server in self.servers}
        if len(positions) > 1:
            raise ReplicationFailed(f"a replica was written to: {positions}")
        return mended

    def _wait_until_replicating(self, replica: MariaDBServer, timeout: float = 10.0) -> None:
        deadline = time.monotonic() + timeout
        while replica.execute("SHOW GLOBAL STATUS LIKE 'Slave_running'") != [
            ("Slave_running", "ON")
        ]:
            self._check_replication(replica, late=time.monotonic() > deadline)
            time.sleep(0.005)

    def _check_replication(self, replica: MariaDBServer, late: bool) -> None:
        status = replica.slave_status()
        if late or status.get("Last_SQL_Errno"):
            reason = status.get("Last_SQL_Error") or status.get("Last_IO_Error") or "no error"
            raise ReplicationFailed(f"{replica!r} does not keep up with the primary: {reason}")


class PostgreSQLCluster(Cluster[PostgreSQLServer]):
    """A PostgreSQL primary and a hot standby that streams from it."""

    @property
    def standby(self) -> PostgreSQLServer:
        """The only replica."""
        return self.replicas[0]

    def wait_for_standby(self, timeout: float = 10.0) -> None:
        """Return when the standby has replayed all that the primary has committed by now."""
        ((position,),) = self.primary.execute("SELECT pg_current_wal_flush_lsn()::text")
        deadline = time.monotonic() + timeout
        while self.standby.execute(
            "SELECT pg_is_in_recovery(), pg_last_wal_replay_lsn() >= %s::pg_lsn", position
        ) != [(True, True)]:
            if time.monotonic() > deadline:
                raise ReplicationFailed(
                    f"{self.standby!r} does not keep up with the primary. Its log:\n"
                    f"{self.standby.log}"
                )
            time.sleep(0.002)

    def sync(self, timeout: float = 10.0) -> None:
        self.wait_for_standby(timeout)

    def create_database(self, name: str) -> None:
        self.primary.execute(f"CREATE DATABASE {_doublequote(name)} OWNER app")
        self.wait_for_standby()

    def drop_database(self, name: str) -> None:
        # FORCE ends the connections to the primary; replaying the drop ends the standby's.
        self.primary.execute(f"DROP DATABASE IF EXISTS {_doublequote(name)} WITH (FORCE)")
        self.wait_for_standby()

    def _make_servers(self, directory: Path) -> list[PostgreSQLServer]:
        return [PostgreSQLServer(directory / "p", 1), PostgreSQLServer(directory / "s", 2)]

    def _assemble(self) -> None:
        template = _template("postgresql", _make_postgresql_template, self._owner())
        for server in self.servers:
            _make_owned(server.directory, self._owner())
            # A copy of a server that never ran is as good as a base backup.
            _copy(template, server.directory / "d")
        self.primary.start()
        (self.standby.directory / "d" / "standby.signal").touch()
        with open(self.standby.directory / "d" / "postgresql.conf", "a") as settings:
            settings.write(
                f"primary_conninfo = 'host=127.0.0.1 port={self.primary.port} user=lab"
                " application_name=standby'\n"
            )
        self.standby.start()
        self.primary.execute("CREATE ROLE app LOGIN")
        self.create_database("app")
        self._wait_until_streaming()

    def _mend(self) -> bool:
        mended = self._wake()
        if self.primary.execute("SELECT pg_is_in_recovery()") != [(False,)]:
            raise ReplicationFailed("the primary is in recovery")
        if self.standby.execute("SELECT pg_is_in_recovery()") != [(True,)]:
            raise ReplicationFailed("the standby was promoted")
        if self.standby.execute("SELECT pg_is_wal_replay_paused()") != [(False,)]:
            self.standby.execute("SELECT pg_wal_replay_resume()")
            mended = True
        self._wait_until_streaming()
        self.wait_for_standby(timeout=5)
        return mended

    def _owner(self) -> tuple[int, int] | None:
        credentials = _postgresql_credentials()
        return (credentials["user"], credentials["group"]) if credentials else None

    def _wait_until_streaming(self) -> None:
        count = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"
        wait_until(
            lambda: self.primary.execute(count) == [(1,)], "the standby streams from the primary"
        )


ClusterT = t.TypeVar("ClusterT", bound=Cluster[t.Any])


@dataclasses.dataclass(frozen=True)
class Database(t.Generic[ClusterT]):
    """A database on a cluster, as tests use it."""

    cluster: ClusterT
    name: str

    @property
    def primary_url(self) -> str:
        """The URL of the primary for user `app`."""
        url: str = self.cluster.primary.url(database=self.name)
        return url

    @property
    def replica_urls(self) -> list[str]:
        """The URLs of the replicas for user `app`, in the cluster's order."""
        return [replica.url(database=self.name) for replica in self.cluster.replicas]

    def execute(self, sql: str, *args: object) -> list[Row]:
        """Run one statement in this database on the primary as the all-powerful user."""
        rows: list[Row] = self.cluster.primary.execute(sql, *args, database=self.name)
        return rows

    def sync(self) -> None:
        """Return when every replica has what the primary has at this moment."""
        self.cluster.sync()


# -- MariaDB -------------------------------------------------------------------------------

MARIADB_DIRECTORIES: c.Sequence[str] = ("/usr/sbin", "/usr/bin", "/usr/local/sbin")

#: What `app` may do in a database made for it. No global privilege, READ ONLY ADMIN least of all.
APP_PRIVILEGES = (
    "SELECT, INSERT, UPDATE, DELETE, CREATE, DROP, ALTER, INDEX, EXECUTE, CREATE ROUTINE,"
    " ALTER ROUTINE, CREATE TEMPORARY TABLES, LOCK TABLES, TRIGGER, CREATE VIEW, SHOW VIEW,"
    " REFERENCES"
)

#: Flags that the template and every server made from it must agree on.
MARIADB_LAYOUT = shlex.split("""
    --innodb-log-file-size=4M --innodb-data-file-path=ibdata1:10M:autoextend
    --innodb-autoextend-increment=1 --innodb-temp-data-file-path=ibtmp1:1M:autoextend
    --innodb-undo-tablespaces=0 --aria-log-file-size=8M
    --innodb-flush-method=nosync --innodb-doublewrite=OFF
""")

MARIADB_FLAGS = shlex.split(
    """
    # Behaviour: no surprises from the machine, and no wait of a day for a lock.
    --bind-address=127.0.0.1 --skip-name-resolve --skip-external-locking
    --character-set-server=utf8mb4 --collation-server=utf8mb4_general_ci
    --default-storage-engine=InnoDB --lc-messages=en_US --local-infile=ON --symbolic-links=0
    --secure-file-priv= --log-warnings=1 --log-output=TABLE
    --lock-wait-timeout=10 --innodb-lock-wait-timeout=5
    --event-scheduler=OFF --feedback=OFF --log-bin-trust-function-creators=ON

    # Small.
    --innodb-buffer-pool-size=8M --innodb-log-buffer-size=2M --key-buffer-size=64K
    --aria-pagecache-buffer-size=1M --query-cache-size=0 --query-cache-type=0
    --performance-schema=OFF --table-open-cache=200 --table-definition-cache=400
    --thread-cache-size=16 --max-connections=60 --back-log=50 --thread-stack=256K
    --innodb-read-io-threads=2 --innodb-write-io-threads=2 --innodb-purge-threads=1
    --innodb-buffer-pool-dump-at-shutdown=OFF --innodb-buffer-pool-load-at-startup=OFF

    # Fast, yet a killed server keeps what it committed: each commit reaches the kernel (2), and
    # only the disk is spared. 0 does not promise that.
    --innodb-flush-log-at-trx-commit=2 --sync-binlog=0 --innodb-use-native-aio=0
    --sync-master-info=0 --sync-relay-log=0 --sync-relay-log-info=0 --innodb-fast-shutdown=2

    # Replication. A restarted replica goes on by itself, as one in production does.
    --log-bin=binlog --log-slave-updates=ON --binlog-format=ROW --binlog-row-image=FULL
    --binlog-annotate-row-events=OFF --gtid-strict-mode=ON --gtid-domain-id=0
    --relay-log=relay --slave-net-timeout=5
    """,
    comments=True,
)

UNKNOWN_THREAD = 1094
NO_SUCH_GRANT = 1141


def _make_mariadb_template(directory: Path) -> None:
    install = _find("mariadb-install-db", "mariadb-server", MARIADB_DIRECTORIES)
    # Without name resolution nobody is @localhost. The character set is spelt out because
    # databases made while bootstrapping are latin1 otherwise.
    users = directory.parent / "users.sql"
    users.write_text(
        "FLUSH PRIVILEGES;\n"
        "CREATE USER 'repl'@'%' IDENTIFIED BY 'repl';\n"
        "GRANT REPLICATION SLAVE ON *.* TO 'repl'@'%';\n"
        "CREATE USER 'lab'@'%' IDENTIFIED BY 'lab';\n"
        "GRANT ALL PRIVILEGES ON *.* TO 'lab'@'%' WITH GRANT OPTION;\n"
        "CREATE USER 'app'@'%' IDENTIFIED BY 'app';\n"
        f"GRANT {APP_PRIVILEGES} ON `app`.* TO 'app'@'%';\n"
        "CREATE DATABASE app CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci;\n"
    )
    _run(
        [
            install,
            "--no-defaults",
            *_as_root(),
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            "--skip-name-resolve",
            f"--extra-file={users}",
            f"--datadir={directory}",
            "--innodb-fast-shutdown=0",
            *MARIADB_LAYOUT,
        ]
    )


def _as_root() -> list[str]:
    # Root has to say that root is meant.
    return ["--user=root"] if os.geteuid() == 0 else []


def _backquote(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _pattern(name: str) -> str:
    # In GRANT a database name is a pattern.
    return _backquote(name.replace("\\", "\\\\").replace("_", "\\_").replace("%", "\\%"))


@contextlib.contextmanager
def _ignored(number: int) -> t.Iterator[None]:
    try:
        yield
    except pymysql.MySQLError as error:
        if error.args[0] != number:
            raise


# -- PostgreSQL ----------------------------------------------------------------------------

POSTGRESQL_HOME = Path("/usr/lib/postgresql")

#: max_connections, max_worker_processes and max_wal_senders are left alone: with less than initdb
#: wrote down, the standby refuses to start.
POSTGRESQL_SETTINGS = """
listen_addresses = '127.0.0.1'
shared_buffers = 4MB
dynamic_shared_memory_type = mmap   # in the data directory, so that it goes away with it
fsync = off
full_page_writes = off
synchronous_commit = on             # off would keep commits from the standby for 200 ms
wal_level = replica
wal_keep_size = 32MB
max_prepared_transactions = 10      # two-phase commit; off by default
hot_standby = on
wal_retrieve_retry_interval = 50ms
wal_receiver_status_interval = 1s
autovacuum = off
max_wal_size = 64MB
min_wal_size = 4MB
checkpoint_timeout = 1h
logging_collector = off
log_min_messages = warning
jit = off
max_parallel_workers = 0
max_logical_replication_workers = 0
"""


def _make_postgresql_template(directory: Path) -> None:
    initdb = _find("initdb", "postgresql", _postgresql_directories())
    _run(
        [
            initdb,
            "--pgdata",
            str(directory),
            "--username=lab",
            "--auth=trust",
            "--no-sync",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--wal-segsize=1",
            "--no-instructions",
        ],
        **_postgresql_credentials(),
    )
    with open(directory / "postgresql.conf", "a") as settings:
        settings.write(POSTGRESQL_SETTINGS)


def _postgresql_directories() -> list[str]:
    found = [path for path in POSTGRESQL_HOME.glob("*/bin") if path.parent.name.isdigit()]
    return [str(path) for path in sorted(found, key=lambda path: -int(path.parent.name))]


def _postgresql_credentials() -> dict[str, t.Any]:
    """Return what makes a subprocess an ordinary user's: postgres refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise ServerMissing("postgres does not run as root; apt-get install postgresql adds a user")


def _doublequote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


# -- programs, directories, processes ------------------------------------------------------

_BEYOND_MENDING: tuple[type[Exception], ...] = (
    ServerFailed,
    ReplicationFailed,
    TimeoutError,
    pymysql.MySQLError,
    psycopg.Error,
)

#: Room for the templates and five servers, with some left for the tests' rows.
_ROOM = 512 * 1024 * 1024

_templates: dict[str, Path] = {}
#: Held while a template is made, so that two threads do not make the same one.
_templates_lock = threading.Lock()


def _find(program: str, package: str, directories: c.Iterable[str]) -> str:
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), *directories])
    found = shutil.which(program, path=places)
    if found is None:
        raise ServerMissing(f"{program} is not installed: apt-get install {package}")
    return found


def _run(argv: list[str], **credentials: t.Any) -> None:
    done = subprocess.run(
        argv,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        **credentials,
    )
    if done.returncode:
        raise ServerFailed(f"{argv[0]} failed with {done.returncode}. Its output:\n{done.stdout}")


def _template(
    kind: str, make: c.Callable[[Path], None], owner: tuple[int, int] | None = None
) -> Path:
    """Return a data directory to copy from, made once per process."""
    with _templates_lock:
        if kind not in _templates:
            directory = _make_directory(owner)
            try:
                make(directory / "d")
            except BaseException:
                _remove_directory(directory)
                raise
            _templates[kind] = directory / "d"
        return _templates[kind]


def _copy(source: Path, target: Path) -> None:
    # Several times faster than shutil.copytree, and keeps holes and owners.
    _run(["cp", "-a", "--sparse=always", str(source), str(target)])


def _make_owned(directory: Path, owner: tuple[int, int] | None) -> None:
    directory.mkdir(mode=0o700)
    if owner is not None:
        os.chown(directory, *owner)


def _make_directory(owner: tuple[int, int] | None = None) -> Path:
    """Make a directory that is deleted when this process ends, whatever ends it."""
    directory = Path(tempfile.mkdtemp(prefix="cdb-", dir=_choose_parent()))
    _watcher().tell("+", directory)
    if owner is not None:
        os.chown(directory, *owner)
    return directory


def _remove_directory(directory: Path) -> None:
    shutil.rmtree(directory)
    _watcher().tell("-", directory)


def _choose_parent() -> str:
    # Memory first. The path must be short, a socket's may not exceed 107 bytes, and open to the
    # user that runs postgres; $TMPDIR is often neither, so it comes last.
    for parent in ("/dev/shm", "/tmp"):
        with contextlib.suppress(OSError):
            space = os.statvfs(parent)
            if os.access(parent, os.W_OK) and space.f_bavail * space.f_frsize > _ROOM:
                return parent
    return tempfile.gettempdir()


class _Watcher:
    """A process that ends the servers and deletes their directories once this process is gone.

    A signal on the parent's death would not do: the kernel sends it when the *thread* that
    started the server ends, and setting it needs code between fork and exec, which Python
    warns about in a process with threads.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        source = [
            "from __future__ import annotations",
            "import contextlib, os, select, shutil, signal, sys, time",
            *[inspect.getsource(part) for part in (_family, _state, is_alive, _signal, _watch)],
            "_watch()",
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", "\n".join(source), str(self._owner)],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        atexit.register(self.close)

    def tell(self, sign: str, directory: Path) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{sign}{directory}\n".encode())
        self._process.stdin.flush()

    def close(self) -> None:
        # A fork of this process must not end the servers of its parent.
        if os.getpid() == self._owner:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()


@functools.cache
def _watcher() -> _Watcher:
    return _Watcher()


# The functions below also run in the watcher: nothing but the standard library, and only the
# modules that _Watcher imports there.


def _watch() -> None:
    parent = int(sys.argv[1])
    directories: set[str] = set()
    rest = b""
    # The end of the pipe is not enough: a forked child of the parent may still hold it open.
    while os.getppid() == parent:
        if not select.select([0], [], [], 0.2)[0]:
            continue
        received = os.read(0, 65536)
        if not received:
            break
        *lines, rest = (rest + received).split(b"\n")
        for line in map(os.fsdecode, lines):
            (directories.add if line[0] == "+" else directories.discard)(line[1:])
    pids = [pid for directory in directories for pid in _family(directory)]
    _signal(pids, signal.SIGCONT)
    _signal(pids, signal.SIGQUIT)
    deadline = time.monotonic() + 2
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    _signal([pid for pid in pids if is_alive(pid)], signal.SIGKILL)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def _family(directory: str) -> list[int]:
    """Return the servers that run in a directory, each one before its children."""
    parents: dict[int, int] = {}
    servers: list[int] = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                program, _, arguments = file.read().partition(b"\0")
            with open(f"/proc/{pid}/stat", "rb") as file:
                parents[pid] = int(file.read().rpartition(b")")[2].split()[1])
        except OSError:
            continue
        known = os.path.basename(program) in (b"mariadbd", b"postgres")
        if known and os.fsencode(directory) + b"/" in arguments:
            servers.append(pid)
    children = [pid for pid, parent in parents.items() if parent in servers and pid not in servers]
    return servers + children


def _state(pid: int) -> str:
    """Return the kernel's letter for a process's state, X for one that does not exist."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0].decode()
    except OSError:
        return "X"


def is_alive(pid: int) -> bool:
    """Whether a process exists. A zombie is dead: in a container nobody may bury it."""
    return _state(pid) not in "ZX"


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
