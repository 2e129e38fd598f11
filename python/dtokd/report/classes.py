"""Class by class: what a run's `classes.json` holds, as a table: a confusion matrix, or average precisions."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from .html import fold, table

#: Classes of a table without a matrix; the worst come first.
_ROWS = 200


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
        title = "Classes, the worst first"
        inner = _worst(told, "accuracy", "right", "{:.1f} %", "images") + _pairs(told)
    elif "ap" in told:
        title = "Average precision of each class, the worst first"
        inner = _worst(told, "ap", "AP", "{:.3f}", "objects")
    else:
        return ""
    return fold(f"{title} (best epoch, {int(told['epoch']) + 1})", inner, shown=True)


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
        right = f"{100 * row[i] / total:.1f} %" if total else ""
        lines.append(f"<tr><th>{escape(name)}</th>{cells}<td>{right}</td></tr>")
    return (
        "<p>Rows are the true classes, columns what the student predicts; the last column is the percentage right.</p>"
        f'<div class="scroll"><table><thead><tr><th></th>{heads}<th>right</th></tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(count: int, total: int, right: bool) -> str:
    if not count:
        return "<td></td>"
    shade = f"var(--s{int(not right)}) {round(70 * count / total)}%"
    return f'<td style="background: color-mix(in srgb, {shade}, transparent)">{int(count)}</td>'


def _worst(told: Mapping[str, Any], key: str, head: str, form: str, counted: str) -> str:
    """A line for each class: its value, and how many of what is counted it has."""
    names = _names(told, len(told[key]))
    known = sorted(row for row in zip(told[key], names, told[counted], strict=True) if row[0] is not None)
    rows = [(name, form.format(value), str(count)) for value, name, count in known[:_ROWS]]
    return table([("class", head, counted), *rows])


def _pairs(told: Mapping[str, Any]) -> str:
    names = _names(told, len(told["accuracy"]))
    rows = [(names[true], names[said], str(count)) for true, said, count in told.get("confused", ())]
    return "<p>Most often confused:</p>" + table([("true class", "taken for", "images"), *rows]) if rows else ""
