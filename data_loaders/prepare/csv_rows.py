"""One row of csv, split. Nothing is imported here: Spark's executors get this module by value, and have none of ours."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """``fields`` as far as they could be split; ``is_open``: a quote is not closed (the row may continue in the next line);
    ``has_stray_quote``: characters follow a closing quote."""

    fields: list[str]
    is_open: bool = False
    has_stray_quote: bool = False


def split(line: str, separator: str, quote: str, escape: str) -> Row:
    """One row, or the beginning of one that continues in the next line. ``escape``: empty for quotes that are doubled."""
    if not quote or quote not in line:
        return Row(line.split(separator))
    fields, rest, stray = [], line, False
    while True:
        if rest.startswith(quote):
            value, rest, closed = _quoted(rest, quote, escape or quote)
            if not closed:
                return Row([*fields, value], is_open=True, has_stray_quote=stray)
            stray = stray or not (rest == "" or rest.startswith(separator))
            extra, found, rest = rest.partition(separator)
            value += extra
        else:
            value, found, rest = rest.partition(separator)
        fields.append(value)
        if not found:
            return Row(fields, has_stray_quote=stray)


def _quoted(text: str, quote: str, escape: str) -> tuple[str, str, bool]:
    """The value of a quoted field at the beginning of ``text``, what follows it, and whether it ends at all."""
    place, value = 1, []
    while place < len(text):
        character, following = text[place], text[place + 1 : place + 2]
        if character == escape and following and following in (quote, escape):
            value.append(following)
            place += 2
        elif character == quote:
            return "".join(value), text[place + 1 :], True
        else:
            value.append(character)
            place += 1
    return "".join(value), "", False
