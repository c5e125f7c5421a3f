"""``db.explain_route()``: what would happen and by which rule, which is what does happen then."""

from __future__ import annotations

import typing as t

import pytest
import sqlalchemy as sa

from flask_commondb import CrossBindError
from flask_commondb import Route
from flask_commondb import UnknownBindError
from flask_commondb.signals import routed

from .apps import Lab

if t.TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def lab(tmp_path: Path) -> t.Iterator[Lab]:
    """Two binds: the default one with a replica, another without."""
    lab = Lab(
        f"sqlite:///{tmp_path}/app.db",
        [f"sqlite:///file:{tmp_path}/app.db?uri=true"],
        {"SQLALCHEMY_BINDS": {"orders": f"sqlite:///{tmp_path}/orders.db"}},
    )
    lab.orders = sa.Table(  # type: ignore[attr-defined]
        "item",
        lab.db.metadatas.setdefault("orders", sa.MetaData(info={"bind_key": "orders"})),
        sa.Column("id", sa.Integer, primary_key=True),
    )
    with lab.app.app_context():
        lab.db.create_all()
    yield lab
    lab.dispose()


def read(lab: Lab) -> t.Any:
    return sa.select(lab.Post)


def write(lab: Lab) -> t.Any:
    return sa.insert(lab.Post).values(title="x")


def lock(lab: Lab) -> t.Any:
    return sa.select(lab.Post).with_for_update()


def text(lab: Lab) -> t.Any:
    return sa.text("SELECT 1")


def locked(lab: Lab) -> None:
    lab.db.session.execute(lock(lab))


CASES: list[tuple[str | None, t.Any, t.Any, tuple[str, str, int]]] = [
    ("GET", None, read, ("replica", "read", 6)),
    ("POST", None, read, ("primary", "method", 6)),
    (None, None, read, ("primary", "default", 6)),
    ("GET", None, write, ("primary", "write", 7)),
    ("GET", None, lock, ("primary", "locked", 7)),
    ("GET", None, text, ("primary", "unknown_sql", 7)),
    ("GET", lambda db: db.primary(), read, ("primary", "scope", 5)),
    ("POST", lambda db: db.replica(), read, ("replica", "scope", 5)),
    ("POST", lambda db: db.replica(), text, ("replica", "scope", 5)),
    ("GET", lambda db: db.replica("orders"), text, ("primary", "unknown_sql", 7)),
]


@pytest.mark.parametrize(("method", "scope", "statement", "expected"), CASES)
def test_rules(
    lab: Lab, method: str | None, scope: t.Any, statement: t.Any, expected: tuple[str, str, int]
) -> None:
    """It says server, role, reason and rule; the signal of the statement says the same."""
    told: list[tuple[t.Any, ...]] = []

    def note(app: object, bind_key: str | None, role: str, server: str, reason: str) -> None:
        told.append((bind_key, role, server, reason))

    context = lab.app.app_context() if method is None else lab.request(method)
    with context, routed.connected_to(note, lab.app):
        with (scope or (lambda db: db.replica("orders")))(lab.db):
            route = lab.db.explain_route(statement(lab))
            assert told == []
            lab.db.session.execute(statement(lab))
    assert (route.role, route.reason, route.rule) == expected
    assert told == [route[:4]]


def test_it_changes_nothing(lab: Lab) -> None:
    """To ask about a write does not move the unit of work to the primary, nor connect."""
    with lab.request():
        assert lab.db.explain_route(write(lab)).role == "primary"
        assert lab.checked_out() == 0
        assert lab.db.explain_route(read(lab)).role == "replica"
        with lab.routes() as routes:
            lab.titles()
    assert routes == [("replica", "read")]


def test_it_asks_no_policy(tmp_path: Path) -> None:
    """To ask does not take a turn of ``"round_robin"``."""
    file = f"sqlite:///{tmp_path}/default.db"
    lab = Lab(file, [file, f"{file}?timeout=5"], {"COMMONDB_POLICY": "round_robin"})
    engines: list[t.Any] = []
    for _ in range(4):
        with lab.request():
            lab.db.explain_route(sa.select(lab.Post))
            engines.append(lab.db.session.get_bind(clause=sa.select(lab.Post)))
    assert engines[0] is not engines[1]
    assert engines[:2] == engines[2:]
    lab.dispose()


def test_query(lab: Lab) -> None:
    """A ``Query`` is a SELECT like any other."""
    with lab.request():
        query = lab.db.session.query(lab.Post)
        assert lab.db.explain_route(query).role == "replica"
        assert lab.db.explain_route(query.with_for_update()).reason == "locked"


def test_what_came_before_counts(lab: Lab) -> None:
    """After a lock the unit of work stays on the primary, by rule 4, with the first reason."""
    with lab.request():
        locked(lab)
        route = lab.db.explain_route(read(lab))
    assert route == Route(None, "primary", "app.db", "locked", 4)


def test_no_replicas(lab: Lab) -> None:
    """A bind without replicas has its primary, by rule 3; a key names the session's bind."""
    orders = lab.orders  # type: ignore[attr-defined]
    expected = Route("orders", "primary", "orders.db", "no_replicas", 3)
    with lab.request():
        assert lab.db.explain_route(sa.select(orders)) == expected
        assert lab.db.explain_route(text(lab), "orders") == expected


def test_replica_down(lab: Lab) -> None:
    """With all replicas down, or behind, it is the primary by rule 8; the fallback counts."""
    (replica,) = lab.db.routers[lab.app].replica_sets[None].replicas
    with lab.request():
        replica.found_behind()
        with lab.db.replica(max_lag=4):
            assert lab.db.explain_route(read(lab))[1:] == ("primary", "app.db", "lag", 8)
        with lab.db.replica(max_lag=4, fallback="stale"):
            assert lab.db.explain_route(read(lab)).role == "replica"
        replica.breaker.trip()
        assert lab.db.explain_route(read(lab))[1:] == ("primary", "app.db", "replica_down", 8)
        with lab.db.replica(fallback="error"):
            assert lab.db.explain_route(read(lab))[1:] == ("refused", "", "replica_down", 8)


def test_bad_input(lab: Lab) -> None:
    """What could not be executed cannot be explained, with the same error."""
    orders = lab.orders  # type: ignore[attr-defined]
    with lab.request():
        for nothing in (None, "SELECT 1", lab.Post):
            with pytest.raises(sa.exc.ObjectNotExecutableError, match="Not an executable object"):
                lab.db.explain_route(nothing)
        with pytest.raises(UnknownBindError, match="Bind key 'nowhere'"):
            lab.db.explain_route(read(lab), "nowhere")
        with pytest.raises(CrossBindError, match="several binds"):
            lab.db.explain_route(sa.select(lab.Post, orders))
