"""How a replica that was down comes back: one unit of work looks, the others do not wait.

Owns: the half-open state of a replica's breaker, which is a knock at its door, and the connection
that is made before any unit of work is sent there.

Must not: have a unit of work wait for a server that does not answer.
"""

from __future__ import annotations

import logging
import typing as t

import sqlalchemy as sa
from flask import Flask

from . import pools
from . import signals
from .knocking import Knock
from .knocking import knock_at
from .replicas import Replica
from .replicas import ReplicaSet

_logger = logging.getLogger("flask_commondb")

#: Seconds that a unit of work gives a server to open; a server that is near needs no more.
GLANCE = 0.005

#: Seconds after which a server that has not opened is taken for down.
PATIENCE = 2.0


def look_after(replicas: ReplicaSet) -> None:
    """Take the next step with each replica that is down, where it is time for one."""
    for replica in replicas.replicas:
        if not replica.breaker.is_closed:
            _step(replica)


def report_down(replica: Replica, error: BaseException | None, app: Flask | None = None) -> None:
    """A replica could not be reached: nobody goes there until it has been tried again.

    :param error: what the attempt has run into; ``None``: a server that says nothing.
    :param app: whose replica it is; by default the current one's.
    """
    pause = replica.breaker.trip()
    if pause is not None:
        _tell(replica, pause, error, app)


def _step(replica: Replica) -> None:
    try:
        knock = replica.knocks.pop()
    except IndexError:
        if not replica.breaker.claim():
            return
        knock = None
    is_up: bool | None = False
    error: Exception | None = None
    try:
        if knock is None:
            knock = _Trial(replica)
        is_up = knock.look()
    except sa.exc.SQLAlchemyError as reason:
        error = reason
    finally:
        if is_up is None:
            replica.knocks.append(t.cast(_Trial, knock))
        elif is_up:
            replica.breaker.close()
            _logger.info("Replica %s of bind %r is used again.", replica.name, replica.bind_key)
            signals.send(signals.replica_up, bind_key=replica.bind_key, server=replica.name)
        else:
            _logger.info(
                "Replica %s of bind %r is still down, and is left alone for %.1f seconds: %s",
                replica.name,
                replica.bind_key,
                replica.breaker.fail(),
                _why(error),
            )


class _Trial:
    """One attempt to reach a replica.

    :param replica: whose breaker the caller has claimed.
    """

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._until = replica.clock() + PATIENCE
        self._knock: Knock | None = knock_at(replica.engine)

    def look(self) -> bool | None:
        """Whether it can be used, ``None`` if that is not known yet.

        :raises sqlalchemy.exc.SQLAlchemyError: if it opens, and lets nobody in.
        """
        if self._knock is not None:
            opens = self._knock.answer(GLANCE)
            if opens is None and self._replica.clock() < self._until:
                return None
            self._knock.close()
            if not opens:
                return False
        if self._replica.has_room:
            pools.warm(self._replica.engine)
        return True


def _tell(replica: Replica, pause: float, error: BaseException | None, app: Flask | None) -> None:
    _logger.warning(
        "Replica %s of bind %r cannot be reached and is left alone for %.1f seconds: %s",
        replica.name,
        replica.bind_key,
        pause,
        _why(error),
        extra={"bind_key": replica.bind_key, "server": replica.name},
    )
    values = {"bind_key": replica.bind_key, "server": replica.name, "error": error}
    signals.send(signals.replica_down, app, **values)


def _why(error: BaseException | None) -> t.Any:
    return getattr(error, "orig", error) or "it does not answer"
