"""What a command tells that refuses its options or files."""

from __future__ import annotations

from dtokd.cli import main


def refused(capsys, command, *arguments):
    """The error's one line, with which the command ends."""
    try:
        code = main([command, *map(str, arguments)])
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith((f"dtokd {command}: error: ", "dtokd: error: "))
    assert error.count("\n") == 1
    return error
