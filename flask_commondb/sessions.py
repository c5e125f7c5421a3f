"""The sessions of a context: made at first use, found again by all code, always closed.

Owns: what Flask's ``g`` holds for one application context, the proxies ``db.session`` and
``db.sessions[key]``, transactions, and :func:`close_all`.

Must not: decide where a statement goes, or key anything by ``id()``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import typing as t

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import g
from flask import has_app_context
from flask import has_request_context
from flask import request
from sqlalchemy.orm.session import SessionTransactionOrigin

from . import pools
from . import signals
from .errors import NoContextError
from .errors import PartialCommitError
from .errors import UnknownBindError
from .procedures import ProcedureResult
from .routing import ALL_BINDS
from .routing import AllBinds
from .routing import BindRole
from .routing import RoutingSession

if t.TYPE_CHECKING:
    from .extension import CommonDB

_logger = logging.getLogger("flask_commondb")

_Key = str | AllBinds | None


@dataclasses.dataclass
class ContextSessions:
    """All that one ``db`` keeps for one application context."""

    endpoint: str | None
    sessions: dict[_Key, sa_orm.Session] = dataclasses.field(default_factory=dict)
    roles: dict[str | None, BindRole] = dataclasses.field(default_factory=dict)
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
        sessions = _context_sessions(self._db).sessions
        session = sessions.get(self._key)
        if session is None:
            session = self._factory()
            self.set(session)
        return session

    def has(self) -> bool:
        """Whether the current context has made the session."""
        return self._key in _context_sessions(self._db).sessions

    def set(self, session: sa_orm.Session) -> None:
        """Make a session the current context's."""
        context = _context_sessions(self._db)
        if isinstance(session, RoutingSession):
            session.bind_key = self._key
            session.roles = context.roles
        elif self._key is not ALL_BINDS:
            session.bind = self._db.engines[self._key]
        context.sessions[self._key] = session

    def clear(self) -> None:
        """Forget the current context's session, without closing it."""
        _context_sessions(self._db).sessions.pop(self._key, None)


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
            if session.info.get(_BLOCK):
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


@contextlib.contextmanager
def transaction(sessions: t.Mapping[_Key, sa_orm.Session]) -> t.Iterator[None]:
    """Commit the sessions when the block ends, in order; roll all back when it raises.

    From its beginning on, its sessions read from the primary. Inside another block, or a
    ``session.begin()``, a session's part is a savepoint.

    :raises PartialCommitError: if a commit fails after another has succeeded.
    """
    blocks = {key: _Block(session) for key, session in sessions.items()}
    try:
        try:
            for block in blocks.values():
                block.begin()
            yield
            for block in blocks.values():
                block.session.flush()
        except BaseException as error:
            for block in blocks.values():
                block.rollback(error)
            raise
        _commit(blocks)
    finally:
        for block in blocks.values():
            block.end()


def close_all(db: CommonDB) -> None:
    """End all that the current context holds of a database. Raises no ``Exception``.

    Forgets first, so that nothing that fails to close can be handed out again; then closes each
    connection and each session in a try of its own. A connection that cannot be closed is
    invalidated, logged and signalled with its bind key.
    """
    contexts = g.get(_NAME)
    context = contexts.pop(db, None) if contexts else None
    if context is None:
        return
    if context.pid != os.getpid():
        # The parent's connections: to close them here would be to talk on its sockets.
        _inherited.append(context)
        return
    with contextlib.ExitStack() as stack:  # a timeout or an exit must not keep the others open
        for session in reversed(context.sessions.values()):
            stack.callback(close_session, session, context.endpoint)


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


def close_session(session: sa_orm.Session, endpoint: str | None = None) -> None:
    """Close one session and give back its connections, whatever state they are in."""
    with contextlib.ExitStack() as stack:  # all of it, in reverse order, whatever one part raises
        stack.callback(_close_objects, session, endpoint)
        if isinstance(session, RoutingSession):
            for connection in reversed(session.own_connections()):
                stack.callback(_close_connection, session, connection, endpoint)
            stack.callback(session.release_replica_connections)


#: The name under which everything stands on ``g``.
_NAME = "_commondb"

#: In ``session.info``: a transaction block has the session's transaction open.
_BLOCK = "flask_commondb.transaction"

#: In ``session.info``: a savepoint of the block could not be rolled back.
_BROKEN = "flask_commondb.broken"

#: Kept, because being collected would close them.
_inherited: list[ContextSessions] = []


def _context_sessions(db: CommonDB) -> ContextSessions:
    if not has_app_context():
        raise NoContextError(
            "Working outside of application context: a session belongs to one. In a request it is"
            " there; elsewhere wrap the code in 'with app.app_context():'."
        )
    contexts: dict[CommonDB, ContextSessions] = g.setdefault(_NAME, {})
    context = contexts.get(db)
    if context is not None and context.pid != os.getpid():
        _inherited.append(contexts.pop(db))
        context = None
    if context is None:
        endpoint = request.endpoint if has_request_context() else None
        context = contexts[db] = ContextSessions(endpoint)
    return context


def _close_connection(
    session: RoutingSession, connection: sa.Connection, endpoint: str | None
) -> None:
    error = pools.close(connection)
    if error is not None:
        _report(session, connection.engine, endpoint, error)


def _close_objects(session: sa_orm.Session, endpoint: str | None) -> None:
    try:
        session.close()
    except Exception as error:
        _report(session, None, endpoint, error)
        with contextlib.suppress(Exception):
            session.invalidate()


class _Block:
    """One session's part of a transaction block: its transaction, or a savepoint in it."""

    def __init__(self, session: sa_orm.Session) -> None:
        self.session = session
        self._savepoint: sa_orm.SessionTransaction | None = None
        #: Whether its commit is durable; that of a savepoint is not.
        self.is_outermost = False

    def begin(self) -> None:
        if isinstance(self.session, RoutingSession):
            self.session.pin_all("transaction")
        current = self.session.get_transaction()
        begun = current is not None and current.origin is SessionTransactionOrigin.BEGIN
        if begun or self.session.in_nested_transaction() or self.session.info.get(_BLOCK):
            self._savepoint = self.session.begin_nested()
            self._savepoint.__enter__()
        else:
            if current is None and not self.session.autobegin:
                self.session.begin()
            self.session.info[_BLOCK] = self.is_outermost = True

    def commit(self) -> None:
        if self._savepoint is None:
            if self.session.info.pop(_BROKEN, False):
                raise sa.exc.InvalidRequestError(
                    "The transaction had ended before a savepoint in it was rolled back: something"
                    " has committed or rolled back underneath. Nothing more is committed."
                )
            self.session.commit()
        else:
            savepoint, self._savepoint = self._savepoint, None
            savepoint.__exit__(None, None, None)

    def rollback(self, error: BaseException) -> None:
        try:  # the error that led here is the one to show
            if self.is_outermost:
                self.session.rollback()
            elif self._savepoint is not None:
                savepoint, self._savepoint = self._savepoint, None
                savepoint.__exit__(type(error), error, error.__traceback__)
        except Exception:
            if not self.is_outermost:
                self.session.info[_BROKEN] = True

    def end(self) -> None:
        if self.is_outermost:
            self.session.info.pop(_BLOCK, None)
            self.session.info.pop(_BROKEN, None)


def _commit(blocks: t.Mapping[_Key, _Block]) -> None:
    committed: list[t.Any] = []
    pending: list[t.Any] = list(blocks)
    for key, block in blocks.items():
        pending.remove(key)
        try:
            block.commit()
        except BaseException as error:
            for other in (key, *pending):
                blocks[other].rollback(error)
            if not committed or not isinstance(error, Exception):
                raise
            raise PartialCommitError(committed, t.cast(t.Any, key), pending) from error
        if block.is_outermost:
            committed.append(key)


def _report(
    session: sa_orm.Session, engine: sa.Engine | None, endpoint: str | None, error: Exception
) -> None:
    bind_key = _bind_key_of(session, engine)
    _logger.error(
        "A session of bind %r, used by endpoint %r, could not be closed; its connection was"
        " thrown away: %s",
        bind_key,
        endpoint,
        getattr(error, "orig", None) or type(error).__name__,
        extra={"bind_key": bind_key, "endpoint": endpoint},
    )
    signals.send(signals.session_close_failed, bind_key=bind_key, endpoint=endpoint, error=error)


def _bind_key_of(session: sa_orm.Session, engine: sa.Engine | None) -> str | None:
    if isinstance(session, RoutingSession):
        for bind_key, known in session._db.engines.items():
            if known is engine:
                return bind_key
        if session.bind_key is not ALL_BINDS:
            return session.bind_key
    return None
