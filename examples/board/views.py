"""The pages of the board.

Owns: the routes, how a post gets into the database, and the page for an error.

Must not: decide which server answers. A GET reads from a replica and a POST from the primary
without a word about it here.
"""

from __future__ import annotations

import unicodedata

import sqlalchemy as sa
from flask import Blueprint
from flask import Flask
from flask import redirect
from flask import render_template
from flask import request
from flask import url_for
from flask.typing import ResponseReturnValue
from sqlalchemy.orm import Session
from werkzeug.exceptions import HTTPException

from .forms import PostForm
from .models import Post
from .models import User
from .models import db
from .models import newest_posts

bp = Blueprint("board", __name__)


def init_app(app: Flask) -> None:
    """Give an app the pages, those for its errors included."""
    app.register_blueprint(bp)
    app.register_error_handler(HTTPException, show_error)


@bp.get("/")
def home() -> str:
    """The newest posts of everybody."""
    return render_template("home.html", posts=db.session.scalars(newest_posts()).all())


@bp.get("/user/<username>")
def user_profile(username: str) -> str:
    """One author, and what they have posted last."""
    # Spelt as the form spells it, however the link was typed.
    name = unicodedata.normalize("NFC", username)
    user = db.one_or_404(
        sa.select(User).where(User.username == name),
        description=f"Nobody called “{name}” has posted here.",
    )
    total = db.session.scalar(sa.select(sa.func.count(Post.id)).where(Post.user_id == user.id))
    posts = db.session.scalars(newest_posts().where(Post.user_id == user.id)).all()
    return render_template("profile.html", user=user, posts=posts, total=total)


@bp.route("/post/new", methods=["GET", "POST"])
def new_post() -> ResponseReturnValue:
    """The form for a post; what it sends becomes one, or comes back with what is wrong."""
    if request.method != "POST":
        return _form(PostForm(), {}), 200
    form = PostForm.read(request.form)
    mistakes = form.mistakes()
    if mistakes:
        return _form(form, mistakes), 400
    try:
        publish(form)
    except NotYours as error:
        return _form(form, {error.field: error.reason}), 409
    return redirect(url_for("board.home"), 303)


class NotYours(Exception):
    """A name or an e-mail address is someone else's.

    :param field: the form's field.
    :param reason: a sentence for the person who filled it in; it must not tell whose it is.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(reason)
        self.field = field
        self.reason = reason


def publish(form: PostForm) -> None:
    """Store a post, and its author when they are new: both or neither.

    :raises NotYours: if name and e-mail address do not belong together.
    """
    try:
        _store(form)
    except sa.exc.IntegrityError:
        # Someone has taken the name or the address since we looked. Look again: it is them
        # twice, and then the post is welcome, or it is somebody else.
        _store(form)


def show_error(error: HTTPException) -> ResponseReturnValue:
    """An error as a page of the board, with the status and the headers of the original."""
    response = error.get_response()
    response.data = render_template("error.html", error=error)
    response.content_type = "text/html; charset=utf-8"
    return response


def _form(form: PostForm, mistakes: dict[str, str]) -> str:
    return render_template("create_post.html", form=form, mistakes=mistakes)


def _store(form: PostForm) -> None:
    with db.transaction() as session:
        author = _find_author(session, form)
        if author is None:
            author = User(username=form.username, email=form.email)
        session.add(Post(title=form.title, content=form.content, author=author))


def _find_author(session: Session, form: PostForm) -> User | None:
    """The author that the name and the address belong to, ``None`` if both are new."""
    known = session.scalars(
        sa.select(User).where(sa.or_(User.username == form.username, User.email == form.email))
    ).all()
    for user in known:
        if user.username == form.username and user.email == form.email:
            return user
    for user in known:
        if user.username == form.username:
            raise NotYours("username", "This name belongs to another e-mail address.")
    if known:
        raise NotYours("email", "This e-mail address belongs to another name.")
    return None
