"""What the README shows is true."""

from __future__ import annotations

import re
import textwrap
import typing as t
from pathlib import Path

import sqlalchemy as sa
from flask import Flask
from flask import request

from flask_commondb.signals import routed

if t.TYPE_CHECKING:
    from .servers import Database
    from .servers import MariaDBCluster

README = Path(__file__).parent.parent / "README.rst"


def test_the_ten_lines(mariadb_database: Database[MariaDBCluster]) -> None:
    """The code on the first screen runs as it stands, on a real primary with a replica."""
    database = mariadb_database
    text = README.read_text(encoding="utf-8")
    (block,) = re.findall(r"code-block:: python\n\n((?:    .*\n|\n)+)", text)
    code = (
        textwrap.dedent(block)
        .replace("mysql+pymysql://app:secret@primary/app", database.primary_url)
        .replace("mysql+pymysql://app:secret@replica1/app", database.replica_urls[0])
    )
    assert code.count("127.0.0.1") == 2
    names: dict[str, t.Any] = {"app": Flask("readme"), "request": request}
    exec(compile(code, str(README), "exec"), names)
    app: Flask = names["app"]
    db: t.Any = names["db"]

    class Post(db.Model):  # type: ignore[misc]
        id = sa.Column(sa.Integer, primary_key=True)
        title = sa.Column(sa.String(50), nullable=False)

    names["Post"] = Post
    with app.app_context():
        db.create_all()
    database.execute("CREATE PROCEDURE SP_COUNT() SELECT COUNT(*) AS posts FROM post")
    database.sync()
    roles: list[str] = []

    def note(app: Flask, role: str, **_: object) -> None:
        roles.append(role)

    client = app.test_client()
    with routed.connected_to(note, app):
        assert client.post("/posts", data={"title": "hello"}).json == {"posts": 1}
        database.sync()
        assert set(roles) == {"primary"}
        roles.clear()
        assert client.get("/posts").json == ["hello"]
        assert roles == ["replica"]
    with app.app_context():
        for engine in (db.engine, *db.replica_engines[None]):
            engine.dispose()


def test_the_two_commands() -> None:
    """The commands for a fresh machine name tox environments that exist."""
    text = README.read_text(encoding="utf-8")
    commands = re.findall(r"^    PIP_BREAK_SYSTEM_PACKAGES=1 .* -e (\w+)$", text, re.MULTILINE)
    assert commands == ["board", "tests"]
    settings = (README.parent / "setup.cfg").read_text(encoding="utf-8")
    for name in commands:
        assert f"[testenv:{name}]" in settings
