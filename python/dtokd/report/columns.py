"""The numbers of a run's CSV files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UsageError
from ..train.rundir import read_rows


def read_columns(path: Path, expected: Sequence[str] = ()) -> dict[str, list[float]]:
    """A run's CSV file of numbers, by column; a cell that is empty is NaN. Empty if there is no file.

    Args:
        path: the file.
        expected: columns that it has in any case.

    Raises:
        UsageError: it is damaged, or another file.
    """
    try:
        rows = read_rows(path)
        columns = {key: [float(row[key] or "nan") for row in rows] for key in (rows[0] if rows else {})}
        if rows and (absent := [name for name in expected if name not in columns]):
            raise ValueError(f"it has no column {absent[0]!r}")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} does not hold the numbers of a run: {error}; remove what is no number") from error
    return columns


def over_steps(steps: Mapping[str, Sequence[float]], prefix: str) -> dict[str, list[tuple[float, float]]]:
    """The columns that begin so, by the rest of their names, as points over "step"."""
    return {
        name.removeprefix(prefix): list(zip(steps["step"], values, strict=True))
        for name, values in steps.items()
        if name.startswith(prefix)
    }
