"""Texts of messages. Standard library only, as ``packages`` is."""


def one_line(text: object, longest: int | None = None) -> str:
    """An error, or any other text, in one line; of a longer one the first ``longest`` characters."""
    line = " ".join(str(text).split())
    return line if longest is None or len(line) <= longest else f"{line[:longest]}…"
