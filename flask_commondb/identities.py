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
from sqlalchemy.orm.context import QueryContext


class ForeignBind(t.NamedTuple):
    """The identity token of an object that was read from a bind that does not own its table."""

    bind_key: str | None


class KeepsApart(sa_orm.Session):
    """A session in which one row that is read through two binds is two objects."""

    #: Whether it may have foreign objects.
    has_foreign_objects = False

    def foreign_bind(self, wanted: t.Any, bind: sa.Engine | sa.Connection) -> ForeignBind | None:
        """The token of what is read from a bind that the caller has given.

        :param wanted: a statement or a model.
        :returns: ``None`` if the bind is its own.
        """
        raise NotImplementedError

    def primary(self, bind_key: str | None) -> sa.Engine:
        """The engine on which a bind is written."""
        raise NotImplementedError

    def keep_apart(self) -> None:
        """Have what is loaded for a foreign object come from the object's own bind.

        Refreshes, lazy loads and eager loads name no bind. Repeated calls change nothing.
        """
        if not self.has_foreign_objects:
            self.has_foreign_objects = True
            sa.event.listen(self, "do_orm_execute", _follow)

    def get(self, entity: t.Any, ident: t.Any, **kwargs: t.Any) -> t.Any:
        """As in SQLAlchemy."""
        return super().get(entity, ident, **self._told_apart(entity, kwargs))

    def get_one(self, entity: t.Any, ident: t.Any, **kwargs: t.Any) -> t.Any:
        """As in SQLAlchemy."""
        return super().get_one(entity, ident, **self._told_apart(entity, kwargs))

    def flush(self, objects: t.Sequence[t.Any] | None = None) -> None:
        """As in SQLAlchemy. What was read from a foreign bind is written there."""
        if not self.has_foreign_objects:
            super().flush(objects)
            return
        self._adopt_new_objects()
        # Not always: SQLAlchemy refuses bulk operations while it is set.
        self.connection_callable = self._connection_for_instance
        try:
            super().flush(objects)
        finally:
            self.connection_callable = None

    def _execute_internal(self, statement: t.Any, params: t.Any = None, **kwargs: t.Any) -> t.Any:
        if "bind" not in kwargs["bind_arguments"]:
            return super()._execute_internal(statement, params, **kwargs)
        options = kwargs.get("execution_options") or {}
        token = self._token(statement, kwargs["bind_arguments"])
        given = getattr(options.get("_sa_orm_load_options"), "_identity_token", None)
        if token is not None and given is None:
            options = {"identity_token": token, **options}
            if statement.is_dml:  # what it returns is loaded by options of its own
                loading = QueryContext.default_load_options + {"_identity_token": token}
                options["_sa_orm_load_options"] = loading
            kwargs["execution_options"] = options
        return super()._execute_internal(statement, params, **kwargs)

    def _identity_lookup(  # type: ignore[override]
        self,
        mapper: t.Any,
        primary_key_identity: t.Any,
        identity_token: t.Any = None,
        **kwargs: t.Any,
    ) -> t.Any:
        parent = kwargs.get("lazy_loaded_from")
        if parent is not None and isinstance(parent.identity_token, ForeignBind):
            identity_token = parent.identity_token
        return super()._identity_lookup(mapper, primary_key_identity, identity_token, **kwargs)

    def _told_apart(self, entity: t.Any, kwargs: dict[str, t.Any]) -> dict[str, t.Any]:
        """The arguments of :meth:`get`."""
        if kwargs.get("bind_arguments") and kwargs.get("identity_token") is None:
            kwargs["identity_token"] = self._token(entity, kwargs["bind_arguments"])
        return kwargs

    def _token(self, wanted: t.Any, bind_arguments: t.Mapping[str, t.Any]) -> ForeignBind | None:
        bind = bind_arguments.get("bind")
        token = None if bind is None else self.foreign_bind(wanted, bind)
        if token is not None:
            self.keep_apart()
        return token

    def _adopt_new_objects(self) -> None:
        """Have new objects that belong to a foreign one be written where that one is."""
        for instance in list(self):
            # The types say what this is in SQLAlchemy 2.1 only.
            instance_state: t.Any = sa.inspect(instance)
            token = instance_state.identity_token
            if isinstance(token, ForeignBind):
                mapper: t.Any = instance_state.mapper
                for *_, state, _ in mapper.cascade_iterator("save-update", instance_state):
                    if state.key is None:
                        state.identity_token = token
        for instance in self.new:
            for relationship in sa.inspect(type(instance)).relationships:
                parent = sa.inspect(vars(instance).get(relationship.key), raiseerr=False)
                token = getattr(parent, "identity_token", None)
                if isinstance(token, ForeignBind):
                    sa.inspect(instance).identity_token = token

    def _connection_for_instance(
        self, mapper: t.Any = None, instance: t.Any = None, **kwargs: t.Any
    ) -> sa.Connection:
        token = sa.inspect(instance).identity_token
        if isinstance(token, ForeignBind):
            return self._connection_for_bind(self.primary(token.bind_key))
        return self._connection_for_bind(self.get_bind(mapper=mapper))


def _follow(state: sa_orm.ORMExecuteState) -> None:
    if "bind" in state.bind_arguments:
        return
    token = _token_of(state)
    if (
        token is None
        and (state.is_update or state.is_delete)
        and t.cast(t.Any, state.update_delete_options)._synchronize_session is not False
    ):
        # By their keys: else it takes the objects of other binds for those of this one, too.
        state.update_execution_options(synchronize_session="fetch")
    if isinstance(token, ForeignBind):
        state.update_execution_options(identity_token=token)
        state.bind_arguments["bind"] = t.cast(KeepsApart, state.session).primary(token.bind_key)


def _token_of(state: sa_orm.ORMExecuteState) -> t.Any:
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


@sa.event.listens_for(KeepsApart, "detached_to_persistent")
def _note_foreign_object(session: KeepsApart, instance: t.Any) -> None:
    if isinstance(sa.inspect(instance).identity_token, ForeignBind):
        session.keep_apart()
