"""What ``app.config`` may say, how a mistake in it is reported, and that each option is read."""

from __future__ import annotations

import contextlib
import copy
import re
import typing as t
from pathlib import Path

import pytest
import sqlalchemy as sa
import sqlalchemy.exc as sa_exc
import sqlalchemy.orm as so
from flask import Flask

from flask_commondb import CommonDB
from flask_commondb import CommonDBError
from flask_commondb import ConfigError
from flask_commondb.config import Config
from flask_commondb.config import ReadConfig
from flask_commondb.config import ReplicaConfig
from flask_commondb.config import load
from flask_commondb.naming import server_name
from flask_commondb.policies import round_robin
from flask_commondb.signals import routed

#: A default bind for tests about something else. No test connects to it.
URI = "sqlite:////nowhere/primary.db"
REPLICA = "sqlite:////nowhere/r.db"
ONE = "sqlite:////nowhere/one.db"
TWO = "sqlite:////nowhere/two.db"
GOOD: dict[str, t.Any] = {"SQLALCHEMY_DATABASE_URI": URI}

SECRET = "sesame0penup"


@pytest.mark.parametrize(
    ("config", "mistakes"),
    [
        pytest.param(
            {},
            ["Either 'SQLALCHEMY_DATABASE_URI' or 'SQLALCHEMY_BINDS' must be set."],
            id="no database",
        ),
        pytest.param(
            {"SQLALCHEMY_DATABASE_URI": 5},
            ["SQLALCHEMY_DATABASE_URI: must be a database URL, not int."],
            id="url is no text",
        ),
        pytest.param(
            {"SQLALCHEMY_DATABASE_URI": "somewhere"},
            [
                "SQLALCHEMY_DATABASE_URI: the value is not a database URL; it must look like"
                " 'dialect+driver://user:password@host:port/database'."
            ],
            id="malformed url",
        ),
        pytest.param(
            {"SQLALCHEMY_DATABASE_URI": ""},
            [
                "SQLALCHEMY_DATABASE_URI: the value is not a database URL; it must look like"
                " 'dialect+driver://user:password@host:port/database'."
            ],
            id="empty url",
        ),
        pytest.param(
            {"SQLALCHEMY_DATABASE_URI": "mysql+pymysql://h:port/app"},
            [
                "SQLALCHEMY_DATABASE_URI: mysql+pymysql://… is not a database URL; it must look"
                " like 'dialect+driver://user:password@host:port/database'."
            ],
            id="port is no number",
        ),
        pytest.param(
            {"SQLALCHEMY_DATABASE_URI": "mysql+pymysq://h/app"},
            [
                "SQLALCHEMY_DATABASE_URI: SQLAlchemy has no dialect 'mysql+pymysq'"
                " (did you mean 'mysql+pymysql'?)."
            ],
            id="misspelt driver",
        ),
        pytest.param(
            {"SQLALCHEMY_DATABASE_URI": "mysq://h/app"},
            ["SQLALCHEMY_DATABASE_URI: SQLAlchemy has no dialect 'mysq' (did you mean 'mysql'?)."],
            id="misspelt dialect",
        ),
        pytest.param(
            {"SQLALCHEMY_DATABASE_URI": "sqlit:///a.db"},
            [
                "SQLALCHEMY_DATABASE_URI: SQLAlchemy has no dialect 'sqlit'"
                " (did you mean 'sqlite'?)."
            ],
            id="misspelt sqlite",
        ),
        pytest.param(
            {"SQLALCHEMY_DATABASE_URI": "quite-another://h/app".replace("-", "")},
            ["SQLALCHEMY_DATABASE_URI: SQLAlchemy has no dialect 'quiteanother'."],
            id="unknown dialect",
        ),
        pytest.param(
            {"SQLALCHEMY_ENGINE_OPTIONS": {"url": "nothing"}},
            [
                "SQLALCHEMY_ENGINE_OPTIONS['url']: the value is not a database URL; it must look"
                " like 'dialect+driver://user:password@host:port/database'."
            ],
            id="malformed url in the engine options",
        ),
        pytest.param(
            {**GOOD, "SQLALCHEMY_ENGINE_OPTIONS": ["echo"]},
            ["SQLALCHEMY_ENGINE_OPTIONS: must be a dict, not list."],
            id="engine options are no dict",
        ),
        pytest.param(
            {**GOOD, "SQLALCHEMY_BINDS": [URI]},
            ["SQLALCHEMY_BINDS: must be a dict of bind keys, not list."],
            id="binds are no dict",
        ),
        pytest.param(
            {**GOOD, "SQLALCHEMY_BINDS": {"orders": 5, "legacy": "somewhere"}},
            [
                "SQLALCHEMY_BINDS['orders']: must be a database URL, not int.",
                "SQLALCHEMY_BINDS['legacy']: the value is not a database URL; it must look like"
                " 'dialect+driver://user:password@host:port/database'.",
            ],
            id="wrong binds",
        ),
        pytest.param(
            {**GOOD, "SQLALCHEMY_BINDS": {"orders": {"echo": True}}},
            ["SQLALCHEMY_BINDS['orders']: has no 'url', so there is no database to bind."],
            id="bind without url",
        ),
        pytest.param(
            {**GOOD, "SQLALCHEMY_BINDS": {"orders": {"url": None}}},
            ["SQLALCHEMY_BINDS['orders']: has no 'url', so there is no database to bind."],
            id="bind whose url is None",
        ),
        pytest.param(
            {**GOOD, "SQLALCHEMY_BINDS": {"orders": None}},  # os.environ.get("ORDERS_URL")
            ["SQLALCHEMY_BINDS['orders']: has no 'url', so there is no database to bind."],
            id="bind that is None",
        ),
        pytest.param(
            {**GOOD, "COMMONDB_REPLICA": [URI]},
            ["COMMONDB_REPLICA: there is no such setting (did you mean 'COMMONDB_REPLICAS'?)."],
            id="misspelt setting",
        ),
        pytest.param(
            {**GOOD, "COMMONDB_WITH_SOMETHING_QUITE_DIFFERENT": 1},
            [
                "COMMONDB_WITH_SOMETHING_QUITE_DIFFERENT: there is no such setting; known are"
                " COMMONDB_REPLICAS, COMMONDB_CANDIDATES, COMMONDB_POLICY, COMMONDB_ZONES,"
                " COMMONDB_MAX_LAG, COMMONDB_FALLBACK, COMMONDB_FALLBACK_LIMIT, COMMONDB_ROUTING,"
                " COMMONDB_READ_FUNCTIONS, COMMONDB_LEAK_WATCH, COMMONDB_ENGINE_DEFAULTS."
            ],
            id="unknown setting",
        ),
        pytest.param(
            {**GOOD, "COMMONDB_POLICY": "round_robbin"},
            [
                "COMMONDB_POLICY: 'round_robbin' is not a policy (did you mean 'round_robin'?); it"
                " is one of 'fastest_of_two', 'random_of_two', 'round_robin', 'least_checked_out',"
                " or a function that takes a list of replicas and returns one of them."
            ],
            id="misspelt policy",
        ),
        pytest.param(
            {**GOOD, "COMMONDB_FALLBACK": "primry", "COMMONDB_MAX_LAG": 0},
            [
                "COMMONDB_MAX_LAG: must be a number of seconds above 0, or None, not 0.",
                "COMMONDB_FALLBACK: 'primry' is not a fallback (did you mean 'primary'?); known are"
                " 'primary', 'stale', 'error'.",
            ],
            id="fallback and lag",
        ),
        pytest.param(
            {**GOOD, "COMMONDB_FALLBACK_LIMIT": True, "COMMONDB_ZONES": "near"},
            [
                "COMMONDB_ZONES: must be a list of names, the nearest first, not str.",
                "COMMONDB_FALLBACK_LIMIT: must be 1 or more, or None, not True.",
            ],
            id="limit and zones",
        ),
        pytest.param(
            {
                **GOOD,
                "SQLALCHEMY_BINDS": {"orders": {"url": URI, "max_lag": "2", "policy": 7}},
                "SQLALCHEMY_ENGINE_OPTIONS": {"fallback": "none"},
            },
            [
                "SQLALCHEMY_ENGINE_OPTIONS['fallback']: 'none' is not a fallback; known are"
                " 'primary', 'stale', 'error'.",
                "SQLALCHEMY_BINDS['orders']['policy']: 7 is not a policy; it is one of"
                " 'fastest_of_two', 'random_of_two', 'round_robin', 'least_checked_out', or a"
                " function that takes a list of replicas and returns one of them.",
                "SQLALCHEMY_BINDS['orders']['max_lag']: must be a number of seconds above 0, or"
                " None, not '2'.",
            ],
            id="beside a URL",
        ),
        pytest.param(
            {**GOOD, "COMMONDB_REPLICAS": [{"url": REPLICA, "zone": 3}]},
            ["COMMONDB_REPLICAS[0]: 'zone' must be a name, not int."],
            id="zone of a replica",
        ),
        pytest.param(
            {**GOOD, "COMMONDB_ROUTING": "explicitly"},
            [
                "COMMONDB_ROUTING: 'explicitly' is not a routing (did you mean 'explicit'?); known"
                " are 'auto', 'explicit'."
            ],
            id="misspelt routing",
        ),
        pytest.param(
            {**GOOD, "COMMONDB_ROUTING": None},
            ["COMMONDB_ROUTING: None is not a routing; known are 'auto', 'explicit'."],
            id="routing is None",
        ),
        pytest.param(
            {**GOOD, "COMMONDB_ROUTING": ["auto"]},
            [
                "COMMONDB_ROUTING: ['auto'] is not a routing (did you mean 'auto'?); known are"
                " 'auto', 'explicit'."
            ],
            id="routing is a list",
        ),
        *(
            pytest.param(
                {**GOOD, "COMMONDB_READ_FUNCTIONS": value},
                [f"COMMONDB_READ_FUNCTIONS: must be a list of function names, not {name}."],
                id=f"functions are {name}",
            )
            for value, name in (("who", "str"), (None, "NoneType"), (5, "int"), ([5], "list"))
        ),
        *(
            pytest.param(
                {**GOOD, "COMMONDB_REPLICAS": value},
                [f"COMMONDB_REPLICAS: must be a list of replicas, not {type(value).__name__}."],
                id=f"replicas are {value!r}",
            )
            for value in (True, 5)
        ),
        pytest.param(
            {**GOOD, "COMMONDB_REPLICAS": [None, URI, 7, [URI]]},
            [
                "COMMONDB_REPLICAS[0]: must be a database URL, not NoneType.",
                "COMMONDB_REPLICAS[2]: must be a database URL, not int.",
                "COMMONDB_REPLICAS[3]: must be a database URL, not list.",
            ],
            id="replica is no url",
        ),
        pytest.param(
            {**GOOD, "COMMONDB_REPLICAS": [{"ulr": URI}]},
            ["COMMONDB_REPLICAS[0]: a replica needs a 'url' (did you mean 'url'?)."],
            id="misspelt url of a replica",
        ),
        pytest.param(
            {**GOOD, "COMMONDB_REPLICAS": [{"weight": 2}]},
            ["COMMONDB_REPLICAS[0]: a replica needs a 'url'."],
            id="replica without url",
        ),
        pytest.param(
            {**GOOD, "COMMONDB_REPLICAS": [{"url": URI, "wieght": 2}]},
            ["COMMONDB_REPLICAS[0]: 'wieght' is no option of a replica (did you mean 'weight'?)."],
            id="misspelt weight",
        ),
        *(
            pytest.param(
                {**GOOD, "COMMONDB_REPLICAS": [{"url": URI, "weight": weight}]},
                [f"COMMONDB_REPLICAS[0]: 'weight' must be a number above 0, not {weight!r}."],
                id=f"weight {weight!r}",
            )
            for weight in (0, -1, -0.5, True, False, "2", None, float("nan"), float("inf"))
        ),
        *(
            pytest.param(
                {**GOOD, "COMMONDB_REPLICAS": url},
                [
                    "COMMONDB_REPLICAS[0]: an in-memory SQLite database is no replica, it is"
                    " another, empty database. Name the primary's file."
                ],
                id=url,
            )
            for url in (
                "sqlite://",
                "sqlite:///",
                "sqlite:///:memory:",
                "sqlite+pysqlite://",
                "sqlite:///file::memory:?uri=true",
                "sqlite:///file:name?mode=memory&uri=true",
            )
        ),
        pytest.param(
            {**GOOD, "COMMONDB_REPLICAS": [{"url": URI, "isolation_level": "SERIALIZABLE"}]},
            [
                "COMMONDB_REPLICAS[0]: 'isolation_level' cannot be chosen: a replica's connections"
                " are always in autocommit mode."
            ],
            id="isolation level of a replica",
        ),
        *(
            pytest.param(
                {"SQLALCHEMY_BINDS": {"a": {"url": f"{primary}://h", "replicas": [url]}}},
                [
                    f"SQLALCHEMY_BINDS['a']['replicas'][0]: a {kind} server is no replica of a"
                    f" {family} server."
                ],
                id=f"{kind} replica of {primary}",
            )
            for primary, url, family, kind in (
                ("mysql", URI, "mysql", "sqlite"),
                ("mariadb", "postgresql://h", "mysql", "postgresql"),
                ("postgresql+psycopg", "mysql://h", "postgresql", "mysql"),
            )
        ),
        pytest.param(
            {**GOOD, "COMMONDB_REPLICAS": ["mariadb+pymysql://h"]},
            ["COMMONDB_REPLICAS[0]: a mysql server is no replica of a sqlite server."],
            id="MariaDB replica of SQLite",
        ),
        pytest.param(
            {**GOOD, "SQLALCHEMY_BINDS": {None: {"replicas": ["postgresql://h"]}}},
            [
                "SQLALCHEMY_BINDS[None]['replicas'][0]: a postgresql server is no replica of a"
                " sqlite server."
            ],
            id="PostgreSQL replica of SQLite",
        ),
        pytest.param(
            {
                **GOOD,
                "SQLALCHEMY_ENGINE_OPTIONS": {"replicas": [URI]},
                "SQLALCHEMY_BINDS": {None: {"replicas": [URI]}},
            },
            ["SQLALCHEMY_BINDS[None]['replicas']: the replicas of bind None are given twice."],
            id="replicas of the default bind twice",
        ),
        pytest.param(
            {**GOOD, "SQLALCHEMY_BINDS": {None: None}},
            ["SQLALCHEMY_BINDS[None]: has no 'url', so there is no database to bind."],
            id="default bind that is None",
        ),
        pytest.param(
            {**GOOD, "SQLALCHEMY_BINDS": {"orders": URI}, "COMMONDB_REPLICAS": {"order": [URI]}},
            [
                "COMMONDB_REPLICAS['order']: there is no bind 'order' for these replicas"
                " (did you mean 'orders'?); known are None, 'orders'."
            ],
            id="replicas of a misspelt bind",
        ),
        pytest.param(
            {"SQLALCHEMY_BINDS": {2024: URI}, "COMMONDB_REPLICAS": {2025: [URI]}},
            [
                "COMMONDB_REPLICAS[2025]: there is no bind 2025 for these replicas"
                " (did you mean '2024'?); known are 2024."
            ],
            id="bind keys that are numbers",
        ),
        pytest.param(
            {"SQLALCHEMY_BINDS": {"orders": URI}, "COMMONDB_REPLICAS": [URI]},
            ["COMMONDB_REPLICAS: there is no default bind for these replicas; known are 'orders'."],
            id="replicas without a default bind",
        ),
        pytest.param(
            {
                **GOOD,
                "SQLALCHEMY_BINDS": {"orders": {"url": URI, "replicas": [URI]}},
                "COMMONDB_REPLICAS": {"orders": [URI]},
            },
            ["COMMONDB_REPLICAS['orders']: the replicas of bind 'orders' are given twice."],
            id="replicas of a bind twice",
        ),
        pytest.param(
            {
                **GOOD,
                "SQLALCHEMY_ENGINE_OPTIONS": {"replicas": [URI]},
                "COMMONDB_REPLICAS": [URI],
            },
            ["COMMONDB_REPLICAS: the replicas of bind None are given twice."],
            id="replicas of the default bind twice",
        ),
        pytest.param(
            {**GOOD, "SQLALCHEMY_BINDS": {"orders": {"url": URI, "replicas": ["x", "y"]}}},
            [
                f"SQLALCHEMY_BINDS['orders']['replicas'][{index}]: the value is not a database"
                " URL; it must look like 'dialect+driver://user:password@host:port/database'."
                for index in (0, 1)
            ],
            id="wrong replicas beside a url",
        ),
        pytest.param(
            {**GOOD, "SQLALCHEMY_ENGINE_OPTIONS": {"replicas": 5}},
            ["SQLALCHEMY_ENGINE_OPTIONS['replicas']: must be a list of replicas, not int."],
            id="wrong replicas in the engine options",
        ),
        pytest.param(
            {
                "SQLALCHEMY_DATABASE_URI": "x",
                "SQLALCHEMY_BINDS": {"orders": 5},
                "COMMONDB_REPLICAS": {"order": [URI], "orders": [{"url": URI, "weight": 0}]},
                "COMMONDB_ROUTING": "manual",
                "COMMONDB_READ_FUNCTIONS": "who",
                "COMMONDB_REPLICA": 1,
            },
            [
                "COMMONDB_REPLICA: there is no such setting (did you mean 'COMMONDB_REPLICAS'?).",
                "SQLALCHEMY_DATABASE_URI: the value is not a database URL; it must look like"
                " 'dialect+driver://user:password@host:port/database'.",
                "SQLALCHEMY_BINDS['orders']: must be a database URL, not int.",
                "COMMONDB_ROUTING: 'manual' is not a routing; known are 'auto', 'explicit'.",
                "COMMONDB_READ_FUNCTIONS: must be a list of function names, not str.",
                "COMMONDB_REPLICAS['order']: there is no bind 'order' for these replicas"
                " (did you mean 'orders'?); known are None, 'orders'.",
                "COMMONDB_REPLICAS['orders'][0]: 'weight' must be a number above 0, not 0.",
            ],
            id="several",
        ),
        pytest.param(
            {"COMMONDB_ROUTING": "manual"},
            [
                "Either 'SQLALCHEMY_DATABASE_URI' or 'SQLALCHEMY_BINDS' must be set.",
                "COMMONDB_ROUTING: 'manual' is not a routing; known are 'auto', 'explicit'.",
            ],
            id="no database, and another",
        ),
        pytest.param(
            {"COMMONDB_ROUTNG": "auto"},
            [
                "COMMONDB_ROUTNG: there is no such setting (did you mean 'COMMONDB_ROUTING'?).",
                "Either 'SQLALCHEMY_DATABASE_URI' or 'SQLALCHEMY_BINDS' must be set.",
            ],
            id="an unknown setting, and no database",
        ),
    ],
)
def test_mistakes(config: dict[str, t.Any], mistakes: list[str]) -> None:
    """Every mistake is reported, all at once, with the nearest known name."""
    flask_app = make_app(config)
    with pytest.raises(ConfigError, match=re.escape(mistakes[0])) as caught:
        CommonDB().init_app(flask_app)
    assert list(caught.value.mistakes) == mistakes


@pytest.mark.parametrize("base", [RuntimeError, sa_exc.ArgumentError, CommonDBError])
def test_what_an_error_is(base: type[Exception]) -> None:
    """A mistake is caught by those who catch what Flask-SQLAlchemy raises for one."""
    with pytest.raises(base, match="must be set") as caught:
        CommonDB().init_app(Flask("empty"))
    assert type(caught.value) is ConfigError


@pytest.mark.parametrize(
    "url",
    [
        f"user:{SECRET}@host/app",
        f"mysql//user:{SECRET}@host/app",
        f"mysql:/user:{SECRET}@host/app",
        f"mysql+pymysql:user:{SECRET}@host/app",
        f"mysql pymysql://user:{SECRET}@host/app",
        f"mysql-pymysql://user:{SECRET}@host/app",
        f"://user:{SECRET}@host/app",
        f"mysql+pymysql://user:{SECRET}@host:port/app",
        f"mysql+pymysql://user:{SECRET}@host:33o6/app",
        f"mysql+pymysql://user:{SECRET}@host:3306:3306/app",
        f"mysql+pymysql://user@host:{SECRET}/app",
        f"mysql+pymysql://user:{SECRET}@[::1/app",
        f"mysql+pymysq://user:{SECRET}@host/app",
        f"user:{SECRET}@host://app",
        f"mysql+pymysql//user:{SECRET}://x@host/app",
        f"{SECRET}",
        f" mysql+pymysql://user:{SECRET}@host/app",
        f"mysql+pymysql://user:{SECRET}@host:12a/app?password={SECRET}",
        f"jdbc:mysql://user:{SECRET}@host/app",
        f"user={SECRET}://host",
        f"unknown://user:{SECRET}@host/app",
        f"mysql+{SECRET[:2]}x://user:{SECRET}@host/app",
    ],
)
@pytest.mark.parametrize(
    "where", ["default", "options", "bind", "dict", "replica", "beside", "candidate"]
)
def test_no_password_is_shown(url: str, where: str) -> None:
    """No part of an error tells a password, wherever it stands in a malformed URL."""
    configs: dict[str, dict[str, t.Any]] = {
        "default": {"SQLALCHEMY_DATABASE_URI": url},
        "options": {"SQLALCHEMY_ENGINE_OPTIONS": {"url": url}},
        "bind": {"SQLALCHEMY_BINDS": {"orders": url}},
        "dict": {"SQLALCHEMY_BINDS": {"orders": {"url": url}}},
        "replica": {**GOOD, "COMMONDB_REPLICAS": [url]},
        "beside": {"SQLALCHEMY_BINDS": {"orders": {"url": URI, "replicas": [{"url": url}]}}},
        "candidate": {**GOOD, "COMMONDB_CANDIDATES": [url]},
    }
    with pytest.raises(ConfigError, match=r"database URL|has no dialect") as caught:
        CommonDB().init_app(make_app(configs[where]))
    error = caught.value
    assert SECRET not in f"{error} {error!r} {error.mistakes} {error.args} {vars(error)}"
    # Nothing that a traceback would print below or above it.
    assert (error.__cause__, error.__context__) == (None, None)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        (f"mysql+pymysql://user:{SECRET}@db.example:3307/app", "db.example:3307"),
        (f"mysql+pymysql://user:{SECRET}@db.example/app", "db.example"),
        (f"mysql+pymysql://user:{SECRET}@[::1]:3306/app", "::1:3306"),
        (f"mysql+pymysql://user:{SECRET}@/app?unix_socket=/run/x&password={SECRET}", "app"),
        (f"postgresql+psycopg://user:{SECRET}@/app?host=one&host=two", "app"),
        ("sqlite:////var/lib/board/board.db", "board.db"),
        ("sqlite:///board.db?timeout=5", "board.db"),
        ("sqlite:///file:/srv/board.db?uri=true", "board.db"),
        ("sqlite://", ":memory:"),
        ("sqlite:///:memory:", ":memory:"),
    ],
)
def test_server_name(url: str, name: str) -> None:
    """A server is called by host and port, or by its file; never by user, password or query."""
    assert server_name(sa.make_url(url)) == name


@pytest.mark.parametrize(
    "url",
    [
        f"mysql+pymysql://us{SECRET}er:{SECRET}@host:1/app",
        f"mysql+pymysql://user:pass@{SECRET}@host/app",  # an @ that was not escaped
        f"mysql+pymysql://user:{SECRET}@/app",
        f"mysql+pymysql://user@host/app?ssl_key={SECRET}",
    ],
)
def test_server_name_hides(url: str) -> None:
    """The name of a server has no part of a password, also of one that was not escaped."""
    assert SECRET not in server_name(sa.make_url(url))


#: The primary of these binds is on a server, so that it may move.
SERVER = "mysql+pymysql://app:x@one/app"
SECOND = "mysql+pymysql://app:x@two/app"
THIRD = "mysql+pymysql://app:x@three/app"
ON_SERVERS: dict[str, t.Any] = {
    "SQLALCHEMY_DATABASE_URI": SERVER,
    "SQLALCHEMY_BINDS": {"orders": SERVER},
}


@pytest.mark.parametrize(
    ("config", "mistakes"),
    [
        pytest.param(
            {**ON_SERVERS, "COMMONDB_CANDIDATES": 5},
            ["COMMONDB_CANDIDATES: must be a list of URLs, not int."],
            id="no list",
        ),
        pytest.param(
            {**ON_SERVERS, "COMMONDB_CANDIDATES": [{"url": SERVER}]},
            ["COMMONDB_CANDIDATES[0]: must be a database URL, not dict."],
            id="no options of their own",
        ),
        pytest.param(
            {**ON_SERVERS, "COMMONDB_CANDIDATES": {"url": SERVER}},
            [
                "COMMONDB_CANDIDATES['url']: there is no bind 'url' for these candidates; known are"
                " None, 'orders'."
            ],
            id="by bind key",
        ),
        pytest.param(
            {**ON_SERVERS, "COMMONDB_CANDIDATES": {"order": [SERVER]}},
            [
                "COMMONDB_CANDIDATES['order']: there is no bind 'order' for these candidates (did"
                " you mean 'orders'?); known are None, 'orders'."
            ],
            id="misspelt bind",
        ),
        pytest.param(
            {"SQLALCHEMY_BINDS": {"orders": SERVER}, "COMMONDB_CANDIDATES": [SERVER]},
            [
                "COMMONDB_CANDIDATES: there is no default bind for these candidates; known are"
                " 'orders'."
            ],
            id="no default bind",
        ),
        pytest.param(
            {
                **ON_SERVERS,
                "SQLALCHEMY_ENGINE_OPTIONS": {"candidates": [SECOND]},
                "COMMONDB_CANDIDATES": [SECOND],
            },
            ["COMMONDB_CANDIDATES: the candidates of bind None are given twice."],
            id="twice",
        ),
        pytest.param(
            {
                **ON_SERVERS,
                "COMMONDB_CANDIDATES": ["postgresql+psycopg://two/app", "mysql+mysqldb://two/app"],
            },
            [
                f"COMMONDB_CANDIDATES[{index}]: the driver must be that of the bind's own URL,"
                f" which is 'mysql+pymysql', not '{driver}'."
                for index, driver in enumerate(["postgresql+psycopg", "mysql+mysqldb"])
            ],
            id="another driver",
        ),
        pytest.param(
            {**ON_SERVERS, "COMMONDB_CANDIDATES": [URI]},
            [
                "COMMONDB_CANDIDATES[0]: a sqlite database is on no server, so it never moves to"
                " another."
            ],
            id="SQLite",
        ),
        pytest.param(
            {**ON_SERVERS, "COMMONDB_CANDIDATES": ["mysql+pymysql://ONE:3306/app"]},
            ["COMMONDB_CANDIDATES[0]: ONE:3306 is a candidate already."],
            id="the primary itself",
        ),
        pytest.param(
            {**ON_SERVERS, "COMMONDB_CANDIDATES": [SECOND] * 2},
            ["COMMONDB_CANDIDATES[1]: two is a candidate already."],
            id="the same again",
        ),
        pytest.param(
            {
                **ON_SERVERS,
                "SQLALCHEMY_BINDS": {
                    "orders": {
                        "url": SERVER,
                        "candidates": [SECOND],
                        "creator": object,
                    }
                },
            },
            [
                "SQLALCHEMY_BINDS['orders']['candidates']: have no effect, because 'creator' makes"
                " the connections."
            ],
            id="a creator",
        ),
        pytest.param(
            {**ON_SERVERS, "COMMONDB_REPLICAS": [{"url": SECOND, "candidates": [THIRD]}]},
            ["COMMONDB_REPLICAS[0]: 'candidates' is no option of a replica."],
            id="of a replica",
        ),
    ],
)
def test_mistakes_in_candidates(config: dict[str, t.Any], mistakes: list[str]) -> None:
    """What cannot be a candidate for a primary is named, and why."""
    with pytest.raises(ConfigError, match=r"candidate|CANDIDATES") as caught:
        load(dict(config), {})
    assert caught.value.mistakes == tuple(mistakes)


@pytest.mark.parametrize(
    ("config", "engine_options", "expected"),
    [
        ({**ON_SERVERS, "COMMONDB_CANDIDATES": None}, {}, {}),
        ({**ON_SERVERS, "COMMONDB_CANDIDATES": []}, {}, {}),
        ({**ON_SERVERS, "COMMONDB_CANDIDATES": {"orders": []}}, {}, {}),
        ({**ON_SERVERS, "COMMONDB_CANDIDATES": [SECOND]}, {}, {None: ["two"]}),
        ({**ON_SERVERS, "COMMONDB_CANDIDATES": SECOND}, {}, {None: ["two"]}),
        ({**ON_SERVERS, "COMMONDB_CANDIDATES": sa.make_url(SECOND)}, {}, {None: ["two"]}),
        (
            {**ON_SERVERS, "COMMONDB_CANDIDATES": {None: [SECOND, THIRD], "orders": SECOND}},
            {},
            {None: ["two", "three"], "orders": ["two"]},
        ),
        (
            {**ON_SERVERS, "SQLALCHEMY_ENGINE_OPTIONS": {"candidates": [SECOND]}},
            {},
            {None: ["two"]},
        ),
        (ON_SERVERS, {"candidates": [SECOND]}, {None: ["two"]}),
        (
            {"SQLALCHEMY_BINDS": {None: {"url": SERVER, "candidates": [SECOND]}}},
            {},
            {None: ["two"]},
        ),
        (
            {"SQLALCHEMY_BINDS": {"orders": {"url": SERVER, "candidates": [SECOND]}}},
            {},
            {"orders": ["two"]},
        ),
    ],
)
def test_ways_to_name_candidates(
    config: dict[str, t.Any],
    engine_options: dict[str, t.Any],
    expected: dict[str | None, list[str]],
) -> None:
    """Candidates stand in a setting of their own, by bind key, or beside the URL of a bind."""
    found = load(dict(config), engine_options).candidates
    assert {bind_key: [url.host for url in urls] for bind_key, urls in found.items()} == expected


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        pytest.param(None, {}, id="None"),
        pytest.param([], {}, id="an empty list"),
        pytest.param("", {}, id="an empty text"),
        pytest.param({}, {}, id="an empty dict"),
        pytest.param({None: [], "orders": []}, {}, id="empty lists"),
        pytest.param(ONE, {None: [("one.db", 1, {})]}, id="a text"),
        pytest.param(sa.make_url(ONE), {None: [("one.db", 1, {})]}, id="a URL"),
        pytest.param(
            [ONE, sa.make_url(TWO)],
            {None: [("one.db", 1, {}), ("two.db", 1, {})]},
            id="a list",
        ),
        pytest.param((ONE,), {None: [("one.db", 1, {})]}, id="a tuple"),
        pytest.param(
            {"url": ONE, "weight": 3},
            {None: [("one.db", 3, {})]},
            id="a dict",
        ),
        pytest.param(
            [
                {"url": ONE, "weight": 0.5, "pool_size": 2},
                TWO,
            ],
            {None: [("one.db", 0.5, {"pool_size": 2}), ("two.db", 1, {})]},
            id="dict entries",
        ),
        pytest.param(
            {None: ONE, "orders": [{"url": TWO}]},
            {None: [("one.db", 1, {})], "orders": [("two.db", 1, {})]},
            id="by bind key",
        ),
        pytest.param(
            {"orders": {"url": TWO, "weight": 2}},
            {"orders": [("two.db", 2, {})]},
            id="one dict by bind key",
        ),
    ],
)
def test_ways_to_name_replicas(replicas: t.Any, expected: dict[str | None, t.Any]) -> None:
    """``COMMONDB_REPLICAS`` is a list, one replica, or either of them by bind key."""
    config = {**GOOD, "SQLALCHEMY_BINDS": {"orders": URI}, "COMMONDB_REPLICAS": replicas}
    assert load(config, {}) == Config(described_replicas(expected), "auto", frozenset())


@pytest.mark.parametrize(
    ("config", "engine_options", "expected"),
    [
        ({"SQLALCHEMY_BINDS": {None: {"url": URI, "replicas": REPLICA}}}, {}, {None}),
        ({"SQLALCHEMY_BINDS": {"a": {"url": URI, "replicas": [REPLICA]}}}, {}, {"a"}),
        ({**GOOD, "SQLALCHEMY_ENGINE_OPTIONS": {"replicas": [REPLICA]}}, {}, {None}),
        (GOOD, {"replicas": [REPLICA]}, {None}),
        ({}, {"url": URI, "replicas": [REPLICA]}, {None}),
        ({"SQLALCHEMY_BINDS": {"a": {"replicas": REPLICA}}}, {"url": URI}, {"a"}),
        ({**GOOD, "SQLALCHEMY_BINDS": {None: {"replicas": REPLICA}}}, {}, {None}),
        (
            {
                **GOOD,
                "SQLALCHEMY_ENGINE_OPTIONS": {"replicas": [REPLICA]},
                "SQLALCHEMY_BINDS": {None: {"echo": False}},
            },
            {},
            {None},
        ),
    ],
)
def test_replicas_beside_a_url(
    config: dict[str, t.Any], engine_options: dict[str, t.Any], expected: set[str | None]
) -> None:
    """``replicas`` may stand beside the ``url`` of a bind, wherever that may stand."""
    replicas = described_replicas({bind_key: [("r.db", 1, {})] for bind_key in expected})
    assert load(dict(config), engine_options).replicas == replicas
    # And it is no option of the engine: init_app makes one without a word.
    flask_app = make_app(config)
    db = CommonDB(flask_app, engine_options=engine_options)
    with flask_app.app_context():
        assert db.router.replica_sets.keys() == expected


@pytest.mark.parametrize("primary", ["mysql+pymysql", "mariadb+pymysql"])
@pytest.mark.parametrize("replica", ["mysql+mysqldb", "mariadb+pymysql"])
def test_one_family(primary: str, replica: str) -> None:
    """MariaDB and MySQL are one family, and drivers may differ: such replicas are no mistake."""
    config = {"SQLALCHEMY_DATABASE_URI": f"{primary}://h", "COMMONDB_REPLICAS": f"{replica}://h"}
    assert load(config, {}).replicas == {None: (ReplicaConfig(sa.make_url(f"{replica}://h")),)}


def test_from_prefixed_env(monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
    """All settings can be given in the environment, where Flask reads them as JSON."""
    replica = f"sqlite:///{files}/replica.db"
    environment = {
        "FLASK_SQLALCHEMY_DATABASE_URI": f"sqlite:///{files}/primary.db",
        "FLASK_COMMONDB_REPLICAS": f'["{replica}", {{"url": "{replica}", "weight": 2}}]',
        "FLASK_COMMONDB_ROUTING": "explicit",
        "FLASK_COMMONDB_READ_FUNCTIONS": '["WHO", "app.who"]',
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    flask_app = Flask("from_env")
    flask_app.config.from_prefixed_env()
    assert load(flask_app.config, {}) == Config(
        {None: (ReplicaConfig(sa.make_url(replica)), ReplicaConfig(sa.make_url(replica), 2))},
        "explicit",
        frozenset({"who", "app.who"}),
    )
    db = CommonDB(flask_app)
    with flask_app.app_context():
        assert [replica.weight for replica in db.router.replicas.values()] == [1, 2]


def test_reads_of_each_bind() -> None:
    """What is said for all binds counts, but for what stands beside a bind's URL."""

    def mine(candidates: t.Sequence[t.Any]) -> t.Any:
        return candidates[0]

    config = {
        **GOOD,
        "SQLALCHEMY_BINDS": {
            "orders": {"url": URI, "policy": "round_robin", "max_lag": 3, "fallback": "error"},
            "stats": URI,
        },
        "SQLALCHEMY_ENGINE_OPTIONS": {"fallback_limit": 4},
        "COMMONDB_POLICY": mine,
        "COMMONDB_ZONES": ["near", "far"],
        "COMMONDB_MAX_LAG": 1.5,
        "COMMONDB_FALLBACK": "stale",
        "COMMONDB_FALLBACK_LIMIT": 2,
    }
    zones = ("near", "far")
    assert load(config, {}).reads == {
        None: ReadConfig(mine, zones, 1.5, "stale", 4),
        "orders": ReadConfig(round_robin, zones, 3, "error", 2),
        "stats": ReadConfig(mine, zones, 1.5, "stale", 2),
    }


def test_env_by_bind_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flask's ``__`` in the name of an environment variable names the bind of replicas."""
    monkeypatch.setenv("FLASK_SQLALCHEMY_BINDS__orders", URI)
    monkeypatch.setenv("FLASK_COMMONDB_REPLICAS__orders", f'["{REPLICA}"]')
    flask_app = Flask("from_env")
    flask_app.config.from_prefixed_env()
    assert load(flask_app.config, {}).replicas == described_replicas({"orders": [("r.db", 1, {})]})


def test_defaults_are_written_back() -> None:
    """What was not set stands in ``app.config`` with its default, as Flask's extensions do it."""
    flask_app = make_app(GOOD)
    CommonDB(flask_app)
    assert {k: v for k, v in flask_app.config.items() if k.startswith("COMMONDB_")} == {
        "COMMONDB_REPLICAS": None,
        "COMMONDB_CANDIDATES": None,
        "COMMONDB_POLICY": "fastest_of_two",
        "COMMONDB_ZONES": (),
        "COMMONDB_MAX_LAG": None,
        "COMMONDB_FALLBACK": "primary",
        "COMMONDB_FALLBACK_LIMIT": None,
        "COMMONDB_ROUTING": "auto",
        "COMMONDB_READ_FUNCTIONS": (),
        "COMMONDB_LEAK_WATCH": False,
        "COMMONDB_ENGINE_DEFAULTS": {},
    }


def test_what_is_set_stays() -> None:
    """What was set is not replaced by a default."""
    own = {
        "COMMONDB_REPLICAS": [REPLICA],
        "COMMONDB_ROUTING": "explicit",
        "COMMONDB_READ_FUNCTIONS": ["who"],
        "COMMONDB_LEAK_WATCH": True,
        "COMMONDB_ENGINE_DEFAULTS": {"pool_size": 3, "sqlite": {"lock_timeout": 2}},
    }
    flask_app = make_app({**GOOD, **own})
    CommonDB(flask_app)
    assert {key: flask_app.config[key] for key in own} == own


def test_the_users_values_are_not_changed(files: Path) -> None:
    """What the user has put into the config is as before, also when two apps share it."""
    url = f"sqlite:///{files}/a.db"
    shared: dict[str, t.Any] = {
        "SQLALCHEMY_DATABASE_URI": "sqlite:///relative.db",
        "SQLALCHEMY_ENGINE_OPTIONS": {
            "connect_args": {"timeout": 5},
            "execution_options": {"isolation_level": "SERIALIZABLE", "own": 1},
            "replicas": [{"url": "sqlite:///relative.db", "connect_args": {"timeout": 3}}, url],
        },
        "SQLALCHEMY_BINDS": {
            "orders": {"url": url, "replicas": [{"url": url, "weight": 2}], "echo": False},
            "mysql": {
                "url": "mysql+pymysql://host/app",
                "connect_args": {"connect_timeout": 3},
                "replicas": [{"url": "mysql+pymysql://other/app", "pool_size": 2}],
            },
        },
        "COMMONDB_READ_FUNCTIONS": ["Who"],
    }
    before = copy.deepcopy(shared)
    for name in ("first", "second"):
        flask_app = Flask(name, instance_path=str(files))
        flask_app.config.update(shared)
        db = CommonDB(flask_app, engine_options={"echo": False})
        with flask_app.app_context():
            assert {k: len(s.replicas) for k, s in db.router.replica_sets.items()} == {
                None: 2,
                "orders": 1,
                "mysql": 1,
            }
            db.session.execute(sa.text("SELECT 1"))
            dispose(db)
        assert shared == before


def test_the_constructors_options_are_not_changed(files: Path) -> None:
    """The constructor's ``engine_options`` are as before, and serve any number of apps."""
    options: dict[str, t.Any] = {
        "connect_args": {"timeout": 5},
        "replicas": [{"url": f"sqlite:///{files}/a.db", "weight": 2}],
    }
    before = copy.deepcopy(options)
    db = CommonDB(engine_options=options)
    for name in ("first", "second"):
        flask_app = Flask(name)
        flask_app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{files}/a.db"
        db.init_app(flask_app)
        with flask_app.app_context():
            assert list(db.router.replica_sets) == [None]
    assert options == before


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        ({"COMMONDB_ROUTING": "manual"}, "COMMONDB_ROUTING"),
        ({"COMMONDB_REPLICAS": [{"ulr": URI}]}, "COMMONDB_REPLICAS"),
        ({"COMMONDB_REPLICAS": [{"url": URI, "wieght": 2}]}, "wieght"),
        ({"COMMONDB_REPLICAS": [{"url": URI, "pool_siez": 2}]}, "pool_siez"),
        ({"SQLALCHEMY_DATABASE_URI": None}, "must be set"),
    ],
)
def test_after_an_error(broken: dict[str, t.Any], text: str) -> None:
    """After a mistake nothing is registered on the app; once it is mended, ``init_app`` works."""
    flask_app = make_app({**GOOD, **broken})
    db = CommonDB()
    with pytest.raises(ConfigError, match=text):
        db.init_app(flask_app)
    assert flask_app.extensions == {}
    assert flask_app.teardown_appcontext_funcs == []
    assert flask_app.shell_context_processors == []
    assert "do_teardown_appcontext" not in vars(flask_app)
    with (
        flask_app.app_context(),
        pytest.raises(RuntimeError, match="current Flask app is not registered"),
    ):
        assert db.engines is None
    flask_app.config.update(GOOD, COMMONDB_ROUTING="auto", COMMONDB_REPLICAS=[URI])
    db.init_app(flask_app)
    with flask_app.app_context():
        assert list(db.engines) == [None]
        assert len(db.router.replicas) == 1
    assert flask_app.teardown_appcontext_funcs == []  # it comes after all of these
    assert "do_teardown_appcontext" in vars(flask_app)


@pytest.mark.parametrize(
    "url", ["oracle+oracledb://host/app", "mssql+pyodbc://host/app"], ids=["oracle", "mssql"]
)
def test_servers_that_cannot_be_held_read_only(url: str) -> None:
    """A replica on a server whose connections cannot be held read-only is a mistake."""
    with pytest.raises(ConfigError, match="read-only"):
        CommonDB(make_app({**GOOD, "COMMONDB_REPLICAS": [url]}))


@pytest.mark.parametrize(
    ("config", "method", "expected"),
    [
        ({}, "GET", [("replica", "read")]),
        ({"COMMONDB_ROUTING": "auto"}, "GET", [("replica", "read")]),
        ({"COMMONDB_ROUTING": "auto"}, "POST", [("primary", "method")]),
        ({"COMMONDB_ROUTING": "explicit"}, "GET", [("primary", "default")]),
        ({"COMMONDB_ROUTING": "explicit"}, "POST", [("primary", "default")]),
    ],
)
def test_routing_is_observed(
    files: Path, config: dict[str, t.Any], method: str, expected: list[tuple[str, str]]
) -> None:
    """``COMMONDB_ROUTING``: by the request's method, or only inside explicit scopes."""
    flask_app, db = replicated(files, config)
    with flask_app.test_request_context(method=method), routes(flask_app) as seen:
        db.session.execute(sa.select(sa.literal(7, sa.Integer))).all()
    assert seen == expected


def test_scopes_with_explicit_routing(files: Path) -> None:
    """With ``COMMONDB_ROUTING = "explicit"`` a replica is read where the program says so."""
    flask_app, db = replicated(files, {"COMMONDB_ROUTING": "explicit"})
    with flask_app.test_request_context(), routes(flask_app) as seen, db.replica():
        db.session.execute(sa.select(sa.literal(7, sa.Integer))).all()
    assert seen == [("replica", "scope")]


@pytest.mark.parametrize(
    ("functions", "expected"),
    [
        ([], [("primary", "unknown_sql")]),
        (["likelihood"], [("replica", "read")]),
        (("Likelihood", "other"), [("replica", "read")]),
        ({"LIKELIHOOD"}, [("replica", "read")]),
        (["likely"], [("primary", "unknown_sql")]),
    ],
    ids=str,
)
def test_read_functions_are_observed(
    files: Path, functions: t.Any, expected: list[tuple[str, str]]
) -> None:
    """``COMMONDB_READ_FUNCTIONS``: functions that only read, in whatever case they are written."""
    flask_app, db = replicated(files, {"COMMONDB_READ_FUNCTIONS": functions})
    with flask_app.test_request_context(), routes(flask_app) as seen:
        statement = sa.select(sa.func.likelihood(7, sa.literal(0.5, literal_execute=True)))
        assert db.session.scalar(statement) == 7
    assert seen == expected


def test_replicas_are_observed(files: Path) -> None:
    """``COMMONDB_REPLICAS``, weights and a replica's own options: each has its effect."""
    url = f"sqlite:///{files}/primary.db"
    flask_app, db = replicated(
        files,
        {
            "COMMONDB_REPLICAS": [url, {"url": url, "weight": 7, "pool_size": 3}],
            "SQLALCHEMY_ENGINE_OPTIONS": {"pool_size": 2, "execution_options": {"own": 1}},
        },
    )
    with flask_app.app_context():
        primary = db.engine
        replicas = db.router.replica_sets[None].replicas
    assert [
        (replica.bind_key, replica.name, replica.weight, pool_size(replica.engine))
        for replica in replicas
    ] == [(None, "primary.db", 1, 2), (None, "primary.db", 7, 3)]
    assert pool_size(primary) == 2
    assert [r.engine.get_execution_options()["own"] for r in replicas] == [1, 1]
    assert {replica.engine for replica in replicas}.isdisjoint({primary})


def test_no_connection_is_made(files: Path) -> None:
    """``init_app`` connects nowhere: a server that is down does not keep an app from starting."""
    config = {
        "SQLALCHEMY_DATABASE_URI": f"sqlite:///{files}/never/primary.db",
        "COMMONDB_REPLICAS": [f"sqlite:///{files}/never/replica.db"],
    }
    CommonDB(make_app(config))
    assert list(files.iterdir()) == []


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """An empty directory for the database files."""
    directory = tmp_path / "files"
    directory.mkdir()
    return directory


def make_app(config: t.Mapping[str, t.Any]) -> Flask:
    flask_app = Flask("configured")
    flask_app.config.update(config)
    return flask_app


def replicated(files: Path, config: t.Mapping[str, t.Any]) -> tuple[Flask, CommonDB]:
    """An app on a file, with a replica on the same file."""
    url = f"sqlite:///{files}/primary.db"
    flask_app = make_app({"SQLALCHEMY_DATABASE_URI": url, "COMMONDB_REPLICAS": [url], **config})

    class Base(so.DeclarativeBase):
        pass

    return flask_app, CommonDB(flask_app, model_class=Base)


@contextlib.contextmanager
def routes(flask_app: Flask) -> t.Iterator[list[tuple[str, str]]]:
    """Role and reason of all that is routed inside the block."""
    seen: list[tuple[str, str]] = []

    def note(sender: Flask, role: str, reason: str, **_: t.Any) -> None:
        seen.append((role, reason))

    with routed.connected_to(note, flask_app):
        yield seen


def described_replicas(
    described: t.Mapping[str | None, t.Sequence[tuple[str, float, dict[str, t.Any]]]],
) -> dict[str | None, tuple[ReplicaConfig, ...]]:
    return {
        bind_key: tuple(
            ReplicaConfig(sa.make_url(f"sqlite:////nowhere/{name}"), weight, options)
            for name, weight, options in replicas
        )
        for bind_key, replicas in described.items()
    }


def pool_size(engine: sa.Engine) -> int:
    return t.cast(sa.QueuePool, engine.pool).size()


def dispose(db: CommonDB) -> None:
    db.session.remove()
    for engine in db.engines.values():
        engine.dispose()
