"""The breaker of one server: while it is open, nobody goes there but the one who tries.

Owns: :class:`Breaker`, its three states, and for how long it stays open.

Must not: connect, wait, or look at the real clock: one is injected. Takes no lock, which a forked
child could find held by a thread that only its parent has.
"""

from __future__ import annotations

import os
import random
import typing as t

#: Seconds for which a breaker is open at first; each trial that fails doubles them.
FIRST_PAUSE = 1.0

#: Seconds after which a trial is taken for abandoned, by one who was killed in the middle of it.
LONGEST_TRIAL = 60.0

#: No pause is longer.
LONGEST_PAUSE = 30.0


class Breaker:
    """Closed, open, or half open: open, and one is trying.

    :param clock: returns seconds that only ever grow.
    :param jitter: a number between two others, so that not all processes come back at once.
    """

    #: Whether the server may be used.
    is_closed = True

    #: When it was opened last, on the clock.
    tripped_at = float("-inf")

    def __init__(
        self,
        clock: t.Callable[[], float],
        jitter: t.Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._clock = clock
        self._jitter = jitter
        self._failures = 0
        self._retry_at = 0.0
        #: Whoever removes the one entry opens the breaker.
        self._closed = [True]
        #: By process since when somebody tries there: a forked child does not go on with its
        #: parent's trial.
        self._trials: dict[int, tuple[float, object]] = {}

    def trip(self) -> float | None:
        """The server cannot be reached.

        Many find that out at once; the first opens the breaker.

        :returns: for how many seconds it is open now, ``None`` if it was open already.
        """
        try:
            self._closed.pop()
        except IndexError:
            return None
        self._failures = 0
        self.tripped_at = self._clock()
        return self._open()

    def claim(self) -> bool:
        """Whether the caller is the one to try, who then says :meth:`close` or :meth:`fail`."""
        now = self._clock()
        if self.is_closed or now < self._retry_at:
            return False
        other = self._trials.get(os.getpid())
        if other is not None and now - other[0] > LONGEST_TRIAL:
            self._trials.pop(os.getpid(), None)
        mine = (now, object())
        return self._trials.setdefault(os.getpid(), mine) is mine

    def fail(self) -> float:
        """The one who has tried could not reach it either.

        :returns: for how many seconds it is open now.
        """
        pause = self._open()
        self._trials.clear()
        return pause

    def close(self) -> None:
        """The one who has tried has reached it."""
        self.is_closed = True  # first: one that opens it from now on is to have the last word
        self._closed[:] = [True]
        self._trials.clear()

    @property
    def retry_in(self) -> float:
        """In how many seconds somebody may try; 0 when it is closed."""
        return 0.0 if self.is_closed else max(0.0, self._retry_at - self._clock())

    def _open(self) -> float:
        longest = min(FIRST_PAUSE * 2.0 ** min(self._failures, 16), LONGEST_PAUSE)
        pause = longest * self._jitter(0.5, 1.0)
        self._failures += 1
        self._retry_at = self._clock() + pause
        self.is_closed = False
        return pause
