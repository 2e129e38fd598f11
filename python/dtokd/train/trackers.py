"""Weights & Biases and MLflow: both optional packages, which get what TensorBoard gets."""

from __future__ import annotations

import argparse
import importlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import UsageError, reason_of
from ..monitor import Row, Sink, TensorBoard, WandB
from .options import flag, plain


class Tracker(Sink, Protocol):
    """A `monitor.Sink` that also takes an epoch's numbers."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """An epoch's losses, evaluation and learning rate, where its last step is."""


class WandBRun(WandB):
    """A run of Weights & Biases, which a resumed run goes on with.

    Args:
        run: the run's directory; its folder names the project.
        options: of the run, for the run's configuration.

    Raises:
        UsageError: the package is not installed, or the run cannot be started.
    """

    def __init__(self, run: Path, options: argparse.Namespace) -> None:
        wandb = _load("wandb", "log_wandb")
        try:
            started = wandb.init(
                project=_named_project("WANDB_PROJECT", run),
                name=run.name,
                id=_id(run),
                resume="allow",
                dir=str(run),
                config=plain(options),
            )
        except Exception as error:  # of the network, the account, the service
            raise UsageError(
                f"--log-wandb: the run cannot be started: {reason_of(error)}; WANDB_MODE=offline needs no account"
            ) from error
        super().__init__(started)
        self._run.define_metric("epoch/*", step_metric="epoch/step")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Over an axis of their own, as W&B drops values of a step that lies behind the last one logged."""
        self._run.log({f"epoch/{name}": value for name, value in values.items()} | {"epoch/step": step})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class MLflowRun:
    """A run of MLflow, which a resumed run goes on with; it is kept where MLFLOW_TRACKING_URI points.

    Args:
        run: the run's directory; its folder names the experiment.
        options: of the run, as parameters.

    Raises:
        UsageError: the package is not installed, or the run cannot be started.
    """

    def __init__(self, run: Path, options: argparse.Namespace) -> None:
        self._mlflow = _load("mlflow", "log_mlflow")
        note = run / "mlflow.txt"
        try:
            self._mlflow.set_experiment(_named_project("MLFLOW_EXPERIMENT_NAME", run))
            if note.exists():
                self._mlflow.start_run(run_id=note.read_text(encoding="utf-8").strip())
            else:
                started = self._mlflow.start_run(run_name=run.name)
                note.write_text(f"{started.info.run_id}\n", encoding="utf-8")
                # a value of a parameter stays as it was, and is not longer than 500 characters
                self._mlflow.log_params({key: str(value)[:500] for key, value in plain(options).items()})
        except Exception as error:  # of the network, the account, the service
            raise UsageError(
                f"--log-mlflow: the run cannot be started: {reason_of(error)}; MLFLOW_TRACKING_URI names another place"
            ) from error

    def write(self, rows: Sequence[Row], means: Mapping[str, float]) -> None:
        """Log the means of some balanced steps as dto/NAME."""
        values = {f"dto/{name}": value for name, value in means.items() if name != "step"}
        self._mlflow.log_metrics(values, step=int(means["step"]))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Under their own names."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


def open_trackers(run: Path, options: argparse.Namespace, step: int, say: Callable[[str], None]) -> list[Tracker]:
    """Those that the options ask for.

    Args:
        run: the directory.
        options: log_tensorboard, log_wandb, log_mlflow.
        step: the first to come.
        say: takes a line where TensorBoard, which is on by default, is not installed.

    Raises:
        UsageError: a package that was asked for is not installed, or cannot start.
    """
    opened: list[Tracker] = []
    if options.log_tensorboard:
        try:
            opened.append(TensorBoard(run / "tensorboard", first=step))
        except ImportError as error:
            say(f"--log-tensorboard: {error}")
    if options.log_wandb:
        opened.append(WandBRun(run, options))
    if options.log_mlflow:
        opened.append(MLflowRun(run, options))
    return opened


def check_installed(options: argparse.Namespace) -> None:
    """Raises UsageError: a package that the options ask for is not installed. Before anything else is done."""
    for package in ("wandb", "mlflow"):
        if getattr(options, f"log_{package}"):
            _load(package, f"log_{package}")


def _load(package: str, option: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(
            f"{flag(option)}: the package {package} cannot be imported ({reason_of(error)}); pip install {package}, or "
            "leave the option out"
        ) from error


def _named_project(variable: str, run: Path) -> str:
    return os.environ.get(variable) or run.absolute().parent.name or "dtokd"


def _id(run: Path) -> str:
    """The run's own: in a file, so that a resumed run has it, and another one of the same name has not."""
    note = run / "wandb.txt"
    if not note.exists():
        note.write_text(f"{uuid.uuid4().hex[:12]}\n", encoding="utf-8")
    return note.read_text(encoding="utf-8").strip()
