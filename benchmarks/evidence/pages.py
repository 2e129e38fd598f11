"""The tables in the documents: two summaries beside the conclusions, and a page with one table for each setting."""

from __future__ import annotations

from pathlib import Path

from ..documents import replaced
from . import tables
from .protocol import Run
from .students import Result

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "evidence.csv"
CONCLUSIONS, TABLES = ROOT / "docs" / "evidence.md", ROOT / "docs" / "evidence-tables.md"
#: Titles in `tables.parts` of what stands beside the conclusions.
SUMMARIES = ("summary", "bad teachers")


def written(done: dict[Run, Result]) -> dict[Path, str]:
    """Both documents with the tables of these runs.

    Raises:
        ValueError: a document has no place for its tables.
    """
    found = tables.parts(done)
    conclusions, page = CONCLUSIONS.read_text(encoding="utf-8"), TABLES.read_text(encoding="utf-8")
    for title in SUMMARIES:
        conclusions = replaced(conclusions, f"<!-- {title} -->", "<!-- end -->", found.pop(title))
    each = "\n\n".join(f"## {title}\n\n{table}" for title, table in found.items())
    return {CONCLUSIONS: conclusions, TABLES: replaced(page, "<!-- tables -->", "<!-- end -->", each)}
