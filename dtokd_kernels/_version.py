"""The version: of the package, and of what a compiled extension was built from. setup.py runs this file by itself."""

import hashlib
from pathlib import Path

__version__ = "0.1.0"


def built_from(csrc: Path) -> str:
    """What an extension built now would call itself: the version, and a digest of the sources.

    Args:
        csrc: the folder of the C++ sources; without one, as in an installed package, the version alone.
    """
    if not (csrc / "torch/version.cpp").is_file():
        return __version__
    folders = [csrc / name for name in ("cpu", "cuda", "include", "torch")]
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"
