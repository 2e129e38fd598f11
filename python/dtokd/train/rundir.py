"""The run directory: args.yaml, environment.json, summary.csv, steps.csv, checkpoints, the student alone."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import dtokd_kernels

from ..errors import UsageError
from ..files import sync_folder, write_tensors, write_text
from .checkpoint import load_checkpoint, save_checkpoint
from .options import plain

_CHECKPOINT = re.compile(r"epoch-(\d+)\.safetensors")


class RunDir:
    """One run's files.

    Args:
        path: the folder; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.args = path / "args.yaml"
        self.summary = path / "summary.csv"
        self.steps = path / "steps.csv"
        self.bad_images = path / "bad_images.txt"
        self.student = path / "student.safetensors"
        self.last_student = path / "student-last.safetensors"
        self.pictures = path / "pictures"
        self.report = path / "report.html"
        self.stopped = path / "checkpoints" / "stopped.safetensors"

    def checkpoints(self) -> dict[int, Path]:
        """From the number of finished epochs to the file, in order."""
        found = {}
        for path in (self.path / "checkpoints").glob("epoch-*.safetensors"):
            if match := _CHECKPOINT.fullmatch(path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def begin(self, options: argparse.Namespace) -> tuple[Path, dict[str, Any]] | None:
        """Make the folder, and find what to go on from.

        Returns:
            The checkpoint that `--resume` means and its state; None to start anew.

        Raises:
            UsageError: there is a run already, or the folder or the checkpoint is of no use.
        """
        there = self.checkpoints()
        found: tuple[Path, dict[str, Any]] | None = None
        if options.resume == "auto":
            found = self._newest(there)
        elif options.resume:
            found = Path(options.resume), load_checkpoint(Path(options.resume))
        elif there:
            raise UsageError(
                f"--experiment: {self.path} holds a run of {max(there)} epochs; go on with --resume auto, or choose "
                "another --experiment"
            )
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            write_text(self.args, yaml.safe_dump(plain(options), sort_keys=False))
            write_text(self.path / "environment.json", json.dumps(environment(options), indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"--output: {self.path} cannot be written: {error.strerror}") from error
        epochs, updates = (found[1]["epoch"], found[1]["updates"]) if found else (0, 0)
        _keep_rows(self.summary, epochs)
        _keep_rows(self.steps, updates)
        for number, path in there.items():
            if number > epochs:  # of the run that went on from here before
                path.unlink()
        if found is None or found[0].resolve() != self.stopped.resolve():
            self.stopped.unlink(missing_ok=True)
        return found

    def _newest(self, there: Mapping[int, Path]) -> tuple[Path, dict[str, Any]] | None:
        newest = max(there, default=0)
        if self.stopped.exists():
            held = load_checkpoint(self.stopped)
            if held["epoch"] >= newest:
                return self.stopped, held
        return (there[newest], load_checkpoint(there[newest])) if there else None

    def save(self, epoch: int, state: Mapping[str, Any], best: int, keep: int) -> Path:
        """Write a checkpoint, then remove those beyond `keep`; the best stays."""
        path = self.path / "checkpoints" / f"epoch-{epoch:04d}.safetensors"
        save_checkpoint(path, dict(state))
        self.stopped.unlink(missing_ok=True)
        numbers = list(self.checkpoints())
        for number in numbers[: -max(keep, 1)]:
            if number != best:
                self.checkpoints()[number].unlink()
        sync_folder(path.parent)
        return path

    def save_stopped(self, state: Mapping[str, Any]) -> None:
        """Write a checkpoint in the middle of an epoch; the next `save` removes it."""
        save_checkpoint(self.stopped, dict(state))

    def export(self, path: Path, student: Mapping[str, Tensor]) -> None:
        """The student's weights alone, as timm.create_model(..., checkpoint_path=...) reads them."""
        try:
            write_tensors(path, student, {"format": "pt"})
        except OSError as error:
            raise UsageError(f"--output: {path} cannot be written: {error.strerror or error}; make room") from error

    def add_summary(self, row: Mapping[str, Any]) -> None:
        """One epoch's line; the file is rewritten, as an epoch may have columns of its own."""
        rows = [*read_rows(self.summary), {key: str(value) for key, value in row.items()}]
        write_rows(self.summary, rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The complete lines of a CSV file; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if None not in row and None not in row.values()]


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """A CSV file with all columns of the rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _keep_rows(path: Path, count: int) -> None:
    """Forget lines of what the checkpoint does not know: epoch or step is in the first column, counted from 0."""
    rows = read_rows(path)
    if not path.exists():
        return
    kept = [row for row in rows if float(next(iter(row.values()))) < count]
    if kept:
        write_rows(path, kept)
    else:
        path.unlink()


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader of the results asks for; nothing that names the machine or its user."""
    import timm
    import torchvision

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "dtokd_kernels": dtokd_kernels.__version__,
        "backend": dtokd_kernels.backend_info()["chosen for cuda" if cuda else "chosen for cpu"],
        "device": torch.cuda.get_device_name() if cuda and options.device != "cpu" else "CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.system(),
    }
