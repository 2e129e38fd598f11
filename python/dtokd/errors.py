"""What the command line tells its user without a traceback."""


class UsageError(ValueError):
    """The user can remedy it: names the option, what it got, and how."""


class Diverged(UsageError):
    """The losses of a run are not finite any more; what was finished before is on disk."""


class ToldElsewhere(UsageError):
    """As on another rank, which tells the user."""
