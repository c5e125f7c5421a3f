"""Whole requests, CommonDB beside Flask-SQLAlchemy and PyMySQL by hand, on one MariaDB cluster.

Run as ``python -m benchmarks.requests [rounds]``. The variants take turns, some requests each, so
that what else the machine does falls on all of them; not request by request, because a server does
not change its program after each. Each round gives a median, and the table shows the median of the
rounds, their least and greatest, and the median of the ratios to the first variant of that round.

Owns: the variants and the table. Must not: assert anything.
"""

from __future__ import annotations

import functools
import statistics
import sys
import threading
import time
import typing as t

import pymysql
import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_commondb import CommonDB
from tests.servers import MariaDBCluster

REQUESTS = 300

#: How many requests a variant makes before it is the next one's turn.
TURN = 20

Client = t.Callable[[], object]


def main(rounds: int) -> None:
    """Measure and print."""
    with MariaDBCluster() as cluster:
        by_mysqlclient = cluster.primary.url().replace("pymysql", "mysqldb")
        apps = make_apps(cluster)
        others = {
            "Flask-SQLAlchemy, mysqlclient": make_app(SQLAlchemy, by_mysqlclient),
            "CommonDB, mysqlclient": make_app(CommonDB, by_mysqlclient),
        }
        cluster.sync()
        for variants in (apps, others):
            for title, method, path in [
                ("GET, no database", "GET", "/nothing"),
                ("GET, one get()", "GET", "/one"),
                ("GET, five selects", "GET", "/five"),
                ("GET, 20 objects of 9 columns", "GET", "/list"),
                ("POST, one INSERT", "POST", "/"),
            ]:
                clients: dict[str, Client] = {
                    name: functools.partial(app.test_client().open, path, method=method)
                    for name, app in variants.items()
                }
                show(title, measure(clients, rounds))


def make_apps(cluster: MariaDBCluster) -> dict[str, Flask]:
    """The same app in each way, on one cluster."""
    url = cluster.primary.url()
    replicas = [replica.url() for replica in cluster.replicas]
    return {
        "Flask-SQLAlchemy": make_app(SQLAlchemy, url),
        "Flask-SQLAlchemy, pre_ping": make_app(SQLAlchemy, url, pre_ping=True),
        "CommonDB": make_app(CommonDB, url),
        "CommonDB, 2 replicas": make_app(CommonDB, url, replicas),
        "PyMySQL by hand": make_app_by_hand(url),
    }


def make_app(
    extension: type[SQLAlchemy],
    url: str,
    replicas: t.Sequence[str] = (),
    pre_ping: bool = False,
) -> Flask:
    """An app with the same views, whatever the extension."""
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
        "pool_pre_ping": pre_ping,
        # A TLS context for each connection would be most of what is measured at the start.
        "connect_args": {"ssl_disabled": True} if "pymysql" in url else {},
    }
    if replicas:
        app.config["COMMONDB_REPLICAS"] = list(replicas)

    class Base(so.DeclarativeBase):
        pass

    db: t.Any = t.cast(t.Any, extension)(app, model_class=Base)

    class Post(db.Model):  # type: ignore[misc]
        id: so.Mapped[int] = so.mapped_column(primary_key=True)
        title: so.Mapped[str] = so.mapped_column(sa.String(50))

    class Order(db.Model):  # type: ignore[misc]
        id: so.Mapped[int] = so.mapped_column(primary_key=True)
        name: so.Mapped[str] = so.mapped_column(sa.String(50), server_default="someone")
        street: so.Mapped[str] = so.mapped_column(sa.String(50), server_default="somewhere")
        note: so.Mapped[str | None] = so.mapped_column(sa.Text)
        is_paid: so.Mapped[bool] = so.mapped_column(server_default=sa.true())
        count: so.Mapped[int] = so.mapped_column(server_default="3")
        price: so.Mapped[t.Any] = so.mapped_column(sa.Numeric(10, 2), server_default="9.99")
        created: so.Mapped[t.Any] = so.mapped_column(sa.DateTime, server_default=sa.func.now())
        changed: so.Mapped[t.Any] = so.mapped_column(sa.DateTime, server_default=sa.func.now())

    with app.app_context():
        db.create_all()
        if db.session.get(Post, 1) is None:
            db.session.add(Post(id=1, title="first"))
            db.session.add_all([Order() for _ in range(20)])
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

    @app.get("/list")
    def list_() -> str:
        return str(sum(order.count for order in db.session.scalars(sa.select(Order).limit(20))))

    @app.post("/")
    def write() -> str:
        db.session.add(Post(title="x"))
        db.session.commit()
        return "ok"

    return app


def make_app_by_hand(url: str) -> Flask:
    """The same views with the least that PyMySQL needs: a connection that each thread keeps open,
    and a rollback so that the next request sees new data."""
    app = Flask(__name__)
    kept = threading.local()
    address = sa.make_url(url)

    def connection() -> t.Any:
        if not hasattr(kept, "connection"):
            kept.connection = pymysql.connect(
                host=address.host,
                port=address.port or 3306,
                user=address.username,
                password=address.password or "",
                database=address.database,
                ssl_disabled=True,
            )
        return kept.connection

    def read(sql: str, *args: t.Any) -> t.Any:
        with connection().cursor() as cursor:
            cursor.execute(sql, args)
            return cursor.fetchall()

    @app.get("/nothing")
    def nothing() -> str:
        return "ok"

    @app.get("/one")
    def one() -> str:
        ((_, title),) = read("SELECT id, title FROM post WHERE id = %s", 1)
        connection().rollback()
        return str(title)

    @app.get("/five")
    def five() -> str:
        titles = [read("SELECT title FROM post WHERE id = %s", 1)[0][0] for _ in range(5)]
        connection().rollback()
        return "".join(titles)

    @app.get("/list")
    def list_() -> str:
        rows = read(
            "SELECT count, id, name, street, note, is_paid, price, created, changed"
            " FROM `order` LIMIT 20"
        )
        connection().rollback()
        return str(sum(row[0] for row in rows))

    @app.post("/")
    def write() -> str:
        with connection().cursor() as cursor:
            cursor.execute("INSERT INTO post (title) VALUES (%s)", ("x",))
        connection().commit()
        return "ok"

    return app


def measure(clients: dict[str, Client], rounds: int) -> dict[str, list[float]]:
    """For each variant the median of each round, in microseconds."""
    medians: dict[str, list[float]] = {name: [] for name in clients}
    for _ in range(rounds + 1):
        times: dict[str, list[float]] = {name: [] for name in clients}
        for _ in range(REQUESTS // TURN):
            for name, request in clients.items():
                for _ in range(TURN):
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
