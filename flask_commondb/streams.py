"""Results that are read while they arrive, on a connection of their own.

Owns: :class:`Stream`, and when its connection goes back: at the end of the result, when the stream
is closed or dropped, when the response that it feeds is closed, and when its context ends.

Must not: decide where the statement goes, or read on for a reader that has left.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
import typing as t
import weakref

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Response
from flask import after_this_request
from flask import has_request_context

from . import liveness
from . import pools
from .closing import close_session
from .routing import RoutingSession

_T = t.TypeVar("_T", covariant=True)

_Item = t.TypeVar("_Item")


class Stream(t.Iterator[_T]):
    """Rows that are fetched from the server a chunk at a time, as the iteration goes on.

    What it holds is given back when the rows are used up, by :meth:`close`, at the end of a
    ``with`` block, and when it is dropped. In a request it may be handed to the response: it lives
    until the server closes that one. Without a response it ends with its context. To read on after
    that is a :exc:`sqlalchemy.exc.ResourceClosedError`.

    Objects that it yields belong to the stream alone, and are detached when it is closed.
    """

    def __init__(
        self, rows: t.Iterator[_T], held: Held, source: Stream[t.Any] | None = None
    ) -> None:
        self._rows = rows
        self._held = held
        self._source = source  # is dropped with the last view of it
        if source is None:
            weakref.finalize(self, held.close)

    def __next__(self) -> _T:
        if self._held.is_closed:
            self._held.refuse()
        try:
            return next(self._rows)
        except BaseException as error:  # the end of the rows, too
            self._held.end(error)
            raise

    def scalars(self) -> Stream[t.Any]:
        """The first column alone: objects, when one model was selected."""
        return self._view(lambda rows: rows.scalars())

    def mappings(self) -> Stream[sa.RowMapping]:
        """Each row as a mapping of its columns' names."""
        return self._view(lambda rows: rows.mappings())

    def partitions(self, size: int | None = None) -> Stream[t.Sequence[t.Any]]:
        """Lists of rows.

        :param size: rows in each list; by default the stream's chunk.
        """
        return self._view(lambda rows: rows.partitions(size))

    def close(self) -> None:
        """Give the connection back. What was not read is not fetched. Never raises an Exception.

        Closes every view of the same rows.
        """
        self._held.close()

    def __enter__(self) -> Stream[_T]:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()

    def _view(self, view: t.Callable[[t.Any], t.Iterator[_Item]]) -> Stream[_Item]:
        return Stream(view(self._rows), self._held, self)


def open_stream(
    session: RoutingSession,
    unit: t.Callable[[], sa_orm.Session],
    open_ones: set[Held],
    statement: t.Any,
    params: t.Any,
    chunk: int,
) -> Stream[t.Any]:
    """Execute a statement in a session of its own and read its result as it arrives.

    :param session: a new one, which is the stream's from now on.
    :param unit: the context's own session, for a database that has one connection for all.
    :param open_ones: where the context finds what is still open when it ends.
    :param chunk: rows that are fetched at once.
    :raises TypeError: if the statement writes: the stream's transaction is never committed.
    :raises ValueError: if a chunk would have no rows.
    """
    if chunk < 1:  # SQLAlchemy would take 0 for "all"
        raise ValueError(f"db.stream(): a chunk has at least one row, not {chunk!r}.")
    if session.router.reader.facts(statement).not_read == "write":
        raise TypeError(_WRITES)
    held = Held(session, open_ones)
    try:
        if liveness.is_shared(session.primary_of(statement).pool):
            # The end of a transaction of its own would be the end of the unit's.
            rows = _read_at_once(unit(), statement, params)
        else:
            rows = _execute(session, statement, params, chunk)
        held.rows = rows
        if not _has_rows(rows):  # text
            raise TypeError(_WRITES)
        rows.yield_per(chunk)  # SQLAlchemy does not heed the option for text
    except BaseException:
        held.close()
        raise
    if has_request_context():
        after_this_request(held.hand_over)
    return Stream(rows, held)


class Held:
    """What a stream holds, apart from it: this is closed when the stream is collected.

    :param session: the stream's own.
    :param open_ones: what its context has open; it is there until it is closed.
    """

    #: Kept: drivers read the rest of a result when its cursor is collected before it is closed.
    rows: sa.Result[t.Any] | None = None
    is_closed = False
    #: To the end.
    is_read = False

    def __init__(self, session: RoutingSession, open_ones: set[Held]) -> None:
        self._session: RoutingSession | None = session
        self._open_ones = open_ones
        self._pid = os.getpid()
        self._is_handed_over = False
        self._was_in_error = False
        open_ones.add(self)

    @property
    def has_response(self) -> bool:
        """Whether a response has taken it over, which may outlive the context.

        It has not when that is an error's page, or lost because something raises after it was made.
        """
        return self._is_handed_over and self._was_in_error == _is_in_error()

    def hand_over(self, response: Response) -> Response:
        """Live as long as a response. Called with it when the request has been handled."""
        self._is_handed_over = True
        self._was_in_error = _is_in_error()
        response.call_on_close(self.close)
        return response

    def close(self) -> None:
        """Give everything back, once. Raises no Exception."""
        if self._pid != os.getpid():  # a fork's parent reads on
            return
        try:
            self._open_ones.remove(self)
        except KeyError:  # also when two threads do it at once
            return
        self.is_closed = True
        session, rows, self._session, self.rows = self._session, self.rows, None, None
        with contextlib.ExitStack() as stack:  # in reverse order
            if session is not None:
                stack.callback(close_session, session)
                if rows is not None:
                    stack.callback(rows.close)
                for connection in session.all_connections():
                    stack.callback(_stop, connection)

    def end(self, error: BaseException) -> None:
        """Close, because reading a row has raised this."""
        if self._pid != os.getpid():  # whatever it is, it is not the end of the rows
            self.refuse()
        self.is_read = isinstance(error, StopIteration)
        self.close()

    def refuse(self) -> t.NoReturn:
        """Say that there is nothing more to read, or that there is and cannot be read."""
        if self.is_read:
            raise StopIteration
        raise sa.exc.ResourceClosedError(
            "This stream was closed before all of its rows were read: by close(), by an error,"
            " because its context has ended, or because it is a parent process's. Only what a"
            " response is made of may be read after its context, until the response is closed."
        )


_WRITES = (
    "db.stream() reads: what the statement writes would be rolled back when the stream ends."
    " Execute it in a session."
)


def _is_in_error() -> bool:
    """Whether an error is being handled, by Flask or by the code that has called the app."""
    return sys.exc_info()[1] is not None


def _read_at_once(unit: sa_orm.Session, statement: t.Any, params: t.Any) -> sa.Result[t.Any]:
    with unit.no_autoflush:
        rows = unit.execute(statement, params)
    return rows.freeze()() if _has_rows(rows) else rows


def _has_rows(rows: sa.Result[t.Any]) -> bool:
    return getattr(rows, "returns_rows", True)  # an ORM query always does


def _execute(
    session: RoutingSession, statement: t.Any, params: t.Any, chunk: int
) -> sa.Result[t.Any]:
    session.replica_reads.is_stream = True
    session.autoflush = False
    rows = session.execute(statement, params, execution_options={"yield_per": chunk})
    sa.event.listen(session, "do_orm_execute", _refuse_while_reading)
    return rows


def _refuse_while_reading(state: sa_orm.ORMExecuteState) -> None:
    """PyMySQL would throw the rest of the rows away, and the stream would end as if read."""
    if any(map(pools.is_reading, t.cast(RoutingSession, state.session).all_connections())):
        raise sa.exc.InvalidRequestError(
            "An object of a stream was to load more, but the server sends the stream's rows on"
            " their connection, and takes no other statement there until all are read. Load what"
            " is wanted with the rows, by joinedload() say, or in db.session."
        )


def _stop(connection: sa.Connection) -> None:
    """Throw away a connection that has rows on their way, or that the server has left."""
    pools.stop_reading(connection)
    if not pools.is_usable(connection):
        pools.discard(connection)
