"""Positions in the history of a cluster: GTIDs of MariaDB, GTID sets of MySQL, LSNs of PostgreSQL.

Owns: how they are read from what a server says, and compared.

Must not: ask a server.
"""

from __future__ import annotations

import dataclasses
import typing as t


@dataclasses.dataclass(frozen=True)
class Position:
    """How far one server is.

    :param server: which one it is; no other has the same.
    :param written: what it has, if it is a primary.
    :param replayed: what it has of its primary.
    """

    server: str
    written: t.Any
    replayed: t.Any

    def has_reached(self, primary: Position) -> bool:
        """Whether this server has all that the primary had written at that position."""
        if self.server == primary.server:
            return self._covers(self.written, primary.written)
        return self._covers(self.replayed, primary.written)

    def _covers(self, ours: t.Any, theirs: t.Any) -> bool:
        raise NotImplementedError


class MariaDBPosition(Position):
    """For each domain the last transaction: who has written it, and its number.

    Only numbers of the same writer are compared: after a failover a replica that goes on with the
    former primary may have higher ones, of another history.
    """

    @classmethod
    def read(cls, server: t.Any, written: str, replayed: str) -> MariaDBPosition:
        """From ``@@server_id``, ``@@gtid_current_pos`` and ``@@gtid_slave_pos``."""
        return cls(str(server), _numbers(written), _numbers(replayed))

    def _covers(self, ours: t.Any, theirs: t.Any) -> bool:
        return all(
            domain in ours and ours[domain][0] == writer and ours[domain][1] >= number
            for domain, (writer, number) in theirs.items()
        )


class MySQLPosition(Position):
    """For each source the intervals of its transactions."""

    @classmethod
    def read(cls, server: t.Any, executed: str) -> MySQLPosition:
        """From ``@@server_uuid`` and ``@@global.gtid_executed``, which has what was replayed."""
        intervals = _intervals(executed)
        return cls(str(server), intervals, intervals)

    def _covers(self, ours: t.Any, theirs: t.Any) -> bool:
        return all(
            any(first <= low and high <= last for first, last in ours.get(source, ()))
            for source, intervals in theirs.items()
            for low, high in intervals
        )


class PostgreSQLPosition(Position):
    """Bytes of the write-ahead log."""

    @classmethod
    def read(cls, server: t.Any, written: str | None, replayed: str | None) -> PostgreSQLPosition:
        """From ``pg_postmaster_start_time()``, and the positions for inserts and of the replay."""
        return cls(str(server), _end_of_record(_bytes(written)), _bytes(replayed))

    def _covers(self, ours: t.Any, theirs: t.Any) -> bool:
        return ours is not None and theirs is not None and ours >= theirs


def _numbers(text: str) -> dict[str, tuple[str, int]]:
    numbers = {}
    for gtid in filter(None, text.split(",")):
        domain, writer, number = gtid.strip().split("-")
        numbers[domain] = writer, int(number)
    return numbers


def _intervals(text: str) -> dict[str, list[tuple[int, int]]]:
    intervals: dict[str, list[tuple[int, int]]] = {}
    for part in filter(None, text.replace("\n", "").split(",")):
        # A source, since MySQL 8.3 perhaps a tag that counts by itself, and intervals.
        source, *pieces = part.strip().split(":")
        for piece in pieces:
            if not piece[:1].isdigit():
                source = f"{source.partition(':')[0]}:{piece}"
                continue
            first, _, last = piece.partition("-")
            intervals.setdefault(source, []).append((int(first), int(last or first)))
    return intervals


#: The write-ahead log's pages; the head of one is longer where a segment begins.
_PAGE = 8192
_PAGE_HEADS = (24, 40)


def _bytes(lsn: str | None) -> int | None:
    if lsn is None:
        return None
    high, _, low = lsn.partition("/")
    return (int(high, 16) << 32) + int(low, 16)


def _end_of_record(lsn: int | None) -> int | None:
    """The next record would begin behind a page's head; the last one ends before it."""
    if lsn is not None and lsn % _PAGE in _PAGE_HEADS:
        return lsn - lsn % _PAGE
    return lsn
