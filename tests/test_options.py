"""Engine options: which place wins, what reaches which engine, and what is refused."""

from __future__ import annotations

import copy
import json
import re
import typing as t

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from hypothesis import given
from hypothesis import strategies as st

from flask_commondb import CommonDB
from flask_commondb import ConfigError
from flask_commondb.config import load
from flask_commondb.options import PoolSettings
from flask_commondb.options import Resolved
from flask_commondb.options import resolve

from .apps import Lab

if t.TYPE_CHECKING:
    from pathlib import Path

    from .servers import Database
    from .servers import MariaDBCluster
    from .servers import PostgreSQLCluster

#: No test connects to these.
MYSQL = "mysql+pymysql://host/app"
POSTGRESQL = "postgresql+psycopg://host/app"
SQLITE = "sqlite:////nowhere/app.db"

Options = dict[str, t.Any]


class Engines:
    """An app that connects nowhere, and the engines of its binds and of their replicas."""

    def __init__(self, config: Options, db: CommonDB | None = None, **arguments: t.Any) -> None:
        self.app = Flask("options")
        self.app.config.update(config)
        self.db = CommonDB(**arguments) if db is None else db
        self.db.init_app(self.app)
        with self.app.app_context():
            self.binds = dict(self.db.engines)
            self.replicas = dict(self.db.replica_engines)

    def __getitem__(self, bind_key: str | None) -> sa.Engine:
        return self.binds[bind_key]


def resolved(config: Options, bind_key: str | None = None, **engine_options: t.Any) -> Resolved:
    """What the configuration says about a bind."""
    return resolve(load(dict(config), engine_options).sources[bind_key])


def settings(config: Options, bind_key: str | None = None, **engine_options: t.Any) -> PoolSettings:
    return resolved(config, bind_key, **engine_options).settings


def arguments_of(engine: sa.Engine) -> Options:
    """What the driver would be given by the engine, that is stopped before it connects."""
    seen: list[Options] = []

    class Stop(Exception):
        pass

    def stop(dialect: object, entry: object, args: object, params: Options) -> None:
        seen.append(dict(params))
        raise Stop

    sa.event.listen(engine, "do_connect", stop)
    with pytest.raises(Stop):
        engine.raw_connection()
    sa.event.remove(engine, "do_connect", stop)
    return seen[-1]


def size_of(engine: sa.Engine) -> int:
    return t.cast(sa.QueuePool, engine.pool).size()


def recycle_of(engine: sa.Engine) -> int:
    return engine.pool._recycle


# The order ------------------------------------------------------------------------------------

#: Lowest first. A bind has all of them, and its replica one more.
PLACES = ("defaults", "family", "constructor", "common", "own", "replica")


def configured(places: t.Mapping[str, Options]) -> tuple[Options, Options]:
    """A config with the bind "orders" and its replica, and the constructor's arguments.

    :param places: for some of :data:`PLACES` the options that stand there.
    """
    replica = {"url": "mysql+pymysql://replica/app", **places.get("replica", {})}
    config: Options = {
        "SQLALCHEMY_DATABASE_URI": MYSQL,
        "COMMONDB_ENGINE_DEFAULTS": {
            **places.get("defaults", {}),
            "mysql": places.get("family", {}),
        },
        "SQLALCHEMY_ENGINE_OPTIONS": places.get("common", {}),
        "SQLALCHEMY_BINDS": {
            "orders": {"url": MYSQL, "replicas": [replica], **places.get("own", {})}
        },
    }
    return config, places.get("constructor", {})


#: For each option a value for each of the places, and how it is read.
OBSERVED: dict[str, tuple[t.Callable[[int], Options], t.Callable[[sa.Engine], t.Any]]] = {
    "pool_size": (lambda n: {"pool_size": 11 + n}, lambda e: size_of(e) - 11),
    "pool_recycle": (lambda n: {"pool_recycle": 100 + n}, lambda e: recycle_of(e) - 100),
    "connect_args": (
        lambda n: {"connect_args": {"ssl": {"mark": n}}},
        lambda e: arguments_of(e)["ssl"]["mark"],
    ),
    "execution_options": (
        lambda n: {"execution_options": {"mark": n}},
        lambda e: e.get_execution_options()["mark"],
    ),
    "connect_timeout": (
        lambda n: {"connect_timeout": 20 + n},
        lambda e: arguments_of(e)["connect_timeout"] - 20,
    ),
    "hide_parameters": (
        lambda n: {"hide_parameters": n},
        lambda e: e.hide_parameters,
    ),
}


@pytest.mark.parametrize("highest", range(len(PLACES)))
@pytest.mark.parametrize("option", OBSERVED)
def test_order(option: str, highest: int) -> None:
    """Of all places that name an option the highest wins; a replica has one place more."""
    value, read = OBSERVED[option]
    places = {place: value(n) for n, place in enumerate(PLACES) if n <= highest}
    config, engine_options = configured(places)
    engines = Engines(config, engine_options=engine_options)
    assert read(engines["orders"]) == min(highest, PLACES.index("own"))
    assert read(engines.replicas["orders"][0]) == highest


@pytest.mark.parametrize("highest", range(len(PLACES)))
@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("pool_min_size", "min_size"),
        ("pool_max_idle", "max_idle"),
        ("pool_ping_after", "ping_after"),
        ("pool_resolve_after", "resolve_after"),
        ("connect_timeout", "connect_timeout"),
        ("statement_timeout", "statement_timeout"),
        ("lock_timeout", "lock_timeout"),
    ],
)
def test_order_of_our_options(option: str, field: str, highest: int) -> None:
    """Our own options keep to the same order."""
    places = {place: {option: n + 0.5} for n, place in enumerate(PLACES) if n <= highest}
    if option == "pool_min_size":
        places = {place: {option: n} for n, place in enumerate(PLACES) if n <= highest}
    config, engine_options = configured(places)
    loaded = load(config, engine_options)
    bind = loaded.sources["orders"]
    (replica,) = loaded.replicas["orders"]
    own = PLACES.index("own")
    expected = [places[PLACES[min(highest, own)]][option], places[PLACES[highest]][option]]
    assert [getattr(resolve(s).settings, field) for s in (bind, replica.sources(bind))] == expected


def test_dicts_are_merged() -> None:
    """``connect_args`` and ``execution_options`` are merged, also the dicts in them."""
    places: dict[str, Options] = {
        place: {
            "connect_args": {"ssl": {place: n, "last": place}, place: n},
            "execution_options": {place: n, "last": place},
        }
        for n, place in enumerate(PLACES)
    }
    config, engine_options = configured(places)
    engines = Engines(config, engine_options=engine_options)
    (replica,) = engines.replicas["orders"]
    for engine, known in ((engines["orders"], PLACES[:-1]), (replica, PLACES)):
        arguments = arguments_of(engine)
        numbers = {place: n for n, place in enumerate(known)}
        assert arguments["ssl"] == {**numbers, "last": known[-1]}
        assert {place: arguments[place] for place in known} == numbers
        options = engine.get_execution_options()
        expected = {**numbers, "last": known[-1]}
        assert {name: options[name] for name in expected} == expected


NESTED = st.recursive(
    st.integers(0, 9), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)
ARGUMENTS = st.dictionaries(st.sampled_from("abc"), NESTED, max_size=3)


@given(st.lists(ARGUMENTS, min_size=len(PLACES), max_size=len(PLACES)))
def test_merge_of_anything(given_arguments: list[Options]) -> None:
    """What comes out is the places laid over each other, in dicts of its own."""
    places = {
        place: {"connect_args": arguments}
        for place, arguments in zip(PLACES, given_arguments, strict=True)
    }
    before = copy.deepcopy(places)
    config, engine_options = configured(places)
    loaded = load(config, engine_options)
    sources = loaded.replicas["orders"][0].sources(loaded.sources["orders"])
    merged = resolve(sources).options["connect_args"]
    expected: Options = {}
    for arguments in given_arguments:
        expected = laid_over(expected, arguments)
    assert merged == {**expected, "connect_timeout": 3}
    spoil(merged)
    assert places == before


def laid_over(below: t.Any, above: t.Any) -> t.Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    names = [*below, *(name for name in above if name not in below)]
    return {
        name: laid_over(below[name], above[name])
        if name in below and name in above
        else {**below, **above}[name]
        for name in names
    }


def spoil(value: Options) -> None:
    for inner in value.values():
        if isinstance(inner, dict):
            spoil(inner)
    value["spoilt"] = True


def test_default_bind() -> None:
    """For the default bind Flask-SQLAlchemy lets SQLALCHEMY_ENGINE_OPTIONS win over its dict in
    SQLALCHEMY_BINDS; so it is here."""
    config = {
        "SQLALCHEMY_DATABASE_URI": MYSQL,
        "SQLALCHEMY_ENGINE_OPTIONS": {"pool_size": 2},
        "SQLALCHEMY_BINDS": {None: {"pool_size": 3, "max_overflow": 4}},
    }
    for extension in (SQLAlchemy, CommonDB):
        app = Flask("default")
        app.config.update(config)
        db = extension(app)
        with app.app_context():
            assert (size_of(db.engine), db.engine.pool._max_overflow) == (2, 4)  # type: ignore[attr-defined]


def test_default_bind_without_uri() -> None:
    """A default bind that stands in SQLALCHEMY_BINDS only is like any other bind."""
    engines = Engines(
        {
            "SQLALCHEMY_ENGINE_OPTIONS": {"pool_size": 2, "pool_recycle": 9},
            "SQLALCHEMY_BINDS": {None: {"url": MYSQL, "pool_size": 3}},
        }
    )
    assert (size_of(engines[None]), recycle_of(engines[None])) == (3, 9)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mysql+pymysql://host", 2),
        ("mysql+mysqldb://host", 2),
        ("mariadb+pymysql://host", 3),
        ("postgresql+psycopg://host", 4),
        (SQLITE, 5),
        ("oracle+oracledb://host", 6),
        ("mssql+pyodbc://host", 1),
    ],
)
def test_defaults_of_a_server(url: str, expected: int) -> None:
    """Of the defaults, those of the bind's server go before those for all; ``"mysql"`` is for
    MariaDB, too."""
    defaults = {
        "pool_size": 1,
        "mysql": {"pool_size": 2, "pool_recycle": 7},
        "mariadb": {"pool_size": 3},
        "postgresql": {"pool_size": 4},
        "sqlite": {"pool_size": 5},
        "oracle": {"pool_size": 6},
    }
    config = {"SQLALCHEMY_DATABASE_URI": url, "COMMONDB_ENGINE_DEFAULTS": defaults}
    options = resolved(config).options
    assert options["pool_size"] == expected
    assert options.get("pool_recycle") == (7 if expected in (2, 3) else None)


def test_defaults_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """``COMMONDB_ENGINE_DEFAULTS`` can be given as JSON, or name by name."""
    app = Flask("environment")
    monkeypatch.setenv("FLASK_SQLALCHEMY_DATABASE_URI", MYSQL)
    monkeypatch.setenv(
        "FLASK_COMMONDB_ENGINE_DEFAULTS",
        json.dumps({"pool_size": 3, "mysql": {"lock_timeout": 2.5}}),
    )
    monkeypatch.setenv("FLASK_COMMONDB_ENGINE_DEFAULTS__mysql__statement_timeout", "30")
    app.config.from_prefixed_env()
    options, own = resolve(load(app.config, {}).sources[None])
    assert options["pool_size"] == 3
    assert (own.lock_timeout, own.statement_timeout) == (2.5, 30)


def test_none_takes_a_lower_value_away() -> None:
    """``None`` in a higher place means none, where an option may have none."""
    config = {
        "COMMONDB_ENGINE_DEFAULTS": {
            "statement_timeout": 3,
            "lock_timeout": 3,
            "pool_max_idle": 3,
            "pool_ping_after": 3,
        },
        "SQLALCHEMY_BINDS": {
            key: {
                "url": url,
                "statement_timeout": None,
                "lock_timeout": None,
                "pool_max_idle": None,
                **({"pool_ping_after": None} if key == "a" else {}),
            }
            for key, url in (("a", MYSQL), ("b", SQLITE))
        },
    }
    engines = Engines(config)
    for key in "ab":
        own = settings(config, key)
        assert (own.statement_timeout, own.lock_timeout) == (None, None)
        assert (own.max_idle, own.ping_after) == (None, None if key == "a" else 5)
    assert "timeout" not in arguments_of(engines["b"])


def test_echo_is_upstreams() -> None:
    """``SQLALCHEMY_ECHO`` is for all binds and their replicas, below what is said of one."""
    engines = Engines(
        {
            "SQLALCHEMY_DATABASE_URI": SQLITE,
            "SQLALCHEMY_ECHO": True,
            "SQLALCHEMY_ENGINE_OPTIONS": {"echo": False},
            "SQLALCHEMY_BINDS": {
                "a": {"url": SQLITE, "replicas": [SQLITE]},
                "b": {"url": SQLITE, "echo": False},
            },
        }
    )
    assert [bool(engines[key].echo) for key in (None, "a", "b")] == [False, True, False]
    assert [bool(engines[key].pool.echo) for key in (None, "a", "b")] == [True, True, True]
    assert engines.replicas["a"][0].echo is True


def test_echo_by_default() -> None:
    """``echo`` among the defaults goes before a ``SQLALCHEMY_ECHO`` that nobody has set."""
    config = {"SQLALCHEMY_DATABASE_URI": SQLITE, "COMMONDB_ENGINE_DEFAULTS": {"echo": True}}
    assert Engines(config)[None].echo is True


# What reaches which bind ----------------------------------------------------------------------


def test_engine_options_for_all_binds() -> None:
    """SQLALCHEMY_ENGINE_OPTIONS reaches every bind; what is the driver's, those of one driver."""
    common: Options = {
        "pool_size": 3,
        "pool_pre_ping": True,
        "hide_parameters": True,
        "statement_timeout": 7,
        "connect_args": {"read_timeout": 5},
        "isolation_level": "READ COMMITTED",
        "execution_options": {"mark": 1, "isolation_level": "READ UNCOMMITTED"},
        "json_serializer": str,
        "is_mariadb": True,
        "logging_name": "primary",
    }
    config = {
        "SQLALCHEMY_DATABASE_URI": MYSQL,
        "SQLALCHEMY_ENGINE_OPTIONS": common,
        "SQLALCHEMY_BINDS": {
            "same": "mariadb+pymysql://other/app",
            "driver": "mysql+mysqldb://other/app",
            "postgresql": POSTGRESQL,
            "sqlite": SQLITE,
        },
    }
    Engines(config)
    for key in (None, "same", "driver", "postgresql", "sqlite"):
        options, own = resolved(config, key)
        assert (options["pool_size"], options["pool_pre_ping"]) == (3, True)
        assert options["hide_parameters"] is True
        assert own.statement_timeout == 7
        of_driver = {"connect_args", "isolation_level", "json_serializer", "is_mariadb"}
        if key in (None, "same"):
            assert of_driver <= options.keys()
            assert options["connect_args"]["read_timeout"] == 5
            assert options["execution_options"] == common["execution_options"]
        else:
            assert of_driver & options.keys() <= {"connect_args"}
            assert "read_timeout" not in options.get("connect_args", {})
            assert options["execution_options"] == {"mark": 1}
        assert ("logging_name" in options) is (key is None)


def test_what_leads_to_one_server() -> None:
    """A ``creator`` or ``pool`` of SQLALCHEMY_ENGINE_OPTIONS is the default bind's alone."""
    for name, value in (("creator", dict), ("pool", sa.create_engine("sqlite://").pool)):
        config = {
            "SQLALCHEMY_DATABASE_URI": SQLITE,
            "SQLALCHEMY_ENGINE_OPTIONS": {name: value},
            "SQLALCHEMY_BINDS": {"other": SQLITE},
        }
        assert resolved(config).options[name] is value
        assert name not in resolved(config, "other").options
        Engines(config)


def test_engine_options_without_a_default_bind() -> None:
    """Without a default bind they reach all binds, the driver's if all have the same driver."""
    config: Options = {
        "SQLALCHEMY_ENGINE_OPTIONS": {"pool_size": 3, "connect_args": {"read_timeout": 5}},
        "SQLALCHEMY_BINDS": {"a": MYSQL, "b": "mysql+pymysql://other"},
    }
    for key in "ab":
        options = resolved(config, key).options
        assert (options["pool_size"], options["connect_args"]["read_timeout"]) == (3, 5)
    config["SQLALCHEMY_BINDS"]["c"] = POSTGRESQL
    for key in "abc":
        options = resolved(config, key).options
        assert options["pool_size"] == 3
        assert "read_timeout" not in options["connect_args"]


def test_a_urls_own_arguments() -> None:
    """What a bind's URL says to the driver goes before what is said to all binds."""
    config: Options = {
        "SQLALCHEMY_DATABASE_URI": MYSQL,
        "SQLALCHEMY_ENGINE_OPTIONS": {
            "connect_args": {"read_timeout": 5, "connect_timeout": 4, "write_timeout": 6}
        },
        "SQLALCHEMY_BINDS": {"a": f"{MYSQL}?read_timeout=8&connect_timeout=7"},
    }
    arguments = arguments_of(Engines(config)["a"])
    assert [int(arguments[f"{name}_timeout"]) for name in ("read", "connect", "write")] == [8, 7, 6]
    assert settings(config, "a").connect_timeout == 7


def test_the_constructors_options_reach_every_bind() -> None:
    """The constructor's options are for every bind, whatever its driver, as in Flask-SQLAlchemy."""
    made: list[bool] = []

    def creator() -> t.Any:
        made.append(True)
        raise sa.exc.OperationalError("", {}, Exception())

    config = {"SQLALCHEMY_DATABASE_URI": MYSQL, "SQLALCHEMY_BINDS": {"a": SQLITE, "b": POSTGRESQL}}
    engines = Engines(config, engine_options={"creator": creator, "pool_size": 2})
    for engine in engines.binds.values():
        assert size_of(engine) == 2
        with pytest.raises(sa.exc.OperationalError):
            engine.connect()
    assert len(made) == 3


@pytest.mark.parametrize("place", ["COMMONDB_ENGINE_DEFAULTS", "constructor", "common"])
def test_pools_that_cannot_take_it(place: str) -> None:
    """From a place for all binds each pool has what it can take."""
    for_all: Options = {
        "pool_size": 3,
        "max_overflow": 4,
        "pool_timeout": 5,
        "pool_use_lifo": False,
        "pool_min_size": 2,
        "pool_max_idle": 60,
        "pool_ping_after": 1,
        "pool_resolve_after": 1,
        "pool_recycle": 100,
    }
    config: Options = {
        "SQLALCHEMY_DATABASE_URI": "sqlite://",
        "SQLALCHEMY_BINDS": {
            "null": {"url": MYSQL, "poolclass": sa.NullPool},
            "thread": {"url": SQLITE, "poolclass": sa.pool.SingletonThreadPool},
            "static": {"url": SQLITE, "poolclass": sa.StaticPool},
            "queue": MYSQL,
        },
        "COMMONDB_ENGINE_DEFAULTS": for_all if place.startswith("COMMONDB") else {},
        "SQLALCHEMY_ENGINE_OPTIONS": for_all if place == "common" else {},
    }
    constructor = for_all if place == "constructor" else {}
    engines = Engines(config, engine_options=constructor)
    classes = {key: type(engine.pool).__name__ for key, engine in engines.binds.items()}
    # The pool with a queue tells when it is exhausted, and is of a class of its own for that.
    assert isinstance(engines["queue"].pool, sa.QueuePool)
    del classes["queue"]
    assert classes == {
        None: "StaticPool",
        "null": "NullPool",
        "thread": "SingletonThreadPool",
        "static": "StaticPool",
    }
    assert engines["thread"].pool.size == 3  # type: ignore[attr-defined]
    assert size_of(engines["queue"]) == 3
    for key, engine in engines.binds.items():
        assert recycle_of(engine) == 100
        own = settings(config, key, **constructor)
        expected = (2, 60, 1, 1) if key == "queue" else (0, None, 5, 30)
        assert (own.min_size, own.max_idle, own.ping_after, own.resolve_after) == expected


def test_dialects_that_cannot_take_it() -> None:
    """An option that only some of the binds' dialects have is left out elsewhere."""
    config = {"SQLALCHEMY_DATABASE_URI": MYSQL, "SQLALCHEMY_BINDS": {"a": SQLITE, "b": POSTGRESQL}}
    options = {"use_native_hstore": False, "native_datetime": True}
    taken = {
        key: options.keys() & resolved(config, key, **options).options for key in (None, *"ab")
    }
    assert taken == {None: set(), "a": {"native_datetime"}, "b": {"use_native_hstore"}}
    Engines(config, engine_options=options)


def test_ready_made_pool() -> None:
    """With a ``pool`` that is ready, options for making one are left out."""
    pool = sa.create_engine(SQLITE).pool
    config = {
        "SQLALCHEMY_DATABASE_URI": SQLITE,
        "SQLALCHEMY_ENGINE_OPTIONS": {"pool": pool, "pool_size": 3, "pool_recycle": 9},
    }
    assert Engines(config)[None].pool is pool


# Built-in defaults ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [(MYSQL, True), (POSTGRESQL, True), (SQLITE, False), ("mssql+pyodbc://host", True)],
)
def test_the_last_connection_is_the_next(url: str, expected: bool) -> None:
    """A server's pool gives out the connection that came back last, unless told otherwise."""
    config: Options = {"SQLALCHEMY_DATABASE_URI": url}
    assert resolved(config).options.get("pool_use_lifo", False) is expected
    assert resolved(config, pool_use_lifo=False).options["pool_use_lifo"] is False
    if url == MYSQL:
        assert t.cast(t.Any, Engines(config)[None].pool)._pool.use_lifo is True
        config["SQLALCHEMY_ENGINE_OPTIONS"] = {"poolclass": sa.NullPool}
        assert "pool_use_lifo" not in resolved(config).options


@pytest.mark.parametrize(
    ("options", "recycle", "is_given"),
    [
        ({}, 7200, False),
        ({"pool_recycle": 7200}, 7200, True),
        ({"pool_recycle": "280"}, 280, True),
        ({"pool_recycle": -1}, -1, True),
        ({"poolclass": sa.QueuePool}, 7200, False),
        ({"poolclass": sa.NullPool}, -1, False),
        ({"poolclass": sa.NullPool, "pool_recycle": 280}, 280, True),
    ],
)
@pytest.mark.parametrize("place", PLACES)
def test_recycle(
    monkeypatch: pytest.MonkeyPatch, place: str, options: Options, recycle: int, is_given: bool
) -> None:
    """Flask-SQLAlchemy's lifetime for MySQL is not the user's choice, and only for a queue."""
    seen = prepared(monkeypatch)
    config, engine_options = configured({place: options})
    engines = Engines(config, engine_options=engine_options)
    (replica,) = engines.replicas["orders"]
    assert (recycle_of(replica), seen[replica].recycle_is_given) == (recycle, is_given)
    if place == "replica":
        recycle, is_given = 7200, False
    bind = engines["orders"]
    assert (recycle_of(bind), seen[bind].recycle_is_given) == (recycle, is_given)


def prepared(monkeypatch: pytest.MonkeyPatch) -> dict[sa.Engine, PoolSettings]:
    """The settings with which each engine has been made ready."""
    from flask_commondb import pools

    seen: dict[sa.Engine, PoolSettings] = {}
    for name in ("prepare", "prepare_replica"):
        original = getattr(pools, name)

        def note(
            engine: sa.Engine,
            given_settings: PoolSettings,
            *args: t.Any,
            original: t.Any = original,
            **kwargs: t.Any,
        ) -> t.Any:
            seen[engine] = given_settings
            return original(engine, given_settings, *args, **kwargs)

        monkeypatch.setattr(pools, name, note)
    return seen


def test_settings_reach_the_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is resolved is what the pools are made ready with, for binds and replicas."""
    seen = prepared(monkeypatch)
    own = {
        "pool_min_size": 1,
        "pool_max_idle": 30,
        "pool_ping_after": None,
        "pool_resolve_after": 20,
        "connect_timeout": 3,
        "statement_timeout": 4.5,
        "lock_timeout": 6,
    }
    config, _ = configured({"own": own, "replica": {"pool_min_size": 2}})
    engines = Engines(config)
    expected = PoolSettings(1, 30, None, 20, 3, 4.5, 6)
    assert seen[engines["orders"]] == expected
    assert seen[engines.replicas["orders"][0]] == PoolSettings(2, 30, None, 20, 3, 4.5, 6)
    assert seen[engines[None]] == PoolSettings()


# Time limits ----------------------------------------------------------------------------------


def test_connect_timeout_of_a_replica() -> None:
    """By default a replica is given up sooner than a primary; what any place says goes before."""
    for said, expected in [(None, 3.0), (7, 7)]:
        config: Options = {
            "SQLALCHEMY_BINDS": {"a": {"url": MYSQL, "replicas": [MYSQL]}},
            "COMMONDB_ENGINE_DEFAULTS": {} if said is None else {"connect_timeout": said},
        }
        loaded = load(config, {})
        sources = loaded.replicas["a"][0].sources(loaded.sources["a"])
        assert resolve(sources).options["connect_args"]["connect_timeout"] == expected


@pytest.mark.parametrize(
    ("url", "seconds", "expected"),
    [
        ("mysql+pymysql://host", 2.5, 2.5),
        ("mariadb+pymysql://host", 2.5, 2.5),
        ("mysql+mysqldb://host", 2.5, 3),
        ("postgresql+psycopg://host", 2.5, 3),
        ("postgresql+psycopg2://host", 0.1, 1),
        ("mysql+pymysql://host", None, 10),
        ("mysql+mysqldb://host", None, 10),
        ("postgresql+psycopg://host", None, 10),
        ("postgresql+psycopg2://host", None, 10),
    ],
)
def test_connect_timeout(url: str, seconds: float | None, expected: float) -> None:
    """``connect_timeout`` is the driver's own argument, whole where the driver wants it so."""
    options = {} if seconds is None else {"connect_timeout": seconds}
    config = {"SQLALCHEMY_BINDS": {"a": {"url": url, **options}}}
    found, own = resolved(config, "a")
    argument = found["connect_args"]["connect_timeout"]
    assert argument == expected
    assert isinstance(argument, int) or "pymysql" in url
    assert own.connect_timeout == (10 if seconds is None else seconds)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ({"common": {"connect_args": {"connect_timeout": 3}}}, 3),
        (
            {
                "defaults": {"connect_timeout": 5},
                "common": {"connect_args": {"connect_timeout": 3}},
            },
            3,
        ),
        (
            {
                "common": {"connect_args": {"connect_timeout": 3}},
                "own": {"connect_timeout": 5},
            },
            5,
        ),
        ({"common": {"connect_timeout": 5}, "own": {"url": f"{MYSQL}?connect_timeout=3"}}, 3),
        ({"defaults": {"connect_timeout": 5}, "own": {"url": f"{MYSQL}?connect_timeout=3"}}, 3),
    ],
)
def test_the_drivers_own_word(places: dict[str, Options], expected: int) -> None:
    """What the user says to the driver itself stands against a ``connect_timeout`` of a lower
    place, and not against one of a higher."""
    config, engine_options = configured(places)
    engines = Engines(config, engine_options=engine_options)
    assert int(arguments_of(engines["orders"])["connect_timeout"]) == expected
    assert settings(config, "orders").connect_timeout == expected


def test_who_connects_himself() -> None:
    """Nothing is added to the arguments of a driver that is the user's own, or not asked."""
    for name, value in (("creator", dict), ("module", __import__("pymysql"))):
        config = {"SQLALCHEMY_BINDS": {"a": {"url": MYSQL, name: value}}}
        assert "connect_args" not in resolved(config, "a").options
    options: Options = {"connect_timeout": 3, "creator": dict}
    assert "connect_args" not in resolved({"SQLALCHEMY_DATABASE_URI": MYSQL}, **options).options


def test_limits_where_they_are_not_known() -> None:
    """From a place for all binds, limits are left out where they are not known to be possible."""
    limits = {"connect_timeout": 3, "statement_timeout": 4, "lock_timeout": 5}
    config = {
        "COMMONDB_ENGINE_DEFAULTS": limits,
        "SQLALCHEMY_BINDS": {
            "a": "oracle+oracledb://host",
            "b": SQLITE,
            "c": "mysql+mysqlconnector://host",
        },
    }
    found = {key: resolved(config, key) for key in "abc"}
    assert "connect_args" not in found["a"].options
    assert found["b"].options["connect_args"] == {"timeout": 5}
    assert "connect_args" not in found["c"].options
    assert {
        key: (f.settings.statement_timeout, f.settings.lock_timeout) for key, f in found.items()
    } == {
        "a": (None, None),
        "b": (4, 5),
        "c": (4, 5),
    }


# Mistakes -------------------------------------------------------------------------------------


class Plugin(sa.engine.CreateEnginePlugin):
    """Takes an option that is known to nobody else."""

    def __init__(self, url: sa.URL, kwargs: Options) -> None:
        kwargs.pop("of_the_plugin", None)

    def update_url(self, url: sa.URL) -> sa.URL:
        return url.difference_update_query(["plugin"])


@pytest.fixture
def plugin() -> t.Iterator[str]:
    sa.dialects.plugins.register("of_a_test", __name__, "Plugin")
    yield "of_a_test"
    del sa.dialects.plugins.impls["of_a_test"]


URI: Options = {"SQLALCHEMY_DATABASE_URI": MYSQL}
MEMORY: Options = {"SQLALCHEMY_DATABASE_URI": "sqlite://"}
BIND = "SQLALCHEMY_BINDS['a']"
COMMON = "SQLALCHEMY_ENGINE_OPTIONS"
DEFAULTS = "COMMONDB_ENGINE_DEFAULTS"
SIZE = "'pool_siez' is no option of an engine (did you mean 'pool_size'?)."


def bind(url: str = MYSQL, **options: t.Any) -> Options:
    return {"SQLALCHEMY_BINDS": {"a": {"url": url, **options}}}


@pytest.mark.parametrize(
    ("config", "engine_options", "mistakes"),
    [
        pytest.param({**URI, COMMON: {"pool_siez": 2}}, {}, [f"{COMMON}: {SIZE}"], id="common"),
        pytest.param({**URI, DEFAULTS: {"pool_siez": 2}}, {}, [f"{DEFAULTS}: {SIZE}"], id="all"),
        pytest.param(
            {**URI, DEFAULTS: {"mysql": {"pool_siez": 2}}},
            {},
            [f"{DEFAULTS}['mysql']: {SIZE}"],
            id="family",
        ),
        pytest.param(
            {**URI, DEFAULTS: {"postgresql": {"pool_siez": 2}}},
            {},
            [f"{DEFAULTS}['postgresql']: {SIZE}"],
            id="family that no bind has",
        ),
        pytest.param(
            URI, {"pool_siez": 2}, [f"CommonDB(engine_options=…): {SIZE}"], id="constructor"
        ),
        pytest.param(bind(pool_siez=2), {}, [f"{BIND}: {SIZE}"], id="bind"),
        pytest.param(
            {**URI, "SQLALCHEMY_BINDS": {None: {"pool_siez": 2}}},
            {},
            [f"SQLALCHEMY_BINDS[None]: {SIZE}"],
            id="default bind",
        ),
        pytest.param(
            bind(replicas=[MYSQL, {"url": MYSQL, "pool_siez": 2}]),
            {},
            [
                f"{BIND}['replicas'][1]: 'pool_siez' is no option of a replica (did you mean"
                " 'pool_size'?)."
            ],
            id="replica",
        ),
        pytest.param(
            {
                **URI,
                COMMON: {"echo_poll": True, "pool_class": sa.NullPool},
                DEFAULTS: {"conect_timeout": 3},
                "SQLALCHEMY_BINDS": {"a": {"url": POSTGRESQL, "statement_timout": 3, "zzz": 1}},
            },
            {"lock_timeouts": 3},
            [
                f"{DEFAULTS}: 'conect_timeout' is no option of an engine (did you mean"
                " 'connect_timeout'?).",
                "CommonDB(engine_options=…): 'lock_timeouts' is no option of an engine (did you"
                " mean 'lock_timeout'?).",
                f"{COMMON}: 'echo_poll' is no option of an engine (did you mean 'echo_pool'?).",
                f"{COMMON}: 'pool_class' is no option of an engine (did you mean 'poolclass'?).",
                f"{BIND}: 'statement_timout' is no option of an engine (did you mean"
                " 'statement_timeout'?).",
                f"{BIND}: 'zzz' is no option of an engine.",
            ],
            id="several",
        ),
        pytest.param(
            bind(use_native_hstore=True),
            {},
            [f"{BIND}: 'use_native_hstore' is no option of an engine."],
            id="of another dialect",
        ),
        pytest.param(
            {**URI, DEFAULTS: {"mysq": {"pool_size": 2}}},
            {},
            [f"{DEFAULTS}['mysq']: SQLAlchemy has no dialect 'mysq' (did you mean 'mysql'?)."],
            id="misspelt family",
        ),
        pytest.param(
            {**URI, DEFAULTS: {"mysql": 5}},
            {},
            [f"{DEFAULTS}['mysql']: must be a dict, not int."],
            id="family that is no dict",
        ),
        pytest.param(
            {**URI, DEFAULTS: [1]}, {}, [f"{DEFAULTS}: must be a dict, not list."], id="no dict"
        ),
        pytest.param(
            {**URI, DEFAULTS: {"url": MYSQL, "mysql": {"creator": dict}}},
            {},
            [
                f"{DEFAULTS}['url']: is of one server, and no default.",
                f"{DEFAULTS}['mysql']['creator']: is of one server, and no default.",
            ],
            id="default of one server",
        ),
        pytest.param(
            {**URI, **bind(SQLITE), DEFAULTS: {"connect_args": {"read_timeout": 3}}},
            {},
            [
                f"{DEFAULTS}['connect_args']: is not the same for each driver, and the binds have"
                " several: pymysql, pysqlite. Name it under its server:"
                f" {DEFAULTS}['mysql']['connect_args'], say."
            ],
            id="default of one driver",
        ),
        *(
            pytest.param(
                bind("sqlite://", **{name: value}),
                {},
                [f"{BIND}: {name!r} is not for this bind's pool, which is a StaticPool."],
                id=f"{name} in memory",
            )
            for name, value in (
                ("pool_size", 2),
                ("max_overflow", 2),
                ("pool_timeout", 2),
                ("pool_use_lifo", True),
                ("pool_min_size", 0),
                ("pool_max_idle", 2),
                ("pool_ping_after", 2),
                ("pool_resolve_after", 2),
            )
        ),
        pytest.param(
            bind(poolclass=sa.NullPool, pool_size=2),
            {},
            [f"{BIND}: 'pool_size' is not for this bind's pool, which is a NullPool."],
            id="pool_size without a pool",
        ),
        pytest.param(
            bind(SQLITE, connect_timeout=3),
            {},
            [
                f"{BIND}: 'connect_timeout' is not for SQLite, which opens a file and connects"
                " nowhere."
            ],
            id="connect_timeout of SQLite",
        ),
        pytest.param(
            bind(SQLITE, pool_ping_after=3),
            {},
            [
                f"{BIND}: 'pool_ping_after' is not for SQLite, which has no server that could hang"
                " up."
            ],
            id="ping of SQLite",
        ),
        pytest.param(
            bind(SQLITE, pool_resolve_after=3),
            {},
            [f"{BIND}: 'pool_resolve_after' is not for SQLite, which has no server with a name."],
            id="name of SQLite",
        ),
        pytest.param(
            {
                **URI,
                DEFAULTS: {
                    "sqlite": {"connect_timeout": 3, "pool_ping_after": None},
                    "oracle": {"lock_timeout": 3},
                },
            },
            {},
            [
                f"{DEFAULTS}['sqlite']: 'connect_timeout' is not for SQLite, which opens a file"
                " and connects nowhere.",
                f"{DEFAULTS}['sqlite']: 'pool_ping_after' is not for SQLite, which has no server"
                " that could hang up.",
                f"{DEFAULTS}['oracle']: 'lock_timeout' is not known to be possible on oracle.",
            ],
            id="limits of a family",
        ),
        pytest.param(
            bind("oracle+oracledb://h", connect_timeout=3, statement_timeout=3, lock_timeout=3),
            {},
            [
                f"{BIND}: 'connect_timeout' is not known to be possible with the driver"
                " 'oracledb'; say it in 'connect_args', in the driver's own words.",
                f"{BIND}: 'statement_timeout' is not known to be possible on oracle.",
                f"{BIND}: 'lock_timeout' is not known to be possible on oracle.",
            ],
            id="limits of an unknown server",
        ),
        pytest.param(
            bind(connect_timeout=3, connect_args={"connect_timeout": 3}),
            {},
            [
                f"{BIND}: 'connect_timeout' and connect_args['connect_timeout'] are the same;"
                " leave one out."
            ],
            id="twice in a bind",
        ),
        pytest.param(
            {**URI, COMMON: {"connect_timeout": 3, "connect_args": {"connect_timeout": 3}}},
            {},
            [
                f"{COMMON}: 'connect_timeout' and connect_args['connect_timeout'] are the same;"
                " leave one out."
            ],
            id="twice for all",
        ),
        pytest.param(
            bind(SQLITE, lock_timeout=3, connect_args={"timeout": 3}),
            {},
            [f"{BIND}: 'lock_timeout' and connect_args['timeout'] are the same; leave one out."],
            id="twice on SQLite",
        ),
        pytest.param(
            bind(f"{MYSQL}?connect_timeout=3", connect_timeout=3),
            {},
            [
                f"{BIND}: 'connect_timeout' stands here, and 'connect_timeout' in the URL; leave"
                " one out."
            ],
            id="twice with the URL",
        ),
        pytest.param(
            bind(creator=dict, connect_timeout=3),
            {},
            [f"{BIND}: 'connect_timeout' has no effect, because 'creator' makes the connections."],
            id="creator",
        ),
        pytest.param(
            bind(pool_min_size=6),
            {},
            [f"{BIND}: 'pool_min_size' is 6, more than 'pool_size', which is 5 by default."],
            id="more than the default size",
        ),
        pytest.param(
            {**bind(pool_size="3"), DEFAULTS: {"pool_min_size": 4}},
            {},
            [f"{DEFAULTS}: 'pool_min_size' is 4, more than 'pool_size', which is 3 in {BIND}."],
            id="more than a bind's size",
        ),
        pytest.param(
            bind(replicas=[{"url": MYSQL, "pool_min_size": 3}], pool_size=2),
            {},
            [
                f"{BIND}['replicas'][0]: 'pool_min_size' is 3, more than 'pool_size', which is 2"
                f" in {BIND}."
            ],
            id="more than a replica's size",
        ),
        pytest.param(
            bind(connect_args="timeout=3", execution_options=[1]),
            {},
            [
                f"{BIND}: 'connect_args' must be a dict, not str.",
                f"{BIND}: 'execution_options' must be a dict, not list.",
            ],
            id="no dicts",
        ),
        pytest.param(
            bind(replicas=[{"url": MYSQL, "execution_options": {"isolation_level": "x"}}]),
            {},
            [
                f"{BIND}['replicas'][0]: 'isolation_level' cannot be chosen: a replica's"
                " connections are always in autocommit mode."
            ],
            id="isolation level of a replica",
        ),
    ],
)
def test_mistakes(config: Options, engine_options: Options, mistakes: list[str]) -> None:
    """Every mistake is reported at once, with its place and the nearest name."""
    with pytest.raises(ConfigError, match=re.escape(mistakes[0])) as caught:
        Engines(config, engine_options=engine_options)
    assert list(caught.value.mistakes) == mistakes


ABOVE_0 = "a number of seconds above 0"
BAD = [0, -1, True, False, "3", float("nan"), float("inf"), [1]]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("option", "wanted", "bad", "good"),
    [
        ("pool_min_size", "a whole number, 0 or more", [*BAD[1:], None, 1.0], [0, 5]),
        ("pool_max_idle", f"{ABOVE_0}, or None", BAD, [None, 1, 0.5]),
        (
            "pool_ping_after",
            "a number of seconds, 0 or more, or None",
            BAD[1:],
            [None, 0, 1, 0.5],
        ),
        ("pool_resolve_after", f"{ABOVE_0}, or None", BAD, [None, 1, 0.5]),
        ("connect_timeout", ABOVE_0, [*BAD, None], [1, 0.5]),
        ("statement_timeout", f"{ABOVE_0}, or None", BAD, [None, 1, 0.5]),
        ("lock_timeout", f"{ABOVE_0}, or None", BAD, [None, 1, 0.5]),
    ],
)
def test_values(place: str, option: str, wanted: str, bad: list[t.Any], good: list[t.Any]) -> None:
    """The values of our own options are checked, in every place. Texts are not shown."""
    for value in bad:
        config, engine_options = configured({place: {option: value}})
        shown = type(value).__name__ if isinstance(value, (str, list)) else repr(value)
        with pytest.raises(
            ConfigError, match=re.escape(f"must be {wanted}, not {shown}.")
        ) as caught:
            load(config, engine_options)
        assert len(caught.value.mistakes) == 1
    for value in good:
        config, engine_options = configured({place: {option: value}})
        load(config, engine_options)


def test_no_limit_of_the_size() -> None:
    """``pool_size=0`` means no limit: any ``pool_min_size`` is below it."""
    assert settings(bind(pool_size=0, pool_min_size=50), "a").min_size == 50


def test_texts_are_converted() -> None:
    """SQLAlchemy converts what stands in an environment as text, for any bind."""
    config = {**URI, COMMON: {"pool_size": "7", "pool_recycle": "30"}, **bind(echo="debug")}
    engines = Engines(config)
    assert [size_of(engines[key]) for key in (None, "a")] == [7, 7]
    assert [recycle_of(engines[key]) for key in (None, "a")] == [30, 30]
    assert engines["a"].echo == "debug"


def test_plugins(plugin: str) -> None:
    """What only a plugin knows is left to SQLAlchemy, wherever the plugin is named."""
    Engines(bind(plugins=[plugin], of_the_plugin=1))
    Engines(bind(f"{MYSQL}?plugin={plugin}", of_the_plugin=1))
    Engines(URI, engine_options={"plugins": [plugin], "of_the_plugin": 1})
    with pytest.raises(ConfigError, match="'of_the_plugin' is no option"):
        Engines(bind(of_the_plugin=1))


def test_a_pool_class_of_the_users() -> None:
    """The arguments of a pool class of the user's own are known by its constructor."""

    class Own(sa.QueuePool):
        def __init__(self, creator: t.Any, mark: int = 0, **arguments: t.Any) -> None:
            super().__init__(creator, **arguments)
            self.mark = mark

    engines = Engines(bind(poolclass=Own, mark=7, pool_min_size=1))
    assert engines["a"].pool.mark == 7  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="'mark' is no option"):
        Engines(bind(mark=7))


def test_a_dialect_of_the_users() -> None:
    """The arguments of a third party's dialect are known by its constructor."""
    from sqlalchemy.dialects.mysql.pymysql import MySQLDialect_pymysql

    class Own(MySQLDialect_pymysql):
        driver = "of_a_test"

        def __init__(self, mark: int = 0, **arguments: t.Any) -> None:
            super().__init__(**arguments)
            self.mark = mark

    globals()["Own"] = Own
    sa.dialects.registry.register("mysql.of_a_test", __name__, "Own")
    try:
        engines = Engines({**URI, **bind("mysql+of_a_test://host", mark=7)})
        assert engines["a"].dialect.mark == 7  # type: ignore[attr-defined]
        engines = Engines({**URI, **bind("mysql+of_a_test://host")}, engine_options={"mark": 7})
        assert engines["a"].dialect.mark == 7  # type: ignore[attr-defined]
        assert "connect_timeout" not in arguments_of(engines["a"])
    finally:
        del sa.dialects.registry.impls["mysql.of_a_test"], globals()["Own"]


def test_no_value_is_shown() -> None:
    """No value that may be secret stands in an error."""
    secret = "sesame0penup"
    config = bind(
        MYSQL.replace("host", f"user:{secret}@host"),
        connect_args=f"password={secret}",
        passwort=secret,
        connect_timeout=secret,
        replicas=[{"url": MYSQL, "lock_timeout": secret, "x": secret}],
    )
    with pytest.raises(ConfigError, match="'passwort'") as caught:
        Engines(config)
    assert len(caught.value.mistakes) == 5
    loaded = load(bind(MYSQL, connect_args={"password": secret}), {"connect_args": {"x": secret}})
    assert secret not in f"{loaded!r} {loaded.sources!r}"
    assert secret not in f"{caught.value} {caught.value!r} {vars(caught.value)}"


# Replicas -------------------------------------------------------------------------------------


def test_a_replica_with_another_driver() -> None:
    """A replica with another driver has what its bind says of pools, not to the driver."""
    config = bind(
        replicas=["mysql+mysqldb://replica", MYSQL],
        pool_size=2,
        connect_timeout=3.5,
        connect_args={"read_timeout": 9, "ssl": {"ca": "x"}},
        execution_options={"mark": 1, "isolation_level": "SERIALIZABLE"},
        isolation_level="SERIALIZABLE",
    )
    other, same = Engines(config).replicas["a"]
    assert [size_of(other), size_of(same)] == [2, 2]
    loaded = load(config, {})
    found = [resolve(r.sources(loaded.sources["a"])).options for r in loaded.replicas["a"]]
    assert found[0]["connect_args"] == {"connect_timeout": 4}
    assert found[1]["connect_args"] == {
        "connect_timeout": 3.5,
        "read_timeout": 9,
        "ssl": {"ca": "x"},
    }
    for options in found:
        assert options["execution_options"] == {"mark": 1}
        assert "isolation_level" not in options


def test_what_makes_connections_to_the_primary() -> None:
    """``creator`` and ``pool`` are not inherited, wherever they stand; a replica may have one."""
    calls: list[str] = []

    def creator() -> t.Any:
        calls.append("replica")
        raise sa.exc.OperationalError("", {}, Exception())

    for place in ("own", "constructor"):
        config, engine_options = configured(
            {place: {"creator": dict}, "replica": {"creator": creator}}
        )
        config["COMMONDB_REPLICAS"] = MYSQL
        engines = Engines(config, engine_options=engine_options)
        with pytest.raises(sa.exc.OperationalError):
            engines.replicas["orders"][0].connect()
        assert arguments_of(engines.replicas[None][0])["host"] == "host"
    assert calls == ["replica", "replica"]


def test_defaults_of_the_replicas_server() -> None:
    """A replica has the defaults of its own server: a MariaDB one of a ``mysql://`` bind, say."""
    config: Options = {
        **bind(replicas=["mariadb+pymysql://replica"]),
        DEFAULTS: {"mysql": {"pool_size": 2}, "mariadb": {"pool_size": 3}},
    }
    engines = Engines(config)
    assert (size_of(engines["a"]), size_of(engines.replicas["a"][0])) == (2, 3)


# What the user has given ----------------------------------------------------------------------


def test_nothing_is_changed(tmp_path: Path) -> None:
    """Two apps that share one dict, and one ``db``, leave it and the constructor's as they were."""
    shared: Options = {
        "SQLALCHEMY_DATABASE_URI": "sqlite://",
        "COMMONDB_ENGINE_DEFAULTS": {
            "pool_size": 2,
            "sqlite": {"connect_args": {"detect_types": 0}, "execution_options": {"a": {"b": 1}}},
        },
        "SQLALCHEMY_ENGINE_OPTIONS": {
            "connect_args": {"uri": False},
            "execution_options": {"a": {"c": 1}},
        },
        "SQLALCHEMY_BINDS": {
            "memory": {"url": "sqlite://", "connect_args": {"cached_statements": 9}},
            "file": {
                "url": f"sqlite:///{tmp_path}/a.db",
                "lock_timeout": 3,
                "replicas": [
                    {"url": f"sqlite:///{tmp_path}/a.db", "connect_args": {"cached_statements": 8}}
                ],
            },
        },
    }
    constructor: Options = {"connect_args": {"isolation_level": None}, "pool_recycle": 60}
    before = copy.deepcopy((shared, constructor))
    db = CommonDB(engine_options=constructor)
    for _ in range(2):
        engines = Engines(shared, db)
        for engine in (*engines.binds.values(), *engines.replicas["file"]):
            with engine.connect() as connection:
                assert connection.scalar(sa.text("SELECT 1")) == 1
            engine.dispose()
        assert (shared, constructor) == before


def test_two_apps_on_one_db() -> None:
    """Each app has its own options, whichever was initialized last."""
    db = CommonDB(engine_options={"pool_size": 2})
    first = Engines({**URI, COMMON: {"pool_size": 3}, **bind()}, db)
    second = Engines({**URI, DEFAULTS: {"pool_recycle": 9}, **bind()}, db)
    for engines, size, recycle in ((first, 3, 7200), (second, 2, 9)):
        with engines.app.app_context():
            assert [size_of(db.engines[key]) for key in (None, "a")] == [size, size]
            assert [recycle_of(db.engines[key]) for key in (None, "a")] == [recycle, recycle]


def test_a_subclass_that_changes_the_options() -> None:
    """What a user's subclass does to the options on their way counts above everything."""

    class Mine(CommonDB):
        def _apply_driver_defaults(self, options: Options, app: Flask) -> None:
            super()._apply_driver_defaults(options, app)
            options["pool_size"] = 9
            options.setdefault("connect_args", {})["read_timeout"] = 8

        def _make_engine(self, bind_key: str | None, options: Options, app: Flask) -> sa.Engine:
            options["statement_timeout"] = 7
            options.pop("max_overflow", None)
            return super()._make_engine(bind_key, options, app)

    own: Options = {"connect_args": {"write_timeout": 3}}
    config = {
        **URI,
        COMMON: {"pool_size": 3, "max_overflow": 1},
        **bind(pool_size=4, max_overflow=2, replicas=[MYSQL], **own),
    }
    engines = Engines(config, Mine())
    (replica,) = engines.replicas["a"]
    for engine in (engines[None], engines["a"], replica):
        assert size_of(engine) == 9
        assert engine.pool._max_overflow == 10  # type: ignore[attr-defined]
        assert arguments_of(engine)["read_timeout"] == 8
    assert arguments_of(engines["a"])["write_timeout"] == 3
    assert own == {"connect_args": {"write_timeout": 3}}


def test_an_engine_by_the_way() -> None:
    """An engine that is made outside of ``init_app`` has the options of the call."""
    engines = Engines({**URI, COMMON: {"pool_size": 3}})
    for app in (engines.app, Flask("another")):
        engine = engines.db._make_engine("new", {"url": MYSQL, "pool_size": 4}, app)
        assert size_of(engine) == 4
        engine = engines.db._make_engine("new", {"url": MYSQL, "connect_timeout": 4}, app)
        assert arguments_of(engine)["connect_timeout"] == 4


# On real servers ------------------------------------------------------------------------------


def test_pool_options_beside_memory(mariadb_database: Database[MariaDBCluster]) -> None:
    """Pool options for all binds: MariaDB has them, the in-memory database beside it works."""
    lab = Lab(
        mariadb_database.primary_url,
        config={
            COMMON: {"pool_size": 2, "max_overflow": 0, "pool_timeout": 0.1, "pool_min_size": 1},
            "SQLALCHEMY_BINDS": {"memory": "sqlite://"},
        },
    )
    with lab.app.app_context():
        server, memory = lab.db.engines[None], lab.db.engines["memory"]
        with server.connect(), server.connect():
            with pytest.raises(sa.exc.TimeoutError, match="in use"):
                server.connect()
        with memory.connect() as one, memory.connect() as other:
            one.execute(sa.text("CREATE TABLE made (id INTEGER)"))
            assert other.execute(sa.text("SELECT * FROM made")).all() == []
    lab.dispose()


@pytest.mark.parametrize("driver", ["pymysql", "mysqldb"])
def test_connect_timeout_on_mariadb(
    mariadb_database: Database[MariaDBCluster], driver: str
) -> None:
    """MariaDB's drivers connect with a ``connect_timeout``, for a bind and for its replica."""
    urls = [
        sa.make_url(url).set(drivername=f"mysql+{driver}")
        for url in (mariadb_database.primary_url, mariadb_database.replica_urls[0])
    ]
    config = bind(t.cast(t.Any, urls[0]), connect_timeout=2.5, replicas=[urls[1]])
    engines = Engines({**URI, **config})
    for engine in (engines["a"], *engines.replicas["a"]):
        assert arguments_of(engine)["connect_timeout"] == (2.5 if driver == "pymysql" else 3)
        with engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT 1")) == 1
            if driver == "pymysql":
                driver_connection: t.Any = connection.connection.driver_connection
                assert driver_connection.connect_timeout == 2.5
        engine.dispose()


def test_connect_timeout_on_postgresql(postgresql_database: Database[PostgreSQLCluster]) -> None:
    """psycopg connects with a ``connect_timeout`` in whole seconds."""
    engine = Engines(bind(postgresql_database.primary_url, connect_timeout=2.5))["a"]
    with engine.connect() as connection:
        driver_connection: t.Any = connection.connection.driver_connection
        assert driver_connection.info.get_parameters()["connect_timeout"] == "3"
    engine.dispose()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lock_timeout": 1.5}, 1500),
        ({"connect_args": {"timeout": 2}}, 2000),
        ({}, 5000),
        ({"lock_timeout": None}, 5000),
    ],
)
def test_lock_timeout_of_sqlite(tmp_path: Path, options: Options, expected: int) -> None:
    """``lock_timeout`` is how long SQLite waits for a lock."""
    url = f"sqlite:///{tmp_path}/a.db"
    engines = Engines(bind(url, replicas=[url], **options))
    for engine in (engines["a"], *engines.replicas["a"]):
        with engine.connect() as connection:
            assert connection.scalar(sa.text("PRAGMA busy_timeout")) == expected
        engine.dispose()


def test_limits_on_mariadb(mariadb_database: Database[MariaDBCluster]) -> None:
    """``statement_timeout`` and ``lock_timeout`` are the session's on MariaDB, as each place says
    it."""
    limits = sa.text("SELECT @@max_statement_time, @@innodb_lock_wait_timeout")
    config = {
        DEFAULTS: {"statement_timeout": 30, "mysql": {"lock_timeout": 20}},
        **bind(
            mariadb_database.primary_url,
            statement_timeout=2.5,
            replicas=[{"url": mariadb_database.replica_urls[0], "lock_timeout": 3}],
        ),
    }
    engines = Engines(config)
    seen = []
    for engine in (engines["a"], *engines.replicas["a"]):
        with engine.connect() as connection:
            seen.append(tuple(map(float, connection.execute(limits).one())))
        engine.dispose()
    assert seen == [(2.5, 20), (2.5, 3)]


def test_limits_on_postgresql(postgresql_database: Database[PostgreSQLCluster]) -> None:
    """``statement_timeout`` and ``lock_timeout`` are the session's on PostgreSQL."""
    config = {
        DEFAULTS: {"statement_timeout": 30, "postgresql": {"lock_timeout": 20}},
        **bind(postgresql_database.primary_url, statement_timeout=2.5),
    }
    engine = Engines(config)["a"]
    with engine.connect() as connection:
        seen = [connection.scalar(sa.text(f"SHOW {n}_timeout")) for n in ("statement", "lock")]
    assert seen == ["2500ms", "20s"]
    engine.dispose()


# One driver, one replica ----------------------------------------------------------------------


def test_defaults_of_one_driver() -> None:
    """The defaults under the name of a driver are for that one, and go before its server's."""
    lab_app = Flask("drivers")
    lab_app.config["SQLALCHEMY_DATABASE_URI"] = "mysql+pymysql://h/app"
    lab_app.config["SQLALCHEMY_BINDS"] = {
        "fast": "mysql+mysqldb://h/app",
        "maria": "mariadb+pymysql://h/app",
    }
    lab_app.config["COMMONDB_ENGINE_DEFAULTS"] = {
        "pool_size": 6,
        "mysql": {"pool_size": 7},
        "mysql+pymysql": {"pool_size": 8},
        "mariadb+pymysql": {"pool_size": 9},
    }
    db = CommonDB(lab_app)
    with lab_app.app_context():
        sizes = {
            key: t.cast(sa.QueuePool, engine.pool).size() for key, engine in db.engines.items()
        }
    assert sizes == {None: 8, "fast": 7, "maria": 9}


def test_url_of_a_replica() -> None:
    """What a replica's own URL says to the driver goes before what it inherits."""
    lab_app = Flask("replicas")
    lab_app.config["SQLALCHEMY_DATABASE_URI"] = "mysql+pymysql://h/app"
    lab_app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {"connect_args": {"connect_timeout": 5}}
    lab_app.config["COMMONDB_REPLICAS"] = [
        "mysql+pymysql://a/app?connect_timeout=8",
        "mysql+pymysql://b/app",
    ]
    db = CommonDB(lab_app)
    seen: list[t.Any] = []

    def refuse(dialect: object, entry: object, args: object, kwargs: dict[str, t.Any]) -> None:
        seen.append(kwargs["connect_timeout"])
        raise ConnectionRefusedError("not here")

    with lab_app.app_context():
        for engine in db.replica_engines[None]:
            sa.event.listen(engine, "do_connect", refuse)
            with pytest.raises(ConnectionRefusedError, match="not here"):
                engine.connect()
    assert seen == [8, 5]
