"""The errors of Flask-CommonDB.

Owns: every exception class of the package. Each subclasses what callers of Flask-SQLAlchemy
and SQLAlchemy already catch, so that an existing ``except`` clause keeps working.

Must not: import anything of the package, or put a password or an SQL parameter into a text.
"""

from __future__ import annotations

import typing as t

import sqlalchemy.exc as sa_exc


class CommonDBError(Exception):
    """The base of every error that Flask-CommonDB itself raises."""


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
    """A bind key that the current app does not configure; the text names the known ones."""


class CrossBindError(CommonDBError, sa_exc.UnboundExecutionError):
    """One statement names tables of several binds, and no single server holds them all."""


class WrongBindError(CommonDBError, sa_exc.UnboundExecutionError):
    """``db.sessions[key]`` was given a statement or an object that another bind owns."""


class PartialCommitError(CommonDBError, sa_exc.InvalidRequestError):
    """A commit over several binds failed after some of them had been committed.

    Raised by :meth:`.CommonDB.transaction` with several keys; the cause is the database's error.

    :param committed: bind keys whose changes are durable.
    :param failed: the bind key whose commit raised.
    :param pending: bind keys that were rolled back, because their turn had not come.
    """

    def __init__(
        self,
        committed: t.Sequence[str | None],
        failed: str | None,
        pending: t.Sequence[str | None],
    ) -> None:
        self.committed = tuple(committed)
        self.failed = failed
        self.pending = tuple(pending)
        super().__init__(
            f"The commit of bind {failed!r} failed. Already durable: {list(committed)!r};"
            f" rolled back: {list(pending)!r}. What is durable must be undone by the application."
        )


class ProcedureNotSupported(CommonDBError, NotImplementedError):
    """Stored procedures cannot be called on this bind's server or with its driver."""
