"""The net under teardown: what was interrupted, and what never came, is closed all the same. I4."""

from __future__ import annotations

import gc
import logging
import threading
import typing as t

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import current_app

from flask_commondb import CommonDB
from flask_commondb.signals import session_close_failed

from .apps import Lab

if t.TYPE_CHECKING:
    from .servers import Database
    from .servers import MariaDBCluster


@pytest.fixture
def lab(mariadb_database: Database[MariaDBCluster]) -> t.Iterator[Lab]:
    """An app on MariaDB, with a replica and a second bind."""
    url = mariadb_database.primary_url
    lab = Lab(url, mariadb_database.replica_urls[:1], config={"SQLALCHEMY_BINDS": {"second": url}})
    with lab.app.app_context():
        lab.db.create_all()
    mariadb_database.sync()
    yield lab
    lab.dispose()


def use_all(lab: Lab) -> None:
    """Have a connection out on each server."""
    with lab.db.replica(None):
        lab.titles()
    lab.db.sessions["second"].execute(sa.text("SELECT 1"))
    lab.db.sessions[None].execute(sa.text("SELECT 1"))


def test_a_context_that_is_never_popped(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """A thread that pushes a context and dies: all is closed when Python frees the context."""

    def work() -> None:
        lab.app.app_context().push()
        use_all(lab)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert lab.checked_out() == 3
    with caplog.at_level(logging.DEBUG):
        gc.collect()
    assert lab.checked_out() == 0
    assert caplog.messages == []
    assert not lab.db.open_contexts


def test_a_context_that_is_dropped(lab: Lab) -> None:
    """A context that is freed without a cycle is closed at once, without the collector."""
    gc.disable()
    try:
        context = lab.app.app_context()
        context.push()
        use_all(lab)
        token = context._cv_tokens.pop()
        token.var.reset(token)  # what pop() does when it was interrupted before its teardown
        assert lab.checked_out() == 3
        del context, token
        assert lab.checked_out() == 0
    finally:
        gc.enable()


def test_what_is_reported_of_a_dropped_context(lab: Lab) -> None:
    """A connection that cannot be closed then is signalled for the app that it belongs to."""
    seen: list[tuple[t.Any, t.Any]] = []

    def note(sender: t.Any, bind_key: str | None, **more: t.Any) -> None:
        seen.append((sender, bind_key))

    def work() -> None:
        lab.app.app_context().push()
        number = lab.db.sessions["second"].scalar(sa.text("SELECT CONNECTION_ID()"))
        with lab.db.engine.connect() as connection:
            connection.execute(sa.text(f"KILL {number}"))

    with session_close_failed.connected_to(note):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        gc.collect()
    assert seen == [(lab.app, "second")]
    assert lab.checked_out() == 0


def test_a_generator_that_ends_in_another_thread(lab: Lab) -> None:
    """A context whose generator is collected elsewhere raises nothing of ours, and is closed."""

    def generate() -> t.Generator[int, None, None]:
        with lab.app.app_context():
            use_all(lab)
            yield 1
            yield 2

    generator = generate()
    thread = threading.Thread(target=next, args=(generator,))
    thread.start()
    thread.join()
    # Flask's own: the context is not this thread's.
    with pytest.raises(LookupError, match=r"flask\.app_ctx"):
        generator.close()
    assert lab.checked_out() == 3
    gc.collect()
    assert lab.checked_out() == 0
    assert not lab.db.open_contexts


def test_an_interrupted_teardown_is_finished(
    mariadb_database: Database[MariaDBCluster],
) -> None:
    """What an interrupt has left open is closed when the next context begins, not by chance."""

    class Interrupted(so.Session):
        """Not ours, so its connections are closed by it alone."""

        times = 0

        def __init__(self, db: CommonDB, **kwargs: t.Any) -> None:
            super().__init__(**kwargs)

        def close(self) -> None:
            self.interrupt()
            super().close()

        def invalidate(self) -> None:
            self.interrupt()
            super().invalidate()

        def interrupt(self) -> None:
            Interrupted.times += 1
            if Interrupted.times <= 2:
                raise KeyboardInterrupt("now")

    url = mariadb_database.primary_url
    lab = Lab(url, session_options={"class_": Interrupted})
    with pytest.raises(KeyboardInterrupt, match="now"), lab.app.app_context():
        lab.db.sessions[None].execute(sa.text("SELECT 1"))
    assert lab.checked_out() == 1
    with lab.app.app_context():
        lab.db.sessions[None]()
        assert lab.checked_out() == 0
    assert not lab.db.open_contexts
    lab.dispose()


def test_a_result_that_was_not_read(lab: Lab) -> None:
    """A session that ends in the middle of a large result does not read the rest of it: its
    connection is thrown away, and the next one is another."""
    number = sa.text("SELECT CONNECTION_ID()")
    large = sa.text("SELECT seq FROM seq_1_to_10000000")
    with lab.app.app_context():
        before = lab.db.sessions["second"].scalar(number)
    with lab.app.app_context():
        session = lab.db.sessions["second"]
        assert session.scalar(number) == before
        result = session.execute(large, execution_options={"stream_results": True})
        assert next(iter(result)) == (1,)
    assert lab.checked_out() == 0
    with lab.app.app_context():
        assert lab.db.sessions["second"].scalar(number) != before


def test_closed_for_each_app(lab: Lab, mariadb_database: Database[MariaDBCluster]) -> None:
    """Two apps on one ``db``: each context closes its own sessions, nested ones too."""
    other = Lab(mariadb_database.primary_url)
    other.app.extensions.pop("sqlalchemy")
    lab.db.init_app(other.app)
    with lab.app.app_context():
        lab.db.sessions[None].execute(sa.text("SELECT 1"))
        with other.app.app_context():
            assert current_app.name == other.app.name
            inner = lab.db.engine
            lab.db.session.execute(sa.text("SELECT 1"))
            assert t.cast(sa.QueuePool, inner.pool).checkedout() == 1
        assert t.cast(sa.QueuePool, inner.pool).checkedout() == 0
        assert lab.checked_out() == 1
    assert lab.checked_out() == 0
    assert not lab.db.open_contexts
    inner.dispose()
    other.dispose()


def test_nothing_is_kept(lab: Lab) -> None:
    """A thousand contexts over two binds leave nothing behind that knows of them."""
    for _ in range(1000):
        with lab.app.app_context():
            lab.db.sessions[None]()
            lab.db.sessions["second"]()
    assert not lab.db.open_contexts
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found).__name__ == "ContextSessions"]
