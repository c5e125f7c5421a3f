"""Who writes, and what: the tables of the board.

Owns: the database object, the models, how long a value may be, and how a time is stored.

Must not: know Flask's request, or what a page looks like. Nothing is loaded behind one's back:
a query says which relationships it needs, and touching another one raises.
"""

from __future__ import annotations

import typing as t
from datetime import datetime
from datetime import timezone

import sqlalchemy as sa
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.orm import Mapped
from sqlalchemy.orm import joinedload
from sqlalchemy.orm import mapped_column
from sqlalchemy.orm import relationship

from flask_commondb import CommonDB

#: In characters. MySQL's TEXT holds 65,535 bytes, of which a character needs up to four.
USERNAME_LENGTH = 80
EMAIL_LENGTH = 120
TITLE_LENGTH = 100
CONTENT_LENGTH = 10_000

#: How many posts a page shows.
PAGE_LENGTH = 50


class UTCDateTime(sa.types.TypeDecorator[datetime]):
    """A moment: aware in Python, and in UTC without a zone in the database.

    Neither SQLite nor MariaDB stores a zone. MariaDB would round to seconds unless told otherwise.
    """

    impl = sa.DateTime().with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise TypeError(f"{value!r} has no time zone: it could be any of 24 moments.")
        return value.astimezone(timezone.utc).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=timezone.utc)


class Base(DeclarativeBase):
    """What every model of the board has in common."""

    # Hangul in a latin1 database would be question marks, and a collation that ignores case and
    # accents would let Kim post as kim on MariaDB, though not on SQLite.
    __table_args__ = (
        {
            f"{dialect}_{option}": value
            for dialect in ("mysql", "mariadb")
            for option, value in (("charset", "utf8mb4"), ("collate", "utf8mb4_bin"))
        },
    )


db = CommonDB(model_class=Base)


class User(Base):
    """Someone who has posted. The name is public; the e-mail address is what proves it."""

    __tablename__ = "user"

    id: Mapped[int] = mapped_column(primary_key=True)
    username: Mapped[str] = mapped_column(sa.String(USERNAME_LENGTH), unique=True)
    email: Mapped[str] = mapped_column(sa.String(EMAIL_LENGTH), unique=True)

    posts: Mapped[list[Post]] = relationship(back_populates="author", lazy="raise")

    def __repr__(self) -> str:
        return f"<User {self.username}>"


class Post(Base):
    """What someone has posted."""

    __tablename__ = "post"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(sa.String(TITLE_LENGTH))
    content: Mapped[str] = mapped_column(sa.Text)
    date_posted: Mapped[datetime] = mapped_column(
        UTCDateTime, default=lambda: datetime.now(timezone.utc), index=True
    )
    user_id: Mapped[int] = mapped_column(sa.ForeignKey(User.id), index=True)

    author: Mapped[User] = relationship(back_populates="posts", lazy="raise")

    def __repr__(self) -> str:
        return f"<Post {self.title}>"


def newest_posts() -> sa.Select[t.Any]:
    """The newest posts with their authors, in one statement; always in the same order."""
    return (
        sa.select(Post)
        .options(joinedload(Post.author, innerjoin=True))
        .order_by(Post.date_posted.desc(), Post.id.desc())
        .limit(PAGE_LENGTH)
    )
