"""One commit over connections to several binds: in order, and with an exact report.

Owns: the order in which a session commits its connections, and :exc:`.PartialCommitError` for a
commit that fails after another has succeeded. SQLAlchemy commits them in the order of a set, and
shows the error of the one that fails.

Must not: know Flask, or decide where a statement goes.
"""

from __future__ import annotations

import contextlib
import time
import typing as t

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from .errors import PartialCommitError


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
    """Have a session's transaction commit its connections in order.

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
    joint = known[0] if known else _Joint(place)
    for name, (connection, begun, should_commit, autoclose) in entries.items():
        if should_commit and not isinstance(begun, _Part):
            part = joint.parts.setdefault(connection, _Part(joint, begun))
            entries[name] = (connection, part, should_commit, autoclose)


class _Joint:
    """The transactions that are committed together."""

    def __init__(self, place: t.Callable[[sa.Connection], Place]) -> None:
        self.parts: dict[sa.Connection, _Part] = {}
        self._place = place
        self._is_committed = False

    def commit(self) -> None:
        if self._is_committed:
            return
        places = {connection: self._place(connection) for connection in self.parts}
        order = sorted(places, key=lambda connection: places[connection].rank)
        keys = [places[connection].bind_key for connection in order]
        parts = [self.parts[connection] for connection in order]
        if isinstance(parts[0].begun, sa.TwoPhaseTransaction):
            _commit_prepared(keys, parts)
        else:
            _commit(keys, parts)
        self._is_committed = True


class _Part:
    """In the place of one connection's transaction: the first to be committed commits all."""

    def __init__(self, joint: _Joint, begun: sa.Transaction) -> None:
        self.joint = joint
        self.begun = begun
        #: Prepared, with a commit that has failed: it is the server's, and not to be rolled back.
        self.is_left_prepared = False

    def __getattr__(self, name: str) -> t.Any:
        return getattr(self.begun, name)

    def commit(self) -> None:
        self.joint.commit()

    def rollback(self) -> None:
        if not self.is_left_prepared:
            self.begun.rollback()


def _commit(keys: t.Sequence[str | None], parts: t.Sequence[_Part]) -> None:
    for index, part in enumerate(parts):
        try:
            part.begun.commit()
        except Exception as error:
            if index == 0:
                raise
            raise PartialCommitError(keys[:index], keys[index], keys[index + 1 :]) from error


def _commit_prepared(keys: t.Sequence[str | None], parts: t.Sequence[_Part]) -> None:
    """The second phase. All are prepared, so each is committed, whatever happens to another."""
    failures: dict[str | None, BaseException] = {}
    interrupt: BaseException | None = None
    for key, part in zip(keys, parts, strict=True):
        begun = t.cast(sa.TwoPhaseTransaction, part.begun)
        engine = begun.connection.engine
        try:
            begun.commit()
        except BaseException as error:
            part.is_left_prepared = True
            if not _commit_from_outside(engine, begun.xid):
                failures[key] = error
            if not isinstance(error, Exception):
                interrupt = error
    if interrupt is not None:
        raise interrupt
    if failures:
        failed, cause = next(iter(failures.items()))
        committed = [key for key in keys if key not in failures]
        raise PartialCommitError(committed, failed, [], list(failures)) from cause


#: Seconds between attempts to commit what a lost connection has left prepared: its server must
#: first have noticed that it is lost.
_WAITS = (0, 0.05, 0.1, 0.2, 0.4, 0.8)


def _commit_from_outside(engine: sa.Engine, xid: t.Any) -> bool:
    """Commit a prepared transaction on another connection; whether it is committed now."""
    for wait in _WAITS:
        time.sleep(wait)
        with contextlib.suppress(sa.exc.DBAPIError), engine.connect() as connection:
            try:
                connection.commit_prepared(xid, recover=True)
                return True
            except sa.exc.DBAPIError:
                connection.rollback()
                if xid not in connection.recover_twophase():
                    return True  # only the server's answer was lost, not the commit
    return False
