"""The commands that a piece of work sends to its servers once everything is warm.

Run as ``python -m benchmarks.wire``. They are counted by the proxies of ``tests/proxy.py``, one
before each server; ``tests/test_round_trips.py`` holds CommonDB to the numbers.

Owns: the pieces of work and the table. Must not: assert anything, or measure time.
"""

from __future__ import annotations

import contextlib
import typing as t

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_commondb import CommonDB
from tests.proxy import Proxy
from tests.servers import MariaDBCluster

from .requests import make_app
from .requests import make_app_by_hand

#: Requests of the apps of ``benchmarks.requests``.
REQUESTS = {
    "a request without the database": ("GET", "/nothing"),
    "GET, one SELECT": ("GET", "/one"),
    "GET, five SELECTs": ("GET", "/five"),
    "POST, one INSERT": ("POST", "/"),
}

#: Procedures, and how they are called.
PROCEDURES: dict[str, tuple[str, tuple[t.Any, ...]]] = {
    "callproc() with IN, and commit": (
        "CREATE PROCEDURE bench_in(a INT) SELECT a",
        ("bench_in", 1),
    ),
    "callproc() with IN and OUT, and commit": (
        "CREATE PROCEDURE bench_out(a INT, OUT b INT) SET b = a",
        ("bench_out", 1),
    ),
    "callproc() with INOUT, and commit": (
        "CREATE PROCEDURE bench_inout(INOUT a INT) SET a = a + 1",
        ("bench_inout", 1),
    ),
}


def main() -> None:
    """Count and print."""
    with MariaDBCluster() as cluster, contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(Proxy(server.port)) for server in cluster.servers]
        url, *replicas = (
            server.url(port=proxy.port)
            for server, proxy in zip(cluster.servers, proxies, strict=True)
        )
        by_mysqlclient = url.replace("pymysql", "mysqldb")
        apps = {
            "Flask-SQLAlchemy": make_app(SQLAlchemy, url),
            "Flask-SQLAlchemy, pre_ping": make_app(SQLAlchemy, url, pre_ping=True),
            "CommonDB": make_app(CommonDB, url),
            "CommonDB, pre_ping": make_app(CommonDB, url, pre_ping=True),
            "CommonDB, 2 replicas": make_app(CommonDB, url, replicas),
            "CommonDB, mysqlclient": make_app(CommonDB, by_mysqlclient),
            "PyMySQL by hand": make_app_by_hand(url),
        }
        with apps["CommonDB"].app_context():
            session = apps["CommonDB"].extensions["sqlalchemy"].session
            for definition, _ in PROCEDURES.values():
                session.execute(sa.text(definition))
        cluster.sync()
        for title, (method, path) in REQUESTS.items():
            print(f"\n{title}")
            for name, app in apps.items():
                show(name, counted(proxies, request(app, method, path)))
        for title, (_, args) in PROCEDURES.items():
            print(f"\n{title}")
            for name in ("CommonDB", "CommonDB, 2 replicas"):
                show(name, counted(proxies, call(apps[name], args)))


def request(app: Flask, method: str, path: str) -> t.Callable[[], None]:
    """One request, with the end of its context."""
    client = app.test_client()

    def work() -> None:
        assert client.open(path, method=method).status_code == 200

    return work


def call(app: Flask, args: tuple[t.Any, ...]) -> t.Callable[[], None]:
    """One call of a procedure, and the commit of its transaction."""
    db = app.extensions["sqlalchemy"]

    def work() -> None:
        with app.app_context():
            db.callproc(*args)
            db.session.commit()

    return work


def counted(proxies: t.Sequence[Proxy], work: t.Callable[[], None]) -> list[str]:
    """The commands of the work when it has been done some times before."""
    for _ in range(10):
        work()
    for proxy in proxies:
        proxy.catch_up()
        proxy.clear()
    work()
    for proxy in proxies:
        proxy.catch_up()
    return [
        (command.sql or command.name).split()[0].upper()
        for proxy in proxies
        for command in proxy.commands
    ]


def show(name: str, commands: t.Sequence[str]) -> None:
    """Print one row."""
    print(f"  {name:30} {len(commands):3}  {' '.join(commands)}")


if __name__ == "__main__":
    main()
