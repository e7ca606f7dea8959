"""What a person did wrong, told apart from what went wrong inside."""


class InputError(ValueError):
    """Wrong input: a file, a column, a configuration key, a checkpoint.

    The message is one sentence that says what is wrong, where, what was expected and what was found.
    The command line prints it on standard error and ends with exit code 2.
    """


class OutOfRange(InputError, IndexError):
    """An index into a table, a vocabulary or a list that has no such row."""
