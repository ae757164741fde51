"""The SQL of a recipe: one expression over the columns of a table, and nothing else.

A recipe, and the ``preparation.yaml`` of a data set or of a run folder, may come from somebody else. So each of its texts
is parsed before it goes near an engine, by the two parsers that will read it: DuckDB's own, and sqlglot's, from whose tree
the text for Spark is written anew. Both must see exactly one expression, made of columns, constants, operators and
functions of the lists below: no statement, no subquery, no table, no function that reads files, settings or the
clock.
"""

import difflib
import functools
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import duckdb
import sqlglot
from sqlglot import expressions

from data_loaders.errors import UserError
from data_loaders.schema import one_of


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# By what they take: text, numbers, times, lists and structs, JSON, anything.
_FUNCTIONS = _words(
    """
    ascii bar bit_length char_length character_length chr concat concat_ws contains damerau_levenshtein editdist3 ends_with
    format from_base64 from_hex hamming hex instr jaccard jaro_similarity jaro_winkler_similarity lcase left len length
    levenshtein like_escape not_like_escape ilike_escape not_ilike_escape lower lpad ltrim md5 md5_number md5_number_lower
    md5_number_upper mismatches nfc_normalize octet_length ord position prefix printf regexp_escape regexp_extract
    regexp_extract_all regexp_full_match regexp_matches regexp_replace regexp_split_to_array repeat replace reverse right
    rpad rtrim sha1 sha256 split split_part starts_with str_split str_split_regex string_split string_split_regex
    string_to_array strip_accents strlen strpos substr substring suffix to_base64 translate trim ucase unhex unicode upper
    url_decode url_encode ~~ !~~ ~~* !~~* ~~~ ^@ || encode decode to_hex bin parse_filename parse_dirname parse_dirpath
    parse_path array_to_string

    + - * / // % ** ^ & | ~ << >> @ !__postfix abs acos acosh add asin asinh atan atan2 atanh bit_count cbrt ceil ceiling cos
    cosh cot degrees divide even exp factorial fdiv floor fmod gamma gcd greatest greatest_common_divisor isfinite isinf
    isnan lcm least least_common_multiple lgamma ln log log10 log2 mod multiply nextafter pi pow power radians round
    round_even roundbankers sign signbit sin sinh sqrt subtract tan tanh trunc xor equi_width_bins

    age century date_add date_diff date_part date_sub date_trunc datediff datepart datesub datetrunc day dayname dayofmonth
    dayofweek dayofyear days_in_month decade epoch epoch_ms epoch_ns epoch_us era hour isodow isoyear julian last_day
    make_date make_time make_timestamp make_timestamp_ms make_timestamp_ns make_timestamptz microsecond millennium
    millisecond minute month monthname nanosecond quarter second strftime strptime time_bucket timezone timezone_hour
    timezone_minute to_centuries to_days to_decades to_hours to_microseconds to_millennia to_milliseconds to_minutes
    to_months to_quarters to_seconds to_timestamp to_weeks to_years try_strptime week weekday weekofyear year yearweek

    && <@ @> <-> <=> aggregate apply array_aggr array_aggregate array_append array_apply array_cat array_concat
    array_contains array_distinct array_extract array_filter array_has array_has_all array_has_any array_indexof
    array_intersect array_length array_pop_back array_pop_front array_position array_prepend array_push_back
    array_push_front array_reduce array_resize array_reverse array_reverse_sort array_select array_slice array_sort
    array_transform array_unique array_value array_where array_zip cardinality element_at filter flatten list_aggr
    list_aggregate list_any_value list_append list_apply list_avg list_cat list_concat list_contains list_cosine_distance
    list_cosine_similarity list_count list_distance list_distinct list_dot_product list_element list_extract list_filter
    list_first list_grade_up list_has list_has_all list_has_any list_indexof list_inner_product list_intersect list_last
    list_max list_median list_min list_mode list_pack list_position list_prepend list_product list_reduce list_resize
    list_reverse list_reverse_sort list_select list_slice list_sort list_stddev_pop list_stddev_samp list_sum
    list_transform list_unique list_value list_var_pop list_var_samp list_where list_zip map map_concat map_contains
    map_entries map_extract map_extract_value map_from_entries map_keys map_values reduce row struct_concat struct_extract
    struct_extract_at struct_insert struct_keys struct_pack struct_values

    array_to_json from_json from_json_strict json json_array json_array_length json_contains json_exists json_extract
    json_extract_path json_extract_path_text json_extract_string json_keys json_object json_quote json_structure
    json_transform json_transform_strict json_type json_valid json_value to_json -> ->>

    constant_or_null hash nullif
    """
)
# What may stand before OVER (…).
_WINDOWS = _words(
    """
    any_value arg_max arg_min array_agg avg bool_and bool_or count count_if count_star cume_dist dense_rank fill first
    first_value kurtosis lag last last_value lead list max max_by mean median min min_by mode nth_value ntile percent_rank
    product quantile_cont quantile_disc rank rank_dense row_number skewness stddev stddev_pop stddev_samp string_agg sum
    var_pop var_samp variance
    """
)
_CHANGING = _words(
    """
    current_date current_localtime current_localtimestamp current_time current_timestamp gen_random_uuid get_current_time
    get_current_timestamp now random setseed today transaction_timestamp uuid uuidv4 uuidv7
    """
)
_CLASSES = _words("BETWEEN CASE CAST COLUMN_REF COMPARISON CONJUNCTION CONSTANT FUNCTION LAMBDA OPERATOR TYPE WINDOW")
_FORBIDDEN = (  # of sqlglot's tree
    *(expressions.Query, expressions.Table, expressions.From, expressions.Join, expressions.Lateral, expressions.UDTF),
    *(expressions.Command, expressions.DDL, expressions.DML, expressions.Star, expressions.Placeholder),
    *(expressions.Parameter, expressions.SessionParameter, expressions.Explode, expressions.Inline),
    *(expressions.Posexplode, expressions.ReadCSV, expressions.Hint),
)
_LONGEST = 20_000  # characters: beyond that a parser takes minutes, or all of the stack


@dataclass(frozen=True)
class Expression:
    """One expression that passed. ``columns``: the names it takes from its table, as written. ``where``: its place in the
    recipe, for messages."""

    text: str
    where: str
    columns: frozenset[str]
    _tree: expressions.Expression

    def spelled(self, engine: str, present: Collection[str] = ()) -> str:
        """For a query in DuckDB's dialect. Where another engine gets it translated it is written anew from the tree that
        was checked, its columns spelt like those ``present``: Spark distinguishes names by their case, DuckDB does not."""
        if engine == "duckdb":
            return f"(\n{self.text}\n)"
        own = {name.lower(): name for name in present if name.lower() in {column.lower() for column in self.columns}}
        tree = self._tree.copy()
        for column in tree.find_all(expressions.Column):
            first = column.parts[0]
            if first.name.lower() in own:
                first.set("this", own[first.name.lower()])
                first.set("quoted", True)
        return tree.sql(dialect="duckdb", comments=False)

    def check_columns(self, present: Collection[str]) -> None:
        """Raises ``UserError`` with the nearest names for a column that is not ``present``; case does not count in SQL."""
        known = {name.lower() for name in present}
        for name in sorted(self.columns):
            if name.lower() not in known:
                visible = [column for column in present if not column.startswith("__")]
                one_of(name, visible, f"{self.where}: {self.text}")


@functools.lru_cache(maxsize=4096)
def parse(sql: str, where: str) -> Expression:
    """Raises ``UserError`` for a text that is not a single expression, or uses more than columns and known functions."""
    if len(sql) > _LONGEST:
        raise UserError(f"{where}: an SQL expression of {len(sql):,} characters; at most {_LONGEST:,} are read")
    tree = _tree(sql, where)
    node = _duckdb_node(sql, where)
    found = list(_nodes(node))
    lambdas = {name for item in found if item["class"] == "LAMBDA" for name in _names(item["lhs"])}
    for item in found:
        _check_node(item, sql, where)
    for item in tree.walk():
        _check_tree(item, sql, where)
    columns = {item["column_names"][0] for item in found if item["class"] == "COLUMN_REF"} - lambdas
    return Expression(sql, where, frozenset(columns), tree)


def identifier(name: str) -> str:
    """A column's name in a query."""
    return '"' + name.replace('"', '""') + '"'


def of_step(step: Any) -> Iterator[tuple[str, Expression]]:
    """The expressions of a ``declaration.Step``, with the column that each makes (none: a condition). Raises as ``parse``."""
    where = f"{step.where}.{step.name}"
    if step.name == "where":
        yield "", parse(step.argument, where)
    elif step.name == "select":
        for name, text in step.argument.items():
            yield str(name), parse(str(text), f"{where}.{name}")


def _tree(sql: str, where: str) -> expressions.Expression:
    try:
        found = sqlglot.parse(f"(\n{sql}\n)", dialect="duckdb")
    except sqlglot.errors.SqlglotError as error:
        near = (getattr(error, "errors", None) or [{}])[0].get("highlight")
        raise _refused(sql, where, f"it cannot be read from {near!r} on" if near else "it cannot be read") from None
    except RecursionError:
        raise _refused(sql, where, "it is nested too deeply") from None
    if len(found) != 1 or not isinstance(found[0], expressions.Paren):
        raise _refused(sql, where, "there is more, or less, than one")
    return found[0]


@functools.cache
def _parser() -> duckdb.DuckDBPyConnection:
    """A database in memory that nothing is ever run in."""
    return duckdb.connect(config={"threads": 1, "enable_external_access": False, "lock_configuration": True})


def _duckdb_node(sql: str, where: str) -> dict[str, Any]:
    """The one expression as DuckDB reads it."""
    with _parser().cursor() as parser:
        (answer,) = parser.execute("SELECT json_serialize_sql(?)", [f"SELECT (\n{sql}\n)"]).fetchone()
    parsed = json.loads(answer)
    if parsed["error"]:
        near = re.search(r'at or near "(.*?)"', parsed["error_message"])
        place = f"it cannot be read near {near[1]!r}" if near else "it cannot be read"
        raise _refused(sql, where, f'{place} (a name that is a word of SQL stands in double quotes: "at")')
    statements = parsed["statements"]
    select = statements[0]["node"] if len(statements) == 1 else {}
    clauses = ("modifiers", "where_clause", "group_expressions", "group_sets", "having", "qualify", "sample")
    alone = (
        select.get("type") == "SELECT_NODE"
        and len(select["select_list"]) == 1
        and select["from_table"]["type"] == "EMPTY"
        and not select["cte_map"]["map"]
        and not any(select[clause] for clause in clauses)
    )
    if not alone or select["select_list"][0]["alias"]:
        raise _refused(sql, where, "there is more, or less, than one")
    return select["select_list"][0]


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """The expressions in DuckDB's tree."""
    waiting = [tree]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if "class" in item:
                yield item
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _names(tree: Any) -> set[str]:
    return {node["column_names"][0] for node in _nodes(tree) if node["class"] == "COLUMN_REF"}


def _check_node(node: dict[str, Any], sql: str, where: str) -> None:
    if node["class"] == "SUBQUERY":
        raise _refused(
            sql, where, "a subquery (or ANY, ALL) reads a table: use a join step, a view, or list_contains(list, value)"
        )
    if node["class"] not in _CLASSES:
        raise _refused(sql, where, f"{node['class'].lower().replace('_', ' ')} does not belong in it")
    if node["class"] == "WINDOW":
        _check_function(node, _WINDOWS, sql, where)
    elif node["class"] == "FUNCTION":
        _check_function(node, _FUNCTIONS, sql, where)
    elif node["class"] == "COLUMN_REF":
        name = node["column_names"][0].lower()
        if name in _CHANGING and name.startswith("current_"):  # the clock, without parentheses; others are columns
            raise _changing(sql, where)


def _check_function(node: dict[str, Any], known: frozenset[str], sql: str, where: str) -> None:
    name = node["function_name"].lower()
    if name in _CHANGING:
        raise _changing(sql, where)
    # DuckDB's grammar puts a schema before what has a syntax of its own, such as trim(both from x).
    own = node.get("schema", "") in ("", "main", "pg_catalog") and node.get("catalog", "") in ("", "system")
    if name in known and own:
        return
    if name in _WINDOWS:
        raise _refused(sql, where, f"{name}() is of many rows: write {name}(…) OVER (PARTITION BY …)")
    raise _unknown_function(name, sql, where)


def _check_tree(node: expressions.Expression, sql: str, where: str) -> None:
    if isinstance(node, (expressions.Rand, expressions.Uuid)):
        raise _changing(sql, where)
    if isinstance(node, _FORBIDDEN) and not _is_count_star(node):
        raise _refused(sql, where, f"{type(node).__name__.lower()} does not belong in it")
    if isinstance(node, expressions.Anonymous) and node.name.lower() not in _FUNCTIONS | _WINDOWS:
        raise _unknown_function(node.name.lower(), sql, where)


def _is_count_star(node: expressions.Expression) -> bool:
    return isinstance(node, expressions.Star) and isinstance(node.parent, expressions.Count)


def _refused(sql: str, where: str, reason: str) -> UserError:
    return UserError(
        f"{where}: {sql!r} is not an SQL expression: {reason}; write one condition or value made of columns, such as "
        "rating > 0 (docs/prepare.md, Steps)"
    )


def _unknown_function(name: str, sql: str, where: str) -> UserError:
    near = difflib.get_close_matches(name, [known for known in _FUNCTIONS | _WINDOWS if known.isidentifier()], n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return UserError(
        f"{where}: {sql!r}: the function {name}() is not one of those that expressions may use: {hint}those of text, "
        "numbers, times and lists, and none that reads files, settings or the clock (docs/prepare.md, Steps)"
    )


def _changing(sql: str, where: str) -> UserError:
    return UserError(
        f"{where}: {sql!r} gives other values each time the rows are read, and they are read more than once: make "
        "numbers from a column, such as md5(user_id)"
    )
