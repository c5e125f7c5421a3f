"""The pytest plugin, as a project uses it: each test here runs pytest on a small project."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import flask_commondb

pytest_plugins = ["pytester"]

#: The project under test: one model on each of two binds, one of them with a replica.
CONFTEST = '''
import pytest
import sqlalchemy as sa
from flask import Flask
from flask_commondb import CommonDB

database = CommonDB()


class Post(database.Model):
    id = sa.Column(sa.Integer, primary_key=True)


class Order(database.Model):
    __bind_key__ = "orders"
    id = sa.Column(sa.Integer, primary_key=True)


def tables():
    """The tables that are there, looked up without the extension."""
    found = []
    for name in ("main", "orders"):
        engine = sa.create_engine(f"sqlite:///{DIRECTORY}/{name}.db")
        found += sa.inspect(engine).get_table_names()
        engine.dispose()
    return found


@pytest.fixture
def app():
    app = Flask("project")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{DIRECTORY}/main.db"
    app.config["COMMONDB_REPLICAS"] = [f"sqlite:///{DIRECTORY}/main.db"]
    app.config["SQLALCHEMY_BINDS"] = {"orders": f"sqlite:///{DIRECTORY}/orders.db"}
    database.init_app(app)
    return app
'''


class Project:
    """A project with a conftest, whose tests are given as text."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        directory = f"DIRECTORY = {str(pytester.path)!r}\n"
        pytester.makeconftest(directory + CONFTEST)
        pytester.makepyprojecttoml("[tool.pytest.ini_options]\nfilterwarnings = ['error']")

    def run(self, source: str, *plugins: str) -> pytest.RunResult:
        """Run tests with our plugin, the given ones, and none of those that are installed."""
        self.pytester.makepyfile(
            "import pytest\nimport sqlalchemy as sa\nfrom flask import has_app_context\n"
            "from conftest import Order, Post, database, tables\n\n\n" + source
        )
        arguments = [f"-p{plugin}" for plugin in ("flask_commondb.pytest_plugin", *plugins)]
        return self.pytester.runpytest_subprocess("-v", "-pno:cacheprovider", *arguments)


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    # Wherever the package was imported from; and each plugin once, installed or not.
    monkeypatch.setenv("PYTHONPATH", str(Path(flask_commondb.__file__).parents[1]))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    return Project(pytester)


each_way = pytest.mark.parametrize(
    "plugins", [(), ("pytest_flask.plugin",)], ids=["alone", "flask"]
)


@each_way
def test_tables(project: Project, plugins: tuple[str, ...]) -> None:
    """A test that asks for ``db`` gets the app's extension, with the tables of every bind."""
    result = project.run(
        """
def test_it(app, db):
    assert db is database
    assert tables() == ["post", "order"]
    with app.app_context():
        db.session.add_all([Post(id=1), Order(id=2)])
        db.session.commit()
        assert db.session.scalars(sa.select(Post.id)).all() == [1]
        with db.replica():
            assert db.session.scalars(sa.select(Post.id)).all() == [1]
        assert db.sessions["orders"].scalars(sa.select(Order.id)).all() == [2]
""",
        *plugins,
    )
    result.assert_outcomes(passed=1)


@each_way
def test_dropped(project: Project, plugins: tuple[str, ...]) -> None:
    """After the test the tables are gone, so the next one starts empty; also when one fails."""
    result = project.run(
        """
@pytest.mark.parametrize("number", [1, 2, 3])
def test_one(app, db, number):
    with app.app_context():
        assert db.session.scalars(sa.select(Post.id)).all() == []
        db.session.add(Post(id=7))
        db.session.commit()
    assert number != 2, "fails on purpose"


def test_after():
    assert tables() == []
""",
        *plugins,
    )
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*AssertionError: fails on purpose*"])


def test_no_context(project: Project) -> None:
    """The fixture holds no context open: a test pushes its own, as requests do."""
    result = project.run(
        """
def test_it(db):
    assert not has_app_context()
    with pytest.raises(RuntimeError, match="application context"):
        db.session.scalars(sa.select(Post))
"""
    )
    result.assert_outcomes(passed=1)


def test_context_of_pytest_flask(project: Project) -> None:
    """The request context that pytest-flask pushes is as it would be without the fixture."""
    result = project.run(
        """
from flask import request


def test_it(app, db):
    assert request.path == "/"
    db.session.add(Post(id=1))
    db.session.commit()
    with app.app_context():
        assert db.session.scalars(sa.select(Post.id)).all() == [1]
""",
        "pytest_flask.plugin",
    )
    result.assert_outcomes(passed=1)


def test_left_open(project: Project) -> None:
    """A transaction that a test leaves open in pytest-flask's context does not hinder the drop."""
    result = project.run(
        """
def test_it(db):
    db.session.add(Post(id=1))
    db.session.flush()
    db.sessions["orders"].add(Order(id=1))
    db.sessions["orders"].flush()


def test_after():
    assert tables() == []
""",
        "pytest_flask.plugin",
    )
    result.assert_outcomes(passed=2)


@each_way
def test_nothing_is_automatic(project: Project, plugins: tuple[str, ...]) -> None:
    """A test that asks for the app only finds no tables, and no database file is made."""
    result = project.run(
        """
import os

from conftest import DIRECTORY


def test_app(app):
    assert not os.path.exists(f"{DIRECTORY}/main.db")
    assert app.extensions["sqlalchemy"] is database


def test_nothing():
    assert not os.path.exists(f"{DIRECTORY}/main.db")
""",
        *plugins,
    )
    result.assert_outcomes(passed=2)


def test_connections_are_closed(project: Project) -> None:
    """After the test no connection is left, neither to a bind nor to a replica."""
    result = project.run(
        """
@pytest.fixture
def pools(app):
    with app.app_context():
        engines = [*database.engines.values(), *database.replica_engines[None]]
    yield [engine.pool for engine in engines]
    for engine in engines:
        assert engine.pool.checkedin() == engine.pool.checkedout() == 0


def test_it(app, pools, db):
    with app.test_request_context():
        db.session.scalars(sa.select(Post)).all()
        db.session.scalars(sa.select(Order)).all()
        with db.primary():
            db.session.scalars(sa.select(Post)).all()
    assert [pool.checkedin() for pool in pools] == [1, 1, 1]
"""
    )
    result.assert_outcomes(passed=1)


def test_in_memory(project: Project) -> None:
    """An in-memory SQLite database serves, too: the tables last for the test."""
    result = project.run(
        """
@pytest.fixture
def app():
    from flask import Flask
    app = Flask("memory")
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    app.config["SQLALCHEMY_BINDS"] = {"orders": "sqlite://"}
    database.init_app(app)
    return app


def test_it(app, db):
    for number in (1, 2):
        with app.app_context():
            db.session.add(Post(id=number))
            db.session.commit()
    with app.app_context():
        assert db.session.scalars(sa.select(Post.id)).all() == [1, 2]
"""
    )
    result.assert_outcomes(passed=1)


def test_without_an_app(project: Project) -> None:
    """A project without a fixture ``app`` is told so by pytest, only where ``db`` is asked for."""
    project.pytester.makeconftest("Post = Order = database = tables = None")
    result = project.run(
        """
def test_it(db):
    pass


def test_other():
    pass
"""
    )
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*fixture 'app' not found*"])


def test_light_at_start(pytester: pytest.Pytester) -> None:
    """The plugin alone imports neither Flask nor SQLAlchemy: pytest loads it for every project."""
    script = pytester.makepyfile(
        f"""
import importlib.util
import sys

import pytest

before = set(sys.modules)
spec = importlib.util.spec_from_file_location("plugin", {plugin_file()!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}}))
"""
    )
    assert pytester.run(sys.executable, script).outlines == ["[]"]


def test_entry_point() -> None:
    """The entry point by which pytest finds the plugin names the module of the fixture."""
    project = Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8")
    section = project.partition("[project.entry-points.pytest11]\n")[2]
    name, _, module = section.partition("\n")[0].partition(" = ")
    assert (name, module) == ("commondb", '"flask_commondb.pytest_plugin"')
    assert Path(plugin_file()).is_file()


def plugin_file() -> str:
    return str(Path(flask_commondb.__file__).with_name("pytest_plugin.py"))
