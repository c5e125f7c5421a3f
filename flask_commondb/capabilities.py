"""What one engine can take: which options its server, its driver and its pool understand.

Owns: the names of all options, what the values of our own must be, which server can do what, and
how our time limits are said in a driver's own arguments.

Must not: know where an option stands or which place goes before which, or show a value that may be
secret.
"""

from __future__ import annotations

import math
import typing as t
import warnings

import sqlalchemy as sa
from sqlalchemy.util import get_cls_kwargs
from sqlalchemy.util import get_func_kwargs

from .dialects import FAMILIES
from .dialects import Generic

#: Our own options beside SQLAlchemy's, and what each must be.
OWN = {
    "connect_timeout": "a number of seconds above 0",
    "pool_min_size": "a whole number, 0 or more",
    "pool_max_idle": "a number of seconds above 0, or None",
    "pool_ping_after": "a number of seconds, 0 or more, or None",
    "pool_resolve_after": "a number of seconds above 0, or None",
    "statement_timeout": "a number of seconds above 0, or None",
    "lock_timeout": "a number of seconds above 0, or None",
}

#: Options that are dicts.
DICTS = ("connect_args", "execution_options")

#: What a driver or its server understands, beside the arguments of SQLAlchemy's dialect class.
OF_ONE_DRIVER = ("connect_args", "module", "isolation_level")

#: What decides which other options an engine can take.
DECISIVE = {"creator", "pool", "poolclass", "module", "plugins"}


class Capabilities:
    """What one engine can take.

    :param url: its server.
    :param chosen: those of :data:`DECISIVE` that it will have.
    """

    def __init__(self, url: sa.URL, chosen: t.Mapping[str, t.Any]) -> None:
        self.url = url
        self.dialect = url.get_dialect()
        self.family = FAMILIES.get(self.dialect.name, Generic)
        #: See :attr:`.Generic.arguments`.
        self.arguments = self.family.arguments.get(self.dialect.driver, {})
        self.maker = next((name for name in ("creator", "pool") if chosen.get(name)), None)
        self.pool_class = _pool_class(url, chosen)
        self.has_queue = issubclass(self.pool_class, sa.QueuePool) and not chosen.get("pool")
        of_pool = set() if chosen.get("pool") else _pool_options(self.pool_class)
        self.not_for_pool = _pool_options(sa.QueuePool) - of_pool
        if not self.has_queue:
            self.not_for_pool |= {name for name in OWN if name.startswith("pool_")}
        self.has_plugins = bool(chosen.get("plugins") or "plugin" in url.query)
        of_engine = get_cls_kwargs(sa.Engine) - {"url", "dialect", "pool"}
        self.known = {
            *(dialect_options(url) | of_pool | _pool_options(sa.QueuePool) | of_engine),
            *OWN,
            *_OF_NO_CLASS,
        }
        #: Whether SQLAlchemy's own driver connects, so that its arguments are known.
        self.connects = not (self.maker or chosen.get("module"))

    def knows(self, name: str) -> bool:
        """Whether there is such an option; only a plugin knows which are its own."""
        return name in self.known or self.has_plugins

    def why_not(self, name: str) -> str | None:
        """Why this engine cannot take an option that exists."""
        if name in self.not_for_pool:
            return f"{name!r} is not for this bind's pool, which is a {self.pool_class.__name__}."
        argument = self._argument(name)
        if argument is None:
            if name == "connect_timeout":
                return _no_connect_timeout(self.dialect)
            return why_impossible(name, self.dialect)
        if self.maker is not None:
            return f"{name!r} has no effect, because {self.maker!r} makes the connections."
        if argument in self.url.query:
            return f"{name!r} stands here, and {argument!r} in the URL; leave one out."
        return None

    def why_twice(self, name: str, options: t.Mapping[str, t.Any]) -> str | None:
        """Why an option cannot stand beside the driver's arguments among the same options."""
        argument, connect_args = self._argument(name), options.get("connect_args")
        if isinstance(connect_args, t.Mapping) and argument in connect_args:
            return f"{name!r} and connect_args[{argument!r}] are the same; leave one out."
        return None

    def tell_driver(self, merged: dict[str, t.Any], above: t.Mapping[str, t.Any]) -> None:
        """Write what the driver does itself among its own arguments.

        :param merged: all options so far, ``above`` included.
        :param above: those that were laid over the others last. Its word to the driver itself
            takes away what a lower place has said in ours.
        """
        for name, (argument, convert) in self.arguments.items():
            if argument in (above.get("connect_args") or ()):
                merged.pop(name, None)
            elif above.get(name) is not None:
                merged["connect_args"][argument] = convert(above[name])
            elif name in above:
                merged["connect_args"].pop(argument, None)

    def ask_driver(self, merged: dict[str, t.Any]) -> None:
        """What the user has said to the driver itself holds for our settings, too."""
        for name, (argument, _) in self.arguments.items():
            said = merged["connect_args"].get(argument, self.url.query.get(argument))
            if name not in merged and isinstance(said, (int, float, str)):
                try:
                    seconds = float(said)
                except ValueError:
                    continue  # the driver will say so
                if seconds > 0:  # else it is the driver's word for no limit, or a mistake
                    merged[name] = seconds

    def _argument(self, name: str) -> str | None:
        return self.arguments[name][0] if name in self.arguments else None


def why_wrong(name: str, value: t.Any) -> str | None:
    """What is wrong with the value of an option, as far as it is checked here."""
    if name in DICTS:
        if value is None or isinstance(value, t.Mapping):
            return None
        return f"{name!r} must be a dict, not {type(value).__name__}."
    wanted = OWN.get(name)
    if wanted is None or (value is None and wanted.endswith("None")):
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and math.isfinite(value):
        is_whole = isinstance(value, int) or "whole" not in wanted
        if is_whole and (value > 0 or (value == 0 and "0 or more" in wanted)):
            return None
    # A text may be a password that stands in the wrong place.
    shown = repr(value) if is_number or value in (None, True, False) else type(value).__name__
    return f"{name!r} must be {wanted}, not {shown}."


def why_impossible(name: str, dialect: type[sa.Dialect]) -> str | None:
    """Why no server of a family can take one of our own options, with whichever driver."""
    family = FAMILIES.get(dialect.name, Generic)
    if name in ("statement_timeout", "lock_timeout") and family is Generic:
        return f"{name!r} is not known to be possible on {dialect.name}."
    if name == "pool_ping_after" and family.is_local:
        return "'pool_ping_after' is not for SQLite, which has no server that could hang up."
    if name == "pool_resolve_after" and family.is_local:
        return "'pool_resolve_after' is not for SQLite, which has no server with a name."
    if name == "connect_timeout" and not any(name in a for a in family.arguments.values()):
        return _no_connect_timeout(dialect)
    return None


def have_same_driver(*urls: sa.URL) -> bool:
    """Whether what is said to the driver of one is understood by that of the others."""
    drivers = {
        (FAMILIES.get(dialect.name, url.get_backend_name()), dialect.driver)
        for url, dialect in ((url, url.get_dialect()) for url in urls)
    }
    return len(drivers) < 2


def dialect_options(url: sa.URL) -> set[str]:
    """What a driver or its server understands."""
    dialect = url.get_dialect()
    names = {*get_cls_kwargs(dialect), *get_func_kwargs(dialect.import_dbapi)}
    return (names - {"cls", "dbapi", "compiler_linting"}) | {*OF_ONE_DRIVER}


#: Of all other options of ``create_engine()`` it is known which class takes them.
_OF_NO_CLASS = ("plugins", "poolclass", "creator", "pool", "future", "enable_from_linting")

#: What ``create_engine()`` calls a pool's arguments, where it does not call them the same.
_POOL_NAMES = {
    "echo": "echo_pool",
    "logging_name": "pool_logging_name",
    "timeout": "pool_timeout",
    "recycle": "pool_recycle",
    "events": "pool_events",
    "reset_on_return": "pool_reset_on_return",
    "pre_ping": "pool_pre_ping",
    "use_lifo": "pool_use_lifo",
}


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
        dialect: t.Any = url.get_dialect()
        return t.cast("type[sa.Pool]", dialect.get_pool_class(url))


def _pool_options(pool_class: type[sa.Pool]) -> set[str]:
    names = get_cls_kwargs(pool_class) - {"creator", "dialect", "_dispatch"}
    return {_POOL_NAMES.get(name, name) for name in names}


def _no_connect_timeout(dialect: type[sa.Dialect]) -> str:
    if dialect.name == "sqlite":
        return "'connect_timeout' is not for SQLite, which opens a file and connects nowhere."
    return (
        f"'connect_timeout' is not known to be possible with the driver {dialect.driver!r};"
        " say it in 'connect_args', in the driver's own words."
    )
