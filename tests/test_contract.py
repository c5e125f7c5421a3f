"""What we rely on in Flask-SQLAlchemy, SQLAlchemy, Flask and drivers, beyond what they promise.

When one of these fails with a new version of a library, the package has to follow; when all pass,
what it builds on is as it was.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import inspect
import io
import socket
import struct
import threading
import time
import typing as t
import weakref
from pathlib import Path

import flask_sqlalchemy.record_queries
import flask_sqlalchemy.session
import pymysql
import pymysql.connections
import pymysql.cursors
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from pymysql.constants import COMMAND
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.engine.interfaces import ExecuteStyle
from sqlalchemy.engine.result import IteratorResult
from sqlalchemy.engine.result import SimpleResultMetaData
from sqlalchemy.orm.session import SessionTransactionOrigin
from sqlalchemy.sql import visitors

from flask_commondb import CommonDB
from flask_commondb import pools
from flask_commondb.dialects.pymysql import connection_class
from flask_commondb.options import PoolSettings

from .drivers import skip_or_fail

#: Flask's main and minor version.
FLASK = tuple(map(int, importlib.metadata.version("flask").split(".")[:2]))

#: The private parts that are used have no types.
DRIVER: t.Any = pymysql.connections.Connection


class Base(so.DeclarativeBase):
    """The models of this module."""


class Author(Base):
    __tablename__ = "author"
    id: so.Mapped[int] = so.mapped_column(primary_key=True)
    name: so.Mapped[str]
    books: so.Mapped[list[Book]] = so.relationship()


class Book(Base):
    __tablename__ = "book"
    id: so.Mapped[int] = so.mapped_column(primary_key=True)
    author_id: so.Mapped[int] = so.mapped_column(sa.ForeignKey("author.id"))


AUTHORS = t.cast(sa.Table, Author.__table__)


# --- Flask-SQLAlchemy --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (SQLAlchemy.init_app, "self, app"),
        (SQLAlchemy._make_scoped_session, "self, options"),
        (SQLAlchemy._make_session_factory, "self, options"),
        (SQLAlchemy._make_engine, "self, bind_key, options, app"),
        (SQLAlchemy._make_declarative_base, "self, model_class, disable_autonaming=False"),
        (SQLAlchemy._teardown_session, "self, exc"),
        (SQLAlchemy._apply_driver_defaults, "self, options, app"),
        (SQLAlchemy._make_metadata, "self, bind_key"),
        (
            SQLAlchemy.__init__,
            "self, app=None, *, metadata=None, session_options=None,"
            " query_class=<class 'flask_sqlalchemy.query.Query'>,"
            " model_class=<class 'flask_sqlalchemy.model.Model'>, engine_options=None,"
            " add_models_to_shell=True, disable_autonaming=False",
        ),
        (flask_sqlalchemy.session.Session.__init__, "self, db, **kwargs"),
        (
            flask_sqlalchemy.session.Session.get_bind,
            "self, mapper=None, clause=None, bind=None, **kwargs",
        ),
        (flask_sqlalchemy.record_queries._listen, "engine"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_upstream_signatures(function: t.Callable[..., t.Any], parameters: str) -> None:
    """What we override or call of Flask-SQLAlchemy takes the parameters that we pass on."""
    assert signature_of(function) == parameters


@pytest.mark.parametrize(
    "name",
    [
        "__init__",
        "_apply_driver_defaults",
        "_make_engine",
        "_make_scoped_session",
        "_make_session_factory",
        "_teardown_session",
        "init_app",
    ],
)
def test_our_signatures(name: str) -> None:
    """What we override can be called, and overridden again, as in Flask-SQLAlchemy."""
    assert signature_of(getattr(CommonDB, name)) == signature_of(getattr(SQLAlchemy, name))


@pytest.mark.parametrize("extension_class", [SQLAlchemy, CommonDB])
def test_make_engine_is_called_positionally(extension_class: type[SQLAlchemy]) -> None:
    """``_make_engine`` is called with key, options and app by position, in ``init_app``."""
    calls: list[tuple[tuple[t.Any, ...], dict[str, t.Any]]] = []

    class Recording(extension_class):  # type: ignore[valid-type, misc]
        def _make_engine(self, *args: t.Any, **kwargs: t.Any) -> sa.Engine:
            calls.append((args, kwargs))
            return t.cast(sa.Engine, super()._make_engine(*args, **kwargs))

    flask_app = Flask("recording")
    flask_app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    flask_app.config["SQLALCHEMY_BINDS"] = {"other": {"url": "sqlite://", "echo": False}}
    Recording(flask_app)
    assert [(args[0], args[1]["url"], args[2:], kwargs) for args, kwargs in calls] == [
        ("other", "sqlite://", (flask_app,), {}),
        (None, "sqlite://", (flask_app,), {}),
    ]


@pytest.mark.parametrize("extension_class", [SQLAlchemy, CommonDB])
def test_order_of_the_constructor(extension_class: type[SQLAlchemy]) -> None:
    """The constructor calls ``_make_scoped_session`` first, and ``init_app`` last."""
    calls: list[tuple[str, bool]] = []

    class Recording(extension_class):  # type: ignore[valid-type, misc]
        def __getattribute__(self, name: str) -> t.Any:
            if name.startswith("_make_") or name == "init_app":
                ready = "_app_engines" in object.__getattribute__(self, "__dict__")
                calls.append((name, ready))
            return super().__getattribute__(name)

    flask_app = Flask("recording")
    flask_app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    Recording(flask_app)
    assert [call for call in calls if call[0] != "_make_metadata"] == [
        ("_make_scoped_session", False),
        ("_make_session_factory", False),
        ("_make_table_class", False),
        ("_make_declarative_base", False),
        ("init_app", True),
        ("_make_engine", True),
    ]


def test_attributes_of_upstream() -> None:
    """``_engine_options`` holds the constructor's engine options; engines exist after init_app."""
    flask_app = Flask("attributes")
    flask_app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    db = SQLAlchemy(flask_app, engine_options={"echo": False})
    assert db._engine_options == {"echo": False}
    assert flask_app.extensions["sqlalchemy"] is db
    assert list(db._app_engines[flask_app]) == [None]
    assert flask_app.teardown_appcontext_funcs == [db._teardown_session]


def test_metadata_knows_its_bind() -> None:
    """Each metadata carries its bind key in ``info``: it is how a table is known to be owned."""
    flask_app = Flask("metadata")
    flask_app.config["SQLALCHEMY_BINDS"] = {None: "sqlite://", "other": "sqlite://"}
    db = SQLAlchemy(flask_app)
    assert {key: metadata.info for key, metadata in db.metadatas.items()} == {
        None: {"bind_key": None},
        "other": {"bind_key": "other"},
    }


# --- SQLAlchemy --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            so.Session.get_bind,
            "self, mapper=None, *, clause=None, bind=None, _sa_skip_events=None,"
            " _sa_skip_for_implicit_returning=False, **kw",
        ),
        (so.Session._connection_for_bind, "self, engine, execution_options=None, **kw"),
        (so.Session._autobegin_t, "self, begin=False"),
        (
            so.Session._identity_lookup,
            "self, mapper, primary_key_identity, identity_token=None,"
            " passive=symbol('PASSIVE_OFF'), lazy_loaded_from=None,"
            " execution_options=immutabledict({}), bind_arguments=None",
        ),
        (so.Session.connection, "self, bind_arguments=None, execution_options=None"),
        (so.scoped_session.__init__, "self, session_factory, scopefunc=None"),
        (DefaultDialect.connect, "self, *cargs, **cparams"),
        (DefaultDialect.do_commit, "self, dbapi_connection"),
        (DefaultDialect.do_rollback, "self, dbapi_connection"),
        (DefaultDialect.do_ping, "self, dbapi_connection"),
        (sa.Engine.dispose, "self, close=True"),
        (visitors.iterate, "obj, opts=immutabledict({})"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_sqlalchemy_signatures(function: t.Callable[..., t.Any], parameters: str) -> None:
    """What we override or call of SQLAlchemy takes the parameters that we pass on."""
    assert signature_of(function) == parameters


class RecordingSession(so.Session):
    """Notes how SQLAlchemy asks for an engine and for a connection."""

    calls: list[t.Any]

    def get_bind(self, mapper: t.Any = None, **kwargs: t.Any) -> t.Any:
        self.calls.append(("get_bind", mapper is not None, sorted(kwargs)))
        return super().get_bind(mapper, **kwargs)

    def _connection_for_bind(
        self, engine: t.Any, execution_options: t.Any = None, **kwargs: t.Any
    ) -> sa.Connection:
        self.calls.append(("connection", isinstance(engine, sa.Engine), sorted(kwargs)))
        return super()._connection_for_bind(engine, execution_options, **kwargs)


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda s: s.scalars(sa.select(Author)).all(), [("get_bind", True, ["clause"])]),
        (lambda s: s.query(Author).all(), [("get_bind", True, ["clause"])]),
        (lambda s: s.query(Author).count(), [("get_bind", True, ["clause"])]),
        (lambda s: s.get(Author, 7), [("get_bind", True, ["clause"])]),
        (lambda s: s.execute(sa.select(AUTHORS)), [("get_bind", False, ["clause"])]),
        (lambda s: s.execute(sa.text("SELECT 1")), [("get_bind", False, ["clause"])]),
        (lambda s: s.execute(sa.update(Author).values(name="x")), [("get_bind", True, ["clause"])]),
        (lambda s: s.execute(sa.delete(AUTHORS)), [("get_bind", False, ["clause"])]),
        (lambda s: s.connection(), [("get_bind", False, [])]),
        (lambda s: s.connection({"mapper": Author}), [("get_bind", True, [])]),
    ],
)
def test_how_an_engine_is_asked_for(
    session: RecordingSession, work: t.Callable[[so.Session], t.Any], expected: list[t.Any]
) -> None:
    """A statement reaches ``get_bind`` as ``clause``, and its engine ``_connection_for_bind``."""
    work(session)
    assert session.calls == [*expected, ("connection", True, [])]


def test_how_a_flush_asks(session: RecordingSession) -> None:
    """A flush asks ``get_bind`` with mappers only, while ``_flushing`` is true."""
    assert session._flushing is False
    seen: list[bool] = []

    @sa.event.listens_for(session, "after_begin")
    def after_begin(session: so.Session, *_: t.Any) -> None:
        seen.append(session._flushing)

    session.add(Author(name="x"))
    session.flush()
    assert session.calls
    assert set(map(str, session.calls)) == {str(("get_bind", True, []))}
    assert seen == [True]


def test_autobegin(session: RecordingSession) -> None:
    """``_autobegin_t`` begins what a first statement would begin, and nothing more."""
    assert session.get_transaction() is None
    transaction = session._autobegin_t()
    assert session.get_transaction() is transaction
    assert transaction.origin is SessionTransactionOrigin.AUTOBEGIN
    assert session._autobegin_t() is transaction
    assert session.calls == []


def test_origin_of_a_transaction(session: RecordingSession) -> None:
    """``SessionTransaction.origin`` tells who has begun it, and ``parent`` what it stands in."""
    session.execute(sa.text("SELECT 1"))
    assert transaction_of(session).origin is SessionTransactionOrigin.AUTOBEGIN
    session.rollback()
    with session.begin() as outer:
        assert outer.origin is SessionTransactionOrigin.BEGIN
        assert outer.parent is None
        with session.begin_nested() as nested:
            assert nested.origin is SessionTransactionOrigin.BEGIN_NESTED
            assert nested.parent is outer


def test_connections_of_a_transaction(engine: sa.Engine) -> None:
    """Where a transaction keeps what it will commit: under the connection, and under its engine."""
    with contextlib.closing(so.Session(engine)) as session:
        connection = session.connection()
        transaction: t.Any = transaction_of(session)
        entry = (connection, connection.get_transaction(), True, True)
        assert transaction._connections == {connection: entry, connection.engine: entry}


@pytest.mark.parametrize("end", ["commit", "rollback", "close"])
def test_transactions_end_where_they_are_kept(engine: sa.Engine, end: str) -> None:
    """A commit, a rollback and a close go, once, to what stands in a transaction's entries."""
    seen: list[str] = []

    class Recorder:
        def __init__(self, begun: t.Any) -> None:
            self.begun = begun

        def __getattr__(self, name: str) -> t.Any:
            seen.append(name)
            return getattr(self.begun, name)

    with contextlib.closing(so.Session(engine)) as session:
        connection = session.connection()
        recorder = Recorder(connection.get_transaction())
        entries = t.cast(t.Any, transaction_of(session))._connections
        entries.update(dict.fromkeys(entries, (connection, recorder, True, True)))
        getattr(session, end)()
    assert [name for name in seen if name != "is_active"] == [end]


def test_every_execution_is_seen(engine: sa.Engine) -> None:
    """All ways to execute in a session come through ``_execute_internal``, with these keywords."""
    seen: list[set[str]] = []

    class Session(so.Session):
        def _execute_internal(self, statement: t.Any, params: t.Any = None, **more: t.Any) -> t.Any:
            seen.append(set(more))
            return super()._execute_internal(statement, params, **more)

    with contextlib.closing(Session(engine)) as session:
        session.execute(sa.select(1))
        session.scalars(sa.select(1))
        session.scalar(sa.select(1))
        session.query(Author).all()
        session.get(Author, 1)
    assert len(seen) == 5
    assert all({"bind_arguments", "execution_options"} & names for names in seen)


@pytest.mark.parametrize("load", [so.lazyload, so.selectinload, so.subqueryload])
def test_tokens_of_what_is_loaded(engine: sa.Engine, load: t.Callable[..., t.Any]) -> None:
    """What is loaded for an object or a statement tells where its identity token is."""
    tokens: list[t.Any] = []

    def note(state: so.ORMExecuteState) -> None:
        options: t.Any = state.load_options
        tokens.append(
            (
                getattr(state.lazy_loaded_from, "identity_token", None),
                options._identity_token,
                getattr(options._sa_top_level_orm_context, "identity_token", None),
            )
        )

    with engine.begin() as connection:
        connection.execute(sa.insert(AUTHORS).values(id=1, name="first"))
    with contextlib.closing(so.Session(engine)) as session:
        sa.event.listen(session, "do_orm_execute", note)
        statement = sa.select(Author).options(load(Author.books))
        author = session.scalars(statement, execution_options={"identity_token": "x"}).one()
        assert sa.inspect(author).identity_token == "x"
        assert author.books == []
    assert tokens[0] == (None, "x", None)
    assert any("x" in token for token in tokens[1:])
    with engine.begin() as connection:
        connection.execute(sa.delete(AUTHORS))


def test_connection_of_an_instance(engine: sa.Engine) -> None:
    """While ``connection_callable`` is set, a flush asks it for each object's connection."""
    with contextlib.closing(so.Session(engine)) as session:
        asked: list[t.Any] = []

        def connection_of(mapper: t.Any = None, instance: t.Any = None) -> sa.Connection:
            asked.append(instance)
            return session.connection()

        author = Author(id=1, name="x")
        session.add(author)
        session.connection_callable = t.cast(t.Any, connection_of)
        session.flush()
        assert asked == [author]


def test_a_queue_pool(engine: sa.Engine) -> None:
    """A pool hands out what ``_do_get`` returns, and is made anew from its class by dispose()."""

    class Pool(sa.QueuePool):
        taken = 0

        def _do_get(self) -> t.Any:
            Pool.taken += 1
            return super()._do_get()

    own = sa.create_engine("sqlite://", poolclass=sa.QueuePool, pool_size=2, max_overflow=1)
    own.pool.__class__ = Pool
    for _ in range(2):
        with own.connect():
            pool = t.cast(Pool, own.pool)
            assert (pool.checkedout(), pool.size(), pool._max_overflow) == (1, 2, 1)
        own.dispose()
    assert Pool.taken == 2


@pytest.mark.parametrize("how", ["class", "sessionmaker", "type"])
def test_events_reach_subclasses(engine: sa.Engine, how: str) -> None:
    """Listeners on a session class are heard by the classes that are derived from it."""

    class Listened(so.Session):
        pass

    seen: list[str] = []
    # Before and after the subclass is made.
    sa.event.listen(Listened, "after_begin", lambda *args: seen.append("begin"))
    factories: dict[str, t.Callable[[], so.Session]] = {
        "class": lambda: Listened(engine),
        "sessionmaker": so.sessionmaker(engine, class_=Listened),
        "type": lambda: t.cast(so.Session, type("Mixed", (Listened, so.Session), {})(engine)),
    }
    with contextlib.closing(factories[how]()) as session:
        session.execute(sa.text("SELECT 1"))
    sa.event.listen(Listened, "after_transaction_end", lambda *args: seen.append("end"))
    with contextlib.closing(factories[how]()) as session:
        session.execute(sa.text("SELECT 1"))
    assert seen == ["begin", "begin", "end"]


def test_cache_key() -> None:
    """The cache key is hashable, the same for one shape with other values, and else another."""
    keys = [
        cache_key_of(statement)
        for statement in (
            sa.select(Author).where(Author.id == 1),
            sa.select(Author).where(Author.id == 2),
            sa.select(Author).where(Author.name == "1"),
            sa.select(Author).where(Author.id == 1).with_for_update(),
            sa.select(Author).where(Author.id == 1).prefix_with("x"),
            sa.select(Author).where(sa.func.lower(Author.name) == "1"),
            sa.select(Author).where(sa.func.get_lock(Author.name) == "1"),
        )
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == len(keys) - 1


def test_no_cache_key() -> None:
    """A statement that cannot be cached has no key, instead of a wrong one."""
    values = sa.values(sa.column("x", sa.Integer), name="v").data([(1,)])
    assert sa.select(values)._generate_cache_key() is None


def test_dialect_methods_of_one_engine(engine: sa.Engine) -> None:
    """``connect``, ``do_commit`` and ``do_rollback`` set on one dialect object are what is used."""
    seen: list[str] = []
    dialect = t.cast(t.Any, engine.dialect)
    original = dialect.connect

    def connect(*args: t.Any, **kwargs: t.Any) -> t.Any:
        seen.append("connect")
        return original(*args, **kwargs)

    dialect.connect = connect
    dialect.do_commit = lambda dbapi_connection: seen.append("commit")
    dialect.do_rollback = lambda dbapi_connection: seen.append("rollback")
    engine.dispose()
    with engine.connect() as connection:
        seen.clear()  # its first connection ever has made SQLAlchemy look around
        connection.execute(sa.text("SELECT 1"))
        connection.commit()
        connection.execute(sa.text("SELECT 1"))
        connection.rollback()
        connection.execute(sa.text("SELECT 1"))
    assert seen == ["commit", "rollback", "rollback"]
    engine.dispose()
    engine.connect().close()
    assert seen[3:4] == ["connect"]


def test_where_a_pool_connects(pooled: sa.Engine) -> None:
    """The dialect connects, and the pool tells of it next, in the same thread. The engine's URL is
    for show. A connection that is softly invalidated is used to its end, and then replaced."""
    made: list[tuple[int, t.Any]] = []
    dialect = t.cast(t.Any, pooled.dialect)
    original = dialect.connect

    def connect(*args: t.Any, **kwargs: t.Any) -> t.Any:
        made.append((threading.get_ident(), original(*args, **kwargs)))
        return made[-1][1]

    def told(dbapi_connection: t.Any, entry: t.Any) -> None:
        assert made[-1] == (threading.get_ident(), dbapi_connection)

    sa.event.listen(pooled, "connect", told, insert=True)
    dialect.connect = connect
    pooled.url = sa.make_url("sqlite:////nowhere/else.db")
    for number in (1, 2):
        with pooled.connect() as connection:
            assert len(made) == number
            t.cast(t.Any, connection.connection)._connection_record.invalidate(soft=True)
            assert connection.scalar(sa.text("SELECT 1")) == 1


def test_silent_autocommit(engine: sa.Engine) -> None:
    """On AUTOCOMMIT too, the dialect is asked to commit and roll back: so we make it silent."""
    seen: list[str] = []
    autocommit = sa.create_engine(engine.url, isolation_level="AUTOCOMMIT")
    dialect = t.cast(t.Any, autocommit.dialect)
    autocommit.connect().close()
    dialect.do_commit = lambda dbapi_connection: seen.append("commit")
    dialect.do_rollback = lambda dbapi_connection: seen.append("rollback")
    with autocommit.connect() as connection:
        connection.execute(sa.text("SELECT 1"))
        connection.commit()
    autocommit.dispose()
    assert seen
    assert set(seen) <= {"commit", "rollback"}


def test_result_of_rows() -> None:
    """``IteratorResult`` makes a whole Result of names and tuples; closed, it refuses to be read.

    Whoever builds one needs nothing of a cursor or a connection.
    """
    keys, rows = ("id", "name"), [(1, "a"), (2, "b")]
    assert make_result(keys, rows).all() == rows
    assert make_result(keys, rows).mappings().all() == [
        {"id": 1, "name": "a"},
        {"id": 2, "name": "b"},
    ]
    assert make_result(keys, rows).scalars("name").all() == ["a", "b"]
    assert make_result(keys, rows[:1]).one().name == "a"
    assert list(make_result(keys, rows).keys()) == ["id", "name"]
    closed = make_result(keys, rows)
    closed.close()
    with pytest.raises(sa.exc.ResourceClosedError, match="closed"):
        closed.all()


def test_engines_are_keys(engine: sa.Engine) -> None:
    """Engines and connections can be keys of weak dictionaries, each only equal to itself."""
    other = sa.create_engine(engine.url)
    keyed = weakref.WeakKeyDictionary({engine: 1, other: 2})
    assert sorted(keyed.values()) == [1, 2]
    del other
    gc.collect()
    assert list(keyed.values()) == [1]
    with engine.connect() as connection, engine.connect() as second:
        connections = weakref.WeakSet([connection])
        assert connection in connections
        assert second not in connections


@pytest.fixture
def pooled(tmp_path: Path) -> t.Iterator[sa.Engine]:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/pooled.db")
    yield engine
    engine.dispose()


def test_connection_in_the_place_of_another(pooled: sa.Engine) -> None:
    """What a checkout does with a dead connection can be done for one that is checked out."""
    with pooled.connect() as connection:
        proxied: t.Any = connection.connection
        entry = proxied._connection_record
        before = proxied.dbapi_connection
        assert list(entry.finalize_callback) == []
        entry.invalidate(RuntimeError("lost"))
        assert entry.dbapi_connection is None
        seen: list[object] = []
        sa.event.listen(pooled, "checkout", lambda *event: seen.append(event))
        proxied.dbapi_connection = entry.get_connection()
        proxied._pool.dispatch.checkout(proxied.dbapi_connection, entry, proxied)
        assert seen == [(proxied.dbapi_connection, entry, proxied)]
        assert proxied.dbapi_connection is not before
        assert connection.scalar(sa.text("SELECT 1")) == 1
    assert entry.dbapi_connection is not None


def test_connection_that_cannot_be_replaced(pooled: sa.Engine) -> None:
    """One that is given back while it is out is invalidated for who has it."""
    with pooled.connect() as connection:
        connection.scalar(sa.text("SELECT 1"))
        proxied: t.Any = connection.connection
        proxied._connection_record.invalidate()
        proxied.dbapi_connection = None
        proxied.close()
        connection.invalidate(RuntimeError("lost"))
        assert connection.invalidated
        connection.rollback()
        assert connection.scalar(sa.text("SELECT 1")) == 1


def test_cursor_of_a_context(pooled: sa.Engine) -> None:
    """A statement's context makes another cursor, and its result is read from the one it has."""
    execute = pooled.dialect.do_execute

    def do_execute(cursor: t.Any, statement: str, parameters: t.Any, context: t.Any) -> None:
        assert context.cursor is cursor
        assert context.statement == statement
        context.cursor = context.create_cursor()
        execute(context.cursor, statement, parameters, context)

    pooled.dialect.do_execute = do_execute  # type: ignore[method-assign, assignment]
    with pooled.connect() as connection:
        result = connection.execute(sa.select(sa.literal(7)))
        assert result.context.execute_style is not ExecuteStyle.INSERTMANYVALUES
        assert result.context.root_connection is connection
        assert result.scalar() == 7


def test_age_of_a_pool(pooled: sa.Engine) -> None:
    """How long a connection lives is looked up when it is taken, and a new pool inherits it."""
    pool: t.Any = pooled.pool
    assert pool._pre_ping is False
    pool._recycle = 40
    pooled.dispose()
    assert t.cast(t.Any, pooled.pool)._recycle == 40


def test_clean_session(pooled: sa.Engine) -> None:
    """A session knows, without a flush, whether it has something to write."""
    with so.Session(pooled) as session:
        assert session._is_clean()
        session.add(Author())
        assert not session._is_clean()


# --- Flask -------------------------------------------------------------------------------------


def test_teardown_is_looked_up_on_the_app() -> None:
    """``do_teardown_appcontext`` is found on the app object itself, where we have put ours."""
    flask_app = Flask("teardown")
    seen: list[str] = []
    flask_app.do_teardown_appcontext = (  # type: ignore[method-assign]
        lambda *args, **kwargs: seen.append("torn down")
    )
    with flask_app.app_context():
        assert seen == []
    assert seen == ["torn down"]
    flask_app.test_client().get("/")
    assert seen == ["torn down"] * 2


def test_first_raising_teardown() -> None:
    """Before 3.2 Flask stops at the first teardown that raises; since then it calls all of them."""
    flask_app = Flask("teardown")
    seen = []

    @flask_app.teardown_appcontext
    def called_last(exc: BaseException | None) -> None:
        seen.append("last")

    @flask_app.teardown_appcontext
    def called_first(exc: BaseException | None) -> None:
        seen.append("first")
        raise OSError("raised while tearing down")

    with pytest.raises(Exception, match="tearing down"), flask_app.app_context():
        pass
    assert seen == (["first"] if FLASK < (3, 2) else ["first", "last"])


def test_closed_behind_a_raising_teardown() -> None:
    """On either Flask, sessions are closed also when another teardown raises before ours."""
    flask_app = Flask("teardown")
    flask_app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    db = CommonDB(flask_app)

    @flask_app.teardown_appcontext
    def called_first(exc: BaseException | None) -> None:
        raise OSError("raised while tearing down")

    with pytest.raises(Exception, match="tearing down"), flask_app.app_context():
        session = db.session()
        session.execute(sa.text("SELECT 1"))
        assert session.in_transaction()
    assert not session.in_transaction()


def test_how_an_engine_connects() -> None:
    """The pool's function for it is SQLAlchemy's own, and knows the driver's arguments."""
    url = "mysql+pymysql://user@h/app?charset=utf8mb4"
    arguments = {"port": 7, "charset": "latin1"}
    engine = sa.create_engine(url, connect_args=arguments)
    connect = engine.pool._creator
    assert connect.__module__ == "sqlalchemy.engine.create"
    told = inspect.getclosurevars(connect).nonlocals["cparams"]
    assert {"host": "h", "user": "user", "database": "app", **arguments}.items() <= told.items()
    engine.dispose()
    assert engine.pool._creator is connect
    own = sa.create_engine(url, creator=pymysql.connect)
    assert t.cast(t.Any, own.pool)._creator is pymysql.connect
    assert len(t.cast(t.Any, engine.dialect.dispatch).do_connect) == 0
    sa.event.listen(engine, "do_connect", lambda *event: None)
    assert len(t.cast(t.Any, engine.dialect.dispatch).do_connect) == 1


# --- PyMySQL -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (DRIVER._execute_command, "self, command, sql"),
        (pymysql.connections.Connection.connect, "self, sock=None"),
        (pymysql.connections.Connection.commit, "self"),
        (pymysql.connections.Connection.rollback, "self"),
        (pymysql.connections.Connection.ping, "self, reconnect=True"),
        (pymysql.cursors.Cursor.__init__, "self, connection"),
        (pymysql.cursors.Cursor.execute, "self, query, args=None"),
        (pymysql.cursors.Cursor.nextset, "self"),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_pymysql_signatures(function: t.Callable[..., t.Any], parameters: str) -> None:
    """What we override of PyMySQL takes the parameters that we pass on."""
    assert signature_of(function).replace("reconnect=False", "reconnect=True") == parameters


@pytest.mark.parametrize(
    ("work", "commands"),
    [
        (lambda c: c.query("DO 1"), [(COMMAND.COM_QUERY, b"DO 1")]),
        (lambda c: c.commit(), [(COMMAND.COM_QUERY, b"COMMIT")]),
        (lambda c: c.rollback(), [(COMMAND.COM_QUERY, b"ROLLBACK")]),
        (lambda c: c.begin(), [(COMMAND.COM_QUERY, b"BEGIN")]),
        (lambda c: c.autocommit(True), [(COMMAND.COM_QUERY, b"SET AUTOCOMMIT = 1")]),
        (lambda c: c.select_db("app"), [(COMMAND.COM_INIT_DB, b"app")]),
        (lambda c: c.ping(reconnect=False), [(COMMAND.COM_PING, b"")]),
        (lambda c: c.set_character_set("latin1"), [(COMMAND.COM_QUERY, b"SET NAMES latin1")]),
        (lambda c: c.cursor().execute("DO %s", (1,)), [(COMMAND.COM_QUERY, b"DO 1")]),
        (lambda c: c.cursor().executemany("DO %s", [(1,), (2,)]), [(3, b"DO 1"), (3, b"DO 2")]),
    ],
)
def test_one_gate(
    server: Server, work: t.Callable[[t.Any], t.Any], commands: list[tuple[int, bytes]]
) -> None:
    """Whatever a connection sends once it is made goes through ``_execute_command``."""
    gate: list[int] = []

    class Watched(DRIVER):  # type: ignore[misc]
        def _execute_command(self, command: int, sql: t.Any) -> None:
            gate.append(command)
            super()._execute_command(command, sql)

    connection = Watched(**server.address)
    server.commands.clear()
    gate.clear()
    work(connection)
    assert server.commands == commands
    assert gate == [command for command, _ in commands]
    connection.close()


def test_parts_of_a_connection(server: Server) -> None:
    """``_sock``, ``server_status`` and ``cursorclass`` are what we take them for."""
    connection: t.Any = pymysql.connect(**server.address)
    assert connection._sock.fileno() > 0
    assert connection.cursorclass is pymysql.cursors.Cursor
    assert connection.server_status == 0
    server.status = 1
    connection.query("BEGIN")
    assert connection.server_status == 1

    class Own(pymysql.cursors.Cursor):
        pass

    connection.cursorclass = Own
    assert type(connection.cursor()) is Own
    connection.close()
    assert connection._sock is None


def test_all_is_read_through_one_file(server: Server) -> None:
    """What a connection reads comes out of ``_rfile``, which ``connect()`` has made."""
    connection: t.Any = DRIVER(**server.address)
    reads: list[int] = []

    class Watched(io.RawIOBase):
        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: t.Any) -> int:
            reads.append(self.sock.recv_into(buffer))
            return reads[-1]

    assert connection._rfile.peek is not None
    connection._rfile = io.BufferedReader(Watched(connection._sock))
    for work in (
        lambda: connection.query("DO 1"),
        connection.commit,
        lambda: connection.ping(reconnect=False),
        lambda: connection.select_db("app"),
    ):
        work()
        assert reads == [11]  # an answer, read at once
        reads.clear()
    connection.close()


def test_time_runs_out_in_the_file(server: Server) -> None:
    """A ``TimeoutError`` that comes out of ``_rfile`` is a lost connection, and closes it."""
    connection: t.Any = DRIVER(**server.address)

    class Silent(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: t.Any) -> int:
            raise TimeoutError("nothing is said")

    connection._rfile = io.BufferedReader(Silent())
    with pytest.raises(pymysql.err.OperationalError, match="nothing is said") as caught:
        connection.query("DO 1")
    assert caught.value.args[0] == 2013
    assert connection._sock is None


def test_warning_count(server: Server) -> None:
    """A cursor knows how many warnings its statement has caused."""
    connection = pymysql.connect(**server.address)
    server.warnings = 3
    with connection.cursor() as cursor:
        cursor.execute("DO 1")
        assert t.cast(t.Any, cursor).warning_count == 3
    connection.close()


def test_read_timeout_is_looked_at_late(server: Server) -> None:
    """``_read_timeout`` limits the waiting for the greeting, and may be set after ``__init__``."""
    server.silent = True
    connection: t.Any = pymysql.connect(defer_connect=True, **server.address)
    connection._read_timeout = 0.1
    with pytest.raises(pymysql.err.OperationalError, match="timed out"):
        connection.connect()


def test_our_connection_gives_up(server: Server) -> None:
    """Our connection class gives up on a silent server after the time to connect, not later."""
    server.silent = True
    started = time.monotonic()
    connection = connection_class()(defer_connect=True, connect_timeout=0.2, **server.address)
    with pytest.raises(pymysql.err.OperationalError, match="timed out"):
        connection.connect()
    assert time.monotonic() - started < 5
    assert connection._read_timeout is None


@pytest.mark.parametrize(
    ("timeouts", "expected"),
    [({}, None), ({"read_timeout": 30}, 30), ({"connect_timeout": 5, "read_timeout": 7}, 7)],
)
def test_our_connection_keeps_read_timeout(
    server: Server, timeouts: dict[str, int], expected: int | None
) -> None:
    """Once connected, the time to connect does not limit a slow statement."""
    connection = connection_class()(**server.address, **timeouts)
    assert connection._read_timeout == expected
    connection.query("DO 1")
    assert connection._sock.gettimeout() == expected
    connection.close()


COMMIT = (COMMAND.COM_QUERY, b"COMMIT")
ROLLBACK = (COMMAND.COM_QUERY, b"ROLLBACK")
DO = (COMMAND.COM_QUERY, b"DO 1")
PING = (COMMAND.COM_PING, b"")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("rollback", [ROLLBACK]),
        ("commit", [COMMIT]),
        ("query commit", [DO, COMMIT]),
        ("query commit rollback", [DO, COMMIT]),
        ("query rollback rollback commit", [DO, ROLLBACK]),
        ("query commit query rollback", [DO, COMMIT, DO, ROLLBACK]),
        ("query commit ping rollback", [DO, COMMIT, PING]),
        ("query ping rollback", [DO, PING, ROLLBACK]),
        ("query commit select_db rollback", [DO, COMMIT, (COMMAND.COM_INIT_DB, b"app"), ROLLBACK]),
    ],
)
def test_our_connection_sends_no_idle_end(
    server: Server, words: str, expected: list[tuple[int, bytes]]
) -> None:
    """A COMMIT or ROLLBACK is sent exactly when something but a ping was sent since the last."""
    connection = connection_class()(**server.address)
    work: dict[str, t.Callable[[], t.Any]] = {
        "query": lambda: connection.query("DO 1"),
        "commit": connection.commit,
        "rollback": connection.rollback,
        "ping": lambda: connection.ping(reconnect=False),
        "select_db": lambda: connection.select_db("app"),
    }
    server.commands.clear()
    for word in words.split():
        work[word]()
    assert server.commands == expected
    connection.close()


@pytest.mark.parametrize("end", ["commit", "rollback"])
def test_our_connection_after_a_failed_end(server: Server, end: str) -> None:
    """A COMMIT or ROLLBACK that has failed has not ended anything: the next one is sent."""
    connection = connection_class()(**server.address)
    server.fail = True
    with pytest.raises(pymysql.err.OperationalError, match="told to fail"):
        getattr(connection, end)()
    server.fail = False
    server.commands.clear()
    connection.rollback()
    assert server.commands == [ROLLBACK]
    connection.close()


def test_our_connection_has_a_descriptor(server: Server) -> None:
    """``fileno()`` is the socket's, so that an idle connection can be looked at."""
    connection = connection_class()(**server.address)
    assert connection.fileno() == connection._sock.fileno()
    connection.close()


def test_our_connection_is_the_drivers() -> None:
    """Our class is made once, and is a PyMySQL connection to whoever asks."""
    assert connection_class() is connection_class()
    assert issubclass(connection_class(), pymysql.connections.Connection)


@pytest.mark.parametrize(
    ("url", "ours"),
    [("mysql+pymysql://h/app", True), ("mariadb+pymysql://h/app", True), ("sqlite://", False)],
)
def test_where_our_connection_is_used(url: str, ours: bool) -> None:
    """Engines of PyMySQL get our connection class; other drivers are left alone."""
    flask_app = Flask("drivers")
    flask_app.config["SQLALCHEMY_DATABASE_URI"] = url
    db = CommonDB(flask_app)
    with flask_app.app_context():
        connect = t.cast(t.Any, db.engine.dialect.connect)
        assert (isinstance(connect, type) and issubclass(connect, connection_class())) is ours


def test_user_module_is_left_alone() -> None:
    """An engine with a driver ``module`` of the user's own keeps it."""

    class Module:
        __name__ = "instrumented"
        paramstyle = "pyformat"

        def __getattr__(self, name: str) -> t.Any:
            return getattr(pymysql, name)

    engine = sa.create_engine("mysql+pymysql://h/app", module=Module())
    pools.prepare(engine, PoolSettings(), None, lambda: None)
    assert engine.dialect.connect == t.cast(t.Any, DefaultDialect).connect.__get__(engine.dialect)


# --- mysqlclient and psycopg -------------------------------------------------------------------


def test_mysqlclient_in_two_steps() -> None:
    """A statement can be sent, and its answer be read later."""
    connection_class = imported("MySQLdb.connections").Connection
    for name in ("send_query", "read_query_result", "fileno", "commit", "rollback"):
        assert callable(getattr(connection_class, name))


def test_psycopg_waits_in_one_place() -> None:
    """A connection's ``wait`` takes what is to be waited for; the rest can be left out."""
    _, gen, *more = inspect.signature(imported("psycopg").Connection.wait).parameters.values()
    assert gen.name == "gen"
    assert all(parameter.default is not parameter.empty for parameter in more)


def test_psycopg_waits_for_any_iterator() -> None:
    """What is waited for needs ``__next__`` and ``send`` only; its yields are one of three bits."""
    waiting = imported("psycopg.waiting")
    assert [int(wait) for wait in waiting.Wait] == [1, 2, 3]
    assert [int(getattr(waiting.Ready, name)) for name in ("R", "W", "RW")] == [1, 2, 3]
    said: list[int] = []

    class Work:
        def __next__(self) -> int:
            return 2

        def send(self, ready: int) -> int:
            said.append(int(ready))
            raise StopIteration("done")

    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert waiting.wait(Work(), ours.fileno()) == "done"
    assert said == [2]


@pytest.fixture
def engine() -> t.Iterator[sa.Engine]:
    engine = sa.create_engine(
        "sqlite://", poolclass=sa.StaticPool, connect_args={"check_same_thread": False}
    )
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def session(engine: sa.Engine) -> t.Iterator[RecordingSession]:
    with RecordingSession(engine) as session:
        session.calls = []
        yield session


@pytest.fixture
def server() -> t.Iterator[Server]:
    with contextlib.closing(Server()) as server:
        yield server


class Server:
    """Speaks just enough of the MySQL protocol: greets, lets everybody in, answers OK."""

    def __init__(self) -> None:
        self.commands: list[tuple[int, bytes]] = []
        self.status = 0
        self.warnings = 0
        self.silent = False
        self.fail = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._accepted: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> dict[str, t.Any]:
        return {"host": "127.0.0.1", "port": self._listener.getsockname()[1], "user": "u"}

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for accepted in self._accepted:
            accepted.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self._listener.accept()
                self._accepted.append(accepted)
                if self.silent:  # but not for ever, should the client wait so long
                    hang_up = threading.Timer(10, accepted.close)
                    hang_up.daemon = True
                    hang_up.start()
                else:
                    threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), client:
            capabilities = 0x000FA207  # protocol 4.1, secure connection, plugin, multi results
            greeting = b"\x0a8.0.0\0" + struct.pack("<I", 1) + b"12345678\0"
            greeting += struct.pack("<HBHH", capabilities & 0xFFFF, 45, 0, capabilities >> 16)
            greeting += b"\x15" + bytes(10) + b"123456789012\0" + b"mysql_native_password\0"
            self._send(client, 0, greeting)
            self._receive(client)
            self._send(client, 2, self._ok())
            while True:
                packet = self._receive(client)
                if packet[0] == COMMAND.COM_QUIT:
                    return
                self.commands.append((packet[0], packet[1:]))
                self._send(client, 1, self._error() if self.fail else self._ok())

    def _ok(self) -> bytes:
        return b"\0\0\0" + struct.pack("<HH", self.status, self.warnings)

    def _error(self) -> bytes:
        return b"\xff" + struct.pack("<H", 1205) + b"#HY000told to fail"

    def _send(self, client: socket.socket, number: int, payload: bytes) -> None:
        client.sendall(struct.pack("<I", len(payload))[:3] + bytes([number]) + payload)

    def _receive(self, client: socket.socket) -> bytes:
        (length,) = struct.unpack("<I", self._exactly(client, 4)[:3] + b"\0")
        return self._exactly(client, length)

    def _exactly(self, client: socket.socket, count: int) -> bytes:
        received = b""
        while len(received) < count:
            more = client.recv(count - len(received))
            if not more:
                raise EOFError
            received += more
        return received


def imported(name: str) -> t.Any:
    """A module of a driver that need not be installed everywhere."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        skip_or_fail(str(error))


def signature_of(function: t.Callable[..., t.Any]) -> str:
    """The parameters of a function with their defaults, without annotations."""
    signature = inspect.signature(function)
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(bare))[1:-1]


def transaction_of(session: so.Session) -> so.SessionTransaction:
    transaction = session.get_transaction()
    assert transaction is not None
    return transaction


def cache_key_of(statement: sa.ClauseElement) -> t.Hashable:
    cache_key = statement._generate_cache_key()
    assert cache_key is not None
    return cache_key.key


def make_result(keys: t.Sequence[str], rows: t.Sequence[t.Any]) -> t.Any:
    return IteratorResult(SimpleResultMetaData(keys), iter(rows))
