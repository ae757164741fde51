"""Text files as Spark reads them: line by line, so that each row shows whether it is as declared.

Spark's own readers of csv and JSON let pass what is not: bytes of another encoding become question marks, rows may have
a field too many, a second object in a line is dropped, quotes need not be closed. Here a line is text first. A row that
does not fit is *bad*, and counted while the rows are stored.
"""

from collections.abc import Callable
from typing import Any

from pyspark import cloudpickle
from pyspark.sql import Observation
from pyspark.sql import functions as F

from data_loaders.prepare import csv_rows, values
from data_loaders.prepare.declaration import Source
from data_loaders.prepare.text_files import TextFile

# Names by which Hadoop chooses a decompressor, and those that it can do without native libraries.
_CODECS = (".gz", ".bz2", ".deflate", ".lz4", ".snappy", ".zst", ".zstd", ".xz")
_WORKING = {".gz": "gzip", ".bz2": "bz2"}
_NO_NUMBER = '^"(NaN|-?Infinity)"$'  # as Spark hands out a literal NaN, and a number beyond float64
_HIGH, _LOW = r"\\u[dD][89abAB][0-9a-fA-F]{2}", r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_HALF_LETTER = f"{_HIGH}(?!{_LOW})|(?<!{_HIGH}){_LOW}"  # Spark makes question marks of them
_GLOB = frozenset("*?[]{}\\,")


def reads_itself(file: TextFile) -> bool:
    """Whether Spark sees the file's lines by the file's own name."""
    base = file.name.rpartition("/")[2]
    ending = next((ending for ending in _CODECS if base.lower().endswith(ending)), "")
    named = _WORKING.get(ending, "?") if ending else ""
    return file.codec == "utf-8" and not file.mark and named == file.compression and not _is_odd(file.name, base)


def _is_odd(name: str, base: str) -> bool:
    """Names that Spark takes for a pattern or for a mark."""
    return base.startswith(("_", ".")) or bool(_GLOB & set(name))


class Lines:
    """The rows of a source's text, and what was seen on the way."""

    def __init__(
        self,
        session: Any,
        source: Source,
        names: list[str],
        headers: list[str],
        convert: Callable[[Any, list[str]], Any],
    ) -> None:
        """``names``: of the columns in the files' order (csv). ``headers``: their first lines, none for files without.
        ``convert``: (a frame of texts, the names of the declared columns among them) -> the same with all columns as
        declared, null where absent, and ``values.BAD``."""
        self._session, self._source, self._names, self._headers = session, source, names, headers
        self._convert = convert
        self._seen: Any = None

    def frame(self, paths: list[str]) -> Any:
        """The good rows: the declared columns, ``__file``, ``__block`` and a growing ``__place``."""
        self._seen = Observation()
        text = self._session.read.text(paths).select(
            F.col("value").alias("__line"),
            F.col("_metadata.file_path").alias("__file"),
            F.col("_metadata.file_block_start").alias("__block"),
        )
        text = text.filter(F.col("__line") != "").withColumn("__header", self._is_header())
        text = text.withColumn("__order", F.monotonically_increasing_id())
        rows = self._csv(text) if self._source.format == "csv" else self._json(text)
        bad = F.col("__bad") & ~F.col("__header")
        sortable = [F.lpad(F.col(name).cast("string"), 20, "0") for name in ("__block", "__order")]
        zero = F.contains(F.col("__line"), F.lit("\0"))
        rows = rows.observe(
            self._seen,
            F.count_if(bad).alias("bad"),
            F.count_if(F.col("__header")).alias("headers"),
            F.count_if(~F.col("__bad") & ~F.col("__header")).alias("good"),
            F.min(F.when(zero, F.col("__file"))).alias("zero"),
            F.min(F.when(bad, F.concat_ws("\n", "__file", *sortable, "__line"))).alias("first"),
        )
        good = rows.filter(~F.col("__bad") & ~F.col("__header"))
        declared = map(identifier, self._source.columns)
        return good.select(*declared, "__file", "__block", F.monotonically_increasing_id().alias("__place"))

    def seen(self) -> dict[str, Any]:
        """Once the rows are stored. ``bad``, ``good`` and ``headers``: how many; ``zero``: a file with zero bytes;
        ``first``: the first bad one's file, its place (two numbers) and its line, a line feed between."""
        return self._seen.get

    def _is_header(self) -> Any:
        return (F.col("__block") == 0) & F.col("__line").isin(self._headers) if self._headers else F.lit(False)

    def _csv(self, text: Any) -> Any:
        source = self._source
        options = {
            "sep": source.separator,
            "quote": source.quote or "\0",
            "escape": source.escape or source.quote or "\0",
            "mode": "PERMISSIVE",
            "columnNameOfCorruptRecord": "__corrupt",
        }
        schema = ", ".join([*(f"c{number} string" for number in range(len(self._names))), "__corrupt string"])
        parsed = text.withColumn("__row", F.from_csv("__line", F.lit(schema), options))
        marks = ["", *source.null_values]
        raw = {}
        for number, name in enumerate(self._names):
            if name in source.columns:
                value = F.col(f"__row.c{number}")
                raw[name] = F.when(value.isin(marks), None).otherwise(value) if source.null_values else value
                if source.columns[name] != "string":
                    raw[name] = F.when(value.isin(marks), None).otherwise(value)
        broken = F.col("__row.__corrupt").isNotNull() | ~F.is_valid_utf8("__line") | ~self._quotes_fit()
        return self._typed(parsed, raw, broken)

    def _quotes_fit(self) -> Any:
        """Whether each quote that opens a field is closed right before a separator or the end. For most lines a split at the
        quotes decides; the others are parsed character by character."""
        quote, separator, escape = self._source.quote, self._source.separator, self._source.escape
        if not quote:
            return F.lit(True)
        sql = f"""
            aggregate(
                transform(split(__line, {_regex(quote)}), (part, i) -> i % 2 = 1 OR part = '' OR (
                    (i = 0 OR startswith(part, {_text(separator)}))
                    AND (i = size(split(__line, {_regex(quote)})) - 1 OR endswith(part, {_text(separator)})))),
                size(split(__line, {_regex(quote)})) % 2 = 1, (all, one) -> all AND one)
        """
        plain = F.expr(sql) if not escape else F.expr(sql) & ~F.contains(F.col("__line"), F.lit(escape))
        slow = _quote_check(self._source)
        return (
            F.when(~F.contains(F.col("__line"), F.lit(quote)), True).when(plain, True).otherwise(slow(F.col("__line")))
        )

    def _json(self, text: Any) -> Any:
        options = {"mode": "PERMISSIVE", "allowSingleQuotes": "false"}
        # As a list: a second object in the line is then an error, or a second element.
        parsed = text.withColumn(
            "__row", F.from_json(F.concat(F.lit("["), "__line", F.lit("]")), "array<map<string,string>>", options)
        )
        row, trimmed = F.get("__row", F.lit(0)), F.trim("__line")
        keys = F.map_keys(row)
        whole = (F.size("__row") == 1) & (F.size(keys) == F.size(F.array_distinct(keys)))
        whole &= ~F.col("__line").rlike(_HALF_LETTER)
        whole &= trimmed.startswith("{") & trimmed.endswith("}") & F.is_valid_utf8("__line")
        raw = {name: F.try_element_at(row, F.lit(name)) for name in self._source.columns}
        return self._typed(parsed.filter(trimmed != ""), raw, ~F.coalesce(whole, F.lit(False)))

    def _typed(self, parsed: Any, raw: dict[str, Any], broken: Any) -> Any:
        """The declared columns by their types; a row is bad where it is ``broken``, or where a value has another type."""
        bad, texts = broken, []
        for name, value in raw.items():
            kind = self._source.columns[name]
            text = self._text_of(value, kind)
            texts.append(text.alias(name))
            if kind.startswith("list<"):
                bad |= value.isNotNull() & text.isNull()
        broken = F.coalesce(bad, F.lit(True)).alias("__broken")
        typed = self._convert(
            parsed.select(*texts, "__line", "__file", "__block", "__order", "__header", broken), list(raw)
        )
        bad = (F.col("__broken") | F.col(values.BAD).isNotNull()).alias("__bad")
        declared = map(identifier, self._source.columns)
        return typed.select(*declared, "__line", "__file", "__block", "__order", "__header", bad)

    def _text_of(self, value: Any, kind: str) -> Any:
        """A text, or a list of them."""
        if kind.startswith("list<"):
            return F.from_json(value, "array<string>")
        if kind != "string" and self._source.format == "json":
            return F.regexp_replace(value, _NO_NUMBER, "$1")
        return value


def identifier(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _quote_check(source: Source) -> Any:
    """A function of columns: whether a line's quotes are closed. It runs where Spark's executors have Python but not us."""
    cloudpickle.register_pickle_by_value(csv_rows)
    marks = (source.separator, source.quote, source.escape)

    def fit(line: str) -> bool:
        row = csv_rows.split(line, *marks)
        return not (row.is_open or row.has_stray_quote)

    return F.udf(fit, "boolean")


def _regex(text: str) -> str:
    return _text("\\Q" + text + "\\E")


def _text(text: str) -> str:
    """As a literal of Spark's SQL."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
