"""triton's PTX on the CPU: the kernels as triton compiles them for a GPU, without interpreter and without GPU."""

import ctypes
import importlib
from types import SimpleNamespace

import pytest
import torch

from .inputs import gradients
from .ptx.library import Library
from .ptx.parser import parse
from .test_gram import assert_gram
from .test_step import Step, assert_step

compiler = pytest.importorskip("dtokd_kernels.triton.compile", reason="triton is not installed")
pytestmark = pytest.mark.skipif(compiler.INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler")

CHUNK = compiler.CHUNK
ARGUMENTS = {"i32": ctypes.c_int32, "fp64": ctypes.c_double}


class Kernel:
    """Stands in for a kernel of triton: compiles it for sm_90 when launched, and runs the PTX."""

    def __init__(self, kernel, folder):
        self.kernel, self.folder, self.launches = kernel, folder, 0

    def __getitem__(self, grid):
        return lambda *args, **flags: self.launch(grid, args, flags)

    def launch(self, grid, args, flags):
        given = {**dict(zip(self.kernel.arg_names, args, strict=False)), **flags}
        constexpr = {p.name for p in self.kernel.params if p.is_constexpr}
        constants = {n: v for n, v in given.items() if n in self.kernel.arg_names and (n in constexpr or v is None)}
        options = {name: value for name, value in flags.items() if name not in self.kernel.arg_names}
        variant = compiler.Variant(self.kernel.__name__, self.kernel, constants, options)
        compiled = compiler.compile(variant, 90)
        ptx, metadata = compiled.asm["ptx"], compiled.metadata
        arguments = [self.value(p, given[p.name]) for p in self.kernel.params if p.name not in constants]
        # triton adds pointers to scratch memory, which these kernels do not use
        (function,) = (f for f in parse(ptx).functions if f.is_kernel)
        arguments += [None] * (len(function.parameters) - len(arguments))
        library = Library(ptx, f"{metadata.name}{self.launches}", self.folder)
        library.launch(metadata.name, grid, (32 * metadata.num_warps,), arguments, shared_bytes=metadata.shared)
        self.launches += 1

    @staticmethod
    def value(parameter, value):
        if isinstance(value, torch.Tensor):
            return value
        return ARGUMENTS[parameter.annotation_type or "i32"](value)


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """The functions that launch triton's kernels, which run as PTX."""
    gram, update = (importlib.import_module(f"dtokd_kernels.triton.{name}") for name in ("gram", "update"))
    made = []
    for module, names in ((gram, ("gram_kernel", "gram_sum_kernel")), (update, ("count_kernel", "adamw_kernel"))):
        for name in names:
            made.append(Kernel(getattr(module, name), tmp_path))
            monkeypatch.setattr(module, name, made[-1])

    def adamw_step(params, grads, m, v, largest, steps, coefficients, skipped, *, amsgrad, **numbers):
        update.adamw_step(
            params, grads, [m, v, largest] if amsgrad else [m, v], steps, coefficients, skipped, **numbers
        )

    return SimpleNamespace(
        gram=gram.gram, adamw_step=adamw_step, launched=lambda: [k.kernel.__name__ for k in made if k.launches]
    )


# a whole chunk, which takes the path of 16-byte accesses, and a ragged one
SIZES = [CHUNK + 77, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram(kernels, dtype):
    grads = gradients(2, SIZES, dtype)
    assert_gram(kernels.gram(grads), grads)
    assert kernels.launched() == ["gram_kernel", "gram_sum_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_step(kernels, dtype):
    before = Step("adamw", 2, SIZES, dtype)
    assert_step(before, before.clone().run(kernels))
    assert kernels.launched() == ["count_kernel", "adamw_kernel"]
