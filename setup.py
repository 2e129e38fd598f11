"""Builds dtokd_kernels._C, the C++ operations, beside the pure-Python packages (pyproject.toml has the rest).

DTOKD_BUILD says what to build: "auto" (the default: what can be built; without a compiler or without torch at
build time a pure-Python package), "cpu" (the extension, or fail), "none" (pure Python).
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CHOICES = ("auto", "cpu", "none")


def sources(*kinds: str) -> list[str]:
    lines = (ROOT / "csrc/sources.txt").read_text().splitlines()
    return [f"csrc/{line.split()[1]}" for line in lines if line.startswith(kinds)]


def extension() -> dict:
    wanted = os.environ.get("DTOKD_BUILD", "auto")
    if wanted not in CHOICES:
        sys.exit(f"DTOKD_BUILD is {wanted!r}; choose one of {', '.join(CHOICES)}")
    if wanted == "none":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        if wanted == "cpu":
            sys.exit(
                "DTOKD_BUILD=cpu needs torch when building: install it first, then pip install --no-build-isolation ."
            )
        print("dtokd: no torch in the build environment, so no extension; see --no-build-isolation in the README")
        return {}

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                if wanted == "cpu":
                    raise
                print(f"dtokd: the extension could not be built ({error}); the package runs through its reference")
                self.extensions = []

    module = CppExtension(
        "dtokd_kernels._C",
        sources("core", "torch"),
        include_dirs=[str(ROOT / "csrc"), str(ROOT / "csrc/include")],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("Py_LIMITED_API", "0x030a0000")],
        extra_compile_args=["-O3", "-std=c++20", "-fno-math-errno", "-fvisibility=hidden"],
        py_limited_api=True,
        optional=wanted == "auto",
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
