"""Files that are whole or not there: written beside their place, synced, and moved; and what they hold."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from .errors import UsageError, reason_of

#: How a system refuses to write, but not to read.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
#: Errors of the system that are not about a file.
_NO_FILE = (ConnectionError, TimeoutError, ChildProcessError, BlockingIOError, InterruptedError)


@contextmanager
def writing(folder: Path | str, option: str) -> Iterator[None]:
    """Around what writes: that the system refuses a file becomes an error of the user's, any other error stays.

    Args:
        folder: that is written to, for messages; an error often knows the file better.
        option: by which the user gave it.

    Raises:
        UsageError: the disk is full or broken, or may not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, _NO_FILE):  # without a number: of a library that loads by network
            raise
        how = "written" if error.errno in _FULL else "read or written"
        raise UsageError(
            f"{option}: {error.filename or folder} cannot be {how}: {error.strerror}; make room, or choose another "
            "place; what was finished before is as it was"
        ) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the file, or leave it as it was.

    Raises:
        OSError: the disk is full, or the folder is not writable; what was there still is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # not the temporary one's
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that were killed in `write_bytes` have left in a folder, to which nobody writes now."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file by this text, in UTF-8: see `write_bytes`."""
    write_bytes(path, text.encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file; tensors of any device, also such that share memory."""
    kept = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_bytes(path, save(kept, dict(metadata) if metadata else None))


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors: their names, dtypes, shapes and bytes, on whatever device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader accepts: it has no numbers for NaN and Inf, which become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def read_weights(path: str | Path, option: str, use_ema: bool = False) -> dict[str, Tensor]:
    """A model's weights: a .safetensors file, or one of torch in which nothing but tensors is pickled.

    Args:
        path: the file.
        option: by which the user gave it, for messages.
        use_ema: the averaged ones, if a file of timm's train.py has both.

    Raises:
        UsageError: there is no such file, or it holds something else; nothing pickled has run.
    """
    from timm.models import load_state_dict  # takes seconds

    if not os.path.isfile(path):
        raise UsageError(f"{option}: there is no file {path}")
    try:
        state = load_state_dict(str(path), use_ema=use_ema, weights_only=True)
        assert all(isinstance(value, Tensor) for value in state.values()), "not all of its entries are tensors"
    except Exception as error:  # torch, pickle, zipfile and safetensors have a dozen kinds
        reason = reason_of(error)
        raise UsageError(
            f"{option}: {path} is neither a safetensors file nor a torch file that loads without running pickled code: "
            f"{reason}"
        ) from error
    return dict(state)


def load_weights(model: Any, path: str | Path, option: str, name: str) -> None:
    """Load a file of weights into a model, the averaged ones of a file of timm's train.py that has both.

    Args:
        model: the model.
        path, option: see `read_weights`.
        name: of the model, for messages.

    Raises:
        UsageError: as `read_weights`, or they do not fit.
    """
    weights = read_weights(path, option, use_ema=True)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"{option}: {path} does not hold weights of {name}: {reason_of(error)}") from error


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
