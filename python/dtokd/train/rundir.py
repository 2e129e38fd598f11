"""The run directory: args.yaml, environment.json, summary.csv, steps.csv, checkpoints, the student alone."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import dtokd_kernels

from ..errors import UsageError
from ..files import (
    as_json,
    digest_of,
    remove_unfinished,
    sync_folder,
    write_bytes,
    write_tensors,
    write_text,
    writing,
)
from ..identity import versions
from ..texts import parse_yaml
from .checkpoint import load_run, peek, save_checkpoint
from .lock import Locked, locked
from .options import OUTSIDE, plain

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
        self.generator = path / "generator.csv"
        self.synthetic = path / "synthetic"
        self.bad_images = path / "bad_images.txt"
        self.student = path / "student.safetensors"
        self.last_student = path / "student-last.safetensors"
        self.pictures = path / "pictures"
        self.classes = path / "classes.json"
        self.log = path / "log.txt"
        self.report = path / "report.html"
        self.stopped = path / "checkpoints" / "stopped.safetensors"
        self._best: dict[Path, int | None] = {}

    def checkpoints(self) -> dict[int, Path]:
        """From the number of finished epochs to the file, in order."""
        found = {}
        for path in (self.path / "checkpoints").glob("epoch-*.safetensors"):
            if match := _CHECKPOINT.fullmatch(path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def picture(self, epoch: int) -> Path:
        """Of the images that were made until so many epochs were finished."""
        return self.synthetic / f"epoch-{epoch:04d}.png"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only process that writes here. The lock ends with its process, however that ends.

        What a killed process has left of a file that it was writing is removed.

        Raises:
            UsageError: another one is, or the folder cannot be made.
        """
        with ExitStack() as stack:
            try:
                made = [path for path in (self.path, *self.path.parents) if not path.exists()]
                stack.callback(_remove_empty, made)
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.path / ".lock"))
                for folder in (self.path, self.stopped.parent):
                    remove_unfinished(folder)
            except Locked as error:
                raise UsageError(
                    f"--experiment: {self.path} is in use by another run{error}; wait until it has ended, or choose "
                    "another --experiment"
                ) from None
            except OSError as error:
                raise UsageError(f"--output: {self.path} cannot be written: {error.strerror}") from error
            yield

    def find(self, options: argparse.Namespace, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """What to go on from. Nothing is written.

        Args:
            options: of `train.options`.
            say: takes a line for each damaged checkpoint that is passed over.

        Returns:
            The checkpoint that `--resume` means and its state; None to start anew.

        Raises:
            UsageError: there is a run already, or the checkpoint is of no use, or none of them is.
        """
        there = self.checkpoints()
        if options.resume == "auto":
            return self._newest(there, say)
        if options.resume:
            return Path(options.resume), load_run(Path(options.resume))
        if there:
            raise UsageError(
                f"--experiment: {self.path} holds a run of {max(there)} epochs; go on with --resume auto, or choose "
                "another --experiment"
            )
        return None

    def _newest(self, there: Mapping[int, Path], say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """The newest that is whole; a stopped epoch is newer than the finished ones before it."""
        errors = []
        stopped: tuple[Path, dict[str, Any]] | None = None
        if self.stopped.exists():
            try:
                stopped = self.stopped, load_run(self.stopped)
            except UsageError as error:
                errors.append(error)
                say(f"{error}; it is passed over")
        for number, path in sorted(there.items(), reverse=True):
            if stopped is not None and stopped[1]["epoch"] >= number:
                return stopped
            try:
                return path, load_run(path)
            except UsageError as error:
                errors.append(error)
                say(f"{error}; it is passed over")
        if stopped is None and errors:
            raise UsageError(
                f"--resume auto: none of the {len(errors)} checkpoints of {self.path} can be read ({errors[0]}); start "
                "anew with another --experiment"
            )
        return stopped

    def begin(
        self,
        options: argparse.Namespace,
        found: tuple[Path, dict[str, Any]] | None,
        columns: Sequence[str],
        say: Callable[[str], None],
    ) -> bool:
        """Make the folder the run's that goes on from a checkpoint, after all is checked.

        What later epochs, other options or another run have left is moved into a folder of the run, never deleted.

        Args:
            options: of `train.options`.
            found: the checkpoint and its state; None to start anew.
            columns: of the lines that `steps.csv` will get.
            say: takes a line that tells what was moved, and where to.

        Returns:
            Whether the history that the checkpoint knows is here: the lines of its epochs, and its best student.
            False also makes its state one that knows none.

        Raises:
            UsageError: a file cannot be written.
        """
        path, state = found or (self.path, {"epoch": 0, "updates": 0, "history": "", "students": {}, "batches": 0})
        with self._legible(), writing(self.path, "--output"):
            aside = _Aside(self.path)
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            epoch, folder = state["epoch"], path.resolve().parent
            own = found is None or folder == (self.path / "checkpoints").resolve()
            # of a file that was copied from elsewhere the run beside it may have the history
            runs = [self] if own else [self, RunDir(folder.parent)]
            rows = {run: [row for row in read_rows(run.summary) if _first(row) < epoch] for run in runs}
            source: RunDir | None = next((run for run in runs if chained(rows[run]) == state["history"]), None)
            students = self._students(state, [*([] if source is None else [source.path / "checkpoints"]), folder])
            whole = source is not None and students is not None
            past = source if whole else None
            kept = [] if past is None else rows[past]
            steps = [] if past is None else _steps_of(past.steps, state["updates"])
            making = [] if past is None else _steps_of(past.generator, state.get("synthetic", {}).get("steps", 0))
            # the newest first: what is left if that is interrupted is a run
            for number, checkpoint in sorted(self.checkpoints().items(), reverse=True):
                replaced = not own and (source is not self or (number == epoch and not state["batches"]))
                if number > epoch or replaced:
                    aside.move(checkpoint)
            if self.stopped.exists() and self.stopped.resolve() != path.resolve():
                aside.move(self.stopped)
            if _differs(self.summary, kept):
                aside.copy(self.summary)
                write_rows(self.summary, kept)
            # of other objectives, by options that have changed
            others = bool(steps) and list(steps[0]) != list(columns)
            for file, lines, other in ((self.steps, steps, others), (self.generator, making, False)):
                if other or _differs(file, lines):
                    if other or aside.files:  # else they are of an unfinished epoch, which takes the same steps again
                        aside.copy(file)
                    write_rows(file, [] if other else lines)
            self._show_images_of(past, epoch, aside)
            for file in (self.student, self.last_student):
                expected = state["students"].get(file.name) if whole else None
                if expected == _digest(file):
                    continue
                aside.move(file)
                if file == self.student:
                    aside.move(self.pictures)
                    aside.move(self.classes)
                if students is not None and file.name in students:
                    write_tensors(file, students[file.name], {"format": "pt"})
            if found is not None and not whole:
                state.update(history="", students={}, best=None)
            if not own:
                save_checkpoint(self.stopped if state["batches"] else self._checkpoint(epoch), state)
            self._settings(options, aside)
            if aside.files:
                aside.copy(self.report)
                say(f"what this run does not go on from is now in {aside.folder}: {', '.join(aside.files)}")
            if not whole:
                say(
                    f"--resume: the lines or the best student of the {epoch} epochs before {path} are not there: the "
                    "best is chosen among the epochs that follow"
                )
            return whole

    def _show_images_of(self, past: RunDir | None, epoch: int, aside: _Aside) -> None:
        """Have the pictures of a run's first epochs here, and no others."""
        known = {} if past is None else {self.picture(n): past.picture(n) for n in range(1, epoch + 1)}
        for file in sorted(self.synthetic.glob("*.png")):
            if known.get(file) != file:
                aside.move(file)
        for file, there in known.items():
            if file != there and there.exists():
                write_bytes(file, there.read_bytes())

    @contextmanager
    def _legible(self) -> Iterator[None]:
        try:
            yield
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(
                f"--experiment: summary.csv, steps.csv or generator.csv of {self.path} cannot be read ({error}); "
                "remove what is no line of numbers, or choose another --experiment"
            ) from error

    def _students(self, state: Mapping[str, Any], folders: Sequence[Path]) -> dict[str, dict[str, Tensor]] | None:
        """The exported students that a checkpoint knows, by file name, as far as they are not here but can be made.

        None if that of the best epoch is neither here nor can it be made.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for file in (self.student, self.last_student):
            expected = state["students"].get(file.name)
            if expected in (None, _digest(file)):
                continue
            epoch = state["epoch"]
            if file == self.student and state["best"] is not None:
                epoch = int(state["best"]["epoch"]) + 1
            for folder in folders:
                try:
                    held = load_run(folder / self._checkpoint(epoch).name)
                except UsageError:
                    continue
                weights = student_of(held)
                if digest_of(weights) == expected:
                    found[file.name] = weights
                    break
            else:
                if file == self.student:
                    return None
        return found

    def _settings(self, options: argparse.Namespace, aside: _Aside) -> None:
        """Write args.yaml and environment.json; earlier ones that differ are kept."""
        environment_file = self.path / "environment.json"
        text = as_json(environment(options), indent=2) + "\n"
        if environment_file.exists() and environment_file.read_text(encoding="utf-8") != text:
            aside.copy(environment_file)
        write_text(environment_file, text)
        now = plain(options)
        if self.args.exists() and any(
            _settings_in(self.args).get(key) != value for key, value in now.items() if key not in OUTSIDE
        ):
            aside.copy(self.args)
        write_text(self.args, yaml.safe_dump(now, sort_keys=False))

    def _checkpoint(self, epoch: int) -> Path:
        return self.path / "checkpoints" / f"epoch-{epoch:04d}.safetensors"

    def save(self, epoch: int, state: Mapping[str, Any], keep: int) -> Path:
        """Write a checkpoint, then remove those beyond `keep`, but for the best of those that stay."""
        path = self._checkpoint(epoch)
        save_checkpoint(path, dict(state))
        self._best[path] = _best_of(state)
        self.stopped.unlink(missing_ok=True)
        there = self.checkpoints()
        kept = list(there)[-max(keep, 1) :]
        best = {self._best_at(there[number]) for number in kept}
        for number, file in there.items():
            if number not in kept and number not in best:
                file.unlink()
        sync_folder(path.parent)
        return path

    def _best_at(self, path: Path) -> int | None:
        """Finished epochs at the best one that a checkpoint knows."""
        if path not in self._best:
            try:
                self._best[path] = _best_of(peek(path))
            except UsageError:  # damaged
                self._best[path] = None
        return self._best[path]

    def save_stopped(self, state: Mapping[str, Any]) -> None:
        """Write a checkpoint in the middle of an epoch; the next `save` removes it."""
        save_checkpoint(self.stopped, dict(state))

    def export(self, path: Path, student: Mapping[str, Tensor]) -> str:
        """The student's weights alone, as timm.create_model(..., checkpoint_path=...) reads them.

        Returns:
            Their `digest_of`.
        """
        with writing(path, "--output"):
            write_tensors(path, student, {"format": "pt"})
        return digest_of(student)

    def write_classes(self, told: Mapping[str, Any] | None) -> None:
        """What the best epoch's evaluation has found class by class; None if it has not."""
        if told is None:
            self.classes.unlink(missing_ok=True)
        else:
            write_text(self.classes, as_json(told) + "\n")

    def add_summary(self, row: Mapping[str, Any]) -> None:
        """One epoch's line; the file is rewritten, as an epoch may have columns of its own."""
        rows = [*read_rows(self.summary), {key: str(value) for key, value in row.items()}]
        write_rows(self.summary, rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The complete lines of a CSV file; none if it is not there.

    Raises:
        ValueError: it is no CSV, or no text.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        try:
            return [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
        except csv.Error as error:
            raise ValueError(str(error)) from error


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """A CSV file with all columns of the rows; no file without rows."""
    if rows:
        write_text(path, _as_csv(rows))
    else:
        path.unlink(missing_ok=True)


def _as_csv(rows: Sequence[Mapping[str, str]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _differs(path: Path, rows: Sequence[Mapping[str, str]]) -> bool:
    """Whether the file holds other lines, or one that was cut off."""
    held = path.read_text(encoding="utf-8") if path.exists() else ""
    return held != (_as_csv(rows) if rows else "")


def _steps_of(path: Path, count: int) -> list[dict[str, str]]:
    """The lines of the first steps in a file that has a line for each."""
    return [row for row in read_rows(path) if _first(row) < count]


def _first(row: Mapping[str, str]) -> float:
    """The epoch or step, counted from 0."""
    return float(next(iter(row.values())))


def chained(rows: Iterable[Mapping[str, Any]], history: str = "") -> str:
    """A sum over the lines of summary.csv, by which a checkpoint knows those of the epochs before it.

    Args:
        rows: in order; the time that it took does not count.
        history: the sum of the lines before them.
    """
    for row in rows:
        told = {key: str(value) for key, value in row.items() if not key.endswith("seconds") and str(value)}
        history = hashlib.sha256(f"{history} {sorted(told.items())}".encode()).hexdigest()
    return history


def student_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The student in a checkpoint's state, as it is exported: the averaged one where there is an average."""
    weights = state["ema"]["weights"] if "ema" in state else state["weights"]
    prefix = "student."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _best_of(state: Mapping[str, Any]) -> int | None:
    return None if state["best"] is None else int(state["best"]["epoch"]) + 1


def _settings_in(file: Path) -> dict[str, Any]:
    """What a YAML file holds; nothing if it is damaged."""
    try:
        return dict(parse_yaml(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        return {}


def _digest(file: Path) -> str | None:
    """Of an exported student; None without a file, and no digest at all if it is damaged."""
    try:
        return digest_of(load_file(file)) if file.exists() else None
    except (SafetensorError, OSError):
        return ""


def _remove_empty(folders: Iterable[Path]) -> None:
    """Those of a run that was refused."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


class _Aside:
    """A folder for what a run no longer stands on; made when there is something.

    Attributes:
        folder: where it is.
        files: what came into it, by their names in the run's directory.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        number = 1
        while (run / f"before-resume-{number}").exists():
            number += 1
        self.folder = run / f"before-resume-{number}"
        self.files: list[str] = []

    def move(self, file: Path) -> None:
        """A file or a folder of the run, if it is there."""
        if file.exists():
            os.replace(file, self._place(file))

    def copy(self, file: Path) -> None:
        """A file of the run that is about to be written anew, if it is there."""
        if file.exists():
            shutil.copyfile(file, self._place(file))

    def _place(self, file: Path) -> Path:
        name = file.relative_to(self._run)
        self.files.append(str(name))
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        return self.folder / name


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader of the results asks for; nothing that names the machine or its user."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        **versions(),
        "backend": dtokd_kernels.backend_info()["chosen for cuda" if cuda else "chosen for cpu"],
        "device": torch.cuda.get_device_name() if cuda and options.device != "cpu" else "CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.system(),
    }
