"""The message board does what it promises, on SQLite and on MariaDB with two replicas."""

from __future__ import annotations

import collections
import contextlib
import html
import html.parser
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import typing as t
import unicodedata
import urllib.error
import urllib.request
from datetime import datetime
from datetime import timedelta
from datetime import timezone
from pathlib import Path

import pytest
import sqlalchemy as sa

import examples
import flask_commondb
from examples.board import models
from examples.board import sample
from examples.board import views
from examples.board.forms import PostForm
from examples.board.models import Post
from examples.board.models import User
from examples.board.models import db
from tests.servers import free_port
from tests.servers import wait_until

from .conftest import running
from .conftest import sqlite_backend

if t.TYPE_CHECKING:
    import collections.abc as c

    from flask import Flask
    from flask.testing import FlaskClient
    from sqlalchemy.orm import Session
    from werkzeug.test import TestResponse

    from tests.servers import Database
    from tests.servers import MariaDBCluster
    from tests.servers import MariaDBServer

    from .conftest import Backend

#: What someone new would send.
NEW = {
    "username": "새손님",
    "email": "newcomer@example.org",
    "title": "처음 뵙겠습니다",
    "content": "잘 부탁드려요 🙂\n\nSee you soon.",
}

#: One of the sample's authors.
ADMIN = {"username": "admin", "email": "admin@example.org"}

SAMPLE_TITLES = [title for _, _, title, _ in sample._POSTS]


# -- the pages ---------------------------------------------------------------------------------


def test_home_shows_all_posts_newest_first(client: FlaskClient) -> None:
    """The list has every post with title, author, content and time, the newest first."""
    response = client.get("/")
    page = Page(response)

    assert response.status_code == 200
    assert page.titles == SAMPLE_TITLES
    assert page.texts("a", "author") == [author for author, _, _, _ in sample._POSTS]
    assert page.texts("div", "content") == [content for _, _, _, content in sample._POSTS]
    assert len(re.findall(r'<time datetime="[-\d]+T[:\d]+\+00:00">', response.text)) == 7


def test_home_is_bounded_and_stable(app: Flask, backend: Backend, client: FlaskClient) -> None:
    """The list ends with the fiftieth post; of posts of the same moment the latest comes first."""
    add_posts(app, 60, date_posted=datetime.now(timezone.utc) + timedelta(hours=1))
    backend.sync()

    titles = Page(client.get("/")).titles

    assert titles == [f"post {number}" for number in range(60, 10, -1)]


def test_profile_shows_one_author(client: FlaskClient) -> None:
    """A profile has the author's own posts, newest first, and nobody's e-mail address."""
    response = client.get("/user/운영자")
    page = Page(response)

    assert response.status_code == 200
    assert page.texts("h1") == ["운영자"]
    assert page.titles == ["게시판이 열렸습니다 🎉", "점심 같이 드실 분?"]
    assert "2 posts" in response.text
    assert "@" not in response.text


def test_profile_says_that_it_is_bounded(app: Flask, backend: Backend, client: FlaskClient) -> None:
    """A profile shows the newest fifty posts, and says how many there are."""
    add_posts(app, 60)
    backend.sync()

    response = client.get("/user/admin")

    assert len(Page(response).titles) == 50
    assert "62 posts, the newest 50 of them here" in response.text


def test_profile_is_found_in_every_spelling(client: FlaskClient) -> None:
    """A name in decomposed letters is the same name."""
    name = unicodedata.normalize("NFD", "개발팀")

    assert len(name) > 2
    assert Page(client.get(f"/user/{name}")).texts("h1") == ["개발팀"]


def test_unknown_author_is_a_page(client: FlaskClient) -> None:
    """The profile of nobody is a 404 in the layout of the board, with the name escaped."""
    response = client.get("/user/<i>nobody")

    assert response.status_code == 404
    assert Page(response).texts("h1") == ["Not Found"]
    assert "Nobody called “&lt;i&gt;nobody” has posted here." in response.text
    assert "replica" in footer(response)


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nowhere", 404), ("PUT", "/post/new", 405)]
)
def test_errors_are_pages(client: FlaskClient, method: str, path: str, status: int) -> None:
    """An error keeps its status and headers, and is a page with a footer."""
    response = client.open(path, method=method)

    assert response.status_code == status
    assert response.mimetype == "text/html"
    assert ("Allow" in response.headers) == (status == 405)
    assert footer(response) == "no statements"


def test_too_large_a_form_is_a_page(client: FlaskClient) -> None:
    """A form that is larger than any post is refused with a page, not with a reset."""
    response = client.post("/post/new", data={**NEW, "content": "x" * 300_000})

    assert response.status_code == 413
    assert Page(response).texts("h1") == ["Request Entity Too Large"]


# -- writing -----------------------------------------------------------------------------------


def test_post_creates_author_and_post(backend: Backend, client: FlaskClient) -> None:
    """A valid form stores its post and the new author, and leads back to the list."""
    response = client.post("/post/new", data=NEW)
    backend.sync()

    assert response.status_code in (302, 303)
    assert response.location == "/"
    page = Page(client.get("/"))
    assert page.titles[0] == NEW["title"]
    assert page.texts("div", "content")[0] == NEW["content"]
    assert Page(client.get(f"/user/{NEW['username']}")).titles == [NEW["title"]]


def test_known_author_is_found(backend: Backend, client: FlaskClient) -> None:
    """A name with its own e-mail address, in whatever case, gets another post and no double."""
    authors, _ = backend.stored()

    response = client.post("/post/new", data={**NEW, **ADMIN, "email": "Admin@Example.ORG "})
    backend.sync()

    assert response.status_code in (302, 303)
    assert backend.stored()[0] == authors
    assert Page(client.get("/user/admin")).titles[0] == NEW["title"]


@pytest.mark.parametrize("change", [{"username": "admin"}, {"email": "admin@example.org"}])
def test_names_cannot_be_borrowed(
    backend: Backend, client: FlaskClient, change: dict[str, str]
) -> None:
    """A name with another e-mail address is refused, and so is an address with another name."""
    before = backend.stored()
    (field,) = change

    response = client.post("/post/new", data={**NEW, **change})
    page = Page(response)

    assert response.status_code == 409
    assert list(page.mistakes()) == [field]
    assert page.values() == {**NEW, **change}
    assert backend.stored() == before


def test_upper_and_lower_case_are_two_names(backend: Backend, client: FlaskClient) -> None:
    """Whether names differ does not depend on the database's collation."""
    response = client.post("/post/new", data={**NEW, "username": "Admin"})
    backend.sync()

    assert response.status_code in (302, 303)
    assert Page(client.get("/user/Admin")).titles == [NEW["title"]]
    assert len(Page(client.get("/user/admin")).titles) == 2


@pytest.mark.parametrize(
    ("field", "value", "mistake"),
    [
        ("username", "", "Please enter your name."),
        ("username", "x" * 81, "At most 80 characters, please; these are 81."),
        ("username", "a/b", "Please choose a name without slashes or invisible characters."),
        ("username", "..", "Please choose a name without slashes or invisible characters."),
        (
            "username",
            "admin\N{RIGHT-TO-LEFT OVERRIDE}",
            "Please choose a name without slashes or invisible characters.",
        ),
        ("email", "", "Please enter your e-mail address."),
        ("email", "x" * 120 + "@example.org", "At most 120 characters, please; these are 132."),
        ("email", "nobody", "This is not an e-mail address. One looks like name@example.org."),
        ("email", "a@b@c.de", "This is not an e-mail address. One looks like name@example.org."),
        ("title", "", "Please give your post a title."),
        ("title", " \t ", "Please give your post a title."),
        ("title", "제" * 101, "At most 100 characters, please; these are 101."),
        ("content", "", "Please write something."),
        ("content", "글" * 10_001, "At most 10,000 characters, please; these are 10,001."),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else None,
)
def test_mistakes_stand_beside_their_fields(
    backend: Backend, client: FlaskClient, field: str, value: str, mistake: str
) -> None:
    """A form with a mistake comes back as typed, says what is wrong where, and stores nothing."""
    before = backend.stored()

    response = client.post("/post/new", data={**NEW, field: value})
    page = Page(response)

    assert response.status_code == 400
    assert page.mistakes() == {field: mistake}
    assert page.values() == {**NEW, field: value.strip()}
    assert footer(response) == "no statements"
    assert backend.stored() == before


def test_an_empty_request_has_four_mistakes(client: FlaskClient) -> None:
    """Every field is judged at once, one that was not sent as well."""
    response = client.post("/post/new")

    assert response.status_code == 400
    assert list(Page(response).mistakes()) == ["username", "email", "title", "content"]


def test_the_longest_values_are_stored(backend: Backend, client: FlaskClient) -> None:
    """What is just short enough is stored whole, in letters of four bytes too."""
    longest = {
        "username": "🙂" * models.USERNAME_LENGTH,
        "email": "x" * (models.EMAIL_LENGTH - 12) + "@example.org",
        "title": "🙂" * models.TITLE_LENGTH,
        "content": "🙂" * models.CONTENT_LENGTH,
    }

    response = client.post("/post/new", data=longest)

    assert response.status_code in (302, 303)
    authors, posts = backend.stored()
    assert (longest["username"], longest["email"]) in {author[1:] for author in authors}
    assert (longest["title"], longest["content"]) in {post[1:3] for post in posts}


def test_author_and_post_are_one_transaction(
    app: Flask, backend: Backend, client: FlaskClient
) -> None:
    """When the database refuses the post, there is no author without posts left behind."""
    app.testing = False  # let the board show its page for a 500
    authors, _ = backend.stored()
    backend.execute("DROP TABLE post")

    response = client.post("/post/new", data=NEW)

    assert response.status_code == 500
    assert Page(response).texts("h1") == ["Internal Server Error"]
    assert set(backend.execute("SELECT id, username, email FROM user")) == authors


@pytest.mark.parametrize(
    ("second", "statuses"),
    [(NEW, {303}), ({**NEW, "email": "other@example.org"}, {303, 409})],
    ids=["same person", "other person"],
)
def test_two_first_posts_at_once(
    app: Flask,
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    second: dict[str, str],
    statuses: set[int],
) -> None:
    """Who loses the race for a name may post if it is theirs, and is refused otherwise."""
    before = backend.stored()
    find_author = views._find_author
    both_have_looked = threading.Barrier(2)
    calls: c.Callable[[], int] = iter(range(10)).__next__

    def find_author_together(session: Session, form: PostForm) -> User | None:
        author = find_author(session, form)
        if calls() < 2:
            both_have_looked.wait(10)
        return author

    monkeypatch.setattr(views, "_find_author", find_author_together)
    answers: list[int] = []
    threads = [
        threading.Thread(
            target=lambda data=data: answers.append(
                app.test_client().post("/post/new", data=data).status_code
            )
        )
        for data in (NEW, second)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    authors, posts = backend.stored()
    assert {303 if answer == 302 else answer for answer in answers} == statuses
    assert len(authors - before[0]) == 1
    assert len(posts - before[1]) == answers.count(303) + answers.count(302)


def test_input_is_escaped(backend: Backend, client: FlaskClient) -> None:
    """What somebody types is shown as typed, on every page, and is never markup."""
    attack = "\"><script>alert(1)</script>&amp;'"
    name = attack.replace("/", "")
    fields = {**NEW, "username": name, "title": attack, "content": f"</textarea>{attack}"}
    refused = client.post("/post/new", data={**fields, "email": attack})
    accepted = client.post("/post/new", data=fields)
    backend.sync()

    assert refused.status_code == 400
    assert Page(refused).values() == {**fields, "email": attack}
    assert accepted.status_code in (302, 303)
    listed = client.get("/")
    link = re.search(r'href="(/user/%22[^"]*)"', listed.text)
    assert link is not None
    profile = client.get(html.unescape(link[1]))
    for response in (refused, listed, profile):
        assert "<script" not in response.text
    assert Page(listed).titles[0] == attack
    assert Page(profile).texts("h1") == [name]
    assert Page(profile).texts("div", "content") == [f"</textarea>{attack}"]


def test_form_is_labelled(client: FlaskClient) -> None:
    """Each field has a label; what describes it exists; what is wrong with it is said so."""
    for response in (client.get("/post/new"), client.post("/post/new")):
        page = Page(response)
        fields = page.fields()
        assert len(fields) == 4
        for field in fields:
            assert {"for": field["id"]} in page.attributes("label")
            for described_by in field.get("aria-describedby", "").split():
                assert len(page.by_id(described_by)) == 1
            assert (field.get("aria-invalid") == "true") == (response.status_code == 400)


def test_pages_need_nothing_from_elsewhere(client: FlaskClient) -> None:
    """A page says its language, has a skip link, no script, and one small stylesheet of its own."""
    for path in ("/", "/user/admin", "/post/new", "/nowhere"):
        response = client.get(path)
        page = Page(response)
        assert page.attributes("html") == [{"lang": "en"}]
        assert page.attributes("a")[0] == {"class": "skip", "href": "#main"}
        assert len(page.by_id("main")) == 1
        assert "<script" not in response.text
        assert "//" not in response.text
        (stylesheet,) = [
            link["href"] for link in page.attributes("link") if link["rel"] == "stylesheet"
        ]
        assert len(client.get(stylesheet, buffered=True).data) < 6000


# -- which server answers ----------------------------------------------------------------------


def test_get_is_answered_by_a_replica(
    mariadb_database: Database[MariaDBCluster], path_of_page: str
) -> None:
    """The servers say that one replica has answered a GET, and the footer names that one."""
    cluster = mariadb_database.cluster
    with running(config_of(mariadb_database)) as app:
        mariadb_database.sync()
        for _ in range(8):  # by chance it is one replica or the other
            before = {server: status(server, "Com_select") for server in cluster.servers}
            response = app.test_client().get(path_of_page)
            asked = [
                server
                for server in cluster.servers
                if status(server, "Com_select") > before[server]
            ]

            assert response.status_code == 200
            assert len(asked) == 1
            assert asked[0] in cluster.replicas
            assert [answer.server for answer in answers_of(response)] == [name_of(asked[0])]
            assert {answer.role for answer in answers_of(response)} == {"replica"}


@pytest.fixture(params=["/", "/user/admin"])
def path_of_page(request: pytest.FixtureRequest) -> str:
    """A page that reads."""
    return str(request.param)


def test_post_is_answered_by_the_primary(mariadb_database: Database[MariaDBCluster]) -> None:
    """The servers say that a POST reads and writes on the primary only."""
    cluster = mariadb_database.cluster
    with running(config_of(mariadb_database)) as app:
        mariadb_database.sync()
        selects = {server: status(server, "Com_select") for server in cluster.replicas}
        inserts = status(cluster.primary, "Com_insert")

        response = app.test_client().post("/post/new", data=NEW)

        assert response.status_code in (302, 303)
        assert {server: status(server, "Com_select") for server in cluster.replicas} == selects
        assert status(cluster.primary, "Com_insert") == inserts + 2
        assert {answer[:3] for answer in answers_in_header(response)} == {
            ("primary", name_of(cluster.primary), "transaction")
        }


def test_header_counts_each_statement_once(client: FlaskClient) -> None:
    """A new author's post is three statements: looking for the author, and storing both."""
    response = client.post("/post/new", data=NEW)

    assert sum(answer.statements for answer in answers_in_header(response)) == 3


def test_sqlite_reads_from_the_replica_and_writes_to_the_primary(tmp_path: Path) -> None:
    """With a replica that is another file, a GET shows that file, and a POST leaves it alone."""
    primary = sqlite_backend(tmp_path / "primary.db")
    replica = sqlite_backend(tmp_path / "replica.db")
    for one in (primary, replica):
        with running(one.config):
            pass
    replica.execute("UPDATE post SET title = 'told by the replica'")
    before = replica.stored()

    with running({**primary.config, "COMMONDB_REPLICAS": replica.replica_urls}) as app:
        client = app.test_client()
        listed = client.get("/")
        posted = client.post("/post/new", data=NEW)

    assert set(Page(listed).titles) == {"told by the replica"}
    assert footer(listed) == "replica replica.db (read), 1 statement"
    assert posted.status_code in (302, 303)
    assert replica.stored() == before
    assert NEW["title"] in {title for _, title, _, _ in primary.stored()[1]}


@pytest.mark.parametrize(
    ("path", "statements"), [("/", 1), ("/user/admin", 3), ("/user/nobody", 1), ("/post/new", 0)]
)
def test_footer_and_header_agree(client: FlaskClient, path: str, statements: int) -> None:
    """Footer and header say the same: role, server, reason and number of statements."""
    response = client.get(path)

    assert answers_of(response) == answers_in_header(response)
    assert sum(answer.statements for answer in answers_of(response)) == statements


def test_every_response_has_the_header(client: FlaskClient) -> None:
    """A response without a page has the header, too."""
    for response in (
        client.get("/static/board.css", buffered=True),
        client.head("/"),
        client.post("/post/new", data=NEW),
    ):
        assert response.headers["Server-Timing"].startswith('db;desc="')


@pytest.mark.parametrize("page", ["/", "/user/admin"])
def test_without_reachable_replicas_the_primary_answers(backend: Backend, page: str) -> None:
    """Replicas that were never there cost no page: the primary answers, and is named."""
    if backend.primary_url.startswith("sqlite"):
        nowhere = f"{backend.primary_url}-missing/replica.db"
    else:
        nowhere = re.sub(r":\d+/", f":{free_port()}/", backend.primary_url)
    with running({**backend.config, "COMMONDB_REPLICAS": [nowhere]}) as app:
        client = app.test_client()
        for _ in range(2):
            response = client.get(page)

            assert response.status_code == 200
            assert Page(response).titles
            assert {(answer.role, answer.reason) for answer in answers_of(response)} == {
                ("primary", "replica down")
            }
            assert answers_of(response) == answers_in_header(response)


def test_replicas_that_die_cost_no_page(mariadb_database: Database[MariaDBCluster]) -> None:
    """After the replicas are killed the next GET is answered by the primary: ask the primary."""
    cluster = mariadb_database.cluster
    with running(config_of(mariadb_database)) as app:
        mariadb_database.sync()
        client = app.test_client()
        for _ in range(8):
            assert client.get("/").status_code == 200
        for replica in cluster.replicas:
            replica.kill()
        before = status(cluster.primary, "Com_select")

        response = client.get("/")

        assert response.status_code == 200
        assert Page(response).titles == SAMPLE_TITLES
        assert footer(response) == (
            f"primary {name_of(cluster.primary)} (replica down), 1 statement"
        )
        assert status(cluster.primary, "Com_select") > before


def test_board_without_replicas_says_so(backend: Backend) -> None:
    """Without replicas the footer names the primary where statements were sent, and only there."""
    with running({"SQLALCHEMY_DATABASE_URI": backend.primary_url}) as app:
        client = app.test_client()
        listed = client.get("/")
        profile = client.get("/user/admin")
        form = client.get("/post/new")

    assert footer(listed) == "primary (no replicas), 1 statement"
    assert listed.headers["Server-Timing"] == 'db;desc="primary: no replicas, 1 statement"'
    assert footer(profile) == "primary (no replicas), 3 statements"
    assert profile.headers["Server-Timing"] == 'db;desc="primary: no replicas, 3 statements"'
    assert footer(form) == "no statements"
    assert form.headers["Server-Timing"] == 'db;desc="no statements"'


def test_strange_file_names_make_a_valid_header(tmp_path: Path) -> None:
    """The header is quoted ASCII, whatever a database file is called; the footer is escaped."""
    with running(sqlite_backend(tmp_path / '게시"<b>.db').config) as app:
        response = app.test_client().get("/")

    assert response.headers["Server-Timing"] == (
        r'db;desc="replica \\uac8c\\uc2dc\"<b>.db: read, 1 statement"'
    )
    assert footer(response) == 'replica 게시"<b>.db (read), 1 statement'


def test_two_boards_count_for_themselves(tmp_path: Path) -> None:
    """What one app's statements are said to have done is not told by another app."""
    one, other = (sqlite_backend(tmp_path / name) for name in ("one.db", "other.db"))
    with running(one.config) as first, running(other.config) as second:
        assert footer(second.test_client().get("/")) == "replica other.db (read), 1 statement"
        assert footer(first.test_client().get("/")) == "replica one.db (read), 1 statement"


@pytest.mark.parametrize(("path", "expected"), [("/", 1), ("/user/admin", 3)])
def test_number_of_statements_is_constant(
    app: Flask, backend: Backend, client: FlaskClient, path: str, expected: int
) -> None:
    """A page costs the same number of statements, however many posts and authors it shows."""
    statements: list[str] = []

    def note(connection: t.Any, cursor: t.Any, statement: str, *event: t.Any) -> None:
        statements.append(statement)

    with app.app_context():
        for engine in (*db.engines.values(), *db.replica_engines.get(None, ())):
            sa.event.listen(engine, "before_cursor_execute", note)

    assert client.get(path).status_code == 200
    assert len(statements) == expected
    with app.app_context(), db.transaction() as session:
        for number in range(30):
            author = User(username=f"author {number}", email=f"{number}@example.com")
            session.add(Post(title="one of many", content="…", author=author))
    add_posts(app, 30)
    backend.sync()
    statements.clear()
    response = client.get(path)

    assert "post 30" in Page(response).titles
    assert len(statements) == expected
    assert sum(answer.statements for answer in answers_of(response)) == expected


# -- times -------------------------------------------------------------------------------------


def test_times_are_the_same_moment_when_read(app: Flask, backend: Backend) -> None:
    """A moment keeps its microseconds, comes back in UTC, and was stored in UTC."""
    seoul = timezone(timedelta(hours=9))
    posted = datetime(2031, 1, 1, 8, 30, 15, 123456, tzinfo=seoul)
    add_posts(app, 1, date_posted=posted)

    with app.app_context():
        found = db.session.scalars(models.newest_posts()).first()

    assert found is not None
    assert found.date_posted == posted
    assert found.date_posted.utcoffset() == timedelta(0)
    assert str(backend.execute("SELECT MAX(date_posted) FROM post")[0][0]) == (
        "2030-12-31 23:30:15.123456"
    )


def test_times_without_a_zone_are_refused(app: Flask) -> None:
    """A time that could be many moments is not stored."""
    with pytest.raises(sa.exc.StatementError, match="has no time zone"):
        add_posts(app, 1, date_posted=datetime(2031, 1, 1))


# -- starting ----------------------------------------------------------------------------------


def test_sample_is_inserted_once(app: Flask, backend: Backend) -> None:
    """A board that is started again has the same posts."""
    before = backend.stored()
    assert (len(before[0]), len(before[1])) == (5, 7)

    with running(backend.config):
        pass

    assert backend.stored() == before


def test_a_used_board_gets_no_sample(app: Flask, backend: Backend, client: FlaskClient) -> None:
    """Where someone has written, nothing is added."""
    for table in ("post", "user"):
        backend.execute(f"DELETE FROM {table}")
    client.post("/post/new", data=NEW)

    with running(backend.config):
        pass

    assert [post[1] for post in backend.stored()[1]] == [NEW["title"]]


def test_empty_board_invites(app: Flask, backend: Backend, client: FlaskClient) -> None:
    """A board without posts is a page that leads to the form."""
    for table in ("post", "user"):
        backend.execute(f"DELETE FROM {table}")
    backend.sync()

    response = client.get("/")

    assert response.status_code == 200
    assert "Write the first post" in response.text


def test_workers_may_start_at_once(backend: Backend) -> None:
    """Several processes on an empty database all start, and insert the sample once."""
    program = (
        "import sys\n"
        "from examples.board import create_app\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "response = create_app().test_client().get('/')\n"
        "sys.exit(response.status_code != 200)\n"
    )
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", program],
                    cwd=CHECKOUT,
                    env=environment(backend.config),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(4)
        ]
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        errors = [worker.communicate(timeout=60)[1] for worker in workers]

    assert [worker.returncode for worker in workers] == [0] * 4, errors
    authors, posts = backend.stored()
    assert sorted(title for _, title, _, _ in posts) == sorted(SAMPLE_TITLES)
    assert len(authors) == 5


def test_environment_puts_the_board_on_mariadb(mariadb_database: Database[MariaDBCluster]) -> None:
    """Two environment variables move the board to a cluster, with no change of code."""
    config = config_of(mariadb_database, replicas=[1])
    with running(config):
        mariadb_database.sync()  # or the replica might not even have the tables yet
    program = (
        "from examples.board import create_app\n"
        "response = create_app().test_client().get('/')\n"
        "print(response.status_code, response.headers['Server-Timing'])\n"
    )

    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=CHECKOUT,
        env=environment(config),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    replica = mariadb_database.cluster.replicas[1]
    assert result.stdout == f'200 db;desc="replica {name_of(replica)}: read, 1 statement"\n'


def test_import_connects_to_nothing() -> None:
    """Importing the board opens no database and no socket."""
    program = (
        "import sys\n"
        "def refuse(event, arguments):\n"
        "    if event in ('sqlite3.connect', 'socket.connect', 'socket.getaddrinfo'):\n"
        "        raise AssertionError(event)\n"
        "sys.addaudithook(refuse)\n"
        "import examples.board\n"
    )

    result = subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, env=environment(), timeout=60, check=False
    )

    assert result.returncode == 0


def test_settings_override_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument comes before the environment, and replicas go with the primary they are for."""
    one, other = (sqlite_backend(tmp_path / name) for name in ("one.db", "other.db"))
    for name, value in environment(one.config).items():
        monkeypatch.setenv(name, value)

    with running({}) as app:
        assert app.config["SQLALCHEMY_DATABASE_URI"] == one.primary_url
        assert app.config["COMMONDB_REPLICAS"] == one.replica_urls
    with running({"SQLALCHEMY_DATABASE_URI": other.primary_url}) as app:
        assert app.config["SQLALCHEMY_DATABASE_URI"] == other.primary_url
        assert app.config["COMMONDB_REPLICAS"] is None
    with running(other.config) as app:
        assert app.config["COMMONDB_REPLICAS"] == other.replica_urls
    monkeypatch.delenv("FLASK_COMMONDB_REPLICAS")
    with running({}) as app:
        assert app.config["SQLALCHEMY_DATABASE_URI"] == one.primary_url
        assert app.config["COMMONDB_REPLICAS"] is None


def test_flask_run_serves_the_board(tmp_path: Path) -> None:
    """With nothing configured, `flask run` serves the board from a file in the instance folder."""
    shutil.copytree(
        CHECKOUT / "examples",
        tmp_path / "examples",
        ignore=shutil.ignore_patterns("__pycache__", "instance"),
    )
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    with (
        open(tmp_path / "log", "wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "flask", "--app", "examples.board", "run", f"--port={port}"],
            cwd=tmp_path,
            env=environment(),
            stdout=log,
            stderr=log,
        ) as server,
    ):
        try:
            wait_until(
                lambda: server.poll() is not None or fetch(url) is not None,
                "flask run serves the board, or ends",
                30,
            )
            text = fetch(url)
        finally:
            server.terminate()

    assert text is not None, (tmp_path / "log").read_text()
    assert SAMPLE_TITLES[0] in text
    assert "replica board.db (read), 1 statement" in text
    with contextlib.closing(sqlite3.connect(tmp_path / "instance" / "board.db")) as connection:
        assert connection.execute("SELECT COUNT(*) FROM post").fetchall() == [(7,)]


# -- helpers -----------------------------------------------------------------------------------

CHECKOUT = Path(next(iter(examples.__path__))).parent


class Answer(t.NamedTuple):
    """What a page says about one server."""

    role: str
    server: str
    reason: str
    statements: int


def footer(response: TestResponse) -> str:
    """What the footer says of the database."""
    (text,) = Page(response).texts("span", "server")
    return text


def answers_of(response: TestResponse) -> list[Answer]:
    """The footer, taken apart."""
    if footer(response) == "no statements":
        return []
    matches = [
        re.fullmatch(r"(\w+) (\S+) \((.*)\), (\d+) statements?", part)
        for part in footer(response).split("; ")
    ]
    return [Answer(m[1], m[2], m[3], int(m[4])) for m in matches if m is not None]


def answers_in_header(response: TestResponse) -> list[Answer]:
    """The header, taken apart, in the words of the footer."""
    if response.headers["Server-Timing"] == 'db;desc="no statements"':
        return []
    found = re.findall(
        r'db;desc="(\w+) (\S+): (\w+), (\d+) statements?"', response.headers["Server-Timing"]
    )
    return [
        Answer(role, server, reason.replace("_", " "), int(count))
        for role, server, reason, count in found
    ]


def add_posts(app: Flask, count: int, **values: t.Any) -> None:
    """Let admin post `post 1`, `post 2` and so on."""
    with app.app_context(), db.transaction() as session:
        author = session.scalars(sa.select(User).where(User.username == "admin")).one()
        for number in range(1, count + 1):
            session.add(Post(title=f"post {number}", content="…", author=author, **values))
            session.flush()  # so that the ids are in the order of the titles


def config_of(
    database: Database[MariaDBCluster], replicas: c.Sequence[int] = (0, 1)
) -> dict[str, t.Any]:
    """The settings for a board on a cluster."""
    return {
        "SQLALCHEMY_DATABASE_URI": database.primary_url,
        "COMMONDB_REPLICAS": [database.replica_urls[number] for number in replicas],
    }


def name_of(server: MariaDBServer) -> str:
    """What the board calls a server."""
    return f"127.0.0.1:{server.port}"


def status(server: MariaDBServer, name: str) -> int:
    """A counter of the server's own."""
    ((_, value),) = server.execute("SHOW GLOBAL STATUS LIKE %s", name)
    return int(value)


def environment(config: t.Mapping[str, t.Any] | None = None) -> dict[str, str]:
    """The environment of a process that imports what we import, with settings in it."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("FLASK_")}
    # Where the package is installed this adds nothing, and in a checkout it is not installed.
    found["PYTHONPATH"] = str(Path(flask_commondb.__file__).parents[1])
    for name, value in (config or {}).items():
        found[f"FLASK_{name}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def fetch(url: str) -> str | None:
    """A page, `None` while nobody serves it."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return str(response.read().decode())
    except urllib.error.URLError:
        return None


class Element(t.NamedTuple):
    """An element of a page, with all the text in it."""

    tag: str
    attributes: dict[str, str]
    text: list[str]


class Page(html.parser.HTMLParser):
    """A response as a browser's user would see it."""

    def __init__(self, response: TestResponse) -> None:
        super().__init__()
        self._elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(response.text)
        self.close()
        assert self._open == [], "every element has to be closed"

    @property
    def titles(self) -> list[str]:
        """The titles of the posts."""
        return self.texts("h2")

    def texts(self, tag: str, class_name: str | None = None) -> list[str]:
        """The texts of the elements with a tag, and a class."""
        return [
            "".join(element.text).strip()
            for element in self._elements
            if element.tag == tag and class_name in (None, element.attributes.get("class"))
        ]

    def attributes(self, *tags: str) -> list[dict[str, str]]:
        """The attributes of the elements with a tag."""
        return [element.attributes for element in self._elements if element.tag in tags]

    def by_id(self, name: str) -> list[Element]:
        """The elements with an id: one, on a page that is well made."""
        return [element for element in self._elements if element.attributes.get("id") == name]

    def fields(self) -> list[dict[str, str]]:
        """The attributes of the form's fields."""
        return self.attributes("input", "textarea")

    def values(self) -> dict[str, str]:
        """What stands in the form's fields."""
        (textarea,) = self.texts("textarea")
        return {field["name"]: field.get("value", textarea) for field in self.fields()}

    def mistakes(self) -> dict[str, str]:
        """For each field that is marked as invalid what is said to be wrong with it."""
        found: dict[str, str] = collections.defaultdict(str)
        for field in self.fields():
            if field.get("aria-invalid") == "true":
                for name in field["aria-describedby"].split():
                    (element,) = self.by_id(name)
                    if element.attributes["class"] == "error":
                        found[field["name"]] += "".join(element.text)
        return found

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, [])
        self._elements.append(element)
        if tag not in ("input", "link", "meta"):
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag, "elements have to be nested"

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text.append(data)
