"""What is said about the options of each engine, and which place says it.

Owns: the places, their order, and what of each is for which engine. Lowest first:
:data:`COMMONDB_ENGINE_DEFAULTS` for all servers, the same for one kind of server, then
:attr:`Sources.layers`.

Must not: know of Flask, say whether a name or a value is right, or change or show a value that a
user has given.
"""

from __future__ import annotations

import dataclasses
import typing as t

import sqlalchemy as sa

from .capabilities import DICTS
from .capabilities import dialect_options
from .capabilities import have_same_driver

#: What stands beside a bind's URL and is about its servers: no option of an engine.
OF_ONE_BIND = (
    *("url", "replicas", "candidates"),
    *("policy", "max_lag", "fallback", "fallback_limit"),
)

#: Seconds by default. Who waits for one replica could be answered by another.
REPLICA_CONNECT_TIMEOUT = 3.0

#: What leads to one server, and is of no use for another.
OF_ONE_SERVER = (*OF_ONE_BIND, "creator", "pool")


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
    :param beneath: what Flask-SQLAlchemy sets where nothing is given; below everything.
    :param not_taken: options that are taken from a layer of its own only, and ``isolation_level``
        from none.
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
            not_for_other = dialect_options(url) | dialect_options(self.url)
        inherited = (
            Layer(layer.key, _beside_query(_without(layer.options, not_for_other), url))
            for layer in self.layers
        )
        not_taken = frozenset({"creator", "pool", "isolation_level"})
        return dataclasses.replace(
            self,
            url=url,
            layers=(*inherited, own),
            given={},
            beneath={**self.beneath, "connect_timeout": REPLICA_CONNECT_TIMEOUT},
            not_taken=not_taken,
        )

    def in_order(self) -> list[Layer]:
        """The defaults of its server and the other places, lowest first.

        Each without what is not for this engine.
        """
        key = "COMMONDB_ENGINE_DEFAULTS"
        defaults = {key: for_all(self.defaults)}
        for name in section_names(self.url):
            if isinstance(self.defaults.get(name), t.Mapping):
                defaults[f"{key}[{name!r}]"] = self.defaults[name]
        lowest = (Layer(key, _beside_query(said, self.url)) for key, said in defaults.items())
        return [self._allowed(layer) for layer in (*lowest, *self.layers)]

    def _allowed(self, layer: Layer) -> Layer:
        options = layer.options if layer.is_own else _without(layer.options, self.not_taken)
        if "isolation_level" in self.not_taken:
            options = _without_isolation(options)
        return dataclasses.replace(layer, options=options)


def reaching(
    options: t.Mapping[str, t.Any], url: sa.URL, *, is_same_driver: bool
) -> dict[str, t.Any]:
    """What of :data:`SQLALCHEMY_ENGINE_OPTIONS` is for another bind than the default one.

    :param url: the other bind's.
    :param is_same_driver: whether what a driver or its server understands is for it, too.
    """
    reaching = _beside_query(_without(options, (*OF_ONE_SERVER, *_OF_ONE_LOG)), url)
    if not is_same_driver:
        reaching = _without_isolation(_without(reaching, dialect_options(url)))
    return reaching


def for_all(defaults: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """What of :data:`COMMONDB_ENGINE_DEFAULTS` is not in the section of one kind of server."""
    return {
        name: value
        for name, value in defaults.items()
        if name in DICTS or not isinstance(value, t.Mapping)
    }


def section_names(url: sa.URL) -> list[str]:
    """What a server is called in :data:`COMMONDB_ENGINE_DEFAULTS`, the most general name first."""
    dialect = url.get_dialect()
    general = ["mysql"] if dialect.name == "mariadb" else []
    names = dict.fromkeys([*general, dialect.name, url.get_backend_name()])
    return [*names, *(f"{name}+{dialect.driver}" for name in names)]


#: What names an engine in the log, or has it speak there. SQLALCHEMY_ECHO is for all binds.
_OF_ONE_LOG = ("echo", "echo_pool", "logging_name", "pool_logging_name")

#: What Flask-SQLAlchemy sets where nothing is given.
_SET_BY_DEFAULT = ("echo", "echo_pool", "pool_recycle")


def _changes(before: t.Mapping[str, t.Any], after: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    changes: dict[str, t.Any] = {}
    for name, value in after.items():
        old = before.get(name)
        if name in DICTS and isinstance(old, t.Mapping) and isinstance(value, t.Mapping):
            changes[name] = _changes(old, value)
        elif name not in before or old is not value:
            changes[name] = value
    return changes


def _without(options: t.Mapping[str, t.Any], names: t.Container[str]) -> dict[str, t.Any]:
    return {name: value for name, value in options.items() if name not in names}


def _beside_query(options: t.Mapping[str, t.Any], url: sa.URL) -> dict[str, t.Any]:
    """Without the driver's arguments that the server's own URL names."""
    options = dict(options)
    if url.query and isinstance(options.get("connect_args"), t.Mapping):
        options["connect_args"] = _without(options["connect_args"], url.query)
    return options


def _without_isolation(options: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """It may stand among the execution options, too."""
    options = _without(options, ("isolation_level",))
    if isinstance(options.get("execution_options"), t.Mapping):
        options["execution_options"] = _without(options["execution_options"], ("isolation_level",))
    return options
