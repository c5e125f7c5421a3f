"""Stored procedures that report every result set, every OUT value and the error that came last.

Owns: names, arguments and signatures of procedures, and :class:`ProcedureResult`.

Must not: open a connection or a transaction, or contain SQL: that is the dialects'.
"""

from __future__ import annotations

import contextlib
import re
import typing as t
import weakref

import sqlalchemy as sa
from sqlalchemy.engine.result import IteratorResult
from sqlalchemy.engine.result import SimpleResultMetaData

from . import signals
from .dialects import dialect_for
from .dialects.generic import Generic
from .dialects.generic import Outcome
from .dialects.generic import Parameter
from .dialects.generic import ResultSet


class ProcedureResult(IteratorResult[t.Any]):
    """What a stored procedure has returned. It is itself the first result set.

    As the first result set it is a SQLAlchemy :class:`~sqlalchemy.engine.Result`, with ``all()``,
    ``one()``, ``scalars()``, ``mappings()`` and the rest. After a procedure without any result set
    these raise :exc:`sqlalchemy.exc.ResourceClosedError`.
    """

    def __init__(self, outcome: Outcome) -> None:
        first = outcome.sets[0] if outcome.sets else ResultSet((), ())
        super().__init__(SimpleResultMetaData(first.keys), _rows(first))
        if not outcome.sets:
            self.close()
        #: Every result set in order, each a :class:`~sqlalchemy.engine.Result`; this one first.
        self.sets: tuple[sa.Result[t.Any], ...] = (
            (self, *map(_result, outcome.sets[1:])) if outcome.sets else ()
        )
        #: The OUT and INOUT values in Python types, by parameter name.
        self.out = outcome.out
        #: Rows affected by the last statement of the procedure that changes data.
        self.rowcount = outcome.rowcount
        #: The warnings that the server kept: level, code and text of each.
        self.warnings = tuple(outcome.warnings)


def call(connection: sa.Connection, name: str, args: t.Sequence[t.Any]) -> ProcedureResult:
    """Call a procedure on a connection, in the transaction that is open on it.

    :param name: ``procedure`` or ``schema.procedure``; a part that has a dot or a backquote in it
        stands in backquotes.
    :param args: for the IN and INOUT parameters, in order.
    :raises TypeError: if there are too few or too many; the procedure was not called.
    :raises ValueError: if the name is not one.
    :raises sqlalchemy.exc.DBAPIError: as the server says, also when it says so late.
    """
    dialect = dialect_for(connection.engine)
    schema, procedure = _split(name)
    signatures = _signatures.setdefault(connection.engine, {})
    key = (schema, procedure.lower())
    parameters = signatures.get(key)
    if parameters is None or _count(parameters) != len(args):  # or changed on the server since
        parameters = _signature(dialect, connection, schema, procedure, len(args))
        signatures[key] = parameters
    if _count(parameters) != len(args):
        signature = ", ".join(map(str, parameters))
        raise TypeError(
            f"{name} takes {_count(parameters)} IN and INOUT argument(s), but {len(args)} were"
            f" given. Its signature: {name}({signature})"
        )
    try:
        return ProcedureResult(dialect.call(connection, schema, procedure, parameters, args))
    except sa.exc.DBAPIError as error:
        if dialect.is_stale_signature(error):
            signatures.pop(key, None)
        raise


@contextlib.contextmanager
def announced(name: str, bind_key: str | None) -> t.Iterator[None]:
    """Send :data:`.signals.procedure_called` when the block is left, with its error if any."""
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        signals.send(signals.procedure_called, bind_key=bind_key, name=name, error=error)


#: Parameters of the procedures that an engine has called.
_signatures: weakref.WeakKeyDictionary[
    sa.Engine, dict[tuple[str | None, str], tuple[Parameter, ...]]
] = weakref.WeakKeyDictionary()

_PART = r"(?:`(?:[^`]|``)+`|[^.`]+)"
_NAME = re.compile(rf"(?:({_PART})\.)?({_PART})")


def _split(name: str) -> tuple[str | None, str]:
    match = _NAME.fullmatch(name)
    if match is None or "\0" in name:
        raise ValueError(
            f"{name!r} is not the name of a procedure. It must be 'procedure' or"
            " 'schema.procedure'; put a part that has a dot in it in backquotes."
        )
    schema, procedure = match.groups()
    return None if schema is None else _unquote(schema), _unquote(procedure)


def _unquote(part: str) -> str:
    return part[1:-1].replace("``", "`") if part.startswith("`") else part


def _signature(
    dialect: Generic, connection: sa.Connection, schema: str | None, name: str, count: int
) -> tuple[Parameter, ...]:
    parameters = dialect.parameters(connection, schema, name)
    if parameters is None:
        # Not there, or not visible: let the server say which.
        return tuple(Parameter(f"argument {index}", "IN", "") for index in range(count))
    return parameters


def _count(parameters: t.Sequence[Parameter]) -> int:
    """How many arguments the caller has to give."""
    return sum(parameter.mode != "OUT" for parameter in parameters)


def _result(result_set: ResultSet) -> sa.Result[t.Any]:
    return IteratorResult(SimpleResultMetaData(result_set.keys), _rows(result_set))


def _rows(result_set: ResultSet) -> t.Iterator[t.Any]:
    return iter([tuple(row) for row in result_set.rows])
