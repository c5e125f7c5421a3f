"""A program whose pools are kept warm, as the tests of that run it.

Owns: what it forks, and at which bad moment. Prints as JSON what it found; must print nothing else,
in whichever process.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import time
import typing as t

import sqlalchemy as sa

from flask_commondb import forks
from flask_commondb import keeping

from .servers import wait_until

ID = {"mysql": "SELECT CONNECTION_ID()", "postgresql": "SELECT pg_backend_pid()"}

#: How many connections are kept.
MINIMUM = 3


def main(kind: str, url: str) -> None:
    arguments: dict[str, t.Any] = {"ssl_disabled": True} if url.startswith("mysql") else {}
    engine = sa.create_engine(url, connect_args=arguments)
    forks.guard(engine, is_local=False)
    keeping.keep(
        engine, answers=engine.dialect.do_ping, min_size=MINIMUM, max_idle=60, keepalive=0.1
    )
    found: dict[str, object] = {}
    if kind == "late":
        atexit.register(use, engine)
    else:
        ids = fill(engine)
    if kind == "forks":
        found["children"] = [fork(engine, ids, bad) for bad in (False, True, True)]
        found["same"] = fill(engine) == ids
    print(json.dumps(found))
    # Ends as programs do that close nothing.


def use(engine: sa.Engine) -> None:
    with engine.connect():
        pass


def fill(engine: sa.Engine) -> set[int]:
    """The server's names for the connections of a pool, when all are there."""
    pool = t.cast(sa.QueuePool, engine.pool)
    use(engine)
    wait_until(lambda: pool.checkedin() == MINIMUM, "the pool is filled")
    connections = [engine.connect() for _ in range(MINIMUM)]
    ids = {connection.scalar(sa.text(ID[engine.dialect.name])) for connection in connections}
    for connection in connections:
        connection.close()
    return ids


def fork(engine: sa.Engine, ids: set[int], bad: bool) -> int:
    """The exit code of a child that has its own thread and connections; 0 is good.

    :param bad: fork while another thread holds every lock there is.
    """
    pool: t.Any = engine.pool
    locked, done = threading.Event(), threading.Event()

    def lock() -> None:
        with keeping._keeper._lock, pool._overflow_lock, pool._pool.mutex:
            locked.set()
            done.wait()

    if bad:
        locking = threading.Thread(target=lock)
        locking.start()
        locked.wait()
    child = os.fork()
    if child == 0:
        alone = threading.active_count() == 1 and keepers() == []
        own = fill(engine)
        engine.dispose()
        wait_until(lambda: keepers() == [], "the child's thread ends")
        sys.exit(0 if alone and not own & ids else 3)
    done.set()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def keepers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "commondb-keeper"]


if __name__ == "__main__":
    main(*sys.argv[1:])
