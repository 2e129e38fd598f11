"""Installing: with the extension, without a compiler, and what the package says of itself then."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]

STEP = """
import torch, dtokd_kernels as dk
p = torch.nn.Parameter(torch.ones(3))
optimizer = dk.DTOAdamW([p], lr=0.1)
optimizer.backward({"task": (p - 2).square().sum(), "distill": (p + 1).square().sum()})
optimizer.step()
assert not torch.equal(p, torch.ones(3))
print(dk.__file__)
print(dk.backend_info()["chosen for cpu"])
print(dk.backend_info()["cpu"])
"""


def install(tmp_path, build):
    """A plain install of a copy of the sources, so that nothing built in this checkout helps."""
    tracked = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    if not tracked:
        pytest.skip("not a git checkout")
    copy, target = tmp_path / "copy", tmp_path / "site"
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    environment = {**os.environ, "DTOKD_BUILD": build}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    result = subprocess.run(
        [*command, "--target", target, copy], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return target


def run(target, code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(target)!r})\n{code}"],
        cwd=target,
        env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


def test_pure_python_install_works_through_the_reference(tmp_path):
    target = install(tmp_path, "none")
    where, chosen, why = run(target, STEP)
    assert where.startswith(str(target))
    assert chosen == "reference (best available)"
    assert "it was not built" in why
    assert (target / "dtokd_kernels" / "py.typed").exists()
    assert (target / "dtokd" / "cli.py").exists()
    refused = "import dtokd_kernels as dk\ntry:\n dk.use_backend('cpu').__enter__()\nexcept RuntimeError as e: print(e)"
    assert "backend 'cpu' is not available" in run(target, refused)[0]


def test_install_with_the_extension(tmp_path):
    target = install(tmp_path, "cpu")
    where, chosen, why = run(target, STEP)
    assert where.startswith(str(target))
    assert (chosen, why) == ("cpu (best available)", "available")
    assert "reference (forced" in run(target, STEP, DTOKD_BACKEND="reference")[1]


def bounds(requirements):
    """Name -> lower bound."""
    found = {}
    for text in requirements:
        requirement = Requirement(text)
        if requirement.name != "dtokd-kernels":
            (only,) = requirement.specifier  # each has one, and nothing else
            bound = only.operator, Version(only.version)
            assert found.setdefault(requirement.name, bound) == bound, text
    return found


def test_lower_bounds_are_versions_that_were_run():
    """What pyproject.toml allows is what constraints-oldest.txt names, and that is whole."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["project"]["optional-dependencies"]
    asked = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    asked += [text for name, group in groups.items() if name != "lint" for text in group]
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    run = bounds(line for line in lines if line and not line.startswith("#"))
    named = bounds(asked)
    assert {operator for operator, _ in named.values()} == {">="}
    assert {name: version for name, (_, version) in named.items()} == {
        name: version for name, (_, version) in run.items() if name != "pyparsing"
    }
    assert {operator for operator, _ in run.values()} == {"=="}


def test_unknown_build_is_refused():
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "DTOKD_BUILD": "gpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "choose one of auto, cpu, cuda, none" in result.stderr


def test_kernels_do_not_import_the_toolkit():
    code = "import dtokd_kernels, sys; print([m for m in ('dtokd', 'timm', 'numpy.testing') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cuda_extension_compiles_links_and_loads_without_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")  # one architecture: the others take as long again
    target = install(tmp_path, "cuda")
    says = "import torch, dtokd_kernels as dk\nprint(dk.backend_info()['cuda'])\nprint(torch.ops.dtokd_cuda.combine_)"
    why, op = run(target, says)
    assert why in ("available", "torch sees no CUDA device")
    assert "combine_" in op
