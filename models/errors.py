"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Something the user can mend: its message is one line that says what is wrong and what to do.

    The command line prints it on stderr and exits with code 2; every other exception is a bug and keeps its
    traceback.
    """
