"""Sessions: made for a context, found again, closed whatever happens. Invariants I4, I5 and I9."""

from __future__ import annotations

import logging
import sqlite3
import threading
import typing as t

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask
from flask import g
from flask_sqlalchemy.session import Session as UpstreamSession

from flask_commondb import CommonDB
from flask_commondb import CommonDBError
from flask_commondb import NoContextError
from flask_commondb import UnknownBindError
from flask_commondb import WrongBindError
from flask_commondb.signals import session_close_failed

from .apps import Lab
from .apps import lab_with_orders

if t.TYPE_CHECKING:
    from pathlib import Path

    from .servers import Database
    from .servers import MariaDBCluster


@pytest.fixture
def lab(tmp_path: Path) -> t.Iterator[Lab]:
    """An app on SQLite with two binds and no replicas."""
    lab = lab_with_orders(tmp_path)
    yield lab
    lab.dispose()


@pytest.fixture
def on_mariadb(mariadb_database: Database[MariaDBCluster]) -> t.Iterator[Lab]:
    """An app on MariaDB with replicas and a second bind on the same primary."""
    url = mariadb_database.primary_url
    lab = Lab(url, mariadb_database.replica_urls, config={"SQLALCHEMY_BINDS": {"second": url}})
    with lab.app.app_context():
        lab.db.create_all()
    mariadb_database.sync()
    yield lab
    lab.dispose()


def order(lab: Lab, item: str) -> t.Any:
    return lab.Order(item=item)  # type: ignore[attr-defined]


# A session for each context -------------------------------------------------------------------


def test_one_session_for_a_context(lab: Lab) -> None:
    """A context has one session for each proxy; the next context has others."""
    with lab.app.app_context():
        first = lab.db.session()
        assert lab.db.session() is first
        assert lab.db.sessions["orders"]() is lab.db.sessions["orders"]()
        assert len({first, lab.db.sessions[None](), lab.db.sessions["orders"]()}) == 3
    with lab.app.app_context():
        assert lab.db.session() is not first


def test_nested_contexts(lab: Lab) -> None:
    """A context inside another has sessions of its own; leaving it leaves the outer ones open."""
    with lab.app.app_context():
        lab.db.session.add(lab.Post(title="outer"))
        lab.db.session.flush()
        outer = lab.db.session()
        with lab.app.app_context():
            assert lab.db.session() is not outer
            assert lab.titles() == []
        assert lab.db.session() is outer
        assert lab.titles() == ["outer"]


def test_no_context() -> None:
    """Without a context every way to a session is a RuntimeError that says what to do."""
    db = CommonDB()
    ways: list[t.Callable[[], object]] = [
        lambda: db.session.execute(sa.text("SELECT 1")),
        lambda: db.session(),
        lambda: db.sessions["orders"].commit(),
        lambda: db.session.remove(),
        lambda: db.callproc("p"),
        lambda: db.cursor().__enter__(),
        lambda: db.transaction().__enter__(),
    ]
    for way in ways:
        with pytest.raises(RuntimeError, match=r"with app\.app_context\(\)") as caught:
            way()
        assert isinstance(caught.value, NoContextError)
        assert isinstance(caught.value, CommonDBError)


def test_app_not_registered(lab: Lab) -> None:
    """In the context of an app that ``db`` does not know, the error asks about ``init_app``."""
    with Flask("other").app_context():
        for use in (lab.titles, lambda: lab.db.session.connection(), lambda: lab.db.sessions["x"]):
            with pytest.raises(RuntimeError, match="init_app"):
                use()


def test_unknown_bind(lab: Lab) -> None:
    """An unknown key names the known ones and the nearest, and is a KeyError, too."""
    with lab.app.app_context():
        with pytest.raises(UnknownBindError, match=r"'order' .*mean 'orders'\?.*'orders', None"):
            lab.db.sessions["order"]
        with pytest.raises(KeyError, match="'order'"):
            lab.db.cursor("order").__enter__()
        with pytest.raises(sa.exc.UnboundExecutionError, match="'order'"):
            lab.db.transaction("order").__enter__()
        assert set(lab.db.sessions) == {None, "orders"}
        assert len(lab.db.sessions) == 2


def test_a_proxy_may_be_kept(lab: Lab) -> None:
    """A proxy taken before any context stands for the session of the context it is used in."""
    orders = lab.db.sessions["orders"]
    with lab.app.app_context():
        orders.add(order(lab, "pen"))
        orders.commit()
        assert orders() is lab.db.sessions["orders"]()
    with lab.app.app_context():
        assert orders.scalar(sa.text('SELECT item FROM "order"')) == "pen"


def test_a_kept_proxy_of_an_unknown_bind(tmp_path: Path) -> None:
    """A misspelt key that was taken outside of a context is found out when it is used."""
    lab = Lab(f"sqlite:///{tmp_path}/a.db")
    misspelt = lab.db.sessions["typo"]
    with lab.app.app_context(), pytest.raises(UnknownBindError, match="'typo'"):
        misspelt.execute(sa.text("SELECT 1"))
    lab.dispose()


@pytest.mark.parametrize("more", [{}, {"other": "sqlite://"}], ids=["one bind", "two binds"])
def test_a_model_of_an_unknown_bind(tmp_path: Path, more: dict[str, str]) -> None:
    """In an app without its bind a model goes nowhere, neither as ORM nor as Core."""
    lab = Lab(f"sqlite:///{tmp_path}/a.db", config={"SQLALCHEMY_BINDS": more})

    class Lost(lab.db.Model):  # type: ignore[name-defined, misc]
        __bind_key__ = "lost"
        id: so.Mapped[int] = so.mapped_column(primary_key=True)

    for statement in (sa.select(Lost), sa.select(Lost.__table__), sa.insert(Lost)):
        with lab.app.app_context(), pytest.raises(UnknownBindError, match="'lost'"):
            lab.db.session.execute(t.cast(t.Any, statement))
    lab.dispose()


def test_two_apps_on_one_db(tmp_path: Path) -> None:
    """Each app has its own databases, sessions and roles, also with one context in the other."""
    db = CommonDB()
    apps = []
    for name in ("one", "two"):
        app = Flask(name)
        app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path}/{name}.db"
        db.init_app(app)
        apps.append(app)
    one, two = apps
    with one.app_context():
        db.session.execute(sa.text("CREATE TABLE only_in_one (id INTEGER)"))
        db.session.commit()
        with two.app_context():
            assert db.session.execute(sa.text("SELECT * FROM sqlite_master")).all() == []
            assert str(db.engine.url).endswith("two.db")
        assert len(db.session.execute(sa.text("SELECT * FROM sqlite_master")).all()) == 1


# Binds ----------------------------------------------------------------------------------------


def test_raw_sql_goes_to_the_bind(lab: Lab) -> None:
    """``text()`` goes to the bind of its session; ``db.session``'s is the default."""
    names = sa.text("SELECT name FROM sqlite_master WHERE type = 'table'")
    with lab.app.app_context():
        assert lab.db.sessions["orders"].scalars(names).all() == ["order"]
        assert lab.db.sessions[None].scalars(names).all() == ["post"]
        assert lab.db.session.scalars(names).all() == ["post"]


def test_transactions_of_their_own(lab: Lab) -> None:
    """A rollback on one bind leaves the pending work of another."""
    with lab.app.app_context():
        lab.db.sessions[None].add(lab.Post(title="kept"))
        lab.db.sessions["orders"].add(order(lab, "lost"))
        lab.db.sessions[None].flush()
        lab.db.sessions["orders"].rollback()
        lab.db.sessions["orders"].commit()
        lab.db.sessions[None].commit()
        assert lab.titles() == ["kept"]
        assert lab.db.session.scalars(sa.select(lab.Order)).all() == []  # type: ignore[attr-defined]


def test_foreign_model(lab: Lab) -> None:
    """A bind's session refuses what another bind owns, read or written, and says where to go."""
    with lab.app.app_context():
        orders = lab.db.sessions["orders"]
        with pytest.raises(WrongBindError, match=r"'post' belongs to bind None"):
            orders.scalars(sa.select(lab.Post)).all()
        orders.add(lab.Post(title="x"))
        with pytest.raises(WrongBindError, match=r"db\.sessions\[None\]"):
            orders.commit()
        orders.add(order(lab, "usable at once"))
        orders.commit()


def test_engine_given_by_the_caller(lab: Lab) -> None:
    """``bind_arguments`` with a bind wins over the session's own."""
    names = sa.text("SELECT name FROM sqlite_master WHERE type = 'table'")
    with lab.app.app_context():
        own = {"bind": lab.db.engine}
        assert lab.db.sessions["orders"].scalars(names, bind_arguments=own).all() == ["post"]


# Closing --------------------------------------------------------------------------------------


def test_foreign_teardown_that_raises(lab: Lab) -> None:
    """Another extension's teardown that raises does not keep ours from running."""
    seen: list[object] = []

    @lab.app.teardown_appcontext
    def registered_later(error: BaseException | None) -> None:
        raise LookupError("not ours")

    for number in range(20):
        with pytest.raises(LookupError, match="not ours"), lab.app.app_context():
            seen.append(lab.db.session())
            assert lab.titles() == []
            lab.db.session.add(lab.Post(title=f"{number}"))
            lab.db.session.flush()
        assert lab.checked_out() == 0
    assert len(set(map(id, seen))) == 20


def test_foreign_teardown_that_uses_a_session(lab: Lab) -> None:
    """A session that another teardown makes after ours is closed as well."""
    lab.app.teardown_appcontext_funcs.insert(0, lambda error: t.cast(t.Any, lab.titles()))
    with lab.app.app_context():
        lab.titles()
    assert lab.checked_out() == 0


def test_foreign_teardown_before_ours_has_its_session(lab: Lab) -> None:
    """A teardown registered after ``init_app`` still finds the request's session open."""
    found: list[bool] = []

    @lab.app.teardown_appcontext
    def registered_later(error: BaseException | None) -> None:
        found.append(lab.db.session() is g.mine)

    with lab.app.app_context():
        g.mine = lab.db.session()
    assert found == [True]


def test_close_that_raises(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """A failing close raises nothing, is logged and signalled once with its bind, and is final."""
    failures: list[tuple[object, str | None, str | None, str]] = []

    def note(app: object, bind_key: str | None, endpoint: str | None, error: Exception) -> None:
        failures.append((app, bind_key, endpoint, str(error)))

    def view() -> str:
        for engine in lab.db.engines.values():
            vars(engine.dialect)["do_rollback"] = refuse
        lab.db.session.execute(sa.text("SELECT 1"))
        lab.db.session.execute(sa.select(lab.Order))  # type: ignore[attr-defined]
        return "ok"

    def refuse(connection: object) -> None:
        raise sqlite3.OperationalError("secret parameter")

    lab.app.add_url_rule("/", "index", view)
    with session_close_failed.connected_to(note), caplog.at_level(logging.ERROR, "flask_commondb"):
        assert lab.app.test_client().get("/").text == "ok"
    assert [(bind_key, endpoint) for _, bind_key, endpoint, _ in failures] == [
        (None, "index"),
        ("orders", "index"),
    ]
    assert {app for app, *_ in failures} == {lab.app}
    assert len([r for r in caplog.records if r.name == "flask_commondb"]) == 2
    assert lab.checked_out() == 0
    with lab.app.app_context():
        for engine in lab.db.engines.values():
            del vars(engine.dialect)["do_rollback"]
        assert lab.titles() == []


def test_receiver_that_raises(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """A receiver that raises keeps teardown from nothing, and is logged. (I5)"""

    def refuse(connection: object) -> None:
        raise sqlite3.OperationalError("gone")

    def receiver(app: object, **_: object) -> None:
        raise ZeroDivisionError("metrics")

    with session_close_failed.connected_to(receiver), lab.app.app_context():
        lab.titles()
        lab.db.session.scalars(sa.select(lab.Order)).all()  # type: ignore[attr-defined]
        for engine in lab.engines:
            vars(engine.dialect)["do_rollback"] = refuse
    for engine in lab.engines:
        del vars(engine.dialect)["do_rollback"]
    assert lab.checked_out() == 0
    assert "metrics" in caplog.text


def test_failing_close_hands_no_session_on(lab: Lab) -> None:
    """After 500 closes that fail, no later request has been given an earlier one's session."""
    client = lab.app.test_client()

    @lab.app.get("/bad/<who>")
    def bad(who: str) -> str:
        lab.db.session.info["user"] = who
        lab.db.session.execute(sa.text("SELECT 1"))
        dialect = lab.db.engine.dialect

        def fail_once(connection: object) -> None:
            del vars(dialect)["do_rollback"]
            raise sqlite3.OperationalError("server went away")

        vars(dialect)["do_rollback"] = fail_once
        return "ok"

    @lab.app.get("/good")
    def good() -> str:
        return str(lab.db.session.info.get("user", "-"))

    logging.getLogger("flask_commondb").disabled = True
    try:
        for number in range(500):
            assert client.get(f"/bad/user{number}").text == "ok"
            assert client.get("/good").text == "-"
    finally:
        logging.getLogger("flask_commondb").disabled = False
    assert lab.checked_out() == 0


def test_an_interrupt_while_closing(lab: Lab) -> None:
    """What is no ``Exception`` comes out of teardown, after everything else has been closed."""

    def interrupt(connection: object) -> None:
        raise KeyboardInterrupt("now")

    with lab.app.app_context() as context:
        context.push()
        lab.db.sessions[None].execute(sa.text("SELECT 1"))
        lab.db.sessions["orders"].execute(sa.text("SELECT 1"))
        vars(lab.db.engine.dialect)["do_rollback"] = interrupt
        context.pop()
        with pytest.raises(KeyboardInterrupt, match="now"):
            lab.db._teardown_session(None)
        del vars(lab.db.engine.dialect)["do_rollback"]
        orders = t.cast(sa.QueuePool, lab.db.engines["orders"].pool)
        assert orders.checkedout() == 0
        assert lab.titles() == []


def test_an_interrupt_in_a_session_of_several_binds(lab: Lab) -> None:
    """An interrupt at one connection of a session leaves none of its others checked out."""

    def interrupt(connection: object) -> None:
        raise KeyboardInterrupt("now")

    for engine in lab.engines:
        with lab.app.app_context():
            lab.titles()
            lab.db.session.scalars(sa.select(lab.Order)).all()  # type: ignore[attr-defined]
            assert lab.checked_out() == 2
            vars(engine.dialect)["do_rollback"] = interrupt
            with pytest.raises(KeyboardInterrupt, match="now"):
                lab.db._teardown_session(None)
            del vars(engine.dialect)["do_rollback"]
        assert lab.checked_out() == 0


def test_a_client_kept_open(lab: Lab) -> None:
    """A client used as a context manager keeps its last context, and no more, until it is left."""
    lab.app.add_url_rule("/", "index", lambda: str(lab.titles()))
    with lab.app.test_client() as client:
        for _ in range(5):
            client.get("/")
            assert lab.checked_out() <= 1
    assert lab.checked_out() == 0


def test_request_without_database(lab: Lab) -> None:
    """A request that does not touch the database leaves nothing of ours on ``g``. (I1)"""
    seen: list[list[str]] = []

    @lab.app.get("/")
    def index() -> str:
        seen.append(list(g))
        return "ok"

    lab.app.teardown_appcontext_funcs.insert(0, lambda error: seen.append(list(g)))
    lab.app.test_client().get("/")
    assert seen == [[], []]


def test_remove_closes_like_the_end_of_a_context(lab: Lab) -> None:
    """``session.remove()`` forgets first, gives back every connection, and raises nothing."""
    failures: list[str | None] = []

    def note(app: object, bind_key: str | None, **_: object) -> None:
        failures.append(bind_key)

    def refuse(connection: object) -> None:
        raise sqlite3.OperationalError("gone")

    with lab.app.app_context():
        first = lab.db.session()
        lab.titles()
        lab.db.session.scalars(sa.select(lab.Order)).all()  # type: ignore[attr-defined]
        for engine in lab.engines:
            vars(engine.dialect)["do_rollback"] = refuse
        with session_close_failed.connected_to(note):
            lab.db.session.remove()
        assert lab.checked_out() == 0
        for engine in lab.engines:
            del vars(engine.dialect)["do_rollback"]
        assert lab.db.session() is not first
    assert failures == [None, "orders"]


def test_remove_inside_a_transaction(lab: Lab) -> None:
    """``session.remove()`` inside a block is refused: what follows would be lost."""
    with lab.app.app_context():
        with pytest.raises(sa.exc.InvalidRequestError, match="would be lost"):
            with lab.db.transaction():
                lab.db.session.remove()
        lab.db.session.remove()
        assert lab.titles() == []


def test_threads_do_not_share(lab: Lab) -> None:
    """Threads with contexts of their own have sessions of their own."""
    seen: list[t.Any] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        with lab.app.app_context():
            seen.append(lab.db.session())
            barrier.wait(10)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 4


def test_connection_joined_from_outside(lab: Lab) -> None:
    """A connection that the caller gives to a session is the caller's to close."""
    with lab.app.app_context():
        connection = lab.db.engine.connect()
        outer = connection.begin()
    with lab.app.app_context():
        own = {"bind": connection}
        lab.db.session.execute(sa.text("SELECT 1"), bind_arguments=own)
        lab.db.session.connection({"bind": connection})
    assert not connection.closed
    assert outer.is_active
    outer.rollback()
    connection.close()


# The user's own session class -----------------------------------------------------------------


def test_class_of_the_user(tmp_path: Path) -> None:
    """A session class of the user's is kept: its ``get_bind`` comes first, ours is behind it."""
    asked: list[object] = []

    class Mine(UpstreamSession):
        def get_bind(self, *args: t.Any, **kwargs: t.Any) -> t.Any:
            asked.append(kwargs.get("clause"))
            return super().get_bind(*args, **kwargs)

    url = f"sqlite:///{tmp_path}/mine.db"
    options = {"class_": Mine}
    lab = Lab(url, [url], session_options=options)
    assert options == {"class_": Mine}
    with lab.app.app_context():
        lab.db.create_all()
    with lab.request(), lab.routes() as routes:
        assert isinstance(lab.db.session(), Mine)
        assert lab.titles() == []
    assert len(asked) == 1
    assert routes == [("replica", "read")]
    lab.dispose()


def test_scope_function_that_raises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A ``scopefunc`` that raises when a context ends is logged, and raises nothing. (I5)"""

    def scope() -> str:
        raise LookupError("no request")

    lab = Lab(f"sqlite:///{tmp_path}/a.db", session_options={"scopefunc": scope})
    with lab.app.app_context():
        pass
    assert "no request" in caplog.text
    lab.dispose()


def test_class_that_is_only_sqlalchemys(tmp_path: Path) -> None:
    """A session class that is not Flask-SQLAlchemy's works as it does there: unrouted, closed."""

    class Plain(so.Session):
        def __init__(self, db: CommonDB, **kwargs: t.Any) -> None:
            super().__init__(**kwargs)
            self.db = db

        def get_bind(self, *args: t.Any, **kwargs: t.Any) -> t.Any:
            return self.db.engine

    plain = Lab(f"sqlite:///{tmp_path}/plain.db", session_options={"class_": Plain})
    with plain.app.app_context():
        plain.db.create_all()
        assert type(plain.db.session()).__mro__[1] is Plain
        assert plain.titles() == []
    assert plain.checked_out() == 0
    plain.dispose()


def test_scope_function_of_the_user(tmp_path: Path) -> None:
    """A ``scopefunc`` is obeyed, and its session is closed when the context ends."""
    scope = ["one"]
    lab = Lab(f"sqlite:///{tmp_path}/scope.db", session_options={"scopefunc": lambda: scope[0]})
    with lab.app.app_context():
        lab.db.create_all()
        first = lab.db.session()
        lab.titles()
        scope[0] = "two"
        assert lab.db.session() is not first
        scope[0] = "one"
    assert lab.checked_out() == 0
    with lab.app.app_context():
        assert lab.db.session() is not first
    lab.dispose()


# On a real server -----------------------------------------------------------------------------


def test_backend_terminated_mid_request(
    on_mariadb: Lab, mariadb_database: Database[MariaDBCluster]
) -> None:
    """100 requests lose their connection: 0 teardowns raise, 0 foreign sessions, 0 left out."""
    lab = on_mariadb
    failures: list[str | None] = []

    def note(app: object, bind_key: str | None, **_: object) -> None:
        failures.append(bind_key)

    @lab.app.post("/bad/<who>")
    def bad(who: str) -> str:
        assert "user" not in lab.db.session.info
        lab.db.session.info["user"] = who
        connection = lab.db.session.scalar(sa.text("SELECT CONNECTION_ID()"))
        second = lab.db.engines["second"]
        lab.db.session.execute(sa.text("SELECT 1"), bind_arguments={"bind": second})
        mariadb_database.cluster.primary.execute(f"KILL {connection}")
        return "ok"

    @lab.app.get("/good")
    def good() -> str:
        lab.titles()
        return str(lab.db.session.info.get("user", "-"))

    client = lab.app.test_client()
    logging.getLogger("flask_commondb").disabled = True
    try:
        with session_close_failed.connected_to(note):
            for number in range(100):
                assert client.post(f"/bad/user{number}").text == "ok"
                assert lab.checked_out() == 0
                assert client.get("/good").text == "-"
    finally:
        logging.getLogger("flask_commondb").disabled = False
    assert failures == [None] * 100
    assert lab.checked_out() == 0


def test_cursor_shares_the_transaction(on_mariadb: Lab) -> None:
    """A raw cursor sees what the session has flushed, and is undone with it."""
    lab = on_mariadb
    with lab.request("POST"):
        lab.db.session.add(lab.Post(title="mine"))
        with lab.db.cursor() as cursor:
            cursor.execute("SELECT title FROM post")
            assert cursor.fetchall() == (("mine",),)
            cursor.execute("UPDATE post SET title = 'ours'")
        lab.db.session.expire_all()
        assert lab.titles() == ["ours"]
        lab.db.session.rollback()
        assert lab.titles() == []


@pytest.mark.parametrize("end", ["commit", "rollback", "close", "remove"])
def test_cursor_ends_with_the_transaction(on_mariadb: Lab, end: str) -> None:
    """A cursor kept beyond its transaction is closed: it cannot write into someone else's."""
    import pymysql

    lab = on_mariadb
    with lab.request("POST"):
        with pytest.raises(pymysql.err.ProgrammingError, match="Cursor closed"):
            with lab.db.cursor() as cursor:
                cursor.execute("INSERT INTO post (title) VALUES ('first')")
                getattr(lab.db.session, end)()
                cursor.execute("INSERT INTO post (title) VALUES ('second')")
        with lab.db.cursor() as cursor:
            cursor.execute("INSERT INTO post (title) VALUES ('third')")
        lab.db.session.commit()
        assert lab.titles() == (["first", "third"] if end == "commit" else ["third"])


def test_cursor_in_a_replica_scope_ends_with_the_transaction(on_mariadb: Lab) -> None:
    """So does a cursor on a replica, whose connection goes back to its pool."""
    import pymysql

    lab = on_mariadb
    with lab.request(), lab.db.replica():
        with pytest.raises(pymysql.err.ProgrammingError, match="Cursor closed"):
            with lab.db.cursor() as cursor:
                cursor.execute("SELECT 1")
                lab.db.session.commit()
                cursor.execute("SELECT 1")
    assert lab.checked_out() == 0


def test_changes_are_not_computed_from_a_replica(
    on_mariadb: Lab, mariadb_database: Database[MariaDBCluster]
) -> None:
    """What a unit has read from a replica is read anew when ``db.transaction()`` begins."""
    lab = on_mariadb
    mariadb_database.execute("INSERT INTO post VALUES (1, 'old'), (2, 'mine')")
    mariadb_database.sync()
    for replica in mariadb_database.cluster.replicas:
        mariadb_database.cluster.stop_replication(replica)
    mariadb_database.execute("UPDATE post SET title = 'new'")
    with lab.request():
        post, other = lab.db.session.scalars(sa.select(lab.Post).order_by(lab.Post.id))
        assert post.title == "old"
        other.title = "changed"
        with lab.db.transaction():
            post.title += "!"
    assert mariadb_database.execute("SELECT title FROM post ORDER BY id") == [
        ("new!",),
        ("changed",),
    ]


def test_cursor_of_a_bind(on_mariadb: Lab) -> None:
    """``db.cursor(key)`` belongs to ``db.sessions[key]``, takes the driver's arguments, commits."""
    import pymysql

    lab = on_mariadb
    with lab.request("POST"):
        with lab.db.cursor("second", pymysql.cursors.DictCursor) as cursor:
            cursor.execute("INSERT INTO post (title) VALUES (%s)", ("x",))
            cursor.execute("SELECT title FROM post")
            assert cursor.fetchall() == [{"title": "x"}]
        assert lab.titles() == []
        lab.db.session.rollback()
        lab.db.sessions["second"].commit()
        assert lab.titles() == ["x"]


def test_cursor_is_always_closed(on_mariadb: Lab) -> None:
    """The cursor is closed when its block raises; the error is the driver's own."""
    import pymysql

    lab = on_mariadb
    with lab.request("POST"):
        with pytest.raises(pymysql.err.ProgrammingError, match="missing"), lab.db.cursor() as one:
            one.execute("SELECT * FROM missing")
        with lab.db.cursor() as two:
            two.execute("SELECT 1")
        for cursor in (one, two):
            with pytest.raises(pymysql.err.ProgrammingError, match="Cursor closed"):
                cursor.execute("SELECT 1")


def test_cursor_on_a_lost_connection(
    on_mariadb: Lab, mariadb_database: Database[MariaDBCluster]
) -> None:
    """A connection that dies under a raw cursor is noticed: after a rollback all goes on."""
    import pymysql

    lab = on_mariadb
    with lab.request("POST"):
        with pytest.raises(pymysql.err.OperationalError, match="Lost connection"):
            with lab.db.cursor() as cursor:
                cursor.execute("SELECT CONNECTION_ID()")
                (connection,) = cursor.fetchone()
                mariadb_database.cluster.primary.execute(f"KILL {connection}")
                cursor.execute("SELECT 1")
        lab.db.session.rollback()
        assert lab.titles() == []
    assert lab.checked_out() == 0
