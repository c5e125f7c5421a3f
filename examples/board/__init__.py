"""A message board: a list of posts, a profile for each author, and a form.

Run it from a checkout, with nothing to install but Flask-CommonDB::

    flask --app examples.board run

That is an SQLite file in the instance folder, read through a second, read-only engine. The same
code runs on MariaDB with two replicas::

    export FLASK_SQLALCHEMY_DATABASE_URI='mysql+pymysql://…@primary/board'
    export FLASK_COMMONDB_REPLICAS='["mysql+pymysql://…@one/board", "mysql+pymysql://…@two/board"]'

Owns: the factory, and the order in which settings override each other.

Must not: connect when imported, or know a page or a table.
"""

from __future__ import annotations

import typing as t

from flask import Config
from flask import Flask

from . import sample
from . import served_by
from . import views
from .models import db

DEFAULTS: t.Mapping[str, t.Any] = {
    "SQLALCHEMY_DATABASE_URI": "sqlite:///board.db",
    # The same file: what a replica of an embedded database is.
    "COMMONDB_REPLICAS": ["sqlite:///board.db"],
    # Room for the longest post, percent-encoded, and not for a flood.
    "MAX_CONTENT_LENGTH": 256 * 1024,
}


def create_app(config: t.Mapping[str, t.Any] | None = None) -> Flask:
    """Make the board, with its tables and, in an empty database, some posts.

    :param config: settings that override the environment's ``FLASK_*``, which override
        :data:`DEFAULTS`.
    """
    app = Flask(__name__)
    environment = Config(app.root_path)
    environment.from_prefixed_env()
    for settings in (DEFAULTS, environment, config or {}):
        # Replicas belong to the primary that they were named with, not to the next one.
        if "SQLALCHEMY_DATABASE_URI" in settings:
            app.config.pop("COMMONDB_REPLICAS", None)
        app.config.update(settings)

    db.init_app(app)
    served_by.init_app(app)
    views.init_app(app)
    with app.app_context():
        sample.prepare()
    return app
