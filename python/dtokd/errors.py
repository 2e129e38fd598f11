"""What the command line tells its user without a traceback."""


def reason_of(error: BaseException) -> str:
    """What an error of another library says, in one line of at most 300 characters; its type where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class UsageError(ValueError):
    """The user can remedy it: names the option, what it got, and how."""


class Diverged(UsageError):
    """The losses of a run are not finite any more; what was finished before is on disk."""


class ToldElsewhere(UsageError):
    """As on another rank, which tells the user."""
