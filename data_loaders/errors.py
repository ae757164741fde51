"""The exception for mistakes of the person who runs the program."""

from data_loaders import secrets
from data_loaders.messages import one_line


class UserError(ValueError):
    """A mistake of the person who runs the program: what is wrong, where, and how to mend it; printed as one line without a
    traceback. The message is kept in one line and without secrets."""

    def __init__(self, message: str) -> None:
        super().__init__(secrets.scrub(one_line(message)))
