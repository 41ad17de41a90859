"""The one way to refuse: what a user can mend is a `BadInput`; every other error is a fault of the program."""


class BadInput(ValueError):
    """An input that cannot be used. The message is one line: the value, its limit and the mend.

    A script ends on it with that line and exit code 2. Other errors end with a traceback and exit code 1.
    """


def is_refusal(error: Exception) -> bool:
    """Whether a user can mend what was raised: bad input, or a file that the system does not give."""
    return isinstance(error, BadInput) or (isinstance(error, OSError) and bool(error.filename))
