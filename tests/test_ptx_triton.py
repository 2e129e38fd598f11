"""triton's PTX on the CPU: the kernels as triton compiles them for a GPU, without interpreter and without GPU."""

import ctypes
import importlib
from types import SimpleNamespace

import pytest
import torch

import dtokd_kernels as dk
from dtokd_kernels import fused, reference
from dtokd_kernels.types import Options

from . import tolerances
from .inputs import gradients
from .ptx.library import Library
from .ptx.parser import parse
from .test_gram import assert_gram
from .test_step import Step, assert_step

compiler = pytest.importorskip("dtokd_kernels.triton.compile", reason="triton is not installed")
pytestmark = pytest.mark.skipif(compiler.INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler")

CHUNK = compiler.CHUNK
Member = importlib.import_module("dtokd_kernels.triton.gram").Member
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
    gram, solve, update = (
        importlib.import_module(f"dtokd_kernels.triton.{name}") for name in ("gram", "solve", "update")
    )
    made = []
    kernels = (gram, ("gram_kernel", "gram_sum_kernel")), (solve, ("gram_balance_kernel",)), (update, ("adamw_kernel",))
    for module, names in kernels:
        for name in names:
            made.append(Kernel(getattr(module, name), tmp_path))
            monkeypatch.setattr(module, name, made[-1])

    def run_updates(updates, table, skipped, measured=False):
        (one,) = updates
        of_group = [one.options[name] for name in ("lr", "beta1", "beta2", "weight_decay", "eps")]
        table = torch.stack([table[0], torch.full_like(table[0], torch.nan), table[0]])
        groups = tuple(t % 2 for t in range(len(one.params)))  # of roles 0 and 2; 2 alone if measured
        numbers = (2 * measured, *of_group, 2, *of_group)
        reach = 2 ** len(one.grads) - 1
        descent = update.Descent(one.params, one.grads, groups, reach, table, skipped, None, numbers)
        states = [one.state["exp_avgs"], one.state["exp_avg_sqs"]]
        return update.adamw_step(descent, states, one.state["state_steps"], one.options["maximize"], measured)

    return SimpleNamespace(
        gram_by_role=gram.gram_by_role,
        gram_balance=solve.gram_balance,
        run_updates=run_updates,
        launched=lambda: [k.kernel.__name__ for k in made for _ in range(k.launches)],
    )


# a whole chunk, which takes the path of 16-byte accesses, and a ragged one
SIZES = [CHUNK + 77, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram(kernels, dtype):
    grads = gradients(2, SIZES, dtype)
    assert_gram(kernels.gram_by_role([Member(0, 3, grads)], 2)[0], grads)
    assert kernels.launched() == ["gram_kernel", "gram_sum_kernel"]


@pytest.mark.parametrize("K", [2, 3])
def test_gram_and_balance(kernels, K):
    """Three roles, one with two members of other reaches; the last of the programs that add up makes the balance."""
    grads = gradients(K, SIZES, torch.float32)
    private = gradients(K, [40, CHUNK], torch.float32, seed=1)
    plain = gradients(K, [3], torch.bfloat16, seed=2)
    members = [Member(0, 2**K - 1, grads), Member(2, 2**K - 1, plain)]
    members += [Member(1, 1, [private[0][:1]]), Member(1, 2 ** (K - 1), [private[-1][1:]])]
    losses = torch.linspace(0.5, 2, K, dtype=torch.float64)
    grams, values, flags = kernels.gram_balance(members, K, losses, True, True, False, 1.0, 1e-8, 2.0**60)
    assert_gram(grams[0], grads)
    assert_gram(grams[2], plain)
    zero = [torch.zeros_like(g) for g in private[0]]
    assert_gram(grams[1], [[private[0][0], zero[1]], *[zero] * (K - 2), [zero[0], private[-1][1]]])
    got = fused.record(grams[0], values, flags)
    expected = reference.balance(grams, losses, Options(dk.weighting.DTO(), max_norm=1.0))
    bound = tolerances.weights_bound(grams[0] / losses.outer(losses)) + 100 * tolerances.unit_roundoff(torch.float64)
    for name in ("weights", "table", "norm", "norms", "cosine"):
        a, b = getattr(got, name), getattr(expected, name)
        assert ((a - b).abs() <= bound * (1 + b.abs())).all(), name
    assert not got.skipped
    assert kernels.launched() == [*["gram_kernel"] * 4, "gram_balance_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_step_that_measures(kernels, dtype):
    before = Step("adamw", 2, SIZES, dtype)
    after, grams = before.clone(), []
    after.run(SimpleNamespace(run_updates=lambda *args: grams.append(kernels.run_updates(*args, measured=True))))
    assert_step(before, after)
    assert_gram(grams[0][2], before.grads)
    assert not grams[0][:2].any()
    assert kernels.launched() == ["gram_sum_kernel", "adamw_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_step(kernels, dtype):
    before = Step("adamw", 2, SIZES, dtype)
    after = before.clone().run(kernels)
    assert_step(before, after)
    assert kernels.launched() == ["adamw_kernel"]
    assert all(count == 1 + was for count, was in zip(after.steps, before.steps, strict=True))
