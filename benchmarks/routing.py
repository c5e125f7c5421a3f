"""What routing costs a statement, beside a bare override of ``get_bind``.

Run as ``python -m benchmarks.routing [rounds]``. The bare override is the recipe that is found
everywhere: a read goes to a random replica's engine, all else to the primary's. It knows neither
units of work nor dead or late replicas. The variants take turns, some statements each; the table
has the medians of the rounds, and of the differences to the bare override in the same round.
Commands on the wire are counted by proxies, with no clock.

Owns: the variants and the tables. Must not: assert anything.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import sys
import time
import typing as t

import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.session import Session

from flask_commondb import CommonDB
from tests.proxy import Proxy
from tests.servers import MariaDBCluster

#: Statements of a variant before it is the next one's turn.
TURN = 200

Work = t.Callable[[], object]


def main(rounds: int) -> None:
    """Measure and print."""
    with MariaDBCluster() as cluster, contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(Proxy(server.port)) for server in cluster.servers]
        direct = [server.url() for server in cluster.servers]
        behind = [sa.make_url(url).set(port=p.port) for url, p in zip(direct, proxies, strict=True)]
        with make_variants(direct)["bare get_bind"]() as work:
            cluster.primary.execute("INSERT INTO post (title) VALUES ('first')", database="app")
        cluster.sync()
        measure("from a statement to its connection", make_variants(direct, alone=True), rounds)
        measure("a SELECT in a unit of work", make_variants(direct), rounds)
        print("\ncommands of ten SELECTs in a unit of work")
        for name, variant in make_variants(behind).items():
            with variant() as work:
                for _ in range(20):  # connections are made
                    work()
            with variant() as work:
                work()
                for proxy in proxies:
                    proxy.clear()
                for _ in range(10):
                    work()
                counts = [len(proxy.commands) for proxy in proxies]
            print(f"  {name:36} {sum(counts)}, by server {counts}")


def make_variants(
    urls: t.Sequence[t.Any], *, alone: bool = False
) -> dict[str, t.Callable[[], contextlib.AbstractContextManager[Work]]]:
    """By name: a unit of work that is a GET, and in it what is to be measured."""
    primary, *replicas = urls
    variants = {
        "bare get_bind": _bare(primary, replicas),
        "CommonDB, no replicas": _common(primary, []),
        "CommonDB, 2 replicas": _common(primary, replicas),
        "CommonDB, 2 replicas, max_lag=2": _common(primary, replicas, COMMONDB_MAX_LAG=2),
        "CommonDB, 2 replicas, in a scope": _common(primary, replicas, scope=True),
    }
    return {name: _unit(*made, alone=alone) for name, made in variants.items()}


def _bare(primary: t.Any, replicas: t.Sequence[t.Any]) -> tuple[Flask, t.Any, bool]:
    options = {"isolation_level": "AUTOCOMMIT", "connect_args": {"ssl_disabled": True}}
    engines = [sa.create_engine(url, **options) for url in replicas]

    class RoutingSession(Session):
        def get_bind(  # type: ignore[override]
            self, mapper: t.Any = None, clause: t.Any = None, **kwargs: t.Any
        ) -> t.Any:
            if self._flushing or isinstance(clause, sa.UpdateBase):
                return super().get_bind(mapper, clause, **kwargs)
            return random.choice(engines)

    app = _app(primary)
    return app, SQLAlchemy(app, session_options={"class_": RoutingSession}), False


def _common(
    primary: t.Any, replicas: t.Sequence[t.Any], *, scope: bool = False, **config: t.Any
) -> tuple[Flask, t.Any, bool]:
    app = _app(primary)
    app.config.update(COMMONDB_REPLICAS=list(replicas), **config)
    return app, CommonDB(app), scope


def _app(primary: t.Any) -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = primary
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"connect_args": {"ssl_disabled": True}}
    return app


def _unit(
    app: Flask, db: t.Any, scope: bool, *, alone: bool
) -> t.Callable[[], contextlib.AbstractContextManager[Work]]:
    class Post(db.Model):  # type: ignore[misc]
        id = so.mapped_column(sa.Integer, primary_key=True)
        title = so.mapped_column(sa.String(50))

    with app.app_context():
        db.create_all()
    statement = sa.select(Post.id).where(Post.id == 1)

    @contextlib.contextmanager
    def unit() -> t.Iterator[Work]:
        with app.test_request_context(), contextlib.ExitStack() as stack:
            if scope:
                stack.enter_context(db.replica())
            session = db.session()
            if alone:
                yield lambda: session._connection_for_bind(session.get_bind(clause=statement))
            else:
                yield lambda: session.execute(statement).all()

    return unit


def measure(
    title: str,
    variants: dict[str, t.Callable[[], contextlib.AbstractContextManager[Work]]],
    rounds: int,
) -> None:
    """Have the variants take turns, and print microseconds for each statement."""
    medians: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, variant in variants.items():
            with variant() as work:
                work()
                seconds = []
                for _ in range(TURN):
                    start = time.perf_counter()
                    work()
                    seconds.append(time.perf_counter() - start)
            if turn:  # the first one warms up
                medians[name].append(statistics.median(seconds) * 1e6)
    first = next(iter(medians.values()))
    print(f"\n{title:38}     us  more than bare   ratio")
    for name, values in medians.items():
        more = statistics.median(a - b for a, b in zip(values, first, strict=True))
        ratio = statistics.median(a / b for a, b in zip(values, first, strict=True))
        print(f"  {name:36} {statistics.median(values):6.1f}  {more:14.1f}   {ratio:5.2f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
