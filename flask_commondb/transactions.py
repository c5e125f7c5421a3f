"""Units of work: blocks that commit or roll back, over one session or several, and repetition.

Owns: :func:`transaction`, savepoints in it, the order of commits over several sessions, and
:func:`repeat`.

Must not: know where sessions are kept, or decide where a statement goes.
"""

from __future__ import annotations

import contextlib
import random
import time
import typing as t

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from sqlalchemy.orm.session import SessionTransactionOrigin

from . import signals
from .commits import abandon
from .dialects import dialect_for
from .errors import OpenTransactionError
from .errors import PartialCommitError
from .routing import ALL_BINDS
from .routing import AllBinds
from .routing import RoutingSession

_Key = str | AllBinds | None

_T = t.TypeVar("_T")

#: Seconds: the longest wait before the first repetition, doubled for each further one ...
BACKOFF = 0.05

#: ... up to this.
LONGEST_BACKOFF = 2.0

#: The same where the server is no primary any more: there may be no other one yet.
PROMOTION = 0.5


@contextlib.contextmanager
def transaction(
    sessions: t.Mapping[_Key, sa_orm.Session], *, twophase: bool = False
) -> t.Iterator[None]:
    """Commit the sessions when the block ends, in order; roll all back when it raises.

    From its beginning on, its sessions read from the primary. Inside another block, or a
    ``session.begin()``, a session's part is a savepoint.

    :param twophase: prepare all before the first is committed.
    :raises PartialCommitError: if a commit fails after another has succeeded.
    :raises OpenTransactionError: if a two-phase transaction cannot begin any more.
    """
    blocks = [_Block(key, session) for key, session in sessions.items()]
    try:
        try:
            for block in blocks:
                block.begin(twophase=twophase)
            yield
            for block in blocks:
                block.session.flush()
            for block in blocks:
                block.refuse_if_broken()
            if twophase:
                for block in blocks:
                    block.prepare()
        except BaseException as error:
            _rollback(blocks, error)
            raise
        (_commit_prepared if twophase else _commit)(blocks)
    finally:
        for block in blocks:
            block.end()


def commit(sessions: t.Mapping[_Key, sa_orm.Session]) -> None:
    """Commit those sessions that have anything to commit, in order.

    One that has only read is left alone: its objects stay as they are.

    :raises PartialCommitError: if a commit fails after another has succeeded.
    """
    blocks = [
        _Block(key, session)
        for key, session in sessions.items()
        if _has_changes(session) or _may_have_written(session)
    ]
    for block in blocks:
        block.session.flush()
    for block in blocks:
        block.adopt()
        block.refuse_if_broken()
    _commit(blocks)


def repeat(
    unit: t.Callable[[], _T],
    begin: t.Callable[[], contextlib.AbstractContextManager[t.Any]],
    times: int,
    engines: t.Sequence[sa.Engine],
    bind_keys: t.Sequence[str | None],
    app: Flask,
) -> _T:
    """Run a unit of work, and run it again from its beginning when it was undone by the server.

    So it is when it has met another one, or the server is no primary any more.

    :param begin: makes the transaction of one attempt.
    :param times: how often it is repeated at most.
    :param engines: of the servers that it may have met another one on.
    :param bind_keys: for the signal.
    """
    for attempt in range(1, times + 1):
        try:
            with begin():
                return unit()
        except Exception as error:
            reason = _why_repeat(error, engines)
            if reason is None:
                raise
            signals.send(
                signals.unit_repeated,
                app,
                bind_keys=tuple(bind_keys),
                attempt=attempt,
                reason=reason,
                error=error,
            )
        # Random, so that two that have met do not meet again.
        first = PROMOTION if reason == "demoted" else BACKOFF
        time.sleep(random.uniform(0, min(first * 2 ** (attempt - 1), LONGEST_BACKOFF)))
    with begin():
        return unit()


def begin_anew(key: _Key, session: sa_orm.Session, what: str) -> None:
    """End a transaction that has only read, so that a unit of work has one of its own.

    :param what: what is to begin, for the error's text.
    :raises OpenTransactionError: if the session has changes, or its transaction was begun by hand.
    """
    current = session.get_transaction()
    if is_in_block(session):
        reason = "is inside db.transaction()"
    elif session.in_nested_transaction():
        reason = "is inside a savepoint"
    elif current is not None and current.origin is SessionTransactionOrigin.BEGIN:
        reason = "is inside session.begin()"
    elif _has_changes(session):
        reason = "has changes that are not committed"
    elif current is not None and _may_have_written(session):
        reason = "has an open transaction in which it may have written"
    else:
        abandon(session)  # whose connection may be lost by now
        return
    raise OpenTransactionError(what, _name_of(key), reason)


def is_in_block(session: sa_orm.Session) -> bool:
    """Whether a transaction block has the session's transaction open."""
    return bool(session.info.get(_BLOCK))


class _Block:
    """One session's part of a transaction block: its transaction, or a savepoint in it."""

    def __init__(self, key: _Key, session: sa_orm.Session) -> None:
        self.session = session
        #: Whether its commit is durable; that of a savepoint is not.
        self.is_outermost = False
        self._key = key
        self._savepoint: sa_orm.SessionTransaction | None = None
        self._ends_twophase = False

    @property
    def is_durable(self) -> bool:
        """Whether it has been committed, whatever a listener of the session raised after that."""
        session = self.session
        return self.is_outermost and isinstance(session, RoutingSession) and session.has_committed

    def bind_keys(self) -> list[str | None]:
        """The binds that its commit is about."""
        if self._key is not ALL_BINDS:
            return [self._key]
        session = self.session
        if isinstance(session, RoutingSession) and session.own_connections():
            places = map(session.router.place_of, session.own_connections())
            return [place.bind_key for place in sorted(places, key=lambda place: place.rank)]
        return [None]

    def begin(self, *, twophase: bool) -> None:
        session = self.session
        if isinstance(session, RoutingSession):
            session.pin_all("transaction")
            session.has_committed = False
        current = session.get_transaction()
        begun = current is not None and current.origin is SessionTransactionOrigin.BEGIN
        if begun or session.in_nested_transaction() or is_in_block(session):
            if twophase and not session.twophase:
                reason = "is inside one that is not"
                raise OpenTransactionError("A two-phase transaction", _name_of(self._key), reason)
            self._savepoint = session.begin_nested()
            self._savepoint.__enter__()
            return
        if twophase and not session.twophase:
            begin_anew(self._key, session, "A two-phase transaction")
            session.twophase = self._ends_twophase = True
        if not session.in_transaction() and not session.autobegin:
            session.begin()
        session.info[_BLOCK] = self.is_outermost = True

    def adopt(self) -> None:
        """Take over what was done in the session's transaction so far."""
        self.is_outermost = True
        if isinstance(self.session, RoutingSession):
            self.session.has_committed = False

    def refuse_if_broken(self) -> None:
        """Make sure, before any other is durable, that nothing of the transaction is lost.

        :raises sqlalchemy.exc.InvalidRequestError: if something is.
        """
        session = self.session
        if not self.is_outermost:
            return
        if isinstance(session, RoutingSession) and any(
            connection.invalidated for connection in session.connections_in_use
        ):
            raise sa.exc.InvalidRequestError(
                "A connection was lost during the transaction, and with it what was done on it."
                " Nothing is committed."
            )
        broken = session.info.get(_BROKEN)
        if broken is not None and broken is session.get_transaction():
            raise sa.exc.InvalidRequestError(
                "The transaction had ended before a savepoint in it was rolled back: something"
                " has committed or rolled back underneath. Nothing more is committed."
            )

    def prepare(self) -> None:
        if not self.is_outermost:
            return
        try:
            self.session.prepare()
        except sa.exc.IllegalStateChangeError as error:
            # Older SQLAlchemy stumbles over its own rollback, and hides why it rolls back.
            raise error.__context__ or error from None

    def commit(self) -> None:
        savepoint, self._savepoint = self._savepoint, None
        if savepoint is None:
            self.session.commit()
        else:
            savepoint.__exit__(None, None, None)

    def rollback(self, error: BaseException) -> None:
        """Undo it. Raises no ``Exception``: the one that led here is the one to show."""
        savepoint, self._savepoint = self._savepoint, None
        if self.is_outermost:
            abandon(self.session)
        elif savepoint is not None:
            try:
                savepoint.__exit__(type(error), error, error.__traceback__)
            except Exception:
                self.spoil()

    def spoil(self) -> None:
        """Have the block around it refuse to commit: not all that belongs together is there."""
        self.session.info[_BROKEN] = self.session.get_transaction()

    def end(self) -> None:
        if self.is_outermost:
            self.session.info.pop(_BLOCK, None)
            self.session.info.pop(_BROKEN, None)
        if self._ends_twophase:
            self.session.twophase = False


def _rollback(blocks: t.Iterable[_Block], error: BaseException) -> None:
    with contextlib.ExitStack() as stack:  # all of them, also when an interrupt comes in between
        for block in blocks:
            stack.callback(block.rollback, error)


def _commit(blocks: t.Sequence[_Block]) -> None:
    names = {block: block.bind_keys() for block in blocks}
    durable: list[str | None] = []
    for index, block in enumerate(blocks):
        try:
            block.commit()
        except BaseException as error:
            others = blocks[index + 1 :]
            _rollback([block, *others], error)
            if not block.is_outermost:
                _spoil(blocks[:index])
            failed, undone = names[block][0], [key for other in others for key in names[other]]
            if isinstance(error, PartialCommitError):
                durable += error.committed
                failed, undone = error.failed, [*error.pending, *undone]
            elif block.is_durable:
                durable += names[block]
            if not durable or len(blocks) == 1 or not isinstance(error, Exception):
                raise
            raise PartialCommitError(durable, failed, undone) from error
        if block.is_outermost:
            durable += names[block]


def _spoil(blocks: t.Iterable[_Block]) -> None:
    """A savepoint was not released; what others have released cannot be undone by itself."""
    for block in blocks:
        block.spoil()


def _commit_prepared(blocks: t.Sequence[_Block]) -> None:
    """The second phase: each is committed, whatever happens to another."""
    names = {block: block.bind_keys() for block in blocks}
    durable: list[str | None] = []
    prepared: list[str | None] = []
    failures: dict[_Block, BaseException] = {}
    for block in blocks:
        try:
            block.commit()
        except BaseException as error:
            _rollback([block], error)
            if not block.is_outermost:
                _spoil(blocks)
            failures[block] = error
            if isinstance(error, PartialCommitError):
                durable += error.committed
                prepared += error.prepared
            elif block.is_durable:  # a listener's, after the commit
                durable += names[block]
        else:
            if block.is_outermost:
                durable += names[block]
    for failure in failures.values():
        if not isinstance(failure, Exception):
            raise failure
    for failure in failures.values():
        if isinstance(failure, PartialCommitError):
            raise PartialCommitError(durable, prepared[0], [], prepared) from failure.__cause__
    for block, failure in failures.items():
        if durable and len(blocks) > 1:
            raise PartialCommitError(durable, names[block][0], []) from failure
        raise failure


def _has_changes(session: sa_orm.Session) -> bool:
    return bool(session.new or session.deleted) or any(map(session.is_modified, session.dirty))


def _may_have_written(session: sa_orm.Session) -> bool:
    return session.may_have_written if isinstance(session, RoutingSession) else True


def _name_of(key: _Key) -> str:
    """What a session is called in a message."""
    return "db.session" if key is ALL_BINDS else f"db.sessions[{key!r}]"


def _why_repeat(error: BaseException, engines: t.Iterable[sa.Engine]) -> str | None:
    """Why a failure of a unit of work would not come again, ``None`` if it would."""
    dialects = [dialect_for(engine.engine) for engine in engines]
    databases = (sa.exc.DBAPIError, *(each.dialect.loaded_dbapi.Error for each in dialects))
    # A deadlock on MariaDB leaves no savepoint to go back to. To say so is the last error, then.
    found: BaseException | None = error
    while found is not None and isinstance(found, databases):
        for dialect in dialects:
            reason = dialect.failure(found)
            if reason is not None:
                return reason
        found = found.__context__
    return None


#: In ``session.info``: a transaction block has the session's transaction open.
_BLOCK = "flask_commondb.transaction"

#: In ``session.info``: the transaction of which a savepoint could not be ended as it should have.
_BROKEN = "flask_commondb.broken"
