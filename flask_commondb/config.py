"""What ``app.config`` says, checked: every mistake is reported at once.

Owns: the ``COMMONDB_*`` keys, their defaults and types, and the check of the upstream keys that
Flask-CommonDB depends on. :func:`load` turns a mapping into one frozen :class:`Config`.

Must not: change the mapping's nested values, connect anywhere, or show a password.
"""

from __future__ import annotations

import dataclasses
import math
import re
import typing as t

import sqlalchemy as sa

from .capabilities import have_same_driver
from .dialects import FAMILIES
from .errors import ConfigError
from .options import check_defaults
from .options import check_for_all
from .options import maker_of
from .options import nearest
from .options import resolve
from .policies import POLICIES
from .policies import Policy
from .policies import fastest_of_two
from .primaries import why_no_candidate
from .scopes import FALLBACKS
from .scopes import is_lag
from .sources import Layer
from .sources import Sources
from .sources import reaching

#: ``COMMONDB_ROUTING``: by the request's method, or only inside explicit scopes.
ROUTINGS = ("auto", "explicit")


@dataclasses.dataclass(frozen=True)
class ReplicaConfig:
    """One replica of a bind.

    :param url: where it is.
    :param weight: its share of the reads, relative to the other replicas of the bind.
    :param options: engine options of its own; they go before the bind's.
    :param key: where it stands.
    :param zone: where its server stands.
    """

    url: sa.URL
    weight: float = 1
    options: t.Mapping[str, t.Any] = dataclasses.field(default_factory=dict, repr=False)
    key: str = dataclasses.field(default="", compare=False)
    zone: str | None = None

    def sources(self, bind: Sources) -> Sources:
        """What is said about the options of its engine, the bind's inherited ones included."""
        own = Layer(self.key, self.options, is_own=True, whose="a replica")
        return bind.of_replica(self.url, own)


@dataclasses.dataclass(frozen=True)
class ReadConfig:
    """How the reads of one bind find a replica: see :class:`.ReplicaSet`."""

    policy: Policy = fastest_of_two
    zones: tuple[str, ...] = ()
    max_lag: float | None = None
    fallback: str = "primary"
    fallback_limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of one app.

    :param reads: for each bind, also for one without replicas, which may get some.
    :param sources: for each bind all that is said about the options of its engine.
    :param candidates: for each bind that has any, where else its primary may be.
    """

    replicas: t.Mapping[str | None, tuple[ReplicaConfig, ...]]
    routing: str
    read_functions: frozenset[str]
    leak_watch: bool = False
    reads: t.Mapping[str | None, ReadConfig] = dataclasses.field(
        default_factory=dict, compare=False
    )
    sources: t.Mapping[str | None, Sources] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )
    candidates: t.Mapping[str | None, tuple[sa.URL, ...]] = dataclasses.field(default_factory=dict)


def load(config: t.MutableMapping[str, t.Any], engine_options: t.Mapping[str, t.Any]) -> Config:
    """Check ``app.config`` and freeze it. Defaults are written back, as Flask's extensions do.

    :param config: ``app.config``.
    :param engine_options: the constructor's; they may hold the default bind's URL.
    :raises ConfigError: naming every mistake.
    """
    mistakes: list[str] = []
    _unknown_keys(config, mistakes)
    urls, given = _binds(config, engine_options, mistakes)
    routing = config.setdefault("COMMONDB_ROUTING", "auto")
    if routing not in ROUTINGS:
        mistakes.append(
            f"COMMONDB_ROUTING: {routing!r} is not a routing"
            f"{nearest(routing, ROUTINGS)}; known are {', '.join(map(repr, ROUTINGS))}."
        )
    functions = config.setdefault("COMMONDB_READ_FUNCTIONS", ())
    if isinstance(functions, str) or not _all_strings(functions):
        mistakes.append(
            "COMMONDB_READ_FUNCTIONS: must be a list of function names,"
            f" not {type(functions).__name__}."
        )
        functions = ()
    leak_watch = config.setdefault("COMMONDB_LEAK_WATCH", False)
    if not isinstance(leak_watch, bool):
        mistakes.append(_wrong_type("COMMONDB_LEAK_WATCH", leak_watch, "True or False"))
    replicas = _replicas(config, urls, given, mistakes)
    reads = _reads(config, engine_options, urls, mistakes)
    sources = _sources(config, engine_options, urls, mistakes)
    candidates = _candidates(config, urls, engine_options, sources, mistakes)
    _resolve_all(sources, replicas, mistakes)
    if mistakes:
        raise ConfigError(list(dict.fromkeys(mistakes)))  # what is for several binds comes again
    names = frozenset(name.lower() for name in functions)
    return Config(replicas, routing, names, leak_watch, reads, sources, candidates)


def replica_config(entry: t.Any, url: sa.URL) -> ReplicaConfig:
    """Check a replica that is added at run time.

    :param entry: as in :data:`COMMONDB_REPLICAS`: a URL, or a dict.
    :param url: of its primary.
    :raises ConfigError: naming every mistake.
    """
    mistakes: list[str] = []
    found = list(_bind_replicas("db.add_replica()", [entry], _family(url), mistakes))
    if mistakes:
        raise ConfigError(mistakes)
    return found[0]


_KNOWN = (
    "COMMONDB_REPLICAS",
    "COMMONDB_CANDIDATES",
    "COMMONDB_POLICY",
    "COMMONDB_ZONES",
    "COMMONDB_MAX_LAG",
    "COMMONDB_FALLBACK",
    "COMMONDB_FALLBACK_LIMIT",
    "COMMONDB_ROUTING",
    "COMMONDB_READ_FUNCTIONS",
    "COMMONDB_LEAK_WATCH",
    "COMMONDB_ENGINE_DEFAULTS",
)

#: Beside these, all in the dict of a replica is for ``create_engine()``.
_REPLICA_KEYS = ("url", "weight", "zone")


class _Given(t.NamedTuple):
    """Replicas as they stand in the configuration.

    :param key: where they stand.
    :param bind_key: whose they are.
    """

    key: str
    bind_key: str | None
    value: t.Any


#: For each bind that is configured its URL, ``None`` if that is a mistake.
_URLs = dict["str | None", "sa.URL | None"]


def _unknown_keys(config: t.Mapping[str, t.Any], mistakes: list[str]) -> None:
    for key in sorted(key for key in config if str(key).startswith("COMMONDB_")):
        if key not in _KNOWN:
            near = nearest(key, _KNOWN) or f"; known are {', '.join(_KNOWN)}"
            mistakes.append(f"{key}: there is no such setting{near}.")


def _binds(
    config: t.MutableMapping[str, t.Any],
    engine_options: t.Mapping[str, t.Any],
    mistakes: list[str],
) -> tuple[_URLs, list[_Given]]:
    """The binds that are configured, and the replicas that stand beside their URLs."""
    urls: _URLs = {}
    given: list[_Given] = []
    known_before = len(mistakes)
    options = config.get("SQLALCHEMY_ENGINE_OPTIONS") or {}
    if not isinstance(options, t.Mapping):
        mistakes.append(_wrong_type("SQLALCHEMY_ENGINE_OPTIONS", options, "a dict"))
        options = {}
    options = {**engine_options, **options}
    default, key = config.get("SQLALCHEMY_DATABASE_URI"), "SQLALCHEMY_DATABASE_URI"
    if default is None:
        default, key = options.get("url"), "SQLALCHEMY_ENGINE_OPTIONS['url']"
    if default is not None:
        urls[None] = _url(key, default, mistakes)
        given.append(_Given("SQLALCHEMY_ENGINE_OPTIONS['replicas']", None, options.get("replicas")))

    binds = config.get("SQLALCHEMY_BINDS") or {}
    if not isinstance(binds, t.Mapping):
        mistakes.append(_wrong_type("SQLALCHEMY_BINDS", binds, "a dict of bind keys"))
        binds = {}
    for bind_key, value in binds.items():
        key = f"SQLALCHEMY_BINDS[{bind_key!r}]"
        only_options = bind_key is None and None in urls and isinstance(value, t.Mapping)
        if isinstance(value, t.Mapping):
            given.append(_Given(f"{key}['replicas']", bind_key, value.get("replicas")))
            value = value.get("url", engine_options.get("url"))
        if value is not None:
            url = _url(key, value, mistakes)
            # Where both stand, SQLALCHEMY_DATABASE_URI goes before SQLALCHEMY_BINDS[None].
            if bind_key is not None or None not in urls:
                urls[bind_key] = url
        elif not only_options:
            mistakes.append(f"{key}: has no 'url', so there is no database to bind.")
            urls[bind_key] = None

    if not urls and len(mistakes) == known_before:
        mistakes.append("Either 'SQLALCHEMY_DATABASE_URI' or 'SQLALCHEMY_BINDS' must be set.")
    return urls, [entry for entry in given if entry.value is not None]


def _replicas(
    config: t.MutableMapping[str, t.Any],
    urls: _URLs,
    given: list[_Given],
    mistakes: list[str],
) -> dict[str | None, tuple[ReplicaConfig, ...]]:
    setting = config.setdefault("COMMONDB_REPLICAS", None)
    if isinstance(setting, t.Mapping) and not setting.keys() & {*_REPLICA_KEYS}:
        given = [
            *given,
            *(_Given(f"COMMONDB_REPLICAS[{key!r}]", key, value) for key, value in setting.items()),
        ]
    elif setting:
        given = [*given, _Given("COMMONDB_REPLICAS", None, setting)]

    found: dict[str | None, tuple[ReplicaConfig, ...]] = {}
    for key, bind_key, value in given:
        wrong = _why_not_here("replicas", bind_key, urls, found)
        if wrong is not None:
            mistakes.append(f"{key}: {wrong}")
        else:
            found[bind_key] = tuple(_bind_replicas(key, value, _family(urls[bind_key]), mistakes))
    return {bind_key: replicas for bind_key, replicas in found.items() if replicas}


def _why_not_here(
    what: str, bind_key: str | None, urls: _URLs, found: t.Container[str | None]
) -> str | None:
    """Why servers cannot be given for a bind: there is none, or it has some already."""
    if bind_key in found:
        return f"the {what} of bind {bind_key!r} are given twice."
    if bind_key in urls:
        return None
    near = nearest(bind_key, [known for known in urls if known is not None])
    bind = "no default bind" if bind_key is None else f"no bind {bind_key!r}"
    known = ", ".join(map(repr, urls)) or "none"
    return f"there is {bind} for these {what}{near}; known are {known}."


def _reads(
    config: t.MutableMapping[str, t.Any],
    engine_options: t.Mapping[str, t.Any],
    urls: _URLs,
    mistakes: list[str],
) -> dict[str | None, ReadConfig]:
    """How reads find a replica: what is said for all binds, and beside the URL of one."""
    zones = config.setdefault("COMMONDB_ZONES", ())
    if isinstance(zones, str) or not isinstance(zones, t.Sequence) or not _all_strings(zones):
        mistakes.append(_wrong_type("COMMONDB_ZONES", zones, "a list of names, the nearest first"))
        zones = ()
    common: dict[str, t.Any] = {"zones": tuple(zones)}
    for name, (key, default, _) in _READ_SETTINGS.items():
        _note_read_setting(name, key, config.setdefault(key, default), common, mistakes)

    binds = _mapping(config.get("SQLALCHEMY_BINDS"))
    shared = {**engine_options, **_mapping(config.get("SQLALCHEMY_ENGINE_OPTIONS"))}
    found: dict[str | None, ReadConfig] = {}
    for bind_key in urls:
        key, beside = f"SQLALCHEMY_BINDS[{bind_key!r}]", _mapping(binds.get(bind_key))
        if bind_key is None:  # whose URL stands beside these, or alone
            key, beside = "SQLALCHEMY_ENGINE_OPTIONS", {**beside, **shared}
        own = dict(common)
        for name in _READ_SETTINGS:
            if name in beside:
                _note_read_setting(name, f"{key}[{name!r}]", beside[name], own, mistakes)
        found[bind_key] = ReadConfig(**own)
    return found


def _note_read_setting(
    name: str, key: str, value: t.Any, found: dict[str, t.Any], mistakes: list[str]
) -> None:
    wrong = _READ_SETTINGS[name][2](value)
    if wrong is not None:
        mistakes.append(f"{key}: {wrong}")
    else:
        found[name] = POLICIES[value] if isinstance(value, str) and name == "policy" else value


def _why_no_policy(value: t.Any) -> str | None:
    if callable(value) or (isinstance(value, str) and value in POLICIES):
        return None
    return (
        f"{value!r} is not a policy{nearest(value, POLICIES)}; it is one of"
        f" {', '.join(map(repr, POLICIES))}, or a function that takes a list of replicas and"
        " returns one of them."
    )


def _why_no_fallback(value: t.Any) -> str | None:
    if value in FALLBACKS:
        return None
    known = ", ".join(map(repr, FALLBACKS))
    return f"{value!r} is not a fallback{nearest(value, FALLBACKS)}; known are {known}."


def _why_no_lag(value: t.Any) -> str | None:
    if value is None or is_lag(value):
        return None
    return f"must be a number of seconds above 0, or None, not {value!r}."


def _why_no_limit(value: t.Any) -> str | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return None if value is None or is_count else f"must be 1 or more, or None, not {value!r}."


#: What may also stand beside the URL of one bind: the key that is for all, its default, and what is
#: wrong with a value.
_READ_SETTINGS: dict[str, tuple[str, t.Any, t.Callable[[t.Any], str | None]]] = {
    "policy": ("COMMONDB_POLICY", "fastest_of_two", _why_no_policy),
    "max_lag": ("COMMONDB_MAX_LAG", None, _why_no_lag),
    "fallback": ("COMMONDB_FALLBACK", "primary", _why_no_fallback),
    "fallback_limit": ("COMMONDB_FALLBACK_LIMIT", None, _why_no_limit),
}


def _candidates(
    config: t.MutableMapping[str, t.Any],
    urls: _URLs,
    engine_options: t.Mapping[str, t.Any],
    sources: t.Mapping[str | None, Sources],
    mistakes: list[str],
) -> dict[str | None, tuple[sa.URL, ...]]:
    """Where else the primary of each bind may be."""
    options = {**engine_options, **_mapping(config.get("SQLALCHEMY_ENGINE_OPTIONS"))}
    given = [_Given("SQLALCHEMY_ENGINE_OPTIONS['candidates']", None, options.get("candidates"))]
    for bind_key, bind in _mapping(config.get("SQLALCHEMY_BINDS")).items():
        key = f"SQLALCHEMY_BINDS[{bind_key!r}]['candidates']"
        given.append(_Given(key, bind_key, _mapping(bind).get("candidates")))
    key, setting = "COMMONDB_CANDIDATES", config.setdefault("COMMONDB_CANDIDATES", None)
    if isinstance(setting, t.Mapping):
        given += [_Given(f"{key}[{of!r}]", of, value) for of, value in setting.items()]
    else:
        given.append(_Given(key, None, setting))

    found: dict[str | None, tuple[sa.URL, ...]] = {}
    for key, bind_key, value in given:
        if not value and value in (None, (), []):
            continue
        wrong = _why_not_here("candidates", bind_key, urls, found)
        if wrong is not None:
            mistakes.append(f"{key}: {wrong}")
        elif bind_key in sources:
            found[bind_key] = tuple(_bind_candidates(key, value, sources[bind_key], mistakes))
    return {bind_key: candidates for bind_key, candidates in found.items() if candidates}


def _bind_candidates(
    key: str, value: t.Any, bind: Sources, mistakes: list[str]
) -> t.Iterator[sa.URL]:
    if isinstance(value, (str, sa.URL)):
        value = [value]
    if isinstance(value, t.Mapping) or not isinstance(value, t.Sequence):
        mistakes.append(_wrong_type(key, value, "a list of URLs"))
        return
    known = [bind.url]
    for index, entry in enumerate(value):
        url = _url(f"{key}[{index}]", entry, mistakes)
        wrong = None if url is None else why_no_candidate(url, known)
        if wrong is not None:
            mistakes.append(f"{key}[{index}]: {wrong}")
        elif url is not None:
            known.append(url)
            yield url
    maker = maker_of(bind)
    if maker is not None:
        mistakes.append(f"{key}: have no effect, because {maker!r} makes the connections.")


def _sources(
    config: t.MutableMapping[str, t.Any],
    engine_options: t.Mapping[str, t.Any],
    urls: _URLs,
    mistakes: list[str],
) -> dict[str | None, Sources]:
    """What is said about each bind's engine, each place in its order."""
    defaults = config.setdefault("COMMONDB_ENGINE_DEFAULTS", {})
    if not isinstance(defaults, t.Mapping):
        mistakes.append(_wrong_type("COMMONDB_ENGINE_DEFAULTS", defaults, "a dict"))
        defaults = {}
    common = _mapping(config.get("SQLALCHEMY_ENGINE_OPTIONS"))
    binds = _mapping(config.get("SQLALCHEMY_BINDS"))
    default = config.get("SQLALCHEMY_DATABASE_URI")
    basic = {**engine_options, **common, **({} if default is None else {"url": default})}
    known = [url for url in urls.values() if url is not None]
    shared = [
        Layer("CommonDB(engine_options=…)", engine_options),
        Layer("SQLALCHEMY_ENGINE_OPTIONS", common),
    ]

    sources: dict[str | None, Sources] = {}
    for bind_key, url in urls.items():
        if url is None:
            continue
        value = binds.get(bind_key, {})
        options = value if isinstance(value, t.Mapping) else {"url": value}
        own = Layer(f"SQLALCHEMY_BINDS[{bind_key!r}]", options, is_own=True)
        if bind_key is None and "url" in basic:
            # Flask-SQLAlchemy's own order, for the default bind.
            layers, given = (own, *shared), {**options, **basic}
        else:
            alike = [url, *(known if urls.get(None) is None else [urls[None]])]
            reached = reaching(common, url, is_same_driver=have_same_driver(*alike))
            layers = (shared[0], dataclasses.replace(shared[1], options=reached), own)
            given = {**engine_options, **options}
        sources[bind_key] = Sources(url, defaults, layers, given)
    engines = list(sources.values())
    mistakes += check_defaults("COMMONDB_ENGINE_DEFAULTS", defaults, engines)
    if engines:
        mistakes += [text for layer in shared for text in check_for_all(layer, engines)]
    return sources


def _resolve_all(
    sources: t.Mapping[str | None, Sources],
    replicas: t.Mapping[str | None, tuple[ReplicaConfig, ...]],
    mistakes: list[str],
) -> None:
    for bind_key, bind in sources.items():
        own = [replica.sources(bind) for replica in replicas.get(bind_key, ())]
        for engine in (bind, *own):
            try:
                resolve(engine)
            except ConfigError as error:
                mistakes += error.mistakes


def _bind_replicas(
    key: str, value: t.Any, family: str | None, mistakes: list[str]
) -> t.Iterator[ReplicaConfig]:
    if isinstance(value, (str, sa.URL, t.Mapping)):
        value = [value]
    if not isinstance(value, t.Sequence):
        mistakes.append(_wrong_type(key, value, "a list of replicas"))
        return
    for index, entry in enumerate(value):
        replica = _replica(f"{key}[{index}]", entry, mistakes)
        if replica is None:
            continue
        kind = _family(replica.url)
        if family is not None and kind != family:
            mistakes.append(f"{key}[{index}]: a {kind} server is no replica of a {family} server.")
        else:
            yield replica


def _replica(key: str, entry: t.Any, mistakes: list[str]) -> ReplicaConfig | None:
    options: dict[str, t.Any] = {}
    weight: t.Any = 1
    zone: t.Any = None
    if isinstance(entry, t.Mapping):
        options = {name: value for name, value in entry.items() if name not in _REPLICA_KEYS}
        weight = entry.get("weight", 1)
        zone = entry.get("zone")
        if "url" not in entry:
            near = "".join(nearest(name, ["url"]) for name in options)
            mistakes.append(f"{key}: a replica needs a 'url'{near}.")
            return None
        entry = entry["url"]
    if "isolation_level" in {**options, **_mapping(options.get("execution_options"))}:
        mistakes.append(
            f"{key}: 'isolation_level' cannot be chosen: a replica's connections are always in"
            " autocommit mode."
        )
        return None
    if not _is_number(weight) or not 0 < weight < math.inf:
        mistakes.append(f"{key}: 'weight' must be a number above 0, not {weight!r}.")
        return None
    if not isinstance(zone, (str, type(None))):
        mistakes.append(f"{key}: 'zone' must be a name, not {type(zone).__name__}.")
        return None
    url = _url(key, entry, mistakes)
    if url is None:
        return None
    if url.get_backend_name() not in FAMILIES:
        mistakes.append(
            f"{key}: a {url.get_backend_name()} server cannot hold a connection read-only, so it"
            f" cannot be a replica; those that can are {', '.join(FAMILIES)}."
        )
        return None
    if url.get_backend_name() == "sqlite" and _is_in_memory(url):
        mistakes.append(
            f"{key}: an in-memory SQLite database is no replica, it is another, empty database."
            " Name the primary's file."
        )
        return None
    return ReplicaConfig(url, weight, options, key, zone)


def _url(key: str, value: t.Any, mistakes: list[str]) -> sa.URL | None:
    """Parse a URL and load its dialect; note what is wrong with it."""
    if not isinstance(value, (str, sa.URL)):
        mistakes.append(_wrong_type(key, value, "a database URL"))
        return None
    try:
        url = sa.make_url(value)
    except (sa.exc.ArgumentError, ValueError):
        # The text may hold a password anywhere, so no more is shown than what is a scheme.
        scheme = re.match(r"[a-zA-Z][\w+]*(?=://)", str(value))
        shown = f"{scheme[0]}://…" if scheme else "the value"
        mistakes.append(
            f"{key}: {shown} is not a database URL;"
            " it must look like 'dialect+driver://user:password@host:port/database'."
        )
        return None
    try:
        url.get_dialect()
    except sa.exc.NoSuchModuleError:
        near = nearest(url.drivername, _DRIVERS)
        mistakes.append(f"{key}: SQLAlchemy has no dialect {url.drivername!r}{near}.")
        return None
    return url


_DRIVERS = (
    "mysql",
    "mariadb",
    "postgresql",
    "mysql+pymysql",
    "mysql+mysqldb",
    "mariadb+pymysql",
    "postgresql+psycopg",
    "postgresql+psycopg2",
    "sqlite",
)


def _family(url: sa.URL | None) -> str | None:
    """The family of servers that a URL leads to; MariaDB's and MySQL's is one."""
    if url is None:
        return None
    name = url.get_backend_name()
    return "mysql" if name == "mariadb" else name


def _is_in_memory(url: sa.URL) -> bool:
    database = url.database or ":memory:"
    return ":memory:" in database or url.query.get("mode") == "memory"


def _is_number(value: t.Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _mapping(value: t.Any) -> t.Mapping[t.Any, t.Any]:
    return value if isinstance(value, t.Mapping) else {}


def _all_strings(value: t.Any) -> bool:
    return isinstance(value, t.Collection) and all(isinstance(name, str) for name in value)


def _wrong_type(key: str, value: t.Any, wanted: str) -> str:
    return f"{key}: must be {wanted}, not {type(value).__name__}."
