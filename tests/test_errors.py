"""The errors: what they are caught as, what they say, and that they can cross a process border."""

from __future__ import annotations

import inspect
import pickle
import re
import typing as t

import pytest
import sqlalchemy.exc as sa_exc

from flask_commondb import errors
from flask_commondb.errors import CommonDBError
from flask_commondb.errors import ConfigError
from flask_commondb.errors import CrossBindError
from flask_commondb.errors import NoContextError
from flask_commondb.errors import NoReplicaError
from flask_commondb.errors import OpenTransactionError
from flask_commondb.errors import PartialCommitError
from flask_commondb.errors import PoolExhausted
from flask_commondb.errors import ProcedureNotSupported
from flask_commondb.errors import StatementTimeout
from flask_commondb.errors import TwoPhaseNotSupported
from flask_commondb.errors import UnknownBindError
from flask_commondb.errors import UnknownReplicaError
from flask_commondb.errors import WrongBindError

#: One of each, with what an existing ``except`` clause catches it as.
ERRORS: list[tuple[CommonDBError, tuple[type[Exception], ...]]] = [
    (CommonDBError("something"), (Exception,)),
    (ConfigError(["one"]), (sa_exc.ArgumentError, RuntimeError)),
    (ConfigError(["one", "two"]), (sa_exc.ArgumentError, RuntimeError)),
    (NoContextError("no context"), (RuntimeError,)),
    (UnknownBindError("order", [None, "orders"]), (sa_exc.UnboundExecutionError, KeyError)),
    (CrossBindError({None: "a", "orders": "b"}), (sa_exc.UnboundExecutionError,)),
    (WrongBindError("orders", None, "a"), (sa_exc.UnboundExecutionError,)),
    (PartialCommitError(["a"], "b", ["c"]), (sa_exc.InvalidRequestError,)),
    (PartialCommitError(["a"], "b", [], ["b"]), (sa_exc.InvalidRequestError,)),
    (OpenTransactionError("work()", "a", "has changes"), (sa_exc.InvalidRequestError,)),
    (TwoPhaseNotSupported("no two phases"), (NotImplementedError,)),
    (PoolExhausted("a", "db:3306", 15), (sa_exc.TimeoutError,)),
    (PoolExhausted(None, "db:3306", 2, ["endpoint 'leaky'"]), (sa_exc.TimeoutError,)),
    (
        StatementTimeout(sa_exc.OperationalError("SELECT 1", {}, Exception("too slow")), "a", 2),
        (sa_exc.OperationalError,),
    ),
    (NoReplicaError("a", "lag"), (sa_exc.OperationalError,)),
    (NoReplicaError(None, "replica_down", 3), (sa_exc.DBAPIError,)),
    (UnknownReplicaError("a", "db4:3306", ["db2:3306"]), (KeyError,)),
    (ProcedureNotSupported("no procedures"), (NotImplementedError,)),
]

each_error = pytest.mark.parametrize("error", [error for error, _ in ERRORS], ids=repr)


def test_table_is_complete() -> None:
    """Every error class of the package is in the table above."""
    defined = {
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }
    assert defined == {type(error) for error, _ in ERRORS}


@pytest.mark.parametrize(
    ("error", "base"),
    [(error, base) for error, bases in ERRORS for base in (CommonDBError, *bases)],
)
def test_bases(error: CommonDBError, base: type[Exception]) -> None:
    """Each error is a ``CommonDBError`` and what Flask-SQLAlchemy or SQLAlchemy raises there."""
    with pytest.raises(base, match=re.escape(str(error))):
        raise error


@pytest.mark.parametrize("error_class", [CommonDBError, NoContextError, ProcedureNotSupported])
def test_text_is_what_was_given(error_class: type[CommonDBError]) -> None:
    """The text is shown as it is, with nothing around it or behind it."""
    text = 'It\'s the "text",\nof two lines.'
    assert str(error_class(text)) == text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            UnknownBindError("order", [None, "orders", "legacy"]),
            "Bind key 'order' is not in 'SQLALCHEMY_BINDS' config. Did you mean 'orders'?"
            " The current app has: None, 'orders', 'legacy'.",
        ),
        (
            UnknownBindError("x", {None: 1}),
            "Bind key 'x' is not in 'SQLALCHEMY_BINDS' config. The current app has: None.",
        ),
        (
            UnknownBindError(None, ["orders"]),
            "Bind key None is not in 'SQLALCHEMY_BINDS' config. The current app has: 'orders'.",
        ),
        (
            CrossBindError({"orders": "item", None: "post", "legacy": "s.user"}),
            "One statement names tables of several binds: 'item' (bind 'orders'), 'post' (bind"
            " None), 's.user' (bind 'legacy'). No server holds them all; use one statement for"
            " each bind, or, if one server does hold them, pass"
            " bind_arguments={'bind': db.engines[key]}.",
        ),
        (
            WrongBindError("orders", None, "post"),
            "This session is for bind 'orders', but table 'post' belongs to bind None. Use"
            " db.sessions[None], or db.session, which finds the bind itself.",
        ),
        (
            NoReplicaError(None, "replica_down", 3),
            "No replica of bind None can be reached. The 3 that COMMONDB_FALLBACK_LIMIT allows in a"
            " process read from the primary already. See db.server_status().",
        ),
        (
            NoReplicaError("orders", "lag"),
            "No replica of bind 'orders' is known to be current enough. COMMONDB_FALLBACK, or the"
            " scope, does not let it read from the primary. See db.server_status().",
        ),
        (
            UnknownReplicaError("orders", "db4:3306", ["db2:3306", "db3:3306"]),
            "Bind 'orders' has no replica 'db4:3306'; it has 'db2:3306', 'db3:3306'.",
        ),
        (UnknownReplicaError(None, "x", []), "Bind None has no replica 'x'; it has none."),
    ],
)
def test_texts(error: CommonDBError, text: str) -> None:
    """The text says what is wrong and what to do; no quotes around it (as a ``KeyError`` would
    put), no link behind it."""
    assert str(error) == text


def test_bind_keys_that_are_no_text() -> None:
    """Bind keys are compared by what they look like, so that a number can be one, too."""
    error = UnknownBindError(2025, t.cast("list[str | None]", [None, 2024]))
    assert str(error) == (
        "Bind key 2025 is not in 'SQLALCHEMY_BINDS' config. Did you mean '2024'?"
        " The current app has: None, 2024."
    )


@pytest.mark.parametrize(
    ("mistakes", "text"),
    [
        (["Only one."], "Only one."),
        (["One.", "Two."], "The database configuration has several mistakes:\n  - One.\n  - Two."),
    ],
)
def test_config_error(mistakes: list[str], text: str) -> None:
    """``ConfigError`` lists every mistake; a single one is the whole text."""
    error = ConfigError(mistakes)
    assert str(error) == text
    assert error.mistakes == tuple(mistakes)


def test_config_error_keeps_its_own_list() -> None:
    """The mistakes of an error do not change with the list that it was made of."""
    mistakes = ["One."]
    error = ConfigError(mistakes)
    mistakes.append("Two.")
    assert error.mistakes == ("One.",)


def test_partial_commit_error() -> None:
    """``PartialCommitError`` says which binds are durable, which one failed, which are undone."""
    error = PartialCommitError([None, "a"], "b", ["c"])
    assert (error.committed, error.failed, error.pending) == ((None, "a"), "b", ("c",))
    assert str(error) == (
        "The commit of bind 'b' failed. Already durable: [None, 'a']; rolled back: ['c']."
        " What is durable must be undone by the application."
    )


@each_error
def test_pickle(error: CommonDBError) -> None:
    """An error reaches the other side of a process pool or a job queue as it is."""
    copy = pickle.loads(pickle.dumps(error))
    assert described(copy) == described(error)


def described(error: CommonDBError) -> tuple[type, str, dict[str, t.Any]]:
    # The driver's own error, if there is one, has no equal.
    attributes = {
        name: repr(value) if isinstance(value, Exception) else value
        for name, value in vars(error).items()
    }
    return type(error), str(error), attributes
