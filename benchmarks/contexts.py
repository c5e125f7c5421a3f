"""What a context costs beside plain Flask-SQLAlchemy: an empty one, and one with one query.

Run as ``python -m benchmarks.contexts [rounds]``; on SQLite and on MariaDB. The variants take turns
as in ``benchmarks.requests``, and the tables read the same.

Owns: the variants and the tables. Must not: assert anything.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import typing as t

import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_commondb import CommonDB
from tests.servers import MariaDBCluster

from .requests import Client
from .requests import measure
from .requests import show


def main(rounds: int) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as directory, MariaDBCluster() as cluster:
        for server, url in [
            ("SQLite", f"sqlite:///{directory}/database.db"),
            ("MariaDB", cluster.primary.url()),
        ]:
            users = {
                "Flask-SQLAlchemy": User(SQLAlchemy, url),
                "CommonDB": User(CommonDB, url),
                "CommonDB, leak watch": User(CommonDB, url, {"COMMONDB_LEAK_WATCH": True}),
            }
            for title, name in [
                ("a context, empty", "nothing"),
                ("a context, one get()", "one_get"),
                ("a context, one Core select", "one_select"),
                ("a context, one INSERT", "one_insert"),
            ]:
                clients: dict[str, Client] = {
                    variant: functools.partial(getattr(user, name))
                    for variant, user in users.items()
                }
                show(f"{title}, {server}", measure(clients, rounds))


class User:
    """An app with one model, and what is done in a context."""

    def __init__(
        self, extension: type[SQLAlchemy], url: str, config: t.Mapping[str, t.Any] | None = None
    ) -> None:
        self.app = Flask(__name__)
        self.app.config["SQLALCHEMY_DATABASE_URI"] = url
        if url.startswith("mysql"):
            # A TLS context for each connection would be most of what is measured at the start.
            self.app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"connect_args": {"ssl_disabled": True}}
        self.app.config.from_mapping(config or {})

        class Base(so.DeclarativeBase):
            pass

        self.db: t.Any = t.cast(t.Any, extension)(self.app, model_class=Base)

        class Post(self.db.Model):  # type: ignore[name-defined, misc]
            id: so.Mapped[int] = so.mapped_column(primary_key=True)
            title: so.Mapped[str] = so.mapped_column(sa.String(50))

        self.Post: t.Any = Post
        self.select = sa.select(Post.title).where(Post.id == 1)
        with self.app.app_context():
            self.db.create_all()
            if self.db.session.get(Post, 1) is None:
                self.db.session.add(Post(id=1, title="first"))
                self.db.session.commit()

    def nothing(self) -> None:
        with self.app.app_context():
            pass

    def one_get(self) -> None:
        with self.app.app_context():
            self.db.session.get(self.Post, 1)

    def one_select(self) -> None:
        with self.app.app_context():
            self.db.session.scalar(self.select)

    def one_insert(self) -> None:
        with self.app.app_context():
            self.db.session.add(self.Post(title="x"))
            self.db.session.commit()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
