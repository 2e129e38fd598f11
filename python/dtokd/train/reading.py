"""The values of options: from a command line, and from a YAML file, checked alike."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..values import LOOKING, KeyValues, Number, Parser
from .options import HELD_OUT, NULLABLE, POSITIONAL, flag


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Read the options; those of the -c/--config file are defaults.

    Raises:
        UsageError: the file is not readable, or holds a key that is no option, or a value that the option refuses; or
            values of several options contradict each other.
    """
    given, _ = _config_parser().parse_known_args(argv)
    if given.config is not None:
        parser.set_defaults(**read_config(parser, given.config))
    options = parser.parse_args(argv)
    positional = vars(options).pop(POSITIONAL, None)
    if positional is not None:
        if options.data_dir not in (None, parser.get_default("data_dir"), positional):
            raise UsageError(
                f"--data-dir: {options.data_dir}, but the command also names {positional}; pass one of them"
            )
        options.data_dir = positional
    if "kd_held_out" in options and options.kd_held_out is None:
        options.kd_held_out = HELD_OUT if options.kd_balance in LOOKING else 0.0
    check(options)
    return options


def check(options: argparse.Namespace) -> None:
    """What no single value shows.

    Args:
        options: of `dtokd train`, `detect` or `eval`.

    Raises:
        UsageError: they contradict each other.
    """
    values = vars(options)
    for name in ("scale", "ratio", "cutmix_minmax"):
        ends = values.get(name)
        if ends is not None and ends[0] > ends[1]:
            raise UsageError(f"{flag(name)}: {ends[0]:g} {ends[1]:g}; pass the smaller end first")
    if values.get("torchcompile_mode") and not values.get("torchcompile"):
        raise UsageError("--torchcompile-mode: nothing is compiled; pass --torchcompile too")
    size, channels = values.get("input_size"), values.get("in_chans") or 3
    if size is not None and size[0] != channels:
        raise UsageError(
            f"--input-size: {size[0]} channels, but --in-chans is {channels}; pass the same number to both"
        )
    for name in ("in_chans", "num_classes"):
        if name in values and name in (values.get("model_kwargs") or {}):
            raise UsageError(f"--model-kwargs: {name} decides on the data too; pass {flag(name)} instead")
    for name in ("mean", "std"):
        given = values.get(name)
        if given is not None and len(given) not in (1, channels):
            raise UsageError(f"{flag(name)}: {len(given)} numbers for {channels} channels; pass one, or one each")
    betas = values.get("opt_betas")
    if betas is not None and len(betas) < 2:
        raise UsageError(f"--opt-betas: {betas[0]:g} alone; pass two or, where the optimizer has three, three")


def _config_parser() -> argparse.ArgumentParser:
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config")
    return parser


def read_config(parser: argparse.ArgumentParser, path: str | Path) -> dict[str, Any]:
    """The options in a YAML file, checked as the command line's are.

    Raises:
        UsageError: as `parse`.
    """
    from .. import recipes  # needs YAML, --help does not

    try:
        values = recipes.load(path)
    except OSError as error:
        raise UsageError(f"--config: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--config: {error}") from error
    actions = {action.dest: action for action in parser._actions if action.option_strings and action.dest != "help"}
    checked = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            close = difflib.get_close_matches(name, actions, n=1)
            hint = f"; did you mean {close[0]}?" if close else "; --help lists them"
            raise UsageError(f"--config: {path}: no option is called {key!r}{hint}")
        checked[name] = read_value(actions[name], value, f"--config: {path}: {key}")
    return checked


def read_value(action: argparse.Action, value: Any, where: str) -> Any:
    """A value that is no text of the command line, as the option would have made it of its text.

    Args:
        action: of the option.
        value: as YAML gives it.
        where: it stands, for messages.

    Raises:
        UsageError: the option does not take it.
    """
    if isinstance(action, KeyValues):
        if value is not None and not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
            raise UsageError(f"{where} is {value!r}; expected a mapping of names to values")
        if any(isinstance(item, float) and math.isnan(item) for item in (value or {}).values()):
            raise UsageError(f"{where} is {value!r}; expected numbers, not NaN")
        return value or {}
    if value is None:
        if action.default is not None and action.dest not in NULLABLE:
            raise UsageError(f"{where} is null, but the option has no such value; leave it out for {action.default!r}")
        return None
    if action.nargs == 0:  # a flag
        if not isinstance(value, bool):
            raise UsageError(f"{where} is {value!r}; expected true or false")
        return value
    many = action.nargs in ("+", "*") or isinstance(action.nargs, int)
    if isinstance(action.nargs, str) and many and not isinstance(value, list):
        value = [value]
    if many != isinstance(value, list):
        raise UsageError(f"{where} is {value!r}; expected {'a list' if many else 'one value'}")
    if many and not value and action.nargs != "*":
        raise UsageError(f"{where} is an empty list; expected a value")
    if isinstance(action.nargs, int) and len(value) != action.nargs:
        raise UsageError(f"{where} is {value!r}; expected {action.nargs} values")
    checked = []
    for item in value if many else [value]:
        if item is None or isinstance(item, (bool, list, dict)):
            expected = action.type if isinstance(action.type, Number) else "text"
            raise UsageError(f"{where} is {value!r}; expected {expected}")
        try:
            checked.append(action.type(str(item)) if callable(action.type) else str(item))
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"{where}: {error}") from error
        if action.choices is not None and checked[-1] not in action.choices:
            raise UsageError(f"{where} is {value!r}; choose from {', '.join(map(str, action.choices))}")
    return checked if many else checked[0]
