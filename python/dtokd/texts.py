"""JSON and YAML from files that anybody may have written: what is no such text is a ValueError, whatever is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
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


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: as `parse_json`.
    """
    return parse_json(path.read_text(encoding="utf-8"))


def read_notes(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file that only informs; nothing where there is none, or it is damaged."""
    try:
        held = read_json(path)
    except (OSError, ValueError):
        return {}
    return dict(held) if isinstance(held, Mapping) else {}


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
