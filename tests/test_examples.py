"""The examples run as they are started, train, and print what examples/README.md shows."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*_kd.py"))
#: What an example needs besides the package, if its name does not say so.
NEEDS = {"amp": "torch", "ddp": "torch", "pytorch": "torch"}
ACCURACY = re.compile(r"accuracy ([\d.]+)")


def shown(name):
    """The line that examples/README.md shows for an example."""
    (line,) = re.findall(rf"^\| `{name}` .*\| `([^`]*)` \|$", (ROOT / "examples/README.md").read_text(), re.MULTILINE)
    return line


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    name = path.stem.removesuffix("_kd")
    if find_spec(NEEDS.get(name, name)) is None:
        pytest.skip(f"{name} is not installed")
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if name == "ddp" else []
    command = [sys.executable, *start, path]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
        )
        # On a busy machine torch 2.14 may abort a rank that has finished: gloo's thread drops the last collective, with
        # the Python object that this holds, when Python has begun to end and gives its lock to no thread any more.
        if not (name == "ddp" and "terminate called without an active exception" in done.stderr):
            break
    assert done.returncode == 0, done.stderr
    assert "UserWarning: DTO" not in done.stderr
    assert float(ACCURACY.search(done.stdout)[1]) > 0.9  # chance is 0.1

    def words(text):
        """Without its numbers, which differ from machine to machine."""
        return re.sub(r"-?\d+(\.\d+)?", "N", text)

    assert words(shown(path.name)) in [words(line) for line in done.stdout.splitlines()]


def test_every_script_is_listed():
    listed = re.findall(r"^\| `(\w+\.py)`", (ROOT / "examples/README.md").read_text(), re.MULTILINE)
    assert [path.name for path in EXAMPLES] == sorted(listed)
