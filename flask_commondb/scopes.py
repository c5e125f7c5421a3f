"""What the caller says for a block: where reads go, and how long a statement may take.

Owns: :class:`Scope` of ``db.primary()`` and ``db.replica()``, :class:`TimeLimit` of
``db.timeout()``, and which of those that are entered counts for a bind.

Must not: know sessions, requests or servers.
"""

from __future__ import annotations

import contextlib
import contextvars
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


class Scope:
    """Says where reads go, inside a ``with`` block or a decorated function.

    Holds no state, so one object may be entered again, also in other threads: what is entered
    stands on a stack that each thread, greenlet and task has for itself. Leaving takes away what
    entering has put there, and nothing else.

    :param db: whose binds.
    :param role: ``"primary"`` or ``"replica"``.
    :param bind_keys: the binds that it is about; none means all.
    """

    def __init__(self, db: CommonDB, role: str, bind_keys: t.Collection[str | None] = ()) -> None:
        self._db = db
        self.role = role
        self.bind_keys = frozenset(bind_keys)

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
        resume: t.Callable[[], t.Any] = functools.partial(next, generator)
        while True:
            with self:
                try:
                    item = resume()
                except StopIteration as stop:
                    return stop.value
            try:
                resume = functools.partial(generator.send, (yield item))
            except GeneratorExit:
                with self:
                    generator.close()
                raise
            except BaseException as error:
                resume = functools.partial(generator.throw, error)

    async def _generate_async(
        self, generator: t.AsyncGenerator[t.Any, t.Any]
    ) -> t.AsyncGenerator[t.Any, t.Any]:
        """:meth:`_generate` for an asynchronous generator."""
        resume: t.Callable[[], t.Any] = functools.partial(generator.asend, None)
        while True:
            with self:
                try:
                    item = await resume()
                except StopAsyncIteration:
                    return
            try:
                resume = functools.partial(generator.asend, (yield item))
            except GeneratorExit:
                with self:
                    await generator.aclose()
                raise
            except BaseException as error:
                resume = functools.partial(generator.athrow, error)


class TimeLimit(Scope):
    """How long the server may work on a statement: a scope that nests and decorates like others.

    :param limits: what counts inside, but for what a scope further inside says.
    """

    def __init__(self, db: CommonDB, limits: Limits, bind_keys: t.Collection[str | None]) -> None:
        super().__init__(db, "timeout", bind_keys)
        self.limits = limits

    @property
    def _stack(self) -> contextvars.ContextVar[tuple[t.Any, ...]]:
        return self._db.time_limits


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
    if not entered:
        return None
    found = [
        scope.limits
        for scope in reversed(entered)
        if not scope.bind_keys or bind_key in scope.bind_keys
    ]
    if not found:
        return None
    return Limits(*(_first(values) for values in zip(*found, strict=True)))


def _first(values: t.Iterable[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)


def scope_role(db: CommonDB, bind_key: str | None) -> str | None:
    """The role that the innermost scope about a bind gives to reads, ``None`` outside of any."""
    for scope in reversed(db.scopes.get()):
        if not scope.bind_keys or bind_key in scope.bind_keys:
            return scope.role
    return None
