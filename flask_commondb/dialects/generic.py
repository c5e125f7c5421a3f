"""What holds for every server, and the questions that each family answers in its own way."""

from __future__ import annotations

import contextlib
import dataclasses
import select
import time
import typing as t

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import PoolProxiedConnection

from ..errors import ProcedureNotSupported
from .histories import Position


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a stored procedure.

    :param name: as the server spells it.
    :param mode: ``"IN"``, ``"OUT"`` or ``"INOUT"``.
    :param full_type: with length and sign, such as ``decimal(20,6)``.
    """

    name: str
    mode: str
    full_type: str

    def __str__(self) -> str:
        return f"{self.mode} {self.name} {self.full_type}"


class ResultSet(t.NamedTuple):
    """The names of its columns, and its rows."""

    keys: t.Sequence[str]
    rows: t.Sequence[t.Sequence[t.Any]]


class Outcome(t.NamedTuple):
    """All that a procedure call has left: see :class:`.ProcedureResult`."""

    sets: t.Sequence[ResultSet]
    out: t.Mapping[str, t.Any]
    rowcount: int
    warnings: t.Sequence[tuple[str, int, str]]


#: Seconds after which a server that has not answered a ping is taken for gone.
PING_TIMEOUT = 2.0


class Limits(t.NamedTuple):
    """How long the server may work on a statement, and wait for a lock; in seconds.

    :param statement: for one statement; ``None``: as is usual for the connection, 0: no limit.
    :param lock: for one lock; ``None``: as is usual for the connection.
    """

    statement: float | None = None
    lock: float | None = None


#: Nothing is said: all is as the server has it.
NO_LIMITS = Limits()

#: Tells the limits that the caller has set for the next statement.
CurrentLimits = t.Callable[[], "Limits | None"]


#: See :attr:`Generic.arguments`.
Arguments = t.Mapping[str, t.Mapping[str, tuple[str, t.Callable[[float], float]]]]

#: Where a driver connects to: a host and its port, or the path of a Unix socket.
Address = tuple[str, int] | str


class Patience(t.Protocol):
    """What the connections know of :class:`flask_commondb.patience.Patience`."""

    seconds: float

    def wait(self, descriptor: int, is_answering: t.Callable[[float], bool]) -> bool: ...


class Generic:
    """A server of which nothing special is known.

    :param dialect: SQLAlchemy's dialect object of one engine.
    :param usual: the limits that the engine's statements have where the caller sets none.
    """

    #: Whether the database is part of this process: no server could hang up.
    is_local = False

    #: By driver, for each option of ours that goes into the driver's own argument: the argument's
    #: name, and what is made of the seconds.
    arguments: t.ClassVar[Arguments] = {}

    #: What a client says before the server's first word.
    hello = b""

    #: Whether the server counts connections that end before the login, and locks out who has many.
    counts_knocks = False

    #: Whether the driver's unbuffered cursors work outside of a transaction.
    streams_in_autocommit = True

    def __init__(self, dialect: sa.Dialect, usual: Limits) -> None:
        self.dialect = dialect
        self.usual = usual

    def install(self, engine: sa.Engine, limits: CurrentLimits) -> None:
        """Make the engine's connections what this family needs, before the first is opened.

        :param limits: what the caller allows to a statement at the moment.
        """

    def be_patient(self, patience: Patience) -> None:
        """Have the engine's connections ask whether a server that says nothing is alive.

        Where the connections are ours; after :meth:`install`.
        """

    def address(self, arguments: t.Mapping[str, t.Any]) -> Address | None:
        """Where the driver connects to; ``None`` if that is not known, or not one place.

        :param arguments: of the driver's ``connect()``.
        """
        return None

    def host_of(self, dbapi_connection: t.Any) -> str | None:
        """The host that a connection was made to, as the driver was told. No I/O.

        :returns: ``None`` if the driver does not say.
        """
        return None

    def opens(self, words: bytes) -> bool | None:
        """Whether the server's first words open its door; ``None`` if they are not all there."""
        return None

    def uses(self, dbapi_connection: t.Any) -> int | None:
        """How often something was sent since the last :meth:`begin_use`.

        ``None`` if that cannot be known: then nothing is repeated on another connection.
        """
        return getattr(dbapi_connection, "uses", None)

    def begin_use(self, dbapi_connection: t.Any) -> None:
        """The connection leaves its pool."""
        if hasattr(dbapi_connection, "uses"):
            dbapi_connection.uses = 0

    def was_sent(self, error: t.Any, cursor: t.Any) -> bool:
        """Whether the server may have got the statement that has failed with a lost connection."""
        return True

    def idle_limit(self, dbapi_connection: DBAPIConnection) -> float | None:
        """After how many seconds the server closes an idle connection. One round trip."""
        return None

    def is_demoted(self, error: t.Any, dbapi_connection: t.Any) -> bool:
        """Whether the driver's error says that this server is not a primary any more.

        :param dbapi_connection: which may be read-only by the user's own choice.
        """
        return False

    def is_writable(self, dbapi_connection: DBAPIConnection) -> bool:
        """Whether the server can be written to: it is a primary. One round trip.

        That this connection is read-only, or its user may write on a replica, says nothing.
        """
        return True

    def is_full(self, error: t.Any) -> bool:
        """Whether the driver's error says that the server lets nobody in just now."""
        return False

    def is_conflict(self, error: t.Any) -> bool:
        """Whether a replica says that what it replays has ended a read."""
        return False

    def is_timeout(self, error: t.Any) -> bool:
        """Whether the driver's error says that a statement has taken longer than it may."""
        return False

    def set_limits(self, dbapi_connection: DBAPIConnection) -> None:
        """Give a new connection its usual limits."""

    def limit(self, connection: PoolProxiedConnection, limits: Limits | None, sql: str) -> None:
        """Give the next statement its limits, where the connections do not do so themselves.

        :param limits: the caller's; ``None``: the usual ones.
        :param sql: the statement; empty if that is not known.
        """

    def renew_limits(self, entry: t.Any, limits: Limits | None) -> None:
        """Take limits away from a connection that leaves its pool and still has its last user's."""
        self.limit(entry, limits, "")

    def leave_failed_transaction(self, connection: PoolProxiedConnection) -> None:
        """Make a connection usable that refuses everything since a statement was stopped.

        Only if nothing is lost with it.
        """

    def position(self, dbapi_connection: DBAPIConnection) -> Position:
        """How far the server is in its cluster's history. One round trip, without privileges."""
        raise NotImplementedError(f"{self.dialect.name} has no positions that could be compared.")

    def prepare_primary(self, dbapi_connection: DBAPIConnection) -> None:
        """Set up a new connection to a primary that has replicas."""

    def hold_read_only(self, dbapi_connection: DBAPIConnection) -> None:
        """Have the server refuse every write of this connection, whatever the user may do."""
        raise NotImplementedError(f"{self.dialect.name} cannot hold a connection read-only.")

    def is_left_open(self, dbapi_connection: DBAPIConnection) -> bool:
        """Whether a transaction or a result is open on this autocommit connection. No I/O."""
        return False

    def is_reading(self, dbapi_connection: DBAPIConnection) -> bool:
        """Whether a result is still on its way, row by row, as no cursor was asked to. No I/O."""
        return False

    def failure(self, error: BaseException) -> str | None:
        """Why a unit of work has failed that would succeed when it is run again.

        :returns: ``"deadlock"``, ``"lock_timeout"``, ``"serialization"``, ``"demoted"``, or
            ``None``.
        """
        original = error.orig if isinstance(error, sa.exc.DBAPIError) else error
        if isinstance(original, self.dialect.loaded_dbapi.Error):
            return self.classify(original)
        return None

    def classify(self, error: t.Any) -> str | None:
        """:meth:`failure`, of the driver's own error."""
        return None

    def is_autocommit(self, dbapi_connection: DBAPIConnection) -> bool | None:
        """Whether each statement is committed by itself, ``None`` if that is not known. No I/O."""
        return None

    def why_no_twophase(self, engine: sa.Engine) -> str | None:
        """Why the server cannot prepare a transaction, ``None`` if it can."""
        return f"{self.dialect.name} servers are not known to prepare transactions"

    def parameters(
        self, connection: sa.Connection, schema: str | None, name: str
    ) -> tuple[Parameter, ...] | None:
        """The parameters of a stored procedure, ``None`` if the user can see no such procedure."""
        raise ProcedureNotSupported(
            f"Stored procedures are called on MySQL and MariaDB through PyMySQL; this bind uses"
            f" {self.dialect.name}+{self.dialect.driver}."
        )

    def call(
        self,
        connection: sa.Connection,
        schema: str | None,
        name: str,
        parameters: t.Sequence[Parameter],
        args: t.Sequence[t.Any],
    ) -> Outcome:
        """Call a stored procedure and read everything it sends, to the very end.

        :param args: for the parameters that are IN or INOUT, in order.
        """
        raise NotImplementedError

    def is_stale_signature(self, error: sa.exc.DBAPIError) -> bool:
        """Whether an error of :meth:`call` says that the parameters are not what we think."""
        return False

    def end_read(self, dbapi_connection: DBAPIConnection) -> None:
        """Roll back what has only read, without waiting for the answer if the driver allows it."""

    def is_dead(self, dbapi_connection: DBAPIConnection) -> bool:
        """Whether the server has hung up on an idle connection, found out without a round trip.

        An idle connection has nothing to read. When there is something, it is the end of the
        stream, a last word of the server, or rarely a harmless notice (TLS session tickets come
        late, too): only then one ping tells.
        """
        fileno: t.Callable[[], int] | None = getattr(dbapi_connection, "fileno", None)
        if fileno is None:  # SQLite has no server that could hang up
            return False
        try:
            return is_readable(fileno()) and not self.answers(dbapi_connection)
        except Exception:  # closed on this side
            return True

    def answers(self, dbapi_connection: DBAPIConnection) -> bool:
        """Whether the server answers on an idle connection. One round trip."""
        try:
            return self.dialect.do_ping(dbapi_connection)
        except Exception:
            return False


def run(dbapi_connection: DBAPIConnection, statement: str) -> None:
    """Send one statement on a connection that is not yet, or no longer, SQLAlchemy's."""
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute(statement)
    finally:
        cursor.close()


def ask(dbapi_connection: DBAPIConnection, statement: str) -> t.Any:
    """:func:`run` a query for one value; ``None`` if it has no row."""
    row = ask_row(dbapi_connection, statement)
    return None if row is None else row[0]


def ask_row(dbapi_connection: DBAPIConnection, statement: str) -> t.Any:
    """:func:`run` a query for one row; ``None`` if it has none."""
    cursor = dbapi_connection.cursor()
    try:
        cursor.execute(statement)
        return cursor.fetchone()
    finally:
        cursor.close()


@contextlib.contextmanager
def uncounted(dbapi_connection: t.Any) -> t.Iterator[None]:
    """Send something that leaves the connection as new as it was: see :meth:`Generic.uses`."""
    uses = getattr(dbapi_connection, "uses", None)
    try:
        yield
    finally:
        if uses is not None:
            dbapi_connection.uses = uses


def answering(
    is_readable: t.Callable[[float], bool], limit: float | None
) -> t.Callable[[float], bool]:
    """For :meth:`Patience.wait`: the same function, for so many seconds more.

    :param limit: after which it raises :exc:`TimeoutError`; ``None`` for never.
    """
    if limit is None:
        return is_readable
    until = time.monotonic() + limit

    def is_answering(seconds: float) -> bool:
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return is_readable(min(seconds, left))

    return is_answering


def is_readable(descriptor: int, timeout: float = 0) -> bool:
    """Whether there is something to read, or the end of the stream, within some seconds."""
    return waiting(descriptor)(timeout)


def waiting(
    descriptor: int, to_read: bool = True, to_write: bool = False
) -> t.Callable[[float], bool]:
    """A function that waits for some seconds; whether the descriptor is ready then."""
    if hasattr(select, "poll"):
        poll = select.poll()
        events = (select.POLLIN | select.POLLPRI) * to_read | select.POLLOUT * to_write
        poll.register(descriptor, events)
        return lambda seconds: bool(poll.poll(seconds * 1000))
    reads, writes = [descriptor] * to_read, [descriptor] * to_write
    return lambda seconds: any(select.select(reads, writes, [], seconds))
