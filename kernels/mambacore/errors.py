"""The error for invalid input, as opposed to a defect of the program."""

from mambacore.safe_text import shortened


class InputError(ValueError):
    """Invalid input by the user: a file, an option, a shape.

    The message is one sentence that states what was wrong, where, and what to do. Commands print it on standard
    error without a traceback and exit with status 2. Very long words in it, which only damaged files have, are cut.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shortened(str(message)))
