"""An arm of a comparison: from its text to the options of `dtokd train` that it stands for."""

from __future__ import annotations

import argparse
import re
import shlex
from typing import Any

from dtokd_kernels import weighting

from ..detect import options as detect_options
from ..errors import UsageError
from ..objectives.teacher import as_list
from ..train import options as train_options
from ..train.options import BALANCES, HELD_OUT, flag
from ..train.reading import read_value
from ..values import FRACTION, LOOKING, parser_of, read_yaml

#: The arm without a teacher.
NONE = "none"
#: What may follow an arm's colon besides the rule's own options, and the option of `dtokd train` that it sets.
_OPTIONS = {
    "rescale": "kd_balance_rescale",
    "params": "kd_balance_params",
    "gram": "kd_balance_gram",
    "opt": "opt",
    "lr": "lr",
    "temperature": "kd_temperature",
    "every": "kd_held_out_every",
}
#: Of these, what a weighted sum has no use for.
_OF_RULES = ("rescale", "params", "gram", "every")
#: Rules that take a number after the colon.
_NUMBERED = ("fixed", "share", *LOOKING)
#: What the arm without a teacher is without.
_TEACHER = ("kd_model_name", "kd_teacher_path", "kd_cache_teacher")
#: What an arm that is no rule has not.
_NO_RULE: dict[str, Any] = {"kd_balance_kwargs": {}, "kd_balance_gram": None, "kd_balance_rescale": None}


def parse_arms(texts: list[str], objectives: int, detects: bool = False) -> dict[str, dict[str, Any]]:
    """From each arm, the one without a teacher first, to the options that it changes.

    Args:
        texts: as `--arms` has them.
        objectives: number of distillation objectives.
        detects: whether the runs are those of `dtokd detect`.

    Raises:
        UsageError: one is no arm, or two are the same.
    """
    arms: dict[str, dict[str, Any]] = {}
    for text in [NONE, *(text for text in texts if text != NONE)]:
        changes = parse_arm(text, objectives, detects)
        for other, theirs in arms.items():
            if theirs == changes or folder_of(other) == folder_of(text):
                raise UsageError(f"--arms: {other!r} and {text!r} are the same; leave one of them out")
        arms[text] = changes
    if len(arms) == 1:
        raise UsageError("--arms: none alone; name an arm to compare it with, such as fixed:0.5")
    return arms


def parse_arm(text: str, objectives: int = 1, detects: bool = False) -> dict[str, Any]:
    """The options that an arm stands for.

    Args:
        text: NAME, NAME:NUMBER, or either with key=value pairs.
        objectives: number of distillation objectives.
        detects: whether the runs are those of `dtokd detect`.

    Raises:
        UsageError: it is none.

    Example:
        >>> parse_arm("fixed:0.3")
        {'kd_balance': 'none', 'task_loss_weight': 0.3, 'distill_loss_weight': [0.7]}
        >>> parse_arm("share:0.5,rescale=sum")
        {'kd_balance': 'share', 'kd_balance_rescale': 'sum', 'kd_balance_kwargs': {'shares': [0.5, 0.5]}}
    """
    if text == NONE:
        return {"kd_balance": "none", **dict.fromkeys(_TEACHER)}
    name, _, rest = text.partition(":")
    if name not in BALANCES or name == NONE:
        raise UsageError(
            f"--arms: {text!r}; choose none, fixed:WEIGHT or one of {', '.join(BALANCES[1:])}, with options after a "
            "colon such as dto:lr=0.001"
        )
    number, pairs = None, rest.split(",") if rest else []
    if pairs and "=" not in pairs[0]:
        number = _number(text, name, pairs.pop(0))
    changes: dict[str, Any] = {"kd_balance": name}
    own: dict[str, Any] = {}
    actions = {action.dest: action for action in parser_of(detect_options if detects else train_options)._actions}
    for pair in pairs:
        key, mark, value = pair.partition("=")
        if not mark or not key:
            raise UsageError(f"--arms: {text!r}: {pair!r} is no key=value; such as dto:rescale=sum,lr=0.001")
        if _OPTIONS.get(key) in actions:
            changes[_OPTIONS[key]] = read_value(actions[_OPTIONS[key]], value, f"--arms: {text!r}: {key}")
        else:
            try:
                own[key] = read_yaml(value)
            except argparse.ArgumentTypeError as error:
                raise UsageError(f"--arms: {text!r}: {key}: {error}") from error
    if name == "fixed" and number is not None:
        if unused := [*own, *(key for key in _OF_RULES if _OPTIONS[key] in changes)]:
            raise UsageError(f"--arms: {text!r}: a fixed sum has no option {', '.join(unused)}; leave it out")
        weights = {"task_loss_weight": number, "distill_loss_weight": [round((1 - number) / objectives, 12)]}
        return changes | {"kd_balance": "none"} | weights
    if name in LOOKING:
        if number == 0:
            raise UsageError(
                f"--arms: {text!r}: no images are held out; pass a number above 0, as in {name}:{HELD_OUT}"
            )
        share = HELD_OUT if number is None else number
        changes["kd_held_out"] = read_value(actions["kd_held_out"], share, f"--arms: {text!r}")
    if name == "share" and number is not None:
        own["shares"] = [number, *[round((1 - number) / objectives, 12)] * objectives]
    changes["kd_balance_kwargs"] = own
    try:
        # of "fixed" the trainer knows the weights
        weighting.from_name(name, **({"weights": [1.0]} if name == "fixed" else {}), **own)
    except (TypeError, ValueError) as error:
        keys = ", ".join(key for key, option in _OPTIONS.items() if option in actions)
        raise UsageError(f"--arms: {text!r}: {error}; besides the rule's own options there are {keys}") from error
    return changes


def _number(text: str, name: str, number: str) -> float:
    if name not in _NUMBERED:
        raise UsageError(f"--arms: {text!r}: {name} takes no number; write key=value after the colon")
    try:
        return FRACTION(number)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"--arms: {text!r}: {error}") from error


def apply(options: argparse.Namespace, changes: dict[str, Any]) -> argparse.Namespace:
    """The options of an arm's runs.

    Args:
        options: of `train.options`.
        changes: of `parse_arm`.
    """
    own = argparse.Namespace(**{**vars(options), **changes})
    if own.kd_balance not in LOOKING:
        own.kd_held_out = 0.0
    if own.kd_balance == "none":  # a weighted sum is for the optimizer that ours stands for
        own = argparse.Namespace(**{**vars(own), **_NO_RULE, "opt": own.opt.lower().removeprefix("dto")})
    return own


def folder_of(text: str) -> str:
    """The name of an arm's folder."""
    return re.sub(r"[^\w.=-]+", "_", text)


def flags_of(text: str, options: argparse.Namespace, changes: dict[str, Any]) -> str:
    """What to give to `dtokd train` or `detect` besides the options that all arms share, which it overrides.

    Args:
        text: the arm.
        options: of the comparison.
        changes: of `parse_arm`.

    Example:
        >>> flags_of("fixed:0.3", argparse.Namespace(opt="adamw"), parse_arm("fixed:0.3"))
        '--kd-balance none --task-loss-weight 0.3 --distill-loss-weight 0.7'
    """
    if text == NONE:
        return "no --kd-model-name and no --kd-teacher-path: train without a teacher"
    base, own = vars(options), vars(apply(options, changes))
    told = {key: own[key] for key in changes if own[key] != {}}
    told |= {key: value for key, value in own.items() if key in base and value != base[key]}
    flags = " ".join(f"{flag(key)} {_written(value)}".strip() for key, value in told.items() if value is not None)
    absent = [flag(key) for key, value in told.items() if value is None]
    return flags + (f", without {' and '.join(absent)}" if absent else "")


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(shlex.quote(f"{key}={_yaml(item)}") for key, item in value.items())
    return " ".join(map(str, as_list(value)))


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
