"""The random generators that training and augmentation draw from: Python's, numpy's, torch's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Of this process, and of the GPU that it uses: plain values, as JSON holds them, in some tens of microseconds."""
    version, words, next_gauss = random.getstate()
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # the legacy generator, which Mixup draws from
    return {
        "python": [version, list(words), next_gauss],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": _words(torch.get_rng_state()),
        "cuda": _words(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Go on as from `random_state()`."""
    version, words, next_gauss = state["python"]
    random.setstate((version, tuple(words), next_gauss))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


@contextmanager
def kept() -> Iterator[None]:
    """Around what draws random numbers on which nothing after it may depend."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)


def _words(state: torch.Tensor) -> list[int]:
    return state.view(torch.int64).tolist()


def _bytes(words: list[int]) -> torch.Tensor:
    return torch.tensor(words, dtype=torch.int64).view(torch.uint8)
