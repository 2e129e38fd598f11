"""Class by class: what a run's `classes.json` holds, as a table: a confusion matrix, or average precisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..texts import parse_json

#: Classes of a table without a matrix; the worst come first.
_ROWS = 200


def read_classes(path: Path) -> dict[str, Any]:
    """The file's content; nothing where there is none, or it is damaged: the report goes without."""
    try:
        held = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(held) if isinstance(held, Mapping) else {}


def classes_part(told: Mapping[str, Any]) -> str:
    """A part of the page that can be folded; "" if nothing is known."""
    try:
        return _part(told)
    except (KeyError, TypeError, ValueError, IndexError):  # changed by hand
        return ""


def _part(told: Mapping[str, Any]) -> str:
    if "matrix" in told:
        title, inner = "Which class is taken for which", _matrix(told)
    elif "accuracy" in told:
        title, inner = "Classes, the worst first", _accuracies(told) + _pairs(told)
    elif "ap" in told:
        title, inner = "Average precision of each class, the worst first", _precisions(told)
    else:
        return ""
    title += f" (best epoch, {int(told['epoch']) + 1})"
    return f"<details open><summary>{escape(title)}</summary>{inner}</details>"


def _names(told: Mapping[str, Any], count: int) -> list[str]:
    names = told.get("names")
    return [str(name) for name in names] if names and len(names) == count else [str(i) for i in range(count)]


def _matrix(told: Mapping[str, Any]) -> str:
    """Rows are true classes, columns predicted ones; the darker a cell, the larger its part of the row."""
    rows = told["matrix"]
    names = _names(told, len(rows))
    heads = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = []
    for i, (name, row) in enumerate(zip(names, rows, strict=True)):
        total = sum(row)
        cells = "".join(_cell(count, total, right=i == j) for j, count in enumerate(row))
        lines.append(f"<tr><th>{escape(name)}</th>{cells}<td>{_percent(row[i], total)}</td></tr>")
    return (
        "<p>Rows are the true classes, columns what the student says; the last column is the percentage right.</p>"
        f'<div class="scroll"><table><thead><tr><th></th>{heads}<th>right</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(count: int, total: int, right: bool) -> str:
    if not count:
        return "<td></td>"
    shade = f"var(--s{int(not right)}) {round(70 * count / total)}%"
    return f'<td style="background: color-mix(in srgb, {shade}, transparent)">{int(count)}</td>'


def _percent(count: float, total: float) -> str:
    return f"{100 * count / total:.1f} %" if total else ""


def _accuracies(told: Mapping[str, Any]) -> str:
    names = _names(told, len(told["accuracy"]))
    rows = sorted(
        (value, name, images)
        for value, name, images in zip(told["accuracy"], names, told["images"], strict=True)
        if value is not None
    )
    return _table(("class", "right", "images"), [(n, f"{v:.1f} %", str(i)) for v, n, i in rows[:_ROWS]])


def _pairs(told: Mapping[str, Any]) -> str:
    names = _names(told, len(told["accuracy"]))
    rows = [(names[true], names[said], str(count)) for true, said, count in told.get("confused", ())]
    return "<p>Most often confused:</p>" + _table(("true class", "taken for", "images"), rows) if rows else ""


def _precisions(told: Mapping[str, Any]) -> str:
    names = _names(told, len(told["ap"]))
    rows = sorted(
        (value, name, objects)
        for value, name, objects in zip(told["ap"], names, told["objects"], strict=True)
        if value is not None
    )
    return _table(("class", "AP", "objects"), [(n, f"{v:.3f}", str(o)) for v, n, o in rows[:_ROWS]])


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
