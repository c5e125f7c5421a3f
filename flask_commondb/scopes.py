"""What the caller says for a block: where reads go, and how long a statement may take.

Owns: :class:`Scope` of ``db.primary()`` and ``db.replica()``, :class:`TimeLimit` of
``db.timeout()``, and what those that are entered say of a bind.

Must not: know sessions, requests or servers.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
import inspect
import math
import types
import typing as t

from flask import has_app_context

from .dialects import Limits
from .errors import UnknownBindError

if t.TYPE_CHECKING:
    from .extension import CommonDB

_F = t.TypeVar("_F", bound=t.Callable[..., t.Any])


class Said(t.NamedTuple):
    """What the scopes that are entered say of the reads of one bind; ``None``: nothing.

    :param role: ``"primary"`` or ``"replica"``.
    :param max_lag: how many seconds a replica may be behind.
    :param fallback: where reads go when no replica serves.
    """

    role: str | None = None
    max_lag: float | None = None
    fallback: str | None = None


NOTHING_SAID = Said()


class Scope:
    """Says where reads go, inside a ``with`` block or a decorated function.

    Holds no state, so one object may be entered again, also in other threads: what is entered
    stands on a stack that each thread, greenlet and task has for itself. Leaving takes away what
    entering has put there, and nothing else.

    :param db: whose binds.
    :param said: what it says.
    :param bind_keys: the binds that it is about; none means all.
    """

    def __init__(
        self, db: CommonDB, said: Said = NOTHING_SAID, bind_keys: t.Collection[str | None] = ()
    ) -> None:
        self._db = db
        self.said = said
        self.bind_keys = frozenset(bind_keys)

    @property
    def role(self) -> str | None:
        """Where reads go inside: ``"primary"`` or ``"replica"``."""
        return self.said.role

    def __enter__(self) -> None:
        if self.bind_keys and has_app_context():
            for bind_key in self.bind_keys - self._db.engines.keys():
                raise UnknownBindError(bind_key, self._db.engines)
        stack = self._stack
        stack.set((*stack.get(), self))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        # The innermost of its kind: a generator may be left after scopes entered later.
        stack = self._stack
        entered = list(reversed(stack.get()))
        with contextlib.suppress(ValueError):  # left in a context that it was never entered in
            entered.remove(self)
        stack.set(tuple(reversed(entered)))

    def __call__(self, function: _F) -> _F:
        wrapper: t.Callable[..., t.Any]
        if inspect.iscoroutinefunction(function):

            async def wrapper(*args: t.Any, **kwargs: t.Any) -> t.Any:
                with self:
                    return await function(*args, **kwargs)

        elif inspect.isgeneratorfunction(function):

            def wrapper(*args: t.Any, **kwargs: t.Any) -> t.Any:
                return self._generate(function(*args, **kwargs))

        elif inspect.isasyncgenfunction(function):

            def wrapper(*args: t.Any, **kwargs: t.Any) -> t.Any:
                return self._generate_async(function(*args, **kwargs))

        else:

            def wrapper(*args: t.Any, **kwargs: t.Any) -> t.Any:
                with self:
                    return function(*args, **kwargs)

        return t.cast(_F, functools.wraps(function)(wrapper))

    @property
    def _stack(self) -> contextvars.ContextVar[tuple[t.Any, ...]]:
        return self._db.scopes

    def _generate(
        self, generator: t.Generator[t.Any, t.Any, t.Any]
    ) -> t.Generator[t.Any, t.Any, t.Any]:
        """Run a generator in the scope, and what it yields to outside of it."""
        inside: list[Scope] = []
        resume: t.Callable[[], t.Any] = functools.partial(next, generator)
        while True:
            with self._turn(inside):
                try:
                    item = resume()
                except StopIteration as stop:
                    return stop.value
            try:
                resume = functools.partial(generator.send, (yield item))
            except GeneratorExit:
                with self._turn(inside):
                    generator.close()
                raise
            except BaseException as error:
                resume = functools.partial(generator.throw, error)

    async def _generate_async(
        self, generator: t.AsyncGenerator[t.Any, t.Any]
    ) -> t.AsyncGenerator[t.Any, t.Any]:
        """:meth:`_generate` for an asynchronous generator."""
        inside: list[Scope] = []
        resume: t.Callable[[], t.Any] = functools.partial(generator.asend, None)
        while True:
            with self._turn(inside):
                try:
                    item = await resume()
                except StopAsyncIteration:
                    return
            try:
                resume = functools.partial(generator.asend, (yield item))
            except GeneratorExit:
                with self._turn(inside):
                    await generator.aclose()
                raise
            except BaseException as error:
                resume = functools.partial(generator.athrow, error)

    @contextlib.contextmanager
    def _turn(self, inside: list[Scope]) -> t.Iterator[None]:
        """One turn of a generator: in the scope, and inside it in those it is in the middle of.

        :param inside: those, as the last turn has left them; kept for the next one.
        """
        stack = self._stack
        mine = copy.copy(self)  # its body may enter this very object
        with mine:
            stack.set((*stack.get(), *inside))
            try:
                yield
            finally:
                entered = stack.get()
                end = entered.index(mine) + 1 if mine in entered else len(entered)
                inside[:] = entered[end:]
                stack.set(entered[:end])


class TimeLimit(Scope):
    """How long the server may work on a statement: a scope that nests and decorates like others.

    :param limits: what counts inside, but for what a scope further inside says.
    """

    def __init__(self, db: CommonDB, limits: Limits, bind_keys: t.Collection[str | None]) -> None:
        super().__init__(db, bind_keys=bind_keys)
        self.limits = limits

    @property
    def _stack(self) -> contextvars.ContextVar[tuple[t.Any, ...]]:
        return self._db.time_limits


#: Where reads may go when no replica serves.
FALLBACKS = ("primary", "stale", "error")


def checked_said(max_lag: float | None, fallback: str | None) -> Said:
    """What ``db.replica()`` says.

    :raises ValueError: if a lag is no number of seconds above 0, or there is no such fallback.
    """
    if max_lag is not None and not is_lag(max_lag):
        raise ValueError(f"max_lag is a number of seconds above 0, not {max_lag!r}.")
    if fallback is not None and fallback not in FALLBACKS:
        known = ", ".join(map(repr, FALLBACKS))
        raise ValueError(f"There is no fallback {fallback!r}; known are {known}.")
    return Said("replica", max_lag, fallback)


def is_lag(value: t.Any) -> bool:
    """Whether a value says how far a replica may be behind; ``math.inf`` says: as far as it is."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and value > 0


def checked_limits(statement: float | None, lock: float | None) -> Limits:
    """The limits that the caller has named.

    :raises ValueError: if one of them is not a number of seconds, or there is none.
    """
    if statement is None and lock is None:
        raise ValueError("A time limit needs seconds: for a statement, for a lock, or for both.")
    if statement is not None and not _is_seconds(statement):
        raise ValueError(
            f"A statement's limit is a number of seconds, or 0 for none: {statement!r}"
        )
    if lock is not None and (not _is_seconds(lock) or lock == 0):
        raise ValueError(f"A lock's limit is a number of seconds above 0: {lock!r}")
    return Limits(statement, lock)


def _is_seconds(value: t.Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value < math.inf


def time_limits(db: CommonDB, bind_key: str | None) -> Limits | None:
    """What the scopes that are entered allow to a statement; ``None`` if none is about the bind."""
    entered = db.time_limits.get()
    found = _about(entered, bind_key, "limits") if entered else None
    return Limits(*_innermost(found)) if found else None


def said_of_reads(db: CommonDB, bind_key: str | None) -> Said:
    """What the scopes say of the reads of a bind: for each thing the innermost one that says it."""
    entered = db.scopes.get()
    found = _about(entered, bind_key, "said") if entered else None
    return Said(*_innermost(found)) if found else NOTHING_SAID


def _about(entered: t.Iterable[Scope], bind_key: str | None, name: str) -> list[tuple[t.Any, ...]]:
    """What the scopes about a bind say, the outermost first."""
    return [
        getattr(scope, name)
        for scope in entered
        if not scope.bind_keys or bind_key in scope.bind_keys
    ]


def _innermost(found: list[tuple[t.Any, ...]]) -> t.Iterable[t.Any]:
    """For each thing what was said of it last."""
    if len(found) == 1:
        return found[0]
    return (
        next((value for value in reversed(values) if value is not None), None)
        for values in zip(*found, strict=True)
    )
