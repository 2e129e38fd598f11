"""Results as rows of a CSV file, with the machine they were measured on."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import dtokd_kernels

Row = dict[str, str]


@dataclass(frozen=True)
class Measurement:
    """One number with its spread.

    Attributes:
        kernel: what was measured: "step", "iteration" or "probe".
        provider: who did it.
        mode: under which conditions, such as "interior".
        metric, unit: "time" and "ms", for example.
        model: whose parameter shapes.
        values: the samples; the row holds their median and their 20 % and 80 % quantiles.
        config: anything else that matters.
        evidence: "measured-cpu", "measured-gpu", "counted" for what was not measured but read off the code, or "model".
    """

    kernel: str
    provider: str
    mode: str
    metric: str
    unit: str
    model: str
    values: Sequence[float]
    threads: int
    config: str = ""
    evidence: str = "measured-cpu"

    def row(self) -> Row:
        """The columns of the CSV file."""
        middle, low, high = quantiles(self.values)
        return {
            "kernel_name": self.kernel,
            "kernel_provider": self.provider,
            "kernel_operation_mode": self.mode,
            "metric_name": self.metric,
            "metric_unit": self.unit,
            "x_name": "model",
            "x_label": "parameter shapes of",
            "x_value": self.model,
            "y_value_50": f"{middle:.6g}",
            "y_value_20": f"{low:.6g}",
            "y_value_80": f"{high:.6g}",
            "extra_benchmark_config_str": self.config,
            "threads": str(self.threads),
            "evidence": self.evidence,
            **machine(),
        }


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile."""
    middle, low, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8]).double())
    return float(middle), float(low), float(high)


@cache
def machine() -> Row:
    """Where and with what the numbers were made."""
    return {
        "gpu_name": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": dtokd_kernels.__version__,
        "git_sha": _git_sha(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": (torch.version.cuda or "") if torch.cuda.is_available() else "",
        "cpu": _cpu(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _git_sha() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        described = subprocess.run(
            command, cwd=Path(dtokd_kernels.__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:  # no git
        return ""
    return described.stdout.strip()


def _cpu() -> str:
    """The CPU's name, its cores, and the instructions that the kernels use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    instructions = dtokd_kernels.backend_info()["instructions"]
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {instructions}"


def write(path: Path, measurements: Iterable[Measurement], kept: Iterable[Row] = ()) -> list[Row]:
    """Write the CSV file, with rows of an earlier one behind; returns its rows."""
    rows = [*(measurement.row() for measurement in measurements), *kept]
    write_rows(path, rows)
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the CSV file. A run that is killed meanwhile leaves the file of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file that `write` made."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
