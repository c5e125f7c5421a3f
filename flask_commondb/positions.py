"""How current a replica is, proved from positions in the primary's history.

Owns: :class:`Positions`: where the primary was at which time, and what that says of a replica that
has been seen further on. What a server reports of its own lag is not asked: it is 0 on a link that
is dead.

Must not: connect, know what a position looks like, or look at the real clock.
"""

from __future__ import annotations

import collections
import typing as t

#: How many positions of the primary are kept.
KEPT = 64


class Position(t.Protocol):
    """How far a server is: see :class:`.dialects.Position`."""

    def has_reached(self, other: t.Any) -> bool:
        """Whether this server has all that another one had written at that position."""


class Positions:
    """The positions that one primary was seen at, each with the time before which it was asked."""

    def __init__(self) -> None:
        self._seen: collections.deque[tuple[float, Position]] = collections.deque(maxlen=KEPT)

    def add(self, asked_at: float, position: Position) -> None:
        """The primary has answered.

        :param asked_at: when the question was sent: what was committed before is in the answer.
        """
        self._seen.append((asked_at, position))

    @property
    def newest(self) -> float:
        """When the last question was sent that the primary has answered."""
        try:
            return self._seen[-1][0]
        except IndexError:
            return float("-inf")

    def proved(self, position: Position) -> float:
        """The time up to which a replica at this position has all that was committed.

        :returns: minus infinity, if nothing is known.
        """
        for asked_at, written in sorted(self._seen, key=lambda seen: seen[0], reverse=True):
            if position.has_reached(written):
                return asked_at
        return float("-inf")

    def forget(self) -> None:
        """There is another primary, with a history of its own."""
        self._seen.clear()
