"""The one exception that means: the request or its input was wrong, and here is what to do."""


class InputError(ValueError):
    """A wrong config, flag, path or damaged file; its message is one line fit for a user.

    Command lines print it on stderr and exit with code 2, without a traceback.
    """
