"""Outside of requests: scopes, jobs and executors close, commit and roll back as requests do."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import inspect
import itertools
import os
import sqlite3
import threading
import typing as t

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask
from flask import current_app
from flask import has_app_context

from flask_commondb import CommonDB
from flask_commondb import NoContextError
from flask_commondb import PartialCommitError
from flask_commondb.signals import unit_repeated

from .apps import Lab
from .apps import lab_with_orders
from .servers import wait_until

if t.TYPE_CHECKING:
    import collections.abc as c
    from pathlib import Path

    from .servers import Database
    from .servers import MariaDBCluster
    from .servers import PostgreSQLCluster

#: How many jobs the drill runs.
JOBS = int(os.environ.get("COMMONDB_TEST_UNITS", "1000")) // 10 + 2


class Shop(Lab):
    """An app with a default bind and the bind ``orders``, and a table in each.

    :param default: the URL of the default bind.
    :param orders: that of the other.
    """

    def __init__(self, default: str, orders: str, **arguments: t.Any) -> None:
        super().__init__(default, config={"SQLALCHEMY_BINDS": {"orders": orders}}, **arguments)

        class Order(self.db.Model):  # type: ignore[name-defined, misc]
            __bind_key__ = "orders"
            id: so.Mapped[int] = so.mapped_column(primary_key=True)
            item: so.Mapped[str] = so.mapped_column(sa.String(50), unique=True)

        self.Order: t.Any = Order
        with self.app.app_context():
            self.db.create_all()

    def add(self, title: str = "x") -> None:
        self.db.session.add(self.Post(title=title))
        self.db.session.flush()

    def add_order(self, item: str = "x") -> None:
        self.db.sessions["orders"].add(self.Order(item=item))
        self.db.sessions["orders"].flush()

    def durable(self) -> tuple[list[str], list[str]]:
        """The titles and the items that are there for everyone."""
        with self.app.app_context():
            items = self.db.session.scalars(sa.select(self.Order.item).order_by(self.Order.id))
            return self.titles(), list(items)


@pytest.fixture
def shop(tmp_path: Path) -> c.Iterator[Shop]:
    """A shop on SQLite."""
    shop = Shop(f"sqlite:///{tmp_path}/default.db", f"sqlite:///{tmp_path}/orders.db")
    yield shop
    checked_out = shop.checked_out()
    shop.dispose()
    assert checked_out == 0


@pytest.fixture
def two_apps(tmp_path: Path) -> c.Iterator[tuple[CommonDB, Flask, Flask]]:
    """One ``db`` for the apps ``one`` and ``two``."""
    db = CommonDB()
    apps = []
    for name in ("one", "two"):
        app = Flask(name)
        app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/{name}.db"
        db.init_app(app)
        apps.append(app)
    yield db, apps[0], apps[1]
    for app in apps:
        with app.app_context():
            db.engine.dispose()


def in_a_thread(function: t.Callable[[], t.Any]) -> t.Any:
    """What a function returns in a thread of its own; its exception, if it raises."""
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result(30)


# A scope --------------------------------------------------------------------------------------


def test_a_scope(shop: Shop) -> None:
    """A scope has sessions of its own, closed at its end; what was not committed is undone."""
    with shop.db.scope(shop.app) as session:
        assert session is shop.db.session
        inside = session()
        shop.add("kept")
        session.commit()
        shop.add("lost")
        assert shop.checked_out() == 1
    assert not has_app_context()
    assert shop.checked_out() == 0
    assert not inside.in_transaction()
    assert shop.durable() == (["kept"], [])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_scope_that_raises(shop: Shop, error: type[BaseException]) -> None:
    """An exception comes out of a scope as it is, and everything is closed."""
    with pytest.raises(error, match="mine"), shop.db.scope(shop.app):
        shop.add()
        raise error("mine")
    assert shop.checked_out() == 0
    assert shop.durable() == ([], [])


def test_a_scope_in_a_request(shop: Shop) -> None:
    """Inside a request a scope has other sessions, and leaves the request's as they are."""
    with shop.request():
        assert shop.titles() == []
        outer = shop.db.session()
        with shop.db.scope():
            assert shop.db.session() is not outer
            shop.add("from the scope")
            shop.db.session.commit()
        assert shop.db.session() is outer
        assert outer.in_transaction()


def test_a_scope_as_decorator(shop: Shop) -> None:
    """A scope decorates a function: each call has one of its own."""
    seen: list[object] = []

    decorate: t.Any = shop.db.scope(shop.app)

    @decorate  # type: ignore[untyped-decorator]
    def work(number: int) -> int:
        seen.append(shop.db.session())
        return number

    assert [work(1), work(2)] == [1, 2]
    assert seen[0] is not seen[1]
    assert shop.checked_out() == 0


def test_which_app(two_apps: tuple[CommonDB, Flask, Flask]) -> None:
    """The app that is given is meant, else the current one, else the only one."""
    db, one, two = two_apps
    with db.scope(two):
        assert current_app.name == "two"
        with db.scope():
            assert current_app.name == "two"
        with db.scope(one):
            assert current_app.name == "one"
    only = CommonDB()
    app = Flask("only")
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    only.init_app(app)
    with only.scope():
        assert current_app.name == "only"
    with one.app_context(), only.scope():  # the current app is not one of its own
        assert current_app.name == "only"


def test_no_app(two_apps: tuple[CommonDB, Flask, Flask]) -> None:
    """Where it is not clear which app is meant the error names them, and what to type."""
    db, *_ = two_apps
    ways: list[t.Callable[[], object]] = [
        lambda: db.scope().__enter__(),
        db.job(lambda: None),
        lambda: db.executor(concurrent.futures.ThreadPoolExecutor(1)).submit(int),
        lambda: db.init_celery(object()),
        lambda: db.pool_status(),
    ]
    for way in ways:
        with pytest.raises(NoContextError, match=r"2 apps \('one', 'two'\).*db\.scope\(app\)"):
            way()
    with pytest.raises(NoContextError, match=r"0 apps \(none\)"):
        CommonDB().scope().__enter__()


def test_an_app_that_is_not_initialized(shop: Shop) -> None:
    """An app that ``db`` does not know is told to call ``init_app``."""
    strange = Flask("strange")
    with pytest.raises(RuntimeError, match="init_app"):
        shop.db.job(app=strange)(lambda: None)()
    with pytest.raises(RuntimeError, match="init_app"), shop.db.scope(strange):
        shop.titles()


# A job ----------------------------------------------------------------------------------------


def test_a_job_commits(shop: Shop) -> None:
    """What the sessions of a job have changed is committed when it returns."""

    @shop.db.job
    def work(title: str, *, item: str) -> str:
        """Adds things."""
        shop.db.session.add(shop.Post(title=title))
        shop.db.sessions["orders"].add(shop.Order(item=item))
        return title

    assert (work.__name__, work.__doc__) == ("work", "Adds things.")
    assert str(inspect.signature(work)) == "(title: 'str', *, item: 'str') -> 'str'"
    assert in_a_thread(lambda: work("x", item="y")) == "x"
    assert shop.checked_out() == 0
    assert shop.durable() == (["x"], ["y"])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_job_rolls_back(shop: Shop, error: type[BaseException]) -> None:
    """Nothing of a job that raises is durable, on any bind; the error is its own."""

    @shop.db.job
    def work() -> None:
        shop.add()
        shop.add_order()
        raise error("mine")

    with pytest.raises(error, match="mine"):
        work()
    assert shop.checked_out() == 0
    assert shop.durable() == ([], [])


def test_a_job_that_cannot_be_flushed(shop: Shop) -> None:
    """All sessions of a job are flushed before the first is committed."""

    @shop.db.job
    def work() -> None:
        shop.add()
        shop.db.sessions["orders"].add_all([shop.Order(item="same"), shop.Order(item="same")])

    with pytest.raises(sa.exc.IntegrityError, match="UNIQUE"):
        work()
    assert shop.durable() == ([], [])


def test_the_order_of_a_jobs_commits(shop: Shop) -> None:
    """The sessions of a job are committed in the order of their first use."""

    def refuse(connection: sa.Connection) -> None:
        raise sa.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError("disk full"))

    @shop.db.job
    def work(*steps: t.Callable[[], object]) -> None:
        for step in steps:
            step()

    with shop.app.app_context():
        engine = shop.db.engines["orders"]
    sa.event.listen(engine, "commit", refuse)
    with pytest.raises(sa.exc.OperationalError, match="disk full"):
        work(shop.add_order, shop.add)
    assert shop.durable() == ([], [])
    with pytest.raises(PartialCommitError, match="'orders'") as caught:
        work(shop.add, shop.add_order)
    sa.event.remove(engine, "commit", refuse)
    error = caught.value
    assert (error.committed, error.failed, error.pending) == ((None,), "orders", ())
    assert shop.durable() == (["x"], [])


def test_a_job_that_only_reads(shop: Shop) -> None:
    """A job that has only read commits nothing, so what it has loaded can be read afterwards."""
    with shop.app.app_context():
        shop.add("loaded")
        shop.db.session.commit()
    seen: list[str] = []

    @shop.db.job
    def work() -> t.Any:
        for event in ("commit", "rollback"):
            sa.event.listen(
                shop.db.engine, event, lambda connection, event=event: seen.append(event)
            )
        return shop.db.session.scalars(sa.select(shop.Post)).one()

    assert work().title == "loaded"
    assert "commit" not in seen


@pytest.mark.parametrize("flushed", [False, True])
def test_a_job_that_changes_what_another_bind_has(tmp_path: Path, flushed: bool) -> None:
    """An object that was read from a bind of the caller's choice is a change as any other."""
    lab = lab_with_orders(tmp_path)
    db = lab.db

    @db.job
    def rename() -> None:
        there = {"bind": db.engines["orders"]}
        post = db.session.execute(sa.select(lab.Post), bind_arguments=there).scalar_one()
        post.title = "new"
        if flushed:
            db.session.flush()

    with lab.app.app_context():
        elsewhere = db.engines["orders"]
        lab.Post.__table__.create(elsewhere)
        with elsewhere.begin() as connection:
            connection.execute(sa.insert(lab.Post), {"title": "old"})
        rename()
        with elsewhere.connect() as connection:
            assert connection.scalar(sa.select(lab.Post.title)) == "new"
    lab.dispose()


def test_a_job_has_its_own_transactions(shop: Shop) -> None:
    """Inside a job blocks commit, and so does the job what is done beside them."""

    @shop.db.job
    def work() -> None:
        with shop.db.transaction() as session:
            session.add(shop.Post(title="block"))
        with contextlib.suppress(ValueError), shop.db.transaction():
            shop.add("undone")
            raise ValueError
        shop.add("job")

        @shop.db.transactional("orders")
        def unit() -> None:
            shop.add_order()

        unit()

    work()
    assert shop.durable() == (["block", "job"], ["x"])


def test_a_job_in_a_request(shop: Shop) -> None:
    """Called inside a request a job is apart from it: each is committed or undone by itself."""

    @shop.db.job
    def work(fails: bool) -> None:
        shop.add(f"job {fails}")
        if fails:
            raise ValueError("mine")

    with shop.request("POST"):
        shop.db.session.add(shop.Post(title="request"))
        work(False)
        with pytest.raises(ValueError, match="mine"):
            work(True)
        assert shop.db.session.new
    assert shop.durable() == (["job False"], [])


def test_a_job_of_an_app(two_apps: tuple[CommonDB, Flask, Flask]) -> None:
    """``app=`` says which app a job is for, also where another is current."""
    db, one, two = two_apps

    @db.job(app=two)
    def work() -> str:
        return current_app.name

    with one.app_context():
        assert work() == "two"
    assert in_a_thread(work) == "two"


def test_arguments_of_any_name(shop: Shop) -> None:
    """A job may take arguments that are called as ours are."""

    def work(db: int, app: int, retry: int, function: int, fn: int) -> int:
        return db + app + retry + function + fn

    arguments = {"db": 1, "app": 2, "retry": 3, "function": 4, "fn": 5}
    assert shop.db.job(work)(**arguments) == 15
    with shop.db.executor(concurrent.futures.ThreadPoolExecutor(1)) as executor:
        assert executor.submit(work, **arguments).result(30) == 15


def test_a_job_is_repeated(tmp_path: Path) -> None:
    """``retry`` runs the whole job again, in a context of its own, and then gives up."""
    options = {"connect_args": {"timeout": 0.05}}
    url = f"sqlite:///{tmp_path}/default.db"
    shop = Shop(url, f"sqlite:///{tmp_path}/orders.db", engine_options=options)
    seen: list[object] = []
    repeats: list[tuple[object, ...]] = []
    attempts = itertools.count(1)

    def note(app: object, bind_keys: object, attempt: int, reason: str, error: Exception) -> None:
        repeats.append((bind_keys, attempt, reason))
        if attempt == 2:
            other.execute("ROLLBACK")

    def work() -> int:
        seen.append(shop.db.session())
        shop.add()
        return next(attempts)

    other = sqlite3.connect(tmp_path / "default.db", isolation_level=None, check_same_thread=False)
    with contextlib.closing(other), unit_repeated.connected_to(note, shop.app):
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sa.exc.OperationalError, match="locked"):
            shop.db.job(work)()
        assert repeats == []
        assert shop.db.job(retry=3)(work)() == 1
    assert repeats == [((), 1, "lock_timeout"), ((), 2, "lock_timeout")]
    assert len(set(map(id, seen))) == 4
    assert shop.durable() == (["x"], [])
    assert shop.checked_out() == 0
    shop.dispose()


def test_what_cannot_be_a_job(shop: Shop) -> None:
    """A generator or a coroutine is refused at once: it returns before its work is done."""

    def generator() -> t.Iterator[int]:
        yield 1

    async def coroutine() -> None: ...

    for function in (generator, coroutine):
        with pytest.raises(TypeError, match=f"{function.__name__}.* generator or a coroutine"):
            shop.db.job(function)
        with pytest.raises(TypeError, match="generator or a coroutine"):
            shop.db.job(retry=1)(function)


def test_a_job_with_a_scope_function(tmp_path: Path) -> None:
    """The session of a scope function that the user has given is committed as well."""
    shop = Shop(
        f"sqlite:///{tmp_path}/default.db",
        f"sqlite:///{tmp_path}/orders.db",
        session_options={"scopefunc": threading.get_ident},
    )

    @shop.db.job
    def work() -> None:
        shop.add()

    in_a_thread(work)
    assert shop.checked_out() == 0
    assert shop.durable() == (["x"], [])
    shop.dispose()


def test_a_job_that_loses_its_connection(
    mariadb_database: Database[MariaDBCluster], postgresql_database: Database[PostgreSQLCluster]
) -> None:
    """A loss that a job has swallowed is no success, and nothing else of it is durable."""
    shop = Shop(postgresql_database.primary_url, mariadb_database.primary_url)

    @shop.db.job
    def work() -> None:
        shop.add()
        shop.add_order()
        orders = shop.db.sessions["orders"]
        number = orders.scalar(sa.select(sa.func.connection_id()))
        mariadb_database.execute(f"KILL {number}")
        with pytest.raises(sa.exc.OperationalError, match="Lost connection"):
            orders.execute(sa.text("SELECT 1"))

    with pytest.raises(sa.exc.InvalidRequestError, match="Nothing is committed"):
        work()
    assert shop.checked_out() == 0
    assert shop.durable() == ([], [])
    shop.dispose()


# Threads --------------------------------------------------------------------------------------


def test_many_jobs(
    mariadb_database: Database[MariaDBCluster], postgresql_database: Database[PostgreSQLCluster]
) -> None:
    """Of many jobs on eight threads half raise: nothing is out, nothing open, nothing mixed up."""
    shop = Shop(mariadb_database.primary_url, postgresql_database.primary_url)
    threads = concurrent.futures.ThreadPoolExecutor(8)

    def work(number: int) -> int:
        shop.add(f"{number}")
        shop.add_order(f"{number}")
        if number % 2:
            raise ValueError("mine")
        return number

    with shop.app.app_context(), shop.db.executor(threads) as executor:
        futures = [executor.submit(work, number) for number in range(JOBS)]
        errors = [future.exception(60) for future in futures]
    assert [error is None for error in errors] == [number % 2 == 0 for number in range(JOBS)]
    assert shop.checked_out() == 0
    gc.collect()
    assert list(shop.db.open_contexts._open) == []
    expected = {f"{number}" for number in range(0, JOBS, 2)}
    assert tuple(map(set, shop.durable())) == (expected, expected)

    pools = [t.cast(sa.QueuePool, engine.pool) for engine in shop.engines]
    count = "SELECT COUNT(*) FROM information_schema.processlist WHERE db = %s AND user = 'app'"
    wait_until(
        lambda: mariadb_database.execute(count, mariadb_database.name)[0][0] <= pools[0].size(),
        "MariaDB has no more connections than the pool",
    )
    count = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = %s AND usename = 'app'"
    wait_until(
        lambda: (
            postgresql_database.execute(count, postgresql_database.name)[0][0] <= pools[1].size()
        ),
        "PostgreSQL has no more connections than the pool",
    )
    shop.dispose()


def test_a_thread_that_dies_with_its_context(shop: Shop) -> None:
    """A context that is pushed by hand and never popped holds its connection; a job does not."""

    def push() -> None:
        shop.app.app_context().push()
        shop.titles()

    def start(function: t.Callable[[], object]) -> int:
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()
        return shop.checked_out()

    gc.disable()
    try:
        assert start(push) == 1
        assert start(shop.db.job(shop.titles)) == 1
    finally:
        gc.enable()
    gc.collect()
    assert shop.checked_out() == 0


def test_an_executor(shop: Shop) -> None:
    """An executor runs each call as a job: results, errors and ``map`` are as they always are."""

    def work(title: str) -> str:
        shop.add(title)
        if title == "bad":
            raise ValueError(title)
        return title.upper()

    threads = concurrent.futures.ThreadPoolExecutor(2)
    with shop.db.executor(threads) as executor:
        assert isinstance(executor, concurrent.futures.Executor)
        assert executor.submit(work, "a").result(30) == "A"
        assert isinstance(executor.submit(work, title="bad").exception(30), ValueError)
        assert list(executor.map(work, ["b", "c"], timeout=30)) == ["B", "C"]
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(work, "late")
    with pytest.raises(RuntimeError, match="after shutdown"):
        threads.submit(int)
    titles, _ = shop.durable()
    assert (titles[0], set(titles)) == ("a", {"a", "b", "c"})


def test_an_executor_that_is_shut_down(shop: Shop) -> None:
    """``shutdown`` reaches the other executor, with its arguments."""
    gate = threading.Event()
    executor = shop.db.executor(concurrent.futures.ThreadPoolExecutor(1))
    running = executor.submit(gate.wait, 30)
    waiting = executor.submit(shop.add)
    executor.shutdown(wait=False, cancel_futures=True)
    gate.set()
    assert running.result(30)
    assert waiting.cancelled()
    executor.shutdown()
    assert shop.durable() == ([], [])


def test_the_app_of_an_executor(two_apps: tuple[CommonDB, Flask, Flask]) -> None:
    """A call is for the app that is current when it is submitted, unless one was given."""
    db, one, two = two_apps

    def name() -> str:
        return current_app.name

    with db.executor(concurrent.futures.ThreadPoolExecutor(1)) as executor:
        for app in (one, two):
            with app.app_context():
                future = executor.submit(name)
            assert future.result(30) == app.name
    with two.app_context():  # what is a proxy here means nothing in the thread
        given = db.executor(concurrent.futures.ThreadPoolExecutor(1), current_app)
    with one.app_context(), given as executor:
        assert executor.submit(name).result(30) == "two"


def test_processes_are_refused(shop: Shop) -> None:
    """An executor of processes is refused: neither app nor sessions can go there."""
    with concurrent.futures.ProcessPoolExecutor(1) as processes:
        with pytest.raises(TypeError, match=r"@db\.job"):
            shop.db.executor(processes)
