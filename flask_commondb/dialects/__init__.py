"""All that differs by server: one small class for each family, chosen by :func:`dialect_for`.

Owns: SQL that only one server understands, and what is known of its drivers' connections.

Must not: decide anything. Routing, pools and procedures ask; nothing here knows of binds, apps
or sessions.
"""

from __future__ import annotations

import sqlalchemy as sa

from .generic import NO_LIMITS
from .generic import Address
from .generic import CurrentLimits
from .generic import Generic
from .generic import Limits
from .generic import is_readable
from .generic import uncounted
from .histories import Position
from .mysql import MySQL
from .postgresql import PostgreSQL
from .sqlite import SQLite

__all__ = [
    "FAMILIES",
    "NO_LIMITS",
    "Address",
    "CurrentLimits",
    "Generic",
    "Limits",
    "MySQL",
    "Position",
    "PostgreSQL",
    "SQLite",
    "dialect_for",
    "is_readable",
    "uncounted",
]

#: The families whose servers can hold a connection read-only, by SQLAlchemy's backend name.
FAMILIES: dict[str, type[Generic]] = {
    "mysql": MySQL,
    "mariadb": MySQL,
    "postgresql": PostgreSQL,
    "sqlite": SQLite,
}


def dialect_for(engine: sa.Engine, usual: Limits = NO_LIMITS) -> Generic:
    """The dialect of an engine's server; :class:`.Generic` for a family we know nothing of.

    :param usual: the limits that the engine's statements have where the caller sets none.
    """
    return FAMILIES.get(engine.dialect.name, Generic)(engine.dialect, usual)
