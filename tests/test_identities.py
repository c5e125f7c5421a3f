"""One row that is read through two binds: two objects, each loaded and written where it came from.

Two databases have the same tables, all owned by the default bind, with rows that say where they
are. What the session did is read from the databases themselves.
"""

from __future__ import annotations

import pickle
import typing as t
from pathlib import Path

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask

from flask_commondb import CommonDB
from flask_commondb.identities import ForeignBind

Session = t.Any


class World:
    """An app with a default bind and the bind "b", and the same rows in both."""

    def __init__(self, path: Path) -> None:
        self.app = Flask(__name__)
        self.app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{path}/default.db"
        self.app.config["SQLALCHEMY_BINDS"] = {"b": f"sqlite:///{path}/b.db"}

        class Base(so.DeclarativeBase):
            pass

        self.db: t.Any = CommonDB(self.app, model_class=Base)

        class Item(self.db.Model):  # type: ignore[name-defined, misc]
            id: so.Mapped[int] = so.mapped_column(primary_key=True)
            name: so.Mapped[str]
            parts: so.Mapped[list[t.Any]] = so.relationship("Part", back_populates="item")

        class Part(self.db.Model):  # type: ignore[name-defined, misc]
            id: so.Mapped[int] = so.mapped_column(primary_key=True)
            name: so.Mapped[str]
            item_id: so.Mapped[int] = so.mapped_column(sa.ForeignKey("item.id"))
            item: so.Mapped[t.Any] = so.relationship("Item", back_populates="parts")

        class Other(self.db.Model):  # type: ignore[name-defined, misc]
            __bind_key__ = "b"
            id: so.Mapped[int] = so.mapped_column(primary_key=True)

        so.configure_mappers()
        self.Item: t.Any = Item
        self.Part: t.Any = Part
        self.Other: t.Any = Other
        with self.app.app_context():
            self.db.create_all()
            Item.metadata.create_all(self.db.engines["b"])
            for key, engine in self.db.engines.items():
                with engine.begin() as connection:
                    place = key or "default"
                    connection.execute(sa.insert(Item.__table__).values(id=1, name=place))
                    connection.execute(
                        sa.insert(Part.__table__).values(id=1, name=place, item_id=1)
                    )

    def read_from_b(self, statement: t.Any = None) -> t.Any:
        """The item in "b", read through the session of all binds."""
        if statement is None:
            statement = sa.select(self.Item)
        return self.db.session.execute(statement, bind_arguments=self.in_b).scalar_one()

    @property
    def in_b(self) -> dict[str, t.Any]:
        return {"bind": self.db.engines["b"]}

    def names(self, model: t.Any = None) -> dict[str, str | None]:
        """What each database says the row is called."""
        names = {}
        for key, engine in self.db.engines.items():
            with engine.connect() as connection:
                names[key or "default"] = connection.scalar(
                    sa.select((model or self.Item).__table__.c.name)
                )
        return names


@pytest.fixture
def world(tmp_path: Path) -> t.Iterator[World]:
    made = World(tmp_path)
    with made.app.app_context():
        yield made


READS: dict[str, t.Callable[[World], t.Any]] = {
    "execute": lambda world: world.read_from_b(),
    "scalars": lambda world: world.db.session.scalars(
        sa.select(world.Item), bind_arguments=world.in_b
    ).one(),
    "scalar": lambda world: world.db.session.scalar(
        sa.select(world.Item), bind_arguments=world.in_b
    ),
    "get": lambda world: world.db.session.get(world.Item, 1, bind_arguments=world.in_b),
    "get_one": lambda world: world.db.session.get_one(world.Item, 1, bind_arguments=world.in_b),
    "OptionEngine": lambda world: world.db.session.scalar(
        sa.select(world.Item),
        bind_arguments={"bind": world.db.engines["b"].execution_options(logging_token="x")},
    ),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_two_objects(world: World, read: t.Callable[[World], t.Any]) -> None:
    """However a row is read from another bind, it is an object of its own, written back there."""
    own = world.db.session.get(world.Item, 1)
    foreign = read(world)
    assert (own.name, foreign.name) == ("default", "b")
    assert read(world) is foreign
    foreign.name = "edited"
    world.db.session.commit()
    assert world.names() == {"default": "default", "b": "edited"}


def test_each_is_written_home(world: World) -> None:
    """Both objects of one row may change in one commit, and each change lands where it was read."""
    foreign, own = world.read_from_b(), world.db.session.get(world.Item, 1)
    own.name, foreign.name = "own", "foreign"
    world.db.session.commit()
    assert world.names() == {"default": "own", "b": "foreign"}
    assert (own.name, foreign.name) == ("own", "foreign")


LOADS: dict[str, t.Callable[[World, t.Any], t.Any]] = {
    "expired": lambda world, item: world.db.session.expire(item) or item.name,
    "refresh": lambda world, item: world.db.session.refresh(item) or item.name,
    "after a commit": lambda world, item: world.db.session.commit() or item.name,
    "after a rollback": lambda world, item: world.db.session.rollback() or item.name,
    "one to many": lambda world, item: item.parts[0].name,
    "many to one": lambda world, item: (
        world.db.session.expire(item.parts[0]) or item.parts[0].item.name
    ),
    "further on": lambda world, item: item.parts[0].item.parts[0].name,
    "merge": lambda world, item: world.db.session.merge(item).name,
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_what_follows_is_loaded_there(world: World, load: t.Callable[..., t.Any]) -> None:
    """What is loaded for an object later on comes from the bind that it was read from."""
    own = world.db.session.get(world.Item, 1)
    assert load(world, world.read_from_b()) == "b"
    assert own.parts[0].name == "default"


@pytest.mark.parametrize("load", [so.selectinload, so.joinedload, so.subqueryload])
def test_eager_loads(world: World, load: t.Callable[..., t.Any]) -> None:
    """Eager loads go where their statement goes, and what they load is written back there."""
    world.db.session.scalars(sa.select(world.Item).options(load(world.Item.parts))).unique().all()
    statement = sa.select(world.Item).options(load(world.Item.parts))
    rows = world.db.session.execute(statement, bind_arguments=world.in_b).unique()
    part = rows.scalar_one().parts[0]
    assert part.name == "b"
    part.name = "edited"
    world.db.session.commit()
    assert world.names(world.Part) == {"default": "default", "b": "edited"}


def test_delete(world: World) -> None:
    """A foreign object is deleted where it was read."""
    part = world.read_from_b().parts[0]
    world.db.session.delete(part)
    world.db.session.commit()
    assert world.names(world.Part) == {"default": "default", "b": None}


def test_bulk_statements(world: World) -> None:
    """An UPDATE with a bind changes the rows there, and in the session the object from there."""
    own, foreign = world.db.session.get(world.Item, 1), world.read_from_b()
    world.db.session.execute(
        sa.update(world.Item).values(name="updated"), bind_arguments=world.in_b
    )
    assert (own.name, foreign.name) == ("default", "updated")
    world.db.session.commit()
    assert world.names() == {"default": "default", "b": "updated"}


def test_bulk_operations_are_still_there(world: World) -> None:
    """A session that has foreign objects can insert in bulk, which SQLAlchemy refuses to shards."""
    world.read_from_b()
    world.db.session.execute(sa.insert(world.Item), [{"id": 2, "name": "new"}])
    world.db.session.bulk_insert_mappings(world.Item, [{"id": 3, "name": "new"}])
    world.db.session.commit()
    with world.db.engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count(world.Item.id))) == 3


def test_new_objects_go_to_the_owner(world: World) -> None:
    """What is added goes to the bind that owns its table, also beside foreign objects."""
    world.read_from_b().name = "edited"
    world.db.session.add(world.Item(id=2, name="new"))
    world.db.session.commit()
    assert world.db.session.get(world.Item, 2).name == "new"
    assert world.db.session.get(world.Item, 2, bind_arguments=world.in_b) is None


def test_in_another_session(world: World) -> None:
    """An object keeps its bind when it is detached and added to another session."""
    item = world.read_from_b()
    world.db.session.expunge_all()
    world.db.session.remove()
    world.db.session.add(item)
    item.name = "edited"
    world.db.session.commit()
    assert world.names() == {"default": "default", "b": "edited"}
    assert item.parts[0].name == "b"


def test_its_own_bind_is_nothing_special(world: World) -> None:
    """A bind that owns the table is what would have been found: the object is the same."""
    own = world.db.session.get(world.Item, 1)
    engine = world.db.engines[None]
    assert world.db.session.get(world.Item, 1, bind_arguments={"bind": engine}) is own
    with engine.connect() as connection:
        assert world.db.session.get(world.Item, 1, bind_arguments={"bind": connection}) is own
    assert sa.inspect(own).identity_token is None


def test_an_engine_of_the_callers_own(world: World, tmp_path: Path) -> None:
    """An engine that is no bind's is the caller's affair, as in Flask-SQLAlchemy."""
    own = world.db.session.get(world.Item, 1)
    engine = sa.create_engine(f"sqlite:///{tmp_path}/b.db")
    assert world.db.session.scalar(sa.select(world.Item), bind_arguments={"bind": engine}) is own
    engine.dispose()


def test_owners_of_two_binds(world: World) -> None:
    """A statement over two owners has one server for both, as the caller says: no object moves."""
    own = world.db.session.get(world.Item, 1)
    with world.db.engines["b"].begin() as connection:
        connection.execute(sa.insert(world.Other.__table__).values(id=1))
    statement = sa.select(world.Item).join(world.Other, world.Other.id == world.Item.id)
    assert world.read_from_b(statement) is own


def test_a_token_of_the_callers_own(world: World) -> None:
    """Who tells objects apart himself is not interfered with."""
    item = world.db.session.get(world.Item, 1, bind_arguments=world.in_b, identity_token="mine")
    assert sa.inspect(item).identity_token == "mine"


def test_sessions_of_binds(world: World) -> None:
    """``db.sessions[key]``: the same row in the sessions of two binds is two objects anyway."""
    own = world.db.sessions[None].get(world.Item, 1)
    foreign = world.db.sessions["b"].get(world.Item, 1, bind_arguments=world.in_b)
    assert (own.name, foreign.name) == ("default", "b")
    foreign.name = "edited"
    world.db.sessions["b"].commit()
    assert world.names() == {"default": "default", "b": "edited"}


def test_the_token_says_which(world: World) -> None:
    """The identity of a foreign object names the bind that it was read from; it can be pickled."""
    token = sa.inspect(world.read_from_b()).identity_token
    assert pickle.loads(pickle.dumps(token)) == ForeignBind("b")
