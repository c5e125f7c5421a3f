"""What MariaDB servers have executed for an app, by their own account.

Owns: :class:`Logs`. Must not: know the package under test.
"""

from __future__ import annotations

import re
import typing as t

import pymysql

if t.TYPE_CHECKING:
    from .servers import MariaDBCluster

#: What the driver and the pool say beside the statements.
HOUSEKEEPING = re.compile(r"(SET (SESSION|NAMES|AUTOCOMMIT)|COMMIT|ROLLBACK|BEGIN$)", re.IGNORECASE)


class Logs:
    """The general logs and the binary logs of a cluster's servers, by their server ids.

    :param users: whose statements are told; ``lab`` is also what the tests use.
    """

    def __init__(self, cluster: MariaDBCluster, users: t.Collection[str] = ("app",)) -> None:
        self.users = "|".join(users)
        self.connections = {}
        for server in cluster.servers:
            server.execute("SET GLOBAL general_log = 1")
            self.connections[server.server_id] = pymysql.connect(
                host="127.0.0.1",
                port=server.port,
                user="lab",
                password="lab",
                autocommit=True,
                ssl_disabled=True,
                init_command="SET sql_log_bin = 0",  # emptying the log would stand there, too
            )
        self.take()

    def take(self) -> dict[int, list[str]]:
        """What the users have done since the last time; a server without any is left out."""
        taken = {}
        for server_id, connection in self.connections.items():
            with connection.cursor() as cursor:
                cursor.execute(
                    "SELECT CONVERT(argument USING utf8mb4) FROM mysql.general_log"
                    " WHERE command_type = 'Query' AND thread_id <> CONNECTION_ID()"
                    f" AND user_host RLIKE '^({self.users})[[]'"
                )
                statements = [sql for (sql,) in cursor if not HOUSEKEEPING.match(sql)]
                cursor.execute("TRUNCATE mysql.general_log")
            if statements:
                taken[server_id] = statements
        return taken

    def position(self, server_id: int) -> str:
        """The last transaction in a server's own binary log, ``domain-server-number``."""
        with self.connections[server_id].cursor() as cursor:
            cursor.execute("SELECT @@gtid_binlog_pos")
            ((position,),) = cursor.fetchall()
        return str(position)

    def origin(self, server_id: int) -> int:
        """The server that has executed that transaction first."""
        return int(self.position(server_id).split("-")[1])

    def close(self) -> None:
        for connection in self.connections.values():
            connection.close()
