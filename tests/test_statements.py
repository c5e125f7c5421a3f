"""What is found out of a statement: the bind that owns it, and whether it is provably a read."""

from __future__ import annotations

import dataclasses
import itertools
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
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import functions
from sqlalchemy.sql import operators

from flask_commondb import CommonDB
from flask_commondb import CrossBindError
from flask_commondb.statements import Facts
from flask_commondb.statements import Reader
from flask_commondb.statements import mapper_owners
from flask_commondb.statements import single_owner


class Base(so.DeclarativeBase):
    """The models of this module."""


db = CommonDB(model_class=Base)

#: SQLAlchemy has no types for it.
DDL: t.Any = sa.DDL


@dataclasses.dataclass(frozen=True)
class Models:
    """The same models and tables for one bind."""

    bind_key: str | None
    Node: t.Any
    Leaf: t.Any
    Person: t.Any
    Manager: t.Any
    Animal: t.Any
    Dog: t.Any
    table: sa.Table

    @property
    def tables(self) -> frozenset[str]:
        return frozenset(db.metadatas[self.bind_key].tables)


def make_models(bind_key: str | None) -> Models:
    prefix = bind_key or "main"

    def model(name: str, base: t.Any = None, /, **attributes: t.Any) -> t.Any:
        if bind_key is not None:
            attributes["__bind_key__"] = bind_key
        full_name = f"{prefix.title()}{name}"
        bases = (base or db.Model,)
        return type(full_name, bases, {"__module__": __name__, **attributes})

    def key(*constraints: t.Any) -> t.Any:
        return so.mapped_column(sa.Integer, *constraints, primary_key=True)

    node = model(
        "Node",
        __tablename__=f"{prefix}_node",
        id=key(),
        name=so.mapped_column(sa.String),
        data=so.mapped_column(sa.JSON),
        parent_id=so.mapped_column(sa.ForeignKey(f"{prefix}_node.id")),
    )
    leaf = model(
        "Leaf",
        __tablename__=f"{prefix}_leaf",
        id=key(),
        node_id=so.mapped_column(sa.ForeignKey(f"{prefix}_node.id")),
        node=so.relationship(node, backref="leaves"),
    )
    person = model(
        "Person",
        __tablename__=f"{prefix}_person",
        id=key(),
        kind=so.mapped_column(sa.String),
        __mapper_args__={"polymorphic_on": "kind", "polymorphic_identity": "person"},
    )
    manager = model(
        "Manager",
        person,
        __tablename__=f"{prefix}_manager",
        id=key(sa.ForeignKey(f"{prefix}_person.id")),
        title=so.mapped_column(sa.String),
        __mapper_args__={"polymorphic_identity": "manager"},
    )
    animal = model(
        "Animal",
        __tablename__=f"{prefix}_animal",
        id=key(),
        kind=so.mapped_column(sa.String),
        __mapper_args__={"polymorphic_on": "kind", "polymorphic_identity": "animal"},
    )
    dog = model("Dog", animal, __mapper_args__={"polymorphic_identity": "dog"})
    table = db.Table(
        f"{prefix}_plain",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String),
        bind_key=bind_key,
    )
    return Models(bind_key, node, leaf, person, manager, animal, dog, table)


MAIN = make_models(None)
ORDERS = make_models("orders")
LEGACY = make_models("legacy")
so.configure_mappers()


def recursive_cte(m: Models) -> t.Any:
    tree = sa.select(m.Node.id).cte("tree", recursive=True)
    tree = tree.union_all(sa.select(m.Node.id).join(tree, m.Node.parent_id == tree.c.id))
    return sa.select(tree)


def lambda_statement(m: Models) -> t.Any:
    table = m.table
    return sa.lambda_stmt(lambda: sa.select(table), track_on=[table])


def constant_values() -> t.Any:
    return sa.values(sa.column("x", sa.Integer), name="v").data([(1,), (2,)])


#: Statements that one bind owns, by what they are called; each also says where it is decided.
OWNED: dict[str, t.Callable[[Models], t.Any]] = {
    "entity": lambda m: sa.select(m.Node),
    "column": lambda m: sa.select(m.Node.id),
    "two entities": lambda m: sa.select(m.Node, m.Leaf),
    "filtered": lambda m: sa.select(m.Node).where(m.Node.id == 1).order_by(m.Node.name),
    "only filtered": lambda m: sa.select(sa.literal(1)).where(m.Node.id == 1),
    "only ordered": lambda m: sa.select(sa.literal(1)).order_by(m.Node.id),
    "only grouped": lambda m: sa.select(sa.literal(1)).group_by(m.Node.id),
    "joined inheritance": lambda m: sa.select(m.Manager),
    "joined inheritance, own column": lambda m: sa.select(m.Manager.title),
    "joined inheritance, base column": lambda m: sa.select(m.Manager.kind),
    "single-table inheritance": lambda m: sa.select(m.Dog),
    "with_polymorphic": lambda m: sa.select(so.with_polymorphic(m.Person, "*")),
    "of_type": lambda m: sa.select(m.Node).join(m.Node.leaves.of_type(so.aliased(m.Leaf))),
    "alias": lambda m: sa.select(so.aliased(m.Node)),
    "alias of a subquery": lambda m: sa.select(
        so.aliased(m.Node, sa.select(m.Node).limit(1).subquery())
    ),
    "bundle": lambda m: sa.select(so.Bundle("both", m.Node.id, m.Node.name)),
    "relationship join": lambda m: sa.select(m.Node).join(m.Node.leaves),
    "backref join": lambda m: sa.select(m.Leaf).outerjoin(m.Leaf.node),
    "relationship any": lambda m: sa.select(m.Node).where(m.Node.leaves.any()),
    "relationship has": lambda m: sa.select(m.Leaf).where(m.Leaf.node.has(name="x")),
    "joinedload": lambda m: sa.select(m.Leaf).options(so.joinedload(m.Leaf.node)),
    "contains_eager": lambda m: (
        sa.select(m.Leaf).join(m.Leaf.node).options(so.contains_eager(m.Leaf.node))
    ),
    "with_parent": lambda m: sa.select(m.Leaf).where(so.with_parent(m.Node(id=1), m.Node.leaves)),
    "Core select": lambda m: sa.select(m.table),
    "Core column": lambda m: sa.select(m.table.c.id),
    "Core alias": lambda m: sa.select(m.table.alias()),
    "Core join": lambda m: sa.select(sa.join(m.table, m.Node.__table__, sa.true())),
    "Core select of a model's table": lambda m: m.Node.__table__.select(),
    "count": lambda m: sa.select(sa.func.count()).select_from(m.table),
    "count of entities": lambda m: sa.select(sa.func.count()).select_from(m.Node),
    "count of a column": lambda m: sa.select(sa.func.count(sa.distinct(m.Node.id))),
    "union": lambda m: sa.select(m.Node.id).union_all(sa.select(m.Leaf.id)),
    "union, ordered and limited": lambda m: (
        sa.union(sa.select(m.Node.id).limit(1), sa.select(m.Leaf.id)).order_by("id").limit(2)
    ),
    "entities of a union": lambda m: sa.select(m.Node).from_statement(
        sa.union(sa.select(m.Node), sa.select(m.Node))
    ),
    "CTE": lambda m: sa.select(sa.select(m.Node.id).cte("c")),
    "recursive CTE": recursive_cte,
    "subquery": lambda m: sa.select(sa.select(m.Node.id).subquery()),
    "subquery twice": lambda m: sa.select(
        sa.select(sa.select(m.table.c.id).subquery().c.id).subquery()
    ),
    "scalar subquery": lambda m: sa.select(sa.select(m.Node.id).scalar_subquery()),
    "exists": lambda m: sa.select(sa.exists().where(m.Node.id == 1)),
    "correlated exists": lambda m: sa.select(m.Node).where(
        sa.select(m.Leaf.id).where(m.Leaf.node_id == m.Node.id).exists()
    ),
    "in": lambda m: sa.select(m.Node).where(m.Node.id.in_(sa.select(m.Leaf.node_id))),
    "lateral": lambda m: sa.select(
        m.Node, sa.lateral(sa.select(m.Leaf.id).where(m.Leaf.node_id == m.Node.id))
    ),
    "case": lambda m: sa.select(sa.case((m.Node.id == 1, "one"), else_="other")),
    "window": lambda m: sa.select(sa.func.row_number().over(order_by=m.Node.id)),
    "filter": lambda m: sa.select(sa.func.count().filter(m.Node.id > 1)),
    "within group": lambda m: sa.select(sa.func.mode().within_group(m.Node.id)),
    "function as a table": lambda m: sa.select(
        sa.func.json_each(m.Node.data).table_valued("value")
    ),
    "cast": lambda m: sa.select(sa.cast(m.Node.id, sa.String)),
    "JSON path": lambda m: sa.select(m.Node.data["a"].as_integer()),
    "tablesample": lambda m: sa.select(sa.tablesample(m.table, 10)),
    "locked": lambda m: sa.select(m.Node).with_for_update(),
    "values": lambda m: sa.select(m.Node).join(constant_values(), sa.true()),
    "lambda": lambda_statement,
    "insert": lambda m: sa.insert(m.Node),
    "insert a row": lambda m: sa.insert(m.Node).values(name="x").returning(m.Node.id),
    "insert rows": lambda m: sa.insert(m.table).values([{"name": "x"}, {"name": "y"}]),
    "insert from select": lambda m: sa.insert(m.table).from_select(
        ["name"], sa.select(m.Node.name)
    ),
    "upsert": lambda m: mysql.insert(m.table).values(name="x").on_duplicate_key_update(name="y"),
    "upsert on SQLite": lambda m: sqlite.insert(m.table).values(name="x").on_conflict_do_nothing(),
    "update": lambda m: sa.update(m.Node).values(name="x"),
    "update joined inheritance": lambda m: sa.update(m.Manager).values(title="x"),
    "update from": lambda m: (
        sa.update(m.table).values(name=m.Node.name).where(m.table.c.id == m.Node.id)
    ),
    "update by subquery": lambda m: sa.update(m.table).values(
        name=sa.select(m.Node.name).scalar_subquery()
    ),
    "delete": lambda m: sa.delete(m.table),
    "delete entities": lambda m: sa.delete(m.Node).where(m.Node.leaves.any()),
    "delete using": lambda m: sa.delete(m.table).where(m.table.c.id == m.Node.id),
    "DML in a CTE": lambda m: sa.select(sa.insert(m.table).returning(m.table.c.id).cte()),
    "a CTE beside": lambda m: sa.select(sa.literal(1)).add_cte(sa.select(m.Node.id).cte()),
    "Query": lambda m: so.Query(m.Node).filter(m.Node.id == 1).statement,
    "Query of columns": lambda m: so.Query([m.Node.id, m.Leaf.id]).statement,
    "Query with a subquery": lambda m: so.Query(so.Query(m.Node).subquery()).statement,
    "Query of a text": lambda m: (
        t.cast(t.Any, so.Query(m.Node)).from_statement(sa.text("SELECT 1")).statement
    ),
    "text into entities": lambda m: sa.select(m.Node).from_statement(sa.text("SELECT 1")),
    "text into columns": lambda m: sa.text("SELECT 1").columns(m.Node.id),
    "text in a where": lambda m: sa.select(m.Node).where(sa.text("1 = 1")),
    "CREATE TABLE": lambda m: sa.schema.CreateTable(m.table),
    "DROP TABLE": lambda m: sa.schema.DropTable(m.table),
    "CREATE INDEX": lambda m: sa.schema.CreateIndex(
        sa.Index("i", sa.Table("t", sa.MetaData(info={"bind_key": m.bind_key}), sa.Column("c")).c.c)
    ),
    "a table": lambda m: m.table,
}

#: Nothing in these is owned by a bind.
OWNERLESS: dict[str, t.Callable[[], t.Any]] = {
    "text": lambda: sa.text("SELECT 1"),
    "text with columns": lambda: sa.text("SELECT 1").columns(sa.column("x")),
    "literal": lambda: sa.select(sa.literal(1)),
    "function": lambda: sa.func.now(),
    "selected function": lambda: sa.select(sa.func.now()),
    "values": lambda: sa.select(constant_values()),
    "lower-case table": lambda: sa.select(sa.table("somewhere", sa.column("x"))),
    "table of a foreign metadata": lambda: sa.select(sa.Table("t", sa.MetaData(), sa.Column("c"))),
    "DDL": lambda: DDL("CREATE VIEW v AS SELECT 1"),
    "CREATE SCHEMA": lambda: sa.schema.CreateSchema("s"),
    "a plain sequence": lambda: sa.Sequence("s"),
}


@pytest.mark.parametrize("models", [MAIN, ORDERS], ids=["default", "orders"])
@pytest.mark.parametrize("name", OWNED)
def test_owner(name: str, models: Models) -> None:
    """Whatever a statement looks like, the bind is found that owns its tables."""
    facts = Reader().facts(OWNED[name](models))
    assert single_owner(facts.owners) == (models.bind_key,)
    assert set(facts.owners.values()) <= models.tables | {"t"}


@pytest.mark.parametrize("name", OWNERLESS)
def test_no_owner(name: str) -> None:
    """A statement without a table of a bind has no owner: the session's own bind takes it."""
    facts = Reader().facts(OWNERLESS[name]())
    assert (facts.owners, single_owner(facts.owners)) == ({}, None)


@pytest.mark.parametrize("models", [MAIN, ORDERS], ids=["default", "orders"])
@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("Node", "node"),
        ("Leaf", "leaf"),
        ("Person", "person"),
        ("Manager", "manager"),
        ("Dog", "animal"),
    ],
)
def test_mapper_owners(models: Models, name: str, table: str) -> None:
    """A mapper is owned by the bind of its own table."""
    model = getattr(models, name)
    expected = {models.bind_key: f"{models.bind_key or 'main'}_{table}"}
    assert mapper_owners(model) == expected
    assert mapper_owners(sa.inspect(model)) == expected


def test_mapper_of_a_join() -> None:
    """A class that is mapped to a join is owned by the binds of all its tables."""

    class Both:
        pass

    joined = sa.join(MAIN.table, ORDERS.table, sa.true())
    columns = {"main_id": MAIN.table.c.id, "orders_id": ORDERS.table.c.id}
    mapper = so.registry().map_imperatively(
        Both,
        joined,
        properties=columns,
        exclude_properties=["id", "name"],
        primary_key=list(columns.values()),
    )
    assert mapper_owners(mapper) == {None: "main_plain", "orders": "orders_plain"}
    assert mapper_owners(Both) == {None: "main_plain", "orders": "orders_plain"}


def test_no_mapper() -> None:
    """A class that is not mapped is refused as in SQLAlchemy, any other object too."""
    with pytest.raises(so.exc.UnmappedClassError, match=r"builtins\.int"):
        mapper_owners(int)
    with pytest.raises(sa.exc.NoInspectionAvailable, match="No inspection system"):
        mapper_owners(7)


#: Statements over the tables of the default bind and of another one.
CROSSING: dict[str, t.Callable[[Models, Models], t.Any]] = {
    "two entities": lambda a, b: sa.select(a.table, b.table),
    "join": lambda a, b: sa.select(a.table.c.id).join(b.table, sa.true()),
    "entity join": lambda a, b: sa.select(a.Node.id).join(b.Node, a.Node.id == b.Node.id),
    "where": lambda a, b: sa.select(a.table.c.id).where(a.table.c.id == b.table.c.id),
    "union": lambda a, b: sa.select(a.table.c.id).union(sa.select(b.table.c.id)),
    "subquery": lambda a, b: sa.select(a.table.c.id, sa.select(b.table.c.id).subquery()),
    "scalar subquery": lambda a, b: sa.select(
        a.table.c.id, sa.select(b.table.c.id).scalar_subquery()
    ),
    "in": lambda a, b: sa.select(a.table).where(a.table.c.id.in_(sa.select(b.table.c.id))),
    "exists": lambda a, b: sa.select(a.table).where(sa.exists().where(b.table.c.id == 1)),
    "CTE": lambda a, b: sa.select(a.table.c.id, sa.select(b.table.c.id).cte()),
    "a CTE beside": lambda a, b: sa.select(a.table).add_cte(sa.select(b.table).cte()),
    "lateral": lambda a, b: sa.select(a.table.c.id, sa.lateral(sa.select(b.table.c.id))),
    "order": lambda a, b: sa.select(a.table).order_by(b.table.c.id),
    "from_statement": lambda a, b: sa.select(a.Node).from_statement(sa.select(b.Node)),
    "insert from select": lambda a, b: sa.insert(a.table).from_select(
        ["name"], sa.select(b.table.c.name)
    ),
    "insert of a subquery": lambda a, b: sa.insert(a.table).values(
        name=sa.select(b.table.c.name).scalar_subquery()
    ),
    "update from": lambda a, b: (
        sa.update(a.table).values(name="x").where(a.table.c.id == b.table.c.id)
    ),
    "update by subquery": lambda a, b: sa.update(a.table).values(
        name=sa.select(b.table.c.name).scalar_subquery()
    ),
    "delete using": lambda a, b: sa.delete(a.table).where(a.table.c.id == b.table.c.id),
    "Query": lambda a, b: so.Query([a.Node.id, b.Node.id]).statement,
}


@pytest.mark.parametrize("name", CROSSING)
def test_crossing(name: str) -> None:
    """A statement over two binds is refused, and a table of each is named."""
    facts = Reader().facts(CROSSING[name](MAIN, ORDERS))
    assert facts.owners.keys() == {None, "orders"}
    with pytest.raises(CrossBindError, match="tables of several binds") as caught:
        assert single_owner(facts.owners) is None
    for bind_key, table in facts.owners.items():
        assert f"'{table}' (bind {bind_key!r})" in str(caught.value)


def test_crossing_three() -> None:
    """Every bind of a statement over three is named, with a table, and what can be done."""
    statement = sa.select(ORDERS.table, MAIN.table, LEGACY.Node.__table__)
    with pytest.raises(CrossBindError, match="tables of several binds") as caught:
        assert single_owner(Reader().facts(statement).owners) is None
    assert str(caught.value) == (
        "One statement names tables of several binds: 'orders_plain' (bind 'orders'),"
        " 'main_plain' (bind None), 'legacy_node' (bind 'legacy'). No server holds them all; use"
        " one statement for each bind, or, if one server does hold them, pass"
        " bind_arguments={'bind': db.engines[key]}."
    )


class Shout(sa.ColumnElement[str]):
    """A construct of the user's own."""

    inherit_cache = True
    type = sa.String()


class OwnFunction(functions.GenericFunction[t.Any]):
    """A function that hides behind a name on the list."""

    inherit_cache = True
    package = "flask_commondb_tests"
    name = "lower"


class OwnSelect(sa.Select[t.Any]):
    inherit_cache = True


class OwnColumn(sa.Column[t.Any]):
    inherit_cache = True


class OwnTable(sa.Table):
    """A subclass of Table is common, and no other SQL: Flask-SQLAlchemy has one itself."""


class NotCached(sa.ColumnElement[str]):
    """A construct that gives no cache key to the statements that it is part of."""

    inherit_cache = False
    type = sa.String()


@compiles(Shout)
@compiles(NotCached)
def compile_shout(element: t.Any, compiler: t.Any, **kwargs: t.Any) -> str:
    return "get_lock('x', 1)"


class Locking(db.Model):  # type: ignore[name-defined, misc]
    """Has SQL text behind an attribute."""

    id = so.mapped_column(sa.Integer, primary_key=True)
    lock = so.column_property(sa.literal_column("get_lock('x', 1)", sa.Integer))


own_table = OwnTable(
    "own", db.metadatas[None], sa.Column("id", sa.Integer), OwnColumn("special", sa.Integer)
)
node, leaf, plain = MAIN.Node, MAIN.Leaf, MAIN.table
locking: t.Any = Locking

#: What cannot write, lock, or see more than the snapshot.
READS: dict[str, t.Callable[[], t.Any]] = {
    **{
        name: lambda name=name: OWNED[name](MAIN)  # type: ignore[misc]
        for name in OWNED
        if not name.startswith(("insert", "upsert", "update", "delete", "CREATE", "DROP"))
        and not name.startswith(("text", "DML", "locked", "Query of a text"))
    },
    "literal": lambda: sa.select(sa.literal(1)),
    "a plain number": lambda: sa.select(1),
    "star": lambda: sa.select(sa.literal_column("*")).select_from(node),
    "exists of one": lambda: sa.select(sa.exists(1).where(node.id == 1)),
    "null, true and false": lambda: sa.select(sa.null(), sa.true(), sa.false()),
    "operators": lambda: sa.select(
        -node.id, node.id % 2, node.id + 1, node.name + "x", ~(node.id == 1), node.id != 2
    ),
    "bits": lambda: sa.select(node.id.bitwise_and(3), node.id.bitwise_not()),
    "text matching": lambda: sa.select(
        node.name.like("x"), node.name.ilike("x"), node.name.startswith("x"), node.name.match("x")
    ),
    "regular expressions": lambda: sa.select(
        node.name.regexp_match("x"), node.name.regexp_replace("x", "y")
    ),
    "ranges and lists": lambda: sa.select(node).where(
        node.id.between(1, 2), node.id.in_([1, 2]), node.id.not_in([3])
    ),
    "tuples": lambda: sa.select(node).where(sa.tuple_(node.id, node.name).in_([(1, "x")])),
    "null tests": lambda: sa.select(node).where(
        node.name.is_(None), node.name.is_distinct_from("x")
    ),
    "any and all": lambda: sa.select(
        node.id == sa.any_(sa.select(leaf.id).scalar_subquery()),
        node.id == sa.all_(sa.select(leaf.id).scalar_subquery()),
    ),
    "labels": lambda: sa.select(node.id.label("x")).order_by("x").group_by("x"),
    "order": lambda: sa.select(node.id).order_by(node.name.desc().nulls_last(), node.id.asc()),
    "order by a label": lambda: (lambda x: sa.select(x).order_by(x, sa.desc(x)))(
        node.id.label("x")
    ),
    "limit": lambda: sa.select(node).limit(1).offset(2),
    "fetch": lambda: sa.select(node).fetch(3, with_ties=True),
    "distinct": lambda: sa.select(node.name).distinct(),
    "collation": lambda: sa.select(node.name.collate("nocase")),
    "extract": lambda: sa.select(sa.extract("year", node.name)),
    "type_coerce": lambda: sa.select(sa.type_coerce(node.id, sa.String)),
    "try_cast": lambda: sa.select(sa.try_cast(node.id, sa.String)),
    "window frames": lambda: sa.select(
        sa.func.sum(node.id).over(partition_by=node.name, order_by=node.id, rows=(None, 0))
    ),
    "percentiles": lambda: sa.select(sa.func.percentile_cont(0.5).within_group(node.id)),
    "cube": lambda: sa.select(sa.func.count()).group_by(sa.func.cube(node.id, node.name)),
    "rollup": lambda: sa.select(sa.func.count()).group_by(sa.func.rollup(node.id)),
    "grouping sets": lambda: sa.select(sa.func.count()).group_by(
        sa.func.grouping_sets(sa.tuple_(node.id), sa.tuple_(node.name))
    ),
    "array": lambda: sa.select(postgresql.array([node.id, 2])),
    "array slice": lambda: sa.select(sa.cast(node.data, postgresql.ARRAY(sa.Integer))[1:2]),
    "aggregate order": lambda: sa.select(
        sa.func.array_agg(postgresql.aggregate_order_by(node.id, node.name))
    ),
    "aggregate_strings": lambda: sa.select(sa.func.aggregate_strings(node.name, ",")),
    "MATCH of MySQL": lambda: sa.select(mysql.match(plain.c.name, against="x")),
    "MATCH of an attribute": lambda: sa.select(mysql.match(node.name, against="x")),
    "rows of a function": lambda: sa.select(
        sa.func.generate_series(1, 3).table_valued("x", with_ordinality="n").render_derived()
    ),
    "column of a function": lambda: sa.select(sa.func.unnest(node.data).column_valued("x")),
    "scalar of a function": lambda: sa.select(
        sa.func.json_each(node.data, type_=sa.JSON).scalar_table_valued("value")
    ),
    "listed function": lambda: sa.select(sa.func.lower(node.name)),
    "listed function, shouted": lambda: sa.select(sa.func.LOWER(node.name)),
    "listed function as a statement": lambda: sa.func.count(),
    "now": lambda: sa.select(node).where(node.name < sa.func.now()),
    "current_timestamp": lambda: sa.select(sa.func.current_timestamp()),
    "symbol operator": lambda: sa.select(node.data.op("->>")("x")),
    "word operator": lambda: sa.select(node.name.op("REGEXP")("x")),
    "execution options": lambda: sa.select(node).execution_options(populate_existing=True),
    "a subclass of Table": lambda: sa.select(own_table.c.id),
    "an alias of one": lambda: sa.select(own_table.alias().c.id),
    "lower-case names": lambda: sa.select(sa.column("x")).select_from(sa.table("y")),
}

if hasattr(functions.FunctionElement, "aggregate_order_by"):  # since SQLAlchemy 2.1
    READS["aggregate order, as a method"] = lambda: sa.select(
        sa.func.array_agg(node.id).aggregate_order_by(node.name, node.id.desc())
    )
    READS["window over lists"] = lambda: sa.select(
        sa.func.rank().over(partition_by=[node.name, node.id], order_by=[node.id, node.name])
    )

#: What is not provably a read, by the reason.
NOT_READS: dict[str, dict[str, t.Callable[[], t.Any]]] = {
    "write": {
        **{
            name: lambda name=name: OWNED[name](MAIN)  # type: ignore[misc]
            for name in OWNED
            if name.startswith(("insert", "upsert", "update", "delete", "DML"))
        },
        "write beside a CTE": lambda: sa.select(node).add_cte(sa.delete(plain).cte("gone")),
        "write in a union": lambda: sa.union(
            sa.select(plain.c.id), sa.select(sa.delete(plain).returning(plain.c.id).cte().c.id)
        ),
        "write and text": lambda: sa.delete(plain).where(sa.text("1 = 1")),
        "text and write": lambda: (
            sa.select(sa.text("1")).add_cte(sa.delete(plain).cte("gone")).where(sa.text("1 = 1"))
        ),
    },
    "locked": {
        "FOR UPDATE": lambda: sa.select(node).with_for_update(),
        "FOR SHARE": lambda: sa.select(node).with_for_update(read=True),
        "SKIP LOCKED": lambda: sa.select(node).with_for_update(skip_locked=True),
        "NOWAIT": lambda: sa.select(node).with_for_update(nowait=True),
        "KEY SHARE": lambda: sa.select(node).with_for_update(read=True, key_share=True),
        "OF": lambda: sa.select(node, leaf).with_for_update(of=leaf),
        "in a subquery": lambda: sa.select(sa.select(node).with_for_update().subquery()),
        "in a CTE": lambda: sa.select(sa.select(node.id).with_for_update().cte()),
        "in a condition": lambda: sa.select(leaf).where(
            leaf.node_id.in_(sa.select(node.id).with_for_update())
        ),
        "Core": lambda: sa.select(plain).with_for_update(),
        "Query": lambda: so.Query(node).with_for_update().statement,
    },
    "unknown_sql": {
        "text": lambda: sa.text("SELECT 1"),
        "text with columns": lambda: sa.text("SELECT 1").columns(node.id),
        "selected text": lambda: sa.select(sa.text("1")),
        "text into entities": lambda: sa.select(node).from_statement(sa.text("SELECT 1")),
        "text as a table": lambda: sa.select(node.id).select_from(sa.text("x")),
        "text in a where": lambda: sa.select(node).where(sa.text("1 = 1")),
        "text in an and": lambda: sa.select(node).where(sa.and_(node.id == 1, sa.text("1 = 1"))),
        "text in a having": lambda: sa.select(node.id).group_by(node.id).having(sa.text("1 = 1")),
        "text in an order": lambda: sa.select(node).order_by(sa.text("1")),
        "text in a group": lambda: sa.select(node.id).group_by(sa.text("1")),
        "text in a join": lambda: sa.select(node.id).join(leaf, sa.text("1 = 1")),
        "text in a subquery": lambda: sa.select(sa.select(sa.text("1")).subquery()),
        "text in a CTE": lambda: sa.select(sa.select(node.id).where(sa.text("1 = 1")).cte()),
        "text in an exists": lambda: sa.select(node).where(sa.exists().where(sa.text("1 = 1"))),
        "text in a union": lambda: sa.select(node.id).union(sa.select(sa.text("1"))),
        "text in a function": lambda: sa.select(sa.func.lower(sa.text("1"))),
        "text in a case": lambda: sa.select(sa.case((node.id == 1, sa.text("1")))),
        "text in a window": lambda: sa.select(sa.func.sum(node.id).over(order_by=sa.text("1"))),
        "text in a limit": lambda: sa.select(node).limit(sa.literal_column("@limit")),
        "text in values": lambda: sa.select(
            sa.values(sa.column("x", sa.Integer), name="v").data([(sa.text("1"),)])
        ),
        "function in values": lambda: sa.select(
            sa.values(sa.column("x", sa.Integer), name="v").data([(sa.func.get_lock("x", 1),)])
        ),
        "text behind an attribute": lambda: sa.select(locking.lock),
        "text behind a matched attribute": lambda: sa.select(
            mysql.match(locking.lock, against="x")
        ),
        "text in a lambda": lambda: sa.lambda_stmt(lambda: sa.select(sa.text("1"))),
        "text in a Query": lambda: so.Query(node).filter(sa.text("1 = 1")).statement,
        "literal_column": lambda: sa.select(sa.literal_column("get_lock('x', 1)")),
        "literal_column of a table": lambda: sa.select(
            sa.literal_column("x"), node.id == sa.literal_column("y")
        ),
        "prefix": lambda: sa.select(node).prefix_with("SQL_NO_CACHE"),
        "suffix": lambda: sa.select(node).suffix_with("INTO OUTFILE 'x'"),
        "hint": lambda: sa.select(node).with_hint(node, "USE INDEX (x)"),
        "hint for a statement": lambda: sa.select(node).with_statement_hint("FOR UPDATE"),
        "prefix in a subquery": lambda: sa.select(sa.select(node).prefix_with("x").subquery()),
        "prefix of a CTE": lambda: sa.select(sa.select(node.id).cte().prefix_with("x")),
        "suffix of a CTE": lambda: sa.select(sa.select(node.id).cte().suffix_with("x")),
        "assignment": lambda: sa.select(node.id.op(":=")(1)),
        "assignment with a name": lambda: sa.select(node.id.op("+ @a :=")(1)),
        "assignment before": lambda: sa.select(
            sa.sql.expression.UnaryExpression(
                node.id.expression, operator=operators.custom_op("@a :=")
            )
        ),
        "unknown function": lambda: sa.select(sa.func.get_lock("x", 1)),
        "unknown function in a where": lambda: sa.select(node).where(sa.func.sleep(1) == 0),
        "unknown function in a listed one": lambda: sa.select(sa.func.lower(sa.func.nextval("s"))),
        "unknown function as a table": lambda: sa.select(sa.func.own_rows(1).table_valued("x")),
        "unknown window": lambda: sa.select(sa.func.own().over(order_by=node.id)),
        "function of a package": lambda: sa.select(sa.func.own_package.lower(node.name)),
        "function of a deep package": lambda: sa.select(sa.func.a.b.lower(node.name)),
        "function as a statement": lambda: sa.func.get_lock("x", 1),
        "next_value": lambda: sa.select(sa.Sequence("s").next_value()),
        "sequence": lambda: sa.Sequence("s"),
        "DDL": lambda: DDL("DROP TABLE x"),
        "CREATE TABLE": lambda: sa.schema.CreateTable(plain),
        "DROP TABLE": lambda: sa.schema.DropTable(plain),
        "own construct": lambda: sa.select(Shout()),
        "own construct in a where": lambda: sa.select(node).where(Shout() == "x"),
        "own construct, not cached": lambda: sa.select(NotCached()),
        "own function": lambda: sa.select(OwnFunction(node.name)),
        "own select": lambda: OwnSelect(node.id),
        "own select in a subquery": lambda: sa.select(OwnSelect(node.id).subquery()),
        "own column": lambda: sa.select(own_table.c.special),
        "alias of an own column": lambda: sa.select(own_table.alias().c.special + 1),
    },
}


@pytest.mark.parametrize("name", READS)
def test_reads(name: str) -> None:
    """What SQLAlchemy itself makes of such elements cannot write, so a replica may answer."""
    assert Reader().facts(READS[name]()).not_read is None


@pytest.mark.parametrize(
    ("reason", "name"), [(reason, name) for reason, names in NOT_READS.items() for name in names]
)
def test_not_reads(reason: str, name: str) -> None:
    """What writes, locks, or is not known to do neither is no read, and the reason is told."""
    assert Reader().facts(NOT_READS[reason][name]()).not_read == reason


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (lambda: sa.text("SELECT 1"), True),
        (lambda: sa.text("SELECT 1").columns(node.id), True),
        (lambda: sa.select(sa.text("1")), False),
        (lambda: sa.select(node).where(sa.text("1 = 1")), False),
        (lambda: sa.select(sa.text("SELECT 1").columns(node.id).subquery()), False),
        (lambda: sa.select(node), False),
        (lambda: DDL("DROP TABLE x"), False),
        (lambda: sa.Sequence("s"), False),
    ],
)
def test_is_text(statement: t.Callable[[], t.Any], expected: bool) -> None:
    """A statement is text when it is nothing but text: a piece in it makes it none."""
    assert Reader().facts(statement()).is_text is expected


@pytest.mark.parametrize(
    ("functions", "statement", "not_read"),
    [
        (["who"], lambda: sa.select(sa.func.who()), None),
        (["who"], lambda: sa.select(sa.func.WHO()), None),
        (["who"], lambda: sa.select(sa.func.whoever()), "unknown_sql"),
        (["who"], lambda: sa.select(sa.func.own.who()), "unknown_sql"),
        (["own.who"], lambda: sa.select(sa.func.own.who()), None),
        (["own.who"], lambda: sa.select(sa.func.Own.Who()), None),
        (["own.who"], lambda: sa.select(sa.func.who()), "unknown_sql"),
        (["who"], lambda: sa.select(sa.func.lower(sa.func.who())), None),
        (["who"], lambda: sa.select(sa.func.who(sa.func.get_lock("x", 1))), "unknown_sql"),
        (["lower"], lambda: sa.select(OwnFunction(node.name)), "unknown_sql"),
    ],
)
def test_more_functions(
    functions: list[str], statement: t.Callable[[], t.Any], not_read: str | None
) -> None:
    """The user's list of functions adds to the known ones, by full name, in any case."""
    assert Reader(functions).facts(statement()).not_read == not_read


class CountingReader(Reader):
    """Counts how often it walks through a statement."""

    SIZE = 10

    def __init__(self, functions: t.Collection[str] = ()) -> None:
        super().__init__(functions)
        self.walks = 0

    def _walk(self, statement: sa.ClauseElement) -> Facts:
        self.walks += 1
        return super()._walk(statement)


def test_memory() -> None:
    """Statements of one shape are walked through once, whatever their values are."""
    reader = CountingReader()
    seen = {id(reader.facts(sa.select(node).where(node.id == value))) for value in range(5)}
    assert (reader.walks, len(seen)) == (1, 1)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (sa.select(node), sa.select(leaf)),
        (sa.select(node), sa.select(ORDERS.Node)),
        (sa.select(node), sa.select(node).with_for_update()),
        (sa.select(node), sa.select(node).prefix_with("x")),
        (sa.select(node), sa.select(node).suffix_with("x")),
        (sa.select(node), sa.select(node).with_hint(node, "x")),
        (sa.select(node), sa.select(node).with_statement_hint("x")),
        (sa.select(sa.func.lower("x")), sa.select(sa.func.get_lock("x"))),
        (sa.select(sa.func.lower("x")), sa.select(sa.func.own.lower("x"))),
        (sa.select(node.id.op("+")(1)), sa.select(node.id.op(":=")(1))),
        (sa.select(sa.column("x")), sa.select(sa.literal_column("x"))),
        (sa.select(plain), sa.select(plain).add_cte(sa.delete(plain).cte("x"))),
        (sa.select(sa.func.lower("x")), sa.select(OwnFunction("x"))),
    ],
)
def test_memory_tells_apart(first: t.Any, second: t.Any) -> None:
    """What differs in owner or kind is not taken for the same, in whatever order it comes."""
    for statements in ((first, second), (second, first)):
        reader = Reader()
        remembered = [reader.facts(statement) for statement in statements]
        assert remembered == [Reader().facts(statement) for statement in statements]
        assert remembered[0] != remembered[1] or first.froms != second.froms


def test_memory_is_bounded() -> None:
    """The memory never holds more than ``SIZE`` statements, and goes on working after that."""
    reader = CountingReader()
    sizes = []
    for length in range(1, 36):
        statement = sa.select(*[node.id.label(f"x{index}") for index in range(length)])
        assert reader.facts(statement) == Facts({None: "main_node"}, None, False)
        sizes.append(len(reader._memory))
    assert max(sizes) == reader.SIZE
    assert reader.walks == 35
    reader.facts(sa.select(*[node.id.label(f"x{index}") for index in range(35)]))
    assert reader.walks == 35


def test_readers_do_not_share() -> None:
    """Two apps with other lists of functions do not see each other's answers."""
    statement = sa.select(sa.func.who(), node.id)
    knowing, other = Reader(["who"]), Reader()
    answers = [reader.facts(statement).not_read for reader in (knowing, other, knowing, other)]
    assert answers == [None, "unknown_sql", None, "unknown_sql"]


@pytest.mark.parametrize(
    ("statement", "facts"),
    [
        (
            sa.select(node).join(constant_values(), sa.true()),
            Facts({None: "main_node"}, None, False),
        ),
        (
            sa.select(NotCached(), ORDERS.Node),
            Facts({"orders": "orders_node"}, "unknown_sql", False),
        ),
        (
            sa.schema.CreateTable(ORDERS.table),
            Facts({"orders": "orders_plain"}, "unknown_sql", False),
        ),
    ],
)
def test_without_a_cache_key(statement: t.Any, facts: Facts) -> None:
    """A statement that SQLAlchemy cannot cache is walked through each time, and not remembered."""
    assert statement._generate_cache_key() is None
    reader = CountingReader()
    assert [reader.facts(statement) for _ in range(3)] == [facts] * 3
    assert (reader.walks, len(reader._memory)) == (3, 0)


def test_not_a_statement() -> None:
    """What is no element of SQL at all, such as a sequence, is not provably a read."""
    assert Reader().facts(sa.Sequence("s")) == Facts({}, "unknown_sql", False)


def test_in_a_session() -> None:
    """A session finds the engine by these facts, also where Flask-SQLAlchemy takes the default."""
    flask_app = Flask("owners")
    flask_app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    flask_app.config["SQLALCHEMY_BINDS"] = {"orders": "sqlite://", "legacy": "sqlite://"}
    db.init_app(flask_app)
    found = {}
    with flask_app.app_context():
        db.create_all()
        for models in (MAIN, ORDERS, LEGACY):
            db.session.execute(sa.insert(models.table).values(name=models.bind_key))
            statement = sa.select(sa.select(models.table.c.name).subquery())
            found[models.bind_key] = db.session.scalars(statement).all()
        with pytest.raises(CrossBindError, match="'main_plain'"):
            db.session.execute(sa.select(MAIN.table, ORDERS.table))
        db.session.close()
        for engine in db.engines.values():
            engine.dispose()
    assert found == {None: [None], "orders": ["orders"], "legacy": ["legacy"]}


Selects = st.SearchStrategy[t.Any]

numbers = itertools.count()


def selects(models: Models) -> Selects:
    """Selects of one column ``x`` over tables of one bind, nested in each other in many ways."""
    columns = [models.table.c.id, models.Node.id, models.Leaf.node_id, models.Manager.id]
    simple = st.sampled_from([column.label("x") for column in columns]).map(sa.select)
    return st.recursive(simple, wrapped, max_leaves=6)


def wrapped(inner: Selects) -> Selects:
    return st.one_of(
        st.builds(lambda s: sa.select(s.subquery().c.x), inner),
        st.builds(lambda s: sa.select(s.cte(f"c{next(numbers)}").c.x), inner),
        st.builds(lambda s: sa.select(s.scalar_subquery().label("x")), inner),
        st.builds(lambda s: sa.select(sa.func.count(s.subquery().c.x).label("x")), inner),
        st.builds(lambda s, limit: sa.select(s.limit(limit).subquery().c.x), inner, st.integers(1)),
        st.builds(
            lambda s: sa.select(sa.func.row_number().over(order_by=s.subquery().c.x).label("x")),
            inner,
        ),
        st.builds(combined, st.sampled_from(COMBINATIONS), inner, inner),
    )


#: Ways to make one select of column ``x`` out of two.
COMBINATIONS: tuple[t.Callable[[t.Any, t.Any], t.Any], ...] = (
    lambda a, b: sa.select(sa.union_all(a, b).subquery().c.x),
    lambda a, b: sa.select(sa.except_(a, b).subquery().c.x),
    lambda a, b: sa.select(a.subquery().c.x).where(b.exists()),
    lambda a, b: sa.select(a.subquery().c.x).where(~b.exists()),
    lambda a, b: (lambda s: sa.select(s.c.x).where(s.c.x.in_(b)))(a.subquery()),
    lambda a, b: (lambda s, o: sa.select(s.c.x).join(o, s.c.x == o.c.x))(a.subquery(), b.cte()),
    lambda a, b: sa.select(a.subquery().c.x).order_by(b.scalar_subquery()),
    lambda a, b: sa.select(a.subquery().c.x).add_cte(b.cte(f"beside{next(numbers)}")),
    lambda a, b: sa.select(
        sa.case((sa.literal(1) == b.scalar_subquery(), a.scalar_subquery())).label("x")
    ),
    lambda a, b: sa.select(a.subquery().c.x).join(sa.lateral(b), sa.true()),
    lambda a, b: sa.select(a.subquery().c.x).group_by("x").having(b.scalar_subquery() > 1),
)


def combined(combine: t.Callable[[t.Any, t.Any], t.Any], a: t.Any, b: t.Any) -> t.Any:
    return combine(a, b)


reader = Reader()


@settings(deadline=None)
@given(st.one_of(*[st.tuples(st.just(m), selects(m)) for m in (MAIN, ORDERS, LEGACY)]))
def test_any_select_of_one_bind(drawn: tuple[Models, t.Any]) -> None:
    """However selects of one bind are nested, it owns the whole, and the whole is a read."""
    models, statement = drawn
    for facts in (reader.facts(statement), Reader().facts(statement)):
        assert single_owner(facts.owners) == (models.bind_key,)
        assert facts.not_read is None


@settings(deadline=None)
@given(
    selects(MAIN),
    selects(ORDERS),
    st.sampled_from(COMBINATIONS),
    st.booleans(),
    st.integers(0, 3),
)
def test_any_select_of_two_binds(
    a: t.Any, b: t.Any, combine: t.Callable[[t.Any, t.Any], t.Any], swapped: bool, depth: int
) -> None:
    """However deep a second bind's table hides in a select, the statement is refused."""
    statement = combine(b, a) if swapped else combine(a, b)
    for _ in range(depth):
        statement = sa.select(statement.subquery().c.x)
    for facts in (reader.facts(statement), Reader().facts(statement)):
        assert facts.owners.keys() == {None, "orders"}
        with pytest.raises(CrossBindError, match=r"\(bind 'orders'\)"):
            assert single_owner(facts.owners) is None


@pytest.mark.parametrize("operator", ["REGEXP", "rlike", "DIV", "->>", "@>", "<=>", "%"])
def test_operators(operator: str) -> None:
    """A custom operator of signs, or one of the known words, reads."""
    assert Reader().facts(sa.select(node.id.op(operator)(1))).not_read is None


@pytest.mark.parametrize("operator", ["+ get_lock('x', 1) +", ":=", "; DELETE", "OVERLAPS", "(1)"])
def test_no_operators(operator: str) -> None:
    """A custom operator that is other SQL text is not provably a read."""
    assert Reader().facts(sa.select(node.id.op(operator)(1))).not_read == "unknown_sql"


@pytest.mark.parametrize(
    "statement",
    [
        sa.insert(node).values([{"name": sa.select(ORDERS.table.c.name).scalar_subquery()}]),
        sa.select(
            node,
            sa.values(sa.column("x", sa.String), name="v").data(
                [(sa.select(ORDERS.table.c.name).scalar_subquery(),)]
            ),
        ),
    ],
    ids=["insert", "select"],
)
def test_owners_in_rows_of_values(statement: t.Any) -> None:
    """A table of another bind is found in the rows of VALUES, too."""
    assert Reader().facts(statement).owners.keys() == {None, "orders"}


def test_owner_of_a_sequence() -> None:
    """A sequence belongs to the bind of its metadata, alone and in a select."""
    sequence = sa.Sequence("numbers", metadata=db.metadatas["orders"])
    for statement in (sequence, sa.select(sequence.next_value())):
        assert Reader().facts(statement) == Facts({"orders": "numbers"}, "unknown_sql", False)
    assert Reader().facts(sa.Sequence("free")) == Facts({}, "unknown_sql", False)


def test_entities_from_text() -> None:
    """``select(…).from_statement(text(…))`` is text: a replica scope takes it at its word."""
    statement: t.Any = sa.select(node).from_statement(sa.text("SELECT * FROM main_node"))
    assert Reader().facts(statement).is_text
    statement = sa.select(node).from_statement(sa.select(plain))
    assert not Reader().facts(statement).is_text
