"""The small app that most tests drive: one model, and a way to ask the server who it is.

Owns: :class:`Lab`. Must not: hold anything between tests.
"""

from __future__ import annotations

import contextlib
import threading
import typing as t
from pathlib import Path

import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask
from werkzeug.test import TestResponse

from flask_commondb import CommonDB
from flask_commondb.signals import routed

#: The function by which a statement has the server say who it is: MariaDB's is made by
#: :func:`can_say_who`, PostgreSQL's is its own.
WHO = {"mysql": "who", "postgresql": "inet_server_port"}


class Lab:
    """A Flask app with ``CommonDB``, one model on the default bind, and its test client.

    :param primary: the default bind's URL.
    :param replicas: its replicas.
    :param config: more of ``app.config``.
    :param arguments: for ``CommonDB``.
    """

    def __init__(
        self,
        primary: str,
        replicas: t.Sequence[t.Any] = (),
        config: t.Mapping[str, t.Any] | None = None,
        **arguments: t.Any,
    ) -> None:
        self.app = Flask(__name__)
        self.app.testing = True
        self.app.config.from_mapping(
            SQLALCHEMY_DATABASE_URI=primary,
            COMMONDB_REPLICAS=list(replicas),
            COMMONDB_READ_FUNCTIONS=list(WHO.values()),
        )
        self.app.config.from_mapping(config or {})

        class Base(so.DeclarativeBase):
            pass

        self.db = CommonDB(self.app, model_class=Base, **arguments)
        with self.app.app_context():
            #: The engines of all servers, primaries first.
            self.engines = [*self.db.engines.values(), *self.db.router.replicas]
        self.who = WHO.get(sa.make_url(primary).get_backend_name(), "")

        class Post(self.db.Model):  # type: ignore[name-defined, misc]
            id: so.Mapped[int] = so.mapped_column(primary_key=True)
            title: so.Mapped[str] = so.mapped_column(sa.String(50))

        self.Post: t.Any = Post

    def read(self) -> int:
        """Read through ``db.session``; returns which server has answered."""
        statement = sa.select(getattr(sa.func, self.who)(), sa.func.count(self.Post.id))
        answer = self.db.session.execute(statement).one()
        return int(answer[0])

    def titles(self) -> list[str]:
        statement = sa.select(self.Post.title).order_by(self.Post.id)
        return list(self.db.session.scalars(statement))

    def run(self, view: t.Callable[[], t.Any], method: str = "GET") -> t.Any:
        """What a view returns when a request of its own runs it; its exception, if it raises."""
        with self.request(method):
            return view()

    @contextlib.contextmanager
    def request(self, method: str = "GET") -> t.Iterator[None]:
        with self.app.test_request_context(method=method):
            yield

    def checked_out(self) -> int:
        """How many connections are out of their pools, on all servers."""
        return sum(t.cast(sa.QueuePool, engine.pool).checkedout() for engine in self.engines)

    @contextlib.contextmanager
    def routes(self) -> t.Iterator[list[tuple[str, str]]]:
        """Collects role and reason of all that is routed inside the block."""
        seen: list[tuple[str, str]] = []

        def note(app: Flask, role: str, reason: str, **_: t.Any) -> None:
            seen.append((role, reason))

        with routed.connected_to(note, self.app):
            yield seen

    def dispose(self) -> None:
        for engine in self.engines:
            engine.dispose()


def lab_with_orders(directory: Path) -> Lab:
    """An app on SQLite with two binds and no replicas; ``Order`` is the model of the second."""
    lab = Lab(
        f"sqlite:///{directory}/default.db",
        config={"SQLALCHEMY_BINDS": {"orders": f"sqlite:///{directory}/orders.db"}},
    )

    class Order(lab.db.Model):  # type: ignore[name-defined, misc]
        __bind_key__ = "orders"
        id: so.Mapped[int] = so.mapped_column(primary_key=True)
        item: so.Mapped[str] = so.mapped_column(sa.String(50), unique=True)

    lab.Order = Order  # type: ignore[attr-defined]
    with lab.app.app_context():
        lab.db.create_all()
    return lab


def can_say_who(database: t.Any) -> None:
    """Give a MariaDB database the function :data:`WHO`."""
    database.execute(
        "CREATE FUNCTION who() RETURNS INT NOT DETERMINISTIC NO SQL RETURN @@server_id"
    )


@contextlib.contextmanager
def busy(threads: int, work: t.Callable[[], object]) -> t.Iterator[None]:
    """Have threads do the same again and again as long as the block lasts; none may fail in it."""
    errors: list[BaseException] = []
    stop = threading.Event()

    def go_on() -> None:
        while not stop.is_set():
            try:
                work()
            except BaseException as error:
                errors.append(error)

    workers = [threading.Thread(target=go_on) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    assert errors == []


def text_of(response: TestResponse) -> str:
    """The body of an answer that must be a 200."""
    assert response.status_code == 200, response.text
    return response.text
