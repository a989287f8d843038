"""The one error that means "the input is wrong", as opposed to "the program is wrong"."""


class InputError(ValueError):
    """A mistake in what the user gave: a file, an option, a shape.

    The message is one sentence that says what was wrong, where, and what to do. Command lines print it on standard
    error without a traceback and exit with status 2.
    """
