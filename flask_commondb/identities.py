"""One row that is read through two binds is two objects, and each is written where it came from.

Owns: what tells such objects apart in a session's identity map. It is SQLAlchemy's identity token,
as its horizontal sharding uses it.

Must not: decide where anything else goes. An object that was read from the bind that owns its table
has no token, and a session that has only such objects runs nothing of this.
"""

from __future__ import annotations

import typing as t

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm


class ForeignBind(t.NamedTuple):
    """The identity token of an object that was read from a bind that does not own its table."""

    bind_key: str | None


def keep_apart(session: sa_orm.Session, engines: t.Mapping[str | None, sa.Engine]) -> None:
    """Have what a session loads for a foreign object come from the object's own bind.

    Refreshes, lazy loads and eager loads name no bind. Repeated calls change nothing.

    :param engines: the engines of all binds.
    """
    if _IS_KEPT_APART in session.info:
        return
    session.info[_IS_KEPT_APART] = True

    @sa.event.listens_for(session, "do_orm_execute")
    def follow(state: sa_orm.ORMExecuteState) -> None:
        if "bind" in state.bind_arguments:
            return
        token = _token(state)
        if isinstance(token, ForeignBind):
            state.update_execution_options(identity_token=token)
            state.bind_arguments["bind"] = engines[token.bind_key]


def is_kept_apart(session: sa_orm.Session) -> bool:
    """Whether the session may have foreign objects."""
    return _IS_KEPT_APART in session.info


#: In ``session.info``.
_IS_KEPT_APART = "flask_commondb.foreign"


def _token(state: sa_orm.ORMExecuteState) -> t.Any:
    """The token of the object, or of the statement, for which something is loaded."""
    if state.is_select:
        if state.lazy_loaded_from is not None:
            return state.lazy_loaded_from.identity_token
        options: t.Any = state.load_options
        # Of an eager load: the statement that it belongs to.
        return getattr(options._sa_top_level_orm_context, "identity_token", options._identity_token)
    if state.is_update or state.is_delete:
        return t.cast(t.Any, state.update_delete_options)._identity_token
    return None
