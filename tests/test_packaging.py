"""Installing: with the extension, without a compiler, and what the package says of itself then."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import dtokd_kernels
from dtokd_kernels import libraries
from dtokd_kernels._version import built_from

ROOT = Path(__file__).parents[1]
VERSION = dtokd_kernels.__version__.encode()

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


def built(command, folder, **environment):
    """Runs a command of the build, with the programs of this environment."""
    environment = {**os.environ, **environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def tracked():
    """Files of this checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    if not listed:
        pytest.skip("not a git checkout")
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def unpacked(tracked, tmp_path_factory):
    """The sdist, unpacked: of a copy, so that nothing built in this checkout helps."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked:
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "copy" / name).write_bytes((ROOT / name).read_bytes())
    made = built(["setup.py", "--quiet", "sdist", "--dist-dir", folder], folder / "copy", DTOKD_BUILD="none")
    assert made.returncode == 0, made.stdout + made.stderr
    (archive,) = folder.glob("dtokd_kernels-*.tar.gz")
    shutil.unpack_archive(archive, folder / "unpacked")
    return next((folder / "unpacked").iterdir())


def install(unpacked, target, build):
    """An install from a copy of the sdist; `target`."""
    copy = shutil.copytree(unpacked, target.with_name(f"{target.name}-source"))
    made = built(
        ["-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--target", target, copy],
        copy.parent,
        DTOKD_BUILD=build,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    return target


@pytest.fixture(scope="module")
def compiled(unpacked, tmp_path_factory):
    """An install with the CPU extension, for tests that leave it as it is."""
    return install(unpacked, tmp_path_factory.mktemp("compiled") / "site", "cpu")


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


def test_sdist_has_what_the_checkout_has(tracked, unpacked):
    """Whatever git tracks, but what belongs to the repository's host and to git."""
    found = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    left_out = {name for name in tracked if name.startswith((".ci/", ".github/", ".gitignore", ".readthedocs"))}
    assert set(tracked) - left_out <= found
    made = {name for name in found - set(tracked) if ".egg-info/" not in name}
    assert made == {"PKG-INFO", "setup.cfg"}


def test_pure_python_install_works_through_the_reference(unpacked, tmp_path):
    target = install(unpacked, tmp_path / "site", "none")
    where, chosen, why = run(target, STEP)
    assert where.startswith(str(target))
    assert chosen == "reference (best available)"
    assert "it was not built" in why
    # all packages of the checkout, and their data
    for root in (ROOT, ROOT / "python"):
        for package in ("dtokd_kernels", "dtokd"):
            for path in (root / package).rglob("*"):
                if path.suffix in (".py", ".yaml", ".typed"):
                    assert (target / path.relative_to(root)).is_file(), path
    assert {path.name for path in target.iterdir() if path.is_dir()} == {
        "dtokd_kernels", "dtokd", "bin", f"dtokd_kernels-{dtokd_kernels.__version__}.dist-info"
    }  # fmt: skip
    refused = "import dtokd_kernels as dk\ntry:\n dk.use_backend('cpu').__enter__()\nexcept RuntimeError as e: print(e)"
    assert "backend 'cpu' is not available" in run(target, refused)[0]


def test_install_with_the_extension(compiled):
    where, chosen, why = run(compiled, STEP)
    assert where.startswith(str(compiled))
    assert (chosen, why) == ("cpu (best available)", "available")
    assert "reference (forced" in run(compiled, STEP, DTOKD_BACKEND="reference")[1]


def test_extension_says_what_it_was_built_from(compiled):
    """In an install the version, in a checkout a digest of its sources too."""
    version = dtokd_kernels.__version__
    assert libraries.version_of(next(compiled.glob("dtokd_kernels/_C*"))).startswith(f"{version}+")
    assert built_from(ROOT / "csrc").startswith(f"{version}+")
    assert built_from(ROOT / "no such folder") == version


def test_extension_of_other_sources_is_not_loaded(compiled, tmp_path):
    """In a checkout: the version is the same, a source is not."""
    checkout = tmp_path / "checkout"
    shutil.copytree(compiled / "dtokd_kernels", checkout / "dtokd_kernels")
    shutil.copytree(ROOT / "csrc", checkout / "csrc")
    why = (
        "import warnings\nwarnings.simplefilter('ignore')\nimport dtokd_kernels as dk\nprint(dk.backend_info()['cpu'])"
    )
    assert run(checkout, why) == ["available"]
    (checkout / "csrc/cpu/lists.h").write_text("// another\n")
    (said,) = run(checkout, why)
    assert "was built from version 0." in said
    assert "setup.py build_ext --inplace" in said


def test_version_is_compiled_into_one_file(unpacked, tmp_path):
    """So that a change of one source does not compile the others again."""
    copy = shutil.copytree(unpacked, tmp_path / "copy")
    code = "import setuptools, json; setuptools.setup = lambda **given: print(json.dumps([vars(m) for m in "
    code += "given['ext_modules']], default=str)); exec(open('setup.py').read(), {'__file__': 'setup.py'})"
    seen = []
    for _ in range(2):
        made = built(["-c", code], copy, DTOKD_BUILD="cpu")
        assert made.returncode == 0, made.stderr
        versions = [path for path in copy.glob("build/**/*.cpp") if built_from(copy / "csrc") in path.read_text()]
        (where,) = (path.relative_to(copy).as_posix() for path in versions)
        seen.append(made.stdout)
        assert where in made.stdout
        header = copy / "csrc/include/dtokd/balance.h"
        header.write_text(header.read_text() + "\n")
    assert seen[0] == seen[1]


def test_digest_changes_with_the_sources(tmp_path):
    copy = Path(shutil.copytree(ROOT / "csrc", tmp_path / "csrc"))
    before = built_from(copy)
    assert before == built_from(ROOT / "csrc")
    header = copy / "include/dtokd/balance.h"
    header.write_text(header.read_text() + "\n")
    assert built_from(copy) != before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: b.replace(b"dtokd-version:0.", b"dtokd-version:9."), "was built from version 9."),
        (lambda b: b.replace(b"dtokd-version:", b"something-else"), "was built from version unknown"),
        (lambda b: b[: len(b) // 3], "was built from version unknown"),
        (lambda b: b"", "was built from version unknown"),
        (lambda b: b"dtokd-version:" + VERSION + b"\0", "does not load"),
    ],
    ids=["stale", "without-a-version", "half-written", "empty", "no-library"],
)
def test_extension_of_another_version_is_not_loaded(compiled, tmp_path, change, says):
    target = Path(shutil.copytree(compiled, tmp_path / "site"))
    (library,) = target.glob("dtokd_kernels/_C*")
    content = library.read_bytes()
    library.write_bytes(change(content))
    caught = "import warnings\nwith warnings.catch_warnings(record=True) as caught:\n import dtokd_kernels\n"
    warned, chosen = run(
        target,
        f"{caught}print(*[w.message for w in caught if issubclass(w.category, RuntimeWarning)])\n"
        "print(dtokd_kernels.backend_info()['chosen for cpu'])",
    )
    assert warned.startswith("dtokd_kernels runs without its extension: ")
    assert says in warned
    assert "build it again" in warned
    assert chosen == "reference (best available)"


def pretended_torch(folder, version):
    """A torch that has a version and nothing else, or fails as if there were none."""
    (folder / "torch").mkdir()
    missing = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    (folder / "torch/__init__.py").write_text(f"__version__ = {version!r}" if version else missing)
    return folder


@pytest.mark.parametrize(
    ("torch", "says"),
    [
        ("2.9.1+cpu", "dtokd-kernels needs torch 2.10 or newer, this is 2.9.1+cpu: pip install 'torch>=2.10'"),
        (None, "dtokd-kernels needs torch, which is not installed: pip install 'torch>=2.10'"),
    ],
)
def test_old_or_missing_torch_is_refused(tmp_path, torch, says):
    code = (
        f"import sys; sys.path[:0] = [{str(pretended_torch(tmp_path, torch))!r}, {str(ROOT)!r}]\nimport dtokd_kernels"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"ImportError: {says}"
    build = built(
        ["-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[:] = ['setup.py', '--version']; "
         "exec(open('setup.py').read(), {'__file__': 'setup.py', '__name__': '__main__'})"],
        ROOT,
        DTOKD_BUILD="cpu",
    )  # fmt: skip
    assert build.returncode == 1
    assert f"cannot build the CPU extension: {says} in the environment of the build" in build.stderr


def test_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 7, "final", 0))
    with pytest.raises(ImportError, match=r"needs Python 3\.10 or newer, this is 3\.9: install it for a newer Python"):
        runpy.run_path(str(ROOT / "dtokd_kernels/_supported.py"))


@pytest.mark.parametrize(
    ("compiler", "says"),
    [("no-such-compiler", "no-such-compiler is not on the PATH"), ("false", "does not take -std=c++20")],
)
def test_build_without_a_compiler_names_the_remedy(compiler, says):
    refused = built(["setup.py", "--version"], ROOT, DTOKD_BUILD="cpu", CXX=compiler)
    assert refused.returncode == 1
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("DTOKD_BUILD")]
    assert line.startswith("DTOKD_BUILD=cpu cannot build the CPU extension: ")
    assert says in line
    assert "CXX" in line
    allowed = built(["setup.py", "--version"], ROOT, DTOKD_BUILD="auto", CXX=compiler)
    assert allowed.returncode == 0
    assert "dtokd: no CPU extension: " in allowed.stdout
    assert says in allowed.stdout


def test_build_on_another_platform_names_the_remedy():
    """On Windows there is no extension, and the package installs without it."""
    code = "import sys; sys.platform = 'win32'; sys.argv[:] = ['setup.py', '--version']; "
    code += "exec(open('setup.py').read(), {'__file__': 'setup.py', '__name__': '__main__'})"
    refused = built(["-c", code], ROOT, DTOKD_BUILD="cpu")
    assert refused.returncode == 1
    remedy = "it is not built on Windows; the package runs without it (DTOKD_BUILD=none)"
    assert refused.stderr.splitlines()[-1] == f"DTOKD_BUILD=cpu cannot build the CPU extension: {remedy}"
    allowed = built(["-c", code], ROOT, DTOKD_BUILD="auto")
    assert allowed.returncode == 0
    assert f"dtokd: no CPU extension: {remedy}" in allowed.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_refuses_an_old_python_before_it_installs(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text(f"#!{sys.executable}\nimport sys\nsys.version_info = (3, 9, 7)\nexec(sys.argv[2])\n")
    old.chmod(0o755)
    made = subprocess.run(
        ["make", f"PYTHON={old}", f"VENV={tmp_path}/venv", f"{tmp_path}/venv/base"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 2
    assert made.stderr.startswith("Python 3.9 is too old: pass one that is 3.10 or newer, such as PYTHON=python3.12\n")
    assert not (tmp_path / "venv").exists()


#: Extras that nothing imports: the newest does.
TOOLS = ("lint", "docs", "dist")


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
    asked += [text for name, group in groups.items() if name not in TOOLS for text in group]
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
def test_cuda_extension_compiles_links_and_loads_without_a_gpu(unpacked, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")  # one architecture: the others take as long again
    target = install(unpacked, tmp_path / "site", "cuda")
    says = "import torch, dtokd_kernels as dk\nprint(dk.backend_info()['cuda'])\n"
    says += "print(torch.ops.dtokd.combine_.default.has_kernel_for_dispatch_key('CUDA'))"
    why, op = run(target, says)
    assert why in ("available", "torch sees no CUDA device")
    assert op == "True"


def test_version_stands_in_one_place():
    """The files that cannot compute it agree with dtokd_kernels/_version.py; the changelog has its section."""
    version = dtokd_kernels.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
