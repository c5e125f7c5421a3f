"""Which options the engine of a bind or replica gets, when all places are laid over each other.

Owns: the merge, our built-in defaults, :class:`PoolSettings`, and the mistakes that are found in
the places. Names and values are judged by :mod:`.capabilities`.

Must not: know of Flask, make an engine, or change or show a value that a user has given.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing as t

import sqlalchemy as sa

from .capabilities import DECISIVE
from .capabilities import DICTS
from .capabilities import OF_ONE_DRIVER
from .capabilities import OWN
from .capabilities import Capabilities
from .capabilities import why_impossible
from .capabilities import why_wrong
from .dialects import FAMILIES
from .errors import ConfigError
from .sources import OF_ONE_BIND
from .sources import OF_ONE_SERVER
from .sources import Layer
from .sources import Sources
from .sources import for_all
from .sources import section_names


@dataclasses.dataclass(frozen=True)
class PoolSettings:
    """What Flask-CommonDB adds to a pool's settings; see the documentation's table."""

    min_size: int = 0
    max_idle: float | None = None
    ping_after: float | None = 5.0
    resolve_after: float | None = 30.0
    connect_timeout: float = 10.0
    statement_timeout: float | None = None
    lock_timeout: float | None = None
    #: Whether ``pool_recycle`` is the user's choice.
    recycle_is_given: bool = False


class Resolved(t.NamedTuple):
    """All places taken together.

    :param options: for ``engine_from_config()``, with the URL.
    :param settings: our own.
    """

    options: dict[str, t.Any]
    settings: PoolSettings


def resolve(sources: Sources) -> Resolved:
    """Lay one place over the other.

    :raises ConfigError: for what is no option, and for what stands in a layer of the server's own
        and that server cannot take.
    """
    engine = _capabilities(sources)
    lowest = Layer("", {**_built_in(engine), **sources.beneath})
    mistakes: list[str] = []
    named_in: dict[str, str] = {}
    merged: dict[str, t.Any] = {"connect_args": {}, "execution_options": {}}
    for layer in (lowest, *sources.in_order()):
        taken = _taken(layer, engine, mistakes)
        for name, value in taken.items():
            merged[name] = _merge(merged[name], value or {}) if name in DICTS else value
            named_in[name] = layer.key
        engine.tell_driver(merged, taken)
    mistakes += _check_sizes(merged, named_in)
    if mistakes:
        raise ConfigError(mistakes)
    engine.ask_driver(merged)
    # What no place names is not the user's choice, unless a subclass has changed upstream's value.
    upstreams = sources.beneath.get("pool_recycle", _UPSTREAMS_RECYCLE)
    is_given = bool(named_in.get("pool_recycle")) or upstreams != _UPSTREAMS_RECYCLE
    if not is_given and not engine.has_queue:
        merged.pop("pool_recycle", None)  # is about connections that wait in a queue
    own = {name.removeprefix("pool_"): merged.pop(name) for name in OWN if name in merged}
    options = {name: value for name, value in merged.items() if value or name not in DICTS}
    return Resolved({**options, "url": sources.url}, PoolSettings(**own, recycle_is_given=is_given))


def check_for_all(layer: Layer, engines: t.Collection[Sources]) -> t.Iterator[str]:
    """Names in a layer for several servers that none of them knows."""
    able = [_capabilities(sources) for sources in engines]
    for name in layer.options:
        if name not in OF_ONE_SERVER and not any(engine.knows(name) for engine in able):
            yield _no_option(layer, name, set().union(*(engine.known for engine in able)))


def check_defaults(
    key: str, defaults: t.Mapping[str, t.Any], engines: t.Collection[Sources]
) -> t.Iterator[str]:
    """What is wrong in :data:`COMMONDB_ENGINE_DEFAULTS` itself, whichever bind it is for."""
    general = for_all(defaults)
    drivers = sorted({sources.url.get_dialect().driver for sources in engines})
    for name in general:
        if name in FAMILIES:
            yield f"{key}[{name!r}]: must be a dict, not {type(general[name]).__name__}."
        elif name in OF_ONE_DRIVER and len(drivers) > 1:
            yield (
                f"{key}[{name!r}]: is not the same for each driver, and the binds have several:"
                f" {', '.join(drivers)}. Name it under its server: {key}['mysql'][{name!r}], say."
            )
    options = {name: value for name, value in general.items() if name not in FAMILIES}
    yield from _check_default_layer(Layer(key, options), engines)
    for name in defaults:
        if name not in general:
            layer = Layer(f"{key}[{name!r}]", defaults[name])
            yield from _check_section(layer, name, engines)


def maker_of(sources: Sources) -> str | None:
    """The option by which the user's own connections are made, ``None`` if there is none."""
    return _capabilities(sources).maker


def nearest(name: t.Any, known: t.Iterable[str]) -> str:
    """A question for the end of a sentence about a name that does not exist; may be empty."""
    matches = difflib.get_close_matches(str(name), sorted(map(str, known)), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


#: The lifetime that Flask-SQLAlchemy sets where none is given.
_UPSTREAMS_RECYCLE = 7200


def _capabilities(sources: Sources) -> Capabilities:
    """What the engine can take, with what is chosen for it."""
    layers = sources.in_order()
    chosen = {
        name: layer.options[name] for layer in layers for name in DECISIVE & layer.options.keys()
    }
    return Capabilities(sources.url, chosen)


def _built_in(engine: Capabilities) -> dict[str, t.Any]:
    """Our own defaults, where they are others than SQLAlchemy's."""
    built_in: dict[str, t.Any] = {}
    if engine.has_queue and not engine.family.is_local:
        built_in["pool_use_lifo"] = True  # so that the rest grows old, and can be let go
    if engine.connects and "connect_timeout" in engine.arguments:
        built_in["connect_timeout"] = PoolSettings.connect_timeout
    return built_in


def _taken(layer: Layer, engine: Capabilities, mistakes: list[str]) -> dict[str, t.Any]:
    """What of a layer goes into the engine."""
    taken = {}
    for name, value in layer.options.items():
        if name in OF_ONE_BIND and layer.whose == "an engine":  # a replica has none of these
            continue
        wrong = why_wrong(name, value) or engine.why_twice(name, layer.options)
        if wrong is not None:
            mistakes.append(f"{layer.key}: {wrong}")
        elif not engine.knows(name):
            if layer.is_own:
                mistakes.append(_no_option(layer, name, engine.known))
        elif (refusal := engine.why_not(name)) is None:
            taken[name] = value
        elif layer.is_own:
            mistakes.append(f"{layer.key}: {refusal}")
    return taken


def _no_option(layer: Layer, name: str, known: t.Collection[str]) -> str:
    names = known if layer.whose == "an engine" else {*known, "url", "weight"}
    return f"{layer.key}: {name!r} is no option of {layer.whose}{nearest(name, names)}."


def _merge(below: t.Mapping[str, t.Any], above: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """A new dict, also in its depths: what the user has given is shared by binds and apps."""
    merged = dict(below)
    for name, value in above.items():
        if isinstance(value, dict):
            old = merged.get(name)
            value = _merge(old if isinstance(old, dict) else {}, value)
        merged[name] = value
    return merged


def _check_sizes(merged: t.Mapping[str, t.Any], named_in: t.Mapping[str, str]) -> t.Iterator[str]:
    least = merged.get("pool_min_size", 0)
    try:
        size = int(merged.get("pool_size", 5))
    except (TypeError, ValueError):
        return  # SQLAlchemy will say so
    if least > size > 0:
        known_from = f"in {named_in['pool_size']}" if "pool_size" in named_in else "by default"
        yield (
            f"{named_in['pool_min_size']}: 'pool_min_size' is {least}, more than 'pool_size',"
            f" which is {size} {known_from}."
        )


def _check_default_layer(layer: Layer, engines: t.Collection[Sources]) -> t.Iterator[str]:
    for name in layer.options:
        if name in OF_ONE_SERVER:
            yield f"{layer.key}[{name!r}]: is of one server, and no default."
    if engines:
        yield from check_for_all(layer, engines)
    for name, value in layer.options.items():
        wrong = why_wrong(name, value)
        if wrong is not None:
            yield f"{layer.key}: {wrong}"


def _check_section(layer: Layer, name: str, engines: t.Collection[Sources]) -> t.Iterator[str]:
    """What is wrong in the defaults for one kind of server."""
    try:
        alone = Sources(sa.URL.create(name))
        dialect = alone.url.get_dialect()
    except (sa.exc.ArgumentError, TypeError):
        yield f"{layer.key}: SQLAlchemy has no dialect {name!r}{nearest(name, FAMILIES)}."
        return
    same = [sources for sources in engines if name in section_names(sources.url)]
    yield from _check_default_layer(layer, [*same, alone])
    for option in OWN:
        impossible = why_impossible(option, dialect) if option in layer.options else None
        if impossible is not None:
            yield f"{layer.key}: {impossible}"
