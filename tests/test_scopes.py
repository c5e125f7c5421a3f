"""``db.primary()`` and ``db.replica()``: what they are about, and that they never leak.

On SQLite: two binds, each with a replica on the same file. The signal tells where a read went.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import inspect
import threading
import typing as t
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import greenlet
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from flask_commondb import CommonDB
from flask_commondb import UnknownBindError
from flask_commondb.scopes import Scope
from flask_commondb.signals import routed

#: Where a read goes, and why.
Route = tuple[str, str]

BY_DEFAULT: Route = ("primary", "default")
TO_PRIMARY: Route = ("primary", "scope")
TO_REPLICA: Route = ("replica", "scope")

BINDS: tuple[str | None, ...] = (None, "orders")


class Lab:
    """An app with two binds on SQLite files, each with a replica on the same file."""

    def __init__(self, directory: Path) -> None:
        self.app = Flask("scopes")
        urls = {bind_key: f"sqlite:///{directory}/{bind_key}.db" for bind_key in BINDS}
        self.app.config["SQLALCHEMY_BINDS"] = {
            bind_key: {"url": url, "replicas": [url]} for bind_key, url in urls.items()
        }

        class Base(so.DeclarativeBase):
            pass

        self.db = CommonDB(self.app, model_class=Base)
        self.tables = {
            bind_key: self.db.Table(
                "item", sa.Column("id", sa.Integer, primary_key=True), bind_key=bind_key
            )
            for bind_key in BINDS
        }
        with self.app.app_context():
            self.db.create_all()

    def read(self, bind_key: str | None = None) -> Route:
        """Read from a bind; returns where it went."""
        return self.routed(lambda: self.count(bind_key))[1]

    def count(self, bind_key: str | None) -> int:
        statement = sa.select(sa.func.count()).select_from(self.tables[bind_key])
        return int(self.db.session.scalars(statement).one())

    def routed(self, work: t.Callable[[], t.Any]) -> tuple[t.Any, Route]:
        """What some work returns, and where its only statement went."""
        here, seen = threading.get_ident(), []

        def note(sender: Flask, role: str, reason: str, **_: t.Any) -> None:
            if threading.get_ident() == here:
                seen.append((role, reason))

        with routed.connected_to(note, self.app):
            result = work()
        (route,) = seen
        return result, route

    def dispose(self) -> None:
        with self.app.app_context():
            for engine in self.db.engines.values():
                engine.dispose()
            for replica in self.db.router.replicas.values():
                replica.engine.dispose()


@pytest.fixture(scope="module")
def module_lab(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("scopes"))
    yield lab
    lab.dispose()


@pytest.fixture
def lab(module_lab: Lab) -> t.Iterator[Lab]:
    """The lab inside a context outside of a request, where nothing else asks for a replica."""
    with module_lab.app.app_context():
        yield module_lab
    assert module_lab.db.scopes.get() == ()


def scope_for(db: CommonDB, role: str, *bind_keys: str | None) -> Scope:
    return {"primary": db.primary, "replica": db.replica}[role](*bind_keys)


ROUTE_OF: dict[str | None, Route] = {"primary": TO_PRIMARY, "replica": TO_REPLICA}

each_role = pytest.mark.parametrize("role", ["primary", "replica"])


@each_role
def test_a_block(lab: Lab, role: str) -> None:
    """Inside the block reads go where it says, on every bind; before and after they do not."""
    before = [lab.read(bind_key) for bind_key in BINDS]
    with scope_for(lab.db, role):
        inside = [lab.read(bind_key) for bind_key in BINDS]
    after = [lab.read(bind_key) for bind_key in BINDS]
    assert (before, inside, after) == ([BY_DEFAULT] * 2, [ROUTE_OF[role]] * 2, [BY_DEFAULT] * 2)


@pytest.mark.parametrize(
    ("method", "route"), [("GET", ("replica", "read")), ("POST", ("primary", "method"))]
)
@each_role
def test_before_the_method(module_lab: Lab, role: str, method: str, route: Route) -> None:
    """In a request a scope goes before the method, and the method is back after it."""
    with module_lab.app.test_request_context(method=method):
        assert module_lab.read() == route
        with scope_for(module_lab.db, role):
            assert module_lab.read() == ROUTE_OF[role]
        assert module_lab.read() == route


def test_nesting(lab: Lab) -> None:
    """The innermost scope decides; leaving it brings back the one around it."""
    seen = []
    with lab.db.replica():
        seen.append(lab.read())
        with lab.db.primary():
            seen.append(lab.read())
            with lab.db.replica():
                seen.append(lab.read())
            seen.append(lab.read())
        seen.append(lab.read())
    assert seen == [TO_REPLICA, TO_PRIMARY, TO_REPLICA, TO_PRIMARY, TO_REPLICA]


@pytest.mark.parametrize("error", [ValueError("raised inside"), KeyboardInterrupt("raised inside")])
@each_role
def test_exceptions(lab: Lab, role: str, error: BaseException) -> None:
    """An exception leaves the scope as it is, and the scope is over."""
    with pytest.raises(type(error), match="raised inside") as caught, scope_for(lab.db, role):
        raise error
    assert caught.value is error
    assert lab.read() == BY_DEFAULT


@each_role
def test_decorator(lab: Lab, role: str) -> None:
    """A decorated function runs in the scope each time; what it is called and gives is the same."""

    @scope_for(lab.db, role)
    def view(first: int, *, second: int) -> tuple[int, int, Route]:
        """What it does."""
        return first, second, lab.read()

    assert (view.__name__, view.__doc__) == ("view", "What it does.")
    assert lab.read() == BY_DEFAULT
    assert [view(1, second=2), view(3, second=4)] == [
        (1, 2, ROUTE_OF[role]),
        (3, 4, ROUTE_OF[role]),
    ]
    assert lab.read() == BY_DEFAULT


@each_role
def test_decorator_and_exceptions(lab: Lab, role: str) -> None:
    """When a decorated function raises, its scope is over."""

    @scope_for(lab.db, role)
    def view() -> None:
        raise ValueError("raised inside")

    with pytest.raises(ValueError, match="raised inside"):
        view()
    assert lab.read() == BY_DEFAULT


def test_recursion(lab: Lab) -> None:
    """A decorated function may call itself: the scope ends with the outermost call."""

    @lab.db.replica()
    def view(depth: int) -> list[Route]:
        return [lab.read(), *(view(depth - 1) if depth else []), lab.read()]

    assert view(3) == [TO_REPLICA] * 8
    assert lab.read() == BY_DEFAULT


@each_role
def test_decorator_of_a_coroutine(lab: Lab, role: str) -> None:
    """A decorated coroutine function stays one, and is in the scope also after it has waited."""

    @scope_for(lab.db, role)
    async def view(argument: int) -> list[t.Any]:
        seen = [lab.read()]
        await asyncio.sleep(0)
        return [argument, *seen, lab.read()]

    async def main() -> list[t.Any]:
        waiting = view(7)
        return [lab.read(), *(await waiting), lab.read()]

    assert inspect.iscoroutinefunction(view)
    assert asyncio.run(main()) == [BY_DEFAULT, 7, ROUTE_OF[role], ROUTE_OF[role], BY_DEFAULT]


@each_role
def test_decorator_of_a_generator(lab: Lab, role: str) -> None:
    """The body of a decorated generator function runs in the scope, and its consumer does not."""

    @scope_for(lab.db, role)
    def rows() -> t.Iterator[Route]:
        yield lab.read()
        yield lab.read()

    seen = []
    for route in rows():
        seen += [route, lab.read()]
    assert seen == [ROUTE_OF[role], BY_DEFAULT] * 2


@each_role
def test_decorator_of_an_asynchronous_generator(lab: Lab, role: str) -> None:
    """So it is with a decorated asynchronous generator function."""

    @scope_for(lab.db, role)
    async def rows() -> t.AsyncIterator[Route]:
        yield lab.read()
        await asyncio.sleep(0)
        yield lab.read()

    async def main() -> list[Route]:
        seen = []
        async for route in rows():
            seen += [route, lab.read()]
        return seen

    assert asyncio.run(main()) == [ROUTE_OF[role], BY_DEFAULT] * 2


@each_role
def test_a_generator_all_ways(lab: Lab, role: str) -> None:
    """A decorated generator is in the scope whichever way it is resumed, and gives what it gave."""

    @scope_for(lab.db, role)
    def talk() -> t.Generator[t.Any, t.Any, str]:
        sent = yield lab.read()
        try:
            yield sent, lab.read()
        except ValueError as error:
            yield str(error), lab.read()
        return "returned"

    talking = talk()
    seen = [next(talking), talking.send("sent"), talking.throw(ValueError("thrown"))]
    assert seen == [ROUTE_OF[role], ("sent", ROUTE_OF[role]), ("thrown", ROUTE_OF[role])]
    with pytest.raises(StopIteration, match="returned"):
        next(talking)
    assert lab.read() == BY_DEFAULT


@each_role
def test_an_asynchronous_generator_all_ways(lab: Lab, role: str) -> None:
    """So it is with a decorated asynchronous generator."""

    @scope_for(lab.db, role)
    async def talk() -> t.AsyncGenerator[t.Any, t.Any]:
        sent = yield lab.read()
        try:
            yield sent, lab.read()
        except ValueError as error:
            yield str(error), lab.read()

    async def main() -> list[t.Any]:
        talking = talk()
        seen = [await talking.__anext__(), await talking.asend("sent")]
        seen.append(await talking.athrow(ValueError("thrown")))
        with pytest.raises(StopAsyncIteration, match=r"^$"):
            await talking.__anext__()
        return seen

    seen = asyncio.run(main())
    assert seen == [ROUTE_OF[role], ("sent", ROUTE_OF[role]), ("thrown", ROUTE_OF[role])]
    assert lab.read() == BY_DEFAULT


def test_closing_a_generator(lab: Lab) -> None:
    """A decorated generator that is left early is closed at once, and cleans up in the scope."""
    seen = []

    @lab.db.replica()
    def rows() -> t.Iterator[int]:
        try:
            yield 1
        finally:
            seen.append(lab.read())

    @lab.db.replica()
    async def async_rows() -> t.AsyncGenerator[int, None]:
        try:
            yield 1
        finally:
            seen.append(lab.read())

    async def leave_early() -> None:
        generator = async_rows()
        await generator.__anext__()
        await generator.aclose()

    generator = t.cast("t.Generator[int, None, None]", rows())
    next(generator)
    generator.close()
    asyncio.run(leave_early())
    assert seen == [TO_REPLICA, TO_REPLICA]
    assert lab.read() == BY_DEFAULT


def test_a_scope_inside_a_generator(lab: Lab) -> None:
    """What a decorated generator enters is its own: it is innermost again when the generator is
    resumed, its consumer never sees it, and it ends with the generator."""
    seen: list[Route] = []

    @lab.db.replica()
    def rows() -> t.Iterator[None]:
        with lab.db.primary(), lab.db.replica("orders"):
            yield
            seen.extend(lab.read(bind_key) for bind_key in BINDS)
            yield

    @lab.db.replica()
    async def async_rows() -> t.AsyncGenerator[None, None]:
        with lab.db.primary(), lab.db.replica("orders"):
            yield
            seen.extend(lab.read(bind_key) for bind_key in BINDS)
            yield

    async def consume() -> None:
        generator = async_rows()
        async for _ in generator:
            seen.append(lab.read())
        await generator.aclose()

    for _ in rows():
        seen.append(lab.read())
    asyncio.run(consume())
    assert seen == [BY_DEFAULT, TO_PRIMARY, TO_REPLICA, BY_DEFAULT] * 2
    assert lab.read() == BY_DEFAULT


def test_an_exception_in_a_generator(lab: Lab) -> None:
    """What a decorated generator raises reaches its consumer, and the scope is over."""

    @lab.db.replica()
    def rows() -> t.Iterator[int]:
        yield 1
        raise ValueError("raised inside")

    generator = rows()
    next(generator)
    with pytest.raises(ValueError, match="raised inside"):
        next(generator)
    assert lab.read() == BY_DEFAULT


def test_kind_of_a_decorated_generator(lab: Lab) -> None:
    """What is decorated says of itself what it is, as for a web framework that looks at it."""

    def rows() -> t.Iterator[int]:
        yield 1

    async def async_rows() -> t.AsyncIterator[int]:
        yield 1

    assert lab.db.primary()(rows).__name__ == "rows"
    assert inspect.isgenerator(lab.db.primary()(rows)())
    assert inspect.isasyncgen(lab.db.primary()(async_rows)())


def test_a_decorated_view(tmp_path: Path) -> None:
    """``@db.primary()`` on a view: what a real GET reads there comes from the primary."""
    lab = Lab(tmp_path)

    def read() -> str:
        return " ".join(lab.read())

    lab.app.add_url_rule("/", "plain", read)
    lab.app.add_url_rule("/fresh", "fresh", lab.db.primary()(read))
    client = lab.app.test_client()
    texts = [client.get(path).text for path in ("/", "/fresh", "/")]
    assert texts == ["replica read", "primary scope", "replica read"]
    lab.dispose()


def test_an_object_again(lab: Lab) -> None:
    """One scope object can be entered again, also inside itself, any number of times."""
    scope = lab.db.replica()
    seen = []
    for _ in range(2):
        with scope:
            with lab.db.primary():
                with scope:
                    seen.append(lab.read())
                seen.append(lab.read())
            seen.append(lab.read())
        seen.append(lab.read())
    assert seen == [TO_REPLICA, TO_PRIMARY, TO_REPLICA, BY_DEFAULT] * 2


def test_other_threads(lab: Lab) -> None:
    """A scope is not seen in other threads that run meanwhile."""
    with lab.db.replica(), ThreadPoolExecutor(1) as executor:
        elsewhere = executor.submit(in_context, lab, lab.read).result()
        here = lab.read()
    assert (elsewhere, here) == (BY_DEFAULT, TO_REPLICA)


def test_one_object_in_many_threads(lab: Lab) -> None:
    """Threads that share one scope object are in it each for itself."""
    scope, count = lab.db.replica(), 4
    barrier = threading.Barrier(count, timeout=30)

    def work(index: int) -> list[Route]:
        seen = []
        for turn in range(count):
            barrier.wait()
            with scope if turn == index else contextlib.nullcontext():
                barrier.wait()
                seen.append(lab.read())
                barrier.wait()
        return seen

    with ThreadPoolExecutor(count) as executor:
        results = list(
            executor.map(lambda index: in_context(lab, lambda: work(index)), range(count))
        )
    assert results == [
        [TO_REPLICA if turn == index else BY_DEFAULT for turn in range(count)]
        for index in range(count)
    ]


def in_context(lab: Lab, work: t.Callable[[], t.Any]) -> t.Any:
    with lab.app.app_context():
        return work()


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("roles", "left"),
    [
        (("replica", "primary"), (TO_PRIMARY, TO_REPLICA)),
        (("primary", "replica"), (TO_REPLICA, TO_PRIMARY)),
        (("replica", "replica"), (TO_REPLICA, TO_REPLICA)),
    ],
)
def test_generators_in_odd_order(
    lab: Lab, roles: tuple[str, str], left: tuple[Route, Route], first: int
) -> None:
    """Scopes held by generators may end in any order: each takes away its own, and no other's."""

    def held(role: str) -> t.Iterator[None]:
        with scope_for(lab.db, role):
            yield

    generators = [t.cast(t.Any, held(role)) for role in roles]
    for generator in generators:
        next(generator)
    assert lab.read() == ROUTE_OF[roles[1]]
    generators[first].close()
    assert lab.read() == left[first]
    generators[1 - first].close()
    assert lab.read() == BY_DEFAULT


def test_left_elsewhere(lab: Lab) -> None:
    """A scope that is left where it was never entered takes nothing away there, and raises not."""
    scope = lab.db.replica()
    contextvars.copy_context().run(scope.__enter__)
    with lab.db.primary():
        scope.__exit__(None, None, None)
        assert lab.read() == TO_PRIMARY
    assert lab.read() == BY_DEFAULT


def test_tasks(lab: Lab) -> None:
    """Tasks that take turns are in their own scopes only."""

    async def work(role: str | None, turns: int) -> list[Route]:
        with scope_for(lab.db, role) if role else contextlib.nullcontext():
            seen = []
            for _ in range(turns):
                await asyncio.sleep(0)
                seen.append(lab.read())
        await asyncio.sleep(0)
        return [*seen, lab.read()]

    async def main() -> list[list[Route]]:
        tasks = work("replica", 3), work("primary", 4), work(None, 5)
        return list(await asyncio.gather(*tasks))

    assert asyncio.run(main()) == [
        [TO_REPLICA] * 3 + [BY_DEFAULT],
        [TO_PRIMARY] * 4 + [BY_DEFAULT],
        [BY_DEFAULT] * 6,
    ]


def test_tasks_inherit(lab: Lab) -> None:
    """A task starts in the scopes of whoever has made it, and goes on when those are left."""

    async def child(go: asyncio.Event) -> list[Route]:
        await go.wait()
        seen = [lab.read()]
        with lab.db.primary():
            seen.append(lab.read())
            await asyncio.sleep(0)
        return [*seen, lab.read()]

    async def main() -> tuple[list[Route], list[Route]]:
        go = asyncio.Event()
        with lab.db.replica():
            task = asyncio.create_task(child(go))
            await asyncio.sleep(0)
        go.set()
        await asyncio.sleep(0)
        mine = [lab.read()]
        return await task, [*mine, lab.read()]

    assert asyncio.run(main()) == (
        [TO_REPLICA, TO_PRIMARY, TO_REPLICA],
        [BY_DEFAULT, BY_DEFAULT],
    )


@each_role
def test_unknown_bind(lab: Lab, role: str) -> None:
    """A bind key that is not there is an error that names the nearest, and nothing is entered."""
    scope = scope_for(lab.db, role, "order")  # no app yet, perhaps: it is not looked up here
    with pytest.raises(UnknownBindError, match="'order'") as caught:
        scope.__enter__()
    assert str(caught.value) == (
        "Bind key 'order' is not in 'SQLALCHEMY_BINDS' config. Did you mean 'orders'?"
        " The current app has: None, 'orders'."
    )
    assert lab.db.scopes.get() == ()
    assert lab.read() == BY_DEFAULT


def test_unknown_bind_of_a_decorator(lab: Lab) -> None:
    """A decorated function with an unknown bind key raises when it is called, and is not run."""
    ran = []

    @lab.db.primary("orders", "nope")
    def function() -> None:
        ran.append(1)

    with pytest.raises(UnknownBindError, match="'nope'"):
        function()
    assert ran == []


def test_without_a_context(module_lab: Lab) -> None:
    """A scope may be entered before there is a context; it is about the contexts inside it."""
    with module_lab.db.replica("orders"), module_lab.app.app_context():
        assert [module_lab.read(bind_key) for bind_key in BINDS] == [BY_DEFAULT, TO_REPLICA]


@pytest.mark.parametrize(
    ("bind_keys", "routes"),
    [
        ((), [TO_REPLICA, TO_REPLICA]),
        ((None,), [TO_REPLICA, BY_DEFAULT]),
        (("orders",), [BY_DEFAULT, TO_REPLICA]),
        ((None, "orders"), [TO_REPLICA, TO_REPLICA]),
    ],
)
def test_bind_keys(lab: Lab, bind_keys: tuple[str | None, ...], routes: list[Route]) -> None:
    """A scope with bind keys is about these binds and no others."""
    with lab.db.replica(*bind_keys):
        assert [lab.read(bind_key) for bind_key in BINDS] == routes


def test_bind_keys_nested(lab: Lab) -> None:
    """Each bind looks at the innermost scope that is about it."""
    seen = []
    with lab.db.replica(), lab.db.primary("orders"):
        seen.append([lab.read(bind_key) for bind_key in BINDS])
        with lab.db.primary(None):
            seen.append([lab.read(bind_key) for bind_key in BINDS])
        with lab.db.replica("orders"):
            seen.append([lab.read(bind_key) for bind_key in BINDS])
        with lab.db.replica():
            seen.append([lab.read(bind_key) for bind_key in BINDS])
    assert seen == [
        [TO_REPLICA, TO_PRIMARY],
        [TO_PRIMARY, TO_PRIMARY],
        [TO_REPLICA, TO_REPLICA],
        [TO_REPLICA, TO_REPLICA],
    ]


def test_two_extensions(lab: Lab, tmp_path: Path) -> None:
    """Two ``CommonDB`` objects do not see each other's scopes, also when their contexts nest."""
    other = Lab(tmp_path)
    with lab.db.replica(), other.app.app_context():
        assert other.read() == BY_DEFAULT
        with other.db.primary(), lab.app.app_context():
            assert lab.read() == TO_REPLICA
    other.dispose()


def test_text(lab: Lab) -> None:
    """In a replica scope ``text()`` is taken at its word; elsewhere it keeps to the primary."""
    text = sa.text("SELECT 7")
    with lab.db.replica():
        inside = lab.routed(lambda: lab.db.session.scalar(text))
    outside = lab.routed(lambda: lab.db.session.scalar(text))
    with lab.db.replica():
        pinned = lab.routed(lambda: lab.db.session.scalar(text))
    assert (inside, outside, pinned) == (
        (7, TO_REPLICA),
        (7, ("primary", "unknown_sql")),
        (7, ("primary", "unknown_sql")),
    )


def test_text_that_writes(lab: Lab) -> None:
    """A ``text()`` that writes in a replica scope is refused by the replica itself."""
    with (
        lab.db.replica(),
        pytest.raises(sa.exc.OperationalError, match="readonly database"),
    ):
        lab.db.session.execute(sa.text("INSERT INTO item DEFAULT VALUES"))
    lab.db.session.rollback()
    assert lab.count(None) == 0


def test_after_a_write(lab: Lab) -> None:
    """What was written is read back, whatever scope says otherwise; other binds are not held."""
    with lab.db.replica():
        lab.db.session.execute(sa.insert(lab.tables[None]))
        assert lab.routed(lambda: lab.count(None)) == (1, ("primary", "write"))
        assert lab.routed(lambda: lab.count("orders")) == (0, TO_REPLICA)
        lab.db.session.rollback()
        assert lab.read() == ("primary", "write")


# --- Any program ---------------------------------------------------------------------------------


class Stop(Exception):
    """Raised by a program, and caught by it some scopes further out."""


#: One step: its name and what it takes. Some have steps of their own inside.
Step = tuple[t.Any, ...]

#: A part of a program that runs until a ``pause``, and goes on later. Each block has one.
Body = t.Generator[None, None, None]

bind_keys = st.sampled_from(BINDS)
roles = st.sampled_from(["primary", "replica"])
some_bind_keys = st.sets(bind_keys).map(frozenset)
slots = st.integers(0, 1)
steps = st.deferred(lambda: st.lists(step, max_size=5))
step: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.just("read"), bind_keys),
    st.tuples(st.just("write"), bind_keys),
    st.tuples(st.just("lock"), bind_keys),
    st.tuples(st.just("text")),
    st.tuples(st.just("commit")),
    st.tuples(st.just("rollback")),
    st.tuples(st.just("stop")),
    st.tuples(st.just("attempt"), steps),
    st.tuples(st.sampled_from(["with", "decorator"]), roles, some_bind_keys, steps),
    st.tuples(
        st.just("start"), slots, st.sampled_from(["generator", "task", "thread", "greenlet"]), steps
    ),
    st.tuples(st.just("start"), slots, st.just("decorated"), steps, roles, some_bind_keys),
    st.tuples(st.just("resume"), slots),
)


class Model:
    """What the rules say, in the simplest way: a stack of scopes and two facts for each bind."""

    def __init__(self, method: str | None) -> None:
        self.method = method
        self.scopes: list[Scope] = []
        self.pinned: dict[str | None, str] = {}
        self.committed = dict.fromkeys(BINDS, 0)
        self.rows = dict.fromkeys(BINDS, 0)

    def task(self) -> Model:
        """A task is in the same unit of work, and goes on by itself from the scopes it finds."""
        model = copy.copy(self)
        model.scopes = self.scopes[:]
        return model

    def stranger(self) -> Model:
        """A thread or a greenlet has a unit of its own, which sees only what is committed."""
        model = Model(None)
        model.committed = model.rows = self.committed
        return model

    def enter(self, *scopes: Scope) -> None:
        self.scopes += scopes

    def leave(self, scope: Scope) -> None:
        if scope in self.scopes:  # not if it was entered by a generator elsewhere
            self.scopes.remove(scope)

    def suspend(self, scope: Scope) -> list[Scope]:
        """A decorated generator takes its scope away, and those inside it; returns the latter."""
        place = self.scopes.index(scope)
        _, *inside = self.scopes[place:]
        del self.scopes[place:]
        return inside

    def scope(self, bind_key: str | None) -> str | None:
        about = [
            scope for scope in self.scopes if not scope.bind_keys or bind_key in scope.bind_keys
        ]
        return about[-1].role if about else None

    def route(self, bind_key: str | None, not_read: str | None = None) -> Route:
        """Where a statement must go."""
        if not_read is not None:
            self.pinned.setdefault(bind_key, not_read)
        if bind_key in self.pinned:
            return "primary", self.pinned[bind_key]
        scope = self.scope(bind_key)
        if scope is not None:
            return scope, "scope"
        if self.method is None:
            return BY_DEFAULT
        return ("replica", "read") if self.method == "GET" else ("primary", "method")


class Program:
    """Runs steps on the real thing and on the model, and compares after each.

    Steps run as a generator, so that one that pauses can be resumed in whatever way there is.
    """

    def __init__(self, lab: Lab, model: Model) -> None:
        self.lab = lab
        self.model = model
        self.session = lab.db.session
        self.flows: dict[int, Flow] = {}

    def play(self, steps: list[Step]) -> Body:
        """Run the whole program. What it has started and not finished is left half-way."""
        try:
            yield from self.do_attempt(steps)
        finally:
            for flow in self.flows.values():
                flow.close()

    def run(self, steps: list[Step]) -> Body:
        for name, *arguments in steps:
            if name == "pause":
                yield
            else:
                yield from getattr(self, f"do_{name.replace('with', 'scope')}")(*arguments) or ()
            self.compare()

    def compare(self) -> None:
        entered = [(scope.role, scope.bind_keys) for scope in self.lab.db.scopes.get()]
        assert entered == [(scope.role, scope.bind_keys) for scope in self.model.scopes]

    def do_read(self, bind_key: str | None) -> None:
        expected = (self.model.rows[bind_key], self.model.route(bind_key))
        assert self.lab.routed(lambda: self.lab.count(bind_key)) == expected

    def do_write(self, bind_key: str | None) -> None:
        if self.model.rows is self.model.committed:  # a stranger would wait for SQLite's lock
            return
        expected = self.model.route(bind_key, "write")
        insert = sa.insert(self.lab.tables[bind_key])
        assert self.lab.routed(lambda: self.session.execute(insert))[1] == expected
        self.model.rows[bind_key] += 1

    def do_lock(self, bind_key: str | None) -> None:
        expected = self.model.route(bind_key, "locked")
        select = sa.select(self.lab.tables[bind_key].c.id).with_for_update()
        ids, route = self.lab.routed(lambda: self.session.scalars(select).all())
        assert (len(ids), route) == (self.model.rows[bind_key], expected)

    def do_text(self) -> None:
        at_its_word = self.model.scope(None) == "replica"
        expected = self.model.route(None, None if at_its_word else "unknown_sql")
        text = sa.text("SELECT COUNT(*) FROM item")
        result = self.lab.routed(lambda: self.session.scalar(text))
        assert result == (self.model.rows[None], expected)

    def do_commit(self) -> None:
        self.session.commit()
        self.model.committed.update(self.model.rows)

    def do_rollback(self) -> None:
        self.session.rollback()
        self.model.rows.update(self.model.committed)

    def do_stop(self) -> None:
        raise Stop

    def do_attempt(self, steps: list[Step]) -> Body:
        with contextlib.suppress(Stop):
            yield from self.run(steps)

    def do_scope(self, role: str, about: frozenset[str | None], steps: list[Step]) -> Body:
        scope = scope_for(self.lab.db, role, *about)
        with scope:
            self.model.enter(scope)
            try:
                yield from self.run([("pause",), *steps])
            finally:
                self.model.leave(scope)

    def do_decorator(self, role: str, about: frozenset[str | None], steps: list[Step]) -> None:
        scope = scope_for(self.lab.db, role, *about)

        @scope
        def function() -> None:
            self.model.enter(scope)
            try:
                for _ in self.run(steps):
                    pass
            finally:
                self.model.leave(scope)

        function()

    def do_start(self, slot: int, kind: str, steps: list[Step], *scope: t.Any) -> None:
        if kind == "task" and asyncio._get_running_loop() is not None:  # tasks do not start tasks
            return
        if slot in self.flows:
            self.flows.pop(slot).close()
        self.flows[slot] = getattr(self, f"start_{kind}")(steps, *scope)
        self.flows[slot].resume()

    def do_resume(self, slot: int) -> None:
        if slot in self.flows:
            self.flows[slot].resume()

    def start_generator(self, steps: list[Step]) -> Flow:
        return Flow(Program(self.lab, self.model).play(steps))

    def start_decorated(self, steps: list[Step], role: str, about: frozenset[str | None]) -> Flow:
        scope = scope_for(self.lab.db, role, *about)
        body = Program(self.lab, self.model).play(steps)
        inside: list[Scope] = []

        @contextlib.contextmanager
        def turn() -> t.Iterator[None]:
            self.model.enter(scope, *inside)
            try:
                yield
            finally:
                inside[:] = self.model.suspend(scope)

        @scope
        def generator() -> Body:
            try:
                while True:
                    with turn():
                        if next(body, "end") == "end":
                            return
                    yield
            finally:
                with turn():
                    body.close()

        return Flow(generator())

    def start_task(self, steps: list[Step]) -> Flow:
        return TaskFlow(Program(self.lab, self.model.task()).play(steps))

    def start_thread(self, steps: list[Step]) -> Flow:
        return ThreadFlow(self.stranger(steps))

    def start_greenlet(self, steps: list[Step]) -> Flow:
        return GreenletFlow(self.stranger(steps))

    def stranger(self, steps: list[Step]) -> Body:
        """In a context of its own, entered where it runs."""
        with self.lab.app.app_context():
            yield from Program(self.lab, self.model.stranger()).play(steps)


class Flow:
    """A body that is resumed until its next pause, and may be left there. This is a generator."""

    def __init__(self, body: Body) -> None:
        self.body = body

    def resume(self) -> None:
        next(self.body, None)

    def close(self) -> None:
        self.body.close()


class ThreadFlow(Flow):
    def __init__(self, body: Body) -> None:
        super().__init__(body)
        self.executor = ThreadPoolExecutor(1)

    def resume(self) -> None:
        self.executor.submit(super().resume).result()

    def close(self) -> None:
        with self.executor:
            self.executor.submit(super().close).result()


class GreenletFlow(Flow):
    def __init__(self, body: Body) -> None:
        super().__init__(body)
        self.greenlet = greenlet.greenlet(self.work)

    def work(self) -> None:
        with contextlib.closing(self.body):
            for _ in self.body:
                greenlet.getcurrent().parent.switch()

    def resume(self) -> None:
        if not self.greenlet.dead:
            self.greenlet.switch()

    def close(self) -> None:
        self.greenlet.throw(greenlet.GreenletExit)


class TaskFlow(Flow):
    def __init__(self, body: Body) -> None:
        super().__init__(body)
        self.loop = asyncio.new_event_loop()
        self.task = self.loop.create_task(self.work())

    async def work(self) -> None:
        with contextlib.closing(self.body):
            for _ in self.body:
                await asyncio.sleep(0)

    def resume(self) -> None:
        self.loop.call_soon(self.loop.stop)  # after one turn of each task
        self.loop.run_forever()

    def close(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            self.loop.run_until_complete(self.task)
        self.loop.close()


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([None, "GET", "POST"]), st.lists(step, max_size=15))
def test_any_program(module_lab: Lab, method: str | None, steps: list[Step]) -> None:
    """Whatever is entered, left, raised, written, committed, undone, or half done by generators,
    threads, greenlets and tasks: each statement goes where the rules say, and every read sees what
    its unit of work has written."""

    def context() -> t.Any:
        if method is None:
            return module_lab.app.app_context()
        return module_lab.app.test_request_context(method=method)

    with context(), module_lab.db.transaction() as session:
        for table in module_lab.tables.values():
            session.execute(sa.delete(table))
    model = Model(method)
    with context():
        for _ in Program(module_lab, model).play(steps):
            pass
    assert model.scopes == []
    assert module_lab.db.scopes.get() == ()
    with module_lab.app.app_context():
        counts = {bind_key: module_lab.count(bind_key) for bind_key in BINDS}
        assert counts == model.committed


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["enter", "leave"]), st.integers(0, 3)), min_size=6, max_size=25
    )
)
def test_any_order(module_lab: Lab, moves: list[tuple[str, int]]) -> None:
    """Scopes that are left in any order, or never entered, leave those of the others in place."""
    db = module_lab.db
    scopes = [db.primary(), db.replica(), db.primary("orders"), db.replica(None)]
    entered: list[Scope] = []

    def play() -> None:
        for move, index in moves:
            scope = scopes[index]
            if move == "enter":
                scope.__enter__()
                entered.append(scope)
            else:
                scope.__exit__(None, None, None)
                if scope in entered:
                    last = len(entered) - 1 - entered[::-1].index(scope)
                    del entered[last]
            for bind_key in BINDS:
                about = [s for s in entered if not s.bind_keys or bind_key in s.bind_keys]
                expected = ROUTE_OF[about[-1].role] if about else BY_DEFAULT
                assert module_lab.read(bind_key) == expected

    with module_lab.app.app_context():
        contextvars.copy_context().run(play)
