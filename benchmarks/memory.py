"""How many bytes of Python a session and an app take, CommonDB beside Flask-SQLAlchemy.

Run as ``python -m benchmarks.memory``. As tracemalloc counts them, after a garbage collection; on
SQLite, whose connections are the same for both.

Owns: the variants and the table. Must not: assert anything.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import tracemalloc
import typing as t

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_commondb import CommonDB

#: How many there are at once; the table shows the bytes of one.
SESSIONS = 500
APPS = 20

Open = t.Callable[[contextlib.ExitStack], object]


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as directory:
        url = f"sqlite:///{directory}/database.db"
        binds = {"SQLALCHEMY_BINDS": {"orders": f"sqlite:///{directory}/orders.db"}}
        replicas = {"COMMONDB_REPLICAS": [url, url]}
        variants: dict[str, tuple[type[SQLAlchemy], dict[str, t.Any]]] = {
            "Flask-SQLAlchemy": (SQLAlchemy, {}),
            "CommonDB": (CommonDB, {}),
            "Flask-SQLAlchemy, 2 binds": (SQLAlchemy, binds),
            "CommonDB, 2 binds": (CommonDB, binds),
            "CommonDB, 2 replicas": (CommonDB, replicas),
        }
        print(
            f"{'bytes':30} {'an app':>10} {'a context':>10} {'its session':>12} {'after use':>10}"
        )
        for name, (extension, config) in variants.items():

            def app(
                stack: contextlib.ExitStack, extension: t.Any = extension, config: t.Any = config
            ) -> Flask:
                app = Flask(__name__)
                app.config.from_mapping(config, SQLALCHEMY_DATABASE_URI=url)
                extension(app)
                return app

            made = app(contextlib.ExitStack())
            db = made.extensions["sqlalchemy"]

            def context(stack: contextlib.ExitStack, made: Flask = made) -> None:
                stack.enter_context(made.app_context())

            def session(stack: contextlib.ExitStack, made: Flask = made, db: t.Any = db) -> None:
                stack.enter_context(made.app_context())
                db.session()

            def used(stack: contextlib.ExitStack, made: Flask = made, db: t.Any = db) -> None:
                stack.enter_context(made.app_context())
                db.session.execute(db.text("SELECT 1")).all()
                db.session.rollback()

            empty = bytes_of(context, SESSIONS)
            print(
                f"{name:30} {bytes_of(app, APPS):10.0f} {empty:10.0f}"
                f" {bytes_of(session, SESSIONS) - empty:12.0f}"
                f" {bytes_of(used, SESSIONS) - empty:10.0f}"
            )


def bytes_of(make: Open, count: int) -> float:
    """What one of several that are open at once takes."""
    with contextlib.ExitStack() as stack:
        kept = [make(stack) for _ in range(2)]  # what is made only once
        gc.collect()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        kept += [make(stack) for _ in range(count)]
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return (after - before) / count


if __name__ == "__main__":
    main()
