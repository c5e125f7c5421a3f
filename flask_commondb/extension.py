"""``CommonDB``: Flask-SQLAlchemy with a session per bind, replicas and stored procedures.

Owns: the public object, and every place where upstream is overridden: ``init_app``,
``_make_engine``, ``_make_scoped_session``, ``_make_session_factory``, ``_make_declarative_base``,
``_teardown_session`` and ``__repr__``. ``tests/test_contract.py`` pins what is relied on.

Must not: hold the state of a request, or decide anything that a module below can decide.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import typing as t
import weakref

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from flask import Flask
from flask import current_app
from flask import has_app_context
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.session import Session as UpstreamSession

from . import config
from . import pools
from .errors import ConfigError
from .procedures import ProcedureResult
from .replicas import Replica
from .routing import ALL_BINDS
from .routing import Router
from .routing import RoutingSession
from .scopes import Scope
from .sessions import ContextRegistry
from .sessions import SessionProxy
from .sessions import Sessions
from .sessions import close_all
from .sessions import close_scoped
from .sessions import transaction
from .statements import Reader


class CommonDB(SQLAlchemy):
    """A drop-in for :class:`flask_sqlalchemy.SQLAlchemy`, with the same arguments.

    Beside everything that it inherits it has :attr:`sessions`, :meth:`transaction`,
    :meth:`cursor`, :meth:`callproc`, and :meth:`primary` and :meth:`replica` for reads. One object
    serves any number of apps.

    .. versionadded:: 0.1
    """

    session: SessionProxy

    #: For each bind key a proxy for that bind's own session; ``None`` is the default bind.
    sessions: Sessions

    #: The scopes that are entered, for each thread, greenlet and task.
    #:
    #: :meta private:
    scopes: contextvars.ContextVar[tuple[Scope, ...]]

    _configs: weakref.WeakKeyDictionary[Flask, config.Config]
    _routers: weakref.WeakKeyDictionary[Flask, Router]

    def init_app(self, app: Flask) -> None:
        """Initialize an app, as in Flask-SQLAlchemy.

        Also reads :data:`COMMONDB_REPLICAS`, :data:`COMMONDB_ROUTING` and
        :data:`COMMONDB_READ_FUNCTIONS`, and ``replicas`` beside the ``url`` of a bind.

        :param app: the app, already configured.
        :raises ConfigError: naming every mistake; then nothing was registered on the app.
        :raises RuntimeError: if the app has a database extension already.
        """
        if "sqlalchemy" in app.extensions:
            super().init_app(app)  # which says so
        settings = config.load(app.config, self._engine_options)
        self._forget_router(app)
        reader = Reader(settings.read_functions)
        self._configs[app] = settings
        self._routers[app] = Router(reader, by_method=settings.routing == "auto")
        with self._all_or_nothing(app):
            super().init_app(app)
        self._record_replica_queries(app)
        self._close_after_every_teardown(app)

    def transaction(self, *bind_keys: str | None) -> contextlib.AbstractContextManager[t.Any]:
        """Commit when the block ends, roll back when it raises.

        Works although the session has been used before, nests as a savepoint, and leaves a usable
        session whatever happens. From its beginning on, the unit of work reads from the primary.

        :param bind_keys: without any, the block is about ``db.session``. With one, about
            ``db.sessions[key]``. With several, their sessions are flushed, then committed in the
            order given.
        :returns: a context manager for the session; for a tuple of sessions with several keys.
        :raises ValueError: if a key is given twice.
        :raises UnknownBindError: for a key that the current app does not configure.
        :raises PartialCommitError: if a commit fails after another has succeeded.
        """
        return self._transaction(bind_keys)

    def cursor(
        self, bind_key: str | None = None, *args: t.Any, **kwargs: t.Any
    ) -> contextlib.AbstractContextManager[t.Any]:
        """A cursor of the database driver, on a session's connection and in its transaction.

        For code that comes from ``pymysql.connect()``. The cursor is closed when the block ends,
        and when the session's transaction does: after a commit, open another. What it has done is
        committed or rolled back with the session. Errors are the driver's. As
        its statements are not seen, the connection is the primary's; inside :meth:`replica`, in a
        unit of work that may still read there, it is the replica's, which refuses what writes.

        :param bind_key: with a key the session is ``db.sessions[key]``, without it ``db.session``.
        :param args: with ``kwargs``, what the driver's own ``cursor()`` takes, a cursor class say.
        :raises UnknownBindError: for a key that the current app does not configure.
        """
        return self._session_for(bind_key).cursor(*args, **kwargs)

    def callproc(self, name: str, *args: t.Any, bind_key: str | None = None) -> ProcedureResult:
        """Call a stored procedure, on a session's connection and in its transaction.

        Every result set is read before this returns, so an error that comes late is raised here,
        and the connection is free for the next statement. Always on the primary.

        :param name: ``procedure`` or ``schema.procedure``.
        :param args: the values of the IN and INOUT parameters, in order; OUT takes none.
        :param bind_key: with a key the session is ``db.sessions[key]``, without it ``db.session``.
        :raises TypeError: if there are too few or too many arguments; the procedure was not called.
        :raises sqlalchemy.exc.DBAPIError: what the procedure or the server has raised. The
            transaction is still open, unless the server has ended it.
        :raises ProcedureNotSupported: on another server than MariaDB and MySQL, or with another
            driver than PyMySQL.
        :raises UnknownBindError: for a key that the current app does not configure.
        """
        return self._session_for(bind_key).callproc(name, *args)

    def primary(self, *bind_keys: str | None) -> Scope:
        """Read from the primary: ``with db.primary():``, or ``@db.primary()`` on a view.

        :param bind_keys: the binds that it is about; without any, all.
        :raises UnknownBindError: when entered in a context, for a key that the app does not have.
        """
        return Scope(self, "primary", bind_keys)

    def replica(self, *bind_keys: str | None) -> Scope:
        """Read from a replica, also outside a request and whatever the request's method.

        ``text()`` is taken at its word here; the replica itself refuses it if it writes. A unit of
        work that has written, or may have, goes on reading from the primary.

        :param bind_keys: the binds that it is about; without any, all.
        :raises UnknownBindError: when entered in a context, for a key that the app does not have.
        """
        return Scope(self, "replica", bind_keys)

    @property
    def replica_engines(self) -> t.Mapping[str | None, t.Sequence[sa.Engine]]:
        """The engines of the current app's replicas, for each bind key that has any.

        They stand beside :attr:`engines`: for instrumentation, and to dispose of them.
        """
        return {
            bind_key: [replica.engine for replica in replicas.replicas]
            for bind_key, replicas in self.router.replica_sets.items()
        }

    @property
    def router(self) -> Router:
        """What routing knows of the current app.

        :meta private:
        """
        app = current_app._get_current_object()  # type: ignore[attr-defined]
        router = self._routers.get(app)
        if router is None:
            raise RuntimeError(
                "The current Flask app is not registered with this 'CommonDB' instance. Did you"
                " forget to call 'init_app', or did you create several 'CommonDB' instances?"
            )
        return router

    def __repr__(self) -> str:
        if not has_app_context():
            return f"<{type(self).__name__}>"
        names = [config.server_name(engine.engine.url) for engine in self.engines.values()]
        return f"<{type(self).__name__} {', '.join(names)}>"

    def _make_scoped_session(self, options: dict[str, t.Any]) -> SessionProxy:
        """Upstream's constructor calls this first: our own attributes are made here, and the
        constructor with its signature stays upstream's."""
        options = dict(options)
        scopefunc = options.pop("scopefunc", None)
        factory = self._make_session_factory(options)
        if "sessions" not in vars(self):  # test suites call it again, for a session of their own
            self._configs = weakref.WeakKeyDictionary()
            self._routers = weakref.WeakKeyDictionary()
            self.scopes = contextvars.ContextVar("flask_commondb_scopes", default=())
            self.sessions = Sessions(self, factory)
        if scopefunc is not None:
            return SessionProxy(factory, scopefunc=scopefunc)
        return SessionProxy(factory, ContextRegistry(self, factory))

    def _make_session_factory(self, options: dict[str, t.Any]) -> sa_orm.sessionmaker[t.Any]:
        given = options.get("class_")
        if given is None:
            options["class_"] = RoutingSession
        elif issubclass(given, UpstreamSession) and not issubclass(given, RoutingSession):
            options["class_"] = type(given.__name__, (given, RoutingSession), {})
        return super()._make_session_factory(options)

    def _make_engine(
        self, bind_key: str | None, options: dict[str, t.Any], app: Flask
    ) -> sa.Engine:
        options = {name: value for name, value in options.items() if name != "replicas"}
        settings = self._configs.get(app)  # None when someone makes an engine by the way
        replicas = settings.replicas.get(bind_key, ()) if settings else ()
        engine = super()._make_engine(bind_key, options, app)
        pools.prepare(engine, has_replicas=bool(replicas))
        if replicas:
            self._routers[app].add(
                bind_key,
                config.server_name(engine.url),
                [self._make_replica(bind_key, options, replica, app) for replica in replicas],
            )
        return engine

    def _make_replica(
        self,
        bind_key: str | None,
        bind_options: dict[str, t.Any],
        replica: config.ReplicaConfig,
        app: Flask,
    ) -> Replica:
        # What makes or holds connections to the primary is not for a replica.
        options = {k: v for k, v in bind_options.items() if k not in ("creator", "pool")}
        options.update(replica.options, url=replica.url, isolation_level=pools.REPLICA_ISOLATION)
        if "execution_options" in options:
            options["execution_options"] = {
                name: value
                for name, value in options["execution_options"].items()
                if name != "isolation_level"
            }
        self._apply_driver_defaults(options, app)
        name = config.server_name(replica.url)
        try:
            engine = super()._make_engine(bind_key, options, app)
        except TypeError as error:  # an engine option that does not exist
            raise ConfigError([f"Replica {name} of bind {bind_key!r}: {error}"]) from error
        pools.prepare_replica(engine)
        return Replica(bind_key, name, engine, replica.weight)

    def _make_declarative_base(self, model_class: t.Any, *args: t.Any, **kwargs: t.Any) -> t.Any:
        return super()._make_declarative_base(_as_plain_class(model_class), *args, **kwargs)

    def _teardown_session(self, exc: BaseException | None) -> None:
        if not isinstance(self.session.registry, ContextRegistry):
            close_scoped(self.session)
        close_all(self)

    @contextlib.contextmanager
    def _all_or_nothing(self, app: Flask) -> t.Iterator[None]:
        """Take back what upstream has registered, if it raises before it is done."""
        functions = list(app.teardown_appcontext_funcs)
        processors = list(app.shell_context_processors)
        try:
            yield
        except BaseException:
            app.teardown_appcontext_funcs[:] = functions
            app.shell_context_processors[:] = processors
            app.extensions.pop("sqlalchemy", None)
            self._app_engines.pop(app, None)
            self._routers.pop(app, None)
            raise

    def _close_after_every_teardown(self, app: Flask) -> None:
        """Close also when another extension's teardown raises, or uses a session after ours.

        Before Flask 3.2 the first teardown function that raises keeps all later ones from running.
        """
        original = app.do_teardown_appcontext
        if getattr(original, "closes_for", None) is self:  # init_app has run before
            return

        @functools.wraps(original)
        def do_teardown_appcontext(*args: t.Any, **kwargs: t.Any) -> None:
            try:
                original(*args, **kwargs)
            finally:
                self._teardown_session(None)

        do_teardown_appcontext.closes_for = self  # type: ignore[attr-defined]
        app.do_teardown_appcontext = do_teardown_appcontext  # type: ignore[method-assign]

    def _forget_router(self, app: Flask) -> None:
        """Upstream disposes of the engines when an app is initialized anew; so do we."""
        router = self._routers.pop(app, None)
        if router is not None:
            for replica in router.replicas.values():
                replica.engine.dispose()

    def _record_replica_queries(self, app: Flask) -> None:
        if app.config["SQLALCHEMY_RECORD_QUERIES"]:
            from flask_sqlalchemy import record_queries

            for replica in self._routers[app].replicas.values():
                record_queries._listen(replica.engine)

    def _session_for(self, bind_key: str | None) -> SessionProxy:
        return self.session if bind_key is None else self.sessions[bind_key]

    @contextlib.contextmanager
    def _transaction(self, bind_keys: tuple[str | None, ...]) -> t.Iterator[t.Any]:
        if len(set(bind_keys)) < len(bind_keys):
            raise ValueError(f"db.transaction(): a bind key is given twice: {bind_keys!r}")
        if not bind_keys:
            taken: dict[t.Any, t.Any] = {ALL_BINDS: self.session()}
        else:
            taken = {bind_key: self.sessions[bind_key]() for bind_key in bind_keys}
        with transaction(taken):
            yield next(iter(taken.values())) if len(taken) == 1 else tuple(taken.values())


class _PlainClass:
    """Stands for a declarative base that is a dataclass, and does not look like one.

    Upstream copies the base's ``__dict__`` into a new class. Since SQLAlchemy 2.1 a base that is
    mapped as a dataclass has dataclass attributes of its own there, and the copy would be refused
    as a dataclass that is made one again. The base itself stays as it is.
    """

    def __init__(self, model_class: type) -> None:
        self.__dict__ = {
            name: value
            for name, value in vars(model_class).items()
            if name not in ("__dataclass_fields__", "__dataclass_params__")
        }
        self._model_class = model_class

    @property
    def __bases__(self) -> tuple[type, ...]:
        return self._model_class.__bases__


def _as_plain_class(model_class: t.Any) -> t.Any:
    if "__dataclass_fields__" in vars(model_class):
        return _PlainClass(model_class)
    return model_class
