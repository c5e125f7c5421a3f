"""An app for ``gunicorn --preload`` that has used its database before gunicorn forks.

Owns: the app, and gunicorn's settings: the master asks its connections once more when the workers
are gone. The environment says where the servers are, and where to write what was found.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import sqlalchemy as sa

from .apps import Lab

ID = sa.text("SELECT CONNECTION_ID()")

# Settings of gunicorn, which does not mind the other names.
preload_app = True
workers = 4
control_socket_disable = True

lab = Lab(os.environ["PRELOADED_PRIMARY"], [os.environ["PRELOADED_REPLICA"]])
app = lab.app

with app.app_context():
    lab.db.create_all()
    #: Checked out in the master, with a transaction that is open. Another one is idle in the pool.
    connection = lab.db.engine.connect()
    connection.execute(sa.insert(lab.Post).values(title="of the master"))
    replica = lab.engines[1].connect()
    lab.db.session.scalar(ID)


def master_ids() -> dict[str, list[int]]:
    with lab.engines[0].connect() as idle:
        return {
            "primary": [connection.scalar(ID), idle.scalar(ID)],
            "replica": [replica.scalar(ID)],
        }


before = master_ids()


@app.get("/")
def who() -> dict[str, object]:
    with lab.db.replica():
        from_replica = lab.db.session.scalar(ID)
    return {
        "pid": os.getpid(),
        "replica": from_replica,
        "primary": lab.db.session.scalar(ID),
    }


def on_exit(server: object) -> None:
    """Gunicorn's hook: in the master, after the last worker."""
    after = master_ids()
    connection.commit()
    found = {"pid": os.getpid(), "before": before, "after": after}
    Path(os.environ["PRELOADED_REPORT"]).write_text(json.dumps(found))
