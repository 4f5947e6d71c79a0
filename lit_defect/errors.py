"""Errors that speak to the person at the keyboard: what is wrong, where, and what to do."""


class UserError(Exception):
    """Something the user can mend; the command line prints it without a traceback.

    The message names the file or the configuration key, what was expected, and the remedy.
    """


class DataError(UserError):
    """The data on disk are missing, unreadable or contradict each other."""
