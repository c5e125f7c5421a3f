"""A TCP proxy between a client and a server, to watch the traffic and to disturb it.

This module owns the links through the proxy and the reading of the client's commands. It must
not change a byte, must not answer for the server, and knows nothing of the package under test.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import select
import socket
import threading
import time
import typing as t

from .servers import free_port
from .servers import wait_until

if t.TYPE_CHECKING:
    import collections.abc as c

    import typing_extensions as te


@dataclasses.dataclass(frozen=True)
class Command:
    """A command as a client sent it. Two are equal when name and text are."""

    #: The protocol's name without its COM_ prefix, such as QUERY, PING or QUIT.
    name: str
    #: The statement of QUERY and STMT_PREPARE, the database of INIT_DB, else empty.
    sql: str = ""
    #: Which connection sent it: 1 for the proxy's first link, 2 for the second.
    link: int = dataclasses.field(default=0, compare=False)

    def __str__(self) -> str:
        return self.sql or self.name


class Proxy:
    """Passes everything that reaches `port` on to `target`, until told otherwise.

    One thread owns all sockets. The methods may be called from any other thread; each returns
    when its effect is complete.

    :param target: the server's port on the loopback interface. It may be changed, for the
        links to come.
    :param protocol: `"mysql"` to read the clients' commands, `None` to read nothing.
    :param host: the address to listen on.
    :param port: the port to listen on, if it must be a certain one.
    """

    def __init__(
        self,
        target: int,
        protocol: t.Literal["mysql"] | None = "mysql",
        host: str = "127.0.0.1",
        port: int | None = None,
    ) -> None:
        self.target = target
        self.protocol = protocol
        self.host = host
        self._listener: socket.socket | None = (
            _listen_somewhere(host) if port is None else _listen(port, host)
        )
        self.port: int = self._listener.getsockname()[1]
        self._links: list[_Link] = []
        self._count = 0
        self._stalled = False
        self._delay = 0.0
        self._wakeup, self._bell = socket.socketpair()
        self._bell.setblocking(False)
        # The lock covers the three below and nothing else; nobody waits while holding it.
        self._lock = threading.Lock()
        self._commands: list[Command] = []
        self._orders: collections.deque[_Order] = collections.deque()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=f"proxy-{self.port}", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Proxy {self.port} -> {self.target}, {self.links} links>"

    def __enter__(self) -> te.Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def commands(self) -> list[Command]:
        """The commands since the start or the last :meth:`clear`, oldest first.

        One that was answered is in the list. QUIT has no answer: see :meth:`wait_for`.
        """
        with self._lock:
            return list(self._commands)

    @property
    def links(self) -> int:
        """How many connections pass through the proxy now."""
        return len(self._links)

    @property
    def accepted(self) -> int:
        """How many connections were made to the proxy until now."""
        return self._count

    def clear(self) -> None:
        """Forget the commands so far."""
        with self._lock:
            self._commands.clear()

    def catch_up(self) -> None:
        """Return when all that clients have sent is in the list, also what has no answer yet."""

        def catch_up() -> None:
            for link in self._links:
                link.hear(self._delay)

        self._do(catch_up)

    def wait_for(self, name: str, timeout: float = 5.0) -> None:
        """Return when a command of that name is in the list."""
        wait_until(
            lambda: any(command.name == name for command in self.commands),
            f"a client sends {name}",
            timeout,
        )

    def cut(self) -> None:
        """Close every link at both ends; new ones are welcome."""

        def cut() -> None:
            for link in self._links:
                link.close()
            self._links.clear()

        self._do(cut)

    def stall(self) -> None:
        """Pass nothing on, in neither direction, and keep everything open.

        New connections are accepted, and get no answer. What was sent meanwhile arrives after
        :meth:`resume`.
        """
        self._do(lambda: setattr(self, "_stalled", True))

    def resume(self) -> None:
        """End :meth:`stall`."""
        self._do(lambda: setattr(self, "_stalled", False))

    def lose(self) -> None:
        """Pass nothing on for the links there are, and never say so; new ones are welcome.

        As a firewall does that has forgotten them.
        """

        def lose() -> None:
            for link in self._links:
                link.is_lost = True

        self._do(lose)

    def refuse(self) -> None:
        """Let new connections be refused; the links there are stay."""
        self._do(self._close_listener)

    def accept(self) -> None:
        """End :meth:`refuse`, on the same port."""

        def accept() -> None:
            if self._listener is None:
                self._listener = _listen(self.port, self.host)

        self._do(accept)

    def delay(self, seconds: float) -> None:
        """Hold back what arrives from now on, in each direction; 0 ends it."""
        self._do(lambda: setattr(self, "_delay", seconds))

    def close(self) -> None:
        """Close all sockets and end the thread. A second call does nothing."""

        def close() -> None:
            raise _Closed

        with contextlib.suppress(ProxyClosed):
            self._do(close)
        self._thread.join()

    def _do(self, action: c.Callable[[], None]) -> None:
        """Have the thread run an action between two rounds, and wait until it has."""
        order = _Order(action)
        with self._lock:
            if self._is_closed:
                raise ProxyClosed(f"{self!r} is closed")
            self._orders.append(order)
            # A full pipe has bytes enough to wake the thread.
            with contextlib.suppress(BlockingIOError):
                self._bell.send(b"!")
        order.done.wait()
        if order.error is not None:
            raise order.error

    # -- from here on, everything runs in the thread ---------------------------------------

    def _run(self) -> None:
        try:
            with contextlib.suppress(_Closed):
                while True:
                    self._run_round()
        finally:
            with self._lock:
                self._is_closed = True
                self._wakeup.close()
                self._bell.close()
            self._close_listener()
            for link in self._links:
                link.close()
            self._links.clear()
            for order in self._orders:
                order.error = ProxyClosed(f"{self!r} was closed meanwhile")
                order.done.set()

    def _run_round(self) -> None:
        ready = self._wait()
        if self._wakeup.fileno() in ready:
            self._wakeup.recv(4096)
            self._obey()
            # What was ready may be closed by now, or must not be touched any more.
            return
        if self._listener is not None and self._listener.fileno() in ready:
            self._welcome(self._listener)
        for link in list(self._links):
            try:
                link.move(ready, self._delay)
            except BlockingIOError:
                # Trouble that passed, or a due time that came between two looks at the clock.
                continue
            except OSError:
                link.is_over = True
            if link.is_over:
                link.close()
                self._links.remove(link)

    def _wait(self) -> dict[int, int]:
        """Wait until something can be done; return the events by file number."""
        wanted = collections.Counter({self._wakeup.fileno(): select.POLLIN})
        if self._listener is not None:
            wanted[self._listener.fileno()] = select.POLLIN
        now = time.monotonic()
        due: list[float] = []
        if not self._stalled:
            for link in self._links:
                for number, events in () if link.is_lost else link.wishes(now, due):
                    wanted[number] |= events
        poll = select.poll()
        for number, events in wanted.items():
            poll.register(number, events)
        # Rounded up: one millisecond early would mean rounds that do nothing.
        pause = int((min(due) - now) * 1000) + 1 if due else None
        return dict(poll.poll(pause))

    def _obey(self) -> None:
        while self._orders:
            order = self._orders.popleft()
            try:
                order.action()
            except OSError as error:
                order.error = error
            finally:
                order.done.set()

    def _welcome(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError:
            # The client did not wait.
            return
        self._count += 1
        reader = _CommandReader(self._count, self._record) if self.protocol == "mysql" else None
        self._links.append(_Link(client, self.target, reader))

    def _record(self, command: Command) -> None:
        with self._lock:
            self._commands.append(command)

    def _close_listener(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None


class ProxyClosed(RuntimeError):
    """The proxy was told something after it had been closed."""


class _Closed(Exception):
    """Ends the thread."""


class _Order:
    def __init__(self, action: c.Callable[[], None]) -> None:
        self.action = action
        self.done = threading.Event()
        self.error: Exception | None = None


class _Link:
    """A client's connection and the server's."""

    def __init__(self, client: socket.socket, target: int, reader: _CommandReader | None) -> None:
        self.is_over = False
        self.is_lost = False
        self._client = client
        self._server = socket.socket()
        for end in (self._client, self._server):
            end.setblocking(False)
            # Small packets at once: the proxy must not add the kernel's delays to its own.
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = self._server.connect_ex(("127.0.0.1", target))
        self._is_connecting = code == errno.EINPROGRESS
        self.is_over = code not in (0, errno.EINPROGRESS)
        self._pipes = (
            _Pipe(self._client, self._server, reader.feed if reader else None),
            _Pipe(self._server, self._client, reader.hear_server if reader else None),
        )

    def wishes(self, now: float, due: list[float]) -> c.Iterator[tuple[int, int]]:
        """Yield file numbers and the events to wait for, and add to the list when to wake."""
        if self._is_connecting:
            yield self._server.fileno(), select.POLLOUT
            return
        for pipe in self._pipes:
            if pipe.wants_to_receive:
                yield pipe.source.fileno(), select.POLLIN
            if pipe.is_due(now):
                yield pipe.sink.fileno(), select.POLLOUT
            elif pipe.held:
                due.append(pipe.held[0][0])

    def hear(self, delay: float) -> None:
        """Receive what the client has sent."""
        with contextlib.suppress(OSError):  # nothing; or trouble that the next round will find
            if self._pipes[0].wants_to_receive:
                self._pipes[0].receive(delay)

    def move(self, ready: c.Mapping[int, int], delay: float) -> None:
        """Receive and send what can be, without waiting."""
        if self.is_over:
            return
        if self._is_connecting:
            if self._server.fileno() not in ready:
                return
            code = self._server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, "the server cannot be reached")
            self._is_connecting = False
            return
        now = time.monotonic()
        for pipe in self._pipes:
            # Trouble is reported unasked; receiving or sending then raises it.
            if pipe.wants_to_receive and ready.get(pipe.source.fileno(), 0) & ~select.POLLOUT:
                pipe.receive(delay)
            if pipe.is_due(now) and ready.get(pipe.sink.fileno(), 0) & ~select.POLLIN:
                pipe.send()
            pipe.finish()
        self.is_over = all(pipe.is_finished for pipe in self._pipes)

    def close(self) -> None:
        self._client.close()
        self._server.close()


class _Pipe:
    """One direction of a link."""

    #: How many bytes to hold before the sender has to wait.
    LIMIT = 1 << 20

    def __init__(
        self, source: socket.socket, sink: socket.socket, watch: c.Callable[[bytes], None] | None
    ) -> None:
        self.source = source
        self.sink = sink
        #: What was received and not sent yet, with the time to send it at.
        self.held: collections.deque[tuple[float, bytes]] = collections.deque()
        self.is_finished = False
        self._watch = watch
        self._size = 0
        self._has_ended = False

    @property
    def wants_to_receive(self) -> bool:
        return not self._has_ended and self._size < self.LIMIT

    def is_due(self, now: float) -> bool:
        return bool(self.held) and self.held[0][0] <= now

    def receive(self, delay: float) -> None:
        data = self.source.recv(65536)
        if not data:
            self._has_ended = True
            return
        if self._watch is not None:
            self._watch(data)
        self.held.append((time.monotonic() + delay, data))
        self._size += len(data)

    def send(self) -> None:
        due, data = self.held.popleft()
        sent = self.sink.send(data)
        self._size -= sent
        if sent < len(data):
            self.held.appendleft((due, data[sent:]))

    def finish(self) -> None:
        """Pass the end of the stream on, after all that came before it."""
        if self._has_ended and not self.held and not self.is_finished:
            self.is_finished = True
            # The other end may be gone already.
            with contextlib.suppress(OSError):
                self.sink.shutdown(socket.SHUT_WR)


class _CommandReader:
    """Finds the commands in what a client sends.

    A packet is three bytes of length, one of sequence number, and the payload; a payload of
    2^24 - 1 bytes goes on in the next packet. Each command starts at sequence number 0, whereas
    the client's part of the handshake answers the server's 0. Compressed and encrypted
    connections are passed on unread.
    """

    LONGEST = 0xFFFFFF
    #: The flag CLIENT_SSL in the first two bytes of the client's first packet.
    TLS = 0x0800

    def __init__(self, link: int, record: c.Callable[[Command], None]) -> None:
        self._link = link
        self._record = record
        self._data = bytearray()
        #: The earlier packets of a payload that takes several, or None between payloads.
        self._begun: bytearray | None = None
        self._is_command = False
        self._last_number = -1
        self._is_blind = False

    def hear_server(self, data: bytes) -> None:
        """Take note that the server has spoken: what comes next cannot continue an upload."""
        self._last_number = -1

    def feed(self, data: bytes) -> None:
        """Read the client's next bytes, however the network has cut them."""
        self._data += data
        while len(self._data) >= 4 and not self._is_blind:
            length = int.from_bytes(self._data[:3], "little")
            if len(self._data) < 4 + length:
                return
            number, payload = self._data[3], bytes(self._data[4 : 4 + length])
            del self._data[: 4 + length]
            self._take(number, payload)
        if self._is_blind:
            self._data.clear()

    def _take(self, number: int, payload: bytes) -> None:
        if self._begun is None:
            # The numbers of a long LOCAL INFILE come round to 0 as well, but after 255.
            self._is_command = number == 0 and self._last_number != 255
            self._begun = bytearray()
            # The request for TLS is a login that stops after its 32 bytes of options.
            asks_for_tls = number == 1 and len(payload) == 32
            self._is_blind = asks_for_tls and bool(int.from_bytes(payload[:2], "little") & self.TLS)
        self._last_number = number
        self._begun += payload
        if len(payload) == self.LONGEST:
            return
        whole, self._begun = bytes(self._begun), None
        if self._is_command and whole:
            self._record(self._parse(whole))

    def _parse(self, payload: bytes) -> Command:
        name = COMMANDS.get(payload[0], f"0x{payload[0]:02x}")
        has_text = name in ("QUERY", "STMT_PREPARE", "INIT_DB")
        text = payload[1:].decode(errors="replace") if has_text else ""
        return Command(name, text, self._link)


COMMANDS: t.Final[c.Mapping[int, str]] = {
    0x00: "SLEEP",
    0x01: "QUIT",
    0x02: "INIT_DB",
    0x03: "QUERY",
    0x04: "FIELD_LIST",
    0x05: "CREATE_DB",
    0x06: "DROP_DB",
    0x07: "REFRESH",
    0x08: "SHUTDOWN",
    0x09: "STATISTICS",
    0x0A: "PROCESS_INFO",
    0x0B: "CONNECT",
    0x0C: "PROCESS_KILL",
    0x0D: "DEBUG",
    0x0E: "PING",
    0x11: "CHANGE_USER",
    0x12: "BINLOG_DUMP",
    0x13: "TABLE_DUMP",
    0x14: "CONNECT_OUT",
    0x15: "REGISTER_SLAVE",
    0x16: "STMT_PREPARE",
    0x17: "STMT_EXECUTE",
    0x18: "STMT_SEND_LONG_DATA",
    0x19: "STMT_CLOSE",
    0x1A: "STMT_RESET",
    0x1B: "SET_OPTION",
    0x1C: "STMT_FETCH",
    0x1F: "RESET_CONNECTION",
    0xFA: "STMT_BULK_EXECUTE",
}


def _listen(port: int, host: str = "127.0.0.1") -> socket.socket:
    listener = socket.socket()
    try:
        # Links that were closed from this side linger on the port, and must not block it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(50)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _listen_somewhere(host: str) -> socket.socket:
    try:
        return _listen(free_port(), host)
    except OSError:
        # Somebody was faster; twice in a row is not chance.
        return _listen(free_port(), host)
