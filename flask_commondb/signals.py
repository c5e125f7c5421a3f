"""The signals of Flask-CommonDB: what happens inside, for logs, metrics and the curious.

Owns: the blinker signals. The sender is always the Flask app. A signal without a receiver costs
one truth test.

Must not: import anything of the package.
"""

from __future__ import annotations

import logging
import typing as t

from blinker import NamedSignal
from blinker import Namespace
from flask import Flask
from flask import current_app

_logger = logging.getLogger("flask_commondb")

_signals = Namespace()

#: A statement, or a whole flush, goes to a server. Sent for binds that have replicas, with
#: ``bind_key`` (``str | None``), ``role`` (``"primary"`` or ``"replica"``), ``server``
#: (``host:port``, or the file's name for SQLite) and ``reason`` (``str``, see :doc:`replicas`).
routed = _signals.signal("routed")

#: A replica could not be reached and is left alone for a while. Sent with ``bind_key``,
#: ``server`` and ``error``, which is ``None`` for a server that has stopped answering.
replica_down = _signals.signal("replica-down")

#: A replica that was down is used again: it has been reached, and a connection is ready. Sent with
#: ``bind_key`` and ``server``.
replica_up = _signals.signal("replica-up")

#: A read found no replica, and may not go to the primary. Sent with ``bind_key`` and ``error`` (a
#: :exc:`.NoReplicaError`), which is raised.
read_refused = _signals.signal("read-refused")

#: The primary of a bind that has several candidates is another server now. Sent with ``bind_key``,
#: ``server`` and ``former``, the names of the two.
primary_changed = _signals.signal("primary-changed")

#: A session could not be closed cleanly when its context ended; the connection was thrown away.
#: Sent once for each connection with ``bind_key``, ``endpoint`` (``str | None``) and ``error``.
session_close_failed = _signals.signal("session-close-failed")

#: A connection was still out of its pool when the context in which it was taken had ended; it was
#: thrown away. Sent while ``COMMONDB_LEAK_WATCH`` is on, with ``bind_key`` and ``holder``
#: (a :class:`.Holder`).
connection_leaked = _signals.signal("connection-leaked")

#: A unit of work will be run again from its beginning: see :meth:`.CommonDB.transactional`. Sent
#: with ``bind_keys`` (a tuple; empty for ``db.session``), ``attempt`` (the one that has failed,
#: from 1), ``error``, and ``reason`` (``"deadlock"``, ``"lock_timeout"``, ``"serialization"`` or
#: ``"demoted"``).
unit_repeated = _signals.signal("unit-repeated")

#: A stored procedure was called. Sent with ``bind_key``, ``name`` and ``error`` (``None`` when it
#: succeeded).
procedure_called = _signals.signal("procedure-called")


def send(signal: NamedSignal, app: Flask | None = None, **values: t.Any) -> None:
    """Send a signal, if anyone listens.

    A receiver that raises is logged, and changes nothing for the request.

    :param app: the sender; by default the current app.

    :meta private:
    """
    if signal.receivers:
        try:
            if app is None:
                app = current_app._get_current_object()  # type: ignore[attr-defined]
            signal.send(app, **values)
        except Exception:
            _logger.exception("A receiver of the signal %r has raised.", signal.name)
