"""The pytest plugin: what a test finds when it asks for ``db``.

Owns: fixtures on top of pytest-flask's ``app``. Nothing here is automatic, and no application
context is held open: a test that does not ask pays nothing.

Must not: import at start-up what an app in production would not.
"""

from __future__ import annotations

import itertools
import typing as t

import pytest

if t.TYPE_CHECKING:
    from flask import Flask

    from .extension import CommonDB


@pytest.fixture
def db(app: Flask) -> t.Iterator[CommonDB]:
    """The app's :class:`.CommonDB`, with all tables made; they are dropped after the test.

    The test pushes its own contexts, as the app's requests do:
    ``with app.app_context(): db.session.add(…)``.
    """
    from flask import has_app_context

    extension: CommonDB = app.extensions["sqlalchemy"]
    with app.app_context():
        bind_keys = list(extension.engines)
        extension.create_all(bind_keys)
    yield extension
    if has_app_context():  # pytest-flask's: what the test has left open there would hold locks
        extension._teardown_session(None)
    with app.app_context():
        extension.drop_all(bind_keys)
        replicas = itertools.chain.from_iterable(extension.replica_engines.values())
        for engine in (*extension.engines.values(), *replicas):
            engine.dispose()
