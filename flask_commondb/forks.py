"""A forked child inherits no connection.

Owns: what happens in the child to the connections that its parent has open, idle or checked out,
and that what other modules know begins anew there.

Must not: call a pool or a driver there in a way that may wait for a lock, or reach a server.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import typing as t
import weakref

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry


def guard(engine: sa.Engine, *, is_local: bool) -> None:
    """Note what the engine opens, so that a forked child can let go of it.

    :param is_local: whether its database is part of the process.
    """
    url = engine.url
    in_memory = ":memory:" in (url.database or ":memory:") or url.query.get("mode") == "memory"
    if is_local and in_memory:
        return  # a fork copies the database itself, and the copy is the child's own
    _guarded.add(engine)

    @sa.event.listens_for(engine, "connect")
    def connect(dbapi_connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        _entries.add(entry)
        with contextlib.suppress(TypeError):  # there are no weak references to sqlite3's
            _connections.add(dbapi_connection)


class Renewed(t.Protocol):
    """What holds locks, or waits for what another thread is about to find out."""

    def begin_anew(self) -> None:
        """In a forked child: the other threads are not there."""


def renew(renewed: Renewed) -> None:
    """Have something begin anew in every forked child, as long as it lives."""
    _renewed.add(renewed)


_renewed: weakref.WeakSet[Renewed] = weakref.WeakSet()

_guarded: weakref.WeakSet[sa.Engine] = weakref.WeakSet()

#: What their pools have opened. A detached connection is in the second only.
_entries: weakref.WeakSet[ConnectionPoolEntry] = weakref.WeakSet()
_connections: weakref.WeakSet[t.Any] = weakref.WeakSet()


def _forget_inherited_connections() -> None:
    """In a forked child: both processes would talk over one socket. The parent keeps it.

    To collect or to close what was inherited would be to talk as well: a ROLLBACK of what the
    parent is about to commit, a farewell that ends its connection. So the sockets are replaced,
    SQLAlchemy's objects lose their connections, and no destructor of a driver runs.

    A lock may be held by a thread that only the parent has. Therefore nothing here calls a pool
    that was in use, or a connection that may have been.
    """
    entries = list(_entries)
    inherited = {*_connections, *(entry.dbapi_connection for entry in entries)} - {None}
    _cut_off(inherited)
    for entry in entries:
        _let_go(entry)
    for connection in inherited:
        _keep(connection)
    _entries.clear()
    _connections.clear()
    for engine in list(_guarded):
        engine.dispose(close=False)


def _cut_off(connections: t.Iterable[t.Any]) -> None:
    """Put /dev/null in the place of each connection's socket, in this process only.

    A socket left open here would also keep the server from noticing that the parent has died.
    """
    with contextlib.suppress(OSError):  # no /dev, or no descriptor left; the rest does without
        nowhere = os.open(os.devnull, os.O_RDWR)
        for connection in connections:
            with contextlib.suppress(Exception):  # closed already, or a driver that has no fileno()
                os.dup2(nowhere, connection.fileno(), inheritable=False)
        os.close(nowhere)


def _let_go(entry: t.Any) -> None:
    """Take the connection away from a pool's entry, and from the proxy that is checked out."""
    proxy = entry.fairy_ref and entry.fairy_ref()
    entry.fairy_ref = None  # else the proxy's end would give the entry back to the old pool
    connection, entry.dbapi_connection = entry.dbapi_connection, None
    if proxy is not None:
        proxy.dbapi_connection = None  # a rollback, a reset and a close have nothing to do now
        proxy.cursor = proxy.commit = _refuse
    elif isinstance(connection, sqlite3.Connection) and not connection.in_transaction:
        # SQLite counts its locks on a file for each process, and the locks themselves are the
        # parent's: a new connection would believe that it has them. Those of an idle connection
        # are forgotten by closing it, which writes nothing while the parent has the file open.
        with contextlib.suppress(sqlite3.Error):
            connection.close()


def _keep(connection: t.Any) -> None:
    """Have a connection outlive the interpreter, which would destroy it at its end.

    That would have SQLite roll back the parent's transaction, which corrupts the database, and
    psycopg complain; another driver without ``fileno()`` would say farewell to the server.
    """
    result: t.Any = getattr(connection, "_result", None)
    if hasattr(result, "unbuffered_active"):  # PyMySQL's cursors read the rest when they end
        result.unbuffered_active = False
        connection._result = None
    _make_immortal(connection)


def _refuse(*args: t.Any, **kwargs: t.Any) -> t.NoReturn:
    raise sa.exc.ResourceClosedError(
        "This connection belongs to the process that this one was forked from. Use a new one:"
        " a new session, or engine.connect()."
    )


def _find_immortality() -> t.Callable[[t.Any], object]:
    """A function after which an object is never destroyed."""
    try:
        import ctypes

        return ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", ctypes.pythonapi))
    except (ImportError, AttributeError):  # a Python without ctypes, or not CPython
        kept: list[t.Any] = []
        return kept.append


#: Found before any fork, because an import may wait for a thread that the child does not have.
_make_immortal = _find_immortality()


def _begin_anew() -> None:
    for renewed in list(_renewed):
        renewed.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_inherited_connections)
    os.register_at_fork(after_in_child=_begin_anew)
