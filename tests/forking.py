"""A program that forks while it uses a database, as the tests of forks run it.

A child must be able to exit as programs do: unwind, collect, and destroy what is left at the
interpreter's end. Inside pytest it could not.

Owns: what the parent holds at the time of a fork, and what children do with it. Prints as JSON
what the parent found; must print nothing else, in whichever process.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import sys
import threading
import time
import typing as t
import warnings

import sqlalchemy as sa

from .apps import Lab

ID = {"mysql": "SELECT CONNECTION_ID()", "postgresql": "SELECT pg_backend_pid()"}
SLEEP = {"mysql": "SELECT SLEEP(0.3)", "postgresql": "SELECT pg_sleep(0.3)"}

#: A program that exits with how many of the descriptors are open that are its arguments.
OPEN_DESCRIPTORS = """
import os, sys
open = len(sys.argv) - 1
for descriptor in sys.argv[1:]:
    try:
        os.fstat(int(descriptor))
    except OSError:
        open -= 1
sys.exit(open)
"""

#: How many rows a result has that is being read at the time of a fork.
STREAMED = 2000

#: Destroyed at the end of the interpreter only.
kept: list[object] = []


def main(kind: str, url: str, *replicas: str) -> None:
    # Last in, first out: the connection that is idle is always the same.
    options: dict[str, t.Any] = {"pool_use_lifo": True}
    if url.startswith("mysql"):  # to ask for TLS takes longer than all that happens here
        options["connect_args"] = {"ssl_disabled": True}
    lab = Lab(url, replicas, engine_options=options)
    with lab.app.app_context():
        lab.db.create_all()
    found: dict[str, object]
    if kind == "files":
        found = {child.__name__: file_after(lab, child) for child in FILE_CHILDREN}
    else:
        found = {way.__name__: found_after(lab, way) for way in WAYS}
    lab.dispose()
    json.dump(found, sys.stdout)


# Servers ------------------------------------------------------------------------------------


class Held:
    """Connections in every state, and two transactions that are open: two rows with a title."""

    def __init__(self, lab: Lab, title: str) -> None:
        engine = lab.db.engine
        self.id = sa.text(ID[engine.dialect.name])
        self.engine = engine
        self.session = lab.db.session()
        self.session.add(lab.Post(title=title))
        self.session.flush()
        self.connection = engine.connect()
        self.connection.execute(sa.insert(lab.Post).values(title=title))
        self.raw = engine.raw_connection()
        self.replica = lab.engines[1].connect()
        self.detached = engine.connect()
        self.detached.detach()
        self.reading = engine.connect()
        self.result: t.Iterator[object] = iter(())
        if engine.dialect.name == "mysql":  # psycopg does not read on when a result is collected
            self.result = iter(
                self.reading.execute(
                    sa.text(f"SELECT seq FROM seq_1_to_{STREAMED}"),
                    execution_options={"stream_results": True},
                )
            )
            next(self.result)

        proxies = [self.connection.connection, self.raw, self.detached.connection]
        self.drivers: list[t.Any] = [proxy.dbapi_connection for proxy in proxies]

    def ids(self) -> list[int]:
        """The server's names for the connections; the last is the one that is idle in the pool."""
        with contextlib.closing(self.raw.cursor()) as cursor:
            cursor.execute(self.id.text)
            (raw,) = cursor.fetchone() or (0,)
        with self.engine.connect() as idle:
            return [
                self.session.scalar(self.id),
                self.connection.scalar(self.id),
                raw,
                self.replica.scalar(self.id),
                self.detached.scalar(self.id),
                idle.scalar(self.id),
            ]

    def commit(self) -> None:
        self.session.commit()
        self.connection.commit()

    def close(self) -> None:
        for held in (self.session, self.connection, self.raw, self.replica, self.reading):
            held.close()

    def forget(self) -> None:
        vars(self).clear()
        gc.collect()


def found_after(lab: Lab, way: Way) -> dict[str, object]:
    """What a way to have a child leaves of the parent's connections and transactions."""
    with lab.app.app_context():
        held = Held(lab, way.__name__)
        before = held.ids()
        code = way(lab, held)
        rest = len(list(held.result))
        after = held.ids()
        held.commit()
        held.close()
        held.detached.close()
    return {"code": code, "rest": rest, "same": after == before}


def exits(lab: Lab, held: Held) -> int:
    return fork(lambda: kept.append(held))


def collects(lab: Lab, held: Held) -> int:
    def child() -> None:
        lab.db.session.registry.clear()
        held.forget()

    return fork(child)


def closes(lab: Lab, held: Held) -> int:
    return fork(held.close)


def closes_the_drivers(lab: Lab, held: Held) -> int:
    """Past SQLAlchemy, as code does that has taken the driver's connection."""

    def child() -> None:
        for driver in held.drivers:
            with contextlib.suppress(Exception):
                driver.rollback()
            with contextlib.suppress(Exception):
                driver.close()

    return fork(child)


def has_its_own(lab: Lab, held: Held) -> int:
    before = held.ids()

    def child() -> None:
        assert lab.db.session() is not held.session
        own = [lab.db.session.scalar(held.id)]
        with lab.engines[0].connect() as primary:
            own.append(primary.scalar(held.id))
        assert not set(own) & set(before)
        lab.db.session.remove()
        lab.dispose()

    return fork(child)


def executes(lab: Lab, held: Held) -> int:
    """Another program, which inherits no descriptor."""
    descriptors = [str(driver.fileno()) for driver in held.drivers]
    return fork(
        lambda: os.execv(sys.executable, [sys.executable, "-c", OPEN_DESCRIPTORS, *descriptors])
    )


def in_a_pool_of_processes(lab: Lab, held: Held) -> int:
    process = multiprocessing.get_context("fork").Process(target=held.forget)
    process.start()
    process.join()
    return process.exitcode or 0


def forks_again(lab: Lab, held: Held) -> int:
    """What a child has opened is as safe from its own children."""

    def child() -> None:
        held.forget()
        own = Held(lab, "of a child")
        before = own.ids()
        assert collects(lab, own) == 0
        list(own.result)
        assert own.ids() == before
        own.close()
        own.detached.close()
        lab.dispose()

    return fork(child)


def beside_threads(lab: Lab, held: Held) -> int:
    """One thread waits for an answer, another has the locks of the pool: the child has neither."""
    pool: t.Any = held.engine.pool
    locked = threading.Event()
    done = threading.Event()
    answers = []

    def ask() -> None:
        with held.engine.connect() as connection:
            answers.append(connection.execute(sa.text(SLEEP[connection.dialect.name])).all())

    def lock() -> None:
        with pool._overflow_lock, pool._pool.mutex:
            locked.set()
            done.wait()

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.1)  # sooner is no harm, but proves less
    locking = threading.Thread(target=lock)
    locking.start()
    locked.wait()

    def child() -> None:
        held.forget()
        with lab.engines[0].connect():
            pass
        lab.dispose()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of just this
        code = fork(child)
    done.set()
    locking.join()
    asking.join()
    assert len(answers) == 1
    return code


Way = t.Callable[[Lab, Held], int]

WAYS: list[t.Any] = [
    exits,
    collects,
    closes,
    closes_the_drivers,
    has_its_own,
    executes,
    in_a_pool_of_processes,
    forks_again,
    beside_threads,
]


# Files --------------------------------------------------------------------------------------

#: More than what SQLite keeps in memory before it writes to the file, inside a transaction.
ROWS = 500


def file_after(lab: Lab, child: t.Callable[[Lab, list[sa.Connection]], None]) -> list[object]:
    """The rows that the parent commits beside a child, and what SQLite says of the file."""
    with lab.app.app_context(), lab.db.engine.connect() as connection:
        connection.execute(sa.delete(lab.Post))
        connection.commit()
    assert fork(lambda: _write(lab)) == 0  # while the parent's connections are idle
    with lab.app.app_context():
        held = [lab.db.engine.connect()]
        held[0].exec_driver_sql("PRAGMA cache_size = 5")
        held[0].execute(sa.insert(lab.Post), [{"title": f"{number:050}"} for number in range(ROWS)])
        held[0].execute(sa.update(lab.Post).values(title=lab.Post.title + "!"))
        code = fork(lambda: child(lab, held))
        held[0].commit()
        held[0].close()
    lab.dispose()
    with lab.app.app_context(), lab.db.engine.connect() as connection:
        rows = connection.scalar(sa.select(sa.func.count(lab.Post.id)))
        return [code, rows, connection.exec_driver_sql("PRAGMA integrity_check").scalar()]


def _write(lab: Lab) -> None:
    with lab.app.app_context():
        lab.db.session.add(lab.Post(title="of a child"))
        lab.db.session.commit()
    lab.dispose()


def exits_with_file(lab: Lab, held: list[sa.Connection]) -> None:
    kept.append(held)


def collects_file(lab: Lab, held: list[sa.Connection]) -> None:
    held.clear()
    gc.collect()


def closes_file(lab: Lab, held: list[sa.Connection]) -> None:
    held[0].close()


FILE_CHILDREN = [exits_with_file, collects_file, closes_file]


def fork(child: t.Callable[[], object]) -> int:
    """Run a function in a child that then exits as programs do; its exit code."""
    pid = os.fork()
    if pid == 0:
        child()
        sys.exit()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
