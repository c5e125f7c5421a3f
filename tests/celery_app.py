"""A Celery app with tasks that use the database: for workers, and for the tests that ask them.

This module owns what a worker needs. As that is a process of its own, the environment says where:
the URL of a MariaDB database with a table ``post``, and a directory for messages and results.
Without these it must do nothing.
"""

from __future__ import annotations

import os
import tempfile
import typing as t
from pathlib import Path

import sqlalchemy as sa
import sqlalchemy.orm as so
from celery import Celery
from flask import Flask
from kombu.transport import filesystem

from flask_commondb import CommonDB


class Base(so.DeclarativeBase):
    pass


db = CommonDB(model_class=Base)


class Post(db.Model):  # type: ignore[name-defined, misc]
    id: so.Mapped[int] = so.mapped_column(primary_key=True)
    title: so.Mapped[str] = so.mapped_column(sa.String(50))


_base: t.Any = filesystem.Channel  # has no types


class Channel(_base):  # type: ignore[misc]
    """Its messages are there when they are complete; kombu's own may be taken, and lost, before."""

    def _put(self, queue: str, payload: t.Any, **kwargs: t.Any) -> None:
        with tempfile.TemporaryDirectory(dir=Path(self.data_folder_in).parent) as folder:
            self.data_folder_out = folder
            super()._put(queue, payload, **kwargs)
            for message in Path(folder).iterdir():
                message.rename(Path(self.data_folder_in, message.name))


filesystem.Transport.Channel = Channel


def make_celery(directory: Path) -> Celery:
    """A Celery app that needs no broker but a directory."""
    for name in ("messages", "control", "results"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    celery = Celery("tests", set_as_current=False)
    celery.conf.update(
        broker_url="filesystem://",
        broker_transport_options={
            "data_folder_in": f"{directory}/messages",
            "control_folder": f"{directory}/control",
            "polling_interval": 0.02,
        },
        result_backend=f"file://{directory}/results",
        worker_enable_remote_control=False,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=False,
    )
    return celery


def add_tasks(celery: Celery) -> None:
    @celery.task(name="who")  # type: ignore[untyped-decorator]
    def who() -> tuple[int, t.Any]:
        """The process, and what the server calls its connection."""
        return os.getpid(), db.session.scalars(sa.select(sa.func.connection_id())).one()

    @celery.task(name="add")  # type: ignore[untyped-decorator]
    def add(title: str) -> tuple[int, list[str]]:
        """Add a post; what the session had been told before."""
        before = list(db.session.info)
        db.session.info["title"] = title
        with db.transaction() as session:
            session.add(Post(title=title))
        return os.getpid(), before

    @celery.task(name="fail")  # type: ignore[untyped-decorator]
    def fail(title: str) -> None:
        """Write, and fail with the process's number while a transaction is open."""
        db.session.info["title"] = title
        db.session.add(Post(title=title))
        db.session.flush()
        raise ValueError(f"{os.getpid()}")

    @celery.task(name="retry", bind=True, max_retries=5)  # type: ignore[untyped-decorator]
    def retry(task: t.Any, title: str) -> tuple[int, list[str]]:
        """Succeed at the third attempt; each writes, and says what it has found."""
        found = [*db.session.info, *db.session.scalars(sa.select(Post.title))]
        db.session.info["title"] = title
        db.session.add(Post(title=title))
        db.session.flush()
        if task.request.retries < 2:
            raise task.retry(countdown=0)
        db.session.commit()
        return task.request.retries, found


def make_app(url: str) -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    db.init_app(app)
    return app


if "COMMONDB_TEST_CELERY" in os.environ:  # set for a worker
    celery = make_celery(Path(os.environ["COMMONDB_TEST_CELERY"]))
    app = make_app(os.environ["COMMONDB_TEST_URL"])
    add_tasks(celery)
    db.init_celery(celery, app)
    with app.app_context():  # a connection that the worker's children must leave alone
        db.session.execute(sa.select(Post))
