"""What is known of each server at present, for pages, commands and metrics.

Owns: :class:`ServerStatus`, and where its figures come from.

Must not: ask a server anything.
"""

from __future__ import annotations

import typing as t

from . import pools
from .replicas import Replica
from .router import Router


class ServerStatus(t.NamedTuple):
    """One server, as this process sees it: see :meth:`.CommonDB.server_status`.

    :param bind_key: the bind that it serves.
    :param role: ``"primary"`` or ``"replica"``.
    :param server: what it is called.
    :param state: ``"up"``, ``"down"`` while its breaker is open, or ``"draining"``.
    :param weight: of a replica.
    :param zone: of a replica.
    :param retry_in: in how many seconds a replica that is down may be tried again.
    :param latency: how many seconds its statements take, ``None`` if that is not known.
    :param behind: how many seconds a replica is behind at most, as far as that was proved; ``None``
        if it was not: only where a ``max_lag`` is asked for.
    :param statements: how many statements this process has sent there.
    :param probes: how many questions of our own, how far it is in the primary's history.
    """

    bind_key: str | None
    role: str
    server: str
    state: str
    weight: float | None
    zone: str | None
    retry_in: float
    latency: float | None
    behind: float | None
    statements: int
    probes: int


def overview(router: Router) -> list[ServerStatus]:
    """All servers of an app, each primary before its replicas. No I/O."""
    replicas = {
        replica.engine: replica
        for bind in list(router.replica_sets.values())
        for replica in bind.replicas
    }
    return [
        _of_replica(replicas[engine]) if engine in replicas else _of_primary(engine, bind_key, name)
        for engine, bind_key, _, name in router.servers()
    ]


def _of_primary(engine: t.Any, bind_key: str | None, name: str) -> ServerStatus:
    traffic = pools.traffic(engine)
    return ServerStatus(
        bind_key,
        role="primary",
        server=name,
        state="up",
        weight=None,
        zone=None,
        retry_in=0.0,
        latency=None,
        behind=None,
        statements=traffic.statements,
        probes=traffic.probes,
    )


def _of_replica(replica: Replica) -> ServerStatus:
    traffic = pools.traffic(replica.engine)
    state = "up" if replica.breaker.is_closed else "down"
    behind = replica.behind()
    return ServerStatus(
        replica.bind_key,
        role="replica",
        server=replica.name,
        state="draining" if replica.is_draining else state,
        weight=replica.weight,
        zone=replica.zone,
        retry_in=replica.breaker.retry_in,
        latency=replica.latency or None,
        behind=behind if behind < float("inf") else None,
        statements=traffic.statements,
        probes=traffic.probes,
    )
