"""Values of options: each is checked where it is read, and an error is one line that names the option."""

from __future__ import annotations

import argparse
import copy
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .texts import parse_yaml

#: Of whole numbers: what fits into an int32, which also leaves a seed room for ranks and steps.
MOST = 2**31 - 1
#: Of a file's name in bytes, with room for what temporary files add.
LONGEST = 200
#: Values of --kd-balance: the rules that look at held-out images.
LOOKING = ("heldout", "auto", "whilebetter")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the list of all options, and whose help shows defaults.

    Attributes:
        absent: options of a program that users come from, and what to do instead, for the errors.
    """

    def __init__(self, *arguments: Any, absent: Mapping[str, str] | None = None, **more: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": Help, "allow_abbrev": False, **more})
        self.absent = absent or {}

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; its error of an option that does not exist names the nearest one, or what stands for it."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown)
        return options

    def _refuse(self, words: Sequence[str]) -> NoReturn:
        word = next((word for word in words if word.startswith("-")), words[0])
        option = word.partition("=")[0]
        if option in self.absent:
            self.error(f"{option} is an option of timm's train.py that is not here: {self.absent[option]}")
        known = [text for action in self._actions for text in action.option_strings]
        close = difflib.get_close_matches(option.replace("_", "-"), known, n=1) if option.startswith("--") else []
        hint = f"did you mean {close[0]}?" if close else f"{self.prog} --help lists the options"
        self.error(f"unrecognized arguments: {' '.join(words)}; {hint}")

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        found = re.fullmatch(r"argument (\w+): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if found:  # of a command
            choices = [choice.strip(" '") for choice in found[3].split(",")]
            close = difflib.get_close_matches(found[2], choices, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(choices)}"
            message = f"there is no command {found[2]!r}; {hint}"
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")


class Help(argparse.HelpFormatter):
    """Shows every option's default, unless its help does already, or it is required."""

    def _format_action(self, action: argparse.Action) -> str:
        if not action.help:
            action = copy.copy(action)
            action.help = "%(default)s"  # argparse shows nothing for an empty one
            action.help = self._get_help_string(action)
        return super()._format_action(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = "" if action.help == "%(default)s" else action.help or ""
        shown = action.option_strings and (action.nargs != 0 or action.default is True)
        if not shown or "default:" in text or "default)" in text or action.default is argparse.SUPPRESS:
            return text
        return f"{text} (default: {_shown(action.default)})".strip()


def _shown(default: Any) -> str:
    """A default as it would be written, without argparse's signs."""
    if default is None or default == "" or default == {} or default == []:
        return "none"
    if default is True:
        return "on"
    many = isinstance(default, (list, tuple))
    text = " ".join(
        f"{value:.4g}" if isinstance(value, float) else str(value) for value in (default if many else [default])
    )
    return text.replace("%", "%%")


class Number:
    """The `type` of an option that is a number: finite and in its range.

    Args:
        kind: int or float.
        least, most: the range's ends, which belong to it.
        above, below: ends that do not belong to it.

    Example:
        >>> Number(int, least=1)("3")
        3
        >>> Number(float, least=0, most=1)("nan")
        Traceback (most recent call last):
        argparse.ArgumentTypeError: 'nan'; expected a number from 0 to 1
    """

    def __init__(
        self,
        kind: type[int] | type[float],
        *,
        least: float | None = None,
        most: float | None = None,
        above: float | None = None,
        below: float | None = None,
    ) -> None:
        self.kind, self.least, self.most, self.above, self.below = kind, least, most, above, below

    def __call__(self, text: str) -> float:
        """Read it.

        Raises:
            argparse.ArgumentTypeError: it is no such number.
        """
        try:
            value = self.kind(text)
        except ValueError:
            value = math.nan
        if (
            not math.isfinite(value)
            or (self.least is not None and value < self.least)
            or (self.most is not None and value > self.most)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        ):
            raise argparse.ArgumentTypeError(f"{text!r}; expected {self}")
        if self.kind is int and value > MOST:
            raise argparse.ArgumentTypeError(f"{text!r} is too large; expected at most {MOST}")
        return value

    def __str__(self) -> str:
        """What is expected, with its article."""
        text = "a whole number" if self.kind is int else "a number"
        if self.least is not None and self.most is not None:
            return f"{text} from {self.least:g} to {self.most:g}"
        parts = [f"from {self.least:g} on"] if self.least is not None else []
        parts += [f"above {self.above:g}"] if self.above is not None else []
        parts += [f"below {self.below:g}"] if self.below is not None else []
        parts += [f"at most {self.most:g}"] if self.most is not None else []
        return " ".join([text, " and ".join(parts)]).strip()


ANY_INT = Number(int)
NATURAL = Number(int, least=0)
COUNT = Number(int, least=1)
FRACTION = Number(float, least=0, most=1)
BELOW_ONE = Number(float, least=0, below=1)
NOT_NEGATIVE = Number(float, least=0)
POSITIVE = Number(float, above=0)
ANY_NUMBER = Number(float)


class KeyValues(argparse.Action):
    """--opt-kwargs a=1 b=text, as timm's: a dict, each value read as YAML (which reads 1e-3 as text: here a number)."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Read the pairs."""
        pairs = {}
        for text in values:
            key, mark, value = text.partition("=")
            if not mark:
                parser.error(f"{option_string}: {text!r} is no key=value")
            try:
                pairs[key] = read_yaml(value)
            except argparse.ArgumentTypeError as error:
                parser.error(f"{option_string}: {key}: {error}")
        setattr(namespace, self.dest, pairs)


def parser_of(module: Any) -> Parser:
    """A parser with the options of a module, which has `add_arguments`: such as `train.options`."""
    parser = Parser()
    module.add_arguments(parser)
    return parser


def read_yaml(text: str) -> Any:
    """A value as YAML reads it, but numbers such as 1e-3, which are text to it.

    Raises:
        argparse.ArgumentTypeError: it is no YAML, or NaN.
    """
    try:
        value = float(text) if not text.lstrip("+-").isdigit() else int(text)
    except ValueError:
        try:
            return parse_yaml(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no value of YAML") from error
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number, not NaN")
    return value


def path(text: str) -> Path:
    """A path. An empty text, as an unset variable of a shell gives it, would mean the current folder.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    return Path(file_name(not_empty(text, "a path ('.' for the current folder)")))


def file_name(text: str) -> str:
    """A name of a file or folder, perhaps with others before it.

    Raises:
        argparse.ArgumentTypeError: no file can have it.
    """
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} holds the character \\0, which no name can have")
    if any(len(part.encode()) > LONGEST for part in Path(text).parts):
        raise argparse.ArgumentTypeError(f"{text[:20]!r}... is too long for a name; expected at most {LONGEST} bytes")
    return text


def not_empty(text: str, expected: str = "a name") -> str:
    """A text that is not empty; for messages, what is expected.

    Raises:
        argparse.ArgumentTypeError: it is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError(f"empty; expected {expected}")
    return text


def auto_augment(text: str) -> str:
    """An AutoAugment, RandAugment or AugMix policy as timm reads it; empty for none.

    Raises:
        argparse.ArgumentTypeError: timm refuses it, or would pass over a part of it.
    """
    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    if not text:
        return text
    kind = "rand" if text.startswith("rand") else "augmix" if text.startswith("augmix") else "auto"
    make: Any = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform, "auto": auto_augment_transform}
    try:
        for part in text.split("-")[1:]:
            if not re.match(r"[a-z]+\d" if kind != "rand" else r"t[a-z]|[a-z]+\d", part):
                raise ValueError(f"{part!r}; expected letters and a number")
        make[kind](text, {"translate_const": 1, "img_mean": (128, 128, 128)})
    except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no policy of timm ({error}); expected one such as rand-m9-mstd0.5, augmix-m3, original or v0"
        ) from error
    return text


def compile_backend(text: str) -> str:
    """A backend of torch.compile.

    Raises:
        argparse.ArgumentTypeError: torch has none of this name.
    """
    import torch

    known = torch.compiler.list_backends(exclude_tags=())
    if text not in known:
        raise argparse.ArgumentTypeError(f"{text!r}; choose from {', '.join(known)}")
    return text
