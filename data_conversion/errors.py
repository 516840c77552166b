"""The one exception that means: the input is wrong, and the user can mend it."""


class InputError(ValueError):
    """A file, a folder or an argument that the user has to change.

    The message names what is wrong, where, and what to do. The command line prints it alone,
    without a traceback, and ends with exit code 2.
    """
