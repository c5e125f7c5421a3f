"""The tables, and something to read in them.

Owns: what happens at start: the tables are created, and an empty board gets its first posts.

Must not: touch a database that has an author in it, or assume that no other worker does the same
at this moment.
"""

from __future__ import annotations

from datetime import datetime
from datetime import timedelta
from datetime import timezone

import sqlalchemy as sa

from .models import Post
from .models import User
from .models import db

#: Two tables and the sample can be lost to other workers, one after the other; one for luck.
_ATTEMPTS = 5


def prepare() -> None:
    """Make the database ready. Any number of workers may do so at once.

    Who loses the race for a table or for the sample's unique names gets an error, looks again,
    and finds the work done.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            db.create_all()
            _insert_sample()
        except (sa.exc.IntegrityError, sa.exc.OperationalError, sa.exc.ProgrammingError):
            if attempt == _ATTEMPTS:
                raise
        else:
            return


def _insert_sample() -> None:
    with db.transaction() as session:
        if session.scalar(sa.select(User.id).limit(1)) is not None:
            return
        authors = {
            name: User(username=name, email=f"{mailbox}@example.org")
            for name, mailbox in _AUTHORS.items()
        }
        now = datetime.now(timezone.utc)
        session.add_all(
            Post(title=title, content=content, author=authors[name], date_posted=now - age)
            for name, age, title, content in _POSTS
        )


_AUTHORS = {
    "운영자": "operator",
    "admin": "admin",
    "개발팀": "developers",
    "test": "test",
    "guest": "guest",
}

_POSTS = (
    (
        "운영자",
        timedelta(minutes=12),
        "게시판이 열렸습니다 🎉",
        "설정한 것은 데이터베이스 주소 한 줄뿐인데 바로 돌아가네요.\n"
        "누구나 글을 쓸 수 있으니 가볍게 인사부터 남겨 주세요. 모두 반가워요!",
    ),
    (
        "admin",
        timedelta(hours=1, minutes=5),
        "Look at the bottom of the page",
        "It names the server that has answered. Reading this list went to a replica; when you"
        " write a post, the primary takes it.\n\n"
        "On a laptop both are the same SQLite file, so there is nothing to install before you can"
        " see the difference.",
    ),
    (
        "개발팀",
        timedelta(hours=3, minutes=40),
        "SQLite는 어디까지 쓸 수 있을까요?",
        "작은 서비스라면 파일 하나로도 충분했습니다. 읽기가 많아지는 날이 오면 주소만 MariaDB로"
        " 바꿔 볼 생각입니다. 코드는 그대로 두고요.",
    ),
    (
        "test",
        timedelta(hours=9),
        "All of a post, or nothing",
        "A new author and their first post are stored in one transaction. If the post cannot be"
        " saved there is no author without posts left behind, and nobody has to clean up.",
    ),
    (
        "guest",
        timedelta(days=1, hours=2),
        "이름은 빌려 쓸 수 없어요",
        "다른 사람의 이름을 적고 내 이메일을 넣어 봤더니 정중하게 거절당했습니다. 마음에 드네요 :)",
    ),
    (
        "admin",
        timedelta(days=2, hours=6),
        "What does <b> do here?",
        "Nothing at all: what you type is shown as you have typed it. <em>Try it</em> & see.",
    ),
    (
        "운영자",
        timedelta(days=4),
        "점심 같이 드실 분?",
        "금요일 열두 시, 회사 앞 국숫집에서 만나요. 비가 오면 칼국수, 맑으면 냉면입니다.",
    ),
)
