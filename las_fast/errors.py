"""The one error that a person, not a programmer, is meant to read."""


class InputError(Exception):
    """Bad data, settings or files; its text is one sentence: what was expected, what came, what to do.

    The commands print it after "error: " and end with exit status 2, without a traceback.
    """
