"""Every shape of a statement reaches the server that owns its tables, and no other.

Owns: the same models for two binds, on MariaDB and on PostgreSQL. Both servers have the same
tables with other rows, so a wrong route is no error but wrong data: the server that has answered
is known by its rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import typing as t

import pytest
import sqlalchemy as sa
import sqlalchemy.orm as so
from flask import Flask
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects import postgresql

from flask_commondb import CommonDB
from flask_commondb import CrossBindError
from flask_commondb import WrongBindError

from .conftest import clean_database

if t.TYPE_CHECKING:
    from .servers import MariaDBCluster
    from .servers import PostgreSQLCluster
    from .servers import Row

# Query.get() warns, and is a shape like any other.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.LegacyAPIWarning")


class Base(so.DeclarativeBase):
    """The models of this module."""


db = CommonDB(model_class=Base)


# Models ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Models:
    """The same models for one bind.

    :param place: what its rows have in the column of that name.
    :param count: how many rows each table has; no other server has as many.
    """

    bind_key: str | None
    place: str
    count: int
    Node: t.Any
    Leaf: t.Any
    Person: t.Any
    Manager: t.Any
    Animal: t.Any
    Dog: t.Any
    #: No model is mapped to it.
    plain: t.Any

    @property
    def node(self) -> t.Any:
        return self.Node.__table__

    @property
    def leaf(self) -> t.Any:
        return self.Leaf.__table__


def make_models(bind_key: str | None, place: str, count: int) -> Models:
    def model(name: str, base: t.Any = None, /, **attributes: t.Any) -> t.Any:
        attributes.update(__module__=__name__, **({"__bind_key__": bind_key} if bind_key else {}))
        return type(f"{place}{name}", (base or db.Model,), attributes)

    def key(*constraints: t.Any) -> t.Any:
        arguments = constraints or (sa.Identity(start=50),)
        return so.mapped_column(sa.Integer, *arguments, primary_key=True)

    def text(*name: str, **options: t.Any) -> t.Any:
        arguments: list[t.Any] = [*name, sa.String(20)]
        return so.mapped_column(*arguments, **options)

    def children(lazy: t.Any) -> t.Any:
        return so.relationship(f"{place}Leaf", lazy=lazy, overlaps="leaves,node,dynamic")

    node = model(
        "Node",
        __tablename__="node",
        id=key(),
        place=text(),
        name=text(),
        deferred=text(deferred=True),
        parent_id=so.mapped_column(sa.Integer),
        leaves=so.relationship(f"{place}Leaf", back_populates="node"),
        dynamic=children("dynamic"),
        write_only=children("write_only"),
    )
    leaf = model(
        "Leaf",
        __tablename__="leaf",
        id=key(),
        place=text(),
        name=text(),
        node_id=so.mapped_column(sa.ForeignKey("node.id")),
        guest_id=so.mapped_column(sa.Integer),
        node=so.relationship(node, back_populates="leaves"),
        given=so.query_expression(),
    )
    person = model(
        "Person",
        __tablename__="person",
        id=key(),
        place=text(),
        name=text(),
        kind=text(),
        __mapper_args__={"polymorphic_on": "kind", "polymorphic_identity": "person"},
    )
    manager = model(
        "Manager",
        person,
        __tablename__="manager",
        id=key(sa.ForeignKey("person.id")),
        office=text("place"),
        title=text("name"),
        __mapper_args__={"polymorphic_identity": "manager"},
    )
    animal = model(
        "Animal",
        __tablename__="animal",
        id=key(),
        place=text(),
        name=text(),
        kind=text(),
        __mapper_args__={"polymorphic_on": "kind", "polymorphic_identity": "animal"},
    )
    dog = model("Dog", animal, __mapper_args__={"polymorphic_identity": "dog"})
    plain = db.Table(
        "plain",
        sa.Column("id", sa.Integer, sa.Identity(start=50), primary_key=True),
        sa.Column("place", sa.String(20)),
        sa.Column("name", sa.String(20)),
        bind_key=bind_key,
    )
    return Models(bind_key, place, count, node, leaf, person, manager, animal, dog, plain)


def lets_guests_in(here: Models, there: Models) -> None:
    """Give the leaves of one bind a relationship to the nodes of another, and back."""
    here.Leaf.guest = so.relationship(
        there.Node,
        primaryjoin=so.foreign(here.leaf.c.guest_id) == there.node.c.id,
        back_populates="hosts",
    )
    there.Node.hosts = so.relationship(
        here.Leaf,
        primaryjoin=so.foreign(here.leaf.c.guest_id) == there.node.c.id,
        back_populates="guest",
    )


MAIN = make_models(None, "MariaDB", 2)
ORDERS = make_models("orders", "PostgreSQL", 3)
BOTH = (MAIN, ORDERS)
OTHER = {None: ORDERS, "orders": MAIN}
lets_guests_in(MAIN, ORDERS)
lets_guests_in(ORDERS, MAIN)
so.configure_mappers()

PLACES = {m.count: m.place for m in BOTH}
TABLES = ("node", "leaf", "person", "manager", "animal", "plain")


def first_rows(m: Models) -> dict[str, list[dict[str, t.Any]]]:
    """What the tables of a bind have when a test begins."""
    rows: list[dict[str, t.Any]] = [
        {"id": n, "place": m.place, "name": f"row {n}"} for n in range(1, m.count + 1)
    ]
    return {
        "node": [{**row, "deferred": m.place, "parent_id": row["id"] - 1} for row in rows],
        "leaf": [{**row, "node_id": 1, "guest_id": row["id"]} for row in rows],
        "person": [{**row, "kind": "manager"} for row in rows],
        "manager": rows,
        "animal": [{**row, "kind": "dog"} for row in rows],
        "plain": rows,
    }


def places(answer: t.Any) -> t.Iterator[str]:
    """Where each value of an answer comes from; a number is a count of rows."""
    if isinstance(answer, str):
        yield answer
    elif isinstance(answer, int):
        yield PLACES[answer]
    elif isinstance(answer, t.Iterable):
        for value in answer:
            yield from places(value)
    else:
        yield answer.place


# Servers --------------------------------------------------------------------------------------


class World:
    """An app, and its two servers as they are without it."""

    def __init__(self, urls: t.Mapping[str | None, str]) -> None:
        self.app = Flask(__name__)
        self.app.config["SQLALCHEMY_DATABASE_URI"] = urls[None]
        self.app.config["SQLALCHEMY_BINDS"] = {"orders": urls["orders"]}
        db.init_app(self.app)
        with self.app.app_context():
            db.create_all()
            self.engines = dict(db.engines)
            for engine in self.engines.values():
                sa.event.listen(engine, "commit", self._note_commit)
        self._own = {
            key: sa.create_engine(url, isolation_level="AUTOCOMMIT") for key, url in urls.items()
        }
        for m in BOTH:
            self._fill(m)
        self.first = {key: self.rows(key) for key in urls}
        self._has_committed = False

    def rows(self, bind_key: str | None) -> frozenset[Row]:
        """All rows of a server, by a connection of our own: table, id, place and name."""
        selects = [f"SELECT '{table}', id, place, name FROM {table}" for table in TABLES]
        with self._own[bind_key].connect() as connection:
            return frozenset(map(tuple, connection.execute(sa.text(" UNION ALL ".join(selects)))))

    def changes(self, m: Models) -> tuple[frozenset[Row], frozenset[Row]]:
        """The rows that one server has gained and lost; the other must have done neither."""
        other = OTHER[m.bind_key].bind_key
        assert self.rows(other) == self.first[other]
        now, first = self.rows(m.bind_key), self.first[m.bind_key]
        return now - first, first - now

    def is_untouched(self) -> bool:
        return all(self.rows(key) == rows for key, rows in self.first.items())

    def restore(self) -> None:
        """Put the first rows back where the app has changed them."""
        for m in BOTH if self._has_committed else ():
            if self.rows(m.bind_key) != self.first[m.bind_key]:
                self._fill(m)
        self._has_committed = False

    def dispose(self) -> None:
        for engine in (*self.engines.values(), *self._own.values()):
            engine.dispose()

    @contextlib.contextmanager
    def nothing_sent(self) -> t.Iterator[None]:
        """Holds the app to send no statement to any server inside the block."""
        sent: list[str] = []

        def note(connection: t.Any, cursor: t.Any, statement: str, *_: t.Any) -> None:
            sent.append(statement)

        with contextlib.ExitStack() as stack:
            for engine in self.engines.values():
                sa.event.listen(engine, "before_cursor_execute", note)
                stack.callback(sa.event.remove, engine, "before_cursor_execute", note)
            yield
        assert sent == []

    def checked_out(self) -> int:
        return sum(t.cast(sa.QueuePool, e.pool).checkedout() for e in self.engines.values())

    def _note_commit(self, connection: sa.Connection) -> None:
        self._has_committed = True

    def _fill(self, m: Models) -> None:
        with self._own[m.bind_key].connect() as connection:
            tables = db.metadatas[m.bind_key].sorted_tables
            for table in reversed(tables):
                connection.execute(sa.delete(table))
            for table in tables:
                connection.execute(sa.insert(table), first_rows(m)[table.name])


@pytest.fixture(scope="module")
def world(mariadb: MariaDBCluster, postgresql: PostgreSQLCluster) -> t.Iterator[World]:
    with clean_database(mariadb) as main, clean_database(postgresql) as orders:
        world = World({None: main.primary_url, "orders": orders.primary_url})
        yield world
        world.dispose()


@pytest.fixture(autouse=True)
def _in_context(world: World) -> t.Iterator[None]:
    with world.app.app_context():
        yield
    assert world.checked_out() == 0
    world.restore()


#: The two sessions that a statement of a bind can be given to.
SESSIONS: dict[str, t.Callable[[Models], t.Any]] = {
    "db.session": lambda m: db.session,
    "db.sessions[key]": lambda m: db.sessions[m.bind_key],
}

on_each_bind = pytest.mark.parametrize("models", BOTH, ids=["default", "orders"])
in_each_session = pytest.mark.parametrize("session_of", SESSIONS.values(), ids=list(SESSIONS))


# Reads ----------------------------------------------------------------------------------------


def recursive_cte(m: Models) -> t.Any:
    tree = sa.select(m.Node.id, m.Node.place).where(m.Node.id == 1).cte("tree", recursive=True)
    below = sa.select(m.Node.id, m.Node.place).join(tree, m.Node.parent_id == tree.c.id)
    return sa.select(tree.union_all(below).c.place)


def lambda_statement(m: Models) -> t.Any:
    table = m.plain
    return sa.lambda_stmt(lambda: sa.select(table.c.place), track_on=[table])


def numbers() -> t.Any:
    return sa.values(sa.column("x", sa.Integer), name="numbers").data([(1,), (2,)])


#: Statements that read; each selects places, counts, or objects that have a place.
SELECTS: dict[str, t.Callable[[Models], t.Any]] = {
    "entity": lambda m: sa.select(m.Node),
    "entity, filtered": lambda m: sa.select(m.Node).where(m.Node.id > 0).order_by(m.Node.name),
    "two entities": lambda m: sa.select(m.Node, m.Leaf).join(m.Node.leaves),
    "column": lambda m: sa.select(m.Node.place),
    "label": lambda m: sa.select(m.Node.place.label("x")).order_by("x"),
    "bundle": lambda m: sa.select(so.Bundle("both", m.Node.place, m.Node.place.label("x"))),
    "alias": lambda m: sa.select(so.aliased(m.Node)),
    "alias of a subquery": lambda m: sa.select(so.aliased(m.Node, sa.select(m.Node).subquery())),
    "aliased subclass": lambda m: sa.select(so.aliased(m.Manager)),
    "joined inheritance": lambda m: sa.select(m.Person),
    "joined inheritance, subclass": lambda m: sa.select(m.Manager),
    "joined inheritance, own column": lambda m: sa.select(m.Manager.office),
    "joined inheritance, base column": lambda m: sa.select(m.Manager.place),
    "single-table inheritance": lambda m: sa.select(m.Animal),
    "single-table inheritance, subclass": lambda m: sa.select(m.Dog),
    "with_polymorphic": lambda m: sa.select(so.with_polymorphic(m.Person, "*")),
    "selectin_polymorphic": lambda m: sa.select(m.Person).options(
        so.selectin_polymorphic(m.Person, [m.Manager])
    ),
    "relationship join": lambda m: sa.select(m.Leaf.place).join(m.Leaf.node),
    "relationship outer join": lambda m: sa.select(m.Leaf.place).outerjoin(m.Leaf.node),
    "relationship any": lambda m: sa.select(m.Node).where(m.Node.leaves.any()),
    "relationship has": lambda m: sa.select(m.Leaf).where(m.Leaf.node.has(name="row 1")),
    "with_parent": lambda m: sa.select(m.Leaf).where(so.with_parent(m.Node(id=1), m.Node.leaves)),
    "Core select": lambda m: sa.select(m.plain.c.place, m.plain.c.place.label("x")),
    "Core select of a model's table": lambda m: sa.select(m.node.c.place),
    "Core alias": lambda m: sa.select(m.plain.alias().c.place),
    "Core join": lambda m: sa.select(
        sa.join(m.plain, m.leaf, m.plain.c.id == m.leaf.c.id).c.plain_place
    ),
    "Core outer join": lambda m: sa.select(m.plain.c.place, m.leaf.c.place).outerjoin_from(
        m.plain, m.leaf, m.plain.c.id == m.leaf.c.id
    ),
    "union, Core": lambda m: sa.union(sa.select(m.plain.c.place), sa.select(m.leaf.c.place)),
    "union": lambda m: sa.union(sa.select(m.plain.c.place), sa.select(m.Leaf.place)),
    "union_all": lambda m: sa.select(m.Node.place).union_all(sa.select(m.plain.c.place)),
    "intersect": lambda m: sa.intersect(sa.select(m.plain.c.place), sa.select(m.Leaf.place)),
    "union, ordered and limited": lambda m: (
        sa.union(sa.select(m.plain.c.place), sa.select(m.Leaf.place)).order_by("place").limit(1)
    ),
    "entities of a union": lambda m: sa.select(m.Node).from_statement(
        sa.union(sa.select(m.Node), sa.select(m.Node))
    ),
    "entities of a subquery of a union": lambda m: sa.select(
        so.aliased(m.Node, sa.union_all(sa.select(m.Node), sa.select(m.Node)).subquery())
    ),
    "CTE": lambda m: sa.select(sa.select(m.plain.c.place).cte("c")),
    "CTE twice": lambda m: sa.select(sa.select(sa.select(m.Node.place).cte("a")).cte("b")),
    "CTE beside": lambda m: sa.select(m.plain.c.place).add_cte(sa.select(m.Node.id).cte("beside")),
    "recursive CTE": recursive_cte,
    "subquery": lambda m: sa.select(sa.select(m.plain.c.place).subquery()),
    "subquery twice": lambda m: sa.select(
        sa.select(sa.select(m.plain.c.place).subquery()).subquery()
    ),
    "scalar subquery": lambda m: sa.select(
        sa.select(m.plain.c.place).where(m.plain.c.id == 1).scalar_subquery()
    ),
    "correlated subquery": lambda m: sa.select(
        sa.select(m.plain.c.place).where(m.plain.c.id == m.Node.id).scalar_subquery()
    ).select_from(m.Node),
    "lateral": lambda m: sa.select(
        sa.lateral(sa.select(m.leaf.c.place).where(m.leaf.c.node_id == m.node.c.id))
    ).select_from(m.node),
    "exists": lambda m: sa.select(sa.literal(m.place)).where(
        sa.exists().where(m.plain.c.place == m.place)
    ),
    "correlated exists": lambda m: sa.select(m.Node).where(
        sa.select(m.Leaf.id).where(m.Leaf.node_id == m.Node.id).exists()
    ),
    "not exists": lambda m: sa.select(m.Node).where(
        ~sa.select(m.plain.c.id).where(m.plain.c.id == m.Node.id + 9).exists()
    ),
    "in": lambda m: sa.select(m.Node).where(m.Node.id.in_(sa.select(m.plain.c.id))),
    "tuple in": lambda m: sa.select(m.plain.c.place).where(
        sa.tuple_(m.plain.c.id, m.plain.c.name).in_(sa.select(m.Node.id, m.Node.name))
    ),
    "any": lambda m: sa.select(m.plain.c.place).where(
        m.plain.c.id == sa.any_(sa.select(m.leaf.c.id).scalar_subquery())
    ),
    "count": lambda m: sa.select(sa.func.count()).select_from(m.plain),
    "count of entities": lambda m: sa.select(sa.func.count()).select_from(m.Node),
    "count of a column": lambda m: sa.select(sa.func.count(sa.distinct(m.plain.c.id))),
    "maximum": lambda m: sa.select(sa.func.max(m.plain.c.place)),
    "function": lambda m: sa.func.max(m.Node.place),
    "function, Core": lambda m: sa.func.max(m.plain.c.place),
    "group by": lambda m: (
        sa.select(m.plain.c.place, sa.func.count())
        .group_by(m.plain.c.place)
        .having(sa.func.count() > 1)
    ),
    "distinct": lambda m: sa.select(m.plain.c.place).distinct(),
    "limit and offset": lambda m: sa.select(m.Node).order_by(m.Node.id).limit(1).offset(1),
    "window": lambda m: sa.select(
        sa.func.first_value(m.plain.c.place).over(order_by=m.plain.c.id),
        sa.func.count().over(),
    ).select_from(m.plain),
    "values": lambda m: (lambda v: sa.select(m.plain.c.place).join(v, v.c.x == m.plain.c.id))(
        numbers()
    ),
    "only a filter": lambda m: sa.select(sa.literal(m.place)).where(m.plain.c.place == m.place),
    "literal and column": lambda m: sa.select(sa.literal(m.place), m.plain.c.place),
    "literal_column": lambda m: sa.select(sa.literal_column("place")).select_from(m.plain),
    "case": lambda m: sa.select(sa.case((m.plain.c.id == 1, m.plain.c.place), else_=m.place)),
    "cast": lambda m: sa.select(sa.cast(m.plain.c.place, sa.String(20))),
    "for update": lambda m: sa.select(m.Node).with_for_update(),
    "text in a where": lambda m: sa.select(m.plain.c.place).where(sa.text("id = 1")),
    "text as a column": lambda m: sa.select(sa.text("place")).select_from(m.plain),
    "text into columns": lambda m: sa.text("SELECT place FROM plain").columns(m.plain.c.place),
    "text into attributes": lambda m: sa.text("SELECT place FROM node").columns(m.Node.place),
    "text into entities": lambda m: sa.select(m.Node).from_statement(sa.text("SELECT * FROM node")),
    "lambda": lambda_statement,
    "Query": lambda m: so.Query(m.Node).filter(m.Node.id == 1).statement,
    "writing CTE": lambda m: sa.select(
        sa.update(m.plain).values(name="x").returning(m.plain.c.place).cte("changed")
    ),
}

#: What MariaDB does not have.
ONLY_POSTGRESQL = {"lateral", "values", "writing CTE"}


def on_binds_that_can(shapes: t.Iterable[str]) -> pytest.MarkDecorator:
    pairs = [
        pytest.param(name, m, id=f"{m.bind_key or 'default'}-{name}")
        for name, m in itertools.product(shapes, BOTH)
        if m is ORDERS or name not in ONLY_POSTGRESQL
    ]
    return pytest.mark.parametrize(("name", "models"), pairs)


@in_each_session
@on_binds_that_can(SELECTS)
def test_select(name: str, models: Models, session_of: t.Callable[[Models], t.Any]) -> None:
    """Whatever a statement that reads looks like, the server answers that owns its tables."""
    result = session_of(models).execute(SELECTS[name](models)).unique()
    assert set(places(result)) == {models.place}


Use = t.Callable[[t.Any, Models], t.Any]


def expired(session: t.Any, instance: t.Any) -> t.Any:
    session.expire(instance)
    return instance


def refreshed(session: t.Any, instance: t.Any) -> t.Any:
    instance.place = "changed in memory"
    session.refresh(instance)
    return instance


def committed(session: t.Any, instance: t.Any) -> t.Any:
    session.commit()
    return instance


def detached(session: t.Any, instance: t.Any) -> t.Any:
    session.expunge(instance)
    return instance


#: What else a session reads by: `s` is the session.
READS: dict[str, Use] = {
    "execute": lambda s, m: s.execute(sa.select(m.Node)),
    "scalars": lambda s, m: s.scalars(sa.select(m.plain.c.place)),
    "scalar": lambda s, m: s.scalar(sa.select(m.plain.c.place)),
    "select of exists": lambda s, m: (
        s.scalar(sa.select(sa.exists().where(m.plain.c.place == m.place))) and m.place
    ),
    "get": lambda s, m: s.get(m.Node, 1),
    "get, joined inheritance": lambda s, m: s.get(m.Person, 1).office,
    "get, single-table inheritance": lambda s, m: s.get(m.Dog, 1),
    "get, locked": lambda s, m: s.get(m.Node, 1, with_for_update=True),
    "get_one": lambda s, m: s.get_one(m.Node, 1),
    "refresh": lambda s, m: refreshed(s, s.get(m.Node, 1)),
    "refresh, joined inheritance": lambda s, m: refreshed(s, s.get(m.Manager, 1)),
    "expired": lambda s, m: expired(s, s.get(m.Node, 1)),
    "expired, joined inheritance": lambda s, m: expired(s, s.get(m.Manager, 1)).office,
    "after a commit": lambda s, m: committed(s, s.get(m.Node, 1)),
    "populate_existing": lambda s, m: s.scalars(
        sa.select(m.Node).execution_options(populate_existing=True)
    ),
    "merge": lambda s, m: s.merge(m.Node(id=1)),
    "merge of a detached object": lambda s, m: s.merge(detached(s, s.get(m.Node, 1))),
    "deferred column": lambda s, m: s.get(m.Node, 1).deferred,
    "column loaded later": lambda s, m: s.get(m.Node, 1, options=[so.load_only(m.Node.id)]),
    "subclass loaded later": lambda s, m: [
        person.office for person in s.scalars(sa.select(m.Person))
    ],
    "lazy load, one-to-many": lambda s, m: s.get(m.Node, 1).leaves,
    "lazy load, many-to-one": lambda s, m: s.get(m.Leaf, 1).node,
    "selectinload": lambda s, m: s.get(m.Node, 1, options=[so.selectinload(m.Node.leaves)]).leaves,
    "selectinload, many-to-one": lambda s, m: (
        s.get(m.Leaf, 1, options=[so.selectinload(m.Leaf.node)]).node
    ),
    "joinedload": lambda s, m: s.get(m.Node, 1, options=[so.joinedload(m.Node.leaves)]).leaves,
    "joinedload, many-to-one": lambda s, m: (
        s.get(m.Leaf, 1, options=[so.joinedload(m.Leaf.node)]).node
    ),
    "subqueryload": lambda s, m: s.get(m.Node, 1, options=[so.subqueryload(m.Node.leaves)]).leaves,
    "immediateload": lambda s, m: (
        s.get(m.Node, 1, options=[so.immediateload(m.Node.leaves)]).leaves
    ),
    "contains_eager": lambda s, m: [
        leaf.node
        for leaf in s.scalars(
            sa.select(m.Leaf).join(m.Leaf.node).options(so.contains_eager(m.Leaf.node))
        )
    ],
    "dynamic": lambda s, m: s.get(m.Node, 1).dynamic.filter(m.Leaf.id > 0),
    "dynamic, counted": lambda s, m: s.get(m.Node, 1).dynamic.count(),
    "write-only": lambda s, m: s.scalars(s.get(m.Node, 1).write_only.select()),
    "rows in portions": lambda s, m: s.scalars(sa.select(m.Node).execution_options(yield_per=1)),
    "connection of a mapper": lambda s, m: (
        s.connection(bind_arguments={"mapper": m.Node}).execute(sa.select(m.node.c.place)).scalars()
    ),
    "in a savepoint": lambda s, m: s.begin_nested() and s.scalars(sa.select(m.plain.c.place)),
    "Query": lambda s, m: s.query(m.Node),
    "Query, columns": lambda s, m: s.query(m.Node.place, m.Node.place.label("x")),
    "Query, Core column": lambda s, m: s.query(m.plain.c.place),
    "Query, count": lambda s, m: s.query(m.Node).count(),
    "Query, filtered": lambda s, m: s.query(m.Node).filter(m.Node.id == 1).first(),
    "Query, filter_by": lambda s, m: s.query(m.Dog).filter_by(id=1).one(),
    "Query, get": lambda s, m: s.query(m.Node).get(1),
    "Query, exists": lambda s, m: (
        s.query(s.query(m.Node).filter_by(place=m.place).exists()).scalar() and m.place
    ),
    "Query, with_entities": lambda s, m: s.query(m.Node).with_entities(m.Node.place),
    "Query, join": lambda s, m: s.query(m.Node, m.Leaf.place).join(m.Node.leaves),
    "Query, select_from": lambda s, m: s.query(sa.func.count()).select_from(m.plain),
    "Query, subquery": lambda s, m: s.query(s.query(m.Node.place).subquery()),
    "Query, union": lambda s, m: s.query(m.Node).union(s.query(m.Node)),
    "Query, from_statement": lambda s, m: s.query(m.Node).from_statement(sa.select(m.node)),
    "Query, joinedload": lambda s, m: [
        node.leaves
        for node in s.query(m.Node).filter_by(id=1).options(so.joinedload(m.Node.leaves))
    ],
    "Query, paginate": lambda s, m: s.query(m.Node).paginate(per_page=1).total,
}

#: What Flask-SQLAlchemy reads by; it is always `db.session`.
FLASK: dict[str, t.Callable[[Models], t.Any]] = {
    "paginate": lambda m: db.paginate(sa.select(m.Node), per_page=1),
    "paginate, total": lambda m: db.paginate(sa.select(m.Node), per_page=1).total,
    "paginate, Core": lambda m: db.paginate(sa.select(m.plain.c.place)),
    "get_or_404": lambda m: db.get_or_404(m.Node, 1),
    "first_or_404": lambda m: db.first_or_404(sa.select(m.plain.c.place)),
    "one_or_404": lambda m: db.one_or_404(sa.select(m.Node).filter_by(id=1)),
    "Model.query": lambda m: m.Node.query,
    "Model.query, count": lambda m: m.Node.query.count(),
    "Model.query, get_or_404": lambda m: m.Node.query.get_or_404(1),
    "Model.query, first_or_404": lambda m: m.Manager.query.first_or_404().office,
    "Model.query, paginate": lambda m: m.Node.query.paginate(per_page=1),
}


@in_each_session
@on_each_bind
@pytest.mark.parametrize("name", READS)
def test_read(name: str, models: Models, session_of: t.Callable[[Models], t.Any]) -> None:
    """By whichever method a session reads, the server answers that owns the tables."""
    assert set(places(READS[name](session_of(models), models))) == {models.place}


@on_each_bind
@pytest.mark.parametrize("name", FLASK)
def test_flask_read(name: str, models: Models) -> None:
    """Flask-SQLAlchemy's own ways to read are answered by the owner, too."""
    assert set(places(FLASK[name](models))) == {models.place}


# Writes ---------------------------------------------------------------------------------------


def new(m: Models, **values: t.Any) -> dict[str, t.Any]:
    return {"place": m.place, "name": "new", **values}


def upsert(m: Models, table: t.Any, name: t.Any) -> t.Any:
    """Change the name of the first row, by an insert."""
    row = {"id": 1, "place": m.place}
    if m is MAIN:
        return mysql.insert(table).values(row).on_duplicate_key_update(name=name)
    insert = postgresql.insert(table).values(row)
    return insert.on_conflict_do_update(index_elements=["id"], set_={"name": name})


def changed(instance: t.Any) -> t.Any:
    instance.name = "changed"
    return instance


INSERTS: dict[str, Use] = {
    "Core": lambda s, m: s.execute(sa.insert(m.plain).values(new(m))),
    "Core, parameters": lambda s, m: s.execute(sa.insert(m.plain), new(m)),
    "Core, two rows": lambda s, m: s.execute(sa.insert(m.plain), [new(m), new(m)]),
    "Core, VALUES of two rows": lambda s, m: s.execute(sa.insert(m.plain).values([new(m)] * 2)),
    "Core, returning": lambda s, m: s.execute(
        sa.insert(m.plain).values(new(m)).returning(m.plain.c.id)
    ),
    "Core, from a select": lambda s, m: s.execute(
        sa.insert(m.plain).from_select(
            ["place", "name"], sa.select(m.Node.place, sa.literal("new")).where(m.Node.id == 1)
        )
    ),
    "Core, of a subquery": lambda s, m: s.execute(
        sa.insert(m.plain).values(
            place=sa.select(sa.func.max(m.Leaf.place)).scalar_subquery(), name="new"
        )
    ),
    "ORM": lambda s, m: s.execute(sa.insert(m.Node).values(new(m))),
    "ORM, two rows": lambda s, m: s.execute(sa.insert(m.Node), [new(m), new(m)]),
    "ORM, returning": lambda s, m: s.scalars(
        sa.insert(m.Node).values(new(m)).returning(m.Node)
    ).one(),
    "ORM, two rows of a subclass": lambda s, m: s.execute(
        sa.insert(m.Manager), [new(m, office=m.place, title="new")]
    ),
    "ORM, from a select": lambda s, m: s.execute(
        sa.insert(m.Node).from_select(
            ["place", "name"], sa.select(m.plain.c.place, sa.literal("new")).limit(1)
        )
    ),
    "add": lambda s, m: s.add(m.Node(**new(m))),
    "add_all, two rows": lambda s, m: s.add_all([m.Node(**new(m)), m.Leaf(**new(m))]),
    "add, two rows of a subclass": lambda s, m: s.add(
        m.Manager(**new(m, office=m.place, title="new"))
    ),
    "add, single-table inheritance": lambda s, m: s.add(m.Dog(**new(m))),
    "add, two rows by cascade": lambda s, m: s.add(m.Node(**new(m), leaves=[m.Leaf(**new(m))])),
    "append": lambda s, m: s.add(m.Leaf(**new(m), node=s.get(m.Node, 1))),
    "append, dynamic": lambda s, m: s.get(m.Node, 1).dynamic.append(m.Leaf(**new(m))),
    "append, write-only": lambda s, m: s.get(m.Node, 1).write_only.add(m.Leaf(**new(m))),
    "insert, write-only": lambda s, m: s.execute(s.get(m.Node, 1).write_only.insert(), [new(m)]),
    "merge": lambda s, m: s.merge(m.Node(**new(m, id=9))),
    "bulk_save_objects": lambda s, m: s.bulk_save_objects([m.Node(**new(m))]),
    "bulk_insert_mappings": lambda s, m: s.bulk_insert_mappings(m.Node, [new(m)]),
    "bulk_insert_mappings, two rows of a subclass": lambda s, m: s.bulk_insert_mappings(
        m.Manager, [new(m, office=m.place, title="new")]
    ),
    "savepoint": lambda s, m: s.begin_nested() and s.add(m.Node(**new(m))),
    "connection of a mapper": lambda s, m: s.connection({"mapper": m.Node}).execute(
        sa.insert(m.node), new(m)
    ),
}

UPDATES: dict[str, Use] = {
    "Core": lambda s, m: s.execute(sa.update(m.plain).values(name="changed").filter_by(id=1)),
    "Core, by a subquery": lambda s, m: s.execute(
        sa.update(m.plain)
        .values(name="changed")
        .where(m.plain.c.id.in_(sa.select(sa.func.min(m.Node.id))))
    ),
    "Core, to a subquery": lambda s, m: s.execute(
        sa.update(m.plain)
        .values(name=sa.select(sa.literal("changed")).where(m.Node.id == 1).scalar_subquery())
        .where(m.plain.c.id == 1)
    ),
    "Core, from another table": lambda s, m: s.execute(
        sa.update(m.plain)
        .values(name="changed")
        .where(m.plain.c.id == m.leaf.c.id, m.leaf.c.name == "row 1")
    ),
    "Core, two rows by parameters": lambda s, m: s.execute(
        sa.update(m.plain).where(m.plain.c.id == sa.bindparam("key")).values(name="changed"),
        [{"key": 1}, {"key": 2}],
    ),
    "Core, upsert": lambda s, m: s.execute(upsert(m, m.plain, "changed")),
    "ORM": lambda s, m: s.execute(sa.update(m.Node).values(name="changed").filter_by(id=1)),
    "ORM, fetched": lambda s, m: s.execute(
        sa.update(m.Node).values(name="changed").where(m.Node.id == 1),
        execution_options={"synchronize_session": "fetch"},
    ),
    "ORM, by a subquery": lambda s, m: s.execute(
        sa.update(m.Node)
        .values(name="changed")
        .where(m.Node.id == sa.select(sa.func.min(m.Leaf.id)).scalar_subquery())
    ),
    "ORM, two rows by primary key": lambda s, m: s.execute(
        sa.update(m.Node), [{"id": 1, "name": "changed"}, {"id": 2, "name": "changed"}]
    ),
    "ORM, subclass": lambda s, m: s.execute(
        sa.update(m.Manager).values(title="changed").where(m.Manager.id == 1)
    ),
    "ORM, single-table inheritance": lambda s, m: s.execute(
        sa.update(m.Dog).values(name="changed").where(m.Dog.id == 1)
    ),
    "flush": lambda s, m: changed(s.get(m.Node, 1)),
    "flush of an expression": lambda s, m: setattr(
        s.get(m.Node, 1), "name", sa.func.concat("chan", "ged")
    ),
    "flush, two rows of a subclass": lambda s, m: setattr(
        changed(s.get(m.Manager, 1)), "title", "changed"
    ),
    "flush of what was loaded eagerly": lambda s, m: changed(
        s.get(m.Node, 1, options=[so.joinedload(m.Node.leaves)]).leaves[0]
    ),
    "merge": lambda s, m: s.merge(m.Node(id=1, name="changed")),
    "add of a detached object": lambda s, m: s.add(changed(detached(s, s.get(m.Node, 1)))),
    "bulk_save_objects": lambda s, m: s.bulk_save_objects([changed(detached(s, s.get(m.Node, 1)))]),
    "bulk_update_mappings": lambda s, m: s.bulk_update_mappings(
        m.Node, [{"id": 1, "name": "changed"}]
    ),
    "write-only": lambda s, m: s.execute(
        s.get(m.Node, 1).write_only.update().values(name="changed").where(m.Leaf.id == 1)
    ),
    "Query": lambda s, m: s.query(m.Node).filter(m.Node.id == 1).update({"name": "changed"}),
    "Query, fetched": lambda s, m: (
        s.query(m.Node)
        .filter(m.Node.id.in_(sa.select(sa.func.min(m.Leaf.id))))
        .update({"name": "changed"}, synchronize_session="fetch")
    ),
}

DELETES: dict[str, Use] = {
    "Core": lambda s, m: s.execute(sa.delete(m.plain).where(m.plain.c.id == 1)),
    "Core, by a subquery": lambda s, m: s.execute(
        sa.delete(m.plain).where(m.plain.c.id.in_(sa.select(sa.func.min(m.Node.id))))
    ),
    "Core, using another table": lambda s, m: s.execute(
        sa.delete(m.plain).where(m.plain.c.id == m.leaf.c.id, m.leaf.c.name == "row 1")
    ),
    "Core, returning": lambda s, m: s.execute(
        sa.delete(m.plain).where(m.plain.c.id == 1).returning(m.plain.c.place)
    ),
    "ORM": lambda s, m: s.execute(sa.delete(m.Leaf).where(m.Leaf.id == 1)),
    "ORM, fetched": lambda s, m: s.execute(
        sa.delete(m.Leaf).where(m.Leaf.id == 1),
        execution_options={"synchronize_session": "fetch"},
    ),
    "ORM, by a subquery": lambda s, m: s.execute(
        sa.delete(m.Leaf).where(m.Leaf.id.in_(sa.select(sa.func.min(m.Node.id))))
    ),
    "ORM, single-table inheritance": lambda s, m: s.execute(sa.delete(m.Dog).where(m.Dog.id == 1)),
    "flush": lambda s, m: s.delete(s.get(m.Leaf, 1)),
    "flush, two rows of a subclass": lambda s, m: s.delete(s.get(m.Manager, 1)),
    "write-only": lambda s, m: s.execute(
        s.get(m.Node, 1).write_only.delete().where(m.Leaf.id == 1)
    ),
    "Query": lambda s, m: s.query(m.Leaf).filter(m.Leaf.id == 1).delete(),
    "Query, by a subquery": lambda s, m: (
        s.query(m.Leaf)
        .filter(m.Leaf.id.in_(s.query(sa.func.min(m.Node.id)).scalar_subquery()))
        .delete(synchronize_session=False)
    ),
}


def run(use: Use, models: Models, session_of: t.Callable[[Models], t.Any]) -> None:
    session = session_of(models)
    use(session, models)
    session.commit()


def how_many(name: str) -> int:
    return 2 if "two rows" in name else 1


@in_each_session
@on_each_bind
@pytest.mark.parametrize("name", INSERTS)
def test_insert(
    name: str, models: Models, session_of: t.Callable[[Models], t.Any], world: World
) -> None:
    """However a row is inserted, the owner has it, and the other server is as it was."""
    run(INSERTS[name], models, session_of)
    gained, lost = world.changes(models)
    assert len(gained) == how_many(name)
    assert {row[2:] for row in gained} == {(models.place, "new")}
    assert lost == frozenset()


@in_each_session
@on_each_bind
@pytest.mark.parametrize("name", UPDATES)
def test_update(
    name: str, models: Models, session_of: t.Callable[[Models], t.Any], world: World
) -> None:
    """However a row is changed, it is the owner's, and the other server is as it was."""
    run(UPDATES[name], models, session_of)
    gained, lost = world.changes(models)
    assert len(lost) == how_many(name)
    assert gained == {(table, key, place, "changed") for table, key, place, _ in lost}


@in_each_session
@on_each_bind
@pytest.mark.parametrize("name", DELETES)
def test_delete(
    name: str, models: Models, session_of: t.Callable[[Models], t.Any], world: World
) -> None:
    """However a row is deleted, it is the owner's, and the other server is as it was."""
    run(DELETES[name], models, session_of)
    gained, lost = world.changes(models)
    assert len(lost) == how_many(name)
    assert gained == frozenset()


# Several binds in one statement -----------------------------------------------------------------

Cross = t.Callable[[t.Any, Models, Models], t.Any]


def name_of_a_node(m: Models) -> t.Any:
    return sa.select(m.Node.name).where(m.Node.id == 1).scalar_subquery()


#: Of bind `a` each names the table of leaves, of bind `b` that of nodes.
CROSSING: dict[str, Cross] = {
    "entities": lambda s, a, b: s.execute(sa.select(a.Leaf, b.Node)),
    "columns": lambda s, a, b: s.execute(sa.select(a.Leaf.id, b.Node.id)),
    "Core columns": lambda s, a, b: s.execute(sa.select(a.leaf.c.id, b.node.c.id)),
    "bundle": lambda s, a, b: s.execute(sa.select(so.Bundle("both", a.Leaf.id, b.Node.id))),
    "alias": lambda s, a, b: s.execute(sa.select(a.Leaf, so.aliased(b.Node))),
    "alias of another's table": lambda s, a, b: s.execute(sa.select(so.aliased(a.Leaf, b.node))),
    "join": lambda s, a, b: s.execute(sa.select(a.leaf.c.id).join(b.node, sa.true())),
    "outer join": lambda s, a, b: s.execute(
        sa.select(a.Leaf).outerjoin(b.Node, a.Leaf.id == b.Node.id)
    ),
    "relationship join": lambda s, a, b: s.execute(sa.select(a.Leaf).join(a.Leaf.guest)),
    "relationship has": lambda s, a, b: s.execute(sa.select(a.Leaf).where(a.Leaf.guest.has())),
    "relationship any": lambda s, a, b: s.execute(sa.select(b.Node).where(b.Node.hosts.any())),
    "contains_eager": lambda s, a, b: s.execute(
        sa.select(a.Leaf).join(a.Leaf.guest).options(so.contains_eager(a.Leaf.guest))
    ),
    "where": lambda s, a, b: s.execute(sa.select(a.Leaf.id).where(a.Leaf.id == b.Node.id)),
    "order": lambda s, a, b: s.execute(sa.select(a.Leaf.id).order_by(name_of_a_node(b))),
    "limit": lambda s, a, b: s.execute(
        sa.select(a.Leaf).limit(sa.select(sa.func.min(b.Node.id)).scalar_subquery())
    ),
    "union, Core": lambda s, a, b: s.execute(
        sa.union(sa.select(a.leaf.c.id), sa.select(b.node.c.id))
    ),
    "union": lambda s, a, b: s.execute(sa.union(sa.select(a.Leaf.id), sa.select(b.Node.id))),
    "union in a subquery": lambda s, a, b: s.execute(
        sa.select(sa.union(sa.select(a.Leaf.id), sa.select(b.Node.id)).subquery())
    ),
    "subquery": lambda s, a, b: s.execute(sa.select(a.Leaf, sa.select(b.Node.id).subquery())),
    "scalar subquery": lambda s, a, b: s.execute(sa.select(a.Leaf, name_of_a_node(b))),
    "function": lambda s, a, b: s.scalar(sa.func.coalesce(a.Leaf.name, b.Node.name)),
    "in": lambda s, a, b: s.execute(sa.select(a.Leaf).where(a.Leaf.id.in_(sa.select(b.Node.id)))),
    "exists": lambda s, a, b: s.execute(sa.select(a.Leaf).where(sa.exists().where(b.Node.id == 1))),
    "CTE": lambda s, a, b: s.execute(sa.select(a.Leaf.id, sa.select(b.Node.id).cte())),
    "CTE beside": lambda s, a, b: s.execute(sa.select(a.Leaf).add_cte(sa.select(b.Node.id).cte())),
    "entities of another's table": lambda s, a, b: s.execute(
        sa.select(a.Leaf).from_statement(sa.select(b.Node))
    ),
    "text into columns": lambda s, a, b: s.execute(
        sa.text("SELECT 1").columns(a.Leaf.id, b.Node.name)
    ),
    "for update": lambda s, a, b: s.execute(sa.select(a.Leaf).with_for_update(of=b.Node)),
    "insert from a select": lambda s, a, b: s.execute(
        sa.insert(a.Leaf).from_select(["name"], sa.select(b.Node.name))
    ),
    "insert of a subquery": lambda s, a, b: s.execute(
        sa.insert(a.leaf).values(name=name_of_a_node(b))
    ),
    "insert of rows of subqueries": lambda s, a, b: s.execute(
        sa.insert(a.leaf).values([{"name": name_of_a_node(b)}])
    ),
    "insert returning": lambda s, a, b: s.execute(
        sa.insert(a.leaf).values(name="new").returning(name_of_a_node(b))
    ),
    "update from": lambda s, a, b: s.execute(
        sa.update(a.leaf).values(name="changed").where(a.leaf.c.id == b.node.c.id)
    ),
    "update by a subquery": lambda s, a, b: s.execute(
        sa.update(a.Leaf).values(name="changed").where(a.Leaf.id.in_(sa.select(b.Node.id))),
        execution_options={"synchronize_session": "fetch"},
    ),
    "update to a subquery": lambda s, a, b: s.execute(
        sa.update(a.leaf).values(name=name_of_a_node(b))
    ),
    "delete by a subquery": lambda s, a, b: s.execute(
        sa.delete(a.Leaf).where(a.Leaf.id.in_(sa.select(b.Node.id)))
    ),
    "delete using": lambda s, a, b: s.execute(sa.delete(a.leaf).where(a.leaf.c.id == b.node.c.id)),
    "delete in a CTE": lambda s, a, b: s.execute(
        sa.select(a.leaf).add_cte(sa.delete(b.node).cte("gone"))
    ),
    "Query": lambda s, a, b: s.query(a.Leaf, b.Node).all(),
    "Query, join": lambda s, a, b: s.query(a.Leaf).join(a.Leaf.guest).first(),
    "Query, count": lambda s, a, b: s.query(a.Leaf).filter(a.Leaf.id == b.Node.id).count(),
    "Query, union": lambda s, a, b: s.query(a.Leaf.id).union(s.query(b.Node.id)).all(),
    "Query, update": lambda s, a, b: s.query(a.Leaf).update({"name": name_of_a_node(b)}),
    "Query, delete": lambda s, a, b: (
        s.query(a.Leaf).filter(a.Leaf.id.in_(sa.select(b.Node.id))).delete()
    ),
}

#: In these the second bind's table is no element of the statement: SQLAlchemy adds it later.
HIDDEN: dict[str, Cross] = {
    "joinedload": lambda s, a, b: s.execute(sa.select(a.Leaf).options(so.joinedload(a.Leaf.guest))),
    "joinedload, get": lambda s, a, b: s.get(a.Leaf, 1, options=[so.joinedload(a.Leaf.guest)]),
    "joinedload, Query": lambda s, a, b: s.query(a.Leaf).options(so.joinedload(a.Leaf.guest)).all(),
    "joinedload, second": lambda s, a, b: s.execute(
        sa.select(a.Node).options(so.joinedload(a.Node.leaves).joinedload(a.Leaf.guest))
    ).unique(),
    "join of an alias": lambda s, a, b: s.execute(
        sa.select(a.Leaf).join(a.Leaf.guest.of_type(so.aliased(b.Node)))
    ),
    "loader criteria": lambda s, a, b: s.execute(
        sa.select(a.Leaf).options(
            so.with_loader_criteria(a.Leaf, a.Leaf.id.in_(sa.select(b.Node.id)))
        )
    ),
    "with_expression": lambda s, a, b: s.execute(
        sa.select(a.Leaf).options(so.with_expression(a.Leaf.given, name_of_a_node(b)))
    ),
    "flush of an expression": lambda s, a, b: (s.add(a.Leaf(name=name_of_a_node(b))), s.flush()),
    "upsert": lambda s, a, b: s.execute(upsert(a, a.leaf, name_of_a_node(b))),
}


def refused(use: Cross, models: Models, world: World) -> None:
    """In both sessions it raises and is not sent, and the session goes on."""
    other = OTHER[models.bind_key]
    for session_of in SESSIONS.values():
        session = session_of(models)
        with world.nothing_sent():
            with pytest.raises(CrossBindError, match="tables of several binds") as caught:
                use(session, models, other)
        for m in (models, other):
            assert re.search(f"'(leaf|node)' \\(bind {m.bind_key!r}\\)", str(caught.value))
        session.rollback()
        assert session.scalar(sa.select(models.Node.place)) == models.place


@on_each_bind
@pytest.mark.parametrize("name", CROSSING)
def test_crossing(name: str, models: Models, world: World) -> None:
    """A statement over two binds is refused and not sent, and a table of each is named."""
    refused(CROSSING[name], models, world)


@on_each_bind
@pytest.mark.parametrize("name", HIDDEN)
def test_crossing_hidden(name: str, models: Models, world: World) -> None:
    """So is a statement to which SQLAlchemy adds a table of another bind."""
    refused(HIDDEN[name], models, world)


# Relationships from bind to bind ----------------------------------------------------------------

#: How a leaf comes to its guest, which another bind owns.
GUESTS: dict[str, Use] = {
    "lazy load": lambda s, m: s.get(m.Leaf, 1).guest,
    "lazy load, one-to-many": lambda s, m: s.get(m.Node, 1).hosts,
    "selectinload": lambda s, m: s.get(m.Leaf, 1, options=[so.selectinload(m.Leaf.guest)]).guest,
    "selectinload, one-to-many": lambda s, m: (
        s.get(m.Node, 1, options=[so.selectinload(m.Node.hosts)]).hosts
    ),
    "immediateload": lambda s, m: s.get(m.Leaf, 1, options=[so.immediateload(m.Leaf.guest)]).guest,
    "merge": lambda s, m: s.merge(m.Leaf(id=1, guest=OTHER[m.bind_key].Node(id=1))).guest,
}


@on_each_bind
@pytest.mark.parametrize("name", GUESTS)
def test_relationship_to_another_bind(name: str, models: Models) -> None:
    """In ``db.session`` each end of a relationship between two binds comes from its own server."""
    assert set(places(GUESTS[name](db.session, models))) == {OTHER[models.bind_key].place}


@on_each_bind
def test_flush_of_two_binds(models: Models, world: World) -> None:
    """What one flush of ``db.session`` writes for several binds, each server has for itself."""
    other = OTHER[models.bind_key]
    guest = other.Node(**new(other))
    db.session.add(models.Leaf(**new(models), guest=guest))
    db.session.commit()
    for m, table in ((models, "leaf"), (other, "node")):
        (row,) = world.rows(m.bind_key) ^ world.first[m.bind_key]
        assert (row[0], *row[2:]) == (table, m.place, "new")


# A session's own bind ---------------------------------------------------------------------------

#: What the session of bind `a` refuses to do for bind `b`.
WRONG: dict[str, Cross] = {
    "select": lambda s, a, b: s.scalars(sa.select(b.Node)).all(),
    "select, column": lambda s, a, b: s.scalars(sa.select(b.Node.place)).all(),
    "select, Core": lambda s, a, b: s.scalars(sa.select(b.plain)).all(),
    "select, count": lambda s, a, b: s.scalar(sa.select(sa.func.count()).select_from(b.plain)),
    "select, union": lambda s, a, b: s.scalars(
        sa.union(sa.select(b.Node.place), sa.select(b.Leaf.place))
    ),
    "select, function": lambda s, a, b: s.scalar(sa.func.max(b.Node.place)),
    "select, text": lambda s, a, b: s.execute(sa.text("SELECT 1").columns(b.plain.c.id)),
    "get": lambda s, a, b: s.get(b.Node, 1),
    "add": lambda s, a, b: (s.add(b.Node(**new(b))), s.flush()),
    "add, subclass": lambda s, a, b: (s.add(b.Manager(**new(b))), s.flush()),
    "add, then commit": lambda s, a, b: (s.add_all([a.Node(), b.Node()]), s.commit()),
    "add, then autoflush": lambda s, a, b: (s.add(b.Node()), s.scalar(sa.select(a.Node.place))),
    "change of a detached object": lambda s, a, b: (
        s.add(changed(detached(db.session, db.session.get(b.Node, 1)))),
        s.flush(),
    ),
    "delete of a detached object": lambda s, a, b: (
        s.delete(detached(db.session, db.session.get(b.Dog, 1))),
        s.flush(),
    ),
    "refresh of a detached object": lambda s, a, b: (
        s.add(node := detached(db.session, db.session.get(b.Node, 1))),
        s.refresh(node),
    ),
    "merge": lambda s, a, b: s.merge(b.Node(id=1, name="changed")),
    "insert": lambda s, a, b: s.execute(sa.insert(b.Node).values(new(b))),
    "insert, rows": lambda s, a, b: s.execute(sa.insert(b.Node), [new(b), new(b)]),
    "insert, Core": lambda s, a, b: s.execute(sa.insert(b.plain), [new(b)]),
    "update": lambda s, a, b: s.execute(sa.update(b.Node).values(name="changed")),
    "update, rows": lambda s, a, b: s.execute(sa.update(b.Node), [{"id": 1, "name": "changed"}]),
    "update, Core": lambda s, a, b: s.execute(sa.update(b.plain).values(name="changed")),
    "delete": lambda s, a, b: s.execute(sa.delete(b.Dog)),
    "delete, Core": lambda s, a, b: s.execute(sa.delete(b.plain)),
    "bulk_save_objects": lambda s, a, b: s.bulk_save_objects([b.Node(**new(b))]),
    "bulk_insert_mappings": lambda s, a, b: s.bulk_insert_mappings(b.Node, [new(b)]),
    "bulk_update_mappings": lambda s, a, b: s.bulk_update_mappings(
        b.Node, [{"id": 1, "name": "changed"}]
    ),
    "Query": lambda s, a, b: s.query(b.Node).all(),
    "Query, count": lambda s, a, b: s.query(b.Node.id).count(),
    "Query, get": lambda s, a, b: s.query(b.Node).get(1),
    "Query, update": lambda s, a, b: s.query(b.Node).update({"name": "changed"}),
    "Query, delete": lambda s, a, b: s.query(b.Dog).delete(),
    "connection": lambda s, a, b: s.connection({"mapper": b.Node}),
    "lazy load": lambda s, a, b: s.get(a.Leaf, 1).guest,
    "lazy load, one-to-many": lambda s, a, b: s.get(a.Node, 1).hosts,
    "selectinload": lambda s, a, b: s.get(a.Leaf, 1, options=[so.selectinload(a.Leaf.guest)]),
    "add by cascade": lambda s, a, b: (s.add(a.Leaf(guest=b.Node())), s.flush()),
    "merge by cascade": lambda s, a, b: s.merge(a.Leaf(id=1, guest=b.Node(id=1))),
}


@on_each_bind
@pytest.mark.parametrize("name", WRONG)
def test_wrong_bind(name: str, models: Models, world: World) -> None:
    """A bind's own session neither reads nor writes what another owns, and goes on afterwards."""
    session, other = db.sessions[models.bind_key], OTHER[models.bind_key]
    owner = f"for bind {models.bind_key!r}, .* belongs to bind {other.bind_key!r}"
    with pytest.raises(WrongBindError, match=owner):
        WRONG[name](session, models, other)
    session.rollback()
    assert session.scalar(sa.select(models.Node.place)) == models.place
    session.commit()
    assert world.is_untouched()


@on_each_bind
def test_objects_of_their_own(models: Models, world: World) -> None:
    """The same row is one object in each session, and a change to one is not seen in the other."""
    shared, mine = (session(models).get(models.Node, 1) for session in SESSIONS.values())
    assert shared is not mine
    assert shared is not db.session.get(OTHER[models.bind_key].Node, 1)
    changed(mine)
    db.sessions[models.bind_key].flush()
    db.session.refresh(shared)
    assert (shared.name, mine.name) == ("row 1", "changed")


#: Three sessions of a context, and what each writes.
THREE: dict[str, tuple[t.Any, Models]] = {
    "db.session": (db.session, ORDERS),
    "db.sessions[None]": (db.sessions[None], MAIN),
    "db.sessions['orders']": (db.sessions["orders"], ORDERS),
}


@pytest.mark.parametrize(("undone", "kept"), list(itertools.permutations(THREE, 2)))
def test_transactions_of_their_own(undone: str, kept: str, world: World) -> None:
    """Of two sessions, on one server or on two, one is rolled back and the other's work stays."""
    for name in (undone, kept):
        session, m = THREE[name]
        session.add(m.Node(**new(m)))
        session.flush()
    THREE[undone][0].rollback()
    THREE[kept][0].commit()
    gained, lost = world.changes(THREE[kept][1])
    assert (len(gained), lost) == (1, frozenset())


@on_each_bind
def test_not_seen_before_the_commit(models: Models, world: World) -> None:
    """What one session has written, another one of the same bind sees when it is committed."""
    count = sa.select(sa.func.count()).select_from(models.plain)
    own = db.sessions[models.bind_key]
    own.execute(sa.insert(models.plain).values(new(models)))
    assert (own.scalar(count), db.session.scalar(count)) == (models.count + 1, models.count)
    own.commit()
    db.session.rollback()
    assert db.session.scalar(count) == models.count + 1


# Any statement ----------------------------------------------------------------------------------

#: Selects of one column ``x``, which is a place.
ATOMS: tuple[t.Callable[[Models], t.Any], ...] = (
    lambda m: sa.select(m.plain.c.place.label("x")),
    lambda m: sa.select(m.Node.place.label("x")),
    lambda m: sa.select(so.aliased(m.Leaf).place.label("x")),
    lambda m: sa.select(m.plain.alias().c.place.label("x")),
    lambda m: sa.select(m.Manager.office.label("x")),
    lambda m: sa.select(m.Manager.place.label("x")),
    lambda m: sa.select(m.Dog.place.label("x")),
    lambda m: sa.select(m.Leaf.place.label("x")).join(m.Leaf.node),
    lambda m: sa.select(m.node.c.place.label("x")).where(m.node.c.id > 0),
    lambda m: sa.select(m.Node.place.label("x")).where(m.Node.leaves.any()),
)

#: Ways to make one select of ``x`` out of one.
NESTINGS: tuple[t.Callable[[t.Any], t.Any], ...] = (
    lambda a: sa.select(a.subquery().c.x),
    lambda a: sa.select(a.cte().c.x),
    lambda a: sa.select(a.subquery().alias().c.x).distinct(),
    lambda a: sa.select(a.limit(1).scalar_subquery().label("x")),
    lambda a: sa.select(a.order_by("x").limit(2).subquery().c.x),
    lambda a: sa.select(sa.func.max(a.subquery().c.x).label("x")),
    lambda a: (lambda s: sa.select(s.c.x).group_by(s.c.x).having(sa.func.count() > 0))(
        a.subquery()
    ),
)

#: Ways to make one select of ``x`` out of two.
COMBINATIONS: tuple[t.Callable[[t.Any, t.Any], t.Any], ...] = (
    lambda a, b: sa.select(sa.union(a, b).subquery().c.x),
    lambda a, b: sa.select(sa.union_all(a, b).cte().c.x),
    lambda a, b: sa.select(sa.intersect(a, b).subquery().c.x),
    lambda a, b: sa.select(a.subquery().c.x).join(b.cte(), sa.true()),
    lambda a, b: (lambda s, o: sa.select(s.c.x).outerjoin(o, s.c.x == o.c.x))(
        a.subquery(), b.subquery()
    ),
    lambda a, b: sa.select(a.subquery().c.x).where(b.exists()),
    lambda a, b: (lambda s: sa.select(s.c.x).where(s.c.x.in_(b)))(a.subquery()),
    lambda a, b: (lambda s, o: sa.select(s.c.x).where(sa.exists().where(o.c.x == s.c.x)))(
        a.subquery(), b.subquery()
    ),
    lambda a, b: sa.select(a.subquery().c.x).add_cte(b.cte()),
    lambda a, b: sa.select(a.subquery().c.x).order_by(b.limit(1).scalar_subquery()),
    lambda a, b: sa.select(
        sa.case((b.exists(), a.limit(1).scalar_subquery()), else_="nowhere").label("x")
    ),
)

#: What a statement is at last.
OUTERMOST: tuple[t.Callable[[t.Any], t.Any], ...] = (
    lambda a: a,
    lambda a: sa.union_all(a, a),
)


def selects(m: Models) -> st.SearchStrategy[t.Any]:
    """Selects of places, over the tables and models of one bind, nested."""
    return st.recursive(
        st.sampled_from(ATOMS).map(lambda atom: atom(m)),
        lambda inner: st.one_of(
            st.builds(lambda nest, a: nest(a), st.sampled_from(NESTINGS), inner),
            st.builds(
                lambda combine, a, b: combine(a, b), st.sampled_from(COMBINATIONS), inner, inner
            ),
        ),
        max_leaves=4,
    )


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(BOTH).flatmap(lambda m: st.tuples(st.just(m), selects(m))),
    st.sampled_from(OUTERMOST),
)
def test_any_select(
    world: World, drawn: tuple[Models, t.Any], outermost: t.Callable[[t.Any], t.Any]
) -> None:
    """However selects over one bind's tables are put together, its server answers."""
    models, select = drawn
    with world.app.app_context():
        for session_of in SESSIONS.values():
            answer = session_of(models).scalars(outermost(select))
            assert set(answer) == {models.place}


@settings(deadline=None, max_examples=50)
@given(
    st.permutations(BOTH).flatmap(lambda two: st.tuples(*map(selects, two))),
    st.sampled_from(COMBINATIONS),
    st.lists(st.sampled_from(NESTINGS), max_size=2),
    st.sampled_from(OUTERMOST),
)
def test_any_select_of_two_binds(
    world: World,
    two: tuple[t.Any, t.Any],
    combine: t.Callable[[t.Any, t.Any], t.Any],
    nestings: list[t.Callable[[t.Any], t.Any]],
    outermost: t.Callable[[t.Any], t.Any],
) -> None:
    """However deep a table of a second bind hides in a select, nothing is sent."""
    select = combine(*two)
    for nest in nestings:
        select = nest(select)
    with world.app.app_context(), world.nothing_sent():
        for session in (db.session, *db.sessions.values()):
            with pytest.raises(CrossBindError, match="tables of several binds"):
                session.execute(outermost(select))
