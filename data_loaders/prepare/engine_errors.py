"""Error messages of the engines about an expression, as one line of ours whatever engine and version."""

import re

from data_loaders.messages import one_line

_GIVES_NULL = "TRY_CAST(… AS …) gives a missing value there"
# A message of DuckDB or Spark -> ours; {0} … are the groups.
_EXPLANATIONS = (
    (
        r"Could not convert string ['\"](.*?)['\"] to '?\"?(\w+)|The value '(.*?)' of the type \"\w+\" cannot be cast to \"(\w+)",
        "{0!r} is not {1}, which an expression makes of it: mend the expression; " + _GIVES_NULL,
    ),
    (
        r"with value (\S+) can't be cast.*destination type (\w+)|The value (\S+) of the type \"\w+\" cannot be cast to \"(\w+)",
        "{0} does not fit into {1}: take a wider type (BIGINT, DOUBLE); " + _GIVES_NULL,
    ),
    (
        r"Out of Range Error|NUMERIC_VALUE_OUT_OF_RANGE|ARITHMETIC_OVERFLOW|CAST_OVERFLOW|BINARY_ARITHMETIC_OVERFLOW",
        "a number is beyond its type: CAST to a wider one first (BIGINT, DOUBLE)",
    ),
    (r"DIVIDE_BY_ZERO|REMAINDER_BY_ZERO", "a division by zero: x / NULLIF(y, 0) gives a missing value there"),
    (
        r"No function matches the given name and argument types '(.*?)'|DATATYPE_MISMATCH|Cannot compare values of type (.*?) -",
        "the types do not fit together ({0}): CAST one of them",
    ),
    (r"INVALID_ARRAY_INDEX|ELEMENT_AT_BY_INDEX_ZERO", "a list has no element at that place: look at len(…) first"),
    (
        r"CANNOT_PARSE_TIMESTAMP|Could not parse string|invalid (?:date|timestamp) field format: \"(.*?)\"",
        "a text is no date or time of that format ({0}): TRY_CAST or try_strptime gives a missing value there",
    ),
)


def explanation(error: BaseException) -> str | None:
    """None for what is not known here: then the engine's own message is kept in a file, ``Engine.store_error``."""
    text = one_line(error)
    for pattern, ours in _EXPLANATIONS:
        found = re.search(pattern, text)
        if found:
            groups = [group for group in found.groups() if group is not None] + ["?", "?"]
            return ours.format(*(group[:80] for group in groups)).replace(" (?)", "")
    return None
