"""How any of several servers is reached in the place of the one that an engine was made for.

Owns: what the driver is told for each server, and which of them are there at the moment.

Must not: know which one is the primary, or keep a connection.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import typing as t

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection

from .dialects import Generic
from .knocking import Knock

#: Seconds that a server has for its first word.
SILENCE = 1.0

#: Seconds for which the first server alone is knocked at. It opens at once as a rule.
AHEAD = 0.2


@dataclasses.dataclass(frozen=True)
class Way:
    """What the driver is told to reach another server than the engine's own.

    :param args: in the place of the positional arguments, if they differ.
    :param other: arguments that the engine's own server has not, or not so.
    :param gone: those that only the engine's own server has.
    """

    args: tuple[t.Any, ...] | None
    other: dict[str, t.Any] = dataclasses.field(repr=False)  # may hold a password
    gone: frozenset[str]

    @classmethod
    def to(cls, url: sa.URL, engine: sa.Engine) -> Way:
        """The way to a server."""
        (args, kwargs), (own_args, own_kwargs) = (
            engine.dialect.create_connect_args(each.difference_update_query(["plugin"]))
            for each in (url, engine.url)
        )
        other = {
            name: value
            for name, value in kwargs.items()
            if name not in own_kwargs or own_kwargs[name] != value
        }
        gone = frozenset(own_kwargs.keys() - kwargs.keys())
        return cls(None if args == own_args else tuple(args), other, gone)


class Reach:
    """Reaches each of the servers, for one connection of an engine.

    :param connect: the driver's function.
    :param ways: to each server.
    :param dialect: of all.
    :param args: with ``kwargs``, what the pool would have told the driver; a listener may have
        renewed a password there.
    """

    def __init__(
        self,
        connect: t.Callable[..., DBAPIConnection],
        ways: t.Sequence[Way],
        dialect: Generic,
        args: tuple[t.Any, ...],
        kwargs: dict[str, t.Any],
    ) -> None:
        self._connect = connect
        self._ways = ways
        self._dialect = dialect
        self._args = args
        self._kwargs = kwargs

    def connect(self, place: int, *, soon: bool = False) -> DBAPIConnection:
        """A new connection.

        :param place: the server's, among the ways.
        :param soon: wait no longer than :data:`SILENCE`, or the driver's own minimum.
        """
        args, kwargs = self._arguments(place)
        known = self._dialect.arguments.get(self._dialect.dialect.driver, {})
        if soon and "connect_timeout" in known:
            name, convert = known["connect_timeout"]
            kwargs[name] = convert(min(SILENCE, float(kwargs.get(name) or SILENCE)))
        return self._connect(*args, **kwargs)

    def answering(self, first: int, *, patiently: bool) -> t.Iterator[tuple[int, bool]]:
        """The servers that say a word in time, and whether that is known of each.

        Where the door is, is not known of all; then only a connection tells.

        :param first: comes before all others, which are knocked at as soon as it takes long, or as
            the next one is wanted.
        :param patiently: whether it has as long as the others.
        """
        others = [place for place in range(len(self._ways)) if place != first]
        with contextlib.ExitStack() as stack:

            def knock(*places: int) -> dict[int, Knock | None]:
                doors = {place: self._knock(place) for place in places}
                for door in doors.values():
                    if door is not None:
                        stack.callback(door.close)
                return doors

            door, doors = knock(first)[first], {}
            if door is not None and door.answer(AHEAD) is None:
                doors = knock(*others)
                door.answer(SILENCE - AHEAD if patiently else 0)
            if door is None or door.has_spoken:
                yield first, door is not None
            doors = doors or knock(*others)
            until = time.monotonic() + SILENCE
            while doors and time.monotonic() < until:
                for place, door in list(doors.items()):
                    if door is None or door.answer() is not None:
                        del doors[place]
                        if door is None or door.has_spoken:
                            yield place, door is not None
                time.sleep(_STEP)

    def _knock(self, place: int) -> Knock | None:
        _, kwargs = self._arguments(place)
        address = self._dialect.address(kwargs)
        return None if address is None else Knock(address, self._dialect)

    def _arguments(self, place: int) -> tuple[tuple[t.Any, ...], dict[str, t.Any]]:
        way = self._ways[place]
        kwargs = {name: value for name, value in self._kwargs.items() if name not in way.gone}
        return (self._args if way.args is None else way.args), {**kwargs, **way.other}


#: Seconds between two looks at doors that have not opened.
_STEP = 0.005
