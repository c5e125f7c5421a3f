"""The errors of Flask-CommonDB.

Owns: every exception class of the package. Each subclasses what callers of Flask-SQLAlchemy
and SQLAlchemy already catch, so that an existing ``except`` clause keeps working.

Must not: import anything of the package, or put a password or an SQL parameter into a text.
"""

from __future__ import annotations

import difflib
import typing as t

import sqlalchemy.exc as sa_exc


class CommonDBError(Exception):
    """The base of every error that Flask-CommonDB itself raises."""

    def __reduce__(self) -> tuple[t.Any, ...]:
        # A job queue pickles errors, and would otherwise call the class with the finished text.
        return _rebuild, (type(self), self.args, self.__dict__)


class ConfigError(CommonDBError, sa_exc.ArgumentError, RuntimeError):
    """``app.config`` has mistakes; all of them are listed at once.

    Raised by :meth:`.CommonDB.init_app`, before anything has been registered on the app. A
    ``RuntimeError`` and an :exc:`sqlalchemy.exc.ArgumentError`, as Flask-SQLAlchemy raises for a
    missing and for a malformed database URL.

    :param mistakes: one sentence for each mistake, naming the key, the value without its
        password, the reason and, for a misspelt name, the nearest known one.
    """

    def __init__(self, mistakes: t.Sequence[str]) -> None:
        #: One sentence for each mistake.
        self.mistakes = tuple(mistakes)
        if len(self.mistakes) == 1:
            super().__init__(self.mistakes[0])
        else:
            lines = "\n".join(f"  - {mistake}" for mistake in self.mistakes)
            super().__init__(f"The database configuration has several mistakes:\n{lines}")


class NoContextError(CommonDBError, RuntimeError):
    """A session was used while no Flask application context was active."""


class UnknownBindError(CommonDBError, sa_exc.UnboundExecutionError, KeyError):
    """A bind key that the current app does not configure; the text names the known ones.

    :param bind_key: the unknown key.
    :param known: the keys that the app has.
    """

    def __init__(self, bind_key: t.Any, known: t.Collection[str | None]) -> None:
        names = [str(key) for key in known if key is not None]
        near = difflib.get_close_matches(str(bind_key), names, n=1)
        question = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(
            f"Bind key {bind_key!r} is not in 'SQLALCHEMY_BINDS' config.{question}"
            f" The current app has: {', '.join(map(repr, known))}."
        )


class UnknownReplicaError(CommonDBError, KeyError):
    """A bind has no replica of this name; the text names those that it has.

    :param bind_key: the bind.
    :param server: the name.
    :param known: the names of its replicas.
    """

    def __init__(self, bind_key: str | None, server: str, known: t.Sequence[str]) -> None:
        super().__init__(
            f"Bind {bind_key!r} has no replica {server!r};"
            f" it has {', '.join(map(repr, known)) or 'none'}."
        )

    def __str__(self) -> str:  # a KeyError would show its text as a literal
        return str(self.args[0])


class CrossBindError(CommonDBError, sa_exc.UnboundExecutionError):
    """One statement names tables of several binds, and no single server holds them all.

    :param owners: for each bind key the name of one of its tables.
    """

    def __init__(self, owners: t.Mapping[str | None, str]) -> None:
        tables = ", ".join(f"{table!r} (bind {key!r})" for key, table in owners.items())
        super().__init__(
            f"One statement names tables of several binds: {tables}. No server holds them all;"
            " use one statement for each bind, or, if one server does hold them, pass"
            " bind_arguments={'bind': db.engines[key]}."
        )


class WrongBindError(CommonDBError, sa_exc.UnboundExecutionError):
    """``db.sessions[key]`` was given a statement or an object that another bind owns.

    :param bind_key: the session's own.
    :param owner: the bind that owns the table.
    :param table: the table's name.
    """

    def __init__(self, bind_key: str | None, owner: str | None, table: str) -> None:
        super().__init__(
            f"This session is for bind {bind_key!r}, but table {table!r} belongs to bind"
            f" {owner!r}. Use db.sessions[{owner!r}], or db.session, which finds the bind itself."
        )


class PartialCommitError(CommonDBError, sa_exc.InvalidRequestError):
    """A commit over several binds failed after some of them had been committed.

    Raised by :meth:`.CommonDB.transaction` with several keys; the cause is the database's error.

    Also by a commit of ``db.session`` that concerns several binds.

    :param committed: bind keys whose changes are durable. The failed one is among them when a
        listener of the session has raised after its commit.
    :param failed: the bind key whose commit raised.
    :param pending: bind keys that were rolled back, because their turn had not come.
    :param prepared: with ``twophase=True``, bind keys whose changes stand prepared on their server
        and could not be committed there: the failed one is the first of them.
    """

    def __init__(
        self,
        committed: t.Sequence[str | None],
        failed: str | None,
        pending: t.Sequence[str | None],
        prepared: t.Sequence[str | None] = (),
    ) -> None:
        self.committed = tuple(committed)
        self.failed = failed
        self.pending = tuple(pending)
        self.prepared = tuple(prepared)
        what_to_do = "What is durable must be undone by the application."
        if prepared:
            what_to_do = (
                f"Prepared and waiting on their servers: {list(prepared)!r}; they must be committed"
                " there by hand."
            )
        super().__init__(
            f"The commit of bind {failed!r} failed. Already durable: {list(committed)!r};"
            f" rolled back: {list(pending)!r}. {what_to_do}"
        )


class OpenTransactionError(CommonDBError, sa_exc.InvalidRequestError):
    """A unit of work cannot begin, because the session is in the middle of another one.

    :param what: what was to begin.
    :param session: what the session is called, ``db.session`` say.
    :param reason: what it is in the middle of.
    """

    def __init__(self, what: str, session: str, reason: str) -> None:
        super().__init__(
            f"{what} needs a transaction of its own, but {session} {reason}."
            " Commit or roll back before, or call it from outside of that transaction."
        )


class TwoPhaseNotSupported(CommonDBError, NotImplementedError):
    """``db.transaction(…, twophase=True)`` over a server that cannot prepare a transaction."""


class StatementTimeout(CommonDBError, sa_exc.OperationalError):
    """The server has stopped a statement that took longer than it may. It has had no effect.

    On MariaDB, MySQL and SQLite the transaction goes on, and so it does on PostgreSQL after a
    SELECT inside of :meth:`.CommonDB.timeout`. Else PostgreSQL wants a ``rollback()``, unless the
    statement was alone in its transaction.

    :param error: SQLAlchemy's; ``orig`` is the driver's.
    :param bind_key: the bind of the server.
    :param limit: how many seconds it was given, ``None`` if the limit is the server's own.
    """

    def __init__(
        self, error: sa_exc.DBAPIError, bind_key: str | None, limit: float | None = None
    ) -> None:
        self.bind_key = bind_key
        self.limit = limit
        seconds = "it may" if limit is None else f"{limit:g} s"
        sa_exc.DBAPIError.__init__(
            self,
            error.statement,
            None,  # the parameters are nobody's business
            error.orig,  # type: ignore[arg-type]
            hide_parameters=True,
            connection_invalidated=error.connection_invalidated,
        )
        self.args = (
            f"A statement on bind {bind_key!r} took longer than {seconds}, and was stopped by the"
            f" server. Give it more time in 'with db.timeout(…):', or ask for less at once:"
            f" {error.orig}",
        )


class PoolExhausted(CommonDBError, sa_exc.TimeoutError):
    """No connection came back to the pool in time; the text names who holds them.

    :param server: what the server is called, never with a password.
    :param bind_key: the bind whose pool it is.
    :param limit: how many connections the pool allows.
    :param holders: one line for each holder; empty unless :data:`COMMONDB_LEAK_WATCH` is on.
    """

    def __init__(
        self, bind_key: str | None, server: str, limit: int, holders: t.Sequence[str] = ()
    ) -> None:
        self.bind_key = bind_key
        self.holders = tuple(holders)
        who = "Set COMMONDB_LEAK_WATCH to see who holds them."
        if holders:
            who = "\n".join(["They are held by:", *(f"  - {holder}" for holder in holders)])
        super().__init__(
            f"All {limit} connections of bind {bind_key!r} to {server} are in use, and none came"
            f" back in time. Make 'pool_size' plus 'max_overflow' at least the number of threads,"
            f" and close what is kept open. {who}"
        )


class NoReplicaError(CommonDBError, sa_exc.OperationalError):
    """A read that belongs on a replica found none, and may not go to the primary.

    Raised at once: where :data:`COMMONDB_FALLBACK` says so, and beyond
    :data:`COMMONDB_FALLBACK_LIMIT`. The same statement may succeed a moment later.

    :param bind_key: the bind.
    :param reason: ``"replica_down"``: none can be reached; ``"lag"``: none is current enough.
    :param limit: how many units of work already read from the primary for want of a replica;
        ``None`` if none may.
    """

    code = ""  # SQLAlchemy would lead to a page about errors of the server

    def __init__(self, bind_key: str | None, reason: str, limit: int | None = None) -> None:
        self.bind_key = bind_key
        self.reason = reason
        self.limit = limit
        what = "can be reached" if reason == "replica_down" else "is known to be current enough"
        why = "COMMONDB_FALLBACK, or the scope, does not let it read from the primary."
        if limit is not None:
            why = (
                f"The {limit} that COMMONDB_FALLBACK_LIMIT allows in a process read from the"
                " primary already."
            )
        text = f"No replica of bind {bind_key!r} {what}. {why} See db.server_status()."
        sa_exc.OperationalError.__init__(self, None, None, RuntimeError(text))
        self.args = (text,)


class ProcedureNotSupported(CommonDBError, NotImplementedError):
    """Stored procedures cannot be called on this bind's server or with its driver."""


def _rebuild(
    error_class: type[CommonDBError], args: tuple[t.Any, ...], state: dict[str, t.Any]
) -> CommonDBError:
    error = error_class.__new__(error_class, *args)
    error.__dict__.update(state)
    return error
