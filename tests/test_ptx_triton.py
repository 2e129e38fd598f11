"""triton's PTX on the CPU: the kernels as triton compiles them for a GPU, without interpreter and without GPU."""

import contextlib
import ctypes
import importlib
from types import SimpleNamespace

import pytest
import torch

import dtokd_kernels as dk
from dtokd_kernels import reference
from dtokd_kernels.implementations import _record
from dtokd_kernels.rules import RULES
from dtokd_kernels.types import Options

from . import tolerances
from .inputs import LAYOUTS, gradients
from .ptx.library import Library, Program
from .ptx.parser import parse
from .test_gram import assert_gram
from .test_step import NEVER, Step, assert_step

compiler = pytest.importorskip("tests.triton_kernels", reason="triton is not installed")
pytestmark = pytest.mark.skipif(compiler.INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler")

CHUNK = compiler.CHUNK
MODULES = gram, solve, update, tables = [
    importlib.import_module(f"dtokd_kernels.triton.{name}") for name in ("gram", "solve", "update", "tables")
]
FUNCTIONS = {f for module in MODULES for f in vars(module).values() if hasattr(f, "_unsafe_update_src")}
Member = gram.Member
ARGUMENTS = {"i32": ctypes.c_int32, "fp64": ctypes.c_double}


class Kernel:
    """Stands in for a kernel of triton: compiles it for sm_90 when launched, and runs the PTX.

    memory: what the kernel's tables point to; then it runs under the thread sanitizer.
    """

    def __init__(self, kernel, folder, memory=None):
        self.kernel, self.folder, self.memory, self.launches = kernel, folder, memory, 0

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
        kind, memory = (Library, ()) if self.memory is None else (Program, (self.memory,))
        library = kind(ptx, f"{metadata.name}{self.launches}", self.folder)
        threads = (32 * metadata.num_warps,)
        library.launch(metadata.name, grid, threads, arguments, *memory, shared_bytes=metadata.shared)
        self.launches += 1

    @staticmethod
    def value(parameter, value):
        if isinstance(value, torch.Tensor):
            return value
        return ARGUMENTS[parameter.annotation_type or "i32"](value)


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """The functions that launch triton's kernels, which run as PTX."""
    return launchers(tmp_path, monkeypatch, None)


@pytest.fixture
def watched_kernels(tmp_path, monkeypatch):
    """The same with the thread sanitizer over the kernels that take a ticket."""
    return launchers(tmp_path, monkeypatch, [])


def launchers(folder, monkeypatch, memory):
    made = []
    kernels = (
        (gram, ("gram_kernel", "gram_sum_kernel")),
        (solve, ("balance_kernel",)),
        (update, ("update_kernel",)),
    )
    for module, names in kernels:
        for name in names:
            takes_a_ticket = name in ("balance_kernel", "update_kernel")
            made.append(Kernel(getattr(module, name), folder, memory if takes_a_ticket else None))
            monkeypatch.setattr(module, name, made[-1])

    def run_step(step, measured=False):
        table = step.coefficients.expand(3, -1)
        of_group = [step.options[name] for name in RULES["adamw"].numbers]
        table = torch.stack([table[0], torch.full_like(table[0], torch.nan), table[0]])
        params = step.tensors["param"]
        groups = tuple(t % 2 for t in range(len(params)))  # of roles 0 and 2; 2 alone if measured
        numbers = tuple(float(n) for n in (2 * measured, *of_group, 2, *of_group))
        reach = 2 ** len(step.grads) - 1
        descent = update.Descent(params, step.grads, groups, reach, table, NEVER, None, numbers)
        states = [step.tensors["exp_avg"], step.tensors["exp_avg_sq"], step.steps]
        if memory is not None:
            memory[:] = [t for row in [params, *step.grads, *states] for t in row]
        ticket = torch.zeros(1, dtype=torch.int32)
        return update.step(RULES["adamw"], descent, states, step.options, ticket, measured)

    return SimpleNamespace(
        gram_by_role=gram.gram_by_role,
        gram_balance=solve.gram_balance,
        run_step=run_step,
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
    grams, values, flags = kernels.gram_balance(members, losses, True, True, False, 1.0, 1e-8, 2.0**60)
    assert_gram(grams[0], grads)
    assert_gram(grams[2], plain)
    zero = [torch.zeros_like(g) for g in private[0]]
    assert_gram(grams[1], [[private[0][0], zero[1]], *[zero] * (K - 2), [zero[0], private[-1][1]]])
    got = _record(grams, values, flags)
    expected = reference.balance(grams, losses, Options(dk.weighting.DTO(), max_norm=1.0))
    bound = tolerances.weights_bound(grams[0] / losses.outer(losses)) + 100 * tolerances.unit_roundoff(torch.float64)
    for name in ("weights", "table", "norm", "norms", "cosine"):
        a, b = getattr(got, name), getattr(expected, name)
        assert ((a - b).abs() <= bound * (1 + b.abs())).all(), name
    assert not got.skipped
    assert kernels.launched() == [*["gram_kernel"] * 4, "balance_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_step_that_measures(kernels, dtype):
    before = Step("adamw", 2, SIZES, dtype)
    after = before.clone()
    grams = [kernels.run_step(after, measured=True)]
    assert_step(before, after)
    assert_gram(grams[0][2], before.grads)
    assert not grams[0][:2].any()
    assert kernels.launched() == ["gram_sum_kernel", "update_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_step(kernels, dtype):
    before = Step("adamw", 2, SIZES, dtype)
    after = before.clone()
    kernels.run_step(after)
    assert_step(before, after)
    assert kernels.launched() == ["update_kernel"]
    assert all(count == 1 + was for count, was in zip(after.steps, before.steps, strict=True))


# ---- What only the PTX shows


@contextlib.contextmanager
def broken(function, old, new):
    """A function that kernels call, changed on purpose inside the block."""
    source = function.src
    assert source.count(old) == 1
    for text in (source.replace(old, new), source):
        function._unsafe_update_src(text)
        for each in FUNCTIONS:  # triton remembers what it has read of a function and of those that it calls
            each.hash = None
        if text != source:
            yield


RELAXED = (tables.last_program, 'sem="acq_rel"', 'sem="relaxed"')
UNCHECKED = (tables.find, " & (tl.load(table + 2 * T + low) != 0)", "")


def balance_by_ticket(kernels):
    grads = gradients(2, [40, 5], torch.float32)
    losses = torch.tensor([0.5, 2.0], dtype=torch.float64)
    grams, values, _ = kernels.gram_balance([Member(0, 3, grads)], losses, True, True, False, 1.0, 1e-8, 2.0**60)
    assert_gram(grams[0], grads)
    expected = reference.balance(grams, losses, Options(dk.weighting.DTO(), max_norm=1.0))
    assert (values[:2] - expected.weights).abs().max() <= tolerances.weights_bound(grams[0] / losses.outer(losses))


def step_by_ticket(kernels):
    before = Step("adamw", 2, [40, 5], torch.float32)
    after = before.clone()
    kernels.run_step(after)
    assert_step(before, after)


@pytest.mark.parametrize("run", [balance_by_ticket, step_by_ticket])
def test_what_the_last_program_reads_has_been_passed_on(watched_kernels, run):
    """The thread sanitizer finds no accesses that barriers and the ticket leave unordered; without its order, some."""
    run(watched_kernels)
    with broken(*RELAXED), pytest.raises(RuntimeError, match="ThreadSanitizer: data race"):
        run(watched_kernels)


def shifted_gram(kernels):
    grads = [[LAYOUTS["misaligned"](g) for g in row] for row in gradients(2, SIZES, torch.float32)]
    assert_gram(kernels.gram_by_role([Member(0, 3, grads)], 2)[0], grads)


def shifted_step(kernels):
    """One list each time: 16-byte accesses need all of them at multiples of 16 bytes."""
    before = Step("adamw", 2, SIZES, torch.float32)
    for name in ("grads", "param", "exp_avg_sq"):
        after = before.clone()
        if name == "grads":
            after.grads[1] = [LAYOUTS["misaligned"](g) for g in after.grads[1]]
        else:
            after.tensors[name] = [LAYOUTS["misaligned"](t) for t in after.tensors[name]]
        kernels.run_step(after)
        assert_step(before, after)


@pytest.mark.parametrize("run", [shifted_gram, shifted_step])
def test_tensors_at_any_address(kernels, run):
    """The emulation refuses an access at an address that is no multiple of its bytes; and finds one made on purpose."""
    run(kernels)
    with broken(*UNCHECKED), pytest.raises(RuntimeError, match="misaligned access"):
        run(kernels)


def test_coefficients_of_both_signs(kernels):
    """Affine weights may be negative: by whole chunks and by what is left."""
    coefficients = torch.tensor([1.7, -0.5], dtype=torch.float64)
    before = Step("adamw", 2, SIZES, torch.float32, coefficients=coefficients)
    after = before.clone()
    kernels.run_step(after)
    assert_step(before, after)
