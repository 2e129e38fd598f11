"""Whether there is what only detection needs: found before anything is imported."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from ..errors import UsageError

NEEDED = ("pycocotools", "scipy", "transformers")


def check_installed(options: argparse.Namespace) -> None:
    """See the module.

    Raises:
        UsageError: a package is missing.
    """
    extra = "demo" if options.demo else "detect"
    missing = [name for name in (*NEEDED, *(("mlxtend",) if options.demo else ())) if find_spec(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} not installed; pip install 'dtokd-kernels[{extra}]'")
