"""Stored procedures on MariaDB: every result set, every OUT value, and the error that came last."""

from __future__ import annotations

import datetime
import decimal
import typing as t

import pytest
import sqlalchemy as sa

from flask_commondb import ProcedureNotSupported
from flask_commondb import ProcedureResult
from flask_commondb.signals import procedure_called

from .apps import Lab

if t.TYPE_CHECKING:
    from pathlib import Path

    from .proxy import Proxy
    from .servers import Database
    from .servers import MariaDBCluster


@pytest.fixture
def lab(procedures: Database[MariaDBCluster]) -> t.Iterator[Lab]:
    lab = Lab(procedures.primary_url, procedures.replica_urls)
    with lab.app.test_request_context(method="POST"):
        yield lab
    assert lab.checked_out() == 0
    lab.dispose()


def rows(result: ProcedureResult) -> list[tuple[t.Any, ...]]:
    return [tuple(row) for row in result]


def sets(result: ProcedureResult) -> list[list[tuple[t.Any, ...]]]:
    return [[tuple(row) for row in one] for one in result.sets]


def log(database: Database[MariaDBCluster]) -> list[tuple[t.Any, ...]]:
    """What other clients see in the procedures' own table."""
    return [tuple(row) for row in database.execute("SELECT who, val FROM np_log ORDER BY id")]


# Results --------------------------------------------------------------------------------------


def test_the_result_is_the_first_set(lab: Lab) -> None:
    """What ``callproc`` returns is a SQLAlchemy Result of the first result set."""
    assert isinstance(lab.db.callproc("np_in", 1, "x"), sa.Result)
    assert rows(lab.db.callproc("np_in", 1, "x")) == [(1, "x")]
    assert lab.db.callproc("np_in", 1, "x").one().b == "x"
    assert dict(lab.db.callproc("np_in", 1, "x").mappings().one()) == {"a": 1, "b": "x"}
    assert lab.db.callproc("np_in", 7, "x").scalars().all() == [7]
    assert lab.db.callproc("np_in", 1, "x").first() == (1, "x")
    assert list(lab.db.callproc("np_in", 1, "x").keys()) == ["a", "b"]
    assert [len(part) for part in lab.db.callproc("np_rows", 5).partitions(2)] == [2, 2, 1]


def test_every_result_set(lab: Lab) -> None:
    """Empty sets, duplicate names and unnamed columns come in their order, none is lost."""
    result = lab.db.callproc("np_multi")
    assert sets(result) == [[(1,)], [], [(1, 2)], [(2, 0)], [(None,)], [("last",)]]
    assert result.sets[0] is result
    assert list(lab.db.callproc("np_multi").sets[1].keys()) == ["a"]


@pytest.mark.parametrize("count", [0, 1, 100])
def test_any_number_of_sets(lab: Lab, count: int) -> None:
    """A procedure may return none, one or a hundred sets."""
    assert sets(lab.db.callproc("np_n_sets", count)) == [[(n + 1,)] for n in range(count)]


def test_no_set(lab: Lab) -> None:
    """After a procedure without a result set, asking for rows is SQLAlchemy's own error."""
    result = lab.db.callproc("np_nothing")
    assert result.sets == ()
    with pytest.raises(sa.exc.ResourceClosedError, match="closed"):
        result.all()


def test_sets_of_inner_procedures(lab: Lab) -> None:
    """Result sets of procedures that a procedure calls are there, too."""
    result = lab.db.callproc("np_nested")
    assert sets(result) == [[(42,)], [(1,)], [(2,)]]
    assert result.out == {"total": 43}


# OUT and INOUT --------------------------------------------------------------------------------


def test_modes_are_found_out(lab: Lab) -> None:
    """IN and INOUT take an argument, OUT none; an OUT that is never set is ``None`` every time."""
    for _ in range(2):
        result = lab.db.callproc("np_mixed", 10, 5)
        assert sets(result) == [[(10,)], [(15, 10), (1, 2)]]
        assert result.out == {"b": 15, "c": decimal.Decimal("3.333333"), "never_set": None}
    assert lab.db.callproc("np_out").out == {"a": 42, "b": "żółw 'quoted' \\ %s"}
    assert lab.db.callproc("np_inout", 21).out == {"a": 42}
    assert lab.db.callproc("np_shadow", None, None).out == {"id": -1, "who": "was null"}


def test_many_parameters(lab: Lab) -> None:
    """Eleven parameters of mixed mode are not mixed up."""
    result = lab.db.callproc("np_many", 1, 3, 5, 6, 8, 10)
    assert sets(result) == [[(1, 3, 6, 8)]]
    assert result.out == {"a2": 1, "a4": 3, "a5": 6, "a7": 6, "a9": 8, "a10": -10, "a11": 11}


def test_types_of_out_values(lab: Lab) -> None:
    """OUT values have the Python types that a SELECT would give them."""
    out = dict(lab.db.callproc("np_types").out)
    assert len(out.pop("o_uuid")) == 36
    assert out.pop("o_flt") == pytest.approx(0.1)
    assert out == {
        "o_dec": decimal.Decimal("12345678901234567890.0123456789"),
        "o_dt": datetime.datetime(2024, 2, 29, 23, 59, 59, 123456),
        "o_date": datetime.date(2024, 2, 29),
        "o_time": -datetime.timedelta(hours=12, minutes=34, seconds=56.789),
        "o_ts": datetime.datetime(2024, 1, 2, 3, 4, 5),
        "o_json": '{"k": [1, 2.5, null, "ü"]}',
        "o_bin": b"\x00\xff'\"\\",
        "o_blob": b"\xde\xad\xbe\xef\x00",
        "o_null": None,
        "o_ubig": 18446744073709551615,
        "o_bit": 0b101010101,
        "o_bool": True,
        "o_year": 2024,
        "o_dbl": 1e308,
        "o_txt": "ß" * 10,
        "o_enum": "b",
        "o_set": "x,y",
    }
    assert type(out["o_bool"]) is bool


@pytest.mark.parametrize(
    "value",
    [
        "x' OR 1=1 -- ",
        'quote " and ` and \\',
        "%s %(x)s %%",
        "żółw 🐢",
        "\0nul",
        "",
        None,
    ],
)
def test_values_are_bound(lab: Lab, value: str | None) -> None:
    """Whatever a value holds, the procedure gets it, and nothing else happens."""
    assert rows(lab.db.callproc("np_in", 1, value)) == [(1, value)]


def test_a_long_out_value(lab: Lab) -> None:
    """An OUT of five million characters arrives whole."""
    assert len(lab.db.callproc("np_long_out", 5_000_000).out["t"]) == 5_000_000


# Names and arguments --------------------------------------------------------------------------


def test_streaming_session(lab: Lab) -> None:
    """A session that streams its results calls a procedure like any other."""
    lab.db.session.connection(execution_options={"stream_results": True})
    assert sets(lab.db.callproc("np_multi"))[-1] == [("last",)]
    assert lab.db.callproc("np_out").out["a"] == 42


def test_names(lab: Lab, procedures: Database[MariaDBCluster]) -> None:
    """Qualified names, quoted parts, percent signs and the longest name all reach the server."""
    schema = procedures.name
    assert rows(lab.db.callproc(f"{schema}.np_in", 1, "x")) == [(1, "x")]
    assert rows(lab.db.callproc(f"`{schema}`.`np_in`", 1, "x")) == [(1, "x")]
    assert rows(lab.db.callproc("NP_IN", 1, "x")) == [(1, "x")]
    assert lab.db.callproc("`np we``ird.näme`", 1).out == {"ö ut": 2}
    assert lab.db.callproc("np%s%(x)s", "a").out == {"a": "a%s"}
    assert lab.db.callproc("np_" + "0123456789" * 6 + "0").out == {"a": 64}


@pytest.mark.parametrize(
    "name", ["", ".", "a.b.c", "a.", "nul\0", "`open", "np_in(1); DROP", "a b"]
)
def test_bad_names(lab: Lab, name: str) -> None:
    """What is no name is refused before anything is sent, or by the server as unknown; no more."""
    with pytest.raises((ValueError, sa.exc.OperationalError), match=r"not the name|does not exist"):
        lab.db.callproc(name)


def test_argument_count(lab: Lab, procedures: Database[MariaDBCluster]) -> None:
    """Too few or too many arguments are a TypeError with the signature; nothing was called."""
    for args in ([], ["a", "b"]):
        with pytest.raises(TypeError, match=r"takes 1 .*np_err_after_dml\(IN w varchar\(64\)\)"):
            lab.db.callproc("np_err_after_dml", *args)
    lab.db.session.commit()
    assert log(procedures) == []


def test_no_such_procedure(lab: Lab) -> None:
    """An unknown procedure, and a function, are the server's own error."""
    for name in ("np_nope", "np_func", "nope.np_in"):
        with pytest.raises(sa.exc.OperationalError, match=r"does not exist|denied"):
            lab.db.callproc(name, 1)


def test_a_procedure_that_changes(lab: Lab, procedures: Database[MariaDBCluster]) -> None:
    """A procedure that gets another signature is called by it, without a restart."""
    assert lab.db.callproc("np_inout", 21).out == {"a": 42}
    procedures.execute("CREATE OR REPLACE PROCEDURE np_inout(IN a INT, IN b INT) SELECT a + b")
    assert rows(lab.db.callproc("np_inout", 1, 2)) == [(3,)]
    procedures.execute("CREATE OR REPLACE PROCEDURE np_inout(OUT a INT, INOUT b INT) SET a = b")
    with pytest.raises(TypeError, match="takes 1 "):
        lab.db.callproc("np_inout", 1, 2, 3)
    procedures.execute("CREATE OR REPLACE PROCEDURE np_inout(IN a INT) SELECT a")
    with pytest.raises(sa.exc.OperationalError, match="Incorrect number of arguments"):
        lab.db.callproc("np_inout", 1)
    assert rows(lab.db.callproc("np_inout", 1)) == [(1,)]


# Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [("np_err_first", "first"), ("np_err_mid", "mid"), ("np_err_in_rows", "more than 1 row")],
)
def test_errors_early_and_late(lab: Lab, name: str, message: str) -> None:
    """An error is raised wherever it comes: at once, after a set, between rows."""
    with pytest.raises(sa.exc.OperationalError, match=message):
        lab.db.callproc(name)
    assert lab.db.session.scalar(sa.text("SELECT 1")) == 1
    lab.db.session.commit()


def test_nothing_half_done(lab: Lab, procedures: Database[MariaDBCluster]) -> None:
    """A procedure that debits, selects, then signals leaves nothing once it is rolled back."""
    procedures.execute("CREATE TABLE account (name CHAR(1) PRIMARY KEY, balance INT)")
    procedures.execute("INSERT INTO account VALUES ('a', 100), ('b', 0)")
    procedures.execute("""
        CREATE PROCEDURE transfer(IN amount INT) BEGIN
          UPDATE account SET balance = balance - amount WHERE name = 'a';
          SELECT balance FROM account WHERE name = 'a';
          SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'credit failed';
        END""")
    with pytest.raises(sa.exc.OperationalError, match="credit failed"), lab.db.transaction():
        lab.db.callproc("transfer", 50)
    assert procedures.execute("SELECT balance FROM account ORDER BY name") == [(100,), (0,)]


def test_killed_while_it_runs(lab: Lab, procedures: Database[MariaDBCluster]) -> None:
    """A connection killed in a call is an OperationalError; after a rollback all goes on."""
    connection = lab.db.session.scalar(sa.text("SELECT CONNECTION_ID()"))
    with pytest.raises(sa.exc.OperationalError, match="killed") as caught:
        procedures.execute(
            "CREATE OR REPLACE PROCEDURE suicide() BEGIN SELECT 1; KILL CONNECTION_ID(); END"
        )
        lab.db.callproc("suicide")
    assert caught.value.connection_invalidated
    lab.db.session.rollback()
    assert lab.db.session.scalar(sa.text("SELECT CONNECTION_ID()")) != connection


def test_warnings_and_rowcount(lab: Lab) -> None:
    """Warnings that the server kept, and the rows that the last change affected, are told."""
    result = lab.db.callproc("np_warn")
    assert result.warnings == (("Warning", 1642, "just a warning"),)
    assert result.out == {"a": 1}
    result = lab.db.callproc("np_dml_select", "me")
    assert sets(result) == [[("me", 1)], [(2,)]]
    assert result.rowcount == 2
    assert result.warnings == ()


# The session's transaction --------------------------------------------------------------------


def test_runs_in_the_transaction(lab: Lab, procedures: Database[MariaDBCluster]) -> None:
    """A procedure sees what the session has changed, and is undone with it."""
    procedures.execute("CREATE PROCEDURE titles() SELECT title FROM post")
    with lab.app.app_context():
        lab.db.create_all()
    lab.db.session.add(lab.Post(title="pending"))
    assert lab.db.callproc("titles").scalars().all() == ["pending"]
    lab.db.callproc("np_dml_select", "lost")
    lab.db.session.rollback()
    assert lab.db.callproc("titles").scalars().all() == []
    assert log(procedures) == []


def test_session_of_a_bind(procedures: Database[MariaDBCluster]) -> None:
    """With a bind key the call is part of that bind's session, and of no other."""
    lab = Lab(procedures.primary_url, config={"SQLALCHEMY_BINDS": {"b": procedures.primary_url}})
    with lab.request("POST"):
        lab.db.callproc("np_dml_select", "b", bind_key="b")
        lab.db.sessions["b"].callproc("np_dml_select", "b")
        with lab.db.transaction("b") as session:
            session.callproc("np_dml_select", "b")
            lab.db.callproc("np_dml_select", "default")
    assert log(procedures) == [("b", 2)] * 3
    lab.dispose()


def test_always_on_the_primary(lab: Lab, procedures: Database[MariaDBCluster]) -> None:
    """A call in a GET runs on the primary, also one that claims to read, and pins the unit."""
    procedures.execute("CREATE PROCEDURE who() READS SQL DATA SELECT @@server_id AS id")
    procedures.sync()
    with lab.request(), lab.routes() as routes:
        assert lab.db.session.scalar(sa.select(sa.literal(1))) == 1
        assert lab.db.callproc("who").scalars().one() == 1
        assert lab.db.session.scalar(sa.select(sa.literal(1))) == 1
    assert routes == [("replica", "read")] + [("primary", "procedure")] * 2


def test_dangerous_state_is_mended(lab: Lab) -> None:
    """After a procedure that switches NO_BACKSLASH_ESCAPES, bound values are escaped rightly."""
    lab.db.callproc("np_session")
    attack = "x\\' OR 1=1 -- "
    who = sa.text("SELECT COUNT(*) FROM (SELECT 'me' AS who) t WHERE who = :who")
    assert lab.db.session.scalar(who, {"who": attack}) == 0
    assert rows(lab.db.callproc("np_in", 1, attack)) == [(1, attack)]


# What it costs, and who is told ---------------------------------------------------------------


def test_round_trips(procedures: Database[MariaDBCluster], proxy: t.Callable[[int], Proxy]) -> None:
    """Once the signature is known: 1 command without OUT, 2 with OUT, 3 with INOUT."""
    link = proxy(procedures.cluster.primary.port)
    lab = Lab(procedures.cluster.primary.url(database=procedures.name, port=link.port))
    with lab.request("POST"):
        for name, args, cost in [
            ("np_in", (1, "x"), ["CALL"]),
            ("np_out", (), ["CALL", "SELECT"]),
            ("np_inout", (1,), ["SET", "CALL", "SELECT"]),
        ]:
            lab.db.callproc(name, *args)
            link.clear()
            lab.db.callproc(name, *args)
            assert [command.sql.split()[0] for command in link.commands] == cost
    lab.dispose()


def test_sqlalchemy_and_signals_are_told(lab: Lab) -> None:
    """A call shows in SQLAlchemy's cursor events and in our signal, with its error if it failed."""
    statements: list[str] = []
    calls: list[tuple[str, str | None, str | None]] = []

    def note(*args: t.Any) -> None:
        statements.append(args[2])

    def called(app: object, name: str, bind_key: str | None, error: Exception | None) -> None:
        calls.append((name, bind_key, type(error).__name__ if error else None))

    lab.db.callproc("np_in", 1, "x")
    sa.event.listen(lab.db.engine, "before_cursor_execute", note)
    with procedure_called.connected_to(called, lab.app):
        lab.db.callproc("np_in", 1, "x")
        with pytest.raises(sa.exc.OperationalError, match="mid"):
            lab.db.callproc("np_err_mid")
    assert statements[0] == "CALL `np_in`(%s, %s)"
    assert statements[-1] == "CALL `np_err_mid`()"
    assert calls == [("np_in", None, None), ("np_err_mid", None, "OperationalError")]


def test_receiver_that_raises(lab: Lab) -> None:
    """A receiver that raises does not hide what the server has said."""

    def receiver(app: object, **_: object) -> None:
        raise ZeroDivisionError("metrics")

    with procedure_called.connected_to(receiver, lab.app):
        with pytest.raises(sa.exc.OperationalError, match="mid"):
            lab.db.callproc("np_err_mid")
        assert rows(lab.db.callproc("np_in", 1, "x")) == [(1, "x")]


def test_cursor_class_of_the_user(procedures: Database[MariaDBCluster]) -> None:
    """A cursor class that the user has chosen for his connections stays in place after a call."""
    import pymysql

    lab = Lab(
        procedures.primary_url,
        engine_options={"connect_args": {"cursorclass": pymysql.cursors.SSCursor}},
    )
    with lab.request("POST"):
        assert rows(lab.db.callproc("np_in", 1, "x")) == [(1, "x")]
        with lab.db.cursor() as cursor:
            assert type(cursor) is pymysql.cursors.SSCursor
    lab.dispose()


def test_execute_only_user(procedures: Database[MariaDBCluster]) -> None:
    """A user who may only EXECUTE the procedure calls it like any other."""
    name = procedures.name
    procedures.execute("CREATE OR REPLACE USER only@'%' IDENTIFIED BY 'only'")
    procedures.execute(f"GRANT EXECUTE ON PROCEDURE {name}.np_mixed TO only@'%'")
    lab = Lab(procedures.cluster.primary.url(database=name).replace("app:app@", "only:only@"))
    with lab.request("POST"):
        assert lab.db.callproc("np_mixed", 10, 5).out["b"] == 15
    lab.dispose()
    procedures.execute("DROP USER only@'%'")


def test_another_server(tmp_path: Path) -> None:
    """On a server without support the error says so, and which server it is."""
    lab = Lab(f"sqlite:///{tmp_path}/app.db")
    with lab.request("POST"), pytest.raises(ProcedureNotSupported, match="sqlite"):
        lab.db.callproc("p")
    with lab.request("POST"), pytest.raises(NotImplementedError, match="PyMySQL"):
        lab.db.callproc("p")
    lab.dispose()
