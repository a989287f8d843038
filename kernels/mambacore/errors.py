"""The error for invalid input, as opposed to a defect of the program."""


class InputError(ValueError):
    """Invalid input by the user: a file, an option, a shape.

    The message is one sentence that states what was wrong, where, and what to do. Commands print it on standard
    error without a traceback and exit with status 2.
    """
