"""Our reading of PyMySQL's results beside PyMySQL's own: the same statements, the same answers."""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
import typing as t
from pathlib import Path

import pymysql
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from pymysql.connections import Connection as PyMySQLConnection
from pymysql.connections import MySQLResult
from pymysql.converters import encoders

from flask_commondb.dialects import packets
from flask_commondb.dialects.pymysql import connection_class

from .servers import Database
from .servers import MariaDBCluster

#: Column types, and values for each.
TYPES: dict[str, st.SearchStrategy[t.Any]] = {
    "TINYINT(1)": st.integers(-128, 127),
    "INT UNSIGNED": st.integers(0, 2**32 - 1),
    "BIGINT": st.integers(-(2**63), 2**63 - 1),
    "DECIMAL(20,6)": st.decimals(-(10**13), 10**13, places=6),
    "DOUBLE": st.floats(allow_nan=False, allow_infinity=False),
    "FLOAT": st.floats(-1e30, 1e30),
    "BIT(17)": st.integers(0, 2**17 - 1),
    "YEAR": st.integers(1901, 2155),
    "DATE": st.dates(datetime.date(1, 1, 1)) | st.just("0000-00-00"),
    "DATETIME(6)": st.datetimes() | st.just("0000-00-00 00:00:00"),
    "TIMESTAMP(3) NULL": st.datetimes(datetime.datetime(1971, 1, 1), datetime.datetime(2037, 1, 1)),
    "TIME(2)": st.timedeltas(datetime.timedelta(hours=-838), datetime.timedelta(hours=838)),
    "CHAR(20)": st.text(max_size=20),
    "VARCHAR(300)": st.text(max_size=300),
    "MEDIUMTEXT": st.text() | st.integers(240, 70_000).map(lambda size: "é" * size),
    "VARBINARY(300)": st.binary(max_size=300),
    "MEDIUMBLOB": st.binary() | st.integers(240, 70_000).map(lambda size: b"\xff" * size),
    "ENUM('a','ż')": st.sampled_from(["a", "ż"]),
    "SET('a','b')": st.sampled_from(["", "a", "a,b"]),
    "JSON": st.sampled_from(['{"a": [1, "ż"]}', "null", "[]"]),
    "INET6": st.ip_addresses(v=6).map(str),
    "UUID": st.uuids().map(str),
    "POINT": st.none(),
}

#: Statements with something about their packets.
STATEMENTS = {
    "nothing": "DO 1",
    "no rows": "SELECT 1 AS a FROM DUAL WHERE FALSE",
    "no value": "SELECT NULL",
    "nulls": "SELECT NULL, 1, NULL UNION ALL SELECT 2, NULL, NULL",
    "empty": "SELECT '', 1",
    "warnings": "SELECT CAST('x' AS INT), CAST('y' AS INT)",
    "same names": "SELECT 1 AS a, 2 AS a",
    "many columns": "SELECT " + ", ".join(map(str, range(700))),
    "many rows": "SELECT seq, REPEAT('x', seq % 300), NULL FROM seq_1_to_5000",
    "every length": "SELECT REPEAT('x', seq) FROM seq_0_to_600",
    "long values": "SELECT 1, REPEAT('x', seq + 65530), 2 FROM seq_1_to_20",
    "first value 16 MB": "SELECT REPEAT('x', 16777216), 1",
    "a packet just full": "SELECT REPEAT('x', 16777215 - 4)",
    "a packet nearly full": "SELECT REPEAT('x', 16777214 - 4), ''",
    "two packets": "SELECT 1, REPEAT('x', 20000000) UNION ALL SELECT 2, 'y'",
    "error": "SELECT nothing FROM DUAL",
    "error in the rows": "SELECT seq, REPEAT('x', 100), (SELECT two.seq FROM seq_1_to_2 AS two"
    " WHERE outside.seq = 900) FROM seq_1_to_1000 AS outside",
    "procedure": "CALL several()",
    "error in a procedure": "CALL late()",
}


class Pair:
    """PyMySQL's connection and ours, with the same arguments."""

    def __init__(self, url: str, **arguments: t.Any) -> None:
        address = sa.make_url(url)
        for argument in ("host", "port", "database"):
            arguments[argument] = getattr(address, argument)
        arguments.update(user=address.username, password=address.password or "")
        arguments.setdefault("ssl_disabled", True)
        self.plain: t.Any = PyMySQLConnection(**arguments)
        self.ours: t.Any = connection_class()(**arguments)

    def same(self, statement: str, args: t.Any = None, cursor: t.Any = None) -> t.Any:
        """What both answer; twice, as ours remembers."""
        for _ in range(2):
            plain = answer(self.plain, statement, args, cursor)
            ours = answer(self.ours, statement, args, cursor)
            assert shown(ours) == shown(plain)
            assert self.ours._next_seq_id == self.plain._next_seq_id
        return plain

    def close(self) -> None:
        for connection in (self.plain, self.ours):
            if connection.open:
                connection.close()


def answer(connection: t.Any, statement: str, args: t.Any = None, cursor: t.Any = None) -> t.Any:
    """All that a statement's cursor tells, set after set, and the error at the end."""
    seen: list[t.Any] = []
    with contextlib.closing(connection.cursor(cursor)) as open_cursor:
        try:
            open_cursor.execute(statement, args)
            while True:
                seen.append(told(open_cursor, open_cursor.fetchall()))
                if not open_cursor.nextset():
                    break
        except Exception as error:
            seen.append((type(error), error.args))
    return seen


def told(cursor: t.Any, rows: t.Any) -> t.Any:
    result = cursor._result
    fields = [
        {slot: getattr(field, slot, None) for slot in (*vars(field), "_data")}
        for field in getattr(result, "fields", ())
    ]
    return (
        rows,
        cursor.description,
        cursor.rowcount,
        cursor.lastrowid,
        cursor.warning_count,
        fields,
        getattr(result, "converters", None),
        (result.has_next, result.affected_rows, result.message, result.server_status),
        result.connection,
    )


def shown(value: t.Any) -> str:
    """As text: a NaN equals itself, and 1 is not True."""
    return repr(value)


@pytest.fixture
def pair(mariadb_database: Database[MariaDBCluster]) -> t.Iterator[Pair]:
    for name, body in [
        ("several", "SELECT 1, 2; SELECT 'x' FROM seq_1_to_400; DO 1; SELECT NULL;"),
        ("late", "SELECT 1; SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'too late';"),
    ]:
        mariadb_database.execute(f"CREATE PROCEDURE {name}() BEGIN {body} END")
    (limit,) = mariadb_database.execute("SELECT @@GLOBAL.max_allowed_packet")[0]
    mariadb_database.execute("SET GLOBAL max_allowed_packet = 67108864")
    pair = Pair(mariadb_database.primary_url, local_infile=True)
    yield pair
    mariadb_database.execute(f"SET GLOBAL max_allowed_packet = {limit}")
    pair.close()


@pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)
def test_statements(pair: Pair, statement: str) -> None:
    """Rows of every size, errors before and between them, and several results come out alike."""
    pair.same(statement)
    pair.same("SELECT 'usable'")


def test_the_statements(pair: Pair) -> None:
    """The statements above are what they are called."""

    def last(name: str) -> t.Any:
        return pair.same(STATEMENTS[name])[-1]

    assert last("error in the rows")[1][0] == 1242
    assert last("error in a procedure")[1] == (1644, "too late")
    assert len(pair.same(STATEMENTS["procedure"])) == 4
    assert len(last("two packets")[0][0][1]) == 20_000_000
    assert last("warnings")[4] == 2


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_types(pair: Pair, data: st.DataObject) -> None:
    """Every type of column, and NULL in any of them, gives the same values."""
    types = data.draw(st.lists(st.sampled_from(list(TYPES)), min_size=1, max_size=8))
    columns = ", ".join(f"c{index} {type_}" for index, type_ in enumerate(types))
    row = st.tuples(*[st.none() | TYPES[type_] for type_ in types])
    rows = data.draw(st.lists(row, max_size=6))
    with pair.plain.cursor() as cursor:
        cursor.execute("SET sql_mode = ''")  # a zero date is a value, too
        cursor.execute("DROP TABLE IF EXISTS sample")
        cursor.execute(f"CREATE TABLE sample (number INT PRIMARY KEY, {columns})")
        places = ", ".join(["%s"] * len(types))
        for number, values in enumerate(rows):
            cursor.execute(f"INSERT INTO sample VALUES ({number}, {places})", values)
        pair.plain.commit()
    (seen,) = pair.same("SELECT * FROM sample ORDER BY number")
    assert len(seen[0]) == len(rows)
    names = ", ".join(f"c{index}" for index in reversed(range(len(types))))
    pair.same(f"SELECT {names} FROM sample ORDER BY number")
    pair.plain.rollback()
    pair.ours.rollback()


@pytest.mark.parametrize(
    "cursor",
    [pymysql.cursors.DictCursor, pymysql.cursors.SSCursor, pymysql.cursors.SSDictCursor],
    ids=lambda cursor: cursor.__name__,
)
def test_cursors(pair: Pair, cursor: type[t.Any]) -> None:
    """Cursors of other kinds see the same; for unbuffered ones it is PyMySQL itself that reads."""
    pair.same("SELECT seq AS a, 'x' AS a FROM seq_1_to_300", cursor=cursor)
    with contextlib.closing(pair.ours.cursor(cursor)) as opened:
        opened.execute("SELECT 1")
        assert (type(opened._result) is MySQLResult) == cursor.__name__.startswith("SS")
        opened.fetchall()


def test_load_data_local(pair: Pair, tmp_path: Path) -> None:
    """LOAD DATA LOCAL sends its file, and one that is not there is the same error."""
    with pair.plain.cursor() as cursor:
        cursor.execute("CREATE TABLE loaded (word VARCHAR(20))")
    (tmp_path / "words").write_text("one\ntwo\n")
    for name in ("words", "missing"):
        pair.same(f"LOAD DATA LOCAL INFILE '{tmp_path / name}' INTO TABLE loaded")
    pair.plain.commit()
    pair.ours.commit()
    assert pair.same("SELECT COUNT(*) FROM loaded")[0][0] == ((8,),)


def test_a_converter_of_the_callers(pair: Pair) -> None:
    """What a connection's own converters make of a value is not another connection's business."""
    statement = "SELECT 1, 'x', 2"
    pair.same(statement)
    for connection in (pair.plain, pair.ours):
        connection.decoders = {**connection.decoders, pymysql.constants.FIELD_TYPE.LONG: str.upper}
    assert pair.same(statement)[0][0] == (("1", "x", "2"),)
    for connection in (pair.plain, pair.ours):
        connection.decoders = {pymysql.constants.FIELD_TYPE.LONG: lambda value: 1 / 0}
    pair.same("SELECT 1")


@pytest.mark.parametrize(
    "arguments", [{"use_unicode": False}, {"charset": "latin1"}, {"conv": encoders}]
)
def test_other_connections(
    pair: Pair, mariadb_database: Database[MariaDBCluster], arguments: dict[str, t.Any]
) -> None:
    """What one connection has parsed is not used where another one would parse it otherwise."""
    statement = "SELECT 'x' AS a, 1.5 AS b, CAST('y' AS BINARY) AS c, NOW() - NOW() AS d"
    pair.same(statement)
    other = Pair(mariadb_database.primary_url, **arguments)
    other.same(statement)
    other.close()
    pair.same(statement)


def test_memory(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more descriptions are remembered than there is room for."""
    monkeypatch.setattr(packets, "SIZE", 10)
    packets._descriptions.clear()
    for number in range(25):
        pair.same(f"SELECT 1 AS a{number}")
        assert 1 <= len(packets._descriptions) <= 10


@pytest.mark.parametrize("statement", ["SELECT SLEEP(5)", "SELECT seq FROM seq_1_to_3"])
def test_kill(pair: Pair, mariadb_database: Database[MariaDBCluster], statement: str) -> None:
    """A connection that is killed in a statement, or before it, fails alike."""
    errors = []
    for connection in (pair.plain, pair.ours):
        kill = threading.Timer(0.2, mariadb_database.execute, [f"KILL {connection.thread_id()}"])
        kill.start()
        if "SLEEP" not in statement:
            kill.join()
        errors.append(answer(connection, statement))
    assert shown(errors[0]) == shown(errors[1])
    assert errors[0][0][1][0] in (1317, 2006, 2013)


# -- what a real server has sent, cut off, in pieces and broken ------------------------------


class Replay:
    """Sends recorded bytes to a connection that believes to have sent a command."""

    def __init__(self, connection_type: type[t.Any], read_timeout: float | None = None) -> None:
        self.connection: t.Any = connection_type(
            defer_connect=True, read_timeout=read_timeout, ssl_disabled=True
        )
        self._server, client = socket.socketpair()
        self.connection._sock = client
        self.connection._rfile = client.makefile("rb")
        self.connection._current_timeout = None
        self.connection._next_seq_id = 1
        client.settimeout(read_timeout)

    def answer(self, data: t.Sequence[bytes], *, ends: bool = True) -> t.Any:
        def send() -> None:
            with contextlib.suppress(OSError):
                for part in data:
                    self._server.sendall(part)
            if ends:
                self._server.close()

        sender = threading.Thread(target=send)
        sender.start()
        try:
            count = self.connection._read_query_result()
            result = self.connection._result
            return count, result.rows, result.description, result.has_next, result.warning_count
        except Exception as error:
            return type(error), error.args, self.connection.open
        finally:
            sender.join()
            self._server.close()
            self.connection._force_close()


def recorded(pair: Pair, statement: str) -> bytes:
    """What the server answers to a statement."""
    connection = pair.plain
    seen: list[bytes] = []
    read = connection._read_bytes

    def note(size: int) -> bytes:
        seen.append(read(size))
        return seen[-1]

    connection._read_bytes = note
    try:
        connection.query(statement)
    except pymysql.Error:
        pass
    finally:
        del connection._read_bytes
    return b"".join(seen)


RECORDED = (
    "SELECT 1 AS a, NULL AS b, 'é' AS c, NOW() AS d UNION ALL SELECT 2, 3, REPEAT('y', 260), 4"
)


def compared(data: t.Sequence[bytes], **arguments: t.Any) -> None:
    timeout = arguments.pop("read_timeout", None)
    for _ in range(2):
        plain, ours = (
            Replay(connection_type, timeout).answer(data, **arguments)
            for connection_type in (PyMySQLConnection, connection_class())
        )
        assert shown(ours) == shown(plain)


def test_cut(pair: Pair) -> None:
    """A link that is cut at any byte of an answer is PyMySQL's own error 2013."""
    data = recorded(pair, RECORDED)
    compared([data])
    for end in range(len(data)):
        compared([data[:end]])
        assert Replay(connection_class()).answer([data[:end]])[1][0] == 2013


def test_read_timeout(pair: Pair) -> None:
    """A server that stops in the middle of an answer is given up after ``read_timeout``."""
    data = recorded(pair, RECORDED)
    for end in range(0, len(data), 23):
        compared([data[:end]], ends=False, read_timeout=0.01)


def test_broken(pair: Pair) -> None:
    """Bytes that are wrong have the same outcome, be it an error or a wrong value."""
    data = recorded(pair, RECORDED)
    for place in range(len(data)):
        for value in {data[place] ^ 1, 0, 0xFB, 0xFC, 0xFD, 0xFE, 0xFF} - {data[place]}:
            compared([data[:place] + bytes([value]) + data[place + 1 :]])


@pytest.mark.parametrize("name", ["nulls", "no rows", "many rows", "every length", "long values"])
def test_pieces(pair: Pair, name: str) -> None:
    """However an answer arrives, it is the same."""
    data = recorded(pair, STATEMENTS[name])
    for size in (1, 2, 3, 5, 17, 4096, 8191, 8192, 8193):
        if len(data) / size < 20_000:
            compared([data[start : start + size] for start in range(0, len(data), size)])
