"""``CommonDB`` in the place of ``SQLAlchemy``: what an app relies on is unchanged. I11."""

from __future__ import annotations

import typing as t

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_commondb import CommonDB
from flask_commondb.signals import routed

if t.TYPE_CHECKING:
    from pathlib import Path

    from .servers import Database
    from .servers import MariaDBCluster

Log = list[tuple[str, t.Any]]


def scenario(extension: type[SQLAlchemy], url: str, bind: str) -> tuple[Log, list[t.Any]]:
    """A day in the life of an app; returns the SQL that was sent, and what was read."""

    class Base(so.DeclarativeBase):
        pass

    app = Flask("scenario")
    app.config["SQLALCHEMY_DATABASE_URI"] = url
    app.config["SQLALCHEMY_BINDS"] = {"other": bind}
    db: t.Any = t.cast(t.Any, extension)(app, model_class=Base)

    class User(db.Model):  # type: ignore[misc]
        id: so.Mapped[int] = so.mapped_column(primary_key=True)
        name: so.Mapped[str] = so.mapped_column(sa.String(20), unique=True)
        posts: so.Mapped[list[Post]] = so.relationship(back_populates="user")

    class Post(db.Model):  # type: ignore[misc]
        id: so.Mapped[int] = so.mapped_column(primary_key=True)
        user_id: so.Mapped[int] = so.mapped_column(sa.ForeignKey(User.id))
        user: so.Mapped[User] = so.relationship(back_populates="posts")

    class Event(db.Model):  # type: ignore[misc]
        __bind_key__ = "other"
        id: so.Mapped[int] = so.mapped_column(primary_key=True)

    log: Log = []
    seen: list[t.Any] = []
    with app.app_context():
        db.drop_all()
        db.create_all()
        for key, engine in db.engines.items():

            @sa.event.listens_for(engine, "before_cursor_execute")
            def note(
                connection: t.Any, cursor: t.Any, statement: str, *_: t.Any, key: t.Any = key
            ) -> None:
                log.append((f"{key}: {statement}", _[0]))

    with app.test_request_context():
        db.session.add_all([User(name="first", posts=[Post(), Post()]), Event()])
        db.session.commit()
    with app.test_request_context():
        user = db.session.scalars(sa.select(User)).one()
        seen.append((user.name, len(user.posts)))
        seen.append(db.session.get(Event, 1) is not None)
        seen.append(db.session.query(Post).join(User).filter(User.name == "first").count())
        db.session.add(User(name="first"))
        with pytest.raises(sa.exc.IntegrityError):
            db.session.flush()
        db.session.rollback()
        user = db.session.scalars(sa.select(User)).one()
        user.name = "second"
        with db.session.begin_nested():
            db.session.add(User(name="third"))
        db.session.execute(sa.update(Event).values(id=2))
        db.session.commit()
        db.session.refresh(user)
    with app.test_request_context(method="POST"):
        seen.append(db.session.scalars(sa.select(User.name).order_by(User.id)).all())
        seen.append(db.session.execute(sa.text("SELECT count(*) FROM post")).scalar())
        db.session.execute(sa.delete(Post))
        db.session.rollback()
        page = db.paginate(sa.select(Post).order_by(Post.id), per_page=1)
        seen.append((page.total, len(page.items)))
        db.session.delete(db.session.scalars(sa.select(Event)).one())
        db.session.commit()
        seen.append(db.session.scalar(sa.select(sa.func.count(Event.id))))
    with app.app_context():
        db.drop_all()
        for engine in db.engines.values():
            engine.dispose()
    return log, seen


def test_sql_is_upstreams_on_sqlite(tmp_path: Path) -> None:
    """Without replicas, SQL, parameters and results equal Flask-SQLAlchemy's, on SQLite."""
    results = [
        scenario(extension, f"sqlite:///{tmp_path}/{name}.db", f"sqlite:///{tmp_path}/{name}2.db")
        for name, extension in (("upstream", SQLAlchemy), ("ours", CommonDB))
    ]
    (upstream, upstream_seen), (ours, ours_seen) = results
    assert ours == upstream
    assert ours_seen == upstream_seen
    assert len(ours) > 20


def test_sql_is_upstreams_on_mariadb(mariadb_database: Database[MariaDBCluster]) -> None:
    """Without replicas, SQL, parameters and results equal Flask-SQLAlchemy's, on MariaDB."""
    url = mariadb_database.primary_url
    upstream, upstream_seen = scenario(SQLAlchemy, url, url)
    ours, ours_seen = scenario(CommonDB, url, url)
    assert ours == upstream
    assert ours_seen == upstream_seen


def test_nothing_is_routed_without_replicas(tmp_path: Path) -> None:
    """Without replicas no routing is decided, so none is signalled."""
    seen: list[t.Any] = []

    def note(app: object, **values: t.Any) -> None:
        seen.append(values)

    with routed.connected_to(note):
        scenario(CommonDB, f"sqlite:///{tmp_path}/a.db", f"sqlite:///{tmp_path}/b.db")
    assert seen == []


def test_dataclass_base() -> None:
    """A declarative base that is a dataclass keeps its class arguments, and stays what it was."""

    class Base(so.MappedAsDataclass, so.DeclarativeBase, kw_only=True, repr=False):
        pass

    before = dict(vars(Base))
    db = CommonDB(model_class=Base)

    class User(db.Model):  # type: ignore[name-defined, misc]
        id: so.Mapped[int] = so.mapped_column(primary_key=True, init=False)
        name: so.Mapped[str] = so.mapped_column(sa.String(20), default="nobody")
        age: so.Mapped[int] = so.mapped_column()

    assert dict(vars(Base)) == before
    assert User(age=3).name == "nobody"  # possible with kw_only alone
    with pytest.raises(TypeError, match="positional"):
        User("first", 3)
    assert "age=3" not in repr(User(age=3))


def test_two_extensions_from_one_dataclass_base() -> None:
    """Two extensions may be made from the same dataclass base, each with models of its own."""

    class Base(so.MappedAsDataclass, so.DeclarativeBase):
        pass

    for _ in range(2):
        db = CommonDB(model_class=Base)
        assert issubclass(db.Model, so.MappedAsDataclass)


def test_replica_engines(tmp_path: Path) -> None:
    """The engines of replicas are to be had by bind key, for the binds that have some."""
    url = f"sqlite:///{tmp_path}/a.db"
    app = Flask("engines")
    app.config["SQLALCHEMY_BINDS"] = {"a": {"url": url, "replicas": [url, url]}, "b": url}
    db = CommonDB(app)
    with app.app_context():
        assert db.replica_engines.keys() == {"a"}
        assert len(db.replica_engines["a"]) == 2
        assert not set(db.replica_engines["a"]) & set(db.engines.values())


def test_repr(tmp_path: Path) -> None:
    """``repr(db)`` names the servers without user and password, also without a default bind."""
    app = Flask("repr")
    app.config["SQLALCHEMY_BINDS"] = {"a": f"sqlite:///{tmp_path}/a.db"}
    db = CommonDB(app)
    assert repr(db) == "<CommonDB>"
    with app.app_context():
        assert repr(db) == "<CommonDB a.db>"


def test_connection_in_the_place_of_an_engine(tmp_path: Path) -> None:
    """The recipe of test suites works: an outer transaction, and a session bound to it."""
    app = Flask("recipe")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/a.db"
    db = CommonDB(app)
    with app.app_context():
        sessions = db.sessions
        engine = db.engine
        connection = engine.connect()
        outer = connection.begin()
        t.cast(t.Any, db.engines)[None] = connection
        options = {"bind": connection, "join_transaction_mode": "create_savepoint"}
        db.session = db._make_scoped_session(options)
        assert repr(db) == "<CommonDB a.db>"
        assert db.sessions is sessions
        db.session.execute(sa.text("CREATE TABLE made (id INTEGER)"))
        db.session.commit()
        assert db.session.execute(sa.text("SELECT * FROM made")).all() == []
        db.session.remove()
        outer.rollback()
        connection.close()
        with engine.connect() as fresh:
            assert not sa.inspect(fresh).has_table("made")


def test_init_app_again(tmp_path: Path) -> None:
    """An app that is initialized anew has new engines, once, and the old ones are disposed."""
    url = f"sqlite:///{tmp_path}/a.db"
    app = Flask("again")
    app.config.update(SQLALCHEMY_DATABASE_URI=url, COMMONDB_REPLICAS=[url])
    db = CommonDB(app)
    with app.app_context():
        old = [db.engine, *db.router.replicas]
        with old[1].connect():
            pass
        assert t.cast(sa.QueuePool, old[1].pool).checkedin() == 1
    teardown = app.do_teardown_appcontext
    with pytest.raises(RuntimeError, match="already been registered"):
        db.init_app(app)
    with app.app_context():
        assert [db.engine, *db.router.replicas] == old
    del app.extensions["sqlalchemy"]
    db.init_app(app)
    assert app.do_teardown_appcontext == teardown
    with app.app_context():
        assert not set(old) & {db.engine, *db.router.replicas}
        assert t.cast(sa.QueuePool, old[1].pool).checkedin() == 0


def test_subclass_of_the_user(tmp_path: Path) -> None:
    """A subclass with an ``__init__`` and a ``__getattr__`` of its own works."""

    class Mine(CommonDB):
        def __init__(self, *args: t.Any, **kwargs: t.Any) -> None:
            self.mine = True
            super().__init__(*args, **kwargs)

        def __getattr__(self, name: str) -> t.Any:
            if name == "magic":
                return 42
            return super().__getattr__(name)

    app = Flask("subclass")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/a.db"
    db: t.Any = Mine(app)
    assert (db.mine, db.magic) == (True, 42)
    assert db.Integer is sa.Integer
    with app.app_context():
        assert db.session.scalar(sa.text("SELECT 1")) == 1


def test_arguments_are_not_changed(tmp_path: Path) -> None:
    """Nothing that the caller hands in is written to."""
    session_options: dict[str, t.Any] = {"expire_on_commit": False}
    url = f"sqlite:///{tmp_path}/a.db"
    binds = {"a": {"url": url, "replicas": [{"url": url, "weight": 2}]}}
    app = Flask("arguments")
    app.config["SQLALCHEMY_BINDS"] = binds
    CommonDB(app, session_options=session_options)
    assert session_options == {"expire_on_commit": False}
    assert binds == {"a": {"url": url, "replicas": [{"url": url, "weight": 2}]}}


def test_replica_option_that_does_not_exist(tmp_path: Path) -> None:
    """A misspelt engine option of a replica is a ConfigError that names its place and the bind."""
    from flask_commondb import ConfigError

    url = f"sqlite:///{tmp_path}/a.db"
    app = Flask("option")
    app.config["SQLALCHEMY_BINDS"] = {"a": {"url": url, "replicas": [{"url": url, "pool_siez": 2}]}}
    db = CommonDB()
    with pytest.raises(ConfigError, match=r"BINDS\['a'\]\['replicas'\]\[0\]: 'pool_siez'"):
        db.init_app(app)
    app.config["SQLALCHEMY_BINDS"] = {"a": url}
    db.init_app(app)


def test_package_of_its_own(tmp_path: Path) -> None:
    """Flask-Migrate, admin tools and the shell find the extension where upstream puts it."""
    app = Flask("shell")
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/a.db"
    db = CommonDB(app)
    assert app.extensions["sqlalchemy"] is db
    assert isinstance(db, SQLAlchemy)
    with app.app_context():
        assert app.make_shell_context()["db"] is db
