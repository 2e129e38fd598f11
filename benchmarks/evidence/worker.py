"""A process that trains students."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from . import data, scenes
from .methods import METHODS, NONE
from .protocol import Run
from .students import Result, train

_BY_TITLE = {method.title: method for method in (NONE, *METHODS)}
_folder = Path()


def start(folder: Path) -> None:
    """Prepare this process; `folder` holds the data sets."""
    global _folder
    torch.set_num_threads(1)
    _folder = folder


def carry_out(run: Run) -> Result:
    """Train one student."""
    return train(
        load(run.data, _folder),
        run.objective,
        _BY_TITLE[run.method],
        lr=run.lr,
        seed=run.seed,
        iterations=run.iterations,
        model=run.data.partition(", ")[2],
    )


@cache
def load(name: str, folder: Path) -> data.DataSet | scenes.SceneSet:
    """One of `methods.SETTINGS`, from a folder where it is kept."""
    return scenes.load(folder) if name == "scenes" else data.load(name, folder)
