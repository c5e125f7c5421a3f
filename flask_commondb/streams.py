"""Results that are read while they arrive, on a connection of their own.

Owns: :class:`Stream`, and when its connection goes back: at the end of the result, when the stream
is closed or dropped, when the response that it feeds is closed, and when its context ends.

Must not: decide where the statement goes, or read on for a reader that has left.
"""

from __future__ import annotations

import contextlib
import os
import types
import typing as t
import weakref

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Response
from flask import after_this_request
from flask import has_request_context

from . import pools
from .closing import close_session
from .routing import RoutingSession

_T = t.TypeVar("_T", covariant=True)

_Item = t.TypeVar("_Item")


class Stream(t.Iterator[_T]):
    """Rows that are fetched from the server a chunk at a time, as the iteration goes on.

    What it holds is given back when the rows are used up, by :meth:`close`, at the end of a
    ``with`` block, and when it is dropped. In a request it may be handed to the response: it lives
    until the server closes that one. Without a response it ends with its context.
    """

    def __init__(self, result: t.Iterator[_T], give_back: t.Callable[[], None]) -> None:
        self._result = result
        self._give_back = give_back
        self._drop = weakref.finalize(self, give_back)
        self._drop.atexit = False

    def __next__(self) -> _T:
        try:
            return next(self._result)
        except BaseException:  # the end of the rows, too
            self.close()
            raise

    def scalars(self) -> Stream[t.Any]:
        """The first column alone: objects, when one model was selected."""
        return self._of(lambda result: result.scalars())

    def mappings(self) -> Stream[sa.RowMapping]:
        """Each row as a mapping of its columns' names."""
        return self._of(lambda result: result.mappings())

    def partitions(self, size: int | None = None) -> Stream[t.Sequence[t.Any]]:
        """Lists of rows.

        :param size: rows in each list; by default the stream's chunk.
        """
        return self._of(lambda result: result.partitions(size))

    def close(self) -> None:
        """Give the connection back. What was not read is not fetched. Never raises an Exception."""
        self._drop()

    def __enter__(self) -> Stream[_T]:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        self.close()

    def _of(self, view: t.Callable[[t.Any], t.Iterator[_Item]]) -> Stream[_Item]:
        """Another view of the same rows, which takes over what this one holds."""
        stream = Stream(view(self._result), self._give_back)
        self._drop.detach()
        return stream


class Held:
    """What a stream holds, apart from it: this is closed when the stream is collected.

    :param session: the stream's own.
    :param open_ones: what its context has open; it is there until it is closed.
    """

    def __init__(self, session: RoutingSession, open_ones: set[Held]) -> None:
        self._session = session
        self._open_ones = open_ones
        self._pid = os.getpid()
        #: Whether a response has taken it over, which may outlive the context.
        self.has_response = False
        open_ones.add(self)

    def close(self) -> None:
        """Give everything back, once. Raises no Exception."""
        if self not in self._open_ones or self._pid != os.getpid():  # a fork's parent reads on
            return
        self._open_ones.discard(self)
        with contextlib.ExitStack() as stack:
            stack.callback(close_session, self._session)
            for connection in self._session.all_connections():
                stack.callback(pools.stop_reading, connection)


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
    """
    if session.router.reader.facts(statement).not_read == "write":
        raise TypeError(
            "db.stream() reads: what the statement writes would be rolled back when the stream"
            " ends. Execute it in a session."
        )
    if pools.is_shared(session.primary_of(statement)):  # its rollback would be the unit's
        return Stream(unit().execute(statement, params).freeze()(), _nothing)
    session.is_stream = True
    held = Held(session, open_ones)
    try:
        result = session.execute(statement, params, execution_options={"yield_per": chunk})
        for connection in session.all_connections():
            session.router.watch.let_go(connection)
    except BaseException:
        held.close()
        raise
    if has_request_context():

        @after_this_request
        def hand_over(response: Response) -> Response:
            held.has_response = True
            response.call_on_close(held.close)
            return response

    return Stream(result, held.close)


def _nothing() -> None:
    """There is nothing to give back."""
