"""A lock on a file, which the operating system ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: The operating system does not keep two locks of one process apart.
_held: set[Path] = set()


class Locked(Exception):
    """Another one has the lock; the text tells which process, where that is known."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock; the file is removed after that. Processes that are forked meanwhile do not hold it.

    A file system without locks is used without one, after a warning.

    Raises:
        Locked: another process, or another part of this one, has it.
        OSError: the file cannot be made.
    """
    key = path.resolve()
    if key in _held:
        raise Locked(" of this process")
    handle = _take(path)
    _held.add(key)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        _held.discard(key)
        path.unlink(missing_ok=True)
        os.close(handle)


def _take(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.read(handle, 20).decode()
            os.close(handle)
            raise Locked(f", process {owner}" if owner.isdigit() else "") from None
        except OSError as error:
            warnings.warn(f"{path.parent} cannot be locked ({error.strerror}): start no second run there", stacklevel=2)
            return handle
        try:
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)  # its holder has just removed it
