"""What Flask-SQLAlchemy does wrong with sessions and binds, and CommonDB does not.

Owns: a test for each fault. It runs on both classes: with the one the fault must be there, or the
test would prove nothing, with the other it must not.
"""

from __future__ import annotations

import contextvars
import gc
import importlib.metadata
import threading
import typing as t

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_commondb import CommonDB
from flask_commondb import PartialCommitError

if t.TYPE_CHECKING:
    from pathlib import Path

    from .servers import Database
    from .servers import MariaDBCluster
    from .servers import PostgreSQLCluster

#: Since 3.2 it runs all teardown functions, also when one raises.
FLASK = tuple(map(int, importlib.metadata.version("flask").split(".")[:2]))


class Site:
    """An app on one of the two classes.

    :param binds: the URLs of the binds beside the default one.
    :param options: for the engines of all binds.
    """

    def __init__(
        self,
        extension: t.Any,
        url: str,
        binds: t.Mapping[str, str] | None = None,
        **options: t.Any,
    ) -> None:
        class Base(so.DeclarativeBase):
            pass

        self.is_faulty = not issubclass(extension, CommonDB)
        self.app = Flask(__name__)
        self.app.config["SQLALCHEMY_DATABASE_URI"] = url
        self.app.config["SQLALCHEMY_BINDS"] = {
            key: {"url": url, **options} for key, url in (binds or {}).items()
        }
        self.db: t.Any = extension(self.app, model_class=Base, engine_options=options)
        with self.app.app_context():
            self.engines: dict[str | None, t.Any] = dict(self.db.engines)

    def model(self, name: str, bind_key: str | None = None, /, **attributes: t.Any) -> t.Any:
        """A model with a key, and with what is given."""
        key = so.mapped_column(sa.Integer, primary_key=True)
        if bind_key is not None:
            attributes["__bind_key__"] = bind_key
        return type(name, (self.db.Model,), {"__module__": __name__, "id": key, **attributes})

    def checked_out(self) -> int:
        """How many connections are out of their pools."""
        return sum(engine.pool.checkedout() for engine in self.engines.values())


MakeSite = t.Callable[..., Site]


@pytest.fixture(params=[SQLAlchemy, CommonDB], ids=["Flask-SQLAlchemy", "CommonDB"])
def make_site(request: pytest.FixtureRequest) -> t.Iterator[MakeSite]:
    """A function that makes a site; the arguments are a site's, without the class."""
    sites = []

    def make(*args: t.Any, **kwargs: t.Any) -> Site:
        sites.append(Site(request.param, *args, **kwargs))
        return sites[-1]

    yield make
    for site in sites:
        for engine in site.engines.values():
            engine.dispose()


# Teardown -------------------------------------------------------------------------------------


def test_failed_rollback(make_site: MakeSite, tmp_path: Path) -> None:
    """A rollback that fails at teardown does not undo the view's answer, and the session of one
    request is not given to a later one."""
    site = make_site(f"sqlite:///{tmp_path}/a.db", pool_size=200)
    app, session = site.app, site.db.session
    raised = given_on = 0

    @app.get("/lost")
    def lose() -> str:
        session.info["is_lost"] = True
        session.connection().connection.dbapi_connection.close()
        return "answer"

    @app.get("/next")
    def look() -> str:
        return str("is_lost" in session.info)

    client = app.test_client()
    for _ in range(150):
        try:
            client.get("/lost")
        except sa.exc.ProgrammingError:
            raised += 1
        given_on += client.get("/next").text == "True"
    assert raised == (150 if site.is_faulty else 0)
    assert (given_on > 0) is site.is_faulty


def test_failed_teardown_of_another(make_site: MakeSite, tmp_path: Path) -> None:
    """Another extension's teardown that raises leaks no connection, and no transaction into a later
    request."""
    site = make_site(f"sqlite:///{tmp_path}/a.db", pool_size=200)
    app, session = site.app, site.db.session
    User = site.model("User", name=so.mapped_column(sa.String))
    with app.app_context():
        site.db.create_all()
        session.add(User(id=1, name="committed"))
        session.commit()
    inside = uncommitted = 0

    @app.teardown_appcontext
    def fail(error: BaseException | None) -> None:
        raise ValueError("not ours")

    @app.get("/")
    def change() -> str:
        nonlocal inside, uncommitted
        inside += session().in_transaction()
        user = session.get(User, 1)
        uncommitted += user.name != "committed"
        user.name = "never committed"
        return "answer"

    client = app.test_client()
    for _ in range(150):
        with pytest.raises(ValueError, match="not ours"):
            client.get("/")
    gc.collect()  # what is still out is held, and not by a cycle
    faults = {inside > 0, uncommitted > 0, site.checked_out() > 0}
    assert faults == {site.is_faulty and FLASK < (3, 2)}


def test_killed_connection(make_site: MakeSite, mariadb_database: Database[MariaDBCluster]) -> None:
    """A connection that the server has killed does not undo the view's answer, and keeps no other
    out of its pool, not even until garbage is collected."""
    url = mariadb_database.primary_url
    site = make_site(url, {"second": url, "third": url}, pool_size=20)
    raised = held = 0

    @site.app.get("/<int:victim>")
    def use_all(victim: int) -> str:
        numbers = [
            site.db.session.execute(
                sa.select(sa.func.connection_id()), bind_arguments={"bind": engine}
            ).scalar()
            for engine in site.engines.values()
        ]
        mariadb_database.execute(f"KILL {numbers[victim]}")
        return "answer"

    client = site.app.test_client()
    for number in range(15):
        try:
            assert client.get(f"/{number % 3}").text == "answer"
        except sa.exc.DBAPIError:
            raised += 1
        held += site.checked_out()
    assert raised == (15 if site.is_faulty else 0)
    assert (held > 0) is site.is_faulty


def push(app: Flask) -> None:
    """Push a context, without an end."""
    app.app_context().push()
    app.view_functions["use"]()


def request(app: Flask) -> None:
    """Go on in the context of a request that a test client keeps, without an end."""
    app.test_client().__enter__().get("/")
    app.view_functions["use"]()


def in_a_thread(use: t.Callable[[], object]) -> None:
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()


def in_a_task(use: t.Callable[[], object]) -> None:
    contextvars.copy_context().run(use)


@pytest.mark.parametrize("run", [in_a_thread, in_a_task])
@pytest.mark.parametrize("begin", [push, request])
def test_context_without_an_end(
    begin: t.Callable[[Flask], None],
    run: t.Callable[[t.Callable[[], object]], None],
    make_site: MakeSite,
    tmp_path: Path,
) -> None:
    """A context that a thread or a task leaves behind gives its connection back when it is gone."""
    site = make_site(f"sqlite:///{tmp_path}/a.db", pool_size=10)

    @site.app.get("/")
    def use() -> str:
        return str(site.db.session.scalar(sa.text("SELECT 1")))

    for _ in range(5):
        run(lambda: begin(site.app))
    gc.collect()
    assert (site.checked_out() > 0) is site.is_faulty


# Binds ----------------------------------------------------------------------------------------

#: Statements about the table of a bind that Flask-SQLAlchemy sends to the default one.
CORE: dict[str, t.Callable[[t.Any, sa.Table], t.Any]] = {
    "column": lambda model, table: sa.select(table.c.place),
    "alias": lambda model, table: sa.select(table.alias().c.place),
    "join": lambda model, table: sa.select(table.c.place).join(o := table.alias(), o.c.id == 1),
    "subquery": lambda model, table: sa.select(sa.select(table.c.place).subquery()),
    "scalar subquery": lambda model, table: sa.select(sa.select(table.c.place).scalar_subquery()),
    "CTE": lambda model, table: sa.select(sa.select(table.c.place).cte()),
    "union": lambda model, table: sa.union(sa.select(table.c.place), sa.select(table.c.place)),
    "function": lambda model, table: sa.select(sa.func.max(table.c.place)),
    "union of attributes": lambda model, table: sa.union(
        sa.select(model.place), sa.select(model.place)
    ),
    "function of an attribute": lambda model, table: sa.func.max(model.place),
    "select_from": lambda model, table: sa.select(sa.literal_column("place")).select_from(table),
    "exists": lambda model, table: sa.select(
        sa.case((sa.exists().where(table.c.place == "other"), "other"), else_="default")
    ),
    "text": lambda model, table: sa.text("SELECT place FROM thing").columns(table.c.place),
}


@pytest.mark.parametrize("name", CORE)
def test_core_statement(name: str, make_site: MakeSite, tmp_path: Path) -> None:
    """A Core statement reads the bind that owns its table, as an ORM statement does."""
    site = make_site(f"sqlite:///{tmp_path}/a.db", {"other": f"sqlite:///{tmp_path}/b.db"})
    Thing = site.model("Thing", "other", place=so.mapped_column(sa.String))
    for key, engine in site.engines.items():
        with engine.begin() as connection:
            Thing.__table__.create(connection)
            connection.execute(sa.insert(Thing.__table__).values(place=key or "default"))
    with site.app.app_context():
        assert site.db.session.scalar(sa.select(Thing.place)) == "other"
        answer = site.db.session.scalar(CORE[name](Thing, Thing.__table__))
    assert answer == ("default" if site.is_faulty else "other")


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
def test_commit_of_two_binds(
    make_site: MakeSite,
    mariadb_database: Database[MariaDBCluster],
    postgresql_database: Database[PostgreSQLCluster],
) -> None:
    """A commit of two binds that fails on one leaves nothing durable on the other, or says that it
    does; and the session is usable afterwards."""
    site = make_site(mariadb_database.primary_url, {"orders": postgresql_database.primary_url})
    session = site.db.session
    User = site.model("User")
    foreign_key = sa.ForeignKey("parent.id", deferrable=True, initially="DEFERRED")
    site.model("Parent", "orders")
    Child = site.model("Child", "orders", parent_id=so.mapped_column(foreign_key))
    with site.app.app_context():
        site.db.create_all()
    unsaid = unusable = 0
    for number in range(1, 31):
        with site.app.app_context():
            session.add_all([User(id=number), Child(id=number, parent_id=0)])
            with pytest.raises(
                sa.exc.SQLAlchemyError, match=r"foreign key|bind 'orders'"
            ) as caught:
                session.commit()
            said = []
            if isinstance(caught.value, PartialCommitError):
                assert caught.value.failed == "orders"
                said = list(caught.value.committed)
            durable = mariadb_database.execute(f"SELECT NULL FROM user WHERE id = {number}")
            unsaid += said != [key for (key,) in durable]
            try:
                assert session.scalar(sa.select(sa.func.count(Child.id))) == 0
            except sa.exc.InvalidRequestError:
                unusable += 1
                session.rollback()
    assert postgresql_database.execute("SELECT * FROM child") == []
    assert (unsaid > 0) is site.is_faulty
    assert unusable == (30 if site.is_faulty else 0)
    assert site.checked_out() == 0


# One model in two databases -------------------------------------------------------------------


class Mirror:
    """A model and its child that both databases have, read in `db.session` from both."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.session = site.db.session
        self.Item = site.model(
            "Item",
            name=so.mapped_column(sa.String),
            deferred=so.mapped_column(sa.String, deferred=True),
            parts=so.relationship("Part", back_populates="item"),
        )
        self.Part = site.model(
            "Part",
            name=so.mapped_column(sa.String),
            item_id=so.mapped_column(sa.ForeignKey("item.id")),
            item=so.relationship("Item", back_populates="parts"),
        )
        for key, engine in site.engines.items():
            place = key or "default"
            with so.Session(engine) as session:
                self.Item.metadata.create_all(engine)
                part = self.Part(id=1, name=place)
                session.add(self.Item(id=1, name=place, deferred=place, parts=[part]))
                session.commit()

    @property
    def from_b(self) -> dict[str, t.Any]:
        return {"bind_arguments": {"bind": self.site.engines["b"]}}

    def rows(self) -> dict[str | None, list[str]]:
        """The names in each database, of the item and of its part."""
        rows = {}
        for key, engine in self.site.engines.items():
            with engine.connect() as connection:
                rows[key] = [
                    *connection.scalars(sa.select(self.Item.__table__.c.name)),
                    *connection.scalars(sa.select(self.Part.__table__.c.name)),
                ]
        return rows


@pytest.fixture
def mirror(make_site: MakeSite, tmp_path: Path) -> t.Iterator[Mirror]:
    site = make_site(f"sqlite:///{tmp_path}/a.db", {"b": f"sqlite:///{tmp_path}/b.db"})
    mirror = Mirror(site)
    with site.app.app_context():
        yield mirror


#: How the item of database "b" is read.
WAYS: dict[str, t.Callable[[Mirror], t.Any]] = {
    "select": lambda m: m.session.scalar(sa.select(m.Item), **m.from_b),
    "get": lambda m: m.session.get(m.Item, 1, **m.from_b),
    "joinedload": lambda m: (
        m.session.scalar(sa.select(m.Part).options(so.joinedload(m.Part.item)), **m.from_b).item
    ),
    "selectinload": lambda m: (
        m.session.scalar(sa.select(m.Part).options(so.selectinload(m.Part.item)), **m.from_b).item
    ),
    "lazy load": lambda m: m.session.scalar(sa.select(m.Part), **m.from_b).item,
}

#: What is done with it afterwards.
LATER: dict[str, t.Callable[[Mirror, t.Any], object]] = {
    "as it is": lambda m, item: None,
    "refresh": lambda m, item: m.session.refresh(item),
    "expire": lambda m, item: m.session.expire(item),
    "commit": lambda m, item: m.session.commit(),
    "rollback": lambda m, item: m.session.rollback(),
}


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("way", WAYS)
def test_one_row_of_two_binds(way: str, later: str, mirror: Mirror) -> None:
    """A row that is read from another bind is an object of its own, and stays that bind's: what
    belongs to it is loaded from there, now and later, and its changes are written there."""
    mine = mirror.session.get(mirror.Item, 1)
    other = WAYS[way](mirror)
    LATER[later](mirror, other)
    (part,) = other.parts
    seen = [mine.name, other.name, other.deferred, part.name]
    other.name = part.name = "changed"
    mirror.session.commit()
    if mirror.site.is_faulty:
        assert mine is other
        assert seen == ["default"] * 4
        assert mirror.rows() == {None: ["changed", "changed"], "b": ["b", "b"]}
    else:
        assert mine is not other
        assert seen == ["default", "b", "b", "b"]
        assert mirror.rows() == {None: ["default", "default"], "b": ["changed", "changed"]}


@pytest.mark.parametrize("way", WAYS)
def test_other_bind_first(way: str, mirror: Mirror) -> None:
    """A row that was read from another bind does not stand in the way of the owner's."""
    other = WAYS[way](mirror)
    mine = mirror.session.get(mirror.Item, 1)
    assert (mine is other) is mirror.site.is_faulty
    assert mirror.site.is_faulty or (mine.name, other.name) == ("default", "b")


@pytest.mark.parametrize("way", WAYS)
def test_delete_of_another_binds_row(way: str, mirror: Mirror) -> None:
    """A row that is read from another bind is deleted there."""
    mirror.session.delete(WAYS[way](mirror))
    mirror.session.commit()
    if mirror.site.is_faulty:
        assert mirror.rows() == {None: ["default"], "b": ["b", "b"]}
    else:
        assert mirror.rows() == {None: ["default", "default"], "b": ["b"]}


def test_new_part_of_another_binds_row(mirror: Mirror) -> None:
    """What is added to a row that was read from another bind is written there, with it."""
    other = mirror.session.scalar(sa.select(mirror.Item), **mirror.from_b)
    other.parts.append(mirror.Part(name="new"))
    mirror.session.commit()
    if mirror.site.is_faulty:
        assert mirror.rows() == {None: ["default", "default", "new"], "b": ["b", "b"]}
    else:
        assert mirror.rows() == {None: ["default", "default"], "b": ["b", "b", "new"]}


def test_returned_from_another_bind(mirror: Mirror) -> None:
    """A row that a statement has written on another bind and returns is that bind's, too."""
    mine = mirror.session.get(mirror.Item, 1)
    update = sa.update(mirror.Item).values(name="updated").returning(mirror.Item)
    other = mirror.session.scalar(update, **mirror.from_b)
    assert (mine is other) is mirror.site.is_faulty
    other.name = "changed"
    mirror.session.commit()
    if mirror.site.is_faulty:
        assert mirror.rows() == {None: ["changed", "default"], "b": ["updated", "b"]}
    else:
        assert mirror.rows() == {None: ["default", "default"], "b": ["changed", "b"]}


def test_update_beside_another_binds_row(mirror: Mirror) -> None:
    """An UPDATE on one bind changes no object of another, not even in memory."""
    mine = mirror.session.get(mirror.Item, 1)
    other = mirror.session.scalar(sa.select(mirror.Item), **mirror.from_b)
    mirror.session.execute(sa.update(mirror.Item).values(name="changed"))
    assert mine.name == "changed"
    assert other.name == ("changed" if mirror.site.is_faulty else "b")


# A session for each bind ----------------------------------------------------------------------


def test_rollback_of_one_bind(make_site: MakeSite, tmp_path: Path) -> None:
    """What fails on one bind does not cost the work on another: each has a session of its own."""
    site = make_site(f"sqlite:///{tmp_path}/a.db", {"b": f"sqlite:///{tmp_path}/b.db"})
    Mine, Other = site.model("Mine"), site.model("Other", "b")
    with site.app.app_context():
        site.db.create_all()
        main, b = [
            site.db.session if site.is_faulty else site.db.sessions[key] for key in (None, "b")
        ]
        main.add(Mine(id=1))
        main.flush()
        with pytest.raises(sa.exc.IntegrityError, match="UNIQUE"):
            b.execute(sa.insert(Other).values([{"id": 1}, {"id": 1}]))
        b.rollback()
        main.commit()
        kept = site.db.session.scalar(sa.select(sa.func.count(Mine.id)))
    assert kept == (0 if site.is_faulty else 1)


def test_engine_for_each_session(mariadb_database: Database[MariaDBCluster]) -> None:
    """Sessions of a bind share its engine, and so a connection; with an engine for each, as users
    write it who want a session for each bind, each has a connection."""
    number = sa.select(sa.func.connection_id())
    own = [so.Session(sa.create_engine(mariadb_database.primary_url)) for _ in range(10)]
    site = Site(CommonDB, mariadb_database.primary_url)
    held, shared = set(), set()
    for session in own:
        held.add(session.scalar(number))
        session.commit()
        with site.app.app_context():
            shared.add(site.db.sessions[None].scalar(number))
    assert (len(held), len(shared)) == (10, 1)
    for engine in (site.engines[None], *(session.get_bind() for session in own)):
        engine.engine.dispose()


# Engine options -------------------------------------------------------------------------------


def engines_of(extension: t.Any, config: t.Mapping[str, t.Any]) -> dict[str | None, t.Any]:
    app = Flask(__name__)
    app.config.update(config)
    db = extension(app)
    with app.app_context():
        return dict(db.engines)


EXTENSIONS = pytest.mark.parametrize(
    "extension", [SQLAlchemy, CommonDB], ids=["Flask-SQLAlchemy", "CommonDB"]
)


@EXTENSIONS
def test_engine_options_miss_binds(extension: t.Any, tmp_path: Path) -> None:
    """``SQLALCHEMY_ENGINE_OPTIONS`` reaches every bind, however it is written."""
    engines = engines_of(
        extension,
        {
            "SQLALCHEMY_DATABASE_URI": f"sqlite:///{tmp_path}/default.db",
            "SQLALCHEMY_ENGINE_OPTIONS": {"pool_pre_ping": True, "pool_recycle": 280},
            "SQLALCHEMY_BINDS": {
                "as_text": f"sqlite:///{tmp_path}/a.db",
                "as_dict": {"url": f"sqlite:///{tmp_path}/b.db"},
            },
        },
    )
    reached = {
        key
        for key, engine in engines.items()
        if (engine.pool._pre_ping, engine.pool._recycle) == (True, 280)
    }
    assert reached == ({None} if extension is SQLAlchemy else {None, "as_text", "as_dict"})


@EXTENSIONS
def test_engine_options_of_the_user_are_changed(extension: t.Any) -> None:
    """A ``connect_args`` of the user's is as it was after ``init_app``."""
    own: dict[str, t.Any] = {"timeout": 3}
    engines_of(
        extension,
        {
            "SQLALCHEMY_DATABASE_URI": "sqlite://",
            "SQLALCHEMY_ENGINE_OPTIONS": {"connect_args": own},
        },
    )
    assert ("check_same_thread" in own) is (extension is SQLAlchemy)


@EXTENSIONS
def test_recycle_without_a_pool(extension: t.Any) -> None:
    """Connections that are not kept have no lifetime to look at."""
    engines = engines_of(
        extension,
        {
            "SQLALCHEMY_DATABASE_URI": "mysql+pymysql://host/app",
            "SQLALCHEMY_ENGINE_OPTIONS": {"poolclass": sa.NullPool},
        },
    )
    assert engines[None].pool._recycle == (7200 if extension is SQLAlchemy else -1)
