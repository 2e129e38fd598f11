"""JSON and YAML from files that anybody may have written: what is no such text is a ValueError, whatever is wrong."""

from __future__ import annotations

import json
from typing import Any

from .errors import reason_of


def parse_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_yaml(text: str) -> Any:
    """What a YAML text holds, without running anything.

    Raises:
        ValueError: it is no YAML, or nested too deeply.
    """
    import yaml  # --help does not need it

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(reason_of(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
