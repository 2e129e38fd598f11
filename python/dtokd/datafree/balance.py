"""`--df-balance`: from its text to a weighting."""

from __future__ import annotations

import argparse
from typing import Any

from dtokd_kernels import weighting
from dtokd_kernels.types import Weighting

from ..errors import UsageError
from ..values import ANY_NUMBER, LOOKING, read_yaml
from .losses import NAMES

#: Rules that take a number for each loss after the colon, and their argument.
_NUMBERED = {"fixed": "weights", "share": "shares"}


def parse_balance(text: str) -> Weighting:
    """A weighting of the losses `losses.NAMES`.

    Args:
        text: NAME, NAME:NUMBER,NUMBER,NUMBER for fixed and share, or NAME:key=value,...

    Raises:
        UsageError: it is none.

    Example:
        >>> parse_balance("fixed:10,0.4,1.1")
        Fixed(weights=[10.0, 0.4, 1.1], log_gradients=False)
    """
    name, _, rest = text.partition(":")
    if name not in weighting.NAMES or name in LOOKING:
        names = ", ".join(n for n in weighting.NAMES if n not in LOOKING)
        raise UsageError(f"--df-balance: {text!r}; choose fixed:10,0.4,1.1 or one of {names}")
    keywords: dict[str, Any] = {}
    parts = rest.split(",") if rest else []
    try:
        if parts and "=" not in rest:
            if name not in _NUMBERED or len(parts) != len(NAMES):
                raise UsageError(
                    f"--df-balance: {text!r}; {' and '.join(_NUMBERED)} take {len(NAMES)} numbers, of "
                    f"{', '.join(NAMES)}; other rules take key=value after the colon"
                )
            keywords[_NUMBERED[name]] = [ANY_NUMBER(part) for part in parts]
        for part in parts if "=" in rest else []:
            key, mark, value = part.partition("=")
            if not mark:
                raise UsageError(f"--df-balance: {text!r}: {part!r} is no key=value")
            keywords[key] = read_yaml(value)
        return weighting.from_name(name, **keywords)
    except UsageError:
        raise
    except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
        raise UsageError(f"--df-balance: {text!r}: {error}") from error
