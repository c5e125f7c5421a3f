"""``CommonDB``: Flask-SQLAlchemy with a session per bind, replicas and stored procedures.

Owns: the public object, and every place where upstream is overridden: ``init_app``,
``_make_engine``, ``_apply_driver_defaults``, ``_make_scoped_session``, ``_make_session_factory``,
``_make_declarative_base``, ``_teardown_session`` and ``__repr__``. ``tests/test_contract.py`` pins
what is relied on.

Must not: hold the state of a request, or decide anything that a module below can decide.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import dataclasses
import functools
import inspect
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
from . import jobs
from . import liveness
from . import pools
from .errors import UnknownBindError
from .holders import LeakWatch
from .holders import NoWatch
from .holders import PoolStatus
from .holders import status
from .holders import tell_when_exhausted
from .jobs import JobExecutor
from .naming import server_name
from .options import resolve
from .overview import ServerStatus
from .overview import overview
from .primaries import Candidates
from .probing import report_down
from .procedures import ProcedureResult
from .replicas import Replica
from .replicas import ReplicaSet
from .router import Route
from .router import Router
from .routing import ALL_BINDS
from .routing import RoutingSession
from .scopes import Said
from .scopes import Scope
from .scopes import TimeLimit
from .scopes import checked_limits
from .scopes import checked_said
from .scopes import time_limits
from .sessions import ContextRegistry
from .sessions import OpenContexts
from .sessions import SessionProxy
from .sessions import Sessions
from .sessions import close_all
from .sessions import close_scoped
from .sessions import current_context
from .sources import Sources
from .statements import Reader
from .streams import Stream
from .streams import open_stream
from .transactions import begin_anew
from .transactions import repeat
from .transactions import transaction

_F = t.TypeVar("_F", bound=t.Callable[..., t.Any])


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

    #: The time limits that are entered, likewise.
    #:
    #: :meta private:
    time_limits: contextvars.ContextVar[tuple[TimeLimit, ...]]

    #: The contexts that have sessions now.
    #:
    #: :meta private:
    open_contexts: OpenContexts

    _configs: weakref.WeakKeyDictionary[Flask, config.Config]
    _routers: weakref.WeakKeyDictionary[Flask, Router]
    #: By bind key what is said about the options of its engine, and of those of its replicas.
    _sources: weakref.WeakKeyDictionary[Flask, dict[str | None, Sources]]
    _celery_apps: weakref.WeakKeyDictionary[t.Any, Flask]

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
        self._sources[app] = {}
        self._routers[app] = Router(
            weakref.ref(app),
            self._app_engines.setdefault(app, {}),
            reader,
            by_method=settings.routing == "auto",
            watch=LeakWatch() if settings.leak_watch else NoWatch(),
        )
        with self._all_or_nothing(app):
            super().init_app(app)
        self._watch_pools(app)
        self._record_replica_queries(app)
        self._close_after_every_teardown(app)

    def transaction(
        self, *bind_keys: str | None, twophase: bool = False
    ) -> contextlib.AbstractContextManager[t.Any]:
        """Commit when the block ends, roll back when it raises.

        Works although the session has been used before, nests as a savepoint, and leaves a usable
        session whatever happens. From its beginning on, the unit of work reads from the primary.

        :param bind_keys: without any, the block is about ``db.session``. With one, about
            ``db.sessions[key]``. With several, their sessions are flushed, then committed in the
            order given.
        :param twophase: every server prepares the transaction before any of them commits it.
        :returns: a context manager for the session; for a tuple of sessions with several keys.
        :raises ValueError: if a key is given twice.
        :raises UnknownBindError: for a key that the current app does not configure.
        :raises PartialCommitError: if a commit fails after another has succeeded.
        :raises TwoPhaseNotSupported: if a server cannot prepare a transaction.
        :raises OpenTransactionError: if a session has changes already that two phases would miss.
        """
        return self._transaction(bind_keys, twophase)

    @t.overload
    def transactional(self, function: _F, /) -> _F: ...

    @t.overload
    def transactional(self, *bind_keys: str | None, retry: int = 3) -> t.Callable[[_F], _F]: ...

    def transactional(self, *bind_keys: t.Any, retry: int = 3) -> t.Any:
        """Make each call of a function a unit of work: ``@db.transactional(retry=3)``.

        It is a :meth:`transaction` that is run again, as a whole, when the server has ended it for
        the sake of another one: after a deadlock, when a lock was waited for too long, or when
        transactions could not be serialized. So it is when the server has refused to write, because
        it is no primary any more. Between two attempts it waits for a random time that
        grows. A transaction in which the session has only read is ended first.

        :param bind_keys: as for :meth:`transaction`.
        :param retry: how often it is run again at most. With 0 it may be called inside another
            transaction, and is a savepoint there.
        :raises OpenTransactionError: when called while the session has changes or is inside another
            transaction: what was done before cannot be run again.
        :raises TypeError: if the function is a generator, which cannot be run again.
        """
        if len(bind_keys) == 1 and callable(bind_keys[0]):
            return self._transactional(bind_keys[0], (), retry)
        return functools.partial(self._transactional, bind_keys=bind_keys, retry=retry)

    def stream(
        self,
        statement: t.Any,
        params: t.Any = None,
        *,
        bind_key: str | None = None,
        chunk: int = 1000,
    ) -> Stream[t.Any]:
        """Read a result while it arrives, for one that is larger than memory.

        On a connection of its own, which sees what is committed. It goes back when the rows are
        used up, when the stream is closed or dropped, when the response that it feeds is closed,
        and when its context ends without a response.

        :param statement: a SELECT. It is routed as the unit of work's other reads are.
        :param params: its parameters.
        :param bind_key: for SQL text of another bind than the default one.
        :param chunk: how many rows are fetched at once.
        :raises TypeError: if the statement writes.
        :raises ValueError: if ``chunk`` is less than 1.
        :raises UnknownBindError: for a key that the current app does not configure.
        """
        context = current_context(self)
        if bind_key is not None and bind_key not in context.router.engines:
            raise UnknownBindError(bind_key, context.router.engines)
        session = self.session.session_factory()  # with the listeners and options of all others
        if not isinstance(session, RoutingSession):
            session = RoutingSession(self)
        key = ALL_BINDS if bind_key is None else bind_key
        session.join_context(key, context.router, context.units)
        unit = self._session_for(bind_key)
        return open_stream(session, unit, context.streams, statement, params, chunk)

    def scope(self, app: Flask | None = None) -> contextlib._GeneratorContextManager[SessionProxy]:
        """A context outside of a request: ``with db.scope(app):``. Its sessions are its own.

        They are closed when the block ends; what was not committed is rolled back.

        :param app: may be left out where an app is current, or ``db`` has only one.
        :returns: a context manager for :attr:`session`; also a decorator.
        :raises NoContextError: if it is not clear which app is meant.
        """
        return jobs.scope(self, app)

    @t.overload
    def job(self, function: _F, /) -> _F: ...

    @t.overload
    def job(self, /, *, app: Flask | None = None, retry: int = 0) -> t.Callable[[_F], _F]: ...

    def job(self, function: t.Any = None, /, *, app: Flask | None = None, retry: int = 0) -> t.Any:
        """Make each call of a function a job: ``@db.job``, for threads, schedulers and scripts.

        It runs in a :meth:`scope`. When it returns, what its sessions have changed is committed,
        when it raises, rolled back. Inside a request it is a unit of work of its own, too.

        :param app: may be left out where an app is current, or ``db`` has only one.
        :param retry: how often it is run again at most, as with :meth:`transactional`.
        :raises PartialCommitError: if a commit fails after another has succeeded.
        :raises NoContextError: when called, if it is not clear which app is meant.
        :raises TypeError: if the function is a generator or a coroutine.
        """
        if function is None:
            return functools.partial(self._job, app=app, retry=retry)
        return self._job(function, app, retry)

    def executor(
        self, executor: concurrent.futures.Executor, app: Flask | None = None
    ) -> JobExecutor:
        """An executor that runs each call as a :meth:`job`, in the threads of another one.

        :param executor: a :class:`~concurrent.futures.ThreadPoolExecutor`, say.
        :param app: by default the one that is current when a call is submitted.
        :raises TypeError: for an executor of processes.
        """
        return JobExecutor(self, executor, app)

    def init_celery(self, celery: t.Any, app: Flask | None = None) -> None:
        """Give each task of a Celery app a context, whose sessions are closed when the task ends.

        A task commits by itself, with :meth:`transaction` say: Celery's signals come too late to
        make it fail. Repeated calls change nothing.

        :param celery: the Celery app.
        :param app: may be left out where an app is current, or ``db`` has only one.
        :raises NoContextError: if it is not clear which app is meant.
        :raises ValueError: if its tasks have contexts of another app already.
        """
        app = jobs.app_of(self, app)
        known = self._celery_apps.get(celery)
        if known is None:
            self._celery_apps[celery] = app
            jobs.connect_celery(app, celery)
        elif known is not app:
            raise ValueError(
                f"The tasks of {celery!r} have contexts of {known!r} already, and cannot have those"
                f" of {app!r} as well."
            )

    def pool_status(self, app: Flask | None = None) -> list[PoolStatus]:
        """How many connections are out, for each primary and replica, and who holds them. No I/O.

        :param app: may be left out where an app is current, or ``db`` has only one.
        :raises NoContextError: if it is not clear which app is meant.
        """
        router = self._router_of(jobs.app_of(self, app))
        return [
            status(engine, router.watch, bind_key, role, name)
            for engine, bind_key, role, name in router.servers()
        ]

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
        return Scope(self, Said("primary"), bind_keys)

    def replica(
        self, *bind_keys: str | None, max_lag: float | None = None, fallback: str | None = None
    ) -> Scope:
        """Read from a replica, also outside a request and whatever the request's method.

        ``text()`` is taken at its word here; the replica itself refuses it if it writes. A unit of
        work that has written, or may have, goes on reading from the primary.

        :param bind_keys: the binds that it is about; without any, all.
        :param max_lag: how many seconds behind the primary the replica may be, proved before the
            statement is sent; ``math.inf`` for any. Without it :data:`COMMONDB_MAX_LAG` counts.
        :param fallback: where to read when no replica serves: ``"primary"``, ``"stale"`` (from a
            replica that is further behind) or ``"error"``. Without it :data:`COMMONDB_FALLBACK`
            counts.
        :raises ValueError: for a lag or a fallback that is none.
        :raises UnknownBindError: when entered in a context, for a key that the app does not have.
        :raises NoReplicaError: by a statement inside, if no replica serves and the fallback, or
            :data:`COMMONDB_FALLBACK_LIMIT`, keeps it from the primary.
        """
        return Scope(self, checked_said(max_lag, fallback), bind_keys)

    def explain_route(self, statement: t.Any, bind_key: str | None = None) -> Route:
        """Where a statement would go if the current unit of work executed it now, and why.

        Changes nothing and asks no server: that a replica cannot be reached, or is behind, is
        found out when it is used.

        :param statement: anything that a session executes.
        :param bind_key: with a key the session is ``db.sessions[key]``, without it ``db.session``.
        :raises UnknownBindError: for a key that the current app does not configure.
        :raises CrossBindError: if the statement names tables of several binds.
        :raises sqlalchemy.exc.ObjectNotExecutableError: for what a session would not execute.
        """
        session = self._session_for(bind_key)()
        if not isinstance(session, RoutingSession):
            raise TypeError("db.session has a class of its own that does not route.")
        return session.route(statement)

    def add_replica(self, replica: t.Any, bind_key: str | None = None) -> str:
        """Read from one more replica from now on, in this process.

        :param replica: its URL, or a dict as in :data:`COMMONDB_REPLICAS`.
        :param bind_key: the bind of the current app that it is a replica of.
        :returns: what it is called.
        :raises ConfigError: naming every mistake.
        :raises ValueError: if the bind has that replica already.
        :raises UnknownBindError: for a key that the current app does not configure.
        """
        app, router = current_app._get_current_object(), self.router  # type: ignore[attr-defined]
        if bind_key not in router.engines:
            raise UnknownBindError(bind_key, router.engines)
        settings = config.replica_config(replica, router.engines[bind_key].url)
        with router.changing:
            known = router.replica_sets.get(bind_key, ReplicaSet()).replicas
            if any(each.url == settings.url for each in known):
                raise ValueError(
                    f"Bind {bind_key!r} reads from {server_name(settings.url)} already. To use one"
                    " again that is draining, call db.resume_replica()."
                )
            if not known:
                pools.expect_replicas(router.engines[bind_key])
            added = self._add_replica(bind_key, settings, app)
        self._watch_pool(app, added.engine, bind_key)
        self._record_queries(app, added.engine)
        return added.name

    def drain_replica(self, server: str, bind_key: str | None = None) -> None:
        """Have no further unit of work read from a replica; those that do may end.

        :param server: what it is called in :meth:`server_status`: ``host:port``.
        :param bind_key: the bind of the current app.
        :raises UnknownReplicaError: if the bind has no such replica.
        """
        for replica in self.router.named(bind_key, server):
            replica.is_draining = True

    def resume_replica(self, server: str, bind_key: str | None = None) -> None:
        """Read from a replica again that was drained. Parameters as for :meth:`drain_replica`.

        :raises UnknownReplicaError: if the bind has no such replica.
        """
        for replica in self.router.named(bind_key, server):
            replica.is_draining = False

    def remove_replica(self, server: str, bind_key: str | None = None) -> None:
        """Read from a replica no more, and close its connections.

        A statement that is running there ends; what a unit of work reads after that comes from the
        primary. Drain it before, and none will notice. Parameters as for :meth:`drain_replica`.

        :raises UnknownReplicaError: if the bind has no such replica.
        """
        router = self.router
        with router.changing:
            removed = router.named(bind_key, server)
            for replica in removed:
                router.remove(replica)
        for replica in removed:
            pools.retire(replica.engine)

    def server_status(self, app: Flask | None = None) -> list[ServerStatus]:
        """What this process knows of each primary and replica. Asks no server.

        :param app: may be left out where an app is current, or ``db`` has only one.
        :raises NoContextError: if it is not clear which app is meant.
        """
        return overview(self._router_of(jobs.app_of(self, app)))

    def timeout(
        self, statement: float | None = None, *bind_keys: str | None, lock: float | None = None
    ) -> TimeLimit:
        """Stop what takes too long: ``with db.timeout(2):``, or ``@db.timeout(2)`` on a view.

        The server stops a statement, which raises :exc:`.StatementTimeout`; the session is usable
        after it. The limit counts for each statement, not for the block. It nests: what is said
        further inside counts.

        :param statement: how many seconds one statement may take; 0 takes a limit away.
        :param bind_keys: the binds that it is about; without any, all.
        :param lock: how many seconds one lock may be waited for. MariaDB and MySQL count whole
            ones.
        :raises ValueError: for no limit at all, or one that is not a number of seconds.
        :raises UnknownBindError: when entered in a context, for a key that the app does not have.
        """
        return TimeLimit(self, checked_limits(statement, lock), bind_keys)

    @property
    def replica_engines(self) -> t.Mapping[str | None, t.Sequence[sa.Engine]]:
        """The engines of the current app's replicas, for each bind key that has any.

        They stand beside :attr:`engines`: for instrumentation, and to dispose of them.
        """
        return {
            bind_key: [replica.engine for replica in replicas.replicas]
            for bind_key, replicas in self.router.replica_sets.copy().items()
        }

    @property
    def router(self) -> Router:
        """What routing knows of the current app.

        :meta private:
        """
        return self._router_of(current_app._get_current_object())  # type: ignore[attr-defined]

    @property
    def routers(self) -> t.Mapping[Flask, Router]:
        """What routing knows of each app that it is initialized for.

        :meta private:
        """
        return self._routers

    def __repr__(self) -> str:
        if not has_app_context():
            return f"<{type(self).__name__}>"
        names = [server_name(engine.engine.url) for engine in self.engines.values()]
        return f"<{type(self).__name__} {', '.join(names)}>"

    def _router_of(self, app: Flask) -> Router:
        router = self._routers.get(app)
        if router is None:
            raise RuntimeError(
                "The current Flask app is not registered with this 'CommonDB' instance. Did you"
                " forget to call 'init_app', or did you create several 'CommonDB' instances?"
            )
        return router

    def _make_scoped_session(self, options: dict[str, t.Any]) -> SessionProxy:
        """Upstream's constructor calls this first: our own attributes are made here, and the
        constructor with its signature stays upstream's."""
        options = dict(options)
        scopefunc = options.pop("scopefunc", None)
        factory = self._make_session_factory(options)
        if "sessions" not in vars(self):  # test suites call it again, for a session of their own
            self._configs = weakref.WeakKeyDictionary()
            self._routers = weakref.WeakKeyDictionary()
            self._sources = weakref.WeakKeyDictionary()
            self.scopes = contextvars.ContextVar("flask_commondb_scopes", default=())
            self.time_limits = contextvars.ContextVar("flask_commondb_time_limits", default=())
            self._celery_apps = weakref.WeakKeyDictionary()
            self.open_contexts = OpenContexts()
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
        settings = self._configs.get(app)  # None when someone makes an engine by the way
        replicas = settings.replicas.get(bind_key, ()) if settings else ()
        known = settings.sources.get(bind_key) if settings else None
        sources = (known or Sources(sa.make_url(options["url"]))).changed(options)
        resolved = resolve(sources)
        engine = super()._make_engine(bind_key, resolved.options, app)
        limits = functools.partial(time_limits, self, bind_key)
        pools.prepare(engine, resolved.settings, bind_key, limits, has_replicas=bool(replicas))
        if settings is not None:
            self._sources[app][bind_key] = sources
            if known is not None and bind_key in settings.candidates:
                router = self._routers[app]
                router.candidates[bind_key] = Candidates(
                    engine,
                    [known.url, *settings.candidates[bind_key]],
                    bind_key,
                    moved=functools.partial(router.note_move, bind_key),
                    asked=functools.partial(pools.count_probe, engine),
                )
        for replica in replicas:
            self._add_replica(bind_key, replica, app)
        return engine

    def _add_replica(
        self, bind_key: str | None, settings: config.ReplicaConfig, app: Flask
    ) -> Replica:
        replica = self._make_replica(bind_key, settings, app)
        reads = self._configs[app].reads[bind_key]
        self._routers[app].add(replica, lambda: ReplicaSet(**vars(reads)))
        return replica

    def _make_replica(
        self, bind_key: str | None, replica: config.ReplicaConfig, app: Flask
    ) -> Replica:
        sources = replica.sources(self._sources[app][bind_key])
        sources = dataclasses.replace(sources, given=resolve(sources).options)
        options = dict(sources.given)
        self._apply_driver_defaults(options, app)
        options, settings = resolve(sources.changed(options))
        options["isolation_level"] = pools.REPLICA_ISOLATION
        engine = super()._make_engine(bind_key, options, app)
        limits = functools.partial(time_limits, self, bind_key)
        name = server_name(replica.url)
        made = Replica(bind_key, name, engine, replica.weight, replica.zone, replica.url)
        timed, on_dead = _telling(made, app)
        pools.prepare_replica(engine, settings, bind_key, limits, timed, on_dead)
        made.streaming = pools.streaming(engine)
        return made

    def _apply_driver_defaults(self, options: dict[str, t.Any], app: Flask) -> None:
        if isinstance(options.get("connect_args"), t.Mapping):
            options["connect_args"] = dict(options["connect_args"])  # upstream writes into it
        super()._apply_driver_defaults(options, app)

    def _make_declarative_base(self, model_class: t.Any, *args: t.Any, **kwargs: t.Any) -> t.Any:
        return super()._make_declarative_base(_as_plain_class(model_class), *args, **kwargs)

    def _teardown_session(self, exc: BaseException | None) -> None:
        if not isinstance(self.session.registry, ContextRegistry):
            close_scoped(self.session)
        close_all(self, exc)

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
        # Upstream has registered it; once, and after all others, is enough.
        app.teardown_appcontext_funcs.remove(self._teardown_session)
        original = app.do_teardown_appcontext
        if getattr(original, "closes_for", None) is self:  # init_app has run before
            return

        @functools.wraps(original)
        def do_teardown_appcontext(*args: t.Any, **kwargs: t.Any) -> None:
            given = (value for value in args if isinstance(value, BaseException))
            try:
                original(*args, **kwargs)
            except BaseException as error:
                self._teardown_session(error)
                raise
            self._teardown_session(next(given, None))

        do_teardown_appcontext.closes_for = self  # type: ignore[attr-defined]
        app.do_teardown_appcontext = do_teardown_appcontext  # type: ignore[method-assign]

    def _watch_pools(self, app: Flask) -> None:
        router = self._routers[app]
        for engine, bind_key, *_ in router.servers():
            self._watch_pool(app, engine, bind_key)

    def _watch_pool(self, app: Flask, engine: sa.Engine, bind_key: str | None) -> None:
        watch = self._routers[app].watch
        # One connection for all is taken twice, never lacking, and may be the database itself.
        if not liveness.is_shared(engine.pool):
            watch.watch(engine, bind_key)
        tell_when_exhausted(engine, watch, bind_key)

    def _forget_router(self, app: Flask) -> None:
        """Upstream disposes of the engines when an app is initialized anew; so do we."""
        router = self._routers.pop(app, None)
        if router is not None:
            for replica in list(router.replicas.values()):
                replica.engine.dispose()

    def _record_replica_queries(self, app: Flask) -> None:
        for replica in list(self._routers[app].replicas.values()):
            self._record_queries(app, replica.engine)

    def _record_queries(self, app: Flask, engine: sa.Engine) -> None:
        if app.config["SQLALCHEMY_RECORD_QUERIES"]:
            from flask_sqlalchemy import record_queries

            record_queries._listen(engine)

    def _session_for(self, bind_key: str | None) -> SessionProxy:
        return self.session if bind_key is None else self.sessions[bind_key]

    @contextlib.contextmanager
    def _transaction(
        self, bind_keys: tuple[str | None, ...], twophase: bool = False
    ) -> t.Iterator[t.Any]:
        taken = self._taken(bind_keys)
        if twophase:
            for bind_key in bind_keys or self.engines:
                pools.refuse_without_twophase(self.engines[bind_key], bind_key)
        with transaction(taken, twophase=twophase):
            yield next(iter(taken.values())) if len(taken) == 1 else tuple(taken.values())

    def _transactional(self, function: _F, bind_keys: tuple[str | None, ...], retry: int) -> _F:
        begin = functools.partial(self._transaction, bind_keys)
        _refuse_what_cannot_run_again(function, "@db.transactional")

        @functools.wraps(function)
        def unit_of_work(*args: t.Any, **kwargs: t.Any) -> t.Any:
            taken = self._taken(bind_keys)
            if retry:
                for key, session in taken.items():
                    begin_anew(key, session, f"{_name_of(function)}()")
            unit = functools.partial(function, *args, **kwargs)
            engines = [self.engines[key] for key in bind_keys or self.engines]
            return repeat(unit, begin, retry, engines, bind_keys, jobs.app_of(self))

        return t.cast(_F, unit_of_work)

    def _job(self, function: _F, app: Flask | None, retry: int) -> _F:
        _refuse_what_cannot_run_again(function, "@db.job")

        @functools.wraps(function)
        def job(*args: t.Any, **kwargs: t.Any) -> t.Any:
            return jobs.run(self, app, retry, function, *args, **kwargs)

        return t.cast(_F, job)

    def _taken(self, bind_keys: tuple[str | None, ...]) -> dict[t.Any, t.Any]:
        """The sessions of the current context that a transaction is about."""
        if len(set(bind_keys)) < len(bind_keys):
            raise ValueError(f"db.transaction(): a bind key is given twice: {bind_keys!r}")
        if not bind_keys:
            return {ALL_BINDS: self.session()}
        return {bind_key: self.sessions[bind_key]() for bind_key in bind_keys}


def _refuse_what_cannot_run_again(function: t.Any, decorator: str) -> None:
    if (
        inspect.isgeneratorfunction(function)
        or inspect.iscoroutinefunction(function)
        or inspect.isasyncgenfunction(function)
    ):
        raise TypeError(
            f"{decorator} is for a function that returns when its work is done;"
            f" {_name_of(function)}() is a generator or a coroutine."
        )


def _name_of(function: t.Any) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def _telling(made: Replica, app: Flask) -> tuple[t.Callable[[float], None], t.Callable[[], None]]:
    """What a replica's engine calls, which does not keep the replica alive once it is removed."""
    known, owner = weakref.ref(made), weakref.ref(app)

    def timed(seconds: float) -> None:
        replica = known()
        if replica is not None:
            replica.time(seconds)

    def on_dead() -> None:
        replica = known()
        if replica is not None:
            report_down(replica, None, owner())

    return timed, on_dead


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
