"""Builds the operations beside the pure-Python packages (pyproject.toml has the rest): dtokd_kernels._C for the CPU
and dtokd_kernels._cuda for GPUs.

DTOKD_BUILD says what to build: "auto" (the default: what can be built; without a compiler or without torch at
build time a pure-Python package), "cpu" (_C, or fail), "cuda" (both, or fail), "none" (pure Python). Building _cuda
takes nvcc and no GPU; TORCH_CUDA_ARCH_LIST says for which, by default for those that are visible, else for 8.0, 8.6,
9.0, 10.0, 10.3, 12.0, as far as nvcc knows them, and, as PTX, later ones.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CHOICES = ("auto", "cpu", "cuda", "none")
ARCHITECTURES = ("8.0", "8.6", "9.0", "10.0", "10.3", "12.0")
VERSION = runpy.run_path(str(ROOT / "dtokd_kernels/_version.py"))["built_from"](ROOT / "csrc")


VERSION_SOURCE = "torch/version.cpp"


def sources(*kinds: str) -> list[str]:
    """Paths of csrc/sources.txt of these kinds, with the version in the one file that has it.

    As a macro on the command line it would have all files compiled again when one changes.
    """
    lines = (line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines() if line[:1] not in ("", "#"))
    with_version = Path("build/version/version.cpp")
    text = f'#define DTOKD_VERSION "{VERSION}"\n#include "{VERSION_SOURCE}"\n'
    if not (ROOT / with_version).is_file() or (ROOT / with_version).read_text() != text:
        (ROOT / with_version).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / with_version).write_text(text)
    return [str(with_version) if path == VERSION_SOURCE else f"csrc/{path}" for kind, path in lines if kind in kinds]


def cuda_home() -> str | None:
    """The toolkit that nvcc belongs to, asked of nvcc itself, as the one on the PATH may be a wrapper elsewhere."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    where = re.search(r"_HERE_=(\S+)", said.stderr + said.stdout)
    return str(Path(where[1]).parent) if where else None


def architectures() -> str:
    """Those of ARCHITECTURES that nvcc knows, the last as PTX too, for TORCH_CUDA_ARCH_LIST."""
    listed = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout.split()
    known = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in listed]
    return ";".join(known or ARCHITECTURES[:1]) + "+PTX"


def use_ccache() -> None:
    """Where there is ccache, compile only what no build on this machine has compiled before."""
    cache = shutil.which("ccache")
    if cache is None or "CXX" in os.environ:
        return
    os.environ.setdefault("PYTORCH_NVCC", "ccache nvcc")
    os.environ.setdefault("CCACHE_BASEDIR", str(ROOT.resolve()))  # the same in every checkout
    os.environ.setdefault("CCACHE_NOHASHDIR", "1")
    # torch takes one word for a compiler: ccache stands in for the one whose name it is called by
    folder = ROOT.resolve() / "build/ccache"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("c++", "g++", "clang++"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(cache)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def no_cpu_extension() -> str | None:
    """Why nothing can be compiled here, and what helps; or None."""
    if sys.platform == "win32":
        return "it is not built on Windows; the package runs without it (DTOKD_BUILD=none)"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        return f"no C++ compiler: {compiler[0]} is not on the PATH; install one (Debian: g++) or set CXX"
    tried = subprocess.run([*compiler, "-std=c++20", "-x", "c++", "-E", os.devnull], capture_output=True, check=False)
    if tried.returncode:
        return f"the C++ compiler {compiler[0]} does not take -std=c++20; GCC 10 and Clang 13 do, or set CXX to another"
    try:
        runpy.run_path(str(ROOT / "dtokd_kernels/_supported.py"))
    except ImportError as error:
        return (
            f"{error} in the environment of the build, which is this one with `pip install setuptools wheel ninja` "
            "and `pip install --no-build-isolation .`"
        )
    return None


def extensions() -> dict:
    wanted = os.environ.get("DTOKD_BUILD", "auto")
    if wanted not in CHOICES:
        sys.exit(f"DTOKD_BUILD is {wanted!r}; choose one of {', '.join(CHOICES)}")
    if wanted == "none":
        return {}
    use_ccache()
    if (reason := no_cpu_extension()) is not None:
        if wanted != "auto":
            sys.exit(f"DTOKD_BUILD={wanted} cannot build the CPU extension: {reason}")
        print(f"dtokd: no CPU extension: {reason}")
        return {}
    home = cuda_home()
    if home is not None:
        os.environ.setdefault("CUDA_HOME", home)  # read when cpp_extension is imported
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    obstacle = None
    if home is None:
        obstacle = "no nvcc on the PATH"
    elif torch.version.cuda is None:
        obstacle = "this torch is built without CUDA"
    if wanted == "cuda" and obstacle:
        sys.exit(f"DTOKD_BUILD=cuda cannot build the CUDA extension: {obstacle}")
    if wanted == "auto" and obstacle:
        print(f"dtokd: no CUDA extension: {obstacle}")

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if wanted != "auto":
                    raise
                print(f"dtokd: an extension could not be built ({error}); the package runs without it")
                self.extensions = [e for e in self.extensions if Path(self.get_ext_fullpath(e.name)).exists()]

    shared = {
        "include_dirs": [str(ROOT / "csrc"), str(ROOT / "csrc/include")],
        "py_limited_api": True,
        "optional": wanted == "auto",
    }
    stable = [("TORCH_TARGET_VERSION", "0x020a000000000000")]
    # without the debug information that Python's own flags ask for, which is nine tenths of the library, and without
    # the path of this checkout: the same sources give the same bytes. GCC has thousands of false alarms in its own
    # AVX-512 header; warnings are for CMakeLists.txt, which compiles the core with all of them.
    # No contraction, which GCC does on its own: where a product and a sum round once the source says fma, so that the
    # widest registers and the narrowest give the same bits.
    compiled = ["-O3", "-g0", "-w", "-std=c++20", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden"]
    compiled += [f"-ffile-prefix-map={ROOT.resolve()}=."]
    modules = [
        CppExtension(
            "dtokd_kernels._C",
            sources("core", "torch"),
            define_macros=stable,
            extra_compile_args=compiled,
            **shared,
        )
    ]
    if wanted != "cpu" and not obstacle:
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures())
        modules.append(
            CUDAExtension(
                "dtokd_kernels._cuda",
                sources("cuda", "torch-cuda"),
                define_macros=[*stable, ("USE_CUDA", None)],
                # no contraction: the sums and products written are the ones computed, on every architecture.
                # NVCC_APPEND_FLAGS=-lineinfo lets profilers show source lines, in a library of twice the size
                extra_compile_args={"cxx": compiled, "nvcc": ["-O3", "-std=c++20", "-fmad=false"]},
                **shared,
            )
        )
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extensions())
