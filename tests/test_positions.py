"""Positions in a cluster's history: read, compared, and taken for a proof."""

from __future__ import annotations

import typing as t

import pytest

from flask_commondb.dialects.histories import MariaDBPosition
from flask_commondb.dialects.histories import MySQLPosition
from flask_commondb.dialects.histories import PostgreSQLPosition
from flask_commondb.positions import KEPT
from flask_commondb.positions import Positions

A = "3e11fa47-71ca-11e1-9e33-c80aa9429562"
B = "8a94f357-aab4-11df-86ab-c80aa9429444"

#: What the primary has, what a replica has replayed, and whether that is all.
MARIADB = [
    ("0-1-7", "0-1-7", True),
    ("0-1-7", "0-1-8", True),
    ("0-1-7", "0-1-6", False),
    ("0-1-10", "0-1-9", False),
    ("0-1-7,1-1-3", "0-1-7", False),
    ("0-1-7,1-1-3", "1-1-3,0-1-9", True),
    ("0-1-7,1-1-3", "1-1-3,0-2-9", False),
    ("0-2-7", "0-1-8", False),
    ("0-1-7", "", False),
    ("", "", True),
    ("", "0-1-7", True),
]
MYSQL = [
    (f"{A}:1-7", f"{A}:1-7", True),
    (f"{A}:1-7", f"{A}:1-9", True),
    (f"{A}:1-7", f"{A}:1-6", False),
    (f"{A}:1-7", f"{A}:1-5:7", False),
    (f"{A}:1-3:5", f"{A}:1-5", True),
    (f"{A}:1-7,\n{B}:4", f"{A}:1-7", False),
    (f"{A}:1-7,\n{B}:4", f"{A}:1-8,\n{B}:1-4", True),
    (f"{A}:1-7:tag:1-3", f"{A}:1-7", False),
    (f"{A}:1-7:tag:1-3", f"{A}:1-7:tag:1-4", True),
    ("", "", True),
]
POSTGRESQL = [
    ("0/3000060", "0/3000060", True),
    ("0/3000060", "0/3000058", False),
    ("0/3000060", "1/0", True),
    ("1/0", "0/FFFFFFFF", False),
    ("0/3000060", None, False),
    # The next record would come behind the head of a page: what is before is all there is.
    ("0/3002018", "0/3002000", True),
    ("0/3000028", "0/3000000", True),
    ("0/3002020", "0/3002000", False),
]


@pytest.mark.parametrize(("written", "replayed", "expected"), MARIADB)
def test_mariadb(written: str, replayed: str, expected: bool) -> None:
    """A replica has reached it when it has as many transactions in each domain, of one writer."""
    primary = MariaDBPosition.read(1, written, "")
    assert MariaDBPosition.read(2, "0-2-99", replayed).has_reached(primary) is expected


@pytest.mark.parametrize(("written", "replayed", "expected"), MYSQL)
def test_mysql(written: str, replayed: str, expected: bool) -> None:
    """A replica has reached it when it has executed all of the primary's set."""
    primary = MySQLPosition.read(A, written)
    assert MySQLPosition.read(B, replayed).has_reached(primary) is expected


@pytest.mark.parametrize(("written", "replayed", "expected"), POSTGRESQL)
def test_postgresql(written: str, replayed: str | None, expected: bool) -> None:
    """A standby has reached it when it has replayed as much of the log."""
    primary = PostgreSQLPosition.read("12:00", written, None)
    assert PostgreSQLPosition.read("12:01", None, replayed).has_reached(primary) is expected


def test_the_same_server() -> None:
    """A server that is its own replica has what it has written, though it replays nothing."""
    for position in (
        MariaDBPosition.read(1, "0-1-7", ""),
        MySQLPosition.read(A, f"{A}:1-7"),
        PostgreSQLPosition.read("12:00", "0/3000060", None),
    ):
        assert position.has_reached(position)


def test_a_server_that_writes_for_itself() -> None:
    """What a promoted server has written itself says nothing of what it has of the other's."""
    primary = MariaDBPosition.read(1, "0-1-7", "")
    assert not MariaDBPosition.read(2, "0-2-9", "0-1-6").has_reached(primary)
    old = PostgreSQLPosition.read("12:00", "0/3000060", None)
    assert not PostgreSQLPosition.read("12:01", "0/9000060", "0/3000000").has_reached(old)


class Number(t.NamedTuple):
    """A position that is a number."""

    number: int

    def has_reached(self, other: t.Any) -> bool:
        return bool(self.number >= other.number)


def test_proof() -> None:
    """A replica is proved current up to the newest question whose answer it has reached."""
    positions = Positions()
    assert positions.newest == float("-inf")
    assert positions.proved(Number(99)) == float("-inf")
    for asked_at, number in [(10.0, 1), (11.0, 5), (12.0, 5), (13.0, 9)]:
        positions.add(asked_at, Number(number))
    assert positions.newest == 13
    answers = [positions.proved(Number(number)) for number in (0, 1, 4, 5, 8, 9)]
    assert answers == [float("-inf"), 10, 10, 12, 12, 13]


def test_answers_in_any_order() -> None:
    """Two threads may ask at once, and the later question may be answered first."""
    positions = Positions()
    positions.add(11.0, Number(5))
    positions.add(10.0, Number(4))
    assert positions.proved(Number(5)) == 11


def test_memory() -> None:
    """Only so many are kept; the oldest go."""
    positions = Positions()
    for number in range(KEPT + 10):
        positions.add(float(number), Number(number))
    assert positions.proved(Number(9)) == float("-inf")
    assert positions.proved(Number(10)) == 10


def test_another_primary() -> None:
    """Positions of a former primary prove nothing any more."""
    positions = Positions()
    positions.add(1.0, Number(1))
    positions.forget()
    assert positions.proved(Number(1)) == float("-inf")
