"""The sessions of a context: made at first use, found again by all code, always closed.

Owns: what Flask's ``g`` holds for one application context, the proxies ``db.session`` and
``db.sessions[key]``, and that all of it is closed: :func:`close_all`, and the net under it.

Must not: decide where a statement goes, or key anything by ``id()``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import typing as t
import weakref

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import has_app_context
from flask import has_request_context
from flask import request
from flask.globals import app_ctx

from .closing import close_session
from .errors import NoContextError
from .errors import UnknownBindError
from .holders import ON_G
from .holders import LeakWatch
from .holders import Taken
from .procedures import ProcedureResult
from .router import Router
from .router import Unit
from .routing import ALL_BINDS
from .routing import AllBinds
from .routing import RoutingSession
from .streams import Held
from .transactions import is_in_block

if t.TYPE_CHECKING:
    from .extension import CommonDB

_logger = logging.getLogger("flask_commondb")

_Key = str | AllBinds | None


@dataclasses.dataclass(eq=False)
class ContextSessions:
    """All that one ``db`` keeps for one application context."""

    endpoint: str | None
    router: Router
    sessions: dict[_Key, sa_orm.Session] = dataclasses.field(default_factory=dict)
    units: dict[str | None, Unit] = dataclasses.field(default_factory=dict)
    streams: set[Held] = dataclasses.field(default_factory=set)
    #: The process that made it: a forked child starts with sessions of its own.
    pid: int = dataclasses.field(default_factory=os.getpid)


class ContextRegistry:
    """Finds the session of the current context for one key; takes the place of SQLAlchemy's.

    :param db: whose sessions.
    :param factory: makes a session.
    :param key: a bind key, or :data:`.ALL_BINDS`.
    """

    def __init__(
        self, db: CommonDB, factory: sa_orm.sessionmaker[t.Any], key: _Key = ALL_BINDS
    ) -> None:
        self._db = db
        self._factory = factory
        self._key = key

    def __call__(self) -> t.Any:
        context = current_context(self._db)
        session = context.sessions.get(self._key)
        if session is None:
            session = self._factory()
            self._join(session, context)
        return session

    def has(self) -> bool:
        """Whether the current context has made the session."""
        return self._key in current_context(self._db).sessions

    def set(self, session: sa_orm.Session) -> None:
        """Make a session the current context's."""
        self._join(session, current_context(self._db))

    def clear(self) -> None:
        """Forget the current context's session, without closing it."""
        current_context(self._db).sessions.pop(self._key, None)

    def _join(self, session: sa_orm.Session, context: ContextSessions) -> None:
        if isinstance(session, RoutingSession):
            session.join_context(self._key, context.router, context.units)
        elif self._key is not ALL_BINDS:
            session.bind = self._db.engines[self._key]
        context.sessions[self._key] = session


class SessionProxy(sa_orm.scoped_session[t.Any]):
    """Stands for the current context's session; has all of a session's methods.

    :param factory: makes a session.
    :param registry: finds the session of the current context.
    """

    def __init__(
        self,
        factory: sa_orm.sessionmaker[t.Any],
        registry: ContextRegistry | None = None,
        scopefunc: t.Callable[[], t.Any] | None = None,
    ) -> None:
        super().__init__(factory, scopefunc)
        if registry is not None:
            self.registry = registry  # type: ignore[assignment]

    def remove(self) -> None:
        """Forget the current session and close it, as the end of its context does.

        :raises sqlalchemy.exc.InvalidRequestError: inside :meth:`.CommonDB.transaction`, whose
            session it is.
        """
        if self.registry.has():
            session = self.registry()
            if is_in_block(session):
                raise sa.exc.InvalidRequestError(
                    "remove() inside db.transaction(): what follows would be lost, as the block"
                    " commits the session that it began with. Call it after the block."
                )
            self.registry.clear()
            close_session(session)

    def callproc(self, name: str, *args: t.Any, **kwargs: t.Any) -> ProcedureResult:
        """See :meth:`.CommonDB.callproc`."""
        return t.cast(RoutingSession, self()).callproc(name, *args, **kwargs)

    def cursor(self, *args: t.Any, **kwargs: t.Any) -> contextlib.AbstractContextManager[t.Any]:
        """See :meth:`.CommonDB.cursor`."""
        return t.cast(RoutingSession, self()).cursor(*args, **kwargs)


class Sessions(t.Mapping["str | None", SessionProxy]):
    """``db.sessions``: for each bind key a proxy for that bind's session.

    A proxy may be kept: it always stands for the session of the context it is used in.
    """

    def __init__(self, db: CommonDB, factory: sa_orm.sessionmaker[t.Any]) -> None:
        self._db = db
        self._factory = factory
        self._proxies: dict[str | None, SessionProxy] = {}

    def __getitem__(self, bind_key: str | None) -> SessionProxy:
        if has_app_context() and bind_key not in self._db.engines:
            raise UnknownBindError(bind_key, self._db.engines)
        proxy = self._proxies.get(bind_key)
        if proxy is None:
            registry = ContextRegistry(self._db, self._factory, bind_key)
            proxy = self._proxies.setdefault(bind_key, SessionProxy(self._factory, registry))
        return proxy

    def __iter__(self) -> t.Iterator[str | None]:
        return iter(self._db.engines)

    def __len__(self) -> int:
        return len(self._db.engines)


class OpenContexts:
    """The contexts of one ``db`` that have sessions: the net under a teardown that does not come.

    A teardown may be interrupted, and a context may be dropped without having been popped. The
    first is finished when the same thread begins its next context, the second is closed at the
    moment in which Python frees the context.
    """

    def __init__(self) -> None:
        self._open: dict[ContextSessions, weakref.ref[t.Any]] = {}
        self._interrupted: list[ContextSessions] = []

    def __len__(self) -> int:
        return len(self._open)

    def add(self, context: ContextSessions, owner: t.Any) -> None:
        """Watch over a context.

        :param owner: its ``g``, which goes when the context does.
        """
        while self._interrupted:
            self.close(self._interrupted.pop())
        self._open[context] = weakref.ref(owner, functools.partial(self._lost, context))

    def close(self, context: ContextSessions, *, failed: bool = True) -> None:
        """End all that a context holds; once more, if an interrupt comes in between.

        :param failed: also what a response was to read from.
        """
        interrupt: BaseException | None = None  # it must not keep the others open
        for held in list(context.streams):
            if failed or not held.has_response:
                try:
                    held.close()
                except BaseException as error:
                    interrupt = error
        for session in list(context.sessions.values()):
            try:
                close_session(session, context.endpoint)
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            self._interrupted.append(context)
            raise interrupt
        self._open.pop(context, None)

    def forget(self, context: ContextSessions) -> None:
        """Leave a context alone: it is the parent process's."""
        self._open.pop(context, None)
        _inherited.append(context)

    def _lost(self, context: ContextSessions, owner: weakref.ref[t.Any]) -> None:
        if context in self._open:
            if context.pid == os.getpid():
                self.close(context)
            else:
                self.forget(context)


def close_all(db: CommonDB, error: BaseException | None = None) -> None:
    """End all that the current context holds of a database. Raises no ``Exception``.

    Forgets first, so that nothing that fails to close can be handed out again; then closes each
    connection and each session in a try of its own. A connection that cannot be closed is
    invalidated, logged and signalled with its bind key.

    :param error: with which the context ends: then there is no response that reads from a stream.
    """
    app_context = _current_app_context()
    found = None if app_context is None else app_context.g.get(ON_G)
    if not found:  # no context: a generator that has one is collected in another thread
        return
    context: ContextSessions | None = found.pop(db, None)
    if context is not None:
        if context.pid == os.getpid():
            db.open_contexts.close(context, failed=error is not None)
        else:  # to close the parent's connections would be to talk on its sockets
            db.open_contexts.forget(context)
    taken: Taken | None = found.pop(LeakWatch, None)
    if taken is not None:
        taken.take_back(app_context.app)


def close_scoped(proxy: SessionProxy) -> None:
    """End the session of a scope function that the user has given; as :func:`close_all`."""
    try:
        has_session = proxy.registry.has()
    except Exception:  # it is the user's, and may want a request
        _logger.exception("The session's scope function has raised at the end of a context.")
        return
    if has_session:
        session = proxy.registry()
        proxy.registry.clear()
        close_session(session)


def current_context(db: CommonDB) -> ContextSessions:
    """What a database keeps for the current context.

    :raises NoContextError: if there is none.
    """
    app_context = _current_app_context()
    if app_context is None:
        raise NoContextError(
            "Working outside of application context: a session belongs to one. In a request it is"
            " there; elsewhere wrap the code in 'with db.scope(app):' or 'with app.app_context():'."
        )
    contexts: dict[CommonDB, ContextSessions] = app_context.g.setdefault(ON_G, {})
    context = contexts.get(db)
    if context is not None and context.pid != os.getpid():
        db.open_contexts.forget(contexts.pop(db))
        context = None
    if context is None:
        endpoint = request.endpoint if has_request_context() else None
        context = ContextSessions(endpoint, db.router)
        db.open_contexts.add(context, app_context.g)
        contexts[db] = context
    return context


def _current_app_context() -> t.Any:
    """Flask's context itself: quicker than one proxy after the other."""
    try:
        return _app_context._get_current_object()
    except RuntimeError:
        return None


_app_context: t.Any = app_ctx

#: Kept: to collect a connection of an engine that is not ours would end the parent's transaction.
_inherited: list[ContextSessions] = []
