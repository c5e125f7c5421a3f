"""Routing on a PostgreSQL primary with a streaming standby; the servers are asked who they are."""

from __future__ import annotations

import threading
import typing as t

import pytest
import sqlalchemy as sa

from .apps import Lab
from .servers import wait_until

if t.TYPE_CHECKING:
    from .servers import Database
    from .servers import PostgreSQLCluster


@pytest.fixture
def lab(postgresql_database: Database[PostgreSQLCluster]) -> t.Iterator[Lab]:
    database = postgresql_database
    lab = Lab(database.primary_url, database.replica_urls)
    with lab.app.app_context():
        lab.db.create_all()
        lab.db.session.add(lab.Post(title="first"))
        lab.db.session.commit()
    database.sync()
    yield lab
    assert lab.checked_out() == 0
    lab.dispose()


@pytest.fixture
def primary(postgresql_database: Database[PostgreSQLCluster]) -> int:
    return postgresql_database.cluster.primary.port


@pytest.fixture
def standby(postgresql_database: Database[PostgreSQLCluster]) -> int:
    return postgresql_database.cluster.standby.port


@pytest.mark.usefixtures("lab")
def test_conflict_with_recovery(
    postgresql_database: Database[PostgreSQLCluster], primary: int, standby: int
) -> None:
    """A read that the standby ends, because what it replays takes the rows away, is answered by the
    primary; the unit of work stays there."""
    cluster, name = postgresql_database.cluster, postgresql_database.name
    cluster.standby.execute("ALTER SYSTEM SET max_standby_streaming_delay = '100ms'")
    cluster.standby.execute("SELECT pg_reload_conf()")

    def is_reading() -> bool:
        ((count,),) = cluster.standby.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        )
        return bool(count)

    def disturb() -> None:
        wait_until(is_reading, "the read to be under way")
        for statement in ("DELETE FROM post", "VACUUM post", "ALTER TABLE post ADD COLUMN x int"):
            cluster.primary.execute(statement, database=name)

    again = Lab(
        postgresql_database.primary_url,
        postgresql_database.replica_urls,
        {"COMMONDB_READ_FUNCTIONS": ["inet_server_port", "pg_is_in_recovery", "pg_sleep"]},
    )
    # It would go on for longer than the test, if it were not ended.
    slow = sa.case((sa.func.pg_is_in_recovery(), sa.cast(sa.func.pg_sleep(60), sa.Text)), else_="")
    statement = sa.select(sa.func.inet_server_port(), slow, sa.func.count(again.Post.id))
    disturber = threading.Thread(target=disturb)
    try:
        with again.request(), again.routes() as routes:
            disturber.start()
            assert again.db.session.execute(statement).one() == (primary, "", 0)
            assert again.read() == primary
        expected = [("replica", "read"), ("primary", "conflict"), ("primary", "conflict")]
        assert routes == expected
        assert again.run(again.read) == standby
    finally:
        disturber.join()
        cluster.standby.execute("ALTER SYSTEM RESET max_standby_streaming_delay")
        cluster.standby.execute("SELECT pg_reload_conf()")
        again.dispose()


def test_by_method(lab: Lab, primary: int, standby: int) -> None:
    """GET is answered by the standby, POST by the primary."""
    assert lab.run(lab.read) == standby
    assert lab.run(lab.read, "POST") == primary


def test_a_write_in_a_get(lab: Lab, primary: int, standby: int) -> None:
    """A GET that writes succeeds, and reads from the primary from then on."""
    with lab.request():
        assert lab.read() == standby
        lab.db.session.add(lab.Post(title="second"))
        assert lab.read() == primary
        lab.db.session.commit()
        assert lab.titles() == ["first", "second"]


@pytest.mark.parametrize(
    "statement",
    [
        lambda lab: sa.select(lab.Post.id).with_for_update(skip_locked=True),
        lambda lab: sa.select(sa.func.nextval("post_id_seq")),
        lambda lab: sa.select(sa.func.pg_advisory_xact_lock(1)),
        lambda lab: sa.select(
            sa.update(lab.Post).values(title="x").returning(lab.Post.id).cte("changed").c.id
        ),
        lambda lab: sa.select(sa.Sequence("post_id_seq").next_value()),
        lambda lab: sa.text("UPDATE post SET title = 'x'"),
    ],
)
def test_what_a_standby_would_refuse(
    lab: Lab, primary: int, standby: int, statement: t.Callable[[Lab], t.Any]
) -> None:
    """Locks, sequences, advisory locks and a writing CTE go to the primary, without an error."""
    with lab.request():
        assert lab.read() == standby
        lab.db.session.execute(statement(lab))
        assert lab.read() == primary
        lab.db.session.commit()


def test_replica_scope(lab: Lab, standby: int) -> None:
    """``db.replica()`` works outside a request, and a raw cursor in it is the standby's."""
    with lab.app.app_context(), lab.db.replica():
        assert lab.read() == standby
        with lab.db.cursor() as cursor:
            cursor.execute("SELECT pg_is_in_recovery()")
            assert cursor.fetchone() == (True,)


def test_transaction_left_open_on_the_standby(
    lab: Lab, postgresql_database: Database[PostgreSQLCluster]
) -> None:
    """A snapshot that text has opened in a replica scope does not wait for the next user."""
    with lab.request(), lab.db.replica():
        lab.db.session.execute(sa.text("BEGIN ISOLATION LEVEL REPEATABLE READ"))
        assert lab.titles() == ["first"]
    postgresql_database.execute("UPDATE post SET title = 'changed'")
    postgresql_database.sync()
    assert lab.run(lab.titles) == ["changed"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_rows_in_portions(lab: Lab, method: str) -> None:
    """``yield_per`` works on the standby, which has no transaction, as it does on the primary."""
    with lab.request(method):
        statement = sa.select(lab.Post.title).execution_options(yield_per=1)
        assert list(lab.db.session.scalars(statement)) == ["first"]


def test_changed_by_a_raw_cursor(lab: Lab) -> None:
    """A standby connection that a raw cursor has taken out of autocommit leaks nothing."""
    for _ in range(20):  # more than the pool has
        with lab.request(), lab.db.replica(), lab.db.cursor() as cursor:
            cursor.connection.autocommit = False
            cursor.execute("SELECT 1")
    assert lab.checked_out() == 0
    assert lab.run(lab.titles) == ["first"]


def test_standby_down(
    lab: Lab, primary: int, postgresql_database: Database[PostgreSQLCluster]
) -> None:
    """With the standby dead the primary answers, in the middle of a unit as well."""
    with lab.request():
        lab.read()
        postgresql_database.cluster.standby.kill()
        assert lab.read() == primary
    assert lab.run(lab.read) == primary


def test_a_failed_statement_on_the_standby(lab: Lab, standby: int) -> None:
    """An error on the standby leaves no failed transaction behind: the next statement works."""
    with lab.request(), lab.db.replica():
        with pytest.raises(sa.exc.ProgrammingError, match="missing"):
            lab.db.session.execute(sa.text("SELECT * FROM missing"))
        assert lab.read() == standby


def test_commit_and_rollback_of_a_pooled_primary(
    lab: Lab, postgresql_database: Database[PostgreSQLCluster]
) -> None:
    """A pool of one shows each unit what another client has committed between them."""
    small = Lab(postgresql_database.primary_url, engine_options={"pool_size": 1, "max_overflow": 0})
    for number in range(50):
        postgresql_database.execute(f"UPDATE post SET title = 'now {number}'")
        assert small.run(small.titles) == [f"now {number}"]
    small.dispose()
