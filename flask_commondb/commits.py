"""How the connections of one session end together: in order, in one phase or in two.

Owns: the order in which a session commits its connections, :exc:`.PartialCommitError` for a commit
that fails after another has succeeded, and what becomes of a prepared transaction whose connection
is lost. SQLAlchemy commits in the order of a set, shows the error of the one that fails, and leaves
what is prepared to the administrator.

Must not: know Flask, or decide where a statement goes.
"""

from __future__ import annotations

import contextlib
import logging
import time
import typing as t

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from .errors import PartialCommitError

_logger = logging.getLogger("flask_commondb")

#: Seconds for which a prepared transaction is tried to be ended from another connection: the
#: server must first have noticed that its own is lost.
PATIENCE = 2.0


class Place(t.NamedTuple):
    """Where a connection stands in the order, and what the report calls it.

    :param rank: the lowest is committed first.
    :param bind_key: the bind that it leads to.
    """

    rank: int
    bind_key: str | None


def commit_in_order(
    transaction: sa_orm.SessionTransaction, place: t.Callable[[sa.Connection], Place]
) -> None:
    """Have a session's transaction end its connections together, and commit them in order.

    To be called whenever a connection has joined. With one alone nothing is changed, unless it is
    to be committed in two phases.

    :param transaction: the outermost of its session.
    :param place: where a connection stands.
    """
    # Under each connection and, once more, under its engine: what SQLAlchemy will iterate over.
    entries: dict[t.Any, tuple[t.Any, ...]] = t.cast(t.Any, transaction)._connections
    if len(entries) == 2 and not transaction.session.twophase:
        return
    known = [begun.joint for _, begun, _, _ in entries.values() if isinstance(begun, _Part)]
    joint = known[0] if known else _Joint()
    for name, (connection, begun, should_commit, autoclose) in entries.items():
        if should_commit and not isinstance(begun, _Part):
            if connection not in joint.parts:
                joint.parts[connection] = _Part(joint, begun, place(connection))
            entries[name] = (connection, joint.parts[connection], should_commit, autoclose)


def abandon(session: sa_orm.Session) -> None:
    """Roll a session back, whatever state it is in; it is usable then. Raises no ``Exception``."""
    try:
        session.rollback()
    except Exception:
        # An after_commit listener that raises leaves a transaction that is committed and not ended.
        left = session.get_transaction()
        if left is not None:
            with contextlib.suppress(Exception):
                left.close()
            session.expire_all()


class _Joint:
    """The transactions that end together. SQLAlchemy ends each: the first call ends all of them."""

    def __init__(self) -> None:
        self.parts: dict[sa.Connection, _Part] = {}

    def commit(self) -> None:
        # One that is lost already is the first: it fails before any other is durable.
        parts = sorted(
            self.parts.values(),
            key=lambda part: (not part.begun.connection.invalidated, part.place.rank),
        )
        if all(part.has_ended for part in parts):
            return
        if isinstance(parts[0].begun, sa.TwoPhaseTransaction):
            _commit_prepared(parts)
        else:
            _commit(parts)

    def rollback(self) -> None:
        errors: list[BaseException] = []
        for part in self.parts.values():
            if not part.has_ended:
                part.has_ended = True
                try:
                    _rollback(part)
                except BaseException as error:  # one that is lost must not keep the others open
                    errors.append(error)
        errors.sort(key=lambda error: isinstance(error, Exception))
        if errors:
            raise errors[0]


class _Part:
    """In the place of one connection's transaction."""

    def __init__(self, joint: _Joint, begun: sa.Transaction, place: Place) -> None:
        self.joint = joint
        self.begun = begun
        self.place = place
        #: Nothing is left to be done with it: neither commit nor rollback.
        self.has_ended = False
        #: The server may hold it prepared, whatever becomes of the connection.
        self.may_be_prepared = False

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self.begun, name)

    def prepare(self) -> None:
        self.may_be_prepared = True  # from here on; the answer may be lost
        t.cast(sa.TwoPhaseTransaction, self.begun).prepare()

    def commit(self) -> None:
        self.joint.commit()

    def rollback(self) -> None:
        self.joint.rollback()

    def close(self) -> None:
        self.joint.rollback()


def _commit(parts: t.Sequence[_Part]) -> None:
    durable: list[str | None] = []
    for index, part in enumerate(parts):
        try:
            part.begun.commit()
        except Exception as error:
            if not durable:
                raise
            undone = [other.place.bind_key for other in parts[index + 1 :]]
            raise PartialCommitError(durable, part.place.bind_key, undone) from error
        part.has_ended = True
        if not isinstance(part.begun, sa.NestedTransaction):  # in a caller's own transaction
            durable.append(part.place.bind_key)


def _commit_prepared(parts: t.Sequence[_Part]) -> None:
    """The second phase. All are prepared, so each is committed, whatever happens to another."""
    failures: dict[_Part, BaseException] = {}
    for part in parts:
        part.has_ended = True  # the decision has fallen: nothing is to be rolled back any more
        try:
            part.begun.commit()
        except BaseException as error:
            failures[part] = error
    prepared = [part for part in failures if not _settle(part, "commit_prepared")]
    for failure in failures.values():
        if not isinstance(failure, Exception):
            raise failure
    if prepared:
        committed = [part.place.bind_key for part in parts if part not in prepared]
        waiting = [part.place.bind_key for part in prepared]
        raise PartialCommitError(committed, waiting[0], [], waiting) from failures[prepared[0]]


def _rollback(part: _Part) -> None:
    if not isinstance(part.begun, sa.TwoPhaseTransaction):
        part.begun.rollback()
        return
    is_lost = part.begun.connection.invalidated
    interrupt: BaseException | None = None
    try:
        part.begun.rollback()
    except BaseException as error:
        is_lost = True
        if not isinstance(error, Exception):
            interrupt = error
    if is_lost:  # then the server rolls back by itself, unless it has prepared
        _throw_away(part.begun.connection)
        if part.may_be_prepared:
            _settle(part, "rollback_prepared")
    if interrupt is not None:
        raise interrupt


def _settle(part: _Part, how: t.Literal["commit_prepared", "rollback_prepared"]) -> bool:
    """End what a lost connection has left prepared, on another one; whether it has ended."""
    begun = t.cast(sa.TwoPhaseTransaction, part.begun)
    # A connection that is alive would hold on to it, and hand it to the next user.
    _throw_away(begun.connection)
    deadline = time.monotonic() + PATIENCE
    wait = 0.01
    while not _has_settled(begun.connection.engine, begun.xid, how):
        if time.monotonic() + wait > deadline:
            _logger.error(
                "A transaction stands prepared on the server of bind %r, and keeps its locks."
                " It could not be ended there (%s); do so by hand: %s",
                part.place.bind_key,
                how,
                begun.xid,
                extra={"bind_key": part.place.bind_key},
            )
            return False
        time.sleep(wait)
        wait *= 2
    return True


def _has_settled(engine: sa.Engine, xid: str, how: str) -> bool:
    driver_error = engine.dialect.loaded_dbapi.Error  # psycopg's own errors come out of these calls
    with (
        contextlib.suppress(sa.exc.SQLAlchemyError, driver_error),
        engine.connect() as connection,
        contextlib.ExitStack() as stack,
    ):
        # To reset what is set here can fail, and SQLAlchemy's pool would lose its place.
        stack.callback(_throw_away, connection)
        # MariaDB refuses to end a prepared transaction where another one could be open.
        connection.execution_options(isolation_level="AUTOCOMMIT")
        try:
            getattr(connection, how)(xid, recover=True)
        except (sa.exc.DBAPIError, driver_error):
            return not _is_prepared(connection, xid)
        return True
    return False


def _is_prepared(connection: sa.Connection, xid: str) -> bool:
    try:
        found = connection.recover_twophase()
    except TypeError:  # sqlalchemy#12561: older ones can read MariaDB's list only when it is empty
        return True
    return xid in [name.decode() if isinstance(name, bytes) else name for name in found]


def _throw_away(connection: sa.Connection) -> None:
    with contextlib.suppress(Exception):
        connection.invalidate()
