"""What a statement says of itself: the binds that own its tables, and whether it is a read.

Owns: the walk over a statement's elements. A statement is a read only if every element in it is
on a list of SQLAlchemy's own constructs that cannot write; whatever is not on the list is not
provably a read. SQL text is never looked into.

Must not: know engines, sessions or requests.
"""

from __future__ import annotations

import functools
import typing as t

import sqlalchemy as sa
import sqlalchemy.orm as sa_orm
from sqlalchemy.sql import visitors
from sqlalchemy.sql.selectable import ForUpdateArg

from .errors import CrossBindError


class Facts(t.NamedTuple):
    """What is known of a statement.

    :param owners: for each bind key that owns something in it, the name of one of its tables.
    :param not_read: why it is not provably a read, ``None`` if it is: ``"write"``, ``"locked"``
        or ``"unknown_sql"``.
    :param is_text: whether it is nothing but SQL text.
    """

    owners: t.Mapping[str | None, str]
    not_read: str | None
    is_text: bool


def single_owner(owners: t.Mapping[str | None, str]) -> tuple[str | None] | None:
    """The only bind key among the owners.

    :raises CrossBindError: if there are several.
    """
    if len(owners) > 1:
        raise CrossBindError(owners)
    for key in owners:
        return (key,)
    return None


class Reader:
    """Finds the :class:`Facts` of statements, and remembers them by SQLAlchemy's cache key.

    :param functions: lower-case names of SQL functions that only read, beside the known ones.
    """

    #: Statements remembered; beyond that the memory is emptied and starts again.
    SIZE = 1000

    def __init__(self, functions: t.Collection[str] = ()) -> None:
        self._functions = READ_FUNCTIONS | frozenset(functions)
        self._memory: dict[t.Any, Facts] = {}

    def facts(self, statement: t.Any) -> Facts:
        """The facts of a statement. The work is done once for each shape of statement.

        :param statement: anything that a session executes.
        """
        if not isinstance(statement, sa.ClauseElement):  # a Sequence, say
            owners: dict[str | None, str] = {}
            _note_owner(statement, owners)
            return Facts(owners, "unknown_sql", False)
        # SQLAlchemy keeps the key on the statement and needs it itself when it executes it.
        cache_key = statement._generate_cache_key()
        if cache_key is None:
            return self._walk(statement)
        facts = self._memory.get(cache_key.key)
        if facts is None:
            facts = self._walk(statement)
            if len(self._memory) >= self.SIZE:
                self._memory.clear()
            self._memory[cache_key.key] = facts
        return facts

    def _walk(self, statement: sa.ClauseElement) -> Facts:
        owners: dict[str | None, str] = {}
        not_read: str | None = None
        for element in _elements(statement):
            _note_owner(element, owners)
            if not_read != "write":
                not_read = self._not_read(element) or not_read
        # DDL does not show its table as an element; select(…).from_statement() is what it wraps.
        inner = getattr(statement, "element", None)
        _note_owner(inner, owners)
        for element in _added_elements(statement):
            _note_owner(element, owners)
        names = {statement.__visit_name__, getattr(inner, "__visit_name__", None)}
        return Facts(owners, not_read, not names.isdisjoint(_TEXT_STATEMENTS))

    def _not_read(self, element: t.Any) -> str | None:
        if isinstance(element, sa.UpdateBase):
            return "write"
        if isinstance(element, ForUpdateArg):
            return "locked"
        if element.__visit_name__ not in READ_ELEMENTS or not _is_sqlalchemys(
            t.cast(t.Hashable, type(element))
        ):
            return "unknown_sql"
        if isinstance(element, sa.Function):
            return None if self._reads(element) else "unknown_sql"
        if getattr(element, "is_literal", False) and not _is_harmless(element.name):
            return "unknown_sql"
        if any(getattr(element, attribute, None) for attribute in _TEXT_ATTRIBUTES):
            return "unknown_sql"
        operator = getattr(element, "operator", None)
        if isinstance(operator, sa.sql.operators.custom_op) and not _is_operator(operator.opstring):
            return "unknown_sql"
        return None

    def _reads(self, function: sa.Function[t.Any]) -> bool:
        return ".".join([*function.packagenames, function.name]).lower() in self._functions


def mapper_owners(mapper: t.Any) -> dict[str | None, str]:
    """The bind keys that own a mapper's table: one, unless it is mapped to a join of several.

    :param mapper: a mapper, or a mapped class.
    :raises sqlalchemy.orm.exc.UnmappedClassError: for another class.
    """
    try:
        local_table = sa.inspect(mapper).local_table
    except sa.exc.NoInspectionAvailable as error:
        if isinstance(mapper, type):
            raise sa_orm.exc.UnmappedClassError(mapper) from error
        raise
    owners: dict[str | None, str] = {}
    if isinstance(local_table, sa.Table):
        info = local_table.metadata.info
        return {info["bind_key"]: local_table.fullname} if "bind_key" in info else owners
    for element in _elements(local_table):
        _note_owner(element, owners)
    return owners


def _elements(statement: t.Any) -> t.Iterator[t.Any]:
    """All elements of a statement's tree, and those in rows of values, which are not in it."""
    elements: t.Iterator[t.Any] = visitors.iterate(statement)
    for element in elements:
        if isinstance(element, sa_orm.QueryableAttribute):  # a stand-in for its expression
            yield from _elements(element.__clause_element__())
            continue
        yield element
        for attribute in ("_data", "_multi_values"):
            yield from _elements_in(getattr(element, attribute, ()))
        upsert = getattr(element, "_post_values_clause", None)
        for attribute in ("update", "update_values_to_set", "update_whereclause"):
            yield from _elements_in(getattr(upsert, attribute, ()))


def _added_elements(statement: t.Any) -> t.Iterator[t.Any]:
    """What the ORM adds to a SELECT: joined eager loads, column properties, loader criteria."""
    if isinstance(statement, sa.Select) and statement._propagate_attrs.get("plugin_subject"):
        try:
            compiled: t.Any = statement.compile()
        except Exception:  # it is for another dialect, or will say so itself when it is executed
            return
        yield from _elements(compiled.compile_state.statement)


def _elements_in(values: t.Any) -> t.Iterator[t.Any]:
    if isinstance(values, t.Mapping):
        values = values.values()
    if isinstance(values, sa.ClauseElement):
        yield from _elements(values)
    elif isinstance(values, t.Iterable) and not isinstance(values, (str, bytes)):
        for value in values:
            yield from _elements_in(value)


def _note_owner(element: t.Any, owners: dict[str | None, str]) -> None:
    """Note the bind of a table, or of a column's table, or of a sequence."""
    item = getattr(element, "sequence", element)
    if not isinstance(item, (sa.Table, sa.Sequence)):
        item = getattr(element, "table", None)
    metadata = getattr(item, "metadata", None)
    if metadata is not None and "bind_key" in metadata.info:
        owners.setdefault(metadata.info["bind_key"], getattr(item, "fullname", item.name))


def _is_harmless(text: str) -> bool:
    """Whether the text of a literal column is what SQLAlchemy writes for ``count()``, ``any()``."""
    return text == "*" or text.isdigit()


def _is_operator(text: str) -> bool:
    """Whether the text of a custom operator is one, and assigns nothing."""
    if text.upper() in _OPERATOR_WORDS:
        return True
    return ":=" not in text and not set(text) - set("!#%&*+-./:<=>?@^|~")


@functools.cache
def _is_sqlalchemys(element_class: t.Hashable) -> bool:
    """Whether a construct's SQL is SQLAlchemy's own: what others compile is not known to us."""
    bases = t.cast(type, element_class).__mro__
    return sa.Table in bases or all(
        base.__module__.partition(".")[0] in ("sqlalchemy", "builtins", "typing") for base in bases
    )


#: Custom operators that are words.
_OPERATOR_WORDS = ("DIV", "GLOB", "ILIKE", "LIKE", "MATCH", "MOD", "REGEXP", "RLIKE", "XOR")

#: Where a Select carries SQL text that is not an element of its tree.
_TEXT_ATTRIBUTES = ("_prefixes", "_suffixes", "_hints", "_statement_hints")

#: The visit names of statements that are SQL text as a whole (``tstring`` since SQLAlchemy 2.1).
_TEXT_STATEMENTS = ("textclause", "textual_select", "tstring")

#: The constructs that cannot write, by SQLAlchemy's visit name.
READ_ELEMENTS = frozenset(
    """
    aggregate_order_by aggregateorderby alias array binary bindparam case cast clauselist collation
    column compound_select cte element_list expression_clauselist extract false frame_clause
    funcfilter function grouping join label label_reference lambda_element lateral mysql_match null
    order_by_list orm_from_statement over postgresql_distinct_on scalar_function_column
    scalar_values select select_statement_grouping slice subquery table table_valued_alias
    table_valued_column tablesample textual_label_reference true try_cast tuple type_coerce
    typeclause unary values withingroup
    """.split()
)

#: SQL functions that only read. All others (GET_LOCK, LAST_INSERT_ID, nextval, one's own) are
#: not provably reads; ``COMMONDB_READ_FUNCTIONS`` adds to the list.
READ_FUNCTIONS = frozenset(
    """
    abs acos aggregate_strings any any_value array_agg array_length array_to_string ascii asin
    atan atan2 avg bernoulli bit_and bit_count bit_length bit_or bit_xor bool_and bool_or
    cardinality cbrt ceil ceiling char char_length character_length charset coalesce concat
    concat_ws conv cos cot count crc32 cube cume_dist curdate current_date current_time
    current_timestamp current_user curtime database date date_add date_format date_part date_sub
    date_trunc datediff datetime day dayname dayofmonth dayofweek dayofyear degrees dense_rank
    elt every exists exp extract field find_in_set first_value floor format from_days
    from_unixtime generate_series glob greatest group_concat grouping grouping_sets hex hour if
    ifnull iif inet_aton inet_ntoa initcap instr isnull json_agg json_array json_array_elements
    json_array_length json_arrayagg json_build_array json_build_object json_contains
    json_contains_path json_depth json_each json_exists json_extract json_extract_path
    json_extract_path_text json_group_array json_group_object json_keys json_length
    json_merge_patch json_object json_object_agg json_objectagg json_overlaps json_quote
    json_search json_tree json_type json_unquote json_valid json_value jsonb_agg
    jsonb_array_elements jsonb_array_length jsonb_build_array jsonb_build_object
    jsonb_extract_path jsonb_extract_path_text jsonb_object_agg jsonb_typeof julianday lag
    last_day last_value lcase lead least left length ln localtime localtimestamp locate log
    log10 log2 lower lpad ltrim make_date make_time makedate maketime max md5 microsecond mid
    min minute mod mode month monthname now nth_value ntile nullif oct octet_length ord
    percent_rank percentile_cont percentile_disc period_add period_diff pi plainto_tsquery
    position pow power printf quarter quote radians rand random rank regexp_instr regexp_matches
    regexp_replace regexp_substr regr_slope repeat replace reverse right rollup round row_number
    row_to_json rpad rtrim sec_to_time second session_user sha1 sha2 sha256 sign similarity sin
    soundex space split_part sqrt std stddev stddev_pop stddev_samp str_to_date strcmp strftime
    string_agg string_to_array strpos substr substring substring_index subtime sum sysdate
    system tan time time_format time_to_sec timediff timestamp timestampadd timestampdiff
    to_char to_date to_days to_json to_jsonb to_number to_seconds to_timestamp to_tsquery
    to_tsvector total trim trunc truncate ts_headline ts_rank ts_rank_cd typeof ucase unhex
    unicode unix_timestamp unixepoch unnest upper user utc_date utc_time utc_timestamp uuid
    var_pop var_samp variance version websearch_to_tsquery week weekday weekofyear width_bucket
    year yearweek
    """.split()
)
