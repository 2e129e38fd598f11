"""What the command line tells its user without a traceback."""


class UsageError(ValueError):
    """The user can remedy it: names the option, what it got, and how."""


class ToldElsewhere(UsageError):
    """As on another rank, which tells the user."""
