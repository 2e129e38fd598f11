"""A log of balanced steps that never makes the device wait in between: kept as tensors, written every n steps."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor

from dtokd_kernels import Balance
from dtokd_kernels.balanced import Balanced

from .lopsided import LopsidedWeights, may_be_lopsided

Row = dict[str, float]


class Sink(Protocol):
    """Where a `BalanceLogger` writes to."""

    def write(self, rows: Sequence[Row], means: Row) -> None:
        """Take the rows of some steps, one each, and their means; both have a column "step"."""

    def close(self) -> None:
        """Called once, at the end."""


class BalanceLogger:
    """Logs conflict, dominance, weights, ||d|| and skipped steps, and scalars of your own.

    Columns of a step, for objectives named task and distill: step, weight_task, weight_distill, norm_task, norm_distill
    (of the raw gradients), share_task, share_distill (each objective's part of the sum of the norms of the gradients as
    they are multiplied for the update), cosine_task_distill, conflict (some cosine is negative), dominance (norm of the
    second objective over that of the first), vertex (some weight is exactly 0), norm (of the combined direction, before
    clipping), skipped. Means, over the steps of a flush that were not skipped: conflict_rate, vertex_rate, dominance
    (the geometric mean), the mean of every other column; skip_rate is over all steps, step the last one.

    Args:
        sinks: where to write: `CSV`, `TensorBoard`, `WandB`, or anything with `write` and `close`.
        every: steps from one flush to the next.
        optimizer: a balanced optimizer; its steps are then logged without a call, and there is a UserWarning if exact
            DTO gives nearly all of the gradient to one objective (in other loops add the sink `LopsidedWeights`).
        step: number of the first step, when training goes on.

    Effects: a step costs one small operation on the device and no wait; a flush one copy to the host. Use it as a
        context manager, or call `close`: what is left is written then, after an exception too.

    Raises:
        ValueError: `every` is not positive.

    Example:
        >>> import torch, dtokd_kernels as dk
        >>> w = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = dk.DTOSGD([w], lr=0.1)
        >>> with BalanceLogger([CSV("balance.csv")], every=50, optimizer=optimizer) as logger:
        ...     for _ in range(120):
        ...         optimizer.backward({"task": w.square().sum() + 1, "distill": (w - 2).square().sum() + 1})
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """

    def __init__(
        self, sinks: Sequence[Sink], every: int = 50, optimizer: Balanced | None = None, step: int = 0
    ) -> None:
        if every < 1:
            raise ValueError(f"BalanceLogger: every is {every}; pass a positive number of steps, such as 50")
        self._every, self._step = every, step
        self._names: tuple[str, ...] = ()
        self._extra: tuple[str, ...] = ()
        self._kept: list[Tensor] = []
        self._closing = ExitStack()
        if optimizer is not None and may_be_lopsided(optimizer.weighting):
            sinks = [*sinks, LopsidedWeights()]
        for sink in sinks:
            self._closing.callback(sink.close)
        self._sinks = tuple(sinks)
        self._closed = False
        if optimizer is not None:
            handle = optimizer.register_step_post_hook(lambda stepped, args, kwargs: self._after_step(stepped))
            self._closing.callback(handle.remove)

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert isinstance(optimizer, Balanced)
        if optimizer.balance is None:  # a step of torch.distributed.checkpoint, which only makes the state
            return
        self.log(optimizer.balance)

    @torch.no_grad()
    def log(self, balance: Balance, **scalars: Tensor) -> None:
        """Keep one step; writes if it is the `every`-th.

        Args:
            balance: the step's record.
            scalars: more columns: scalar tensors on the record's device, the same ones in each step.

        Raises:
            ValueError: other objectives or columns than before. Nothing is lost by it.
            RuntimeError: the logger is closed.
        """
        if self._closed:
            raise RuntimeError("BalanceLogger.log: the logger is closed; log inside its with block")
        K = len(balance.weights)
        names = balance.names or tuple(map(str, range(K)))
        extra = tuple(scalars)
        if (self._names or names) != names or (self._names and self._extra != extra):
            raise ValueError(
                f"BalanceLogger.log: objectives and columns are {[*names, *extra]}, but were "
                f"{[*self._names, *self._extra]}; log other ones with another logger"
            )
        if not self._names:
            # of steps, and of their means
            columns = [*columns_of(names), *extra, "conflict_rate", "vertex_rate", "skip_rate"]
            if twice := sorted({name for name in columns if columns.count(name) > 1}):
                raise ValueError(f"BalanceLogger.log: columns {twice} would stand twice; rename objectives or scalars")
        self._names, self._extra = names, extra
        # one operation, into memory of its own: a captured graph writes its record anew in each replay
        several = [balance.weights, balance.norms, balance.coefficients, balance.gram]
        single = [balance.norm, balance.vertex, balance.skipped, *scalars.values()]
        self._kept.append(torch.cat([t.detach().reshape(-1) for t in (*several, *single)]))
        self._step += 1
        if len(self._kept) == self._every:
            self.flush()

    def flush(self) -> None:
        """Write what is kept, now; on several ranks the first one does, as all take the same steps."""
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank():
            self._kept.clear()
        if not self._kept:
            return
        values = torch.stack(self._kept).cpu().double().tolist()  # the one copy, and the one wait
        first = self._step - len(values)
        self._kept = []
        rows = [{"step": first + i, **dict(_named(row, self._names, self._extra))} for i, row in enumerate(values)]
        means = means_of(rows)
        for sink in self._sinks:
            sink.write(rows, means)

    def close(self) -> None:
        """Write what is left and close the sinks; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        with self._closing:
            self.flush()

    def __enter__(self) -> BalanceLogger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def columns_of(names: Sequence[str]) -> list[str]:
    """The columns of a step with objectives of these names, without scalars of your own."""
    K = len(names)
    return ["step", *(name for name, _ in _named([0.0] * (3 * K + K * K + 3), names))]


def _named(values: Sequence[float], names: Sequence[str], extra: Sequence[str] = ()) -> Iterator[tuple[str, float]]:
    """The columns of a kept step."""
    K = len(names)
    weights, norms, coefficients = values[:K], values[K : 2 * K], values[2 * K : 3 * K]
    gram = values[3 * K : 3 * K + K * K]
    norm, vertex, skipped, *scalars = values[3 * K + K * K :]
    lengths = [abs(c) * n for c, n in zip(coefficients, norms, strict=True)]
    pairs = [(i, j) for i in range(K) for j in range(i + 1, K)]
    products = [gram[i * K + j] for i, j in pairs]
    yield from zip([f"weight_{name}" for name in names], weights, strict=True)
    yield from zip([f"norm_{name}" for name in names], norms, strict=True)
    for name, length in zip(names, lengths, strict=True):
        yield f"share_{name}", _ratio(length, sum(lengths))
    for (i, j), product in zip(pairs, products, strict=True):
        yield f"cosine_{names[i]}_{names[j]}", _ratio(product, norms[i] * norms[j])
    unmeasured = any(math.isnan(product) for product in products)
    yield "conflict", math.nan if unmeasured else float(any(product < 0 for product in products))
    if K > 1:
        yield "dominance", _ratio(norms[1], norms[0])
    yield from (("vertex", vertex), ("norm", norm), ("skipped", skipped))
    yield from zip(extra, scalars, strict=True)


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def means_of(rows: Sequence[Row]) -> Row:
    """The means of some steps: see `BalanceLogger`."""
    taken = [row for row in rows if not row["skipped"]]

    def mean(name: str) -> float:
        values = [row[name] for row in taken]
        if name == "dominance":
            logs = [-math.inf if v == 0 else math.log(v) for v in values]
            return math.exp(math.fsum(logs) / len(logs)) if logs else math.nan
        return sum(values) / len(values) if values else math.nan

    renamed = {"conflict": "conflict_rate", "vertex": "vertex_rate"}
    means = {renamed.get(n, n): mean(n) for n in rows[0] if n not in ("step", "skipped")}
    return {"step": rows[-1]["step"], **means, "skip_rate": sum(row["skipped"] for row in rows) / len(rows)}


class CSV:
    """One line per step, or per flush.

    Args:
        path: the file; its directory is made. It is written anew, or goes on with `append`.
        means: write the means of each flush instead of the steps.
        append: keep the lines that are there (their columns must be the same).
    """

    def __init__(self, path: str | Path, means: bool = False, append: bool = False) -> None:
        self._path, self._means, self._append = Path(path), means, append
        self._file: TextIO | None = None

    def write(self, rows: Sequence[Row], means: Row) -> None:
        """Append the lines, and have them on disk.

        Raises:
            ValueError: the file that is there has other columns.
        """
        lines = [means] if self._means else rows
        if self._file is None:
            self._open(list(lines[0]))
        assert self._file is not None
        writer = csv.writer(self._file, lineterminator="\n")
        writer.writerows([f"{value:.9g}" for value in line.values()] for line in lines)
        self._file.flush()

    def _open(self, columns: list[str]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        goes_on = self._append and self._path.exists() and self._path.stat().st_size > 0
        if goes_on:
            with self._path.open(newline="") as file:
                there = next(csv.reader(file))
            if there != columns:
                raise ValueError(f"CSV: {self._path} has the columns {there}, expected {columns}; choose another path")
        self._file = self._path.open("a" if goes_on else "w", newline="")
        if not goes_on:
            csv.writer(self._file, lineterminator="\n").writerow(columns)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class TensorBoard:
    """Steps as scalars `dto/<column>`, means as `dto_mean/<column>`.

    Args:
        directory: of the run.
        first: the first step to come; what an earlier process wrote of this step and later ones is hidden.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, directory: str | Path, first: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard: the package is not installed; pip install tensorboard") from error
        self._writer: Any = SummaryWriter(str(directory), purge_step=first)

    def write(self, rows: Sequence[Row], means: Row) -> None:
        """Add the scalars at their steps."""
        for prefix, lines in (("dto", rows), ("dto_mean", [means])):
            for line in lines:
                for name, value in line.items():
                    if name != "step":
                        self._writer.add_scalar(f"{prefix}/{name}", value, int(line["step"]))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add others, under names of their own, and have them on disk."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the writer; a second call does nothing."""
        self._writer.close()


class WandB:
    """The means of each flush as `dto/<column>`, over an axis of their own, `dto/step`.

    W&B drops values of a step that lies behind the last one logged, as these would be beside your own calls.

    Args:
        run: what `wandb.init` returned; default: the current run. It stays open.

    Raises:
        ImportError: wandb is not installed.
        RuntimeError: there is no run.
    """

    def __init__(self, run: Any = None) -> None:
        if run is None:
            try:
                import wandb
            except ImportError as error:
                raise ImportError("WandB: the package is not installed; pip install wandb") from error
            run = wandb.run
        if run is None:
            raise RuntimeError("WandB: there is no run; call wandb.init() first, or pass run=")
        self._run = run
        self._run.define_metric("dto/*", step_metric="dto/step")

    def write(self, rows: Sequence[Row], means: Mapping[str, float]) -> None:
        """Log the means."""
        self._run.log({f"dto/{name}": value for name, value in means.items()})

    def close(self) -> None:
        """Nothing: the run is its owner's."""
