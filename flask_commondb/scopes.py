"""``db.primary()`` and ``db.replica()``: where the caller says that reads go.

Owns: :class:`Scope`, and which one counts for a bind.

Must not: know sessions, requests or servers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import typing as t

from flask import has_app_context

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
        self._db.scopes.set((*self._db.scopes.get(), self))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        # The innermost of its kind: a generator may be left after scopes entered later.
        entered = list(reversed(self._db.scopes.get()))
        with contextlib.suppress(ValueError):  # left in a context that it was never entered in
            entered.remove(self)
        self._db.scopes.set(tuple(reversed(entered)))

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


def scope_role(db: CommonDB, bind_key: str | None) -> str | None:
    """The role that the innermost scope about a bind gives to reads, ``None`` outside of any."""
    for scope in reversed(db.scopes.get()):
        if not scope.bind_keys or bind_key in scope.bind_keys:
            return scope.role
    return None
