"""How a session ends: every connection by itself, whatever one of them does.

Owns: :func:`close_session`, and the report of what could not be closed.

Must not: know where sessions are kept.
"""

from __future__ import annotations

import contextlib
import logging

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm

from . import pools
from . import signals
from .routing import ALL_BINDS
from .routing import RoutingSession

_logger = logging.getLogger("flask_commondb")


def close_session(session: sa_orm.Session, endpoint: str | None = None) -> None:
    """Close one session and give back its connections, whatever state they are in.

    Raises no ``Exception``. A connection that cannot be closed is thrown away, logged and signalled
    with its bind key.

    :param endpoint: of the request that has used it, for the report.
    """
    interrupt: BaseException | None = None  # it must not keep the others open
    connections = []
    if isinstance(session, RoutingSession):
        session.replica_reads.release()
        connections = session.own_connections()
        for connection in connections:
            try:
                pools.stop_reading(connection)  # closing it would be to read the rest
                if not session.may_have_written:
                    pools.end_read(connection)
            except BaseException as error:
                interrupt = error
    # A session stops at the first one that raises.
    if isinstance(session, RoutingSession) and len(connections) > 1:
        for connection in connections:
            try:
                _close_connection(session, connection, endpoint)
            except BaseException as error:
                interrupt = error
    try:
        session.close()
    except BaseException as error:
        if isinstance(error, Exception):
            engine = connections[0].engine if len(connections) == 1 else None
            _report(session, engine, endpoint, error)
        else:
            interrupt = error
        for connection in connections:
            pools.discard(connection)
        with contextlib.suppress(Exception):
            session.invalidate()
    if interrupt is not None:
        raise interrupt


def _close_connection(
    session: RoutingSession, connection: sa.Connection, endpoint: str | None
) -> None:
    error = pools.close(connection)
    if error is not None:
        _report(session, connection.engine, endpoint, error)


def _report(
    session: sa_orm.Session, engine: sa.Engine | None, endpoint: str | None, error: Exception
) -> None:
    bind_key = app = None
    if isinstance(session, RoutingSession):
        app = session.router.app()
        bind_key = None if session.bind_key is ALL_BINDS else session.bind_key
        if engine is not None:
            bind_key = session.router.bind_key_of(engine, bind_key)
    _logger.error(
        "A session of bind %r, used by endpoint %r, could not be closed; its connection was"
        " thrown away: %s",
        bind_key,
        endpoint,
        getattr(error, "orig", None) or type(error).__name__,
        extra={"bind_key": bind_key, "endpoint": endpoint},
    )
    signals.send(
        signals.session_close_failed, app, bind_key=bind_key, endpoint=endpoint, error=error
    )
