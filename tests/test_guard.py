"""Nothing that a replica executes is in its own binary log, whatever a view does and as whom.

Over a hundred statements, as SQL text, Core, ORM and by a raw cursor, each in a unit of work of
its own, as a plain user and as one who may write on a replica. Which server has executed one is
asked of the servers' general logs.
"""

from __future__ import annotations

import dataclasses
import re
import typing as t

import psycopg
import pymysql
import pytest
import sqlalchemy as sa
import sqlalchemy.orm as so
from sqlalchemy.dialects import mysql

from .apps import Lab
from .logs import Logs

if t.TYPE_CHECKING:
    import collections.abc as c

    from .servers import Database
    from .servers import MariaDBCluster
    from .servers import PostgreSQLCluster

PRIMARY = 1
REPLICAS = {2, 3}

#: Who may not write on a replica, and who may: ``read_only`` does not hold the second one.
USERS = ("app", "lab")


class Case(t.NamedTuple):
    """One thing that a view may do.

    :param kind: ``"text"`` and ``"cursor"`` are taken at their word inside ``db.replica()``;
        ``"core"`` and ``"orm"`` are not, as they say themselves what they do.
    """

    name: str
    kind: str
    run: t.Callable[[Guarded], object]


class Guarded(Lab):
    """An app with two models, whose servers say what they have executed."""

    def __init__(self, primary: str, replicas: t.Sequence[str]) -> None:
        super().__init__(primary, replicas)

        class Comment(self.db.Model):  # type: ignore[name-defined, misc]
            id: so.Mapped[int] = so.mapped_column(primary_key=True)
            post_id: so.Mapped[int] = so.mapped_column(sa.ForeignKey("post.id"))
            text: so.Mapped[str] = so.mapped_column(sa.String(50))

        self.Post.comments = so.relationship(Comment, cascade="all, delete-orphan")
        self.Comment: t.Any = Comment
        self.session = self.db.session

    def fill(self) -> None:
        with self.app.app_context():
            self.db.create_all()
            for title in "abc":
                comments = [self.Comment(text=title)]
                self.session.add(self.Post(title=title, comments=comments))
            self.session.commit()

    def attempt(self, case: Case, in_replica_scope: bool) -> Exception | None:
        """Run a case in a GET of its own, and commit; returns what it has raised."""
        with self.request("GET"):
            try:
                if in_replica_scope:
                    with self.db.replica():
                        case.run(self)
                else:
                    case.run(self)
                self.session.commit()
            except (sa.exc.SQLAlchemyError, pymysql.Error, psycopg.Error) as error:
                return error
        return None

    def text(self, sql: str) -> None:
        result: t.Any = self.session.execute(sa.text(sql))
        if result.returns_rows:
            result.all()

    def cursor(self, sql: str) -> None:
        with self.db.cursor() as cursor:
            cursor.execute(sql)
            cursor.fetchall()

    def driver_sql(self, sql: str) -> None:
        result = self.session.connection().exec_driver_sql(sql)
        if result.returns_rows:
            result.all()

    def fetch(self, statement: t.Any) -> None:
        self.session.execute(statement).unique().all()

    def function(self, name: str, *arguments: t.Any) -> None:
        self.fetch(sa.select(getattr(sa.func, name)(*arguments)))


def text(sql: str) -> Case:
    return Case(sql, "text", lambda lab: lab.text(sql))


def core(name: str, run: t.Callable[[Guarded], object]) -> Case:
    return Case(name, "core", run)


def orm(name: str, run: t.Callable[[Guarded], object]) -> Case:
    return Case(name, "orm", run)


def _select(name: str, make: t.Callable[[t.Any, t.Any], t.Any], kind: str = "core") -> Case:
    """A SELECT made from the two models."""
    return Case(name, kind, lambda lab: lab.fetch(make(lab.Post, lab.Comment)))


def _function(name: str, *arguments: t.Any) -> Case:
    return core(f"func.{name}", lambda lab: lab.function(name, *arguments))


def _append(lab: Guarded) -> None:
    post = lab.session.get_one(lab.Post, 2)
    post.comments.append(lab.Comment(text="x"))
    lab.session.flush()


MADE = sa.Table("made", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))

#: What changes something. The primary's binary log shows each of these.
WRITES = [
    text("INSERT INTO post (title) VALUES ('x')"),
    text("INSERT IGNORE INTO post (title) VALUES ('x')"),
    text("INSERT INTO post (title) VALUES ('x') RETURNING id"),
    text("INSERT INTO post (id, title) VALUES (1, 'x') ON DUPLICATE KEY UPDATE title = UUID()"),
    text("INSERT INTO post (title) SELECT title FROM post LIMIT 1"),
    text("REPLACE INTO post (id, title) VALUES (1000, UUID())"),
    text("UPDATE post SET title = UUID() WHERE id = 1"),
    text("UPDATE post JOIN comment ON post.id = comment.post_id SET title = UUID()"),
    text("DELETE FROM post WHERE title = 'x' LIMIT 1"),
    text("/* SELECT */ INSERT INTO post (title) VALUES ('x')"),
    text("SET STATEMENT max_statement_time = 9 FOR INSERT INTO post (title) VALUES ('x')"),
    text("EXECUTE IMMEDIATE 'INSERT INTO post (title) VALUES (1)'"),
    text("BEGIN NOT ATOMIC INSERT INTO post (title) VALUES ('x'); END"),
    text("SELECT writes()"),
    text("DO writes()"),
    text("CALL writing()"),
    text("SELECT NEXTVAL(numbers)"),
    text("SELECT NEXT VALUE FOR numbers"),
    text("SELECT SETVAL(numbers, 1000000)"),
    text("CREATE TABLE made (id INT PRIMARY KEY)"),
    text("ALTER TABLE made ADD COLUMN name VARCHAR(9)"),
    text("CREATE INDEX by_name ON made (name)"),
    text("CREATE OR REPLACE VIEW titles AS SELECT title FROM post"),
    text("TRUNCATE made"),
    text("RENAME TABLE made TO made_now"),
    text("DROP TABLE made_now"),
    text("OPTIMIZE TABLE comment"),
    Case("cursor", "cursor", lambda lab: lab.cursor("INSERT INTO post (title) VALUES ('x')")),
    Case("connection()", "cursor", lambda lab: lab.driver_sql("UPDATE post SET title = UUID()")),
    core("insert", lambda lab: lab.session.execute(sa.insert(lab.Post).values(title="x"))),
    core(
        "insert many",
        lambda lab: lab.session.execute(sa.insert(lab.Post), [{"title": "x"}, {"title": "y"}]),
    ),
    core(
        "insert returning",
        lambda lab: lab.session.scalars(
            sa.insert(lab.Post.__table__).values(title="x").returning(lab.Post.id)
        ).all(),
    ),
    core(
        "insert from select",
        lambda lab: lab.session.execute(
            sa.insert(lab.Post.__table__).from_select(["title"], sa.select(lab.Post.title).limit(1))
        ),
    ),
    core(
        "upsert",
        lambda lab: lab.session.execute(
            mysql.insert(lab.Post.__table__)
            .values(id=1, title="x")
            .on_duplicate_key_update(title=sa.func.uuid())
        ),
    ),
    core(
        "update",
        lambda lab: lab.session.execute(
            sa.update(lab.Post.__table__).where(lab.Post.id == 1).values(title=sa.func.uuid())
        ),
    ),
    core(
        "delete",
        lambda lab: lab.session.execute(
            sa.delete(lab.Post.__table__).where(lab.Post.title.in_(["x", "1"]))
        ),
    ),
    core("CreateTable", lambda lab: lab.session.execute(sa.schema.CreateTable(MADE))),
    core("DropTable", lambda lab: lab.session.execute(sa.schema.DropTable(MADE))),
    core("sequence", lambda lab: lab.session.scalar(sa.Sequence("numbers"))),
    core("next_value()", lambda lab: lab.fetch(sa.select(sa.Sequence("numbers").next_value()))),
    _function("writes"),
    core("callproc", lambda lab: lab.db.callproc("writing")),
    core(
        "DDL",
        lambda lab: lab.session.execute(
            t.cast(t.Any, sa.DDL)("CREATE OR REPLACE VIEW one AS SELECT 1")
        ),
    ),
    orm("add", lambda lab: lab.session.add(lab.Post(title="x"))),
    orm("change", lambda lab: setattr(lab.session.get(lab.Post, 2), "title", str(object()))),
    orm("delete", lambda lab: lab.session.delete(lab.session.query(lab.Post).first())),
    orm("merge", lambda lab: lab.session.merge(lab.Post(title="x"))),
    orm("append", _append),
    orm("Query.update", lambda lab: lab.session.query(lab.Post).update({"title": sa.func.uuid()})),
    orm("Query.delete", lambda lab: lab.session.query(lab.Comment).delete()),
    orm(
        "insert().returning(Post)",
        lambda lab: lab.session.scalars(
            sa.insert(lab.Post).returning(lab.Post), [{"title": "x"}]
        ).all(),
    ),
]

#: What an administrator may do on a connection that is read-only.
ADMINISTRATION = [
    text("ANALYZE TABLE comment"),
    text("FLUSH TABLES"),
    text("FLUSH TABLE comment"),
    text("FLUSH STATUS"),
    text("FLUSH PRIVILEGES"),
]

#: Locks, and what belongs to one session of one server: the answer is right on the primary only.
STATE = [
    text("SELECT GET_LOCK('guard', 0)"),
    text("SELECT RELEASE_LOCK('guard')"),
    text("SELECT RELEASE_ALL_LOCKS()"),
    text("SELECT IS_FREE_LOCK('guard')"),
    text("SELECT IS_USED_LOCK('guard')"),
    text("SELECT LAST_INSERT_ID()"),
    text("SELECT ROW_COUNT()"),
    text("SELECT FOUND_ROWS()"),
    text("SELECT SQL_CALC_FOUND_ROWS id FROM post LIMIT 1"),
    text("SELECT CONNECTION_ID()"),
    text("SELECT @guard"),
    text(r"SELECT @guard \:= 1"),
    text("SET @guard = 1"),
    text("SELECT id INTO @guard FROM post LIMIT 1"),
    text("SELECT LASTVAL(numbers)"),
    text("SELECT id FROM post LOCK IN SHARE MODE"),
    text("SELECT 1"),
    text("SELECT id FROM post FOR UPDATE"),
    text("SELECT id FROM post FOR UPDATE SKIP LOCKED"),
    text("LOCK TABLES post WRITE"),
    text("UNLOCK TABLES"),
    text("CREATE TEMPORARY TABLE passing (id INT)"),
    text("DROP TEMPORARY TABLE passing"),
    Case("cursor SELECT", "cursor", lambda lab: lab.cursor("SELECT GET_LOCK('guard', 0)")),
    _function("get_lock", "guard", 0),
    _function("GET_LOCK", "guard", 0),
    _function("is_free_lock", "guard"),
    _function("is_used_lock", "guard"),
    _function("release_lock", "guard"),
    _function("release_all_locks"),
    _function("last_insert_id"),
    _function("row_count"),
    _function("found_rows"),
    _function("connection_id"),
    _function("sleep", 0),
    _function("benchmark", 1, 1),
    _function("master_pos_wait", "x", 4, 0.001),
    _function("nobody_knows"),
    core("literal_column", lambda lab: lab.fetch(sa.select(sa.literal_column("@guard := 1")))),
    core(
        "prefix",
        lambda lab: lab.fetch(sa.select(lab.Post.id).prefix_with("SQL_CALC_FOUND_ROWS").limit(1)),
    ),
    core(
        "lock in where",
        lambda lab: lab.fetch(
            sa.select(lab.Post.id).where(sa.func.get_lock("guard", 0) == 1, lab.Post.id < 0)
        ),
    ),
    core(
        "lock in a subquery",
        lambda lab: lab.fetch(
            sa.select(sa.select(sa.func.is_free_lock("guard")).scalar_subquery().label("free"))
        ),
    ),
    _select("for update", lambda post, _: sa.select(post.__table__).with_for_update()),
    _select("for share", lambda post, _: sa.select(post.__table__).with_for_update(read=True)),
    _select(
        "skip locked", lambda post, _: sa.select(post.__table__).with_for_update(skip_locked=True)
    ),
    _select(
        "for update in a subquery",
        lambda post, _: sa.select(sa.select(post.id).with_for_update().subquery()),
    ),
    orm("get for update", lambda lab: lab.session.get(lab.Post, 2, with_for_update=True)),
    orm("Query for update", lambda lab: lab.session.query(lab.Post).with_for_update().all()),
    orm(
        "refresh for update",
        lambda lab: lab.session.refresh(
            lab.session.scalars(sa.select(lab.Post)).first(), with_for_update=True
        ),
    ),
]

#: Of these a replica refuses what is SQL text: they are about writing, although they write nothing.
REFUSED = re.compile(r"FOR UPDATE|LOCK TABLES post|TEMPORARY")


def _aliased(post: t.Any, comment: t.Any) -> t.Any:
    other = so.aliased(post)
    return sa.select(post, other).join(other, other.id > post.id)


def _recursive(post: t.Any, comment: t.Any) -> t.Any:
    numbers = sa.select(sa.literal(1).label("n")).cte("numbers", recursive=True)
    numbers = numbers.union_all(sa.select(numbers.c.n + 1).where(numbers.c.n < 3))
    return sa.select(numbers.c.n, post.title).outerjoin(post, post.id == numbers.c.n)


def _loaded(option: t.Any) -> Case:
    def run(lab: Guarded) -> None:
        posts = lab.session.scalars(sa.select(lab.Post).options(option(lab.Post.comments)))
        for post in posts.unique():
            len(post.comments)

    return orm(option.__name__, run)


def _lazy(lab: Guarded) -> None:
    for post in lab.session.scalars(sa.select(lab.Post)):
        len(post.comments)


def _expired(lab: Guarded) -> None:
    post = lab.session.get_one(lab.Post, 2)
    lab.session.expire(post)
    str(post.title)
    lab.session.refresh(post)


def _paginate(lab: Guarded) -> None:
    pages = lab.db.paginate(sa.select(lab.Post).order_by(lab.Post.id), per_page=1, max_per_page=1)
    assert pages.total
    pages.next()


#: What a replica can answer.
READS = [
    _select("columns", lambda post, _: sa.select(post.id, post.title)),
    _select("where", lambda post, _: sa.select(post.id).where(post.id > 1, post.title != "y")),
    _select("or, not, in", lambda post, _: sa.select(post.id).where(~post.id.in_([1, 2]))),
    _select("between", lambda post, _: sa.select(post.id).where(post.id.between(1, 2))),
    _select("like", lambda post, _: sa.select(post.id).where(post.title.like("a%"))),
    _select("ilike", lambda post, _: sa.select(post.id).where(post.title.icontains("A"))),
    _select("regexp", lambda post, _: sa.select(post.id).where(post.title.regexp_match("^a"))),
    _select("is null", lambda post, _: sa.select(post.id).where(post.title.is_(None))),
    _select(
        "tuple",
        lambda post, _: sa.select(post.id).where(sa.tuple_(post.id, post.title).in_([(1, "a")])),
    ),
    _select("order, limit", lambda post, _: sa.select(post.id).order_by(post.id.desc()).limit(1)),
    _select("distinct", lambda post, _: sa.select(post.title).distinct()),
    _select("join", lambda post, comment: sa.select(post.id, comment.text).join(comment)),
    _select(
        "outer join",
        lambda post, comment: sa.select(post.id).outerjoin(comment, comment.post_id == post.id),
    ),
    _select("self join", _aliased),
    _select("count", lambda post, _: sa.select(sa.func.count()).select_from(post)),
    _select(
        "aggregates",
        lambda post, _: sa.select(sa.func.min(post.id), sa.func.max(post.id), sa.func.avg(post.id)),
    ),
    _select(
        "group by, having",
        lambda post, comment: (
            sa.select(comment.post_id, sa.func.count())
            .group_by(comment.post_id)
            .having(sa.func.count() > 0)
        ),
    ),
    _select("case", lambda post, _: sa.select(sa.case((post.id > 1, "more"), else_="less"))),
    _select("cast", lambda post, _: sa.select(sa.cast(post.id, sa.String(9)))),
    _select("arithmetic", lambda post, _: sa.select(post.id * 2 + 1, -post.id, post.id % 2)),
    _select("concatenation", lambda post, _: sa.select(post.title + "!")),
    _select("extract", lambda post, _: sa.select(sa.extract("year", sa.func.now()))),
    _select(
        "functions",
        lambda post, _: sa.select(
            sa.func.lower(post.title), sa.func.coalesce(post.title, ""), sa.func.length(post.title)
        ),
    ),
    _select(
        "dates", lambda post, _: sa.select(sa.func.current_timestamp(), sa.func.date(sa.func.now()))
    ),
    _select("literal", lambda post, _: sa.select(sa.literal("a"), sa.null(), sa.true())),
    _select(
        "scalar subquery",
        lambda post, comment: sa.select(
            post.id,
            sa.select(sa.func.count())
            .where(comment.post_id == post.id)
            .scalar_subquery()
            .label("comments"),
        ),
    ),
    _select(
        "exists",
        lambda post, comment: sa.select(post.id).where(
            sa.exists().where(comment.post_id == post.id)
        ),
    ),
    _select(
        "in a subquery",
        lambda post, comment: sa.select(post.id).where(post.id.in_(sa.select(comment.post_id))),
    ),
    _select("from a subquery", lambda post, _: sa.select(sa.select(post.id).subquery())),
    _select("cte", lambda post, _: sa.select(sa.select(post.id).cte("ids").c.id)),
    _select("recursive cte", _recursive),
    _select(
        "window",
        lambda post, _: sa.select(
            post.id,
            sa.func.row_number().over(order_by=post.id),
            sa.func.sum(post.id).over(partition_by=post.title, rows=(None, 0)),
            sa.func.lag(post.id).over(order_by=post.id),
        ),
    ),
    _select(
        "union", lambda post, comment: sa.union(sa.select(post.title), sa.select(comment.text))
    ),
    _select(
        "union all, ordered",
        lambda post, comment: sa.union_all(sa.select(post.id), sa.select(comment.id)).order_by(
            "id"
        ),
    ),
    _select("except", lambda post, comment: sa.except_(sa.select(post.id), sa.select(comment.id))),
    _select(
        "intersect", lambda post, comment: sa.intersect(sa.select(post.id), sa.select(comment.id))
    ),
    _select(
        "values",
        lambda post, _: sa.select(
            sa.union_all(
                *(sa.select(sa.literal(number).label("n")) for number in (1, 2))
            ).subquery()
        ),
    ),
    _select("json", lambda post, _: sa.select(sa.func.json_extract('{"a": 1}', "$.a"))),
    core(
        "execution options",
        lambda lab: lab.session.execute(
            sa.select(lab.Post.id), execution_options={"yield_per": 1}
        ).all(),
    ),
    core("db.stream", lambda lab: list(lab.db.stream(sa.select(lab.Post.id)))),
    _select("entity", lambda post, _: sa.select(post), "orm"),
    _select("two entities", lambda post, comment: sa.select(post, comment).join(comment), "orm"),
    _select("relationship", lambda post, _: sa.select(post).join(post.comments), "orm"),
    _select("any()", lambda post, _: sa.select(post).where(post.comments.any(text="a")), "orm"),
    _select("bundle", lambda post, _: sa.select(so.Bundle("post", post.id, post.title)), "orm"),
    _select(
        "load_only, defer",
        lambda post, _: sa.select(post).options(so.load_only(post.id), so.defer(post.title)),
        "orm",
    ),
    _select(
        "loader criteria",
        lambda post, comment: sa.select(post).options(
            so.joinedload(post.comments), so.with_loader_criteria(comment, comment.text != "x")
        ),
        "orm",
    ),
    _loaded(so.joinedload),
    _loaded(so.selectinload),
    _loaded(so.subqueryload),
    _loaded(so.immediateload),
    orm("lazy load", _lazy),
    orm("expired and refreshed", _expired),
    orm("get", lambda lab: lab.session.get(lab.Post, 2)),
    orm("get_one", lambda lab: lab.session.get_one(lab.Post, 2)),
    orm("get_or_404", lambda lab: lab.db.get_or_404(lab.Post, 2)),
    orm("paginate", _paginate),
    orm("Query.all", lambda lab: lab.session.query(lab.Post).all()),
    orm("Query.get", lambda lab: lab.session.query(lab.Post).filter_by(id=2).one_or_none()),
    orm("Query.count", lambda lab: lab.session.query(lab.Post).join(lab.Comment).count()),
    orm(
        "Query.exists", lambda lab: lab.session.query(lab.session.query(lab.Post).exists()).scalar()
    ),
    orm("Model.query", lambda lab: lab.Post.query.order_by(lab.Post.title).first()),
    orm("Model.query.paginate", lambda lab: lab.Post.query.paginate(per_page=1).items),
]


@dataclasses.dataclass
class Outcome:
    """What became of a case: who has executed it, and the error if there was one."""

    servers: set[int]
    error: Exception | None
    has_written: bool


class Trial:
    """An app for one user, and the logs of its servers."""

    def __init__(self, database: Database[MariaDBCluster], user: str) -> None:
        self.database = database
        servers = database.cluster.servers
        self.lab = Guarded(*_urls(servers, user, database.name))
        self.lab.fill()
        database.execute("CREATE SEQUENCE numbers NOCACHE")
        database.execute(
            "CREATE PROCEDURE writing() MODIFIES SQL DATA INSERT INTO post (title) VALUES ('p')"
        )
        database.execute(
            "CREATE FUNCTION writes() RETURNS INT MODIFIES SQL DATA"
            " BEGIN INSERT INTO post (title) VALUES ('f'); RETURN 1; END"
        )
        database.execute("CREATE FUNCTION nobody_knows() RETURNS INT NO SQL RETURN 1")
        database.sync()
        for engine in self.lab.engines:  # what a first connection asks is no case's
            engine.connect().close()
        self.logs = Logs(database.cluster, USERS)

    def outcome(self, case: Case, in_replica_scope: bool = False) -> Outcome:
        before = self.logs.position(PRIMARY)
        error = self.lab.attempt(case, in_replica_scope)
        servers = set(self.logs.take())
        self.assert_clean(case)
        return Outcome(servers, error, self.logs.position(PRIMARY) != before)

    def assert_clean(self, case: Case) -> None:
        """Only the primary is the origin of what the replicas' binary logs hold."""
        for replica in REPLICAS:
            is_clean = self.logs.origin(replica) == PRIMARY
            assert is_clean, f"{case.name} is in the binary log of replica {replica}"

    def close(self) -> None:
        self.lab.dispose()
        self.logs.close()
        self.database.sync()
        for replica in self.database.cluster.replicas:
            status = replica.slave_status()
            assert (status["Last_SQL_Errno"], status["Slave_SQL_Running"]) == (0, "Yes")


def _urls(servers: t.Sequence[t.Any], user: str, database: str) -> tuple[str, list[str]]:
    primary, *replicas = [server.url(user, database) for server in servers]
    return primary, replicas


@pytest.fixture(params=USERS)
def trial(
    request: pytest.FixtureRequest, mariadb_database: Database[MariaDBCluster]
) -> c.Iterator[Trial]:
    trial = Trial(mariadb_database, request.param)
    yield trial
    trial.close()


def test_there_are_enough() -> None:
    """The lists are as long as they should be, and nothing stands there twice."""
    for cases, least in ((WRITES, 50), (STATE, 40), (READS, 60)):
        names = {(case.kind, case.name) for case in cases}
        assert len(names) == len(cases)
        assert len(names) >= least


def test_what_writes_in_a_get(trial: Trial) -> None:
    """A GET that writes, however it does so, has written on the primary, and only there."""
    for case in WRITES:
        outcome = trial.outcome(case)
        assert outcome.error is None, case.name
        assert outcome.has_written, case.name
        assert PRIMARY in outcome.servers, case.name
        if case.kind != "orm":  # which may have read before
            assert outcome.servers == {PRIMARY}, case.name


def test_what_writes_in_a_replica_scope(trial: Trial) -> None:
    """Core and ORM say themselves that they write, and are the primary's in ``db.replica()``, too.

    Text and cursors are taken at their word there: the replica gets them, and refuses them.
    """
    for case in WRITES:
        outcome = trial.outcome(case, in_replica_scope=True)
        if case.kind in ("text", "cursor"):
            assert outcome.servers <= REPLICAS, case.name
            assert not outcome.has_written, case.name
            assert outcome.error is not None, case.name
            assert re.search(r"READ ONLY transaction|--read-only", str(outcome.error)), case.name
        else:
            assert (outcome.error, outcome.has_written) == (None, True), case.name
            assert PRIMARY in outcome.servers, case.name


@pytest.mark.parametrize("trial", ["lab"], indirect=True)
def test_administration(trial: Trial) -> None:
    """What a server logs although it changes nothing: the primary's log has it, no replica's."""
    for case in ADMINISTRATION:
        outcome = trial.outcome(case)
        assert (outcome.error, outcome.servers) == (None, {PRIMARY}), case.name
        assert outcome.has_written, case.name
        outcome = trial.outcome(case, in_replica_scope=True)
        assert (outcome.error, outcome.has_written) == (None, False), case.name
        assert outcome.servers <= REPLICAS, case.name


def test_locks_and_session_state_in_a_get(trial: Trial) -> None:
    """A lock, a sequence, or what one session of a server remembers: always the primary's."""
    for case in STATE:
        outcome = trial.outcome(case)
        assert outcome.error is None, case.name
        assert PRIMARY in outcome.servers, case.name
        if case.name != "refresh for update":  # it has read before
            assert outcome.servers == {PRIMARY}, case.name


def test_locks_and_session_state_in_a_replica_scope(trial: Trial) -> None:
    """In ``db.replica()`` these are still the primary's, but for text and cursors."""
    for case in STATE:
        outcome = trial.outcome(case, in_replica_scope=True)
        if case.kind in ("text", "cursor"):
            assert outcome.servers <= REPLICAS, case.name
            assert (outcome.error is not None) == bool(REFUSED.search(case.name)), case.name
        else:
            assert outcome.error is None, case.name
            assert PRIMARY in outcome.servers, case.name


@pytest.mark.parametrize("in_replica_scope", [False, True])
def test_plain_reads(trial: Trial, in_replica_scope: bool) -> None:
    """Of plain SELECTs, Core's and the ORM's, 95 of 100 are a replica's; none fails or writes."""
    elsewhere = []
    for case in READS:
        outcome = trial.outcome(case, in_replica_scope)
        assert (outcome.error, outcome.has_written) == (None, False), case.name
        assert outcome.servers, case.name
        if not outcome.servers <= REPLICAS:
            elsewhere.append(case.name)
    assert len(elsewhere) <= 0.05 * len(READS), elsewhere


# --- PostgreSQL ----------------------------------------------------------------------------------

#: What a standby refuses.
REFUSED_BY_STANDBYS = [
    text("INSERT INTO post (title) VALUES ('x')"),
    text("WITH made AS (INSERT INTO post (title) VALUES ('x') RETURNING id) SELECT id FROM made"),
    text("SELECT NEXTVAL('post_id_seq')"),
    text("SELECT SETVAL('post_id_seq', 1000)"),
    text("SELECT id FROM post FOR UPDATE"),
    text("SELECT id FROM post FOR NO KEY UPDATE SKIP LOCKED"),
    text("SELECT id FROM post FOR KEY SHARE"),
    text("SELECT id INTO made FROM post"),
    text("LOCK TABLE made"),
    text("CREATE INDEX by_id ON made (id)"),
    text("ANALYZE made"),
    text("DROP TABLE made"),
    text("NOTIFY guard"),
    text("DO 'BEGIN INSERT INTO post (title) VALUES (1); END'"),
    text("SELECT 1; DELETE FROM comment"),
    Case("cursor", "cursor", lambda lab: _execute(lab, "UPDATE post SET title = 'x'")),
    core("nextval", lambda lab: lab.function("nextval", "post_id_seq")),
    core("setval", lambda lab: lab.function("setval", "post_id_seq", 2000)),
    core("sequence", lambda lab: lab.session.scalar(sa.Sequence("post_id_seq"))),
    core("next_value()", lambda lab: lab.fetch(sa.select(sa.Sequence("post_id_seq").next_value()))),
    _select("for update", lambda post, _: sa.select(post.id).with_for_update()),
    _select("key share", lambda post, _: sa.select(post.id).with_for_update(key_share=True)),
    _select(
        "dml in a cte",
        lambda post, _: sa.select(
            sa.insert(post.__table__).values(title="x").returning(post.id).cte("made").c.id
        ),
    ),
    orm("add", lambda lab: lab.session.add(lab.Post(title="x"))),
    orm("get for update", lambda lab: lab.session.get(lab.Post, 2, with_for_update=True)),
]

#: What a standby would do, and nobody on the primary would know.
STATE_OF_A_SESSION = [
    text("SELECT pg_advisory_lock(1)"),
    text("SELECT pg_try_advisory_xact_lock(2)"),
    text("SELECT pg_advisory_unlock_all()"),
    text("SET search_path TO public"),
    text("SELECT pg_backend_pid()"),
    core("advisory lock", lambda lab: lab.function("pg_advisory_lock", 1)),
    core("advisory unlock", lambda lab: lab.function("pg_advisory_unlock", 1)),
    core("advisory transaction lock", lambda lab: lab.function("pg_advisory_xact_lock", 2)),
    core("set_config", lambda lab: lab.function("set_config", "search_path", "public", False)),
    core("pg_backend_pid", lambda lab: lab.function("pg_backend_pid")),
]

#: Written for MariaDB.
NOT_POSTGRESQL = {"json"}


def _execute(lab: Guarded, sql: str) -> None:
    with lab.db.cursor() as cursor:
        cursor.execute(sql)


class StandbyTrial:
    """An app for one user on a primary and its standby, which write down all they execute."""

    def __init__(self, database: Database[PostgreSQLCluster], user: str) -> None:
        self.lab = Guarded(*_urls(database.cluster.servers, user, database.name))
        self.lab.fill()
        database.execute(f"ALTER DATABASE {database.name} SET log_statement = 'all'")
        self.servers = {"primary": database.cluster.primary, "standby": database.cluster.standby}
        database.sync()
        self.lab.dispose()  # the setting counts for new connections
        for engine in self.lab.engines:
            engine.connect().close()

    def outcome(self, case: Case, in_replica_scope: bool) -> tuple[set[str], Exception | None]:
        """Who has executed a case in a GET of its own, and the error if there was one."""
        before = {name: len(server.log) for name, server in self.servers.items()}
        error = self.lab.attempt(case, in_replica_scope)
        executed = set()
        for name, server in self.servers.items():
            log = server.log[before[name] :]
            statements = re.findall(r"LOG:  (?:statement|execute \S+): (.*)", log)
            if not all(re.match("BEGIN|COMMIT|ROLLBACK", statement) for statement in statements):
                executed.add(name)
        return executed, error


@pytest.fixture(params=USERS)
def standby_trial(
    request: pytest.FixtureRequest, postgresql_database: Database[PostgreSQLCluster]
) -> c.Iterator[StandbyTrial]:
    trial = StandbyTrial(postgresql_database, request.param)
    yield trial
    trial.lab.dispose()


@pytest.mark.parametrize("in_replica_scope", [False, True])
def test_postgresql(standby_trial: StandbyTrial, in_replica_scope: bool) -> None:
    """Writes, locks and a session's state are the primary's; text is in ``db.replica()`` taken at
    its word, and the standby refuses what writes or locks rows. Plain SELECTs are the standby's."""
    for case in REFUSED_BY_STANDBYS + STATE_OF_A_SESSION:
        executed, error = standby_trial.outcome(case, in_replica_scope)
        if in_replica_scope and case.kind in ("text", "cursor"):
            assert executed == {"standby"}, case.name
            assert (error is not None) == (case in REFUSED_BY_STANDBYS), case.name
            assert error is None or re.search("read-only|during recovery", str(error)), case.name
        else:
            assert (executed, error) == ({"primary"}, None), case.name
    elsewhere = []
    reads = [case for case in READS if case.name not in NOT_POSTGRESQL]
    for case in reads:
        executed, error = standby_trial.outcome(case, in_replica_scope)
        assert error is None, case.name
        if executed != {"standby"}:
            elsewhere.append(case.name)
    assert len(elsewhere) <= 0.05 * len(reads), elsewhere
