"""Whole requests, CommonDB beside Flask-SQLAlchemy on the same MariaDB cluster.

Run as ``python -m benchmarks.requests [rounds]``. The variants take turns request by request, so
that what else the machine does falls on all of them; each round gives a median, and the table shows
the median of the rounds and its ratio to Flask-SQLAlchemy's.

Owns: the variants and the table. Must not: assert anything.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
import typing as t

import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_commondb import CommonDB
from tests.servers import MariaDBCluster

REQUESTS = 300

Client = t.Callable[[], object]


def main(rounds: int) -> None:
    """Measure and print."""
    with MariaDBCluster() as cluster:
        url = cluster.primary.url()
        replicas = [replica.url() for replica in cluster.replicas]
        apps = {
            "Flask-SQLAlchemy": make_app(SQLAlchemy, url),
            "Flask-SQLAlchemy, pre_ping": make_app(SQLAlchemy, url, pre_ping=True),
            "CommonDB": make_app(CommonDB, url),
            "CommonDB, 2 replicas": make_app(CommonDB, url, replicas),
        }
        cluster.sync()
        for title, method, path in [
            ("GET, no database", "GET", "/nothing"),
            ("GET, one get()", "GET", "/one"),
            ("GET, five selects", "GET", "/five"),
            ("POST, one INSERT", "POST", "/"),
        ]:
            clients: dict[str, Client] = {
                name: functools.partial(app.test_client().open, path, method=method)
                for name, app in apps.items()
            }
            show(title, measure(clients, rounds))


def make_app(
    extension: type[SQLAlchemy],
    url: str,
    replicas: t.Sequence[str] = (),
    pre_ping: bool = False,
) -> Flask:
    """An app with the same four views, whatever the extension."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
        "pool_pre_ping": pre_ping,
        # A TLS context for each connection would be most of what is measured at the start.
        "connect_args": {"ssl_disabled": True},
    }
    if replicas:
        app.config["COMMONDB_REPLICAS"] = list(replicas)

    class Base(so.DeclarativeBase):
        pass

    db: t.Any = t.cast(t.Any, extension)(app, model_class=Base)

    class Post(db.Model):  # type: ignore[misc]
        id: so.Mapped[int] = so.mapped_column(primary_key=True)
        title: so.Mapped[str] = so.mapped_column(sa.String(50))

    with app.app_context():
        db.create_all()
        if db.session.get(Post, 1) is None:
            db.session.add(Post(id=1, title="first"))
            db.session.commit()

    @app.get("/nothing")
    def nothing() -> str:
        return "ok"

    @app.get("/one")
    def one() -> str:
        return str(db.session.get(Post, 1).title)

    @app.get("/five")
    def five() -> str:
        return "".join(
            db.session.scalars(sa.select(Post.title).where(Post.id == 1)).one() for _ in range(5)
        )

    @app.post("/")
    def write() -> str:
        db.session.add(Post(title="x"))
        db.session.commit()
        return "ok"

    return app


def measure(clients: dict[str, Client], rounds: int) -> dict[str, list[float]]:
    """For each variant the median of each round, in microseconds."""
    medians: dict[str, list[float]] = {name: [] for name in clients}
    for _ in range(rounds + 1):
        times: dict[str, list[float]] = {name: [] for name in clients}
        for _ in range(REQUESTS):
            for name, request in clients.items():
                start = time.perf_counter()
                request()
                times[name].append(time.perf_counter() - start)
        for name, values in times.items():
            medians[name].append(statistics.median(values) * 1e6)
    return {name: values[1:] for name, values in medians.items()}  # the first round warms up


def show(title: str, medians: dict[str, list[float]]) -> None:
    """Print one table."""
    peer = next(iter(medians.values()))
    print(f"\n{title:36}  median us   min   max   ratio")
    for name, values in medians.items():
        ratio = statistics.median(v / p for v, p in zip(values, peer, strict=True))
        print(
            f"  {name:34}  {statistics.median(values):9.0f} {min(values):5.0f}"
            f" {max(values):5.0f}   {ratio:5.2f}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
