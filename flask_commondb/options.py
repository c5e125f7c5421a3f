"""Which options the engine of a bind or replica gets, from all the places that name some.

Owns: the order of those places, what of them each server can take, the check of the names, and our
own options beside SQLAlchemy's.

Must not: know of Flask, make an engine, or change or show a value that a user has given.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import typing as t
import warnings

import sqlalchemy as sa
from sqlalchemy.util import get_cls_kwargs
from sqlalchemy.util import get_func_kwargs

from .dialects import FAMILIES
from .dialects import Generic
from .errors import ConfigError


@dataclasses.dataclass(frozen=True)
class PoolSettings:
    """What Flask-CommonDB adds to a pool's settings; see the documentation's table."""

    min_size: int = 0
    max_idle: float | None = None
    ping_after: float | None = 5.0
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


@dataclasses.dataclass(frozen=True)
class Layer:
    """What one place says.

    :param key: where it stands.
    :param options: as they stand there.
    :param is_own: it is about one server alone. What that server cannot take is a mistake then;
        from a layer for several it is left out.
    :param whose: for the message about a name that does not exist.
    """

    key: str
    options: t.Mapping[str, t.Any] = dataclasses.field(repr=False)  # may hold a password
    is_own: bool = False
    whose: str = "an engine"


@dataclasses.dataclass(frozen=True)
class Sources:
    """All that is said about the options of one engine.

    :param url: its server.
    :param defaults: :data:`COMMONDB_ENGINE_DEFAULTS`, below all layers.
    :param layers: the other places, lowest first.
    :param given: what Flask-SQLAlchemy makes of the places that it knows.
    :param beneath: what goes below everything.
    :param not_taken: options that are taken from a layer of its own only.
    """

    url: sa.URL
    defaults: t.Mapping[str, t.Any] = dataclasses.field(default_factory=dict, repr=False)
    layers: tuple[Layer, ...] = ()
    given: t.Mapping[str, t.Any] = dataclasses.field(default_factory=dict, repr=False)
    beneath: t.Mapping[str, t.Any] = dataclasses.field(default_factory=dict)
    not_taken: frozenset[str] = frozenset()

    def changed(self, options: t.Mapping[str, t.Any]) -> Sources:
        """With what has been done to :attr:`given` on its way to the call that makes the engine.

        Flask-SQLAlchemy adds to it, and so may a subclass of the user's.
        """
        changes = _changes(self.given, options)
        url = sa.make_url(changes.pop("url", self.url))
        beneath = {
            name: changes.pop(name)
            for name in _SET_BY_DEFAULT
            if name in changes and name not in self.given
        }
        gone = self.given.keys() - options.keys()
        layers = (
            dataclasses.replace(layer, options=_without(layer.options, gone))
            for layer in self.layers
        )
        return dataclasses.replace(
            self,
            url=url,
            layers=(*layers, Layer("_make_engine()", changes, is_own=True)),
            beneath={**self.beneath, **beneath},
        )

    def of_replica(self, url: sa.URL, own: Layer) -> Sources:
        """What a replica of this bind inherits, and its own options.

        Not what makes or holds connections to the primary, nor how these see the data.
        """
        not_for_other: set[str] = set()
        if not have_same_driver(self.url, url):
            not_for_other = _dialect_options(url) | _dialect_options(self.url)
        inherited = (
            Layer(layer.key, _without(layer.options, not_for_other)) for layer in self.layers
        )
        not_taken = frozenset({"creator", "pool", "isolation_level"})
        return dataclasses.replace(
            self, url=url, layers=(*inherited, own), given={}, not_taken=not_taken
        )


def resolve(sources: Sources) -> Resolved:
    """Lay one place over the other.

    :raises ConfigError: for what is no option, and for what stands in a layer of the server's own
        and that server cannot take.
    """
    server = _Server(sources)
    layers = [
        Layer("", {**server.built_in, **sources.beneath}),
        *_default_layers(sources.url, sources.defaults),
        *sources.layers,
    ]
    mistakes: list[str] = []
    named_in: dict[str, str] = {}
    merged: dict[str, t.Any] = {"connect_args": {}, "execution_options": {}}
    for layer in layers:
        taken = server.taken(layer, mistakes)
        server.lay_over(merged, taken)
        named_in.update(dict.fromkeys(taken, layer.key))
    _check_sizes(merged, named_in, mistakes)
    if mistakes:
        raise ConfigError(mistakes)
    recycle = sources.beneath.get("pool_recycle", _UPSTREAMS_RECYCLE)
    is_given = bool(named_in.get("pool_recycle")) or recycle != _UPSTREAMS_RECYCLE
    if not is_given and not server.has_queue:
        merged.pop("pool_recycle", None)
    server.read_back(merged)
    own = {field: merged.pop(name) for name, field in _OWN.items() if name in merged}
    options = {name: value for name, value in merged.items() if value or name not in _DEEP}
    return Resolved({**options, "url": sources.url}, PoolSettings(**own, recycle_is_given=is_given))


def reaching(
    options: t.Mapping[str, t.Any], url: sa.URL, *, is_same_driver: bool
) -> dict[str, t.Any]:
    """What of :data:`SQLALCHEMY_ENGINE_OPTIONS` is for another bind than the default one.

    :param url: the other bind's.
    :param is_same_driver: whether what a driver or its server understands is for it, too.
    """
    reaching = _beside_query(_without(options, (*_OF_ONE_SERVER, *_OF_ONE_LOG)), url)
    if not is_same_driver:
        reaching = _without_isolation(_without(reaching, _dialect_options(url)))
    return reaching


def have_same_driver(*urls: sa.URL) -> bool:
    """Whether what is said to the driver of one is understood by that of the others."""
    drivers = {
        (FAMILIES.get(_dialect(url).name, url.get_backend_name()), _dialect(url).driver)
        for url in urls
    }
    return len(drivers) < 2


def check_for_all(layer: Layer, engines: t.Collection[Sources]) -> t.Iterator[str]:
    """Names in a layer for several servers that none of them knows."""
    servers = [_Server(sources) for sources in engines]
    for name in layer.options:
        if name not in _OF_ONE_SERVER and not any(server.knows(name) for server in servers):
            known = set().union(*(server.known for server in servers))
            yield _no_option(layer, name, known)


def check_defaults(
    key: str, defaults: t.Mapping[str, t.Any], engines: t.Collection[Sources]
) -> t.Iterator[str]:
    """What is wrong in :data:`COMMONDB_ENGINE_DEFAULTS` itself, whichever bind it is for."""
    for_all = {name: value for name, value in defaults.items() if not _is_section(name, value)}
    drivers = sorted({_dialect(sources.url).driver for sources in engines})
    for name in for_all:
        if name in FAMILIES:
            yield f"{key}[{name!r}]: must be a dict, not {type(for_all[name]).__name__}."
        elif name in _OF_ONE_DRIVER and len(drivers) > 1:
            yield (
                f"{key}[{name!r}]: is not the same for each driver, and the binds have several:"
                f" {', '.join(drivers)}. Name it under its server: {key}['mysql'][{name!r}], say."
            )
    yield from _check_default_layer(Layer(key, _without(for_all, FAMILIES)), engines)
    for name in (name for name in defaults if name not in for_all):
        try:
            section = Sources(sa.URL.create(name))
            _dialect(section.url)
        except (sa.exc.ArgumentError, TypeError):
            near = nearest(name, FAMILIES)
            yield f"{key}[{name!r}]: SQLAlchemy has no dialect {name!r}{near}."
            continue
        layer = Layer(f"{key}[{name!r}]", defaults[name])
        same = [sources for sources in engines if name in _section_names(sources.url)]
        yield from _check_default_layer(layer, [*same, section])
        yield from _check_limits(layer, _dialect(section.url))


def nearest(name: t.Any, known: t.Iterable[str]) -> str:
    """A question for the end of a sentence about a name that does not exist; may be empty."""
    matches = difflib.get_close_matches(str(name), sorted(map(str, known)), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


#: Our own options, and their fields in :class:`PoolSettings`.
_OWN = {
    "pool_min_size": "min_size",
    "pool_max_idle": "max_idle",
    "pool_ping_after": "ping_after",
    "connect_timeout": "connect_timeout",
    "statement_timeout": "statement_timeout",
    "lock_timeout": "lock_timeout",
}

#: What each of them must be, ``None`` apart, which some may be as well.
_VALUES = {
    "pool_min_size": "a whole number, 0 or more",
    "pool_max_idle": "a number of seconds above 0, or None",
    "pool_ping_after": "a number of seconds, 0 or more, or None",
    "connect_timeout": "a number of seconds above 0",
    "statement_timeout": "a number of seconds above 0, or None",
    "lock_timeout": "a number of seconds above 0, or None",
}

#: Those that only a pool with a queue can have.
_OF_A_QUEUE = {"pool_min_size", "pool_max_idle", "pool_ping_after"}

#: Dicts that are merged.
_DEEP = ("connect_args", "execution_options")

#: What leads to one server, and is of no use for another.
_OF_ONE_SERVER = ("url", "replicas", "creator", "pool")

#: What names an engine in the log, or has it speak there. SQLALCHEMY_ECHO is for all binds.
_OF_ONE_LOG = ("echo", "echo_pool", "logging_name", "pool_logging_name")

#: What a driver or its server understands, beside the arguments of SQLAlchemy's dialect class.
_OF_ONE_DRIVER = ("connect_args", "module", "isolation_level")

#: Of all other options of ``create_engine()`` it is known which class takes them.
_OF_NO_CLASS = ("plugins", "poolclass", "creator", "pool", "future", "enable_from_linting")

#: SQLAlchemy's names of a pool's arguments, where they differ; else they are the same.
_POOL_NAMES = {
    "echo": "echo_pool",
    **{
        name: f"pool_{name}"
        for name in (
            "logging_name timeout recycle events reset_on_return pre_ping use_lifo".split()
        )
    },
}

#: What Flask-SQLAlchemy sets where nothing is given, and to what.
_SET_BY_DEFAULT = ("echo", "echo_pool", "pool_recycle")
_UPSTREAMS_RECYCLE = 7200


class _Server:
    """What one server, its driver and its pool can take."""

    def __init__(self, sources: Sources) -> None:
        url, layers = sources.url, _default_layers(sources.url, sources.defaults)
        chosen = {
            name: layer.options[name]
            for layer in (*layers, *sources.layers)
            for name in ("creator", "pool", "poolclass", "module", "plugins")
            if name in layer.options and (layer.is_own or name not in sources.not_taken)
        }
        self.url = url
        self.not_taken = sources.not_taken
        self.dialect = _dialect(url)
        self.family = FAMILIES.get(self.dialect.name, Generic)
        self.arguments = self.family.arguments.get(self.dialect.driver, {})
        self.pool_class = _pool_class(url, chosen)
        self.has_queue = issubclass(self.pool_class, sa.QueuePool) and not chosen.get("pool")
        self.maker = next((name for name in ("creator", "pool") if chosen.get(name)), None)
        self.has_plugins = bool(chosen.get("plugins") or "plugin" in url.query)
        self.pool_options = set() if chosen.get("pool") else _pool_options(self.pool_class)
        self.known = {
            *(_dialect_options(url) | self.pool_options | _engine_options()),
            *(_pool_options(sa.QueuePool) | _OWN.keys()),
            *_OF_NO_CLASS,
        }
        self.built_in: dict[str, t.Any] = {}
        if self.has_queue and not self.family.is_local:
            self.built_in["pool_use_lifo"] = True
        if "connect_timeout" in self.arguments and not (self.maker or chosen.get("module")):
            self.built_in["connect_timeout"] = PoolSettings.connect_timeout

    def knows(self, name: str) -> bool:
        return name in self.known or self.has_plugins

    def taken(self, layer: Layer, mistakes: list[str]) -> dict[str, t.Any]:
        """What of a layer goes into the engine."""
        taken = {}
        connect_args = layer.options.get("connect_args")
        if not isinstance(connect_args, t.Mapping):
            connect_args = {}
        for name, value in layer.options.items():
            if name in ("url", "replicas") or (name in self.not_taken and not layer.is_own):
                continue
            if not self.knows(name):
                if layer.is_own:
                    mistakes.append(_no_option(layer, name, self.known))
                continue
            wrong = _why_wrong(name, value)
            if wrong is not None:
                mistakes.append(f"{layer.key}: {wrong}")
                continue
            argument = self.arguments.get(name, ("",))[0]
            if argument in connect_args:
                mistakes.append(
                    f"{layer.key}: {name!r} and connect_args[{argument!r}] are the same; leave one"
                    " out."
                )
                continue
            refusal = self._why_not(name)
            if refusal is None:
                taken[name] = value
            elif layer.is_own:
                mistakes.append(f"{layer.key}: {refusal}")
        return _without_isolation(taken) if "isolation_level" in self.not_taken else taken

    def lay_over(self, merged: dict[str, t.Any], taken: t.Mapping[str, t.Any]) -> None:
        """Merge a layer; what the driver does itself is written among its own arguments."""
        for name, value in taken.items():
            merged[name] = _merge(merged[name], value or {}) if name in _DEEP else value
        arguments = merged["connect_args"]
        for option, (argument, convert) in self.arguments.items():
            if argument in (taken.get("connect_args") or ()):
                merged.pop(option, None)
            elif taken.get(option) is not None:
                arguments[argument] = convert(taken[option])
            elif option in taken:
                arguments.pop(argument, None)

    def read_back(self, merged: dict[str, t.Any]) -> None:
        """What the user has said to the driver itself holds for our settings, too."""
        for option, (argument, _) in self.arguments.items():
            said = merged["connect_args"].get(argument, self.url.query.get(argument))
            if option not in merged and isinstance(said, (int, float, str)):
                try:
                    merged[option] = float(said)
                except ValueError:
                    continue
                if not merged[option] > 0:  # the driver's word for no limit, or a mistake
                    del merged[option]

    def _why_not(self, name: str) -> str | None:
        in_vain = name in _pool_options(sa.QueuePool) and name not in self.pool_options
        if in_vain or (name in _OF_A_QUEUE and not self.has_queue):
            return f"{name!r} is not for this bind's pool, which is a {self.pool_class.__name__}."
        if name in ("statement_timeout", "lock_timeout") and self.family is Generic:
            return f"{name!r} is not known to be possible on {self.dialect.name}."
        if name == "pool_ping_after" and self.family.is_local:
            return _NO_PING
        argument = self.arguments.get(name, (None,))[0]
        if argument is None:
            if name == "connect_timeout":
                return _no_connect_timeout(self.dialect)
        elif self.maker is not None:
            return f"{name!r} has no effect, because {self.maker!r} makes the connections."
        elif argument in self.url.query:
            return f"{name!r} stands here, and {argument!r} in the URL; leave one out."
        return None


@functools.cache
def _engine_options() -> frozenset[str]:
    return frozenset(get_cls_kwargs(sa.Engine)) - {"url", "dialect", "pool"}


def _pool_options(pool_class: type[sa.Pool]) -> set[str]:
    names = get_cls_kwargs(pool_class) - {"creator", "dialect", "_dispatch"}
    return {_POOL_NAMES.get(name, name) for name in names}


def _dialect_options(url: sa.URL) -> set[str]:
    """What a driver or its server understands."""
    dialect = _dialect(url)
    names = {*get_cls_kwargs(dialect), *get_func_kwargs(dialect.import_dbapi)}
    return (names - {"cls", "dbapi", "compiler_linting"}) | {*_OF_ONE_DRIVER}


def _dialect(url: sa.URL) -> t.Any:
    return url.get_dialect()


def _pool_class(url: sa.URL, chosen: t.Mapping[str, t.Any]) -> type[sa.Pool]:
    if chosen.get("pool") is not None:
        return type(chosen["pool"])
    in_memory = url.database in (None, "", ":memory:")
    if in_memory and url.drivername in ("sqlite", "sqlite+pysqlite"):
        return sa.StaticPool  # Flask-SQLAlchemy's choice, whatever is configured
    given = chosen.get("poolclass")
    if isinstance(given, type) and issubclass(given, sa.Pool):
        return given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # create_engine() will warn
        return t.cast("type[sa.Pool]", _dialect(url).get_pool_class(url))


def _default_layers(url: sa.URL, defaults: t.Mapping[str, t.Any]) -> list[Layer]:
    """What of :data:`COMMONDB_ENGINE_DEFAULTS` is for a server."""
    key = "COMMONDB_ENGINE_DEFAULTS"
    for_all = {name: value for name, value in defaults.items() if not _is_section(name, value)}
    layers = [Layer(key, _beside_query(for_all, url))]
    for name in _section_names(url):
        if isinstance(defaults.get(name), t.Mapping):
            layers.append(Layer(f"{key}[{name!r}]", _beside_query(defaults[name], url)))
    return layers


def _section_names(url: sa.URL) -> list[str]:
    """What a server is called in :data:`COMMONDB_ENGINE_DEFAULTS`, the most general name first."""
    name = _dialect(url).name
    general = ["mysql"] if name == "mariadb" else []
    return list(dict.fromkeys([*general, name, url.get_backend_name()]))


def _is_section(name: str, value: t.Any) -> bool:
    return isinstance(value, t.Mapping) and name not in _DEEP


def _check_default_layer(layer: Layer, engines: t.Collection[Sources]) -> t.Iterator[str]:
    for name in layer.options:
        if name in _OF_ONE_SERVER:
            yield f"{layer.key}[{name!r}]: is of one server, and no default."
    if engines:
        yield from check_for_all(layer, engines)
    for name, value in layer.options.items():
        wrong = _why_wrong(name, value)
        if wrong is not None:
            yield f"{layer.key}: {wrong}"


def _check_limits(layer: Layer, dialect: t.Any) -> t.Iterator[str]:
    """What no server of a family can do."""
    family = FAMILIES.get(dialect.name, Generic)
    if "connect_timeout" in layer.options and not any(
        "connect_timeout" in arguments for arguments in family.arguments.values()
    ):
        yield f"{layer.key}: {_no_connect_timeout(dialect)}"
    if "pool_ping_after" in layer.options and family.is_local:
        yield f"{layer.key}: {_NO_PING}"
    for name in ("statement_timeout", "lock_timeout"):
        if name in layer.options and family is Generic:
            yield f"{layer.key}: {name!r} is not known to be possible on {dialect.name}."


_NO_PING = "'pool_ping_after' is not for SQLite, which has no server that could hang up."


def _no_connect_timeout(dialect: t.Any) -> str:
    if dialect.name == "sqlite":
        return "'connect_timeout' is not for SQLite, which opens a file and connects nowhere."
    return (
        f"'connect_timeout' is not known to be possible with the driver {dialect.driver!r};"
        " say it in 'connect_args', in the driver's own words."
    )


def _check_sizes(
    merged: t.Mapping[str, t.Any], named_in: t.Mapping[str, str], mistakes: list[str]
) -> None:
    least = merged.get("pool_min_size", 0)
    try:
        size = int(merged.get("pool_size", 5))
    except (TypeError, ValueError):
        return  # SQLAlchemy will say so
    if least > size > 0:
        where = named_in["pool_min_size"]
        of_size = named_in.get("pool_size")
        known_from = f"in {of_size}" if of_size else "by default"
        mistakes.append(
            f"{where}: 'pool_min_size' is {least}, more than 'pool_size', which is {size}"
            f" {known_from}."
        )


def _why_wrong(name: str, value: t.Any) -> str | None:
    """What is wrong with the value of an option, as far as it is checked here."""
    if name in _DEEP:
        if value is None or isinstance(value, t.Mapping):
            return None
        return f"{name!r} must be a dict, not {type(value).__name__}."
    wanted = _VALUES.get(name)
    if wanted is None or (value is None and wanted.endswith("None")):
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(value):
        is_whole = isinstance(value, int) or "whole" not in wanted
        if is_whole and (value > 0 or (value == 0 and "0 or more" in wanted)):
            return None
    shown = repr(value) if is_number or value in (None, True, False) else type(value).__name__
    return f"{name!r} must be {wanted}, not {shown}."


def _no_option(layer: Layer, name: str, known: t.Collection[str]) -> str:
    names = known if layer.whose == "an engine" else {*known, "url", "weight"}
    return f"{layer.key}: {name!r} is no option of {layer.whose}{nearest(name, names)}."


def _changes(before: t.Mapping[str, t.Any], after: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    changes: dict[str, t.Any] = {}
    for name, value in after.items():
        old = before.get(name)
        if name in _DEEP and isinstance(old, t.Mapping) and isinstance(value, t.Mapping):
            changes[name] = _changes(old, value)
        elif name not in before or old is not value:
            changes[name] = value
    return changes


def _merge(below: t.Mapping[str, t.Any], above: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """A new dict, also in its depths: what the user has given is shared by binds and apps."""
    merged = dict(below)
    for name, value in above.items():
        if isinstance(value, dict):
            old = merged.get(name)
            value = _merge(old if isinstance(old, dict) else {}, value)
        merged[name] = value
    return merged


def _without(options: t.Mapping[str, t.Any], names: t.Container[str]) -> dict[str, t.Any]:
    return {name: value for name, value in options.items() if name not in names}


def _without_isolation(options: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """It may stand among the execution options, too."""
    options = _without(options, ("isolation_level",))
    if isinstance(options.get("execution_options"), t.Mapping):
        options["execution_options"] = _without(options["execution_options"], ("isolation_level",))
    return options


def _beside_query(options: t.Mapping[str, t.Any], url: sa.URL) -> dict[str, t.Any]:
    """Without the driver's arguments that the server's own URL names."""
    options = dict(options)
    if url.query and isinstance(options.get("connect_args"), t.Mapping):
        options["connect_args"] = _without(options["connect_args"], url.query)
    return options
