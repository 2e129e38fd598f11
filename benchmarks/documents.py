"""Figures in the documents: what stands between two comments of HTML is made from result rows."""

from __future__ import annotations


def replaced(text: str, begin: str, end: str, figures: str) -> str:
    """A document with the figures after `begin`, up to the next `end`, made anew.

    Args:
        text: of the document, in Markdown.
        begin, end: the comments, which stay.
        figures: what is to stand between them.

    Raises:
        ValueError: the document has no such place.
    """
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise ValueError(f"the document has no lines {begin!r} and {end!r}, between which the figures stand")
    gap = rest[: len(rest) - len(rest.lstrip("\n"))]  # in a paragraph, or one by itself
    return f"{before}{begin}{gap}{figures}{gap}{end}{after}"
