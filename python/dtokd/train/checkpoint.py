"""A checkpoint: one safetensors file, whose metadata holds as JSON what is no tensor. Nothing is pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UsageError
from ..files import write_tensors

FORMAT = 2


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a nested state of dicts, lists, tuples, tensors and plain values.

    Raises:
        UsageError: the file cannot be written; the one that was there still is.
        TypeError: a value of another kind.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps({"format": FORMAT, "state": _pack(state, "", tensors)})
    try:
        write_tensors(path, tensors, {"dtokd": text})
    except OSError as error:
        raise UsageError(
            f"--output: the checkpoint {path} cannot be written: {error.strerror or error}; earlier checkpoints are as "
            "they were: make room and go on with --resume auto"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU.

    Raises:
        UsageError: there is no such file, it is damaged, or something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except FileNotFoundError:
        raise UsageError(f"--resume: there is no file {path}") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"--resume: {path} is damaged or no checkpoint: {error}; give an earlier one") from error
    try:
        held = json.loads(metadata["dtokd"])
    except (KeyError, ValueError):
        raise UsageError(
            f"--resume: {path} holds weights, but no state of a run; pass it as --initial-checkpoint"
        ) from None
    if held["format"] != FORMAT:
        raise UsageError(
            f"--resume: {path} has format {held['format']}, expected {FORMAT}; use the dtokd that wrote it"
        )
    state: dict[str, Any] = _unpack(held["state"], tensors)
    return state


def _pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; tensors go to the other dict and leave their name."""
    if isinstance(value, Tensor):
        tensors[where] = value
        return {"tensor": where}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        pairs = [[key, _pack(item, f"{where}.{key}" if where else str(key), tensors)] for key, item in value.items()]
        return {"dict": pairs}
    raise TypeError(f"save_checkpoint: {where} is a {type(value).__name__}, which JSON and safetensors do not hold")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in held)
    return {key: _unpack(item, tensors) for key, item in held}


def check_fits(path: Path, weights: dict[str, Tensor], own: dict[str, Tensor], model: str, saved_model: str) -> None:
    """Refuse a checkpoint of another model, before anything is loaded.

    Raises:
        UsageError: names or shapes differ.
    """
    absent = [name for name in own if name not in weights]
    more = [name for name in weights if name not in own]
    shapes = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if not (absent or more or shapes):
        return
    name = (shapes or absent or more)[0]
    there = tuple(weights[name].shape) if name in weights else "nothing"
    expected = tuple(own[name].shape) if name in own else "nothing"
    raise UsageError(
        f"--resume: {path} is of another model ({saved_model}; this run trains {model}): {name} has {there}, expected "
        f"{expected}, and {len(absent) + len(more) + len(shapes) - 1} more differ; give the options of that run, or "
        "another --experiment"
    )
