"""Trained runs as rows of a CSV file that grows by a row per run, so that a killed command goes on."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, fields
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar, get_type_hints

R = TypeVar("R")
S = TypeVar("S")


class Journal(Generic[R, S]):
    """The runs that are done; it may be called from several threads.

    Args:
        path: of the file.
        run, result: dataclasses of what a run is and of what came of it; their fields are str, int or float.
        executor: carries the runs out.
        train: does one; a function that the executor's processes know.
        commit: of the code that trains; written beside each run.
    """

    def __init__(
        self, path: Path, run: type[R], result: type[S], executor: Executor, train: Callable[[R], S], commit: str = ""
    ) -> None:
        self._path, self._executor, self._train, self._commit = path, executor, train, commit
        self.done = read(path, run, result) if path.exists() else {}
        self._lock = Lock()

    def __call__(self, runs: Sequence[R]) -> list[S]:
        """The results of `runs`, trained where they are not on file."""
        missing = [run for run in dict.fromkeys(runs) if run not in self.done]
        for run, result in zip(missing, self._executor.map(self._train, missing), strict=True):
            with self._lock:
                self.done[run] = result
                self._append(run, result)
        return [self.done[run] for run in runs]

    def _append(self, run: Any, result: Any) -> None:
        row = {**asdict(run), **asdict(result), "commit": self._commit}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self._path.exists()
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})


def read(path: Path, run: type[R], result: type[S]) -> dict[R, S]:
    """The runs of a journal's file, in its order."""
    with path.open(newline="", encoding="utf-8") as file:
        return {_parsed(run, row): _parsed(result, row) for row in csv.DictReader(file)}


def _parsed(kind: type[Any], row: dict[str, str]) -> Any:
    types = get_type_hints(kind)
    return kind(**{field.name: types[field.name](row[field.name]) for field in fields(kind)})


def commit() -> str:
    """Of the checkout that this file is in, with "+" where files have changed since; "" where git does not tell."""
    root = Path(__file__).parents[1]
    try:
        told = [
            subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return told[0] + ("+" if told[1] else "")
