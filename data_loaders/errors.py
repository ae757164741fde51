"""The exception for mistakes of the person who runs the program."""


class UserError(ValueError):
    """A mistake of the person who runs the program: what is wrong, where, and how to mend it; printed as one line without a
    traceback."""
