"""The Triton kernels without a GPU: interpreted on the CPU, and compiled for GPUs that are not there.

A process either interprets kernels or compiles them. In one that compiles, `test_in_the_interpreter` starts one that
interprets, for the tests here that need it and for those of the other files that run once per backend.
"""

import importlib
import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dtokd_kernels as dk
from dtokd_kernels import backends, reference
from dtokd_kernels.types import Options, Role

from . import tolerances
from .inputs import DTYPES, IMAGE, each_dtype, gradients
from .test_combine import COEFFICIENTS, assert_combined
from .test_gram import assert_gram
from .test_step import Step, assert_step
from .updates import Update, measure_and_run, run

pytest.importorskip("triton", reason="triton is not installed")
interpreted = pytest.mark.skipif(
    not backends.interpreted(), reason="needs TRITON_INTERPRET=1; test_in_the_interpreter runs it"
)
compiled = pytest.mark.skipif(backends.interpreted(), reason="TRITON_INTERPRET=1 replaces the compiler")

ROOT = Path(__file__).parents[1]
CHUNK = 8192  # elements of a program
#: Around a lane of 16 bytes, a block of the loops, and a chunk; empty tensors first, in the middle and last.
SIZES = (0, 1, 9, 0, 1023, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 0)

#: What the interpreter runs of the other files: every dtype, layout, update rule and option, but only small tensors.
SELECTED = (
    "tests/test_triton.py",
    "tests/test_operations.py",
    "tests/test_gram.py -k list_with_empty and not 5 or layouts and not may_differ or not_finite and float32"
    " or none_counts or golden or expanded or scale",
    "tests/test_combine.py -k list_with_empty or out or layouts or kinds or version or empty_list or golden",
    "tests/test_step.py -k every_variant or vertex or layout_of_everything or another_dtype or skipped or lr or tiny",
    "tests/test_balance.py -k not torchjd",
    "tests/test_lion.py -k plain_sum or sign or measures",
    "tests/test_weights.py -k golden or present or any_float or layout or one_objective or affine_solution_may",
    "tests/test_optim.py -k direction or several_dtypes or reach_that_changes or channels_last or all_gradients_zero",
    "tests/test_backward.py -k fills_grad or layouts",
)


# ---- interpreted -----------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("selected", SELECTED, ids=lambda s: s.split()[0].removeprefix("tests/"))
def test_in_the_interpreter(selected):
    file, _, words = selected.partition(" -k ")
    if words:
        words = f"triton and ({words})"
    command = [sys.executable, "-m", "pytest", "-q", file, *(["-k", words] if words else [])]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert re.search(r"\b[1-9]\d* passed", result.stdout)


@pytest.fixture
def kernels():
    """The backend, forced as a user would."""
    with dk.use_backend("triton"):
        yield backends.select(torch.device("cpu"))


@interpreted
@pytest.mark.parametrize(("K", "dtype"), [*((K, torch.float32) for K in range(1, 9)), *((3, d) for d in DTYPES[1:])])
def test_gram_of_every_number_of_objectives_and_size(kernels, K, dtype):
    grads = gradients(K, SIZES if K <= 3 else SIZES[:5], dtype)
    assert_gram(dk.gram(grads), grads)


@interpreted
@pytest.mark.parametrize(("K", "dtype"), [*((K, torch.float32) for K in range(1, 9)), *((3, d) for d in DTYPES[1:])])
def test_combine_of_every_number_of_objectives_and_size(kernels, K, dtype):
    grads = gradients(K, SIZES if K <= 3 else SIZES[:5], dtype)
    assert_combined(dk.combine(grads, COEFFICIENTS[:K]), grads, COEFFICIENTS[:K])


@interpreted
@pytest.mark.parametrize(("K", "dtype"), [*((K, torch.float32) for K in (1, 2, 5, 8)), *((2, d) for d in DTYPES[1:])])
@pytest.mark.parametrize("variant", ["adamw amsgrad", "sgd nesterov"])
def test_step_of_every_number_of_objectives_and_size(kernels, variant, K, dtype):
    before = Step(variant, K, SIZES if K <= 2 else SIZES[:5], dtype)
    assert_step(before, before.clone().run(kernels))


def moved(t):
    """The same values, one element after an address that 16 divides."""
    return t.new_empty(t.numel() + 1)[1:].copy_(t)


@interpreted
@each_dtype
def test_bits_do_not_depend_on_alignment(kernels, dtype):
    """Whole chunks of misaligned tensors take the path of the ragged ones, which adds in the same order."""
    grads = gradients(2, [2 * CHUNK + 77], dtype)
    shifted = [[moved(g) for g in row] for row in grads]
    assert all(g.data_ptr() % 16 == 0 for [g] in grads)
    assert all(g.data_ptr() % 16 != 0 for [g] in shifted)
    assert torch.equal(dk.gram(grads), dk.gram(shifted))
    for a, b in zip(dk.combine(grads, COEFFICIENTS[:2]), dk.combine(shifted, COEFFICIENTS[:2]), strict=True):
        assert torch.equal(a, b)


@interpreted
def test_bits_do_not_depend_on_the_other_tensors(kernels):
    """A chunk's sums are its own: a list in another order, or with empty tensors between, adds the same numbers."""
    grads = gradients(2, [100, CHUNK + 3], torch.float32)
    split = [[row[0], row[0].new_empty(0), row[1]] for row in grads]
    assert torch.equal(dk.gram(grads), dk.gram(split))


@interpreted
def test_a_vertex_does_not_read_the_gradient_it_leaves_out(kernels):
    before = Step("adamw", 2, [CHUNK + 40], torch.float32, coefficients=torch.tensor([1.5, 0.0]).double())
    expected, after = before.clone(), before.clone()
    after.grads[1][0].fill_(float("nan"))
    for step in (expected, after):
        step.run(kernels)
    assert torch.equal(after.tensors["param"][0], expected.tensors["param"][0])


@interpreted
@pytest.mark.parametrize("variant", ["adamw amsgrad", "sgd nesterov"])
def test_bits_do_not_depend_on_the_configuration(kernels, monkeypatch, variant):
    """Warps and accesses of a program: each element is computed by itself."""
    from dtokd_kernels.triton import update

    def bits(vectors):
        monkeypatch.setattr(update, "VECTORS", vectors)
        step = Step(variant, 2, [CHUNK + 40], torch.float32).run(backends.select(torch.device("cpu")))
        return [t.view(torch.int32) for tensors in step.tensors.values() for t in tensors]

    for one, two in zip(bits(1), bits(2), strict=True):
        assert torch.equal(one, two)


@interpreted
def test_tensors_whose_alignment_differs_in_one_list(kernels):
    before = Step("adamw", 2, [CHUNK + 40, CHUNK], torch.float32)
    after = before.clone()
    after.tensors["exp_avg"][0] = moved(after.tensors["exp_avg"][0])
    after.grads[1][1] = moved(after.grads[1][1])
    assert_step(before, after.run(kernels))


@interpreted
def test_whole_steps_change_and_reuse_tables(kernels):
    """Gradients that move from step to step, as zero_grad(set_to_none=True) makes them, and parameters that stay."""
    from dtokd_kernels.triton import tables

    with dk.use_backend("reference"):
        expected = [t.double() for t in three_steps()]
    before = tables._table.cache_info()
    got = three_steps()
    after = tables._table.cache_info()
    assert after.misses > before.misses
    assert after.currsize <= after.maxsize
    for a, b in zip(got, expected, strict=True):
        # float32 against float32, three steps of lr 0.1: each step's rounding is within a few u of its size
        assert (a - b).abs().max() <= 3 * 100 * tolerances.unit_roundoff(torch.float32)


def three_steps():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    optimizer = dk.DTOAdamW(model.parameters(), lr=0.1, max_norm=1.0)
    for _ in range(3):
        out = model(torch.ones(4, 5))
        optimizer.backward([out.square().mean(), (out - 1).square().mean()])
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


@interpreted
def test_table_without_host_memory():
    """How a table gets into a CUDA graph: addresses pass through torch's scalars without loss."""
    from dtokd_kernels.triton.tables import fill_without_host_memory

    numbers = [0, 1, 2**31, 0x7F12_3456_7890, 2**62 + 1, *range(300)]
    assert fill_without_host_memory(numbers, torch.device("cpu")).tolist() == numbers


@pytest.fixture
def stream(monkeypatch):
    """The stream that tables are made for, as if there were some; None: it captures. And what is filled in captures."""
    from dtokd_kernels.triton import tables

    stream = SimpleNamespace(id=1, filled=[])
    fill = tables.fill_without_host_memory
    monkeypatch.setattr(tables, "_stream", lambda device: stream.id)
    monkeypatch.setattr(tables, "fill_without_host_memory", lambda *args: stream.filled.append(1) or fill(*args))

    def forget():
        monkeypatch.setattr(tables, "_captured", {})
        tables._table.cache_clear()
        tables._copied.cache_clear()

    stream.forget = forget
    forget()
    return stream


def other_tables():
    """More than the caches hold."""
    from dtokd_kernels.triton import tables

    kept = [torch.ones(3) for _ in range(tables._table.cache_info().maxsize + 1)]
    for t in kept:
        tables.table_of([[t]])
        tables.numbers_of((0.5, 1.0), [t])


def steps(stream, kind, source, warmup, captured, moved=False):
    """Parameters after eager steps on another stream and ones that a graph would hold; how many tables these filled."""
    params = [torch.nn.Parameter(torch.full((5,), 1.0 + i)) for i in range(4)]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.3, "lr": 0.05}]
    optimizer = kind(groups, lr=0.1, gram=source, **({"momentum": 0.9} if kind is dk.DTOSGD else {}))

    def backward():
        optimizer.zero_grad()
        optimizer.backward([sum(p.square().sum() for p in params), sum((p - 1).square().sum() for p in params)])

    stream.forget()  # of tensors whose place these have taken
    backward()
    stream.filled.clear()
    stream.id = 2
    for step in range(warmup + captured):
        if step == warmup:
            stream.id = None
        if moved:
            before = optimizer._sets.grads  # alive, so that the next ones lie elsewhere
            backward()
            del before
        optimizer.step()
    return torch.stack([p.detach() for p in params]), len(stream.filled)


@interpreted
@pytest.mark.parametrize("source", ["exact", "lag"])
@pytest.mark.parametrize("kind", [dk.DTOAdamW, dk.DTOSGD])
def test_a_capture_reads_the_tables_of_the_warm_up(kernels, stream, kind, source):
    """Those of one stream serve the capture on another; gradients that lie elsewhere get tables in the graph."""
    eager, filled = steps(stream, kind, source, 4, 0)
    assert filled == 0
    got, filled = steps(stream, kind, source, 2, 2)
    assert filled == 0
    assert torch.equal(got, eager)
    got, filled = steps(stream, kind, source, 0, 4)
    assert filled >= 4
    assert torch.equal(got, eager)
    eager, _ = steps(stream, kind, source, 4, 0, moved=True)
    got, filled = steps(stream, kind, source, 2, 2, moved=True)
    assert filled >= 2
    assert torch.equal(got, eager)


@interpreted
def test_what_a_graph_reads_is_kept(stream):
    """Neither dropped by the caches nor written again, while what the graph filled itself goes with it."""
    from dtokd_kernels.triton import tables

    a, b = torch.ones(5), torch.ones(5)
    eager, numbers = tables.table_of([[a]]), tables.numbers_of((0.5, 1.0), [a])
    expected = eager.numbers.clone()
    stream.id = None
    assert tables.table_of([[a]]) is eager
    assert tables.numbers_of((0.5, 1.0), [a]) is numbers
    assert not stream.filled
    stream.id = 1
    other_tables()
    assert tables.table_of([[a]]) is not eager
    stream.id = None
    assert tables.table_of([[a]]) is eager
    assert tables.numbers_of((0.5, 1.0), [a]) is numbers
    assert torch.equal(eager.numbers, expected)
    own = tables.table_of([[b]])
    assert (own.chunks, own.numbers[:, 0].tolist()) == (1, [0, 5, 1, b.data_ptr()])
    assert tables.table_of([[b]]) is not own
    assert len(stream.filled) == 2


@interpreted
def test_a_capture_reads_no_table_that_is_gone_or_of_other_contents(stream):
    """Equal numbers of another optimizer are other contents: their copy may not be done yet."""
    from dtokd_kernels.triton import tables

    a, b = torch.ones(5), torch.ones(5)
    tables.table_of([[a]], groups=(0,))
    tables.numbers_of((0.5, 1.0), [torch.ones(0), a])
    stream.id = None
    for lists, scalars, groups in (([[a]], (), ()), ([[a]], (), (1,)), ([[b]], (), (0,)), ([[a]], (b,), ())):
        tables.table_of(lists, scalars, groups)
    assert tables.numbers_of((0.5, 2.0), [a]).tolist() == [0.5, 2.0]
    assert tables.numbers_of((0.5, 1.0), [b]).tolist() == [0.5, 1.0]
    assert len(stream.filled) == 6
    stream.id = 1
    other_tables()
    stream.id = None
    tables.table_of([[a]], groups=(0,))
    tables.numbers_of((0.5, 1.0), [a])
    assert len(stream.filled) == 8


@interpreted
@each_dtype
def test_rounding_to_nearest_even(kernels, dtype):
    """Ties, overflow to infinity, values that carry into the exponent, subnormal results, NaN."""
    if dtype in (torch.float32, torch.float64):
        values = torch.tensor([1.0, -2.5, 3e38, float("inf"), float("nan")], dtype=dtype)
    else:
        info = torch.finfo(dtype)
        ulp = info.eps
        values = torch.tensor([1 + ulp / 2, 1 + 1.5 * ulp, 2 - ulp / 4, -1 - ulp / 2, info.max, 0.0, 3.3, float("nan")])
    one = torch.ones(1, dtype=dtype)
    out = torch.cat([dk.combine([[one]], value.double()[None])[0] for value in values])
    expected = values.to(torch.float32 if dtype != torch.float64 else dtype).to(dtype)
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))


@interpreted
def test_tensors_that_fit_no_kernel_take_the_reference(kernels):
    """A step counter of another dtype than the others, and parameters with gaps: slower, but the same step."""
    for change in ("steps", "params"):
        before = Step("adamw", 2, [IMAGE, IMAGE], torch.float32)
        after = before.clone()
        if change == "steps":
            after.steps[1] = after.steps[1].double()
        else:
            after.tensors["param"] = [p.repeat_interleave(2, -1)[..., ::2] for p in after.tensors["param"]]
        assert_step(before, after.run(kernels))


@interpreted
def test_float64_counters(kernels):
    before = Step("adamw", 2, [33], torch.float32)
    before.steps = [s.double() for s in before.steps]
    assert_step(before, before.clone().run(kernels))


class Launches:
    """Stands in for a kernel and counts how often it is launched."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append(self.kernel.__name__)
        return self.kernel[grid]


def launched_by(monkeypatch, run):
    """Names of the kernels that `run` launches."""
    launched = []
    for module in (importlib.import_module(f"dtokd_kernels.triton.{name}") for name in ("gram", "solve", "update")):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel") and not isinstance(kernel, Launches):
                monkeypatch.setattr(module, name, Launches(kernel, launched))
    run()
    return launched


@interpreted
@pytest.mark.parametrize("kind", [dk.DTOAdamW, dk.DTOSGD])
def test_three_launches_for_many_tensors_in_several_groups(kernels, monkeypatch, kind):
    """Groups that differ in every number; one outside the balance, whose Gram matrix takes a launch of its own.

    The same step as the reference's.
    """

    def step():
        params = [torch.nn.Parameter(torch.full((3,), 1.0 + i)) for i in range(80)]
        more = {"betas": (0.8, 0.99), "eps": 1e-3} if kind is dk.DTOAdamW else {"momentum": 0.5, "dampening": 0.2}
        groups = [
            {"params": params[:30]},
            {"params": params[30:60], "weight_decay": 0.3, "lr": 0.05},
            {"params": params[60:], "lr": 0.2, "balance": False, **more},
        ]
        optimizer = kind(groups, lr=0.1, max_norm=1.0, **({"momentum": 0.9} if kind is dk.DTOSGD else {}))
        for last in (False, True):
            optimizer.zero_grad()
            optimizer.backward([sum(p.square().sum() for p in params), sum((p - 1).square().sum() for p in params)])
            names = launched_by(monkeypatch, optimizer.step) if last else optimizer.step()
        assert not optimizer.balance.skipped
        return names, torch.stack([p.detach() for p in params])

    names, got = step()
    assert names == ["gram_kernel", "gram_kernel", "balance_kernel", "update_kernel"]
    with dk.use_backend("reference"):
        assert torch.allclose(got, step()[1], rtol=1e-5, atol=0)


def whole(rule, K, sizes, dtype, role=Role.SHARED, **options):
    """An update as the optimizers make it."""
    rows = gradients(K + 4, sizes, dtype)
    positive = [[t.square() for t in row] for row in rows[K + 1 :]]
    steps = [torch.tensor(float(t)) for t in range(len(sizes))]
    numbers = {"lr": 0.1, "weight_decay": 0.1, "maximize": False}
    if rule == "sgd":
        numbers |= {"momentum": 0.9, "dampening": 0.1, "nesterov": True, "first": False}
        state = {"momentum_buffer": rows[K + 1]}
    else:
        numbers |= {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "amsgrad": options.get("amsgrad", False)}
        state = {"exp_avg": rows[K + 1], "exp_avg_sq": positive[1], "step": steps}
        if numbers["amsgrad"]:
            state["max_exp_avg_sq"] = positive[2]
    return Update(rule, role, tuple(range(K)), rows[K], rows[:K], state, numbers | options)


@interpreted
@pytest.mark.parametrize(("K", "dtype"), [*((K, torch.float32) for K in (1, 2, 5, 8)), *((2, d) for d in DTYPES[1:])])
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_update_that_measures_has_the_bits_of_two_passes(kernels, rule, K, dtype):
    """Of two roles, skipped or not; a gradient of coefficient 0 is measured and not descended."""
    sizes = SIZES if K == 2 else SIZES[:5]
    table = torch.linspace(0, 1, 3 * K, dtype=torch.float64).view(3, K)
    for skipped in (torch.tensor(False), torch.tensor(True)):
        updates = [[whole(rule, K, sizes, dtype), whole(rule, K, [77], dtype, Role.PLAIN, lr=0.2)] for _ in range(2)]
        grams = measure_and_run(kernels, updates[0], table, skipped)
        run(kernels, updates[1], table, skipped)
        for one, two in zip(*updates, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one.tensors(), two.tensors(), strict=True))
            assert torch.equal(grams[one.role], dk.gram(one.grads))
        assert not grams[Role.PRIVATE].any()


@interpreted
def test_update_that_measures_of_some_objectives(kernels):
    """And of empty tensors only, and of tensors that fit no kernel."""
    table = torch.ones(3, 3, dtype=torch.float64)
    private, empty, odd = (whole("adamw", 2, sizes, torch.float32) for sizes in ([300, CHUNK], [0, 0], [5]))
    private = replace(private, role=Role.PRIVATE, reach=(0, 2))
    odd.state["exp_avg"] = [t.double() for t in odd.state["exp_avg"]]
    updates = [private, replace(empty, reach=(0, 1)), replace(odd, reach=(1, 2))]
    grams = measure_and_run(kernels, updates, table, torch.tensor(False))
    expected = torch.zeros(3, 3, 3, dtype=torch.float64)
    expected[Role.PRIVATE] = reference.gram([private.grads[0], [None] * 2, private.grads[1]])
    expected[Role.SHARED] = reference.gram([[None], *odd.grads])
    assert (grams - expected).abs().max() <= tolerances.REORDERED * expected.max()
    assert empty.state["step"] == [1, 2]


@interpreted
@pytest.mark.parametrize("skipped", [False, True])
def test_steps_are_counted_once_by_the_last_program(kernels, skipped):
    """Of tensors of several chunks, empty ones, and more of them than are counted at a time."""
    before = Step("adamw", 1, [CHUNK + 9, *[0] * 520, *[3] * 10], torch.float32)
    after = before.clone().run(kernels, torch.tensor(skipped))
    assert [int(a - b) for a, b in zip(after.steps, before.steps, strict=True)] == [int(not skipped)] * 531
    only_empty = Step("adamw", 2, [0, 0], torch.float32)
    assert only_empty.run(kernels).steps == [1, 8]


@interpreted
@pytest.mark.parametrize("K", [1, 2, 3])
@pytest.mark.parametrize(("private", "plain"), list(itertools.product([False, True], repeat=2)))
def test_balance_of_several_roles(kernels, K, private, plain):
    """Gram matrices of private and plain parameters, which only the optimizers pass."""
    grams = [g @ g.T for g in torch.randn(3, K, 5, dtype=torch.float64)]
    options = Options(dk.weighting.DTO(), max_norm=0.5, rescale="sum")
    grams = torch.stack([grams[0], grams[1] * private, grams[2] * plain])
    losses = torch.rand(K, dtype=torch.float64) + 0.1
    got = kernels.balance(grams, losses, options)
    expected = reference.balance(grams, losses, options)
    bound = tolerances.weights_bound(grams[0] / losses.outer(losses)) + 100 * tolerances.unit_roundoff(torch.float64)
    for name in ("weights", "coefficients", "private_coefficients", "plain_coefficients", "norm", "cosine", "norms"):
        a, b = getattr(got, name), getattr(expected, name)
        assert ((a - b).abs() <= bound * (1 + b.abs())).all(), name
    assert got.skipped == expected.skipped
    assert got.vertex == expected.vertex


@interpreted
def test_other_devices_are_refused(kernels):
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run on cuda; use 'reference'"):
        backends.select(torch.device("cuda"))


# ---- compiled --------------------------------------------------------------------------------------


@compiled
def test_needs_a_gpu_or_the_interpreter():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert backends.missing("triton") == "torch sees no GPU, and TRITON_INTERPRET=1 is not set"


def test_import_leaves_triton_alone():
    """Importing the package imports no triton and starts no CUDA: a machine may have neither."""
    code = "import sys, torch, dtokd_kernels; assert 'triton' not in sys.modules or 'triton' in torch.__dict__; "
    code += "assert not torch.cuda.is_initialized(); assert 'dtokd_kernels.triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def wanted():
    """Kernels and compute capabilities: float32 and bfloat16 for every GPU, the rest and K = 8 for one."""
    if backends.interpreted():
        return []
    from . import triton_kernels as compiler

    cases = []
    for K, dtypes, capabilities in (
        (2, (torch.float32, torch.bfloat16), (80, 90, 100)),
        (2, (torch.float64, torch.float16), (90,)),
        (8, (torch.float32,), (90,)),
    ):
        cases += [(v, c) for v in compiler.variants((K,), dtypes) for c in capabilities]
    names = {f"{v.name} sm_{c}": (v, c) for v, c in cases}  # some kernels do not depend on the dtype
    return [pytest.param(*case, id=name) for name, case in names.items()]


#: Lists that a kernel reads besides the K gradients, and lists that it writes, by the first word of a variant's name.
#: An update that measures reads no gradient twice, so its row is the same.
TRAFFIC = {"gram": (0, 0), "combine": (0, 1), "adamw": (3, 3), "sgd": (2, 2), "lion": (2, 2)}


@compiled
@pytest.mark.parametrize(("variant", "capability"), wanted())
def test_compiles_without_spills_to_wide_accesses(variant, capability):
    """What ptxas makes of a kernel. It says nothing of speed, and nothing of what a GPU computes."""
    from . import triton_kernels as compiler

    result = compiler.compile(variant, capability)
    code = compiler.sass(result)
    assert not re.search(r"\b(LDL|STL)\b", code), "registers are spilled"
    assert not re.search(r"\b(div\.(full|approx)|sqrt\.approx|rcp\.approx|ex2\.approx)", result.asm["ptx"])
    if variant.kernel.__name__ not in ("gram_kernel", "update_kernel"):
        return
    read, written = TRAFFIC[variant.name.split()[0]]
    read, written = (read + 1, written + 1) if "amsgrad" in variant.name else (read, written)
    loads, stores = len(re.findall(r"LDG\.\S*128", code)), len(re.findall(r"STG\.\S*128", code))
    unrolled = loads / (variant.constants["REACH"].bit_count() + read)
    # every list, by as many accesses of 16 bytes: one that fell back to narrow ones would be missing
    assert unrolled >= 1
    assert unrolled == int(unrolled)
    assert stores == unrolled * written
