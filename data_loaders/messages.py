"""What messages to people have in common. Standard library only: ``packages`` speaks when nothing else can be imported."""


def one_line(text: object, longest: int | None = None) -> str:
    """An error, or any other text, in one line; of a longer one the first ``longest`` characters."""
    line = " ".join(str(text).split())
    return line if longest is None or len(line) <= longest else f"{line[:longest]}…"
