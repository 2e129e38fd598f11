"""The C++ extension: loads it, remembers why it could not, and declares its operations to torch.

The functions here have the names and meanings of those in `reference`.
"""

from __future__ import annotations

missing: str | None = "not built"


def instructions() -> str:
    return "none"
