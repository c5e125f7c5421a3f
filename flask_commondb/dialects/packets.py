"""PyMySQL's results, read faster.

Owns: a result that takes its rows out of the socket's buffer, where PyMySQL makes two reads and an
object for each packet, and that remembers what the descriptions of its columns were parsed to.

Must not: have an opinion of its own on the protocol. Whatever is not a complete, ordinary row in
the buffer is left there for PyMySQL's own code: an error, a packet out of order, a value of 64 KB,
a row of 16 MB, a link that was cut. ``tests/test_packets.py`` compares the two.
"""

from __future__ import annotations

import functools
import typing as t

#: Descriptions of columns that are remembered, of at most 8 KB each; then it starts again.
SIZE = 300

#: First bytes: of the packet that ends a result, of NULL, and of a length in the next two bytes.
_EOF, _NULL, _TWO_BYTES = 0xFE, 0xFB, 0xFC


def read_result(connection: t.Any) -> t.Any:
    """Read a result with all its rows, as PyMySQL's ``_read_query_result`` does."""
    connection._result = None
    result = _result_class()(connection)
    result.read()
    connection._result = result
    if result.server_status is not None:
        connection.server_status = result.server_status
    return result.affected_rows


@functools.cache
def _result_class() -> type[t.Any]:
    from pymysql.connections import MySQLResult
    from pymysql.constants.CR import CR_SERVER_LOST
    from pymysql.converters import through
    from pymysql.err import OperationalError
    from pymysql.protocol import MysqlPacket

    base: t.Any = MySQLResult  # whose private parts have no types

    class Result(base):  # type: ignore[misc]
        connection: t.Any
        converters: t.Any
        fields: t.Any
        description: t.Any

        def _get_descriptions(self) -> None:
            connection = self.connection
            count = self.field_count + 1  # the packet behind them, too
            buffer = peek(connection)
            end = _end_of_packets(buffer, count, connection._next_seq_id)
            key = buffer[:end], connection.encoding, connection.use_unicode
            known = _descriptions.get(key) if end else None
            if known is None:
                super()._get_descriptions()
                if end:
                    if len(_descriptions) >= SIZE:
                        _descriptions.clear()
                    encodings = [encoding for encoding, _ in self.converters]
                    _descriptions[key] = tuple(self.fields), encodings, self.description
                return
            connection._rfile.read(end)
            connection._next_seq_id = (connection._next_seq_id + count) % 256
            fields, encodings, self.description = known
            self.fields, self.converters = list(fields), []
            for field, encoding in zip(fields, encodings, strict=True):
                converter = connection.decoders.get(field.type_code)
                self.converters.append((encoding, None if converter is through else converter))

        def _read_rowdata_packet(self) -> None:
            connection = self.connection
            rows: list[tuple[t.Any, ...]] = []
            while not self._take_rows(rows):
                packet = connection._read_packet()
                if self._check_packet_is_eof(packet):
                    break
                rows.append(self._read_row_from_packet(packet))
            self.connection = None
            self.affected_rows = len(rows)
            self.rows = tuple(rows)

        def _take_rows(self, rows: list[tuple[t.Any, ...]]) -> bool:
            """Take what is in the buffer and usual; returns whether that was all of the result."""
            connection, converters = self.connection, self.converters
            buffer = peek(connection)
            start, size, number = 0, len(buffer), connection._next_seq_id
            try:
                while True:
                    at = start + 4
                    end = at + (buffer[start] | buffer[start + 1] << 8 | buffer[start + 2] << 16)
                    if end > size or buffer[start + 3] != number:
                        return False
                    if buffer[at] == _EOF:
                        is_end: bool = self._check_packet_is_eof(MysqlPacket(buffer[at:end], None))
                        start, number = (end, (number + 1) % 256) if is_end else (start, number)
                        return is_end
                    row: list[t.Any] = []
                    for encoding, converter in converters:
                        length = buffer[at]
                        at += 1
                        if length >= _NULL:
                            if length == _NULL:
                                row.append(None)
                                continue
                            if length != _TWO_BYTES:
                                return False
                            length = buffer[at] | buffer[at + 1] << 8
                            at += 2
                        value: t.Any = buffer[at : at + length]
                        at += length
                        if encoding is not None:
                            value = value.decode(encoding)
                        row.append(value if converter is None else converter(value))
                    if at != end:
                        return False
                    rows.append(tuple(row))
                    start, number = end, (number + 1) % 256
            except Exception:  # the buffer's end; or a value that PyMySQL cannot convert, either
                return False
            finally:
                connection._rfile.read(start)
                connection._next_seq_id = number

    def peek(connection: t.Any) -> bytes:
        """What has arrived; waits if nothing has, and fails as PyMySQL does."""
        try:
            return t.cast(bytes, connection._rfile.peek())
        except BaseException as error:
            connection._force_close()
            if not isinstance(error, OSError):
                raise
            message = f"Lost connection to MySQL server during query ({error})"
            raise OperationalError(CR_SERVER_LOST, message) from error

    return Result


#: By the bytes that the server has sent, and by what else PyMySQL goes by.
_descriptions: dict[t.Any, t.Any] = {}


def _end_of_packets(buffer: bytes, count: int, number: int) -> int:
    """Where the packet after the next ones begins; 0 if they are not all there."""
    end = 0
    for index in range(count):
        if len(buffer) < end + 4 or buffer[end + 3] != (number + index) % 256:
            return 0
        end += 4 + int.from_bytes(buffer[end : end + 3], "little")
    return end if end <= len(buffer) else 0
