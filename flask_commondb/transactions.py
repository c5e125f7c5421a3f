"""Units of work: blocks that commit or roll back, over one bind or several, and their repetition.

Owns: :func:`transaction`, savepoints in it, the order of commits over several sessions, two-phase
commit, and :func:`repeat`.

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
    blocks = {key: _Block(key, session) for key, session in sessions.items()}
    try:
        try:
            for block in blocks.values():
                block.begin(twophase=twophase)
            yield
            for block in blocks.values():
                block.session.flush()
            if twophase:
                for block in blocks.values():
                    block.prepare()
        except BaseException as error:
            for block in blocks.values():
                block.rollback(error)
            raise
        (_commit_prepared if twophase else _commit)(blocks)
    finally:
        for block in blocks.values():
            block.end()


def commit(sessions: t.Mapping[_Key, sa_orm.Session]) -> None:
    """Commit those sessions that have anything to commit, in order.

    One that has only read is left alone: its objects stay as they are.

    :raises PartialCommitError: if a commit fails after another has succeeded.
    """
    blocks = {
        key: _Block(key, session)
        for key, session in sessions.items()
        if _has_changes(session) or _may_have_written(session)
    }
    for block in blocks.values():
        block.session.flush()
    for block in blocks.values():
        block.adopt()
    _commit(blocks)


def repeat(
    unit: t.Callable[[], _T],
    begin: t.Callable[[], contextlib.AbstractContextManager[t.Any]],
    times: int,
    engines: t.Sequence[sa.Engine],
    bind_keys: t.Sequence[str | None],
    app: Flask,
) -> _T:
    """Run a unit of work, and run it again from its beginning when it has met another one.

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
        time.sleep(random.uniform(0, min(BACKOFF * 2 ** (attempt - 1), LONGEST_BACKOFF)))
    with begin():
        return unit()


def begin_anew(key: _Key, session: sa_orm.Session, what: str) -> None:
    """End a transaction that has only read, so that a unit of work has one of its own.

    :param what: what is to begin, for the error's text.
    :raises OpenTransactionError: if the session has changes, or its transaction was begun by hand.
    """
    current = session.get_transaction()
    if session.info.get(_BLOCK):
        reason = "is inside db.transaction()"
    elif current is not None and current.origin is SessionTransactionOrigin.BEGIN:
        reason = "is inside session.begin()"
    elif session.in_nested_transaction():
        reason = "is inside a savepoint"
    elif _has_changes(session):
        reason = "has changes that are not committed"
    elif current is not None and _may_have_written(session):
        reason = "has an open transaction in which it may have written"
    else:
        if current is not None:
            session.rollback()
        return
    raise OpenTransactionError(what, name_of(key), reason)


def is_in_block(session: sa_orm.Session) -> bool:
    """Whether a transaction block has the session's transaction open."""
    return bool(session.info.get(_BLOCK))


def name_of(key: _Key) -> str | None:
    """A key for a message: ``db.session`` is for the default bind and all others."""
    return "(db.session)" if key is ALL_BINDS else key


def _has_changes(session: sa_orm.Session) -> bool:
    return bool(session.new or session.deleted or session.dirty)


def _may_have_written(session: sa_orm.Session) -> bool:
    return session.may_have_written if isinstance(session, RoutingSession) else True


def _why_repeat(error: Exception, engines: t.Iterable[sa.Engine]) -> str | None:
    """Why a failure of a unit of work would not come again, ``None`` if it would."""
    reasons = (dialect_for(engine.engine).failure(error) for engine in engines)
    return next(filter(None, reasons), None)


#: In ``session.info``: a transaction block has the session's transaction open.
_BLOCK = "flask_commondb.transaction"

#: In ``session.info``: a savepoint of the block could not be rolled back.
_BROKEN = "flask_commondb.broken"


class _Block:
    """One session's part of a transaction block: its transaction, or a savepoint in it."""

    def __init__(self, key: _Key, session: sa_orm.Session) -> None:
        self.key = key
        self.session = session
        self._savepoint: sa_orm.SessionTransaction | None = None
        self._ends_twophase = False
        #: Whether its commit is durable; that of a savepoint is not.
        self.is_outermost = False

    @property
    def is_durable(self) -> bool:
        """Whether it has been committed, whatever a listener of the session raised after that."""
        return isinstance(self.session, RoutingSession) and self.session.has_committed

    def bind_keys(self) -> list[str | None]:
        """The binds that its commit is about."""
        if self.key is not ALL_BINDS:
            return [self.key]
        session = self.session
        if isinstance(session, RoutingSession) and session.own_connections():
            places = map(session.router.place_of, session.own_connections())
            return [place.bind_key for place in sorted(places)]
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
                raise OpenTransactionError(
                    "A two-phase transaction", name_of(self.key), "is inside one that is not"
                )
            self._savepoint = session.begin_nested()
            self._savepoint.__enter__()
            return
        if twophase and not session.twophase:
            begin_anew(self.key, session, "A two-phase transaction")
            session.twophase = self._ends_twophase = True
        if not session.in_transaction() and not session.autobegin:
            session.begin()
        session.info[_BLOCK] = self.is_outermost = True

    def adopt(self) -> None:
        """Take over what was done in the session's transaction so far."""
        self.is_outermost = True
        if isinstance(self.session, RoutingSession):
            self.session.has_committed = False

    def prepare(self) -> None:
        if not self.is_outermost:
            return
        self._refuse_if_broken()
        self.session.prepare()

    def commit(self) -> None:
        if self._savepoint is None:
            self._refuse_if_broken()
            self.session.commit()
        else:
            savepoint, self._savepoint = self._savepoint, None
            savepoint.__exit__(None, None, None)

    def rollback(self, error: BaseException) -> None:
        try:  # the error that led here is the one to show
            if self.is_outermost:
                self.session.rollback()
            elif self._savepoint is not None:
                savepoint, self._savepoint = self._savepoint, None
                savepoint.__exit__(type(error), error, error.__traceback__)
        except Exception:
            if not self.is_outermost:
                self.session.info[_BROKEN] = True

    def end(self) -> None:
        if self.is_outermost:
            self.session.info.pop(_BLOCK, None)
            self.session.info.pop(_BROKEN, None)
        if self._ends_twophase:
            self.session.twophase = False

    def _refuse_if_broken(self) -> None:
        if self.session.info.pop(_BROKEN, False):
            raise sa.exc.InvalidRequestError(
                "The transaction had ended before a savepoint in it was rolled back: something"
                " has committed or rolled back underneath. Nothing more is committed."
            )


def _commit(blocks: t.Mapping[_Key, _Block]) -> None:
    names = {key: block.bind_keys() for key, block in blocks.items()}
    committed: list[str | None] = []
    pending = list(blocks)
    for key, block in blocks.items():
        pending.remove(key)
        try:
            block.commit()
        except BaseException as error:
            for other in (key, *pending):
                blocks[other].rollback(error)
            failed, undone = names[key][0], [name for other in pending for name in names[other]]
            if isinstance(error, PartialCommitError):
                committed += error.committed
                failed, undone = error.failed, [*error.pending, *undone]
            elif block.is_outermost and block.is_durable:
                committed += names[key]
            if not committed or len(blocks) == 1 or not isinstance(error, Exception):
                raise
            raise PartialCommitError(committed, failed, undone) from error
        if block.is_outermost:
            committed += names[key]


def _commit_prepared(blocks: t.Mapping[_Key, _Block]) -> None:
    """The second phase: each is committed, whatever happens to another."""
    names = {key: block.bind_keys() for key, block in blocks.items()}
    committed: list[str | None] = []
    prepared: list[str | None] = []
    errors: list[BaseException] = []
    for block in blocks.values():
        try:
            block.commit()
        except PartialCommitError as error:
            committed += error.committed
            prepared += error.prepared
            errors.insert(0, error.__cause__ or error)
        except BaseException as error:  # a listener's, after the commit
            errors.append(error)
        else:
            if block.is_outermost:
                committed += names[block.key]
    if prepared:
        raise PartialCommitError(committed, prepared[0], [], prepared) from errors[0]
    if errors:
        raise errors[0]
