"""What a person did wrong, told apart from what went wrong inside."""


class InputError(ValueError):
    """Wrong input: a file, a column, a configuration key, a checkpoint.

    The message is one sentence that says what is wrong, where, what was expected and what was found.
    The command line prints it on standard error and ends with exit code 2.
    """


class OutOfRange(InputError, IndexError):
    """An index into a table, a vocabulary or a list that has no such row.

    Attributes
    ----------
    position, value, rows : int or None
        Where ids are looked up: the flat position of the id, the id, and the number of rows it looks into.
    feature : int or None
        The feature whose rows those are, where there are several.
    """

    position: int | None = None
    value: int | None = None
    rows: int | None = None
    feature: int | None = None
