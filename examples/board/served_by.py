"""Which server has answered, and why: in a footer and in the ``Server-Timing`` header.

Owns: what a request has asked of which server, kept on ``g``, and the words for it.

Must not: influence where a statement goes, or guess: it repeats what Flask-CommonDB has signalled.
A site with secrets would not show this to everyone.
"""

from __future__ import annotations

import collections
import itertools
import typing as t

import sqlalchemy as sa
from flask import Flask
from flask import Response
from flask import g
from flask import has_app_context
from werkzeug.http import quote_header_value

from flask_commondb.signals import routed

from .models import db


class Answer(t.NamedTuple):
    """Which server, and why, in Flask-CommonDB's words."""

    role: str
    server: str
    reason: str

    def __str__(self) -> str:
        return f"{self.role} {self.server}".rstrip()


#: No signal is sent for a bind without replicas: what is sent then goes to its only server.
ONLY_SERVER = Answer("primary", "", "no replicas")


def init_app(app: Flask) -> None:
    """Watch an app's statements; give its templates ``served_by()`` and its responses the header.

    The footer has to be rendered after the last query of the page.
    """
    routed.connect(_note_route, app)
    with app.app_context():
        replicas = itertools.chain.from_iterable(db.replica_engines.values())
        for engine in (*db.engines.values(), *replicas):
            sa.event.listen(engine, "before_cursor_execute", _count_statement)
    app.context_processor(lambda: {"served_by": in_words})
    app.after_request(_add_header)


def in_words() -> str:
    """Such as ``replica board.db (read), 2 statements``."""
    return (
        "; ".join(
            f"{answer} ({answer.reason.replace('_', ' ')}), {_statements(count)}"
            for answer, count in _answers().items()
        )
        or "no statements"
    )


def in_header() -> str:
    """The same for machines, such as ``db;desc="replica board.db: read, 2 statements"``."""
    return ", ".join(
        _metric(f"{answer}: {answer.reason}, {_statements(count)}")
        for answer, count in _answers().items()
    ) or _metric("no statements")


def _answers() -> collections.Counter[Answer]:
    """How many statements each server was sent in this request, by reason."""
    if "board_answers" not in g:
        g.board_answers = collections.Counter()
    return t.cast("collections.Counter[Answer]", g.board_answers)


def _note_route(app: Flask, *, role: str, server: str, reason: str, **other: object) -> None:
    """What is sent from now on is sent for this reason."""
    g.board_route = Answer(role, server, reason)


def _count_statement(*event: object) -> None:
    if has_app_context():
        _answers()[g.get("board_route", ONLY_SERVER)] += 1


def _add_header(response: Response) -> Response:
    response.headers["Server-Timing"] = in_header()
    return response


def _statements(count: int) -> str:
    return "1 statement" if count == 1 else f"{count} statements"


def _metric(text: str) -> str:
    # A header is ASCII on one line; the name of a database file need not be.
    text = text.encode("unicode_escape").decode("ascii")
    return f"db;desc={quote_header_value(text, allow_token=False)}"
