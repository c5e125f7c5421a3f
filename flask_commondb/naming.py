"""What a server is called in logs, signals, messages and pages.

Owns: :func:`server_name`. Must not: show a user, a password or a query.
"""

from __future__ import annotations

import sqlalchemy as sa


def server_name(url: sa.URL) -> str:
    """Host and port, or the name of a database that has none."""
    if url.host:
        host = url.host.rpartition("@")[2]  # of a password with an "@" that was not quoted
        return f"{host}:{url.port}" if url.port else host
    return (url.database or ":memory:").rpartition("/")[2]
