"""Celery: each task has a context of its own, in a worker's processes and where it was called."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import subprocess
import sys
import typing as t
from pathlib import Path

import celery as celery_package
import pytest
import sqlalchemy as sa
from flask import current_app
from flask import has_app_context

from .apps import Lab
from .celery_app import add_tasks
from .celery_app import make_celery
from .servers import wait_until

if t.TYPE_CHECKING:
    import collections.abc as c

    from .servers import Database
    from .servers import MariaDBCluster

#: Seconds after which a worker that has not answered is a failure.
DEADLINE = 60

# In a worker ----------------------------------------------------------------------------------


class Worker:
    """A worker with child processes, on a broker that is a directory.

    :param directory: for messages, results and the log.
    :param database: what its tasks use.
    :param processes: how many children.
    """

    def __init__(self, directory: Path, database: Database[MariaDBCluster], processes: int) -> None:
        self.celery = make_celery(directory)
        add_tasks(self.celery)
        self.database = database
        self._log = directory / "log"
        command = f"-m celery -A tests.celery_app:celery worker -P prefork -c {processes} -l INFO"
        quiet = "--without-gossip --without-mingle --without-heartbeat"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command.split(), *quiet.split()],
                cwd=Path(__file__).parent.parent,
                env={
                    **os.environ,
                    "COMMONDB_TEST_CELERY": str(directory),
                    "COMMONDB_TEST_URL": database.primary_url,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        wait_until(
            lambda: " ready." in self.log or self._process.poll() is not None,
            "the worker is ready",
            DEADLINE,
        )
        assert self._process.poll() is None, self.log

    def stop(self) -> None:
        """End it with its children. By force: in good order it takes its time."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def send(self, task: str, *args: t.Any) -> t.Any:
        return self.celery.send_task(task, args)

    def ask(self, task: str, *args: t.Any) -> t.Any:
        """What a task returns, or raises."""
        try:
            return self.send(task, *args).get(timeout=DEADLINE, interval=0.02)
        except celery_package.exceptions.TimeoutError:
            raise AssertionError(self.log) from None

    def titles(self) -> list[str]:
        return [title for (title,) in self.database.execute("SELECT title FROM post ORDER BY id")]

    def wait_until_nothing_is_open(self) -> None:
        """Until no connection to the database is in a transaction."""
        open_ones = (
            "SELECT COUNT(*) FROM information_schema.innodb_trx JOIN information_schema.processlist"
            " ON id = trx_mysql_thread_id WHERE db = %s"
        )
        wait_until(
            lambda: self.database.execute(open_ones, self.database.name) == [(0,)],
            "no transaction is open",
        )


@pytest.fixture
def start_worker(
    tmp_path: Path, mariadb_database: Database[MariaDBCluster]
) -> c.Iterator[c.Callable[[int], Worker]]:
    """Starts a worker with so many child processes."""
    mariadb_database.execute(
        "CREATE TABLE post (id INT AUTO_INCREMENT PRIMARY KEY, title VARCHAR(50))"
    )
    with contextlib.ExitStack() as stack:

        def start(processes: int) -> Worker:
            worker = Worker(tmp_path, mariadb_database, processes)
            stack.callback(worker.stop)
            worker.wait_until_ready()
            return worker

        yield start


def test_a_failing_task_then_a_good_one(start_worker: c.Callable[[int], Worker]) -> None:
    """After a task that fails the same process runs the next with a fresh session, and repeats."""
    worker = start_worker(1)
    pids = set()
    for number in range(3):
        with pytest.raises(ValueError, match=r"^\d+$") as caught:
            worker.ask("fail", f"lost {number}")
        pid, before = worker.ask("add", f"kept {number}")
        assert before == []
        pids |= {int(str(caught.value)), pid}
    assert len(pids) == 1
    assert worker.ask("retry", "retried") == [2, ["kept 0", "kept 1", "kept 2"]]
    assert worker.titles() == ["kept 0", "kept 1", "kept 2", "retried"]
    worker.wait_until_nothing_is_open()


def test_each_child_has_its_own_connections(start_worker: c.Callable[[int], Worker]) -> None:
    """Children use neither the connections of their parent nor those of each other."""
    worker = start_worker(2)
    query = "SELECT id FROM information_schema.processlist WHERE db = %s AND user = 'app'"
    inherited = {number for (number,) in worker.database.execute(query, worker.database.name)}
    assert len(inherited) == 1
    used: dict[int, set[int]] = collections.defaultdict(set)

    def ask_both() -> bool:
        for result in [worker.send("who") for _ in range(4)]:
            pid, connection = result.get(timeout=DEADLINE, interval=0.02)
            used[pid].add(connection)
        return len(used) == 2

    wait_until(ask_both, "both children have answered", DEADLINE)
    first, second = used.values()
    assert not first & second
    assert not inherited & (first | second)
    still_there = {number for (number,) in worker.database.execute(query, worker.database.name)}
    assert inherited <= still_there
    worker.wait_until_nothing_is_open()


# Where it was called --------------------------------------------------------------------------


@pytest.fixture
def lab(tmp_path: Path) -> c.Iterator[Lab]:
    """An app on SQLite."""
    lab = Lab(f"sqlite:///{tmp_path}/default.db")
    with lab.app.app_context():
        lab.db.create_all()
    yield lab
    checked_out = lab.checked_out()
    lab.dispose()
    assert checked_out == 0


@pytest.fixture
def eager(tmp_path: Path) -> t.Any:
    """A Celery app that runs tasks where they are called."""
    celery = make_celery(tmp_path)
    celery.conf.task_always_eager = True
    return celery


def test_a_task_has_a_context(lab: Lab, eager: t.Any) -> None:
    """A task has a context, whose sessions are closed when it ends, whether it fails or not."""
    lab.db.init_celery(eager, lab.app)
    sessions: list[object] = []

    @eager.task  # type: ignore[untyped-decorator]
    def work(title: str) -> str:
        sessions.append(lab.db.session())
        lab.db.session.add(lab.Post(title=title))
        lab.db.session.flush()
        if title == "fails":
            raise ValueError(title)
        lab.db.session.commit()
        return f"{title} in {current_app.name}"

    assert work.delay("one").get() == "one in tests.apps"
    with pytest.raises(ValueError, match="fails"):
        work.delay("fails").get()
    assert lab.checked_out() == 0
    assert work.delay("two").get() == "two in tests.apps"
    assert not has_app_context()
    assert len(set(map(id, sessions))) == 3
    with lab.app.app_context():
        assert lab.titles() == ["one", "two"]


def test_a_task_that_propagates(lab: Lab, eager: t.Any) -> None:
    """With ``task_eager_propagates`` an error comes out of the call, and the context has ended."""
    eager.conf.task_eager_propagates = True
    lab.db.init_celery(eager, lab.app)

    @eager.task  # type: ignore[untyped-decorator]
    def work() -> None:
        lab.titles()
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        work.delay()
    assert lab.checked_out() == 0
    assert not has_app_context()


def test_a_task_in_a_request(lab: Lab, eager: t.Any) -> None:
    """An eager task inside a request is apart from it, and leaves its session as it was."""
    lab.db.init_celery(eager, lab.app)

    @eager.task  # type: ignore[untyped-decorator]
    def work() -> int:
        lab.db.session.add(lab.Post(title="task"))
        lab.db.session.commit()
        return id(lab.db.session())

    @lab.app.post("/")
    def view() -> str:
        lab.db.session.add(lab.Post(title="request"))
        session = lab.db.session()
        assert work.delay().get() != id(session)
        assert lab.db.session() is session
        assert session.new
        lab.db.session.commit()
        return "ok"

    assert lab.app.test_client().post("/").text == "ok"
    with lab.app.app_context():
        assert lab.titles() == ["task", "request"]


def test_tasks_inside_each_other(lab: Lab, eager: t.Any) -> None:
    """A task that runs another, or itself, finds its own session again."""
    lab.db.init_celery(eager, lab.app)

    @eager.task  # type: ignore[untyped-decorator]
    def work(depth: int) -> int:
        session = lab.db.session()
        session.info["depth"] = depth
        lab.titles()
        sessions = 1 + (work.delay(depth - 1).result if depth else 0)
        assert lab.db.session() is session
        assert session.info == {"depth": depth}
        return int(sessions)

    assert work.delay(3).get() == 4
    assert not has_app_context()


def test_tasks_of_another_app(lab: Lab, eager: t.Any, tmp_path: Path) -> None:
    """Tasks of a Celery app that was not named are left alone."""
    lab.db.init_celery(eager, lab.app)
    other = make_celery(tmp_path)
    other.conf.task_always_eager = True

    @other.task  # type: ignore[untyped-decorator]
    def work() -> bool:
        return has_app_context()

    assert work.delay().get() is False


def test_init_celery_twice(lab: Lab, eager: t.Any) -> None:
    """A second call changes nothing: a task has one context."""
    ended: list[object] = []
    lab.app.teardown_appcontext(ended.append)
    for _ in range(2):
        lab.db.init_celery(eager)  # the only app that there is

    @eager.task  # type: ignore[untyped-decorator]
    def work() -> str:
        if fails:
            raise error
        return current_app.name

    error = ValueError("mine")
    fails = False
    assert work.delay().get() == "tests.apps"
    assert ended == [None]
    fails = True
    with pytest.raises(ValueError, match="mine"):
        work.delay().get()
    assert ended == [None, error]


def test_a_direct_call(lab: Lab, eager: t.Any) -> None:
    """A task that is called as a function is one: it runs in its caller's context."""
    lab.db.init_celery(eager, lab.app)

    @eager.task  # type: ignore[untyped-decorator]
    def work() -> object:
        return lab.db.session()

    with lab.app.app_context():
        assert work() is lab.db.session()


def test_the_documented_task_class(lab: Lab, eager: t.Any) -> None:
    """A task class that pushes a context itself, as Flask's documentation has it, still works."""

    class FlaskTask(eager.Task):  # type: ignore[misc]
        def __call__(self, *args: object, **kwargs: object) -> object:
            with lab.app.app_context():
                return self.run(*args, **kwargs)

    eager.Task = FlaskTask
    lab.db.init_celery(eager, lab.app)

    @eager.task  # type: ignore[untyped-decorator]
    def work() -> list[str]:
        with lab.db.transaction() as session:
            session.add(lab.Post(title="x"))
        return lab.titles()

    assert work.delay().get() == ["x"]


def test_a_job_as_a_task(lab: Lab, eager: t.Any) -> None:
    """A job is a task that commits when it returns, with or without ``init_celery``."""

    @eager.task  # type: ignore[untyped-decorator]
    @lab.db.job
    def work(title: str) -> None:
        lab.db.session.add(lab.Post(title=title))

    work.delay("without").get()
    lab.db.init_celery(eager, lab.app)
    work.delay("with").get()
    with lab.app.app_context():
        assert lab.titles() == ["without", "with"]
        assert lab.db.session.scalar(sa.select(sa.func.count()).select_from(lab.Post)) == 2
