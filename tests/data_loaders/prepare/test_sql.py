"""A recipe's SQL is one expression over columns: whatever else it tries is refused before an engine sees it."""

import pytest
import sqlglot

from data_loaders.prepare import sql

GOOD = {
    "rating > 0": {"rating"},
    '"timestamp" * 10000 + step': {"timestamp", "step"},
    "CASE WHEN a <> '' THEN a ELSE b END": {"a", "b"},
    "a = 1 -- why\n": {"a"},
    "/* why */ TRY_CAST(a AS BIGINT)": {"a"},
    "COUNT(*) OVER (PARTITION BY user_id)": {"user_id"},
    "lag(a) OVER (PARTITION BY b ORDER BY c)": {"a", "b", "c"},
    "list_filter(l, x -> x > a)": {"l", "a"},
    "[x * 2 FOR x IN l IF x > 1]": {"l"},
    "substring(a FROM 1 FOR 2) || trim(b)": {"a", "b"},
    "extract(year FROM d) = 2024 AND d > DATE '2020-01-01' + INTERVAL '1' DAY": {"d"},
    "list_contains(l, a) OR l[1] IN (1, 2) OR s.field IS NULL": {"l", "a", "s"},
    "'1); COPY x TO ''y'''": set(),
    "uuid = today OR now > random": {"uuid", "today", "now", "random"},
}
BAD = [
    "1=1); COPY (SELECT 42 AS x) TO '/tmp/x.csv'; SELECT (1=1",
    *(
        "a; b",
        "a; COPY t TO 'x'",
        "a) FROM (t",
        "a) UNION (SELECT 1",
        "a) LIMIT (1",
        "1) + (2",
        "a, b",
        "a), (b",
        "a AS b",
    ),
    *("(SELECT content FROM read_text('/etc/passwd'))", "a IN (SELECT 1)", "EXISTS (SELECT 1)", "a = ANY(l)"),
    *("(FROM 'x.csv')", "(TABLE x)", "(VALUES (1))", "(DESCRIBE x)", "(PIVOT x ON y)", "(WITH t AS (SELECT 1) FROM t)"),
    *(
        "read_text('x')",
        "read_csv('x')",
        "glob('*')",
        "query('SELECT 1')",
        "getenv('HOME')",
        "current_setting('threads')",
    ),
    *(
        "getvariable('x')",
        "nextval('s')",
        "pg_sleep(1)",
        "error('x')",
        "write_log('x')",
        "json_execute_serialized_sql('x')",
    ),
    *("reflect('java.lang.Runtime', 'x')", "java_method('a', 'b')", "input_file_name()", "db.lower(a)"),
    *("unnest(l)", "generate_series(1, 2)", "sum(a)", "*", "COLUMNS(*)", "$1", "?", "#1", "@@x"),
    *("random() < 0.5", "uuid()", "now()", "current_date", "current_timestamp"),
    *("COPY t TO 'x'", "ATTACH 'x'", "INSTALL httpfs", "LOAD httpfs", "PRAGMA version", "SET threads = 1", "CALL f()"),
    *("a /*", "'a", "", " ", "-- a", "(" * 5000 + "1" + ")" * 5000, "1" + " + 1" * 10_000),
]


@pytest.mark.parametrize("text", GOOD)
def test_an_expression_tells_its_columns_and_is_one_in_every_spelling(text):
    found = sql.parse(text, "here")
    assert found.columns == GOOD[text]
    for engine in ("duckdb", "spark"):
        (query,) = sqlglot.parse(f"SELECT {found.spelled(engine)} AS x FROM rows", dialect="duckdb")
        assert len(query.selects) == 1 and len(list(query.find_all(sqlglot.expressions.Table))) == 1


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_anything_else_is_refused_with_its_place(text):
    with pytest.raises(ValueError, match=r"^here: ") as raised:
        sql.parse(text, "here")
    assert "\n" not in str(raised.value).replace(text, "") or "\n" in text


def test_a_column_that_is_not_there_is_named_with_its_neighbours():
    with pytest.raises(ValueError, match=r"here: ratng \+ ITEM: 'ratng' is not known; did you mean 'rating'"):
        sql.parse("ratng + ITEM", "here").check_columns(["rating", "item", "__row"])
    with pytest.raises(ValueError, match="'current_user' is not known"):
        sql.parse("current_user", "here").check_columns(["rating"])
