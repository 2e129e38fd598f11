"""The options of a run that is on disk, checked as those of a command line are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .detect import options as detect_options
from .errors import UsageError
from .texts import parse_yaml
from .train import options as train_options
from .train.reading import read_value
from .values import parser_of


def settings_of(run: Path, command: str) -> dict[str, Any]:
    """The `args.yaml` of a run of `dtokd train` or `dtokd detect`; an option that it does not have has its default.

    Args:
        run: its directory.
        command: that asks, for messages.

    Raises:
        UsageError: it is no such directory, or the file is damaged.
    """
    file = run / "args.yaml"
    if not file.is_file():
        raise UsageError(f"{command}: {run} is no run directory: it has no args.yaml")
    try:
        held = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{command}: {file} cannot be read: {error}") from error
    if not isinstance(held, dict) or not isinstance(held.get("model"), str):
        raise UsageError(f"{command}: {file} does not hold the options of dtokd train or dtokd detect")
    settings = {}
    for action in parser_of(detect_options if "annotations" in held else train_options)._actions:
        if action.option_strings and action.dest not in ("help", "config"):
            where = f"{command}: {file}: {action.dest}"
            settings[action.dest] = (
                read_value(action, held[action.dest], where) if action.dest in held else action.default
            )
    return settings
