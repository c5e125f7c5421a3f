"""The guarantees of a request for what runs outside of one: scripts, threads, executors, Celery.

Owns: which app is meant where none is current, the context of a job, and its commit.

Must not: copy a request into a job, or share a session with the code that starts one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import typing as t

import sqlalchemy.orm as sa_orm
from flask import Flask
from flask import current_app
from flask import has_app_context
from werkzeug.local import LocalProxy

from .errors import NoContextError
from .routing import ALL_BINDS
from .routing import AllBinds
from .sessions import ContextRegistry
from .sessions import SessionProxy
from .sessions import current_context
from .transactions import commit
from .transactions import repeat

if t.TYPE_CHECKING:
    from .extension import CommonDB

_T = t.TypeVar("_T")


@contextlib.contextmanager
def scope(db: CommonDB, app: Flask | None) -> t.Iterator[SessionProxy]:
    """An application context whose sessions are closed at its end."""
    with app_of(db, app).app_context():
        yield db.session


def run(
    db: CommonDB,
    app: Flask | None,
    retry: int,
    function: t.Callable[..., _T],
    /,
    *args: t.Any,
    **kwargs: t.Any,
) -> _T:
    """Call a function as a job: in a unit of work of its own, again if that has met another."""
    app = app_of(db, app)
    if app not in db.routers:
        with app.app_context():
            assert db.router  # raises, and says what was forgotten
    return repeat(
        functools.partial(function, *args, **kwargs),
        functools.partial(_unit_of_work, db, app),
        retry,
        list(db.routers[app].engines.values()),
        (),
        app,
    )


class JobExecutor(concurrent.futures.Executor):
    """Runs each call as a job, in the threads of another executor.

    :param db: whose sessions.
    :param executor: has threads, not processes.
    :param app: for the calls; by default the one that is current when they are submitted.
    """

    def __init__(
        self, db: CommonDB, executor: concurrent.futures.Executor, app: Flask | None = None
    ) -> None:
        if isinstance(executor, concurrent.futures.ProcessPoolExecutor):
            raise TypeError(
                "db.executor() is for threads. In another process, make the app there and decorate"
                " the function with @db.job."
            )
        self._db = db
        self._executor = executor
        self._app = None if app is None else app_of(db, app)

    def submit(
        self, fn: t.Callable[..., _T], /, *args: t.Any, **kwargs: t.Any
    ) -> concurrent.futures.Future[_T]:
        """Schedule a call; its result must not be an object that a session still has to load."""
        app = app_of(self._db, self._app)
        return self._executor.submit(run, self._db, app, 0, fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shut the other executor down."""
        self._executor.shutdown(wait=wait, cancel_futures=cancel_futures)


def connect_celery(app: Flask, celery: t.Any) -> None:
    """Give each task of a Celery app a context of its own, which ends when the task does.

    Through Celery's signals, so it holds for every pool, for eager tasks, and for tasks that fail.
    """
    from celery import signals as celery_signals

    @celery_signals.task_prerun.connect(weak=False)  # type: ignore[untyped-decorator]
    def begin(task: t.Any, **more: t.Any) -> None:
        if task.app is celery:
            context = app.app_context()
            context.push()
            # The request object is the execution's own, also when the same task runs twice at once.
            setattr(task.request, _CONTEXTS, [*getattr(task.request, _CONTEXTS, ()), context])

    @celery_signals.task_postrun.connect(weak=False)  # type: ignore[untyped-decorator]
    def end(task: t.Any, retval: t.Any = None, **more: t.Any) -> None:
        contexts = getattr(task.request, _CONTEXTS, None)
        if task.app is celery and contexts:
            contexts.pop().pop(retval if isinstance(retval, BaseException) else None)


def app_of(db: CommonDB, app: Flask | None = None) -> Flask:
    """The app that is meant: the given one, the current one, or the only one that there is.

    :raises NoContextError: if that does not say which.
    """
    given: t.Any = app
    if isinstance(given, LocalProxy):  # current_app, say, which means nothing in another thread
        given = given._get_current_object()
    if given is not None:
        return t.cast(Flask, given)
    apps = list(db.routers)
    if has_app_context():
        current: Flask = current_app._get_current_object()  # type: ignore[attr-defined]
        if current in apps:
            return current
    if len(apps) == 1:
        return apps[0]
    names = ", ".join(repr(known.name) for known in apps) or "none"
    raise NoContextError(
        f"Which app is meant? No application context is active, and {db!r} is initialized for"
        f" {len(apps)} apps ({names}). Name it: db.scope(app), @db.job(app=app)."
    )


@contextlib.contextmanager
def _unit_of_work(db: CommonDB, app: Flask) -> t.Iterator[None]:
    """A :func:`scope` that commits at its end what its sessions have changed."""
    with scope(db, app):
        yield
        commit(_sessions(db))


def _sessions(db: CommonDB) -> dict[str | AllBinds | None, sa_orm.Session]:
    """The current context's, in the order of their first use."""
    found = dict(current_context(db).sessions)
    registry = db.session.registry
    if not isinstance(registry, ContextRegistry) and registry.has():  # by the user's scopefunc
        found[ALL_BINDS] = registry()
    return found


#: On the request of a Celery task: the contexts that were pushed for it.
_CONTEXTS = "flask_commondb_contexts"
