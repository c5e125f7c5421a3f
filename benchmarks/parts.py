"""Where the time of a GET with one ``get()`` goes: the driver, its waiting, and the rest.

Run as ``python -m benchmarks.parts [turns]``. The driver's calls are timed from outside: those that
execute a statement, and those that end a transaction. What they wait for the server is a part of
theirs. Medians, of the variants of ``benchmarks.requests``, which take turns as there.

Owns: the clocks and the table. Must not: assert anything.
"""

from __future__ import annotations

import functools
import socket
import statistics
import sys
import time
import typing as t

from pymysql.connections import Connection
from pymysql.cursors import Cursor

from flask_commondb.dialects.pymysql import connection_class
from tests.servers import MariaDBCluster

from .requests import TURN
from .requests import make_apps


class Clock:
    """Adds up the time that calls take; one inside another counts once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._is_running = False

    def watch(self, owner: t.Any, *names: str) -> None:
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: t.Callable[..., t.Any]) -> t.Callable[..., t.Any]:
        @functools.wraps(function)
        def timed(*args: t.Any, **kwargs: t.Any) -> t.Any:
            if self._is_running:
                return function(*args, **kwargs)
            self._is_running = True
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self._is_running = False

        return timed


def main(turns: int) -> None:
    """Measure and print."""
    driver, waiting = Clock(), Clock()
    driver.watch(Cursor, "execute")
    driver.watch(Connection, "rollback", "ping")
    driver.watch(connection_class(), "rollback", "send_rollback", "read_answer", "ping")
    waiting.watch(socket.SocketIO, "readinto")
    with MariaDBCluster() as cluster:
        apps = make_apps(cluster)
        cluster.sync()
        clients = {name: app.test_client() for name, app in apps.items()}
        parts: dict[str, list[tuple[float, ...]]] = {name: [] for name in apps}
        for turn in range(turns + 5):
            for name, client in clients.items():
                for _ in range(TURN):
                    driver.seconds = waiting.seconds = 0.0
                    start = time.perf_counter()
                    client.get("/one")
                    whole = time.perf_counter() - start
                    if turn >= 5:  # the first ones warm up
                        parts[name].append((whole, driver.seconds, waiting.seconds))
    print(f"{'GET, one get(), us':30} whole  driver  of it waiting  all else")
    for name, rows in parts.items():
        whole, driven, waited = (
            statistics.median(column) * 1e6 for column in zip(*rows, strict=True)
        )
        print(f"{name:30} {whole:5.0f} {driven:7.0f} {waited:14.0f} {whole - driven:9.0f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
