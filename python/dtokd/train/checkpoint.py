"""A checkpoint: one safetensors file, whose metadata holds as JSON what is no tensor. Nothing is pickled."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UsageError
from ..files import digest_of, write_tensors

FORMAT = 3


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a nested state of dicts, lists, tuples, tensors and plain values.

    Raises:
        UsageError: the file cannot be written; the one that was there still is.
        TypeError: a value of another kind.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_pack(state, "", tensors), allow_nan=False)
    tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    held = json.dumps({"format": FORMAT, "sha256": _checksum(text, tensors), "state": text})
    try:
        write_tensors(path, tensors, {"dtokd": held})
    except OSError as error:
        raise UsageError(
            f"--output: the checkpoint {path} cannot be written: {error.strerror or error}; earlier checkpoints are as "
            "they were: make room and go on with --resume auto"
        ) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote, on the CPU.

    Raises:
        UsageError: there is no such file, a byte of it has changed, or it is something else.
    """
    metadata, tensors = _read(path, tensors=True)
    with _understood(path):
        held = json.loads(metadata)
        if held["format"] != FORMAT:
            raise UsageError(
                f"--resume: {path} has format {held['format']}, expected {FORMAT}; use the dtokd that wrote it"
            )
        if held["sha256"] != _checksum(held["state"], tensors):
            raise UsageError(
                f"--resume: {path} is damaged: its bytes are not those that were written; give an earlier one"
            )
        return dict(_unpack(json.loads(held["state"]), tensors))


def load_run(path: Path) -> dict[str, Any]:
    """As `load_checkpoint`, of the state that `state.collect` makes.

    Raises:
        UsageError: also if it is the state of something else.
    """
    state = load_checkpoint(path)
    with _understood(path):
        for key, kind in _FIELDS.items():
            if not isinstance(state[key], kind):
                raise TypeError(key)
        if min(state["epoch"], state["batches"], state["updates"]) < 0:
            raise ValueError("negative")
        if state["best"] is not None:
            int(state["best"]["epoch"])
    return state


#: What is read of a run's state before it is loaded.
_FIELDS: dict[str, Any] = {
    **{"model": str, "options": dict, "history": str, "students": dict, "weights": dict, "stepper": dict},
    **{"epoch": int, "batches": int, "updates": int, "updates_before": int, "per_epoch": int, "ahead": int},
    **{"lr": (float, int), "ranks": list, "groups": list},
    **{"best": (dict, type(None)), "rows": (dict, type(None)), "scheduler": (dict, type(None))},
}


def peek(path: Path) -> dict[str, Any]:
    """The state without reading its tensors, which are None. The checksum is not looked at.

    Raises:
        UsageError: there is no such file, or it is something else.
    """
    metadata, _ = _read(path, tensors=False)
    with _understood(path):
        return dict(_unpack(json.loads(json.loads(metadata)["state"]), defaultdict(lambda: None)))


def _read(path: Path, tensors: bool) -> tuple[str, dict[str, Tensor]]:
    if os.path.isdir(path):
        raise UsageError(
            f"--resume: {path} is a folder; pass a checkpoint, such as {path}/checkpoints/epoch-0001.safetensors, or "
            "--resume auto with the --output and --experiment of that run"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys() if tensors else ()
            held = {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise UsageError(f"--resume: there is no file {path}") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"--resume: {path} is damaged or no checkpoint: {error}; give an earlier one") from error
    if "dtokd" not in metadata:
        raise UsageError(f"--resume: {path} holds weights, but no state of a run; pass it as --initial-checkpoint")
    return metadata["dtokd"], held


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    try:
        yield
    except UsageError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise UsageError(
            f"--resume: {path} holds no state of a run that dtokd train or detect has written; pass one of a run's "
            "checkpoints"
        ) from error


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(f"{digest_of(tensors)} {text}".encode()).hexdigest()


def _pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; tensors go to the other dict and leave their name."""
    if isinstance(value, Tensor):
        tensors[where] = value
        return {"tensor": where}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        pairs = [[key, _pack(item, f"{where}.{key}" if where else str(key), tensors)] for key, item in value.items()]
        return {"dict": pairs}
    raise TypeError(f"save_checkpoint: {where} is a {type(value).__name__}, which JSON and safetensors do not hold")


def _unpack(value: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in held)
    if kind == "float":
        return float(held)
    if kind != "dict":
        raise ValueError(kind)
    return {key: _unpack(item, tensors) for key, item in held}
