"""Errors that the command line prints without a traceback."""


def reason_of(error: BaseException) -> str:
    """The text of another library's error in one line of at most 300 characters; its type where it has no text."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class UsageError(ValueError):
    """The user can remedy it: names the option, what it got, and how."""


class Diverged(UsageError):
    """The losses of a run are not finite any more; what was finished before is on disk."""


class ToldElsewhere(UsageError):
    """The error of another rank, which is printed there."""
